import math

import numpy as np
import pytest
import torch
from torch.library import opcheck

from ddfast.ops import noisy_crop_boxes, normal_quantiles, reference
from ddfast.ops._dispatch import native_status
from ddfast.ops._philox import as_signed_64_bit, philox4x32
from tests.ops.heatmaps import awkward_heatmaps, awkward_ids

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
NATIVE = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])

# rows, cols, pool, crops, clean_last, alpha, image height and width, crop height and width
GEOMETRIES = [
    (4, 4, 2, 5, True, 2.0, 32, 32, 16, 16),
    (4, 4, 2, 5, False, 0.1, 224, 224, 112, 112),
    (3, 5, 1, 2, True, 1.0, 31, 17, 31, 1),
    (7, 3, 3, 1, True, 2.0, 50, 40, 20, 30),
    (1, 1, 1, 3, False, 2.0, 5, 6, 4, 6),
    (6, 6, 6, 4, False, 2.0, 65, 63, 33, 32),
    (14, 14, 4, 3, True, 1 / 3, 229, 229, 80, 81),
]
SEEDS = [0, 7, 2**32 + 1, 2**64 - 1]


def faced(phi, ids, seed, geometry, device="cpu"):
    rows, cols, pool, crops, clean_last, alpha, *sizes = geometry
    return noisy_crop_boxes(
        phi.to(device),
        ids.to(device),
        seed=seed,
        grid=(rows, cols),
        image_size=tuple(sizes[:2]),
        crop_size=tuple(sizes[2:]),
        pool=pool,
        crops=crops,
        alpha=alpha,
        clean_last=clean_last,
    )


