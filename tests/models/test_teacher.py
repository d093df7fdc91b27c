import hashlib
import json
import pickle

import pytest
import torch
from safetensors.torch import load, save_file

from ddfast.errors import UsageError
from ddfast.models import NORMALIZATIONS, create_model, load_teacher, normalization, save_teacher

NAMES = ["ant", "bee", "cow"]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def a_model(seed=0):
    torch.manual_seed(seed)
    model = create_model("convnet3", 3, 16, width=8)
    model(torch.randn(4, 3, 16, 16))  # moves the running statistics off their initial values
    return model


def a_file(path, **changes):
    arguments = {
        "arch": "convnet3",
        "class_names": NAMES,
        "image_size": 16,
        "mean": MEAN,
        "std": STD,
        "arch_options": {"width": 8},
        "top1": 61.5,
        "epoch": 4,
        "note": "kept",
    }
    return save_teacher(path, a_model(), **{**arguments, **changes})


def test_a_saved_teacher_comes_back(tmp_path):
    path = tmp_path / "teacher.safetensors"
    digest = a_file(path)
    teacher = load_teacher(path)
    assert (teacher.arch, teacher.class_names, teacher.image_size) == ("convnet3", NAMES, 16)
    assert (teacher.mean, teacher.std) == (MEAN, STD)
    assert (teacher.top1, teacher.epoch, teacher.arch_options) == (61.5, 4, {"width": 8})
    assert teacher.facts == {"note": "kept"}
    assert teacher.sha256 == digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not teacher.model.training
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(teacher.model(images), a_model().eval()(images))
    assert all(value.dtype == torch.float32 for value in teacher.model.parameters())


def test_equal_teachers_are_equal_bytes_whatever_their_layout(tmp_path):
    a_file(tmp_path / "one.safetensors")
    save_teacher(
        tmp_path / "two.safetensors",
        a_model().to(memory_format=torch.channels_last),
        note="kept",
        epoch=4,
        top1=61.5,
        arch_options={"width": 8},
        std=list(STD),
        mean=list(MEAN),
        image_size=16,
        class_names=tuple(NAMES),
        arch="convnet3",
    )
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_a_trained_teacher_and_other_files_are_not_saved_over(tmp_path):
    path = tmp_path / "teacher.safetensors"
    a_file(path)
    a_file(path, note="replaces its own")
    a_file(path, training={"epochs": 90})
    for held, message in ((path.read_bytes(), "made by train-teacher"), (b"mine", "is no teacher file")):
        path.write_bytes(held)
        with pytest.raises(UsageError, match=message):
            a_file(path)
        assert path.read_bytes() == held


def test_loading_leaves_the_global_generator_alone(tmp_path):
    a_file(tmp_path / "teacher.safetensors")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    load_teacher(tmp_path / "teacher.safetensors")
    assert torch.equal(torch.rand(4), expected)


def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(tmp_path):
    path = tmp_path / "teacher.safetensors"
    for padding in range(0, 300, 4):
        a_file(path, note="x" * padding)
        if path.read_bytes()[0] == 0x80:
            break
    assert path.read_bytes()[0] == 0x80
    assert load_teacher(path).class_names == NAMES


def refused(*arguments, **options):
    with pytest.raises(UsageError) as caught:
        load_teacher(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 3000, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "teacher.safetensors"
    a_file(path)
    path.write_bytes(path.read_bytes()[:kept])
    assert "is no complete safetensors teacher file" in refused(path)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_named_safetensors_is_refused(tmp_path, old_format):
    path = tmp_path / "teacher.safetensors"
    torch.save(a_model().state_dict(), path, _use_new_zipfile_serialization=not old_format)
    assert "is a pickle" in refused(path)


def test_a_file_without_metadata_is_refused(tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_file(a_model().state_dict(), path)
    assert "metadata" in refused(path)


def test_metadata_that_lacks_a_field_is_refused(tmp_path):
    path = tmp_path / "teacher.safetensors"
    a_file(path)
    header = {"format": "ddfast-teacher-1", "arch": "convnet3"}
    save_file(load(path.read_bytes()), path, metadata={"ddfast_teacher": json.dumps(header)})
    assert "lacks class_names" in refused(path)


def test_missing_files_are_refused(tmp_path):
    assert "no teacher file" in refused(tmp_path / "none.safetensors")
    assert "no teacher file" in refused(tmp_path)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("arch", "convnet4"),
        ("image_size", 32),
        ("class_names", ["bee", "ant", "cow"]),
        ("normalization", "imagenet"),
    ],
)
def test_arguments_that_contradict_the_file_are_refused(tmp_path, argument, value):
    path = tmp_path / "teacher.safetensors"
    a_file(path)
    assert argument in refused(path, **{argument: value})


