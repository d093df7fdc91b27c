import math

import pytest
import torch
from PIL import Image

from ddfast.data import open_source
from ddfast.errors import UsageError
from ddfast.training import ImageSet, read_test_set
from ddfast.training.image_sets import measure_accuracy

CPU = torch.device("cpu")


class Brightest(torch.nn.Module):
    """Predicts the channel of the largest mean; refuses to run in train mode."""

    def forward(self, images):
        assert not self.training
        return images.mean(dim=(2, 3))


def test_accuracy_overall_and_by_class():
    images = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    for place, channel in enumerate([0, 0, 2, 2, 2]):
        images[place, channel] = 200
    model = Brightest().train()
    measured = measure_accuracy(
        model, ImageSet(images, torch.tensor([0, 2, 2, 2, 2])), (0, 0, 0), (1, 1, 1), CPU
    )
    assert measured.top1 == pytest.approx(80.0)
    assert measured.per_class[0] == 100.0
    assert math.isnan(measured.per_class[1])
    assert measured.per_class[2] == 75.0
    assert model.training


@pytest.mark.parametrize(("size", "shorter"), [(32, 32), (64, 72), (224, 256)])
def test_test_images_are_resized_then_cut_from_the_centre(tmp_path, monkeypatch, size, shorter):
    """RDED: Resize(side // 7 * 8), CenterCrop(side)."""
    from ddfast.data import loading

    asked = []
    original = loading.load_all

    def record(source, size, **options):
        asked.append((size, options["resize"]))
        return original(source, size, **options)

    monkeypatch.setattr(loading, "load_all", record)
    for name in ("a", "b"):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (300, 280), (10, 20, 30)).save(tmp_path / "test" / name / "0.png")
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "0.png")
    for enlarged in (True, False):
        test = read_test_set(open_source(tmp_path, "test"), size, enlarged=enlarged, workers=0, quiet=True)
        assert test.images.shape == (2, 3, size, size)
    assert asked == [(size, shorter), (size, size)]


def test_a_split_without_a_readable_image_is_refused(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(b"no")
    with pytest.raises(UsageError, match="none of the 2 images of the test split can be decoded"):
        read_test_set(open_source(tmp_path, "test"), 32, workers=0, quiet=True)
