import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddfast.errors import UsageError
from ddfast.models import Teacher, create_model, fusing, list_models
from ddfast.seeding import derived_seed, generator, seeded
from ddfast.training import PROTOCOLS, DistilledImages, ImageSet, differentiable, train_student
from ddfast.training.augmentation import normalize
from ddfast.training.mixing import StudentAugmentation, _autoaugment, mixed_soft_labels, tile_coverage
from ddfast.training.student import count_batches_twice, distillation_loss
from tests.training.conftest import CLASSES, SIZE, render

RDED = PROTOCOLS["rded"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


def distilled(count=10, **changes):
    images = render(count, seed=7)
    hard = F.one_hot(images.labels, 3).float() * 0.94 + 0.02
    settings = {"soft_labels": hard[:, None], "temperature": 4.0, **changes}
    return DistilledImages(images.images, images.labels, CLASSES, MEAN, STD, **settings)


def a_teacher(seed=0):
    torch.manual_seed(seed)
    model = create_model("convnet3", 3, SIZE).eval()
    return Teacher(model, "convnet3", CLASSES, SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "")


def test_loss_is_the_batch_mean_of_kl_at_temperature_without_its_square():
    logits = torch.tensor([[2.0, 0.0, -2.0], [0.0, 4.0, 0.0]])
    targets = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
    expected = 0.0
    for row, target in zip(logits.double() / 20, targets.double(), strict=True):
        log_student = row - torch.log(torch.exp(row).sum())
        expected += sum(
            float(p * (torch.log(p) - q)) for p, q in zip(target, log_student, strict=True) if p > 0
        )
    assert float(distillation_loss(logits, targets, 20.0)) == pytest.approx(expected / 2, rel=1e-5)


def test_one_forward_pass_moves_batch_statistics_as_two_would():
    torch.manual_seed(0)
    twice = create_model("convnet3", 3, SIZE, width=8).train()
    once = copy.deepcopy(twice)
    count_batches_twice(once)
    for step in range(3):
        images = torch.randn(5, 3, SIZE, SIZE, generator=generator(step)) + step
        twice(images)
        twice(images)
        once(images)
    for name, value in twice.named_buffers():
        if "running" in name:
            torch.testing.assert_close(once.get_buffer(name), value, atol=1e-6, rtol=1e-5)
            assert float(value.abs().max()) > 0


def test_coverage_is_the_area_of_each_tile_in_the_box():
    tiles = torch.tensor([[[0, 1], [2, 3]], [[3, 2], [1, 0]], [[1, 0], [3, 2]]])
    boxes = torch.tensor([[0, 0, 8, 8], [2, 1, 6, 7], [5, 0, 8, 3]], dtype=torch.int32)
    expected = torch.tensor(
        [
            [0.25, 0.25, 0.25, 0.25],
            [0.25, 0.25, 0.25, 0.25],  # symmetric about the middle
            [1.0, 0.0, 0.0, 0.0],  # inside the upper right place, where tile 0 stands
        ]
    )
    assert torch.equal(tile_coverage(boxes, tiles, 8), expected)
    lopsided = tile_coverage(torch.tensor([[1, 2, 7, 7]], dtype=torch.int32), tiles[1:2], 8)
    # 6 x 5 pixels: columns 3 + 3, rows 2 + 3. Places: 6 (tile 3), 6 (tile 2), 9 (tile 1), 9 (tile 0).
    torch.testing.assert_close(lopsided, torch.tensor([[9.0, 9.0, 6.0, 6.0]]) / 30)


@pytest.mark.parametrize("factor", [2, 3])
def test_coverage_agrees_with_counting_pixels(factor):
    size = 12
    draws = torch.Generator().manual_seed(0)
    tiles = torch.stack([torch.randperm(factor**2, generator=draws) for _ in range(50)]).view(
        50, factor, factor
    )
    low = torch.randint(0, 11, (50, 2), generator=draws)
    high = low + 1 + (torch.rand(50, 2, generator=draws) * (size - low)).long().clamp(max=size - 1)
    boxes = torch.cat([low, high.clamp(max=size)], dim=1).int()
    coverage = tile_coverage(boxes, tiles, size)
    for row, (x0, y0, x1, y1), arrangement in zip(coverage, boxes.tolist(), tiles, strict=True):
        owner = arrangement.repeat_interleave(size // factor, 0).repeat_interleave(size // factor, 1)
        counted = torch.bincount(owner[y0:y1, x0:x1].flatten(), minlength=factor**2)
        torch.testing.assert_close(row, counted / counted.sum())


def test_stored_labels_are_mixed_by_area():
    tile_labels = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.4], [0.2, 0.8]]])
    coverage = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    partner = torch.tensor([1, 1])
    mixed = mixed_soft_labels(tile_labels, coverage, partner, 0.3)
    # Image 0: (.75, .25); image 1: (.4, .6). 0.7 of the first and 0.3 of its partner.
    torch.testing.assert_close(mixed, torch.tensor([[0.645, 0.355], [0.4, 0.6]]))


