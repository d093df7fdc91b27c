import pytest
import torch

from ddfast.ops import _dispatch, augment_parameters, normal_quantiles, reference
from tests.kernels.harness import WHERE, compile_each, run_each
from tests.ops import layouts

OPS = {
    op.name: f"{op.triton}.{op.name}"
    for op in _dispatch._OPS.values()
    if op.triton is not None and not op.name.endswith("_")  # those in place have a test of their own
}


@pytest.mark.parametrize("where", WHERE)
def test_every_argument_may_lie_in_memory_in_any_way(where):
    cases = [(op, what, given) for op in sorted(OPS) for what, given in layouts.together(op)]
    results = run_each([(OPS[op], given) for op, _, given in cases], where=where)
    for (op, what, given), found in zip(cases, results, strict=True):
        expected = getattr(reference, op)(*layouts.contiguous(given))
        found, expected = (r if isinstance(r, tuple | list) else (r,) for r in (found, expected))
        for one, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(
                one, wanted, rtol=1e-4, atol=1e-4, msg=lambda text, at=f"{op}, {what}": f"{at}: {text}"
            )


@pytest.mark.parametrize("where", WHERE)
def test_a_fine_grid_over_a_long_image_overflows_no_index(where):
    """Rows of cells times pixels is more than 2^31, which the image itself is not."""
    rows, long = 50_000, 2**26
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 1, rows, 1, generator=generator)
    coalitions = torch.rand(1, rows, generator=generator) < 0.5
    masked = (images, coalitions, torch.zeros(1), None, None, rows, 1, torch.float32)
    phi, ids = torch.randn(2, 64, generator=generator), torch.tensor([3, 4])
    boxes = (phi, ids, normal_quantiles(), 7, 64, 1, [1], 2, True, 0.5, long, 1, [2**20], [1], 1.0)
    calls = [("masked_batch.masked_batch", masked), ("noisy_crop_boxes.noisy_crop_boxes", boxes)]
    for found, expected in zip(
        run_each(calls, where=where),
        (reference.masked_batch(*masked), reference.noisy_crop_boxes(*boxes)),
        strict=True,
    ):
        assert torch.equal(found, expected)
    assert int(expected.max()) > 2**25


def ones(op):
    """Arguments of an op that is given one of everything."""
    one, number = torch.ones(1, 1, 1, 1), torch.ones(1)
    box, index = torch.tensor([[0.0, 0, 1, 1]]), torch.zeros(1, dtype=torch.int64)
    places = (normal_quantiles(), 1, 1, 1, [1], 1, True, 1.0, 1, 1, [1], [1], 1.0)
    return {
        "masked_batch": (one, one[0, 0] > 0, number, number, number, 1, 1, torch.float32),
        "assemble_masked_features": (one[None].expand(1, 2, 1, 1, 1), one[0, 0] > 0, index.int()[None, None]),
        "shapley_heatmap": (one[0], index, one[0, 0], "prob"),
        "shapley_crop_boxes": (one[0], index, one[0, 0], None, "logit", index, *places),
        "noisy_crop_boxes": (one[0, 0], index, *places),
        "crop_resize": (one, box, index, 1, 1, 1),
        "crop_resize_backward": (one, box, index, 1, 1, 1, 1),
        "crop_batch": (one, box, index, number, number, 1, 1, 1, 1, torch.float32),
        "grad_sq_norm_linear": (one[0], one[0], True),
        "grad_sq_norm_conv2d": (one, one, [1, 1], [1, 1], [0, 0], [1, 1], 1, True),
        "grad_sq_norm_norm": (one, one, 1, 1, True, True),
        "grad_sq_norm_embedding": (index[None], one[0], 1),
        "class_kl": (one[0, 0], index, index + 1, True),
        "siamese_augment": (one, augment_parameters().float(), False),
        "siamese_augment_backward": (one, augment_parameters().float()),
        "convnet_block": (one, one.expand(1, 1, 3, 3), number, number, number, 1e-5, True),
        "convnet_block_backward": (
            *(one.expand(1, 1, 0, 0), one, one.expand(1, 1, 3, 3), number, number, number),
            *(one[0, 0], one[0, 0], one, 1e-5, True, True),
        ),
        "normalization_backward": (one, one, one[0, 0], one[0, 0], number, True, True),
    }[op]


def test_compiles_where_every_extent_is_one():
    """Triton compiles a number that is 1 as a constant, which has none of a variable's methods."""
    compile_each([(OPS[op], ones(op)) for op in sorted(OPS)], capabilities=(90,))
