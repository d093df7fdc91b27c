import re

import pytest
import torch

from ddfast.ops import normal_quantiles, reference
from tests.kernels.harness import WHERE, compile_ahead, run
from tests.ops.heatmaps import awkward_heatmaps, awkward_ids

LAUNCHER = "noisy_crop_boxes.noisy_crop_boxes"

# seed, rows, cols, pools, crops, clean_last, alpha, image height and width, crop heights and widths, coverage
GEOMETRIES = [
    (2**40 + 3, 4, 4, [2], 2, True, 2.0, 32, 32, [16], [16], 1.0),
    (16, 4, 4, [2, 3, 4], 5, True, 2.0, 32, 32, [16, 24, 32], [16, 24, 32], 0.8),
    (-1, 3, 5, [1], 5, False, 0.1, 31, 17, [31], [1], 1.0),
    (1, 5, 3, [3], 1, True, 2.0, 50, 40, [20], [30], 1.0),
    (0, 1, 1, [1], 3, False, 2.0, 5, 6, [4], [6], 1.0),
    (16, 4, 4, [4], 2, False, 1 / 3, 65, 63, [33], [32], 1.0),
    (3, 7, 9, [1, 2, 4], 11, False, 1.0, 65, 63, [7, 20, 40], [9, 12, 30], 0.5),
]


def case(geometry, count):
    _, rows, cols, *_ = geometry
    return awkward_heatmaps(count, rows * cols), awkward_ids(count), normal_quantiles(), *geometry


def strided_and_empty():
    phi, ids, quantiles, *geometry = case(GEOMETRIES[0], 10)
    return [
        (phi.mT.contiguous().mT[::2], ids[::2], quantiles, *geometry),
        (phi[:0], ids[:0], quantiles, *geometry),
        (phi, ids, quantiles, *geometry[:4], 0, *geometry[5:]),  # no crops
    ]


@pytest.mark.parametrize("where", WHERE)
def test_has_the_bits_of_the_reference(where):
    cases = [case(geometry, 60 if index < 2 else 20) for index, geometry in enumerate(GEOMETRIES)]
    cases += strided_and_empty()
    for arguments, boxes in zip(cases, run(LAUNCHER, cases, where=where), strict=True):
        assert torch.equal(boxes, reference.noisy_crop_boxes(*arguments))


def test_compiles_for_every_gpu_to_ieee_arithmetic():
    for binary in compile_ahead(LAUNCHER, [case(geometry, 64) for geometry in GEOMETRIES[:2]]):
        assert binary.spilled_bytes == 0
        # The boxes of an image are 16 crops bytes, which one store of a warp writes: 4 bytes a thread.
        assert binary.store_bytes == [4]
        assert "ld.shared" not in binary.ptx  # lanes read each other's cells by shuffles
        arithmetic = set(re.findall(r"\b(?:add|sub|mul|fma|mad|div|sqrt)\.\S*f32", binary.ptx))
        # Rounded to nearest and neither fused, nor approximate, nor flushing subnormals to zero.
        assert arithmetic == {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"}
