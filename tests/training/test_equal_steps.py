"""Students of sets whose images stand for several take the same updates as those of whole images."""

import pytest
import torch

from ddfast.training import PROTOCOLS, DistilledImages
from ddfast.training.equal_steps import EqualSteps, images_of_a_pass
from ddfast.training.student import steps_of_a_pass


def taken(steps, images):
    """Updates that `train_student` makes of so many images."""
    passes = steps.epochs_of(images) + steps.passes_after
    return passes * steps_of_a_pass(images, min(steps.batch_size, images))


@pytest.mark.parametrize(
    ("protocol", "ipc", "classes", "steps", "batch"),
    [
        # 1,001 passes of one step are lowered to 27 x 36, 300 of one to 8 x 36, 300 of two to 8 x 72, and so on.
        ("dsa", 1, 10, 972, 10),
        ("dsa", 10, 10, 972, 100),
        (
            "dsa",
            50,
            10,
            1944,
            256,
        ),  # 500 images in two batches, 2,000 in eight, 4,500 in 18: 27 x 72 of 2,002
        ("rded", 1, 10, 288, 10),
        ("rded", 10, 10, 576, 50),
        ("rded", 50, 10, 1440, 100),
    ],
)
def test_every_kind_of_set_takes_the_same_steps(protocol, ipc, classes, steps, batch):
    found = EqualSteps.of(PROTOCOLS[protocol], ipc, classes, 32, arch="convnet3_in")
    assert (found.steps, found.batch_size) == (steps, batch)
    assert {taken(found, views * ipc * classes) for views in (1, 4, 9)} == {steps}


def test_a_short_training_keeps_its_steps_and_others_come_near():
    found = EqualSteps.of(PROTOCOLS["dc"], 2, 3, 16, arch="convnet3_in", epochs=49)
    assert (found.steps, found.passes_after, found.epochs_of(6)) == (50, 1, 49)
    assert [taken(found, views * 6) for views in (1, 4, 9)] == [50, 48, 54]  # 12 and 6 whole passes
    assert EqualSteps.of(PROTOCOLS["dc"], 2, 3, 16, arch="convnet3_in", epochs=1).epochs_of(54) == 1


def test_epochs_and_batch_are_those_of_whole_images():
    found = EqualSteps.of(PROTOCOLS["rded"], 10, 10, 32, arch="convnet3", epochs=360, batch_size=100)
    assert (found.steps, found.batch_size) == (360, 100)
    assert [found.epochs_of(views * 100) for views in (1, 4, 9)] == [360, 90, 40]


@pytest.mark.parametrize(
    ("settings", "protocol", "seen"),
    [
        ({}, "dsa", 6),
        ({"images": torch.zeros(6, 3, 16, 16), "factor": 2}, "dsa", 24),
        (
            {"images": torch.zeros(6, 3, 16, 16), "boxes": torch.tensor([0, 0, 8, 8]).expand(6, 8, 4)},
            "dsa",
            54,
        ),
        ({"factor": 2}, "rded", 6),  # chosen tiles stay together where a protocol does not decode
        ({"factor": 2}, "idc", 24),
    ],
)
def test_optimised_images_are_decoded_under_every_protocol(settings, protocol, seen):
    whole = torch.zeros(6, 3, 16, 16, dtype=torch.uint8)
    given = {"images": whole, "labels": torch.arange(6) % 3, **settings}
    images = DistilledImages(class_names=["a", "b", "c"], mean=(0.5,) * 3, std=(0.25,) * 3, **given)
    assert images_of_a_pass(images, PROTOCOLS[protocol]) == seen
    if images.is_float:
        assert len(images.decoded().labels) == seen
