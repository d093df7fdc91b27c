"""Loops that are taken out of a file: here one of ours, as the reference repositories are not part of this one."""

import pytest
import torch

from bench.speed import peer_loops
from bench.speed.registry import Unavailable

CODE = """
import a_package_that_is_not_there


def scaled(value):
    return value * factor


def main():
    total = 0
    for it in range(1000):
        total += scaled(it)
        for ol in range(3):
            if ol == 2:
                break
            image_syn = image_syn + ol
"""


@pytest.fixture
def path(tmp_path):
    """The file."""
    (tmp_path / "main.py").write_text(CODE)
    return tmp_path / "main.py"


def test_a_loop_runs_a_pass_at_a_time_in_the_names_it_is_given(path):
    names = {"factor": 10, "total": 0, "image_syn": torch.zeros(2)}
    peer_loops._define(path, ("scaled",), names)
    loop = peer_loops.PeerLoop(path, "it", names)
    loop.step(4)
    loop.step(5)
    assert loop.names["total"] == 90
    assert torch.equal(loop.pixels, torch.full((2,), 2.0))  # 0 + 1 in each pass
    inner = loop.over(path, "ol")
    inner.step(7)
    assert torch.equal(loop.pixels, torch.full((2,), 9.0))
    inner.step(2)  # their own break
    assert torch.equal(loop.pixels, torch.full((2,), 9.0))


def test_another_version_is_told(path):
    with pytest.raises(Unavailable, match="has 0 loops over `epoch`"):
        peer_loops.PeerLoop(path, "epoch", {})
    with pytest.raises(Unavailable, match="lacks some of scaled, gone"):
        peer_loops._define(path, ("scaled", "gone"), {})


def test_a_missing_checkout_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv("DDFAST_PEERS", raising=False)
    with pytest.raises(Unavailable, match="DDFAST_PEERS names no folder with a checkout of uitrbn/IDM"):
        peer_loops.checkout("IDM")
    monkeypatch.setenv("DDFAST_PEERS", str(tmp_path))
    with pytest.raises(Unavailable, match="holds no checkout of snu-mllab/Efficient-Dataset-Condensation"):
        peer_loops.checkout("Efficient-Dataset-Condensation")
    (tmp_path / "uitrbn+IDM").mkdir()
    (tmp_path / "uitrbn+IDM" / "IDM_cifar10.py").touch()
    assert peer_loops.checkout("IDM") == tmp_path / "uitrbn+IDM" / "IDM_cifar10.py"


def test_the_meter_tells_percent():
    meter = peer_loops._Meter(accuracy=True)
    meter.add(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1]))
    meter.add(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([1, 1]))
    assert (meter.value(), meter.n) == ([75.0], 4)
    meter.reset()
    assert meter.n == 0