def one_float_at_a_time(phi, sample, seed, geometry):
    """The op for one heatmap, in NumPy float32 scalars: each operation rounds by itself."""
    rows, cols, pool, crops, clean_last, alpha, height, width, crop_height, crop_width = geometry
    f32, phi, quantiles = np.float32, phi.numpy().reshape(rows, cols), normal_quantiles().numpy()
    across = cols - pool + 1
    pooled = []
    for window in range((rows - pool + 1) * across):
        total = f32(0)
        for cell in range(pool * pool):
            total = total + phi[window // across + cell // pool, window % across + cell % pool]
        pooled.append(total / f32(pool * pool))
    mean = f32(0)
    for value in pooled:
        mean = mean + value
    mean = mean / f32(len(pooled))
    variance = f32(0)
    for value in pooled:
        variance = variance + (value - mean) * (value - mean)
    scale = f32(alpha) * np.sqrt(variance / f32(len(pooled)))

    boxes = []
    for crop in range(crops):
        best, best_value = 0, f32(-math.inf)
        for window, value in enumerate(pooled):
            if not (clean_last and crop == crops - 1):
                counter = torch.tensor([sample % 2**32, sample // 2**32 % 2**32, crop, window])
                value = value + scale * quantiles[philox4x32(counter, seed)[0].item() >> 20]
            if value > best_value:
                best, best_value = window, value
        top, left = best // across, best % across
        y0 = (top * height // rows + (top + pool) * height // rows - crop_height) // 2
        x0 = (left * width // cols + (left + pool) * width // cols - crop_width) // 2
        y0, x0 = min(max(y0, 0), height - crop_height), min(max(x0, 0), width - crop_width)
        boxes.append([x0, y0, x0 + crop_width, y0 + crop_height])
    return boxes


@pytest.mark.parametrize("geometry", GEOMETRIES[:5])
def test_reference_is_the_op_one_float_at_a_time(geometry):
    phi, ids = awkward_heatmaps(20, geometry[0] * geometry[1]), awkward_ids(20)
    seed = 2**40 + 3
    boxes = reference.noisy_crop_boxes(phi, ids, normal_quantiles(), seed, *geometry)
    with np.errstate(all="ignore"):
        expected = [one_float_at_a_time(p, i, seed, geometry) for p, i in zip(phi, ids.tolist(), strict=True)]
    assert boxes.dtype == torch.int32
    assert boxes.tolist() == expected


@NATIVE
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_cpp_has_the_bits_of_the_reference(geometry, seed):
    phi, ids = awkward_heatmaps(2000, geometry[0] * geometry[1], seed=seed % 1000), awkward_ids(2000)
    arguments = (phi, ids, normal_quantiles(), as_signed_64_bit(seed), *geometry)
    assert torch.equal(
        torch.ops.ddfast_native.noisy_crop_boxes(*arguments), reference.noisy_crop_boxes(*arguments)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gpu_has_the_bits_of_the_cpu(geometry):
    phi, ids = awkward_heatmaps(20000, geometry[0] * geometry[1]), awkward_ids(20000)
    on_cpu = faced(phi, ids, 2**33, geometry)
    assert torch.equal(faced(phi, ids, 2**33, geometry, "cuda").cpu(), on_cpu)
    unfused = reference.noisy_crop_boxes(phi.cuda(), ids.cuda(), normal_quantiles().cuda(), 2**33, *geometry)
    assert torch.equal(unfused.cpu(), on_cpu)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_boxes_have_their_size_and_lie_inside(geometry, device):
    *_, height, width, crop_height, crop_width = geometry
    boxes = faced(awkward_heatmaps(200, geometry[0] * geometry[1]), awkward_ids(200), 5, geometry, device)
    x0, y0, x1, y1 = boxes.unbind(-1)
    assert boxes.shape == (200, geometry[3], 4)
    assert ((x1 - x0 == crop_width) & (y1 - y0 == crop_height)).all()
    assert ((x0 >= 0) & (y0 >= 0) & (x1 <= width) & (y1 <= height)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_the_clean_crop_is_centred_on_the_largest_window(device):
    phi = torch.zeros(9, 16, device=device)
    for image, (row, col) in enumerate((r, c) for r in range(3) for c in range(3)):
        for cell in (0, 1, 4, 5):
            phi[image, row * 4 + col + cell] = 1.0
    ids = torch.arange(9, device=device)
    boxes = noisy_crop_boxes(phi, ids, seed=0, grid=4, image_size=32, crop_size=16)[:, -1]
    expected = [[8 * col, 8 * row, 8 * col + 16, 8 * row + 16] for row in range(3) for col in range(3)]
    assert boxes.tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
def test_a_constant_heatmap_takes_the_first_window(device):
    boxes = noisy_crop_boxes(
        torch.full((3, 16), 2.5, device=device),
        torch.arange(3, device=device),
        seed=1,
        grid=4,
        image_size=8,
        crop_size=4,
    )
    assert torch.equal(boxes.cpu(), torch.tensor([0, 0, 4, 4], dtype=torch.int32).expand(3, 5, 4))


@pytest.mark.parametrize("device", DEVICES)
def test_nan_never_wins_the_clean_crop(device):
    phi = torch.zeros(1, 9, device=device)
    phi[0, 0] = torch.nan
    phi[0, 8] = -1.0
    options = {"seed": 1, "grid": 3, "image_size": 9, "crop_size": 3, "pool": 1, "crops": 1}
    boxes = noisy_crop_boxes(phi, torch.zeros(1, dtype=torch.int64, device=device), **options)
    assert boxes.tolist() == [[[3, 0, 6, 3]]]


def test_the_noise_is_standard_normal_and_scaled_by_alpha():
    # Two windows at 0 and 1: sigma is alpha / 2, and the first wins where 0 + n0 > 1 + n1.
    count, alpha = 20000, 1.5
    phi = torch.tensor([[0.0, 1.0]]).expand(count, 2)
    boxes = noisy_crop_boxes(
        phi,
        torch.arange(count),
        seed=3,
        grid=(1, 2),
        image_size=(1, 2),
        crop_size=1,
        pool=1,
        crops=1,
        alpha=alpha,
        clean_last=False,
    )
    first = (boxes[:, 0, 0] == 0).double().mean().item()
    expected = torch.special.ndtr(torch.tensor(-1 / (alpha / 2 * math.sqrt(2)), dtype=torch.float64)).item()
    assert abs(first - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_owes_nothing_to_its_batch(device):
    phi, ids = awkward_heatmaps(70, 16), awkward_ids(70)
    boxes = faced(phi, ids, 11, GEOMETRIES[0], device)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(faced(phi[order], ids[order], 11, GEOMETRIES[0], device).cpu(), boxes.cpu()[order])
    fewer = (*GEOMETRIES[0][:3], 3, False, *GEOMETRIES[0][5:])
    assert torch.equal(faced(phi, ids, 11, fewer, device).cpu(), boxes.cpu()[:, :3])


def test_seed_sample_and_crop_each_change_the_noise():
    phi = torch.randn(1, 196, generator=torch.Generator().manual_seed(0)).expand(50, 196)
    geometry = (14, 14, 2, 4, False, 2.0, 224, 224, 112, 112)
    ids = torch.arange(50)
    boxes = faced(phi, ids, 1, geometry)
    assert not torch.equal(boxes, faced(phi, ids, 1 + 2**32, geometry))
    assert not torch.equal(boxes, faced(phi, ids + 2**32, 1, geometry))
    assert len(boxes[:, 0].unique(dim=0)) > 5
    assert len(boxes[0].unique(dim=0)) > 1


@pytest.mark.parametrize("device", DEVICES)
def test_empty_and_strided(device):
    geometry = GEOMETRIES[2]
    assert faced(torch.zeros(0, 15), torch.zeros(0, dtype=torch.int64), 0, geometry, device).shape == (
        0,
        2,
        4,
    )
    none = (*geometry[:3], 0, *geometry[4:])
    assert faced(torch.zeros(3, 15), torch.arange(3), 0, none, device).shape == (3, 0, 4)
    phi, ids = awkward_heatmaps(40, 30).to(device), awkward_ids(40).to(device)
    strided = faced(phi[::2, ::2], ids[::2], 9, geometry, device)
    assert torch.equal(strided, faced(phi[::2, ::2].contiguous(), ids[::2].contiguous(), 9, geometry, device))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    phi, ids = awkward_heatmaps(3, 16).to(device), awkward_ids(3).to(device)
    opcheck(
        torch.ops.ddfast.noisy_crop_boxes.default,
        (phi, ids, normal_quantiles().to(device), 2**40, *GEOMETRIES[0]),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 1), (2, 1)])
def test_vmap(in_dims, device):
    phi, ids = awkward_heatmaps(12, 16).view(4, 3, 16), awkward_ids(12).view(4, 3)
    phi = phi[0] if in_dims[0] is None else phi.movedim(0, in_dims[0])
    ids = ids[0] if in_dims[1] is None else ids.movedim(0, in_dims[1])
    mapped = torch.vmap(lambda p, i: faced(p, i, 4, GEOMETRIES[0], device), in_dims)(phi, ids)
    for index in range(4):
        one = [x if d is None else x.select(d, index) for x, d in zip((phi, ids), in_dims, strict=True)]
        assert torch.equal(mapped[index], faced(*one, 4, GEOMETRIES[0], device))


def test_boxes_have_no_gradient():
    phi = torch.randn(2, 16, requires_grad=True)
    assert not faced(phi, torch.arange(2), 0, GEOMETRIES[0]).requires_grad


def test_compiles_without_a_graph_break():
    phi, ids = awkward_heatmaps(3, 16), awkward_ids(3)

    def function(phi):
        return noisy_crop_boxes(phi, ids, seed=3, grid=4, image_size=32, crop_size=16) + 1

    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(phi), function(phi))


GOOD = {"seed": 0, "grid": 4, "image_size": 32, "crop_size": 16}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"phi": torch.zeros(2, 16, dtype=torch.float64)},
            TypeError,
            "phi must be float32, got torch.float64",
        ),
        ({"phi": torch.zeros(2, 15)}, ValueError, r"phi must be \[B, 16\] for a 4 x 4 grid, got \[2, 15\]"),
        ({"phi": torch.zeros(16)}, ValueError, r"got \[16\]"),
        ({"sample_ids": torch.zeros(2)}, TypeError, "sample_ids must be int64, got torch.float32"),
        ({"sample_ids": torch.arange(3)}, ValueError, r"sample_ids must be \[2\], one a heatmap, got \[3\]"),
        ({"seed": 2**64}, ValueError, "seed must fit in 64 bits"),
        ({"image_size": 3}, ValueError, "no finer than the image, got 4 x 4 cells for 3 x 3 pixels"),
        ({"pool": 5}, ValueError, "pool must be 1 to 4 cells for a 4 x 4 grid, got 5"),
        ({"pool": 0}, ValueError, "pool must be 1 to 4 cells"),
        ({"crop_size": (16, 33)}, ValueError, "within the image, got 16 x 33 for 32 x 32 pixels"),
        ({"crop_size": 0}, ValueError, "within the image, got 0 x 0"),
        ({"crop_size": 16.0}, ValueError, "crop_size must be an int or a pair of ints"),
        ({"crops": -1}, ValueError, "crops must not be negative, got -1"),
        (
            {"alpha": -1.0},
            ValueError,
            "alpha must be a finite number of standard deviations, at least 0, got -1.0",
        ),
        ({"alpha": math.nan}, ValueError, "alpha must be a finite number"),
    ],
)
def test_errors(change, error, message):
    arguments = {"phi": torch.zeros(2, 16), "sample_ids": torch.arange(2), **GOOD, **change}
    with pytest.raises(error, match=message):
        noisy_crop_boxes(arguments.pop("phi"), arguments.pop("sample_ids"), **arguments)


@NATIVE
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 15)}, "phi must be"),
        ({1: torch.arange(3)}, "sample_ids must be"),
        ({2: torch.zeros(4095)}, "quantiles must be"),
        ({6: 5}, "pool must"),
    ],
)
def test_cpp_does_not_read_outside_arguments_that_skipped_the_face(change, message):
    arguments = [torch.zeros(2, 16), torch.arange(2), normal_quantiles(), 0, *GEOMETRIES[0]]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ddfast_native.noisy_crop_boxes(*arguments)
