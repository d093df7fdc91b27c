import numpy as np
import pytest
import torch
from torch.nn import functional

from ddfast.errors import UsageError
from ddfast.methods import get_method
from ddfast.methods.base import Context
from ddfast.methods.selection.base import Batch, Table
from ddfast.methods.selection.judging import judge, teacher_input
from ddfast.models import Teacher, create_model
from ddfast.ops import crop_resize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    model = create_model("convnet3", 3, image_size=16, width=8).eval()
    return Teacher(
        model=model,
        arch="convnet3",
        class_names=["a", "b", "c"],
        image_size=16,
        mean=MEAN,
        std=STD,
        sha256="",
    )


def context(teacher, *, factor=1, forward_batch=128):
    return Context(
        teacher=teacher,
        image_size=16,
        factor=factor,
        seed=0,
        precision="float32",
        forward_batch=forward_batch,
        device=torch.device("cpu"),
    )


def batch(count=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Batch(images, torch.arange(count) % 3, torch.arange(count) * 7919)


def half_side_boxes(count, crops):
    corners = torch.randint(0, 9, (count, crops, 2), generator=torch.Generator().manual_seed(1))
    return torch.cat((corners, corners + 8), dim=-1).int()


def normalised(tiles):
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    return (tiles.float() / 255 - mean) / std


def test_a_small_tile_meets_the_teacher_padded_or_enlarged(teacher):
    images, boxes = batch().images, half_side_boxes(6, 1)[:, 0]
    source, small = torch.arange(6), context(teacher, factor=2)
    tiles = crop_resize(images, boxes, 8)
    padded = teacher_input(images, boxes, source, small, "pad")
    assert torch.equal(padded, functional.pad(normalised(tiles), (4, 4, 4, 4)))
    assert padded.is_contiguous(memory_format=torch.channels_last)
    whole = torch.tensor([0, 0, 8, 8]).expand(6, 4)
    enlarged = teacher_input(images, boxes, source, small, "resize")
    assert torch.equal(enlarged, normalised(crop_resize(tiles, whole, 16)))
    full = teacher_input(images, boxes, source, context(teacher), "resize")
    assert torch.equal(full, normalised(crop_resize(images, boxes, 16)))


def test_a_verdict_is_the_teachers_on_each_crop(teacher):
    some, boxes = batch(), half_side_boxes(6, 4)
    verdict = judge(
        some.images, boxes, some.labels, context(teacher, forward_batch=7), scoring_input="pad", norm="auto"
    )
    tiles = crop_resize(some.images, boxes, 16).flatten(0, 1)
    with torch.no_grad():
        logits = teacher.model(normalised(tiles)).unflatten(0, (6, 4))
    expected = -logits.log_softmax(-1).gather(-1, some.labels[:, None, None].expand(6, 4, 1))[..., 0]
    torch.testing.assert_close(verdict.loss, expected)
    assert torch.equal(verdict.correct, logits.argmax(-1) == some.labels[:, None])
    without = judge(some.images, boxes, some.labels, context(teacher), scoring_input="pad")
    assert without.grad_norm is None
    torch.testing.assert_close(without.loss, expected)


def test_crops_for_which_the_teacher_returns_nan_are_counted(teacher):
    broken = create_model("convnet3", 3, image_size=16, width=8).eval()
    for parameter in broken.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    damaged = Teacher(
        model=broken,
        arch="convnet3",
        class_names=["a", "b", "c"],
        image_size=16,
        mean=MEAN,
        std=STD,
        sha256="",
    )
    some = batch(2)
    boxes = half_side_boxes(2, 2)
    found = judge(some.images, boxes, some.labels, context(damaged), scoring_input="pad")
    assert int(found.damaged) == boxes.shape[:2].numel()
    whole = judge(some.images, boxes, some.labels, context(teacher), scoring_input="pad")
    assert int(whole.damaged) == 0


def test_what_an_image_gets_owes_nothing_to_its_batch(teacher):
    method = get_method("infoutil").from_options({}).resolved(1, 10)
    some = batch()
    whole = method.score(some, context(teacher))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = method.score(Batch(some.images[order], some.labels[order], some.ids[order]), context(teacher))
    assert torch.equal(shuffled.boxes, whole.boxes[order])
    torch.testing.assert_close(shuffled.phi, whole.phi[order])
    torch.testing.assert_close(shuffled.grad_norm, whole.grad_norm[order], rtol=1e-4, atol=1e-6)


def rule_of(factor=1, **options):
    method = get_method("infoutil").from_options(options).resolved(factor, 10)
    return method._crop_rule(context(None, factor=factor))


def test_the_estimator_is_the_measured_one_where_it_was_measured():
    def estimator(**options):
        return get_method("infoutil").from_options(options).resolved(1, 10).options.estimator

    assert (estimator(), estimator(grid=5)) == ("designed", "permutation")
    assert estimator(estimator="paired") == "paired"
    assert get_method("infoutil").from_options({}, "paper").resolved(1, 10).options.estimator == "kernel"


def test_the_window_grows_from_half_the_side_in_whole_cells():
    rule = rule_of()
    assert (rule.pool, rule.crop_size, rule.crops, rule.coverage) == ([2, 3, 4], [8, 12, 16], 5, 0.8)
    assert rule_of(grid=5).pool == [3, 4, 5]
    assert rule_of(grid=5).crop_size == [10, 13, 16]


def test_a_number_is_one_window_of_its_size():
    half = rule_of(factor=2)
    assert (half.pool, half.crop_size, half.crops) == ([2], [8], 5)
    assert (rule_of(crop_frac=0.75).pool, rule_of(crop_frac=0.75).crop_size) == ([3], [12])
    whole = rule_of(crop_frac=1)
    assert (whole.pool, whole.crop_size, whole.crops) == ([4], [16], 1)


def test_a_crop_around_one_cell_has_a_fixed_size():
    rule = rule_of(crop_rule="patch")
    assert (rule.pool, rule.crop_size) == ([1], [8])
    with pytest.raises(UsageError, match="adaptive grows a window, which crop_rule patch has not"):
        rule_of(crop_rule="patch", crop_frac="adaptive")


@pytest.mark.parametrize("attribution", ["shapley", "grad_cam"])
def test_both_attributions_place_crops_of_one_size_an_image(attribution, teacher):
    method = get_method("infoutil").from_options({"attribution": attribution}).resolved(1, 10)
    found = method.score(batch(), context(teacher))
    sides = found.boxes[..., 2:] - found.boxes[..., :2]
    assert (sides == sides[:, :1, :1]).all()
    assert set(sides.flatten().tolist()) <= {8, 12, 16}
    assert (found.boxes >= 0).all()
    assert (found.boxes <= 16).all()
    assert found.phi.shape == (6, 16)


# Three images of one class, a noisy crop (0) and the clean one (1) of each: norms and losses that every rule orders
# differently, and one image whose clean crop is misread.
COLUMNS = {
    "sample_id": np.array([1, 1, 2, 2, 3, 3]),
    "label": np.zeros(6, dtype=np.int64),
    "crop": np.array([0, 1, 0, 1, 0, 1]),
    "score": np.full(6, np.nan),
    "grad_norm": np.array([5.0, 1.0, 2.0, 4.0, 6.0, 3.0]),
    "loss": np.array([0.5, 0.2, 0.1, 0.9, 0.3, 0.6]),
    "correct": np.array([True, True, True, False, True, True]),
}
TABLE = Table(COLUMNS)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # The paper: highest norm in each image, then among the images.
        ({"within": "max_norm", "rank_by": "grad_norm", "order": "high"}, [4, 0, 3]),
        ({"within": "max_norm", "rank_by": "grad_norm", "order": "low"}, [3, 0, 4]),
        # The default at one tile: clean crops, lowest loss.
        ({"within": "clean", "rank_by": "loss", "order": "low"}, [1, 5, 3]),
        ({"within": "min_loss", "rank_by": "loss", "order": "low"}, [2, 1, 4]),
        ({"within": "min_loss", "rank_by": "grad_norm", "order": "high"}, [4, 2, 1]),
        # Image 2 competes with the crop that is read correctly.
        ({"within": "clean", "rank_by": "grad_norm", "order": "high", "correct_only": True}, [5, 2, 1]),
    ],
)
def test_ranks_by_hand(options, expected):
    ranked, _ = get_method("infoutil").from_options(options).rank(TABLE, 3)
    assert ranked[0].tolist() == expected