def test_augmentation_mirrors_normalises_and_then_cuts_and_pastes():
    data = distilled()
    batch = StudentAugmentation(data, RDED, seed=3, autoaugment=False, device=CPU)(torch.arange(30))
    draws = generator(3, "augmentation")
    torch.rand(30, 1, generator=draws)  # the order of one strip of columns, and of one of rows
    torch.rand(30, 1, generator=draws)
    flips = torch.rand(30, generator=draws) < 0.5
    partner = torch.randperm(30, generator=draws)
    top, left, bottom, right = RDED.cutmix_box(SIZE, np.random.default_rng(derived_seed(3, "cutmix")))
    assert (bottom - top) * (right - left) > 0
    for place in range(30):
        image, other = (
            normalize(data.images[[i]].flip(-1) if flips[i] else data.images[[i]], MEAN, STD)[0]
            for i in (place, int(partner[place]))
        )
        expected = image.clone()
        expected[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        assert torch.equal(batch.inputs[place], expected)
    assert batch.share == (bottom - top) * (right - left) / SIZE**2
    assert torch.equal(batch.partner, partner)
    assert torch.equal(batch.coverage, torch.ones(30, 1))


def test_factor_two_crops_shuffled_tiles():
    """Tiles of one colour each: the mean colour of the crop is the coverage's mixture, up to the resize."""
    colours = torch.tensor([0, 60, 120, 240], dtype=torch.uint8)
    tile = colours.view(2, 2).repeat_interleave(16, 0).repeat_interleave(16, 1)
    images = tile.expand(40, 3, 32, 32).contiguous()
    soft = torch.eye(4)[None].expand(40, 4, 4)
    data = DistilledImages(
        images, torch.arange(40) % 4, list("abcd"), (0, 0, 0), (1, 1, 1), factor=2, soft_labels=soft
    )
    augmentation = StudentAugmentation(
        data, replace(RDED, mix_alpha=1e-6), seed=0, autoaugment=False, device=CPU
    )
    batches = [augmentation(torch.arange(40)) for _ in range(4)]
    checked = 0
    for batch in batches:
        if batch.share:
            continue
        seen = batch.inputs.mean(dim=(1, 2, 3)) * 255
        torch.testing.assert_close(seen, batch.coverage @ colours.float(), atol=3.0, rtol=0)
        torch.testing.assert_close(batch.coverage.sum(dim=1), torch.ones(40))
        assert len(batch.coverage.unique(dim=0)) > 10
        checked += 1
    assert checked


def test_autoaugment_changes_pixels_before_the_rest():
    data = distilled()
    plain, augmented = (
        StudentAugmentation(data, RDED, seed=3, autoaugment=flag, device=CPU) for flag in (False, True)
    )
    torch.manual_seed(0)
    first, second = plain(torch.arange(30)), augmented(torch.arange(30))
    assert torch.equal(first.partner, second.partner)
    assert first.share == second.share
    different = (first.inputs != second.inputs).flatten(1).any(dim=1)
    assert int(different.sum()) > 10
    assert second.inputs.shape == first.inputs.shape


@pytest.mark.parametrize(("size", "policy"), [(32, "cifar10"), (64, "imagenet"), (224, "imagenet")])
def test_autoaugments_policy_by_size(size, policy):
    assert _autoaugment(size).policy.value == policy


# What happens to a batch, in order, in the words of `ddfast.training.student`; by hand from each reference.
ORDER = {
    "rded": ["shuffle_patches", "resize_boxes", "random_flip", "normalize", "cutmix_box"],
    "rded_plain": ["normalize"],
    "dc": ["normalize"],
    "dsa": ["normalize", "dsa"],
    "idc": ["normalize", "idc", "cutmix_box"],
    "sre2l": ["random_crop_flip", "normalize", "lerp"],
    "sre2l_tiny": ["resize_boxes", "random_flip", "normalize"],
    "igds": ["resize_boxes", "random_flip", "normalize", "cutmix_box"],
}
ORDER |= {f"{name}_no_flip": ORDER[name] for name in ("dsa", "idc")}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_order_of_augmentation(name, monkeypatch):
    from ddfast.training import mixing as module

    calls = []

    def recorded(owner, attribute):
        original = getattr(owner, attribute)

        def call(*args, **kwargs):
            calls.append(attribute)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, call)

    steps = ("shuffle_patches", "resize_boxes", "random_crop_flip", "random_flip", "normalize", "dsa", "idc")
    for step in steps:
        recorded(module, step)
    recorded(type(RDED), "cutmix_box")
    recorded(torch, "lerp")
    rules = replace(PROTOCOLS[name], mix_probability=1.0)
    data = distilled(factor=2, soft_labels=None)
    StudentAugmentation(data, rules, seed=0, autoaugment=False, device=CPU)(torch.arange(8))
    assert calls == ORDER[name]


