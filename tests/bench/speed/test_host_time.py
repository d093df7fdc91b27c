"""The clock that tells the host's time of the score pass by part, and what it takes off. No time is asserted."""

from unittest import mock

import pytest
import torch

from bench.speed import host_time
from bench.speed.host_time import Clock, LauncherTime, Operators, arithmetic, narrow_resnet18, no_launches
from bench.speed.registry import GateFailed, Settings, Unavailable
from bench.speed.score_pass import ONCE, SEAMS, parts

QUICK = Settings(torch.device("cpu"), quick=True)


def test_a_part_is_charged_without_the_parts_inside_of_it():
    now = 0.0
    clock = Clock(lambda: now)
    with clock.part("norms"):
        now += 1
        with clock.part("norms: crops"):
            now += 10
            with clock.part("norms"):
                now += 100
        now += 1000
        with clock.part("norms: crops"):
            now += 10000
    assert clock.seconds == {"norms": 1101, "norms: crops": 10010}
    assert clock.inside == []


def test_a_part_that_fails_is_left():
    clock = Clock(lambda: 0.0)
    with pytest.raises(ValueError, match="broken"), clock.part("norms"), clock.part("norms: crops"):
        raise ValueError("broken")
    assert clock.inside == []


def test_every_part_of_the_method_is_found_and_put_back():
    from ddfast.attribution import shapley_crops

    measured = next(host_time.host_time(QUICK))
    clock = Clock(lambda: 0.0)
    batch = measured.scored.micro_batch(measured.scored.found.images)
    with parts(clock.part) as missing:
        measured.scored.method.score(batch, measured.scored.context)
    assert missing == []
    of_pipeline = {ONCE, "wait for images", "upload", "rows back", "commit"}
    assert set(clock.seconds) == set(SEAMS) - of_pipeline
    from ddfast import attribution

    assert attribution.shapley_crops is shapley_crops


def test_a_seam_that_is_gone_is_named():
    with (
        mock.patch.dict(SEAMS, {"tail": ("ddfast.attribution.crops:no_such_op",)}),
        parts(Clock(int).part) as missing,
    ):
        assert missing == ["ddfast.attribution.crops:no_such_op"]


def test_operators_count_that_compute_on_what_lies_on_the_gpu():
    clock = Clock(lambda: 0.0)
    x = torch.ones(3)
    with Operators(clock) as found:
        x + 1  # in no part
        with clock.part("attribution"):
            x + 1  # drawing coalitions, on any machine
            with clock.part("attribution: masks"):
                torch.empty(3).copy_(x.view(1, 3)[0])
    assert [part for part, _ in found.noted] == ["attribution: masks"]


def test_arithmetic_is_the_least_of_each_operator(monkeypatch):
    ticks = iter([0, 5, 5, 6, 0, 2, 2, 9])  # two operators in two calls: 5 and 1 seconds, then 2 and 7
    monkeypatch.setattr("bench.speed.host_time.time.thread_time", lambda: next(ticks))
    monkeypatch.setattr("bench.speed.host_time.parts", lambda mark: mock.MagicMock())
    monkeypatch.setattr(Clock, "__init__", _in_masks)
    seconds, count = arithmetic(lambda: torch.ones(2).neg(), calls=2)
    assert (dict(seconds), dict(count)) == ({"attribution: masks": 3}, {"attribution: masks": 2})


def _in_masks(self, now):
    self.now, self.seconds, self.inside, self._deeper = now, {}, ["attribution: masks"], []


def test_the_network_is_a_64th_as_wide():
    model = narrow_resnet18()
    widths = [layer.out_channels for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert (min(widths), max(widths), len(widths)) == (1, 8, 20)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    assert all(map(torch.equal, model.state_dict().values(), narrow_resnet18().state_dict().values()))


def test_the_host_is_timed_on_the_cpu_only():
    with pytest.raises(Unavailable, match=r"bench\.gpu"):
        next(host_time.host_time(Settings(torch.device("cuda"))))


def test_launchers_launch_nothing_and_the_operators_beside_them_are_counted(capsys):
    found = {one.case.split(",")[0]: one for one in host_time.launchers(QUICK)}
    from bench.speed.static import launchers

    assert set(found) == set(launchers())
    found["grad_sq_norm_norm"].measure(torch.device("cpu"), 1, True)
    assert "in  1 operators of torch: grad_sq_norm_norm" in capsys.readouterr().out
    with no_launches() as launched:
        found["masked_batch"].launch()
    assert launched == {"_masked_batch"}


def test_a_launcher_that_launches_nothing_is_refused():
    with pytest.raises(GateFailed, match="calls without a launch"):
        LauncherTime("nothing", lambda: None).measure(torch.device("cpu"), 1, True)
