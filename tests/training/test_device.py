import pytest
import torch

from ddfast.errors import UsageError
from ddfast.training.device import resolve_device


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_a_gpu_that_is_there_is_taken(two_gpus):
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_refused_in_one_line(two_gpus):
    with pytest.raises(
        UsageError, match=r"^device cuda:2 was asked for, but torch sees 2 GPUs, numbered from 0$"
    ):
        resolve_device("cuda:2")


def test_without_a_gpu_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(UsageError, match="torch sees no GPU"):
        resolve_device("cuda")