@pytest.mark.parametrize(
    ("name", "scale"), [("rded", (0.5, 1.0)), ("igds", (0.5, 1.0)), ("sre2l_tiny", (0.08, 1.0))]
)
def test_scale_of_the_random_crops(name, scale, monkeypatch):
    from ddfast.training import mixing as module

    seen = []
    original = module.random_resized_boxes
    monkeypatch.setattr(
        module,
        "random_resized_boxes",
        lambda *args, **kwargs: seen.append(kwargs["scale"]) or original(*args, **kwargs),
    )
    data = distilled(factor=2, soft_labels=None)
    StudentAugmentation(data, PROTOCOLS[name], seed=0, autoaugment=False, device=CPU)(torch.arange(8))
    assert seen == [scale]


@pytest.mark.parametrize(
    ("name", "mirrors"), [("dsa", 1), ("idc", 40), ("dsa_no_flip", 0), ("idc_no_flip", 0)]
)
def test_digits_are_not_mirrored(name, mirrors, monkeypatch):
    drawn = []
    original = differentiable.draw
    monkeypatch.setattr(
        differentiable,
        "draw",
        lambda operation, *given: drawn.append(operation) or original(operation, *given),
    )
    data = distilled(factor=2, soft_labels=None)
    augment = StudentAugmentation(data, PROTOCOLS[name], seed=0, autoaugment=False, device=CPU)
    for _ in range(40):
        augment(torch.arange(8))
    assert mirrors <= drawn.count("flip") <= 40 * mirrors


