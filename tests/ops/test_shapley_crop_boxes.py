import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from ddfast.ops import (
    noisy_crop_boxes,
    normal_quantiles,
    reference,
    shapley_crop_boxes,
    shapley_heatmap,
)
from ddfast.ops._dispatch import native_status
from tests.ops.heatmaps import awkward_ids

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
NATIVE = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])
VALUES = ("logit", "prob", "logprob")
OP = torch.ops.ddfast.shapley_crop_boxes.default

HALF_SIDE = {"seed": 7, "grid": 4, "image_size": 32, "crop_size": 16}
ADAPTIVE = {
    "seed": -3,
    "grid": 4,
    "image_size": 224,
    "crop_size": [112, 168, 224],
    "pool": [2, 3, 4],
    "coverage": 0.8,
}
UNEVEN = {
    "seed": 2**63,
    "grid": (3, 5),
    "image_size": (31, 17),
    "crop_size": [(11, 9), (20, 12)],
    "pool": [1, 2],
    "crops": 3,
    "clean_last": False,
    "alpha": 0.5,
    "coverage": 0.4,
}
GEOMETRIES = (HALF_SIDE, ADAPTIVE, UNEVEN)


def players_of(geometry):
    grid = geometry["grid"]
    return grid * grid if isinstance(grid, int) else grid[0] * grid[1]


