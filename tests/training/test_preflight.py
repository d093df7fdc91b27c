import math

import numpy as np
import pytest
import torch

from ddfast.errors import UsageError
from ddfast.training.preflight import (
    chance_hits,
    check_reading,
    drawn_places,
    images_to_try,
    read_images,
    try_teacher,
)


def reading(counts, classes=None):
    """Of a confusion matrix {(label, prediction): images}, or a nested list."""
    if isinstance(counts, list):
        classes = len(counts)
        counts = {(i, j): n for i, row in enumerate(counts) for j, n in enumerate(row)}
    pairs = [pair for pair, n in counts.items() for _ in range(n)]
    order = np.random.default_rng(0).permutation(len(pairs))
    labels, predictions = torch.tensor([pairs[i] for i in order]).T
    return read_images(predictions, labels, classes)


def check(found, classes=10, **options):
    names = [f"c{place}" for place in range(classes)]
    settings = {"role": "teacher", "what": "training image", "top1": None, "quiet": False}
    check_reading(found, names, **{**settings, **options})


def drawn(classes, images_of, accuracy, order, seed=0):
    """A teacher of this accuracy whose outputs stand in `order`: {(label, prediction): images}."""
    draws, counts = np.random.default_rng(seed), {}
    for label, number in images_of.items():
        for _ in range(number):
            right = draws.random() < accuracy
            pair = (label, int(order[label if right else draws.integers(classes)]))
            counts[pair] = counts.get(pair, 0) + 1
    return counts


def test_another_order_is_refused_and_named():
    counts = [[0] * 10 for _ in range(10)]
    for label in range(10):
        counts[label][(label + 1) % 10] = 5
        counts[label][label] = 1
    found = reading(counts)
    assert (found.hits, found.images, found.moved_hits) == (10, 60, 40)
    assert found.moves == {label: (label + 1) % 10 for label in range(10)}
    with pytest.raises(
        UsageError, match=r"reads 10 of 60 .* near chance for 10 classes: it reads 'c0' images"
    ):
        check(found)
    with pytest.raises(UsageError, match=r"7 more classes.*in which 50 would be right.*with class_order"):
        check(found)


def test_two_swapped_classes_of_ten_are_refused():
    counts = [[8 if label == output else 0 for output in range(10)] for label in range(10)]
    counts[3], counts[5] = counts[5], counts[3]
    found = reading(counts)
    assert (found.hits, found.near_chance, found.moves) == (64, False, {3: 5, 5: 3})
    assert found.chance == 0.5**16
    with pytest.raises(
        UsageError, match=r"64 of 80 .* correctly: it reads 'c3' images as 'c5', 'c5' images as"
    ):
        check(found)