# Temperature of the loss, and what its mean over the batch is multiplied by. Hard labels: the cross-entropy.
REDUCTION = {
    "rded": (20.0, 1.0),
    "rded_plain": (20.0, 1.0),
    "dc": (1.0, 1.0),
    "dsa": (1.0, 1.0),
    "idc": (1.0, 1.0),
    "sre2l": (30.0, 1.0),
    "sre2l_tiny": (20.0, 400.0),
    "igds": (1.0, 1.0),
    "dsa_no_flip": (1.0, 1.0),
    "idc_no_flip": (1.0, 1.0),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_loss_of_a_step_by_hand(name, toy_test, monkeypatch):
    from ddfast.training import student as module

    seen = []
    original = module.distillation_loss

    def record(logits, targets, temperature):
        seen.append((logits.detach().double(), targets.double(), temperature))
        return original(logits, targets, temperature)

    monkeypatch.setattr(module, "distillation_loss", record)
    rules = replace(PROTOCOLS[name], passes_after=0)
    teacher = None if rules.labels == "hard" else a_teacher()
    result = train_student(
        distilled(soft_labels=None),
        toy_test,
        arch="convnet3",
        arch_options={"width": 8},
        teacher=teacher,
        protocol=rules,
        epochs=1,
        batch_size=30,
        quiet=True,
    )
    ((logits, targets, temperature),) = seen
    wanted, factor = REDUCTION[name]
    assert temperature == wanted
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(30, dtype=torch.float64), atol=1e-5, rtol=0)
    scaled = logits / wanted
    log_student = scaled - torch.log(torch.exp(scaled).sum(dim=1, keepdim=True))
    cross_entropy = -(targets * log_student).sum() / 30  # over classes and images, then the images' mean
    entropy = -(targets * torch.log(targets.clamp(min=1e-30))).sum() / 30
    # In float32 a difference of numbers of the size of one: their last digit, times the factor, is noise.
    noise = max(1e-6, factor * torch.finfo(torch.float32).eps)
    assert result.final_loss == pytest.approx(factor * float(cross_entropy - entropy), rel=1e-4, abs=noise)


def test_a_student_learns_the_toy_set_from_stored_labels(toy_test):
    result = train_student(distilled(), toy_test, arch="convnet3", epochs=30, batch_size=10, quiet=True)
    assert result.top1 > 75  # chance is 33
    assert result.curve == {29: result.top1}
    assert result.best == result.top1
    assert len(result.per_class) == 3
    assert np.mean(result.per_class) == pytest.approx(result.top1)
    assert not result.model.training


def test_a_seed_fixes_a_student_and_the_global_generators_do_not_matter(toy_test):
    def run(seed, **options):
        return train_student(
            distilled(), toy_test, arch="convnet3", epochs=3, batch_size=7, seed=seed, quiet=True, **options
        )

    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    first = run(0, autoaugment=True)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    state = torch.random.get_rng_state()
    second = run(0, autoaugment=True)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first.final_loss == second.final_loss
    for one, two in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)
    other = run(1, autoaugment=True)
    assert other.final_loss != first.final_loss
    assert run(0).final_loss != first.final_loss


def test_a_student_with_instance_norm_trains_fused_and_comes_back_plain(toy_test, monkeypatch):
    settings = {
        "arch": "convnet3_in",
        "arch_options": {"width": 8},
        "epochs": 2,
        "device": "cpu",
        "quiet": True,
    }
    calls, original = [], fusing.convnet_block
    monkeypatch.setattr(fusing, "convnet_block", lambda *given: calls.append(1) or original(*given))
    fused = train_student(distilled(), toy_test, **settings)
    assert calls
    assert type(fused.model.blocks) is torch.nn.Sequential
    monkeypatch.setattr("ddfast.training.fitting.fuse", lambda model: model)
    plain = train_student(distilled(), toy_test, **settings)
    assert fused.final_loss == pytest.approx(plain.final_loss, rel=1e-3)


def test_a_step_lowers_the_loss_on_its_batch(toy_test):
    data = distilled()
    losses = [
        train_student(data, toy_test, arch="convnet3", epochs=epochs, batch_size=30, quiet=True).final_loss
        for epochs in (1, 12)
    ]
    assert losses[1] < 0.7 * losses[0]


def test_a_teacher_labels_the_mixed_batch_at_temperature_20(toy_test, monkeypatch):
    """One epoch, one batch: the loss is RDED's, from the same images, with both networks in their own
    mode."""
    from ddfast.training import student as module

    seen = []
    original = module.distillation_loss

    def record(logits, targets, temperature):
        seen.append((targets, temperature))
        return original(logits, targets, temperature)

    monkeypatch.setattr(module, "distillation_loss", record)
    teacher = a_teacher()
    data = distilled(soft_labels=None)
    train_student(
        data, toy_test, arch="convnet3", teacher=teacher, epochs=1, batch_size=30, seed=5, quiet=True
    )
    own = data.normalized_like(teacher)
    batch = StudentAugmentation(own, RDED, seed=5, autoaugment=False, device=CPU)(
        torch.randperm(30, generator=generator(5, "order", 0))
    )
    ((targets, temperature),) = seen
    assert temperature == 20.0
    with torch.no_grad():
        expected = F.softmax(teacher.model(batch.inputs) / 20, dim=1)
    torch.testing.assert_close(targets, expected)
    assert not targets.requires_grad


