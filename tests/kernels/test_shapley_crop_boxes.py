import itertools
import re

import pytest
import torch

from ddfast.ops import normal_quantiles, reference
from tests.kernels.harness import WHERE, compile_ahead, run
from tests.ops.heatmaps import awkward_ids

LAUNCHER = "shapley_crop_boxes.shapley_crop_boxes"

# seed, rows, cols, pools, crops, clean_last, alpha, image height and width, crop heights and widths, coverage
HALF_SIDE = (2**40 + 3, 4, 4, [2], 5, True, 2.0, 224, 224, [112], [112], 1.0)
ADAPTIVE = (-1, 4, 4, [2, 3, 4], 5, True, 2.0, 32, 32, [16, 24, 32], [16, 24, 32], 0.8)
UNEVEN = (5, 3, 5, [1, 2], 3, False, 0.5, 31, 17, [31, 20], [1, 9], 0.4)
ONE_CELL = (0, 1, 1, [1], 3, False, 2.0, 5, 6, [4], [6], 1.0)


def case(
    geometry, batch, count, classes, value, dtype=torch.float32, *, per_image=False, partial=True, scale=4.0
):
    generator = torch.Generator().manual_seed(count)
    players = geometry[1] * geometry[2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outputs = (torch.randn(batch, count, classes, generator=generator) * scale).to(dtype)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    shape = (batch, count, players) if per_image else (count, players)
    projection = (torch.randn(shape, generator=generator) / max(count, 1)).to(wide)
    earlier = torch.randn(batch, players, generator=generator, dtype=torch.float64) if partial else None
    return outputs, labels, projection, earlier, value, awkward_ids(batch), normal_quantiles(), *geometry


LOGITS = [
    case(HALF_SIDE, 12, 31, 10, "logit"),
    case(HALF_SIDE, 6, 31, 10, "logit", partial=False),
    *(
        case(ADAPTIVE, 12, 31, 10, "logit", dtype, per_image=per_image)
        for dtype, per_image in itertools.product(
            (torch.float32, torch.float16, torch.bfloat16), (False, True)
        )
    ),
    case(UNEVEN, 10, 17, 1000, "logit"),
    case(ONE_CELL, 3, 1, 2, "logit"),
    case(ADAPTIVE, 10, 0, 10, "logit"),  # no coalitions: `partial` alone
    case(ADAPTIVE, 0, 5, 10, "logit"),
    case(ADAPTIVE, 10, 20, 10, "logit", scale=1e38),  # infinite and NaN cells
]
SOFTMAX = [
    case(geometry, 6, 20, 300, value, dtype)
    for geometry, value, dtype in itertools.product(
        (HALF_SIDE, ADAPTIVE), ("prob", "logprob"), (torch.float32, torch.float64)
    )
]


@pytest.mark.parametrize("where", WHERE)
def test_has_the_bits_of_the_reference(where):
    results = iter(run(LAUNCHER, LOGITS + SOFTMAX, where=where))
    for arguments in LOGITS:
        phi, boxes = next(results)
        expected_phi, expected_boxes = reference.shapley_crop_boxes(*arguments)
        assert torch.equal(phi.nan_to_num(7.0), expected_phi.nan_to_num(7.0))
        assert torch.equal(boxes, expected_boxes)
    # Exponentials differ in their last bit from one library to the next; the boxes are those of the phi found.
    for arguments in SOFTMAX:
        phi, boxes = next(results)
        expected_phi, _ = reference.shapley_crop_boxes(*arguments)
        tolerance = 1e-13 if phi.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(phi, expected_phi, rtol=tolerance, atol=tolerance)
        assert torch.equal(boxes, reference.noisy_crop_boxes(phi.float(), *arguments[5:]))


def test_compiles_for_every_gpu_to_ieee_arithmetic_without_spills():
    cases = [
        case(ADAPTIVE, 16, 31, 10, "logit"),
        case(HALF_SIDE, 16, 31, 1000, "prob"),
        case((0, 14, 14, [4, 7, 14], *ADAPTIVE[4:]), 4, 31, 1000, "logprob", torch.bfloat16),
    ]
    for binary in compile_ahead(LAUNCHER, cases):
        assert binary.spilled_bytes == 0
        if binary.case > 0:
            assert max(binary.load_bytes) == 16  # logits
        else:
            assert "ld.shared" not in binary.ptx  # phi and its windows stay in registers
            arithmetic = set(re.findall(r"\b(?:add|sub|mul|fma|mad|div|sqrt)\.\S*f32", binary.ptx))
            assert arithmetic == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"}
