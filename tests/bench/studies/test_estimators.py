"""The benchmark of estimators: whole games against single evaluations, and what it writes."""

import csv
from types import SimpleNamespace

import pytest
import torch

from bench.__main__ import main
from bench.studies.estimators import estimators, games
from bench.studies.estimators.estimators import Result, budget_of_agreement, crop
from ddfast.attribution import shapley
from ddfast.models import load_teacher


def masked(image, number):
    cells = (number >> torch.arange(16)) & 1
    side = image.shape[-1] // 4
    return image * cells.view(4, 4).repeat_interleave(side, 0).repeat_interleave(side, 1)


@pytest.mark.parametrize(
    "model",
    [
        # A sum over windows of 2 x 2 cells: completed. The mean through a curve: every coalition evaluated.
        lambda x: torch.nn.functional.avg_pool2d(x.sum(1, keepdim=True), 2, 1).tanh().sum((1, 2, 3))[:, None],
        lambda x: x.mean((1, 2, 3)).exp()[:, None],
    ],
    ids=["windows", "global"],
)
def test_whole_games_hold_every_value(model):
    seen = []

    def counting(x):
        seen.append(len(x))
        return model(x)

    teacher = SimpleNamespace(model=counting, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    image = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = games._table(teacher, image, 0, "float32")
    for number in (0, 1, 77, 4097, 40_000, 65_535):
        expected = model(masked(image.float() / 255, number)[None])[0, 0]
        torch.testing.assert_close(values[number], expected, rtol=0, atol=1e-4)
    assert sum(seen) in (1808 + 256, 1808 + 256 + 65_536)


def test_a_window_takes_1808_evaluations():
    needed, terms = games._window_terms()
    assert len(needed) == 1808
    assert sum(sign for _, sign in terms) == 1


def test_it_writes_tables_and_a_plot(toy_folder, toy_teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimators, "BUDGETS", (17, 48))
    monkeypatch.setattr(estimators, "CONFIDENCES", (0.8,))
    words = ["estimators", "--data", toy_folder, "--teacher", toy_teacher, "--images", 3, "--seeds", 2]
    words += ["--work", tmp_path / "work", "--out", tmp_path / "found"]
    assert main([str(word) for word in words]) == 0
    assert "| 17 |" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "found.csv").open(encoding="utf-8")))
    assert {row["estimator"] for row in rows} == {*estimators.ESTIMATORS, "settled 0.8"}
    assert {(row["estimator"], row["budget"]) for row in rows} >= {("designed", "48"), ("permutation", "17")}
    assert not any(row["estimator"] == "enumerated" and row["budget"] == "17" for row in rows)
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    # The games are kept, and their exact values are those of the engine.
    kept = sorted((tmp_path / "work").glob("*.npy"))
    assert len(kept) == 3
    times = [path.stat().st_mtime_ns for path in kept]
    assert main([str(word) for word in words]) == 0
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_exact_values_are_the_engines(toy_folder, toy_teacher, tmp_path):
    from ddfast.data.loading import load
    from ddfast.data.opening import open_source

    teacher, source = load_teacher(toy_teacher), open_source(toy_folder, "test")
    samples = games.pick(source, 2, skip=1)
    assert len({sample.label for sample in samples}) == 2
    found = games.whole_games(teacher, source, samples, 16, "float32", tmp_path)
    images = torch.stack([image for _, image in load(source, samples, 16, workers=0)])
    labels = torch.tensor([sample.label for sample in samples])
    mean, std = torch.tensor(teacher.mean), torch.tensor(teacher.std)
    phi = shapley(teacher.model, images, labels, n_samples=512, estimator="designed", mean=mean, std=std)
    assert float((phi - found.phi).norm() / found.phi.norm()) < 0.05
    assert torch.equal(crop(phi.double()), crop(found.phi))


def test_the_crop_is_the_best_window_of_four_cells():
    phi = torch.zeros(2, 16)
    phi[0, [5, 6, 9, 10]] = 1.0
    phi[1, 15] = 1.0
    assert crop(phi).tolist() == [4, 8]


def test_a_crop_as_good_as_the_best_loses_nothing():
    exact = torch.zeros(2, 16, dtype=torch.float64)
    exact[:, 0], exact[:, 15] = 1.0, 0.5
    found = exact.clone()
    found[1, 15] = 2.0  # the wrong corner: it holds 0.5 of what the best holds over the worst
    result = estimators._result("designed", 32, 32, found[None], exact)
    assert (result.agreement, result.lost) == (0.5, 0.25)
    assert result.error == pytest.approx((0.0 + 1.5**2 / 1.25) / 2)


def test_the_budget_of_an_agreement_lies_between_those_measured():
    fixed = [Result("designed", n, n, 0.1, 0.1, a, 0.0) for n, a in ((17, 0.6), (32, 0.8), (64, 0.9))]
    assert budget_of_agreement(fixed, 0.5) == 17
    assert budget_of_agreement(fixed, 0.85) == pytest.approx(48)
    assert budget_of_agreement(fixed, 0.95) is None