def test_arguments_that_repeat_the_file_are_fine(tmp_path):
    path = tmp_path / "teacher.safetensors"
    a_file(path)
    said = load_teacher(
        path, arch="convnet3", image_size=16, class_names=tuple(NAMES), normalization=(MEAN, STD)
    )
    assert said.sha256 == load_teacher(path).sha256


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"class_names": ["ant", "bee"]}, r"classifier.weight is \[3, 32\], convnet3 has \[2, 32\]"),
        ({"arch": "convnet4"}, "lacks blocks.12.weight"),
        ({"arch": "resnet18", "arch_options": {}}, "lacks conv1.weight"),
        ({"arch": "convnet33"}, "unknown model 'convnet33'"),
        ({"image_size": 20}, "multiple of 8"),
    ],
)
def test_weights_that_do_not_fit_name_the_first_difference(tmp_path, changes, problem):
    path = tmp_path / "teacher.safetensors"
    a_file(path, **changes)
    with pytest.raises(UsageError, match=problem):
        load_teacher(path)


STATE_DICT = {"arch": "convnet3", "class_names": NAMES, "image_size": 16}


def full_width():
    torch.manual_seed(0)
    return create_model("convnet3", 3, 16)


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "parallel"])
def test_a_weights_only_state_dict_loads(tmp_path, wrap):
    path = tmp_path / "teacher.pt"
    model = full_width()
    state = model.state_dict()
    if wrap == "state_dict":
        state = {"state_dict": state, "epoch": 3}
    if wrap == "parallel":
        state = {f"module.{name}": value for name, value in state.items()}
    torch.save(state, path)
    teacher = load_teacher(path, normalization="cifar10", **STATE_DICT)
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(teacher.model(images), model.eval()(images))
    assert (teacher.mean, teacher.std) == NORMALIZATIONS["cifar10"]
    assert teacher.top1 is None
    assert load_teacher(path, **STATE_DICT).mean == NORMALIZATIONS["imagenet"][0]


@pytest.mark.parametrize("missing", sorted(STATE_DICT))
def test_a_bare_state_dict_needs_what_it_does_not_say(tmp_path, missing):
    path = tmp_path / "teacher.pt"
    torch.save(full_width().state_dict(), path)
    message = refused(path, **{name: value for name, value in STATE_DICT.items() if name != missing})
    assert ("architecture" if missing == "arch" else missing) in message


class Trap:
    """An object whose unpickling leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("form", ["model", "torch trap", "plain trap"])
def test_a_pickle_of_objects_is_refused_and_never_run(tmp_path, form):
    path, trace = tmp_path / "teacher.pt", tmp_path / "trace"
    if form == "model":
        torch.save(full_width(), path)
    elif form == "torch trap":
        torch.save({"weight": Trap(str(trace))}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(str(trace))))
    assert "only tensors are read" in refused(path, **STATE_DICT)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04 cut off"])
def test_damaged_state_dicts_are_refused(tmp_path, content):
    path = tmp_path / "teacher.pth"
    path.write_bytes(content)
    assert "convert it with torch.save" in refused(path, **STATE_DICT)


def test_a_truncated_state_dict_is_refused(tmp_path):
    path = tmp_path / "teacher.pt"
    torch.save(full_width().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-2000])
    assert "truncated" in refused(path, **STATE_DICT)


def test_a_state_dict_of_something_else_is_refused(tmp_path):
    path = tmp_path / "teacher.pt"
    torch.save({"weights": [1, 2]}, path)
    assert "no state dict" in refused(path, **STATE_DICT)
    torch.save({"weight": torch.zeros(2)}, path)
    assert "does not fit convnet3" in refused(path, **STATE_DICT)


def test_torchvision_weights_bring_their_own_classes_size_and_normalisation(monkeypatch):
    import torchvision

    model = torchvision.models.resnet18(weights=None)
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, *_, **__: model.state_dict())
    teacher = load_teacher("torchvision:resnet18")
    assert (teacher.arch, teacher.image_size, len(teacher.class_names)) == ("resnet18", 224, 1000)
    assert teacher.class_names[0] == "tench"
    assert (teacher.mean, teacher.std) == NORMALIZATIONS["imagenet"]
    assert teacher.top1 == pytest.approx(69.758)
    assert not teacher.model.training
    assert len(teacher.sha256) == 64
    numbers = [str(number) for number in range(1000)]
    assert load_teacher("torchvision:resnet18", class_names=numbers).class_names == numbers
    assert "1000 classes, the data has 3" in refused("torchvision:resnet18", class_names=NAMES)
    assert "224 px" in refused("torchvision:resnet18", image_size=32)
    assert "no model 'resnet19'" in refused("torchvision:resnet19")


def test_weights_that_cannot_be_downloaded_are_a_usage_error(monkeypatch):
    import torchvision

    def offline(self, *_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(type(torchvision.models.ResNet18_Weights.DEFAULT), "get_state_dict", offline)
    assert "could not be downloaded: no route to host" in refused("torchvision:resnet18")


def test_normalization_takes_names_and_pairs():
    assert normalization("imagenet") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert normalization(([0, 0, 0], [1, 2, 3])) == ((0.0, 0.0, 0.0), (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="known: imagenet"):
        normalization("imagenet1k")
    with pytest.raises(ValueError, match="three"):
        normalization(([0, 0], [1, 1]))
    with pytest.raises(ValueError, match="positive"):
        normalization(([0, 0, 0], [1, 0, 1]))