@pytest.mark.parametrize(
    ("low", "high", "needed", "first"),
    # Clean crops by norm: rows 1, 5, 3.
    [(0, 1, 1, [5]), (0, 1, 2, [1, 3]), (0, 1, 3, [1, 5, 3]), (0.5, 1, 1, [3]), (0.5, 1, 2, [5, 3])],
)
def test_quantiles_spread_over_the_norms(low, high, needed, first):
    options = {
        "within": "clean",
        "rank_by": "quantiles",
        "order": "high",
        "quantile_low": low,
        "quantile_high": high,
    }
    ranked, _ = get_method("infoutil").from_options(options).rank(TABLE, needed)
    assert ranked[0][:needed].tolist() == first
    assert sorted(ranked[0].tolist()) == [1, 3, 5]


def test_the_seed_draws_a_random_rank():
    method = get_method("infoutil").from_options({"within": "clean", "rank_by": "random"}).resolved(1, 10)
    orders = []
    for seed in range(20):
        ranked, score = method.rank(Table(COLUMNS, seed), 3)
        assert sorted(ranked[0].tolist()) == [1, 3, 5]
        assert (np.diff(score[ranked[0]]) > 0).all()
        orders.append(tuple(ranked[0].tolist()))
    assert len(set(orders)) == 6
