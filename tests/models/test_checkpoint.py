import argparse

import pytest
import torch
from torch import nn

from ddfast.models import load_teacher
from tests.models.test_teacher import STATE_DICT, full_width, refused


@pytest.fixture(scope="module")
def state():
    return full_width().state_dict()


def behind(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def other(state):
    """Weights of the same shapes that are not the model's."""
    return {name: value + 1 if value.is_floating_point() else value.clone() for name, value in state.items()}


def average(state):
    """What `AveragedModel` holds."""
    return {"n_averaged": torch.tensor(3), **behind("module.", other(state))}


def trained(state):
    """A step of Adam and its state dict."""
    model = full_width()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


CHECKPOINTS = {
    **{
        prefix: lambda state, prefix=prefix: behind(prefix, state)
        for prefix in (
            *("module.", "_orig_mod.", "model.", "backbone.", "net.", "encoder.", "a.b.c.", "ema."),
            *("module._orig_mod.", "_orig_mod.module.", "model._orig_mod.module.backbone."),
        )
    },
    **{
        name: lambda state, name=name: {name: state, "epoch": 3, "best": 0.5}
        for name in ("net", "model", "state_dict", "model_state_dict", "ema", "params")
    },
    "nested": lambda state: {"checkpoint": {"state": {"model": behind("module.", state)}}},
    "wrapped inside": lambda state: {
        name.replace("blocks.", "blocks._orig_mod.module."): value for name, value in state.items()
    },
    "Lightning": lambda state: {
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {
            **behind("model.", state),
            **behind("model_ema.module.", other(state)),
            "train_accuracy.correct": torch.zeros(3),
        },
        "optimizer_states": [trained(state)],
        "hyper_parameters": {"lr": 0.1, "arch": "convnet3"},
        "callbacks": {},
    },
    "average beside": lambda state: {"model_ema": other(state), "model": state, "optimizer": trained(state)},
    "average beside, flat": lambda state: {**state, **behind("ema.", other(state))},
    "average alone": lambda state: {"ema": {"decay": 0.999, "module": state}, "optimizer": trained(state)},
    "averaged model": lambda state: {**average(other(state)), **behind("module.", state)},
    "momentum by name": lambda state: {"optimizer": {"momentum": other(state)}, "model": state},
    "twice the same": lambda state: {"model": state, "state_dict": behind("module.", state)},
    "parameters": lambda state: {name: nn.Parameter(value, False) for name, value in state.items()},
    "no batch counts": lambda state: {
        name: value for name, value in state.items() if "num_batches" not in name
    },
}


@pytest.mark.parametrize("form", CHECKPOINTS)
def test_weights_are_found_wherever_they_lie(tmp_path, state, form):
    for ending in (".pt", ".ckpt", ".pth.tar"):
        torch.save(CHECKPOINTS[form](state), tmp_path / f"teacher{ending}")
    for ending in (".pt", ".ckpt", ".pth.tar"):
        found = load_teacher(tmp_path / f"teacher{ending}", **STATE_DICT).model.state_dict()
        for name, value in state.items():
            assert torch.equal(found[name], value) or "num_batches" in name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_floating_type_become_float32(tmp_path, state, dtype):
    stored = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    torch.save(behind("module.", stored), tmp_path / "teacher.pt")
    found = load_teacher(tmp_path / "teacher.pt", **STATE_DICT).model.state_dict()
    for name, value in stored.items():
        assert torch.equal(found[name], value.float() if value.is_floating_point() else value)
        assert found[name].dtype == state[name].dtype


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"model": behind("module.", without(s, "classifier.bias"))}, "it lacks classifier.bias"),
        (
            lambda s: {**without(s, "classifier.weight"), "head.weight": s["classifier.weight"]},
            "it lacks classifier.weight; it has head.weight, which convnet3 has not",
        ),
        (lambda s: behind("module.", {**s, "x": torch.zeros(1)}), "it has module.x, which convnet3 has not"),
        (
            lambda s: {**s, "classifier.weight": torch.zeros(7, 512), "classifier.bias": torch.zeros(7)},
            "classifier.weight is [7, 512], convnet3 has [3, 512]",
        ),
        (
            lambda s: {**s, "classifier.weight": torch.zeros(7, 512), "classifier.bias": torch.zeros(7)},
            "(weights of 7 classes)",
        ),
        (
            lambda s: {"student": s, "teacher": other(s)},
            "two sets of weights that fit, student. and teacher.",
        ),
        (
            lambda s: {**s, "classifier.bias": torch.zeros(3, dtype=torch.int8)},
            "classifier.bias is int8, wanted floating point",
        ),
        (lambda s: {"epoch": 3, "model": [1, 2]}, "holds no state dict of tensors"),
        (lambda s: [1, 2], "holds no state dict of tensors"),
        (lambda s: {"optimizer": trained(s)}, "it lacks blocks.0.weight"),
        (lambda s: {**s, "classifier.bias": torch.full((3,), torch.nan)}, "holds NaN in classifier.bias"),
        (lambda s: {"model": s, "args": argparse.Namespace(lr=1)}, "Python objects (argparse.Namespace)"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(tmp_path, state, change, message):
    torch.save(change(state), tmp_path / "teacher.pt")
    assert message in refused(tmp_path / "teacher.pt", **STATE_DICT)


def test_bare_safetensors_load_with_their_architecture(tmp_path, state):
    from safetensors.torch import save_file

    save_file(behind("module.", state), tmp_path / "bare.safetensors")
    teacher = load_teacher(tmp_path / "bare.safetensors", **STATE_DICT)
    assert torch.equal(teacher.model.classifier.weight, state["classifier.weight"])
    assert "give its architecture (arch)" in refused(tmp_path / "bare.safetensors")
    assert "class_names" in refused(tmp_path / "bare.safetensors", arch="convnet3", image_size=16)
