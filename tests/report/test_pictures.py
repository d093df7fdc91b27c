import numpy as np
import pytest
import torch

from ddfast.report import heatmap_picture, mosaic_picture
from ddfast.report.pictures import paired_mosaic_picture


def noise(count: int, size: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def find(canvas: np.ndarray, block: np.ndarray) -> bool:
    """Whether `block` [h, w, 3] stands somewhere in `canvas`."""
    height, width = block.shape[:2]
    corners = np.argwhere((canvas[: -height + 1, : -width + 1] == block[0, 0]).all(axis=2))
    return any(np.array_equal(canvas[y : y + height, x : x + width], block) for y, x in corners)


def test_a_mosaic_holds_every_small_image_pixel_by_pixel():
    images = noise(6, 32)
    canvas = np.asarray(mosaic_picture(images, [0, 0, 1, 1, 2, 2], ["a", "b", "c"]))
    for image in images:
        assert find(canvas, image.numpy().transpose(1, 2, 0).repeat(3, axis=0).repeat(3, axis=1))


def test_a_mosaic_is_capped():
    images = noise(30, 8)
    labels = [index // 3 for index in range(30)]
    names = [str(label) for label in range(10)]
    whole = mosaic_picture(images, labels, names, side=8)
    fewer = mosaic_picture(images, labels, names, side=8, max_classes=4, max_images=2)
    assert fewer.height < whole.height
    assert fewer.width < whole.width
    assert not find(np.asarray(fewer), images[2].numpy().transpose(1, 2, 0))
    assert find(np.asarray(fewer), images[1].numpy().transpose(1, 2, 0))


def test_mosaics_stand_side_by_side():
    images = noise(4, 32)
    both = paired_mosaic_picture(
        [("left", images[:2], [0, 1]), ("right", images[2:], [0, 1])], ["a", "b"], side=32
    )
    for image in images:
        assert find(np.asarray(both), image.numpy().transpose(1, 2, 0))


def test_a_mosaic_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        mosaic_picture([], [], ["a"])


def test_a_heatmap_is_warm_where_positive_cool_where_negative_and_clear_at_zero():
    grey = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    picture = np.asarray(heatmap_picture(grey, [[1.0, -1.0], [0.0, 0.5]], side=64)).astype(int)
    warm, cool, clear, half = picture[16, 16], picture[16, 48], picture[48, 16], picture[48, 48]
    assert warm[0] > warm[2] + 80
    assert cool[2] > cool[0] + 80
    assert clear.max() - clear.min() <= 1
    assert 0 < half[0] - half[2] < warm[0] - warm[2]


def test_a_flat_or_broken_heatmap_leaves_the_image():
    grey = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    for phi in (np.zeros((4, 4)), np.full((4, 4), np.nan)):
        picture = np.asarray(heatmap_picture(grey, phi, side=64))
        assert picture.min() == picture.max()


def test_boxes_are_drawn_where_they_are_and_the_chosen_one_is_thicker():
    black = torch.zeros(3, 32, 32, dtype=torch.uint8)
    phi = np.zeros((4, 4))
    bare = np.asarray(heatmap_picture(black, phi, side=256)).astype(int)
    thin = np.asarray(heatmap_picture(black, phi, boxes=[[8, 8, 24, 24]], side=256)).astype(int)
    thick = np.asarray(heatmap_picture(black, phi, chosen=[8, 8, 24, 24], side=256)).astype(int)
    changed = [np.abs(picture - bare).max(axis=2) > 8 for picture in (thin, thick)]
    for mask in changed:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        assert rows[0] - 64 in (0, 1)
        assert columns[0] - 64 in (0, 1)
        assert 191 - rows[-1] in (0, 1)
        assert 191 - columns[-1] in (0, 1)
    assert changed[1].sum() > 1.5 * changed[0].sum()


def test_arguments_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"uint8 \[3, H, W\]"):
        heatmap_picture(torch.zeros(3, 8, 8), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="phi must be"):
        heatmap_picture(torch.zeros(3, 8, 8, dtype=torch.uint8), np.zeros(4))
