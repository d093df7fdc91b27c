"""DD-Ranking's scores on accuracies worked out by hand, and the students behind them."""

import csv
import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from ddfast.errors import UsageError
from ddfast.training import DistilledImages, evaluate
from ddfast.training.dd_ranking import (
    RECIPES,
    Accuracies,
    augmentation_robust_score,
    label_robust_score,
    measure_accuracies,
    normalized,
    write_scores,
)
from ddfast.training.protocol import PROTOCOLS
from tests.training.conftest import CLASSES

ACCURACIES = Accuracies(
    full_hard=80.0,
    distilled={"hard": [40.0, 30.0], "soft": [60.0, 50.0], "plain": [45.0, 47.0]},
    random={"hard": [35.0, 30.0], "soft": [50.0, 52.0], "plain": [25.0, 37.0]},
)


def test_a_score_is_zero_at_worst_and_one_at_best():
    assert normalized(-1) == 0
    assert normalized(1) == 1
    assert normalized(0) == pytest.approx(1 / (1 + math.e))  # (1 - 1/e) / (e - 1/e)


def test_the_label_robust_score_by_hand():
    score = label_robust_score(80, [40, 30], [60, 50], [50, 52])
    assert score.hard_label_recovery == [40, 50]
    assert score.improvement_over_random == [10, -2]
    # a = (10 - 40) / 200 = -0.15 and (-2 - 50) / 200 = -0.26
    expected = [(math.exp(a) - math.exp(-1)) / (math.e - math.exp(-1)) for a in (-0.15, -0.26)]
    assert score.lrs == pytest.approx(expected)
    assert score.lrs[0] == pytest.approx(0.2096783674)
    told = score.as_dict()
    assert told["hard_label_recovery_mean"] == 45
    assert told["hard_label_recovery_std"] == 5  # of a whole population
    assert told["improvement_over_random_mean"] == 4
    assert told["label_robust_score_mean"] == pytest.approx(sum(expected) / 2)


def test_the_weight_moves_the_score_between_its_parts():
    assert label_robust_score(80, [40], [60], [50], weight=1).lrs == pytest.approx([normalized(0.1)])
    assert label_robust_score(80, [40], [60], [50], weight=0).lrs == pytest.approx([normalized(-0.4)])
    assert label_robust_score(100, [100], [100], [0], weight=1).lrs == [1.0]
    assert label_robust_score(100, [0], [0], [0], weight=0).lrs == [0.0]


def test_the_augmentation_robust_score_by_hand():
    score = augmentation_robust_score([60, 50], [50, 52], [45, 47], [25, 37])
    assert score.with_augmentation == [10, -2]
    assert score.without_augmentation == [20, 10]
    assert score.ars == pytest.approx([normalized(0.15), normalized(0.04)])
    assert score.ars[0] == pytest.approx(0.3377952668)
    assert score.as_dict()["augmentation_robust_score_mean"] == pytest.approx(sum(score.ars) / 2)
    weighted = augmentation_robust_score([60], [50], [45], [25], weight=0.25)
    assert weighted.ars == pytest.approx([normalized(0.175)])


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"percents in \[0, 100\], got 101"):
        label_robust_score(101, [40], [60], [50])
    with pytest.raises(ValueError, match=r"the same runs of every kind, at least one, got \[2, 1, 1\]"):
        label_robust_score(80, [40, 30], [60], [50])
    with pytest.raises(ValueError, match="at least one"):
        augmentation_robust_score([], [], [], [])
    with pytest.raises(ValueError, match=r"weight must be in \[0, 1\], got 2"):
        augmentation_robust_score([60], [50], [45], [25], weight=2)


def test_a_method_with_hard_labels_is_compared_with_hard_labels():
    assert ACCURACIES.label_robust("hard").improvement_over_random == [5, 0]
    assert ACCURACIES.label_robust("soft").improvement_over_random == [10, -2]
    assert ACCURACIES.label_robust("hard").hard_label_recovery == [40, 50]


def test_scores_are_written_as_dd_ranking_writes_them(tmp_path):
    write_scores(tmp_path / "scores", ACCURACIES)
    rows = list(csv.DictReader((tmp_path / "scores" / "obj_scores.csv").open()))
    assert [list(row) for row in rows] == [["hard_label_recovery", "improvement_over_random", "lrs"]] * 2
    assert [float(row["lrs"]) for row in rows] == ACCURACIES.label_robust().lrs
    rows = list(csv.DictReader((tmp_path / "scores" / "aug_scores.csv").open()))
    assert [list(row) for row in rows] == [["with_aug_scores", "without_aug_scores", "ars_list"]] * 2
    assert [float(row["ars_list"]) for row in rows] == ACCURACIES.augmentation_robust().ars
    told = json.loads(json.dumps(ACCURACIES.as_dict()))
    assert told["soft"]["label_robust_score_std"] > 0
    assert set(told["augmentation"]) == {
        f"{name}_{statistic}"
        for name in ("with_aug_scores", "without_aug_scores", "augmentation_robust_score")
        for statistic in ("mean", "std")
    }


