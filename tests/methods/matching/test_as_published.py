"""Numbers of the authors' codes that a whole run would not show to be wrong."""

from types import SimpleNamespace

import pytest
import torch

from ddfast.methods.matching.idc import IDC
from ddfast.methods.matching.idm import IDM
from ddfast.methods.matching.initial import mosaics
from ddfast.methods.matching.udd import UDD


@pytest.mark.parametrize(
    ("kind", "preset", "ipc", "size", "rate"),
    [
        (IDC, None, 10, 32, 0.005),  # tune_lr_img of argument.py: (ipc / 10) * (size / 32) ** 2
        (IDC, None, 50, 32, 0.025),
        (IDC, "tiny_imagenet", 10, 64, 0.02),
        (IDC, "tiny_imagenet_ipc50", 50, 64, 2e-5),  # reproduce.py: 1e-6 at 50 images a class
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


@pytest.mark.parametrize(
    ("preset", "given"),
    [
        ("cifar10_ipc1", {"real_batch": 5000, "queue_every": 5}),
        ("cifar10_ipc50", {"ce_weight": 0.1, "accuracy_every": 500}),
        ("cifar100_ipc1", {"real_batch": 500, "queue_every": 5}),  # asks for 5,000 of a class, which has 500
        ("cifar100_ipc10", {"ce_weight": 0.1, "net_steps": 50, "queue": 100}),
        ("cifar100_ipc50", {"ce_weight": 0.1, "accuracy_every": 500}),
        ("tiny_imagenet", {"accuracy_every": 100}),
        ("tiny_imagenet_ipc10", {"accuracy_every": 500}),
        ("tiny_imagenet_ipc50", {"ce_weight": 0.8, "net_steps": 50, "accuracy_every": 1000}),
    ],
)
def test_idm_is_as_command_txt_has_it(preset, given):
    options = IDM.from_options({}, preset).options
    usual = {"real_batch": 256, "queue_every": 30, "accuracy_every": 100, "ce_weight": 0.5}
    assert {name: getattr(options, name) for name in {**usual, **given}} == {**usual, **given}


@pytest.mark.parametrize(("factor", "begun"), [(2, "mix"), (1, "real")])
def test_idc_begins_with_a_mix_where_an_image_has_tiles(factor, begun):
    assert IDC.from_options({}).resolved(factor, 10).options.init == begun
    assert IDC.from_options({"init": "noise"}).resolved(factor, 10).options.init == "noise"


def test_images_of_whole_numbers_are_mixed_to_the_nearest():
    images = torch.tensor([0, 3, 2, 2], dtype=torch.uint8).view(1, 1, 2, 2).expand(4, 3, 2, 2)
    # The means of 2 x 2 pixels: 7 / 4, to 2 and not to 1.
    assert torch.equal(mosaics(images, 2, "bilinear"), torch.full((1, 3, 2, 2), 2, dtype=torch.uint8))
    exact = mosaics(images.float(), 2, "bilinear")
    assert torch.equal(exact, torch.full((1, 3, 2, 2), 1.75))
