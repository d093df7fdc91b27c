"""The rendered demo set: what it writes, that it is deterministic, and that its boxes and classes mean something."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from ddfast.data import decode, open_source
from ddfast.demo.shapes import (
    _SHAPES,
    BOXES_FILE,
    CLASSES,
    CONFIG_FILE,
    ShapesConfig,
    is_rendered,
    read_boxes,
    render,
    write_shapes,
)
from ddfast.errors import UsageError

SMALL = ShapesConfig(image_size=32, train_per_class=2, test_per_class=1, seed=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes") / "set", SMALL)


def test_the_folder_is_a_labelled_set_of_both_splits(written):
    train, test = open_source(written, "train"), open_source(written, "test")
    assert train.class_names == test.class_names == list(CLASSES) == sorted(CLASSES)
    assert train.counts() == [2] * 10
    assert test.counts() == [1] * 10


def test_files_hold_the_rendered_pixels_and_boxes(written):
    source = open_source(written, "train")
    boxes = read_boxes(written, "train")
    assert set(boxes) == {sample.key for sample in source.samples}
    for sample in source.samples[::7]:
        pixels, box = render(sample.label, int(sample.key[-8:-4]), "train", SMALL)
        torch.testing.assert_close(decode(source.read(sample)), torch.from_numpy(pixels).permute(2, 0, 1))
        assert boxes[sample.key] == box


def test_writing_again_gives_the_same_bytes(written, tmp_path):
    again = write_shapes(tmp_path / "again", SMALL)
    files = sorted(path.relative_to(written) for path in written.rglob("*") if path.is_file())
    assert len(files) == 30 + 2
    for file in files:
        assert (written / file).read_bytes() == (again / file).read_bytes(), file


def test_an_image_does_not_depend_on_how_many_are_rendered_and_splits_differ():
    few, many = ShapesConfig(train_per_class=1), ShapesConfig(train_per_class=500)
    np.testing.assert_array_equal(render(4, 0, "train", few)[0], render(4, 0, "train", many)[0])
    assert (render(4, 0, "train")[0] != render(4, 0, "test")[0]).any()
    assert (render(4, 0, "train")[0] != render(4, 1, "train")[0]).any()
    assert (render(4, 0)[0] != render(4, 0, config=ShapesConfig(seed=1))[0]).any()


@pytest.mark.parametrize("label", range(10), ids=CLASSES)
def test_objects_lie_inside_off_centre_and_stand_out(label):
    for index in range(6):
        pixels, box = render(label, index)
        assert pixels.shape == (64, 64, 3)
        assert pixels.dtype == np.uint8
        assert 0 <= box.x0 < box.x1 <= 64
        assert 0 <= box.y0 < box.y1 <= 64
        assert 6 <= max(box.x1 - box.x0, box.y1 - box.y0) <= 22
        # The box of a triangle or a crescent is not centred on the shape's own centre: a few pixels of slack.
        assert math.dist(box.centre, (32, 32)) >= 11 - 4
        luma = pixels @ np.array((0.299, 0.587, 0.114))
        inside = luma[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)]
        assert np.quantile(inside, 0.9) > luma.mean() + 40


def test_boxes_hold_the_object_and_no_more():
    # Without clutter the only difference to the same picture with another shape is the object and its shadow.
    config = ShapesConfig(clutter=0.0, turn=0.0)
    pixels, box = render(CLASSES.index("square"), 0, config=config)
    luma = pixels @ np.array((0.299, 0.587, 0.114))
    threshold = (luma.max() + np.median(luma)) / 2
    rows, columns = np.nonzero(luma > threshold)
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    np.testing.assert_allclose(found, (box.x0, box.y0, box.x1, box.y1), atol=1)


def test_size_scales_the_picture():
    small, large = ShapesConfig(image_size=48, clutter=0.0), ShapesConfig(image_size=96, clutter=0.0)
    for label in (0, 4, 6):
        a, b = render(label, 2, config=small)[1], render(label, 2, config=large)[1]
        np.testing.assert_allclose(np.array((a.x0, a.y0, a.x1, a.y1)) * 2, (b.x0, b.y0, b.x1, b.y1), atol=2)


def test_clutter_adds_edges():
    def edges(clutter):
        config = ShapesConfig(clutter=clutter)
        return np.mean(
            [np.abs(np.diff(render(3, i, config=config)[0].astype(float), axis=1)).mean() for i in range(8)]
        )

    assert edges(2.0) > edges(1.0) > edges(0.0)


@pytest.mark.parametrize("name", CLASSES)
def test_outlines_are_signed_distances_in_the_unit_disc(name):
    place = np.linspace(-1.6, 1.6, 161)
    x, y = np.meshgrid(place, place)
    distance = _SHAPES[name](x, y)
    inside = distance < 0
    assert 0.05 < inside.mean() < 0.3
    assert np.hypot(x, y)[inside].max() <= 1.13
    # A distance field has slope one, save on the skeleton.
    slope = np.hypot(*np.gradient(distance, place[1] - place[0]))
    assert np.quantile(np.abs(slope - 1), 0.8) < 0.05


def test_outlines_differ_from_one_another():
    place = np.linspace(-1.2, 1.2, 97)
    x, y = np.meshgrid(place, place)
    inside = [_SHAPES[name](x, y) < 0 for name in CLASSES]
    for i in range(10):
        for j in range(i):
            overlap = (inside[i] & inside[j]).sum() / (inside[i] | inside[j]).sum()
            assert overlap < 0.95, (CLASSES[i], CLASSES[j])


def test_is_rendered_tells_a_finished_set_of_the_same_configuration(written, tmp_path):
    assert is_rendered(written, SMALL)
    assert not is_rendered(written, ShapesConfig(image_size=32, train_per_class=2, test_per_class=1, seed=4))
    assert not is_rendered(tmp_path, SMALL)
    assert (written / CONFIG_FILE).is_file()
    assert (written / BOXES_FILE).is_file()


def test_a_set_that_was_cut_short_is_not_taken_for_finished(tmp_path, monkeypatch):
    write_shapes(tmp_path, SMALL)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UsageError, match="space"):
        write_shapes(tmp_path, SMALL)
    assert not is_rendered(tmp_path, SMALL)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"image_size": 8}, "image_size must be at least 16"),
        ({"radius": (0.2, 0.1)}, "radius must satisfy"),
        ({"train_per_class": 0}, "at least one image a class"),
        ({"clutter": -1.0}, "clutter must not be negative"),
    ],
)
def test_wrong_configurations_are_refused(wrong, words):
    with pytest.raises(UsageError, match=words):
        ShapesConfig(**wrong)


def test_boxes_of_a_folder_without_them_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"boxes\.csv does not exist"):
        read_boxes(tmp_path)
