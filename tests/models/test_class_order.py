import json

import pytest
import torch
from torch import nn

from ddfast.errors import UsageError
from ddfast.models import Teacher, create_model, load_teacher, save_teacher
from ddfast.models.class_order import output_places, read_class_order
from ddfast.models.teacher import PermutedOutputs, with_class_order
from tests.models.test_teacher import MEAN, NAMES, STD, a_file, a_model, full_width, refused

OURS = ["bee", "cow", "ant"]  # of the data; the outputs stand as in NAMES
PLACES = [1, 2, 0]
JSONS = {
    "list": NAMES,
    "index to name": {"2": "cow", "0": "ant", "1": "bee"},
    "name to index": {"cow": 2, "ant": 0, "bee": 1},
    "name among others": {"0": ["n01", "ant"], "1": ["n02", "bee"], "2": ["n03", "cow"]},
}


@pytest.mark.parametrize("form", JSONS)
@pytest.mark.parametrize("where", ["json", "txt", "memory"])
def test_every_form_says_the_same(tmp_path, form, where):
    given = JSONS[form]
    if where != "memory":
        (tmp_path / f"order.{where}").write_text(json.dumps(given, indent=2))
        given = tmp_path / f"order.{where}"
    assert read_class_order(given, OURS) == NAMES


@pytest.mark.parametrize("text", ["ant\nbee\ncow", "ant\r\nbee\r\ncow\r\n\r\n", "\ufeffant\nbee \n cow\n"])
def test_a_text_file_has_one_name_a_line(tmp_path, text):
    (tmp_path / "order.txt").write_bytes(text.encode())
    assert read_class_order(tmp_path / "order.txt", OURS) == NAMES


def test_names_keep_spaces_brackets_digits_and_their_unicode(tmp_path):
    (tmp_path / "order").write_bytes("[a] b\n7\nte\u0301\n".encode())
    assert read_class_order(tmp_path / "order", ["7", "t\u00e9", "[a] b"]) == ["[a] b", "7", "t\u00e9"]
    assert read_class_order(["a ", "a"], ["a", "a "]) == ["a ", "a"]
    assert read_class_order({0: "b", 1: "a"}) == ["b", "a"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"order.txt": "ant\nbee\nant\n"}, "names 'ant' twice, for outputs 0 and 2"),
        ({"order.txt": "ant\n\nbee\n"}, "empty line, 2 of 3"),
        ({"order.txt": ""}, "names no class"),
        ({"order.json": "ant\n"}, "is no JSON"),
        ({"order.json": '"ant"'}, "must be a list of names or {index: name}, got a str"),
        ({"order.json": "[1.5]"}, "has '1.5' for output 0"),
        ({"order.json": '{"0": "ant", "0": "bee"}'}, "has '0' twice"),
        ({"order.json": '{"0": "ant", "2": "bee"}'}, "every output from 0 to 1"),
        ({"order.json": '{"0": 1, "1": 2, "2": 0}'}, "numbers to numbers"),
        ({}, "cannot be read"),
    ],
)
def test_what_is_no_order_is_one_clear_line(tmp_path, given, message):
    for name, text in given.items():
        (tmp_path / name).write_text(text)
    path = tmp_path / next(iter(given), "order.txt")
    with pytest.raises(UsageError) as caught:
        read_class_order(path, OURS)
    assert message in str(caught.value)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_places_need_the_same_classes():
    assert output_places(NAMES, OURS) == PLACES
    with pytest.raises(UsageError, match="'kow' is no class of the data, it lacks 'cow'"):
        output_places(["ant", "bee", "kow"], OURS)
    with pytest.raises(UsageError, match="names 2 classes: the data has 3, it lacks 'cow'"):
        output_places(["ant", "bee"], OURS)


def images():
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_state_dict_and_a_teacher_file_are_permuted_alike(tmp_path):
    a_file(tmp_path / "t.safetensors", class_names=["x", "y", "z"])
    torch.save(full_width().state_dict(), tmp_path / "t.pt")
    for path, model, said in (
        (tmp_path / "t.safetensors", a_model(), {}),
        (tmp_path / "t.pt", full_width(), {"arch": "convnet3", "image_size": 16}),
    ):
        teacher = load_teacher(path, class_order=NAMES, class_names=OURS, **said)
        assert (teacher.class_names, teacher.class_order) == (OURS, NAMES)
        torch.testing.assert_close(teacher.model(images()), model.eval()(images())[:, PLACES])
        as_is = load_teacher(path, class_order=NAMES, **said)  # without the data's order they get their names
        assert (as_is.class_names, as_is.class_order) == (NAMES, NAMES)
        assert torch.equal(as_is.model(images()), model(images()))
    wrong = ["ant", "bee"]
    assert "names 2 classes" in refused(tmp_path / "t.safetensors", class_order=wrong)
    assert "names 2 classes" in refused(tmp_path / "t.safetensors", class_order=wrong, class_names=OURS)


def test_torchvision_weights_are_permuted(monkeypatch):
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None).eval()
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, *_, **__: model.state_dict())
    theirs = [f"c{place:04d}" for place in range(1000)]
    ours = theirs[::-1]
    teacher = load_teacher("torchvision:resnet18", class_order=theirs, class_names=ours)
    batch = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(teacher.model(batch), model(batch).flip(1), atol=1e-4, rtol=1e-4)
    assert teacher.class_names == ours


class TwoHeads(nn.Module):
    """Its logits are no rows of one last layer."""

    def __init__(self):
        super().__init__()
        self.body = create_model("convnet3", 3, 16, width=8)
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        hidden = self.body(x)
        return self.one(hidden) + self.two(hidden)


def test_any_model_is_permuted_and_the_given_one_kept():
    torch.manual_seed(0)
    for model in (a_model().eval(), TwoHeads().eval(), nn.Sequential(TwoHeads(), nn.Softmax(1)).eval()):
        given = Teacher(model, "own", ["x", "y", "z"], 16, MEAN, STD, "0" * 64)
        before = model(images())
        teacher = with_class_order(given, NAMES, OURS)
        torch.testing.assert_close(teacher.model(images()), before[:, PLACES])
        assert torch.equal(model(images()), before)
        assert (given.class_names, given.class_order) == (["x", "y", "z"], None)
        assert isinstance(teacher.model, PermutedOutputs) == (not hasattr(model, "blocks"))
        assert with_class_order(teacher, NAMES, OURS) is teacher  # not twice
        with pytest.raises(UsageError, match="another class order"):
            with_class_order(teacher, OURS, OURS)
        with pytest.raises(UsageError, match="names 2 classes, the teacher has 3 outputs"):
            with_class_order(given, ["ant", "bee"], ["bee", "ant"])


def test_a_permuted_teacher_can_be_saved_in_the_order_of_the_data(tmp_path):
    a_file(tmp_path / "t.safetensors")
    teacher = load_teacher(tmp_path / "t.safetensors", class_order=NAMES, class_names=OURS)
    fields = {
        name: getattr(teacher, name)
        for name in ("arch", "class_names", "image_size", "mean", "std", "arch_options")
    }
    save_teacher(tmp_path / "ours.safetensors", teacher.model, **fields)
    again = load_teacher(tmp_path / "ours.safetensors", class_names=OURS)
    assert torch.equal(again.model(images()), teacher.model(images()))
    assert again.class_order is None