def test_a_last_batch_of_one_image_is_left_out(toy_test):
    data = distilled()
    short = replace(data, images=data.images[:11], labels=data.labels[:11], soft_labels=data.soft_labels[:11])
    result = train_student(short, toy_test, arch="resnet18", epochs=1, batch_size=10, quiet=True)
    assert np.isfinite(result.final_loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"soft_labels": None}, "holds no soft labels: give a teacher"),
        ({"labels": torch.full((30,), 3)}, r"labels must lie in 0..2, got 3..3"),
        ({"labels": torch.zeros(29, dtype=torch.long)}, "one label for each distilled image, got 30 and 29"),
        ({"images": torch.zeros(30, 3, 16, 16, dtype=torch.float64)}, "must be uint8"),
        ({"images": torch.full((30, 3, 16, 16), float("nan"))}, "images hold NaN or infinity"),
        ({"images": torch.zeros(30, 1, 16, 16, dtype=torch.uint8)}, "must be uint8"),
        ({"factor": 3}, "factor must divide the image size 16, got 3"),
        ({"factor": 2}, r"soft labels must be \[30, 4, 3\], got \[30, 1, 3\]"),
        ({"soft_labels": torch.full((30, 1, 3), float("nan"))}, "NaN or infinity"),
    ],
)
def test_what_does_not_fit_is_refused(toy_test, changes, message):
    with pytest.raises(UsageError, match=message):
        train_student(replace(distilled(), **changes), toy_test, arch="convnet3", epochs=1, quiet=True)


def test_a_teacher_of_other_classes_or_size_is_refused(toy_test):
    turned = replace(a_teacher(), class_names=CLASSES[::-1])
    with pytest.raises(UsageError, match="stand in another order"):
        train_student(distilled(), toy_test, arch="convnet3", teacher=turned, epochs=1, quiet=True)
    large = replace(a_teacher(), image_size=32)
    with pytest.raises(UsageError, match="reads 32 px, the distilled images have 16 px"):
        train_student(distilled(), toy_test, arch="convnet3", teacher=large, epochs=1, quiet=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "convnet4x"}, "unknown model"),
        ({"arch": "convnet5"}, "multiple of 32, got 16"),
        ({"arch": "convnet3", "protocol": "nope"}, "unknown protocol 'nope'; known: rded"),
        ({"arch": "convnet3", "epochs": 0}, "epochs must be at least 1, got 0"),
        ({"arch": "convnet3", "device": "gpu"}, "unknown device 'gpu'"),
    ],
)
def test_bad_options_are_usage_errors(toy_test, options, message):
    with pytest.raises(UsageError, match=message):
        train_student(distilled(), toy_test, quiet=True, **options)


SMALLEST = {"alexnet": 64, "convnet6": 64, "convnet6_in": 64}


@pytest.mark.parametrize("name", list_models())
def test_every_student_trains_one_step_and_is_tested(name):
    size = SMALLEST.get(name, 32)
    draws = generator(0, "images")
    images = torch.randint(256, (2, 3, size, size), generator=draws, dtype=torch.uint8)
    labels = torch.tensor([0, 1])
    soft = torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]])
    data = DistilledImages(images, labels, ["a", "b"], MEAN, STD, soft_labels=soft)
    options = {"width": 8} if name.startswith("convnet") else {}
    with seeded(0, "weights"):
        before = create_model(name, 2, size, **options).state_dict()
    result = train_student(
        data, ImageSet(images, labels), arch=name, arch_options=options, epochs=1, quiet=True
    )
    after = result.model.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert np.isfinite(result.final_loss)
    assert result.top1 in (0.0, 50.0, 100.0)


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "rded"])
@pytest.mark.parametrize("factor", [1, 2])
def test_every_protocol_trains_a_student(toy_test, name, factor):
    soft = F.one_hot(render(10, seed=7).labels, 3).float()[:, None].expand(-1, factor**2, -1)
    result = train_student(
        distilled(soft_labels=soft, factor=factor),
        toy_test,
        arch="convnet3",
        arch_options={"width": 8},
        protocol=name,
        epochs=4,
        quiet=True,
    )
    assert np.isfinite(result.final_loss)
    assert max(result.curve) == 3 + PROTOCOLS[name].passes_after
    assert result.top5 == 100.0  # of three classes


