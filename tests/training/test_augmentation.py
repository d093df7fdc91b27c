import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import functional as TF

from ddfast.training.augmentation import (
    normalize,
    random_crop_flip,
    random_flip,
    random_resized_boxes,
    resize_boxes,
    shuffle_patches,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def some_images(count=6, size=8):
    return torch.randint(0, 256, (count, 3, size, size), generator=draws(9), dtype=torch.uint8)


def test_normalize_is_torchvisions():
    images = some_images()
    expected = TF.normalize(images.double() / 255, MEAN, STD)
    result = normalize(images, MEAN, STD)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(normalize(images.float() / 255, MEAN, STD), result)


def test_normalize_leaves_its_input_alone():
    images = torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    normalize(images, MEAN, STD)
    assert torch.equal(images, before)


def test_random_flip_mirrors_about_half_of_the_images():
    images = some_images(400)
    flipped = random_flip(images, draws())
    mirrored = torch.tensor([torch.equal(a, b.flip(-1)) for a, b in zip(flipped, images, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(flipped, images, strict=True)])
    assert (mirrored ^ kept).all()
    assert 150 < int(mirrored.sum()) < 250


def test_every_random_crop_is_a_window_of_the_padded_image():
    images = some_images(300)
    padded = F.pad(images, (4, 4, 4, 4))
    seen = set()
    for image, cropped in zip(padded, random_crop_flip(images, draws()), strict=True):
        found = {
            (top, left, flip)
            for flip in (False, True)
            for top in range(9)
            for left in range(9)
            if torch.equal(cropped.flip(-1) if flip else cropped, image[:, top : top + 8, left : left + 8])
        }
        assert len(found) == 1
        seen |= found
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert {flip for _, _, flip in seen} == {False, True}


def test_resized_boxes_follow_torchvisions_law():
    size, count = 64, 20000
    x0, y0, x1, y1 = random_resized_boxes(count, size, draws(), scale=(0.25, 1.0)).long().unbind(1)
    width, height = x1 - x0, y1 - y0
    assert int(torch.stack([x0, y0]).min()) == 0
    assert int(torch.stack([x1, y1]).max()) == size
    assert int(width.min()) > 0
    area = (width * height).double() / size**2
    assert 0.24 < float(area.min()) < 0.26
    assert float(area.max()) == 1.0
    aspect = (width.double() / height.double()).log()
    assert float(aspect.abs().max()) <= math.log(4 / 3) + 0.05

    # The same moments from torchvision's own sampler.
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.empty(3, size, size)
    theirs = torch.tensor(
        [RandomResizedCrop.get_params(image, [0.25, 1.0], [3 / 4, 4 / 3]) for _ in range(5000)]
    ).double()
    for ours, other in (
        (y0, theirs[:, 0]),
        (x0, theirs[:, 1]),
        (height, theirs[:, 2]),
        (width, theirs[:, 3]),
    ):
        assert float(ours.double().mean()) == pytest.approx(float(other.mean()), abs=0.9)
        assert float(ours.double().std()) == pytest.approx(float(other.std()), abs=0.7)


@pytest.mark.parametrize("size", [32, 64, 96, 128, 224])
def test_a_crop_of_the_whole_scale_is_the_whole_image(size):
    boxes = random_resized_boxes(500, size, draws(), scale=(1.0, 1.0))
    assert torch.equal(boxes, torch.tensor([[0, 0, size, size]], dtype=torch.int32).expand(500, 4))


def test_resized_boxes_are_torchvisions_resized_crops():
    images = torch.rand(4, 3, 16, 16, generator=draws())
    boxes = torch.tensor([[0, 0, 16, 16], [3, 1, 12, 9], [5, 6, 9, 16], [0, 2, 16, 13]], dtype=torch.int32)
    result = resize_boxes(images, boxes, 16)
    for image, (x0, y0, x1, y1), resized in zip(images, boxes.tolist(), result, strict=True):
        expected = TF.resized_crop(image, y0, x0, y1 - y0, x1 - x0, [16, 16], antialias=True)
        torch.testing.assert_close(resized, expected, atol=1e-5, rtol=1e-5)


def strips(image, order, dim):
    width = image.shape[dim] // len(order)
    ends = [(s + 1) * width if s < len(order) - 1 else image.shape[dim] for s in range(len(order))]
    return torch.cat([image.narrow(dim, s * width, ends[s] - s * width) for s in order], dim)


@pytest.mark.parametrize(("factor", "size"), [(1, 8), (2, 8), (3, 9), (2, 9), (3, 11)])
def test_shuffled_patches_are_permuted_strips(factor, size):
    images = some_images(40, size)
    shuffled, tiles = shuffle_patches(images, factor, draws())
    assert tiles.shape == (40, factor, factor)
    orders = set()
    for image, result, arrangement in zip(images, shuffled, tiles, strict=True):
        rows, columns = (arrangement[:, 0] // factor).tolist(), (arrangement[0] % factor).tolist()
        expected = strips(strips(image, columns, 2), rows, 1)
        assert torch.equal(result, expected)
        grid = torch.tensor(rows)[:, None] * factor + torch.tensor(columns)
        assert torch.equal(arrangement, grid)
        orders.add((tuple(rows), tuple(columns)))
    assert len(orders) > (0 if factor == 1 else 3)


def test_draws_are_the_generators_alone():
    images = some_images()
    torch.manual_seed(0)
    first = random_crop_flip(images, draws(4))
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert torch.equal(random_crop_flip(images, draws(4)), first)
    shuffle_patches(images, 2, draws())
    random_resized_boxes(3, 8, draws())
    assert torch.equal(torch.random.get_rng_state(), before)
