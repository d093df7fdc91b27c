"""Numbers of the authors' codes that a whole run would not show to be wrong."""

from types import SimpleNamespace

import pytest
import torch

from ddfast.methods.matching.idc import IDC
from ddfast.methods.matching.initial import mosaics
from ddfast.methods.matching.udd import UDD


@pytest.mark.parametrize(
    ("kind", "preset", "ipc", "size", "rate"),
    [
        (IDC, None, 10, 32, 0.005),  # tune_lr_img of argument.py: (ipc / 10) * (size / 32) ** 2
        (IDC, None, 50, 32, 0.025),
        (IDC, "tiny_imagenet", 10, 64, 0.02),
        (UDD, "imagenet10", 10, 224, 0.003),
        (IDC, "imagenet10", 10, 224, 0.003),  # and (size / 224) ** 2 on ImageNet
        (IDC, "imagenet10", 20, 224, 0.006),
    ],
)
def test_rates_of_idc_and_of_udd_that_stands_on_it(kind, preset, ipc, size, rate):
    method = kind.from_options({}, preset)
    assert method.rate(0, SimpleNamespace(ipc=ipc, image_size=size)) == pytest.approx(rate)


def test_idc_on_imagenet_is_as_reproduce_py_has_it():
    options = IDC.from_options({}, "imagenet10").options
    assert (options.arch, options.distance) == ("resnetap10", "magnitudes")
    assert (options.iterations, options.net_samples, options.net_epochs) == (500, 500, 10)
    assert not options.flip  # aug_type is color_crop_cutout


def test_images_of_whole_numbers_are_mixed_to_the_nearest():
    images = torch.tensor([0, 3, 2, 2], dtype=torch.uint8).view(1, 1, 2, 2).expand(4, 3, 2, 2)
    # The means of 2 x 2 pixels: 7 / 4, to 2 and not to 1.
    assert torch.equal(mosaics(images, 2, "bilinear"), torch.full((1, 3, 2, 2), 2, dtype=torch.uint8))
    exact = mosaics(images.float(), 2, "bilinear")
    assert torch.equal(exact, torch.full((1, 3, 2, 2), 1.75))