def test_hard_labels_mix_like_the_images(toy_test, monkeypatch):
    from ddfast.training import student as module

    seen = []
    original = module.distillation_loss

    def record(logits, targets, temperature):
        seen.append((targets, temperature))
        return original(logits, targets, temperature)

    monkeypatch.setattr(module, "distillation_loss", record)
    rules = replace(PROTOCOLS["igds"], geometry="none")
    data = distilled(soft_labels=None)
    train_student(
        data, toy_test, arch="convnet3", protocol=rules, epochs=1, batch_size=30, seed=5, quiet=True
    )
    order = torch.randperm(30, generator=generator(5, "order", 0))
    batch = StudentAugmentation(data, rules, seed=5, autoaugment=False, device=CPU)(order)
    labels = data.labels[order]
    expected = torch.zeros(30, 3)
    for place in range(30):
        expected[place, labels[place]] += 1 - batch.share
        expected[place, labels[batch.partner[place]]] += batch.share
    ((targets, temperature),) = seen
    assert temperature == 1.0
    torch.testing.assert_close(targets, expected)


def test_a_loss_is_scaled_by_the_squared_temperature_where_the_protocol_says_so(toy_test):
    plain = replace(PROTOCOLS["sre2l_tiny"], scale_by_temperature=False)
    data = distilled(temperature=4.0)
    first, second = (
        train_student(
            data, toy_test, arch="convnet3", protocol=rules, epochs=1, batch_size=30, quiet=True
        ).final_loss
        for rules in (plain, PROTOCOLS["sre2l_tiny"])
    )
    assert second == pytest.approx(16 * first, rel=1e-5)


def test_mixup_blends_whole_images():
    rules = replace(PROTOCOLS["sre2l"], geometry="none")
    data = distilled()
    batch = StudentAugmentation(data, rules, seed=3, autoaugment=False, device=CPU)(torch.arange(30))
    plain = normalize(data.images, MEAN, STD)
    expected = (1 - batch.share) * plain + batch.share * plain[batch.partner]
    assert 0 < batch.share < 1
    torch.testing.assert_close(batch.inputs, expected)


def test_half_of_idcs_batches_are_mixed():
    augmentation = StudentAugmentation(distilled(), PROTOCOLS["idc"], seed=0, autoaugment=False, device=CPU)
    mixed = sum(augmentation(torch.arange(4)).share > 0 for _ in range(200))
    assert 70 < mixed < 130


def test_decoding_trains_on_the_tiles():
    colours = torch.tensor([0, 60, 120, 240], dtype=torch.uint8)
    image = colours.view(2, 2).repeat_interleave(8, 0).repeat_interleave(8, 1).expand(2, 3, 16, 16)
    soft = torch.eye(4)[None].expand(2, 4, 4)
    data = DistilledImages(
        image.contiguous(),
        torch.tensor([1, 2]),
        list("abcd"),
        (0, 0, 0),
        (1, 1, 1),
        factor=2,
        soft_labels=soft,
    )
    tiles = data.decoded().checked()
    assert tiles.factor == 1
    assert tiles.labels.tolist() == [1, 1, 1, 1, 2, 2, 2, 2]
    assert torch.equal(tiles.images, colours.repeat(2).view(8, 1, 1, 1).expand(8, 3, 16, 16))
    assert torch.equal(tiles.soft_labels[:4, 0], torch.eye(4))


def test_a_protocol_with_hard_labels_takes_no_teacher(toy_test):
    with pytest.raises(UsageError, match="trains on hard labels: leave the teacher out"):
        train_student(distilled(), toy_test, arch="convnet3", protocol="dc", teacher=a_teacher(), quiet=True)