@pytest.mark.parametrize("accuracy", [0.5, 0.7, 0.9])
def test_64_images_of_eight_classes_judge_the_order_of_a_thousand(accuracy):
    order = np.random.default_rng(1).permutation(1000)
    places = drawn_places(np.repeat(np.arange(1000), 20), 1000, 64)
    labels, numbers = np.unique(places // 20, return_counts=True)
    assert (len(labels), set(numbers)) == (8, {8})
    found = reading(drawn(1000, dict.fromkeys(labels.tolist(), 8), accuracy, order), 1000)
    with pytest.raises(UsageError, match="stand in another class order"):
        check(found, 1000)
    right = reading(drawn(1000, dict.fromkeys(labels.tolist(), 8), accuracy, np.arange(1000)), 1000)
    assert right.moves == {}
    check(right, 1000)


def test_teachers_in_the_right_order_are_not_taken_for_others():
    for seed in range(100):
        for classes, number, accuracy in ((10, 8, 0.3), (10, 50, 0.25), (3, 12, 0.6), (100, 5, 0.2)):
            counts = drawn(classes, dict.fromkeys(range(classes), number), accuracy, np.arange(classes), seed)
            found = reading(counts, classes)
            assert found.moves == {}, (seed, classes, counts)


def test_one_output_for_every_image_is_chance_whatever_class_it_is():
    """Of few classes, it hits as often as its class is there: far more often than guessing among all."""
    found = reading({(label, 3): 8 for label in range(8)}, 1000)
    assert found.hits == 8 > chance_hits(64, 1000)
    assert found.near_chance
    with pytest.raises(
        UsageError, match=r"8 of 64 .* near chance for 1000 classes: its class order or normal"
    ):
        check(found, 1000)


def test_the_hits_that_chance_reaches_are_those_of_shuffled_predictions():
    """Mean and 2.33 deviations against 20,000 shuffles."""
    from ddfast.training.preflight import _hits_of_the_unrelated

    draws = np.random.default_rng(0)
    labels = draws.choice(5, 200, p=[0.4, 0.3, 0.1, 0.1, 0.1])
    predictions = draws.choice(5, 200, p=[0.1, 0.5, 0.2, 0.2, 0.0])
    hits = np.array([(draws.permutation(predictions) == labels).sum() for _ in range(20_000)])
    found = _hits_of_the_unrelated(list(zip(labels.tolist(), predictions.tolist(), strict=True)))
    assert found == pytest.approx(hits.mean() + 2.33 * hits.std(), abs=0.3)


def test_chance_hits_is_the_binomial_quantile():
    # scipy.stats.binom.ppf(0.99, 64, p) for p = 1/2, 1/10, 1/1000
    assert [chance_hits(64, classes) for classes in (2, 10, 1000)] == [41, 12, 1]


def said(capsys, counts, **options):
    check(reading(counts, 10), **options)
    return capsys.readouterr().err.splitlines()


def test_the_hit_rate_is_always_said_and_a_poor_one_warned_of(capsys):
    good = {(label, label): 57 for label in range(10)} | {(label, (label + 3) % 10): 7 for label in range(10)}
    assert said(capsys, good) == ["teacher reads 570 of 640 training images (89%)"]
    poor = {(label, (label + shift) % 10): 8 + 4 * (not shift) for label in range(10) for shift in range(10)}
    first, second = said(capsys, poor, role="label teacher", what="test image")
    assert first == "label teacher reads 120 of 840 test images (14%)"
    assert second.startswith("warning: that is poor for 10 classes: check the label teacher's class order")
    _, short = said(capsys, good, top1=97.0)
    assert short.startswith("warning: its file says 97%: check")
    assert said(capsys, good, top1=89.0) == ["teacher reads 570 of 640 training images (89%)"]
    assert said(capsys, poor, quiet=True) == []


def test_a_suspicion_is_a_warning_that_names_the_classes(capsys):
    counts = {(label, label): 50 for label in range(2, 10)}
    counts |= {(0, 0): 18, (0, 1): 32, (1, 1): 18, (1, 0): 32}
    _, warning = said(capsys, counts)
    assert "it mostly reads 'c0' images as 'c1', 'c1' images as 'c0'" in warning


def test_images_are_drawn_of_every_class_where_they_can():
    labels = np.repeat(np.arange(10), 100)
    places = drawn_places(labels, 10, 512)
    assert set(np.bincount(labels[places]).tolist()) <= {51, 52}
    assert len(set(places.tolist())) == len(places) == 512
    assert (np.diff(places) > 0).all()
    shuffled = np.random.default_rng(0).permutation(labels)
    assert np.bincount(shuffled[drawn_places(shuffled, 10, 512)]).min() >= 51
    assert drawn_places(np.array([2, 0, 2]), 3, 64).tolist() == [0, 1, 2]  # a class without images
    assert len(drawn_places(np.empty(0, dtype=np.int64), 3, 64)) == 0
    assert [images_to_try(size, torch.device("cpu")) for size in (16, 64, 128, 224, 1024)] == [
        *(512, 512, 256, 83, 64)
    ]


def test_each_class_has_its_share_to_the_last():
    for classes in (3, 7, 10, 60):
        labels = np.repeat(np.arange(classes), 500)
        numbers = np.bincount(labels[drawn_places(labels, classes, 512)], minlength=classes)
        assert numbers.sum() == 512
        assert (numbers > 0).all()
        assert numbers.max() <= math.ceil(512 / classes)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: {"logits": x.new_zeros(len(x), 3)}, "returns a dict, wanted logits, a tensor [B, 3]"),
        (lambda x: (x.new_zeros(len(x), 3), None), "returns a tuple, wanted logits"),
        (lambda x: x.new_zeros(len(x), 4), "returns float32 [2, 4], wanted logits of its 3 classes"),
        (lambda x: x.new_zeros(len(x), 3, 1, 1), "returns float32 [2, 3, 1, 1], wanted logits"),
        (lambda x: x.new_zeros(len(x), 3).long(), "returns int64 [2, 3], wanted logits"),
        (lambda x: x.new_full((len(x), 3), math.inf), "returns NaN or infinity"),
    ],
)
def test_what_is_no_logits_is_one_line(model, message):
    class Given(torch.nn.Module):
        def forward(self, x):
            return model(x)

    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(UsageError) as caught:
        try_teacher(Given(), images, [0.5] * 3, [0.5] * 3, 3, torch.device("cpu"))
    assert message in str(caught.value)
