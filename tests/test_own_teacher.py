"""`ddfast.Teacher` of a module of the user's own: what is made of it, and that a run takes it."""

import json

import pytest
import torch
from torch import nn

import ddfast
from ddfast.errors import UsageError
from tests.conftest import digests

SIZE, MEAN, STD = 16, [0.5, 0.4, 0.3], [0.2, 0.2, 0.3]
NAMES = ["a", "b", "c"]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layers(x))


def given(**changed):
    return {"class_names": NAMES, "mean": MEAN, "std": STD, "image_size": SIZE, **changed}


def test_a_module_becomes_a_teacher_and_stays_as_it_was():
    torch.manual_seed(0)
    model = Small().double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teacher = ddfast.Teacher(model, **given())
    assert (teacher.arch, teacher.class_names, teacher.image_size) == ("Small", NAMES, SIZE)
    assert (teacher.mean, teacher.std) == (tuple(MEAN), tuple(STD))
    assert not teacher.model.training
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(teacher.sha256) == 64
    assert ddfast.Teacher(model, **given()).sha256 == teacher.sha256
    with torch.no_grad():
        model.head.bias += 1
    assert ddfast.Teacher(model, **given()).sha256 != teacher.sha256


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"class_names": ["a"]}, "class_names must hold the names of at least 2 classes"),
        ({"class_names": ["a", "a", "b"]}, "each once"),
        ({"image_size": 0}, "image_size"),
        ({"mean": [0.5]}, "mean must be three numbers"),
        ({"std": [0.2, 0.0, 0.2]}, "std must be three numbers, one a channel, each above 0"),
        ({"mean": [0.5, float("nan"), 0.5]}, "mean must be three numbers"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(changed, message):
    with pytest.raises(UsageError, match=message) as caught:
        ddfast.Teacher(Small(), **given(**changed))
    assert "\n" not in str(caught.value)


def test_what_is_no_module_or_lacks_a_setting_is_refused():
    with pytest.raises(UsageError, match=r"model must be a torch\.nn\.Module, got function"):
        ddfast.Teacher(lambda x: x, **given())
    with pytest.raises(UsageError, match="class_names"):
        ddfast.Teacher(Small())


def test_a_run_takes_it_and_labels_with_it(toy_folder, tmp_path):
    names = ddfast.data.open_source(str(toy_folder), "train").class_names
    teacher = ddfast.Teacher(Small(), **given(class_names=names))
    settings = {
        "data": toy_folder,
        "teacher": teacher,
        "ipc": 2,
        "quiet": True,
        "images_per_class": 10,
        "preflight": False,
    }
    out = ddfast.distill("rded", out=tmp_path / "out", **settings)
    plan = json.loads((out / "manifest.json").read_text())
    assert plan["teacher"]["sha256"] == teacher.sha256
    assert tuple(plan["mean"]) == tuple(MEAN)
    assert len(ddfast.DistilledSet(out)) == 6
    again = ddfast.distill("rded", out=tmp_path / "again", **settings)
    assert digests(again) == digests(out)
    assert ddfast.distill("rded", out=out, resume=True, **settings) == out
    result = ddfast.evaluate(out, toy_folder, arch="convnet3", arch_options={"width": 8}, seeds=1, epochs=1,
                             teacher=teacher, quiet=True, preflight=False)  # fmt: skip
    assert 0 <= result.mean <= 100
