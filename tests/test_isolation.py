"""What a caller has set neither changes a result nor is changed by a call."""

import contextlib
import logging
import os
import random
import signal
import warnings

import numpy as np
import pytest
import torch

import ddfast
from ddfast.errors import UsageError
from ddfast.isolation import isolated
from tests.conftest import digests


def state():
    """All that a program may have set for itself."""
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "precision": torch.get_float32_matmul_precision(),
        "torch draws": torch.get_rng_state().tolist(),
        "numpy draws": repr(np.random.get_state()),  # noqa: NPY002
        "python draws": random.getstate(),
        "filters": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    }


@contextlib.contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES = {
    "float64": float64,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
}


def whole_way(folder, out):
    """A teacher, two distilled sets, three students and an opened set; each call leaves the state as it was."""

    def call(function, *args, **kwargs):
        before = state()
        result = function(*args, **kwargs)
        after = state()
        assert [name for name in before if before[name] != after[name]] == []
        return result

    net = {"arch": "convnet3", "arch_options": {"width": 8}, "quiet": True}
    teacher = call(
        ddfast.train_teacher,
        folder,
        out=out / "t.safetensors",
        epochs=2,
        precision="auto",
        image_size=16,
        **net,
    )
    run = {
        "data": folder,
        "teacher": teacher,
        "ipc": 1,
        "images_per_class": 4,
        "preflight": False,
        "threads": 1,
    }
    call(ddfast.distill, "infoutil", out=out / "infoutil", quiet=True, **run)
    call(ddfast.distill, "herding", out=out / "herding", quiet=True, **run)
    accuracies = [
        call(ddfast.evaluate, out / "infoutil", folder, seeds=1, epochs=3, **net, **options).top1
        for options in ({}, {"teacher": teacher, "autoaugment": True}, {"protocol": "idc"})
    ]
    opened = call(ddfast.DistilledSet, out / "infoutil")
    image, label, soft = call(opened.__getitem__, 1)
    assert (image.dtype, label, soft.dtype) == (torch.uint8, 1, torch.float32)
    assert not opened.labels.is_inference()
    assert not opened.stored.values.is_inference()
    return digests(out), accuracies, soft.tolist()


@pytest.fixture(scope="module")
def plain(tmp_path_factory, toy_folder):
    """What the whole way gives in torch's usual state."""
    out = tmp_path_factory.mktemp("plain")
    return whole_way(toy_folder, out), out


@pytest.mark.parametrize("mode", MODES)
def test_the_result_is_the_same_in_every_mode_of_the_caller(mode, plain, toy_folder, tmp_path):
    (files, accuracies, soft), _ = plain
    with MODES[mode]():
        found, their_accuracies, their_soft = whole_way(toy_folder, tmp_path)
    del found["herding/report.html"], found["infoutil/report.html"]
    assert found == {name: files[name] for name in found}
    assert their_accuracies == accuracies
    assert their_soft == soft


def test_a_teacher_made_in_inference_mode_serves(plain, toy_folder, tmp_path):
    _, out = plain
    with torch.inference_mode():
        teacher = ddfast.load_teacher(out / "t.safetensors")
    run = {
        "data": toy_folder,
        "ipc": 1,
        "images_per_class": 4,
        "preflight": False,
        "threads": 1,
        "quiet": True,
    }
    ddfast.distill("infoutil", teacher=teacher, out=tmp_path / "run", **run)
    assert (
        digests(tmp_path / "run")["soft_labels.safetensors"]
        == digests(out)["infoutil/soft_labels.safetensors"]
    )


def test_a_teacher_comes_back_as_it_was_handed_in(plain, toy_folder, tmp_path):
    _, out = plain
    teacher = ddfast.load_teacher(out / "t.safetensors")
    teacher.model.train().double()
    strides = [parameter.stride() for parameter in teacher.model.parameters()]
    values = [parameter.clone() for parameter in teacher.model.state_dict().values()]
    run = {
        "data": toy_folder,
        "ipc": 1,
        "images_per_class": 4,
        "preflight": False,
        "threads": 1,
        "quiet": True,
    }
    ddfast.distill("infoutil", teacher=teacher, out=tmp_path / "run", **run)
    assert digests(tmp_path / "run")["selection.parquet"] == digests(out)["infoutil/selection.parquet"]
    assert teacher.model.training
    assert [parameter.stride() for parameter in teacher.model.parameters()] == strides
    assert all(torch.equal(a, b) for a, b in zip(values, teacher.model.state_dict().values(), strict=True))


def test_an_error_gives_the_state_back_too(toy_folder, tmp_path):
    with float64(), torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        before = state()
        with pytest.raises(UsageError):
            ddfast.distill("rded", data=toy_folder, teacher="nowhere", ipc=1, out=tmp_path / "run")
        with pytest.raises(UsageError):
            ddfast.evaluate(tmp_path, toy_folder, arch="convnet3")
        with pytest.raises(UsageError):
            ddfast.train_teacher(tmp_path, arch="convnet3", epochs=1, out=tmp_path / "t.safetensors")
        with pytest.raises(UsageError):
            ddfast.DistilledSet(tmp_path)
        assert state() == before


def test_what_a_block_changes_is_put_back():
    with torch.autocast("cpu"), torch.autocast("cpu"):
        before = state()

        @isolated()
        def careless():
            assert not torch.is_autocast_enabled("cpu")
            torch.set_num_threads(torch.get_num_threads() + 1)
            torch.manual_seed(7)
            np.random.seed(7)  # noqa: NPY002
            random.seed(7)
            warnings.simplefilter("error")
            os.environ["DDFAST_TEST"] = "1"
            os.environ.pop("PATH", None)
            raise KeyError("careless")

        with pytest.raises(KeyError, match="careless"):
            careless()
        assert state() == before
        assert torch.autocast_increment_nesting() == 3
        torch.autocast_decrement_nesting()