def test_the_plain_protocol_is_rded_s_but_for_its_augmentation():
    plain, rded = asdict(PROTOCOLS["rded_plain"]), asdict(PROTOCOLS["rded"])
    assert {key for key in rded if plain[key] != rded[key]} == {"name", "geometry", "mix"}
    assert (plain["geometry"], plain["colour"], plain["mix"]) == ("none", "none", "none")
    for ipc, classes, size in ((1, 10, 32), (10, 100, 32), (10, 200, 64), (50, 1000, 64)):
        of = [
            (
                PROTOCOLS[name].batch_size_for(ipc, classes, size, "convnet3", "convnet3"),
                PROTOCOLS[name].lr_for("convnet3", "convnet3", classes, size),
            )
            for name in ("rded", "rded_plain")
        ]
        assert of[0] == of[1]


def distilled(images, seed):
    draws = torch.Generator().manual_seed(seed)
    places = torch.cat([label * 60 + torch.randperm(60, generator=draws)[:4] for label in range(3)])
    soft = torch.nn.functional.one_hot(images.labels[places], 3).float()[:, None]
    return DistilledImages(
        images.images[places], images.labels[places], CLASSES, (0.5,) * 3, (0.25,) * 3, soft_labels=soft
    )


def test_students_are_those_of_evaluate(toy_train, toy_test):
    ours, theirs = distilled(toy_train, 0), [distilled(toy_train, 1), distilled(toy_train, 2)]
    settings = {"arch": "convnet3", "arch_options": {"width": 4}, "epochs": 2, "quiet": True}
    found = measure_accuracies(ours, theirs, toy_test, full_accuracy=97.0, seeds=[3, 4, 5], **settings)
    assert found.full_hard == 97.0
    assert set(found.distilled) == set(found.random) == set(RECIPES)
    expected = evaluate(ours, toy_test, protocol="dc", seeds=[3, 4, 5], **settings)
    assert found.distilled["hard"] == expected.top1
    for run, seed in enumerate((3, 4, 5)):  # the third run takes the first set again
        expected = evaluate(theirs[run % 2], toy_test, protocol="rded_plain", seeds=[seed], **settings)
        assert found.random["plain"][run] == expected.mean
    assert found.label_robust().hard_label_recovery == [97 - value for value in found.distilled["hard"]]


def test_no_random_images_is_an_error(toy_train, toy_test):
    with pytest.raises(UsageError, match="give at least one"):
        measure_accuracies(distilled(toy_train, 0), [], toy_test, arch="convnet3", full_accuracy=90.0)


def test_sets_that_decode_to_more_images_take_no_more_steps(toy_train, toy_test, monkeypatch):
    from ddfast.training import dd_ranking

    whole = distilled(toy_train, 1)
    tiled = replace(
        whole, images=whole.images.float() / 128 - 1, factor=2, soft_labels=whole.soft_labels.repeat(1, 4, 1)
    )
    asked = {}

    def counted(images, data, *, protocol, epochs, batch_size, **settings):
        asked[protocol, "tiles" if images.is_float else "whole"] = epochs, batch_size
        return evaluate(images, data, protocol=protocol, epochs=1, batch_size=batch_size, **settings)

    monkeypatch.setattr(dd_ranking, "evaluate", counted)
    settings = {"arch": "convnet3", "arch_options": {"width": 4}, "quiet": True, "full_accuracy": 97.0}
    measure_accuracies([tiled], [whole], toy_test, seeds=1, epochs=360, **settings)
    seen = {
        (recipe, kind): (epochs + (recipe == "dc")) * -(-(48 if kind == "tiles" else 12) // batch)
        for (recipe, kind), (epochs, batch) in asked.items()
    }
    # DC's 361 passes of one batch are lowered to 10 x 36; RDED's 360 of two to 6 x 110.
    assert [seen["dc", kind] for kind in ("whole", "tiles")] == [360, 360]
    assert [seen[recipe, kind] for recipe in ("rded", "rded_plain") for kind in ("whole", "tiles")] == [
        660
    ] * 4
    with pytest.raises(UsageError, match="give at least one folder of it"):
        measure_accuracies([], [whole], toy_test, seeds=1, **settings)