def random_case(batch, count, classes, players, dtype=torch.float32, per_image=False, partial=True, seed=0):
    """Outputs, labels, projection, ids and a partial phi."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outputs = (torch.randn(batch, count, classes, generator=generator) * 4).to(dtype)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    shape = (batch, count, players) if per_image else (count, players)
    projection = (torch.randn(shape, generator=generator) / max(count, 1)).to(wide)
    earlier = torch.randn(batch, players, generator=generator, dtype=torch.float64) if partial else None
    return outputs, labels, projection, awkward_ids(batch), earlier


def composed(outputs, labels, projection, ids, partial, value, geometry):
    """The two ops one after the other, with `partial` added between them as the engine adds up its chunks."""
    phi = shapley_heatmap(outputs, labels, projection, value)
    if partial is not None:
        phi = (partial + phi.double()).to(phi.dtype)
    return phi, noisy_crop_boxes(phi.float(), ids, **geometry)


def to_device(case, device):
    return [x if x is None else x.to(device) for x in case]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_has_the_bits_of_the_two_ops(geometry, value, device):
    shapes = [(1, 1, 1), (40, 31, 10), (9, 17, 300)]
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for (batch, count, classes), dtype, per_image in itertools.product(shapes, dtypes, (False, True)):
        case = random_case(batch, count, classes, players_of(geometry), dtype, per_image, partial=per_image)
        *arguments, ids, partial = to_device(case, device)
        phi, boxes = shapley_crop_boxes(*arguments, ids, value=value, partial=partial, **geometry)
        expected_phi, expected_boxes = composed(*arguments, ids, partial, value, geometry)
        assert (phi.dtype, boxes.dtype) == (expected_phi.dtype, torch.int32)
        assert torch.equal(phi, expected_phi)
        assert torch.equal(boxes, expected_boxes)


@NATIVE
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_cpp_has_the_bits_of_the_reference(geometry):
    from ddfast.ops._attribution import crop_box_arguments

    options = {"pool": 2, "crops": 5, "alpha": 2.0, "clean_last": True, "coverage": 1.0, **geometry}
    for dtype, per_image in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        case = random_case(300, 31, 10, players_of(geometry), dtype, per_image)
        outputs, labels, projection, ids, partial = case
        outputs[::7] *= 1e30
        arguments = (
            outputs,
            labels,
            projection,
            partial,
            "logit",
            *crop_box_arguments(ids, outputs, **options),
        )
        phi, boxes = torch.ops.ddfast_native.shapley_crop_boxes(*arguments)
        expected_phi, expected_boxes = reference.shapley_crop_boxes(*arguments)
        assert torch.equal(phi.nan_to_num(7.0), expected_phi.nan_to_num(7.0))
        assert torch.equal(boxes, expected_boxes)


@NATIVE
def test_threads_do_not_change_the_result():
    *arguments, ids, partial = random_case(37, 50, 100, 16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(shapley_crop_boxes(*arguments, ids, value="prob", partial=partial, **ADAPTIVE))
    finally:
        torch.set_num_threads(threads)
    for phi, boxes in results[1:]:
        assert torch.equal(phi, results[0][0])
        assert torch.equal(boxes, results[0][1])


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_owes_nothing_to_its_batch(device):
    outputs, labels, projection, ids, partial = to_device(random_case(9, 40, 30, 16), device)
    phi, boxes = shapley_crop_boxes(
        outputs, labels, projection, ids, value="logprob", partial=partial, **ADAPTIVE
    )
    one = slice(3, 4)
    alone_phi, alone_boxes = shapley_crop_boxes(
        outputs[one], labels[one], projection, ids[one], value="logprob", partial=partial[one], **ADAPTIVE
    )
    assert torch.equal(alone_phi, phi[one])
    assert torch.equal(alone_boxes, boxes[one])


@pytest.mark.parametrize("device", DEVICES)
def test_strided_and_empty(device):
    outputs, labels, projection, ids, partial = to_device(random_case(8, 12, 20, 16), device)
    wide = projection.repeat(1, 2)[:, ::2]
    strided = (outputs[::2, :, ::3], labels[::2] // 3, wide, ids[::2])
    phi, boxes = shapley_crop_boxes(*strided, partial=partial[::2], **ADAPTIVE)
    dense = [x.contiguous() for x in strided]
    expected_phi, expected_boxes = shapley_crop_boxes(*dense, partial=partial[::2].contiguous(), **ADAPTIVE)
    assert torch.equal(phi, expected_phi)
    assert torch.equal(boxes, expected_boxes)
    nobody = [outputs[:0], labels[:0], projection, ids[:0]]
    assert [tuple(x.shape) for x in shapley_crop_boxes(*nobody, **ADAPTIVE)] == [(0, 16), (0, 5, 4)]
    phi, boxes = shapley_crop_boxes(
        outputs[:, :0], labels, projection[:0], ids, partial=partial, **HALF_SIDE, crops=0
    )
    assert torch.equal(phi, partial.float())
    assert boxes.shape == (8, 0, 4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("value", VALUES)
def test_gradients(value, per_image, device):
    outputs, labels, projection, ids, partial = to_device(
        random_case(2, 3, 4, 4, torch.float64, per_image), device
    )
    geometry = {"seed": 0, "grid": 2, "image_size": 8, "crop_size": 4, "pool": 1}

    def function(outputs, projection, partial):
        phi, boxes = shapley_crop_boxes(
            outputs, labels, projection, ids, value=value, partial=partial, **geometry
        )
        assert not boxes.requires_grad
        return phi

    arguments = ((outputs / 4).requires_grad_(), projection.requires_grad_(), partial.requires_grad_())
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    from ddfast.ops._attribution import crop_box_arguments

    options = {"crops": 5, "alpha": 2.0, "clean_last": True, **ADAPTIVE}
    for dtype, per_image, value in [
        (torch.float32, False, "logit"),
        (torch.bfloat16, True, "prob"),
        (torch.float64, False, "logprob"),
    ]:
        case = to_device(random_case(2, 5, 6, 16, dtype, per_image, partial=per_image), device)
        outputs, labels, projection, ids, partial = case
        placing = crop_box_arguments(ids, outputs, **options)
        opcheck(OP, (outputs.requires_grad_(), labels, projection.requires_grad_(), partial, value, *placing))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("in_dims", [(0, 0, None, None, None), (2, None, None, 1, 0), (None, 0, 1, 0, 2)])
def test_vmap(in_dims, per_image, device):
    cases = [random_case(2, 6, 5, 16, per_image=per_image, seed=seed) for seed in range(4)]
    arguments = to_device(
        [
            torch.stack([case[i] for case in cases], dim) if dim is not None else cases[0][i]
            for i, dim in enumerate(in_dims)
        ],
        device,
    )

    def function(outputs, labels, projection, ids, partial):
        return shapley_crop_boxes(outputs, labels, projection, ids, value="prob", partial=partial, **ADAPTIVE)

    phi, boxes = torch.vmap(function, in_dims)(*arguments)
    assert (phi.shape, boxes.shape) == ((4, 2, 16), (4, 2, 5, 4))
    for index in range(4):
        one = [x if d is None else x.select(d, index) for x, d in zip(arguments, in_dims, strict=True)]
        expected_phi, expected_boxes = function(*one)
        assert torch.equal(phi[index], expected_phi)
        assert torch.equal(boxes[index], expected_boxes)


def test_compiles_without_a_graph_break():
    *arguments, ids, partial = random_case(3, 6, 10, 16)

    def function(outputs):
        phi, boxes = shapley_crop_boxes(outputs, *arguments[1:], ids, partial=partial, **ADAPTIVE)
        return phi + 1, boxes + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(arguments[0]), function(arguments[0]), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"outputs": torch.zeros(2, 3)}, ValueError, r"outputs must be a \[B, K, C\] tensor"),
        ({"labels": torch.tensor([0, 4])}, ValueError, r"labels must be in \[0, 4\)"),
        ({"projection": torch.zeros(3, 15)}, ValueError, r"projection must be \[..., 16\] for a 4 x 4 grid"),
        ({"projection": torch.zeros(2, 16)}, ValueError, r"projection must be \[3, d\]"),
        ({"sample_ids": torch.arange(3)}, ValueError, r"sample_ids must be \[2\], one a heatmap, got \[3\]"),
        ({"value": "margin"}, ValueError, "must be one of logit, prob, logprob"),
        (
            {"partial": torch.zeros(2, 16)},
            ValueError,
            r"partial must be float64 \[2, 16\], got torch.float32",
        ),
        ({"partial": torch.zeros(2, 4).double()}, ValueError, r"partial must be float64 \[2, 16\]"),
        ({"pool": 5}, ValueError, "pool must be 1 to 4 cells"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "outputs": torch.zeros(2, 3, 4),
        "labels": torch.tensor([0, 3]),
        "projection": torch.zeros(3, 16),
        "sample_ids": torch.arange(2),
        **HALF_SIDE,
        **change,
    }
    with pytest.raises(error, match=message):
        shapley_crop_boxes(**arguments)


def test_quantiles_are_one_table():
    from ddfast.ops._attribution import crop_box_arguments

    options = {"pool": 2, "crops": 5, "alpha": 2.0, "clean_last": True, "coverage": 1.0, **HALF_SIDE}
    outputs, labels, projection, ids, partial = random_case(2, 3, 4, 16)
    _, _, *placing = crop_box_arguments(ids, outputs, **options)
    tables = normal_quantiles().expand(3, -1)
    with pytest.raises(ValueError, match="quantiles is one table"):
        torch.vmap(lambda table: OP(outputs, labels, projection, partial, "logit", ids, table, *placing))(
            tables
        )
