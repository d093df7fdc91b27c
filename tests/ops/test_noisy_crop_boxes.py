import math

import numpy as np
import pytest
import torch
from torch.library import opcheck

from ddfast.ops import noisy_crop_boxes, normal_quantiles, reference
from ddfast.ops._dispatch import native_status
from ddfast.philox import as_signed_64_bit, philox4x32
from tests.ops.heatmaps import awkward_heatmaps, awkward_ids

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
NATIVE = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])

# rows, cols, pools, crops, clean_last, alpha, image height and width, crop heights and widths, coverage
GEOMETRIES = [
    (4, 4, [2], 5, True, 2.0, 32, 32, [16], [16], 1.0),
    (4, 4, [2], 5, False, 0.1, 224, 224, [112], [112], 1.0),
    (3, 5, [1], 2, True, 1.0, 31, 17, [31], [1], 1.0),
    (7, 3, [3], 1, True, 2.0, 50, 40, [20], [30], 1.0),
    (1, 1, [1], 3, False, 2.0, 5, 6, [4], [6], 1.0),
    (6, 6, [6], 4, False, 2.0, 65, 63, [33], [32], 1.0),
    (14, 14, [4], 3, True, 1 / 3, 229, 229, [80], [81], 1.0),
    (4, 4, [2, 3, 4], 5, True, 2.0, 32, 32, [16, 24, 32], [16, 24, 32], 0.8),
    (7, 5, [1, 4, 5], 3, False, 1.0, 50, 40, [9, 30, 41], [8, 33, 20], 0.55),
]
SEEDS = [0, 7, 2**32 + 1, 2**64 - 1]


def faced(phi, ids, seed, geometry, device="cpu"):
    rows, cols, pools, crops, clean_last, alpha, height, width, crop_heights, crop_widths, coverage = geometry
    return noisy_crop_boxes(
        phi.to(device),
        ids.to(device),
        seed=seed,
        grid=(rows, cols),
        image_size=(height, width),
        crop_size=list(zip(crop_heights, crop_widths, strict=True)),
        pool=pools,
        crops=crops,
        alpha=alpha,
        clean_last=clean_last,
        coverage=coverage,
    )


def one_float_at_a_time(phi, sample, seed, geometry):
    """The op for one heatmap, in NumPy float32 scalars: each operation rounds by itself."""
    rows, cols, pools, crops, clean_last, alpha, height, width, crop_heights, crop_widths, coverage = geometry
    f32, phi, quantiles = np.float32, phi.numpy().reshape(rows, cols), normal_quantiles().numpy()

    def window_sums(cells, pool):
        sums, across = [], cols - pool + 1
        for window in range((rows - pool + 1) * across):
            total = f32(0)
            for cell in range(pool * pool):
                total = total + cells[window // across + cell // pool, window % across + cell % pool]
            sums.append(total)
        return sums

    positive = np.where(phi > 0, phi, f32(0))
    total = f32(0)
    for cell in positive.flat:
        total = total + cell
    chosen = len(pools) - 1
    for size in reversed(range(len(pools) - 1)):
        if total > 0 and max(window_sums(positive, pools[size])) >= f32(coverage) * total:
            chosen = size
    pool, crop_height, crop_width = pools[chosen], crop_heights[chosen], crop_widths[chosen]

    across = cols - pool + 1
    pooled = [total / f32(pool * pool) for total in window_sums(phi, pool)]
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


@pytest.mark.parametrize("geometry", GEOMETRIES[:5] + GEOMETRIES[7:])
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
    *_, height, width, crop_heights, crop_widths, _ = geometry
    boxes = faced(awkward_heatmaps(200, geometry[0] * geometry[1]), awkward_ids(200), 5, geometry, device)
    x0, y0, x1, y1 = boxes.unbind(-1)
    assert boxes.shape == (200, geometry[3], 4)
    sizes = torch.stack((y1 - y0, x1 - x0), dim=-1)
    assert (sizes == sizes[:, :1]).all()  # the crops of an image are of one size
    wanted = list(zip(crop_heights, crop_widths, strict=True))
    assert set(map(tuple, sizes[:, 0].tolist())) <= set(wanted)
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
def test_an_image_takes_the_smallest_window_that_holds_enough(device):
    phi = torch.zeros(6, 4, 4, device=device)
    phi[0, 1:3, 2:4] = 1.0  # all of it in one 2x2 window
    phi[1, 1:4, 1:4] = 1.0  # 4 of 9 in the best 2x2 window, all in a 3x3 one
    phi[2, 0, 0] = phi[2, 3, 3] = 1.0  # at most half in anything but the whole image
    phi[3] = -1.0  # nothing positive
    phi[4, 0, 0], phi[4, 3, 3] = 4.0, 1.0  # exactly the coverage in a 2x2 window
    phi[5, 0, 0], phi[5, 1, 1], phi[5, 3, 3] = 5.0, -4.0, 1.0  # what is negative takes nothing away
    boxes = noisy_crop_boxes(
        phi.flatten(1),
        torch.arange(6, device=device),
        seed=0,
        grid=4,
        image_size=32,
        crop_size=[16, 24, 32],
        pool=[2, 3, 4],
        coverage=0.8,
    )
    sides = (boxes[..., 2] - boxes[..., 0]).cpu()
    assert sides.tolist() == [[side] * 5 for side in (16, 24, 32, 32, 16, 16)]
    clean = [[16, 8, 32, 24], [8, 8, 32, 32], [0, 0, 32, 32], [0, 0, 32, 32], [0, 0, 16, 16]]
    assert boxes[:5, -1].tolist() == clean


@pytest.mark.parametrize("device", DEVICES)
def test_several_windows_are_each_alone(device):
    *_, several = GEOMETRIES[:8]
    phi, ids = awkward_heatmaps(300, 16), awkward_ids(300)
    together = faced(phi, ids, 4, several, device)
    sides, found = together[:, 0, 2] - together[:, 0, 0], 0
    for i, side in enumerate(several[9]):
        of_size = (sides == side).cpu()
        found += int(of_size.any())
        alone = (4, 4, [several[2][i]], *several[3:8], [side], [side], 1.0)
        assert torch.equal(faced(phi, ids, 4, alone, device).cpu()[of_size], together.cpu()[of_size])
    assert found == 3


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
    geometry = (14, 14, [2], 4, False, 2.0, 224, 224, [112], [112], 1.0)
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
        ({"coverage": 1.5}, ValueError, r"coverage must be a share in \[0, 1\], got 1.5"),
        ({"pool": [2, 3]}, ValueError, "a list of pools needs as many crop sizes"),
        ({"pool": [], "crop_size": []}, ValueError, "a list of pools needs as many crop sizes, at least one"),
        ({"pool": [3, 2], "crop_size": [24, 16]}, ValueError, r"must ascend, got \[3, 2\]"),
        ({"pool": [2, 5], "crop_size": [16, 32]}, ValueError, "pool must be 1 to 4 cells .* got 5"),
        ({"pool": [2, 3], "crop_size": [16, 33]}, ValueError, "got 33 x 33 for 32 x 32 pixels"),
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
        ({6: [5]}, "pool must"),
        ({6: [2, 3]}, "equally many"),
        ({6: [], 12: [], 13: []}, "must be a window"),
        ({12: [33]}, "crop must fit"),
    ],
)
def test_cpp_does_not_read_outside_arguments_that_skipped_the_face(change, message):
    arguments = [torch.zeros(2, 16), torch.arange(2), normal_quantiles(), 0, *GEOMETRIES[0]]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ddfast_native.noisy_crop_boxes(*arguments)
