"""Networks that call `Tensor.view` on feature maps, as the reference code of dataset condensation does."""

import numpy as np
import pytest
import torch
from torch import nn

import ddfast
from ddfast.attribution import shapley_crops
from ddfast.attribution.crops import CropRule


class Viewing(nn.Module):
    def __init__(self, reshapes=False):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2))
        self.classifier = nn.Linear(8 * 64, 3)
        self.reshapes = reshapes

    def forward(self, images):
        maps = self.features(images)
        flat = maps.reshape(len(maps), -1) if self.reshapes else maps.view(maps.size(0), -1)
        return self.classifier(flat)


IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("call", [ddfast.shapley, ddfast.grad_cam])
@pytest.mark.parametrize("wrapped", [False, True])
def test_attributions_are_those_of_the_network_that_reshapes(call, wrapped):
    def given(model):
        model = model.eval().to(memory_format=torch.channels_last)
        return (lambda images: model(images)) if wrapped and call is ddfast.shapley else model

    images = IMAGES.contiguous(memory_format=torch.channels_last)
    found = call(given(Viewing()), images, LABELS, grid=4)
    assert torch.equal(found, call(given(Viewing(reshapes=True)), images, LABELS, grid=4))


@pytest.mark.parametrize("method", ["infoutil", "rded", "random"])
def test_it_may_be_a_teacher(method, toy_folder, tmp_path):
    names = sorted(path.name for path in (toy_folder / "train").iterdir())
    for reshapes in (False, True):
        teacher = ddfast.Teacher(
            Viewing(reshapes).eval(), class_names=names, image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3
        )
        out = tmp_path / str(reshapes)
        given = {"ipc": 1, "images_per_class": 8, "quiet": True, "preflight": False}
        ddfast.distill(method, data=toy_folder, teacher=teacher, out=out, **given)
    made = [ddfast.DistilledSet(tmp_path / str(reshapes)) for reshapes in (False, True)]
    for one, other in zip(*made, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[2], other[2])


def test_the_users_own_module_is_left_alone():
    model = Viewing().eval()
    ddfast.Teacher(model, class_names=["a", "b", "c"], image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_settings_of_shapley_crops_have_the_defaults_of_shapley():
    model = Viewing().eval()
    phi, boxes = shapley_crops(model, IMAGES, LABELS, [5, 6, 7, 8], CropRule(seed=0, crop_size=8))
    assert torch.equal(phi, ddfast.shapley(model, IMAGES, LABELS))
    assert boxes.shape == (4, 5, 4)


def test_numbers_may_be_numpys_and_no_fractions():
    model = Viewing().eval()
    wanted = ddfast.shapley(model, IMAGES, LABELS, grid=4, chunk_size=8)
    assert torch.equal(
        ddfast.shapley(model, IMAGES, LABELS, grid=np.int64(4), chunk_size=np.int64(8)), wanted
    )
    for settings, words in (
        ({"grid": 4.0}, "grid must be a whole number"),
        ({"grid": (2, 2, 2)}, "grid must be a whole number or two"),
        ({"chunk_size": 2.5}, "chunk_size must be a whole number"),
    ):
        with pytest.raises(ValueError, match=words):
            ddfast.shapley(model, IMAGES, LABELS, **settings)
