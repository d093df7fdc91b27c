"""SRe2L: the formula in float64, the step, the augmentation, batches, CMI, and one clear line for each bad input."""

import dataclasses
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import functional as torchvision

from ddfast.errors import DivergedError, UsageError
from ddfast.methods import get_method, list_methods
from ddfast.methods.matching.batch_norm import StatisticsNetwork, has_statistics
from ddfast.methods.matching.sre2l import SRe2L, SRe2LOptions
from ddfast.models import Teacher, create_model
from ddfast.models.registry import features
from ddfast.seeding import generator, seeded
from ddfast.training.augmentation import random_resized_boxes
from tests.methods.matching.conftest import context_of, distilled

CPU = torch.device("cpu")


def trained(arch="convnet3", classes=3, size=16, **options):
    """A network whose BatchNorm keeps statistics of its own in every layer, as after a training."""
    with seeded("trained", arch):
        model = create_model(arch, classes, size, **options).eval()
        shake(model)
    return model


def shake(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)


def sre2l(**options):
    return SRe2L(SRe2LOptions(**{"iterations": 6, "batch": 6, **options}))


def context_with(model, classes=3, **given):
    context = context_of(classes, **given)
    names = list(context.class_names)
    teacher = Teacher(model, "convnet3", names, context.image_size, context.mean, context.std, sha256="")
    return dataclasses.replace(context, teacher=teacher)


def distances(model, images):
    """Logits, and of each layer ||mu - mean|| + ||var - variance||, by hooks as in the authors' code."""
    found, hooks = {}, []
    for place, module in enumerate(model.modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:

            def hook(module, inputs, _, place=place):
                rows = inputs[0].transpose(0, 1).flatten(1)
                found[place] = (module.running_var - rows.var(1, unbiased=False)).norm() + (
                    module.running_mean - rows.mean(1)
                ).norm()

            hooks.append(module.register_forward_hook(hook))
    logits = model(images)
    for hook in hooks:
        hook.remove()
    return logits, torch.stack([found[place] for place in sorted(found)])


class Kinds(nn.Module):
    """BatchNorm of every kind: a subclass, without scale, without statistics, used twice, of rows, and unused."""

    class Own(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.unused = nn.BatchNorm2d(5)
        self.own = self.Own(8)
        self.plain = nn.BatchNorm2d(8, affine=False)
        self.blind = nn.BatchNorm2d(8, track_running_stats=False)
        self.again = self.own
        self.rows = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        maps = self.blind(self.plain(self.own(self.conv(images))))
        return self.head(self.rows(maps.square().mean((2, 3))))


def kinds():
    with seeded("kinds"):
        model = Kinds().eval()
        shake(model)
    return model


# The formula -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        lambda: trained(width=8),
        lambda: trained("resnet18_small", size=8),
        lambda: trained("mobilenet_v2", size=8),
        kinds,
    ],
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-4)])
def test_the_loss_and_its_gradient_are_the_plain_expression(model, dtype, bound):
    model = model()
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if any(isinstance(module, nn.Linear) and module.in_features == 8 * 4 for module in model.modules()):
        images = images.repeat(1, 1, 2, 2)  # the ConvNet is one of 16 px
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    method = sre2l(bn_weight=0.3, first_bn=7.0)
    given = images.to(dtype).requires_grad_()
    loss = method.loss(StatisticsNetwork(model.to(dtype), CPU), given, labels)
    (gradient,) = torch.autograd.grad(loss, given)
    exact = images.clone().requires_grad_()
    logits, found = distances(model.double(), exact)
    plain = F.cross_entropy(logits, labels) + 0.3 * (found.sum() + 6.0 * found[0])
    (wanted,) = torch.autograd.grad(plain, exact)
    assert loss.item() == pytest.approx(plain.item(), rel=bound)
    assert torch.linalg.vector_norm(gradient - wanted) < bound * torch.linalg.vector_norm(wanted)


def test_the_teacher_is_left_as_it_is():
    model = trained(width=8).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    StatisticsNetwork(model, CPU)(torch.randn(4, 3, 16, 16))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arch", "keeps"),
    [
        ("convnet3", True),
        ("convnet3_in", False),
        ("resnet18_in", False),
        ("vgg11", False),
        ("resnet18", True),
    ],
)
def test_which_networks_keep_statistics(arch, keeps):
    with torch.device("meta"):
        assert has_statistics(create_model(arch, 3, 32)) is keeps


# The step ----------------------------------------------------------------------------------------------------


def test_steps_are_those_of_torchs_adam_with_a_cosine_and_a_clamp(pool):
    """The authors' loop, written down once more in float64."""
    model = trained(width=8).double()
    context, method = context_with(model), sre2l(iterations=5, lr_img=0.4, shift=2)
    state = method.begin(method.groups(3, 2)[0], pool, context)
    state.tensors = {name: tensor.double() for name, tensor in state.tensors.items()}
    plain = state.pixels.clone().requires_grad_()
    optimizer = torch.optim.Adam([plain], lr=0.4, betas=(0.5, 0.9), eps=1e-8)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    for number in range(5):
        optimizer.param_groups[0]["lr"] = 0.4 * 0.5 * (1 + math.cos(math.pi * number / 5))
        offsets = torch.randint(3, (2,), generator=generator(context.seed, "augment", 0, number)).tolist()
        logits, found = distances(model, torch.roll(plain, offsets, (2, 3)))
        loss = F.cross_entropy(logits, labels) + 0.01 * (found.sum() + 9.0 * found[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for channel, (mean, std) in enumerate(zip(context.mean, context.std, strict=True)):
                plain[:, channel].clamp_(-mean / std, (1 - mean) / std)
        assert method.step(number, state, pool, context) == pytest.approx(loss.item(), rel=1e-10)
        state.step += 1
        torch.testing.assert_close(state.pixels, plain.detach(), rtol=0, atol=1e-9)
    assert [row["loss"] for row in state.curve][-1] == pytest.approx(loss.item())
    black, white = ((edge - torch.tensor(context.mean)) / torch.tensor(context.std) for edge in (0, 1))
    torch.testing.assert_close(state.pixels.amin((0, 2, 3)).float(), black)  # noise reaches both ends
    torch.testing.assert_close(state.pixels.amax((0, 2, 3)).float(), white)


def test_images_get_the_statistics_and_the_classes_that_the_network_knows(pool):
    with seeded("seen"):
        model = create_model("convnet3", 3, 16, width=8)
        for _ in range(40):  # flat images, unlike the noise of the start
            model(torch.randn(32, 3, 1, 1).expand(-1, -1, 16, 16) + 0.3 * torch.randn(32, 3, 16, 16))
    context, method = context_with(model.eval()), sre2l(iterations=60, lr_img=0.1, bn_weight=0.1)
    state = distilled(method, pool, context)
    begun = method.begin(state.group, pool, context).pixels
    (_, before), (logits, after) = (distances(model, images) for images in (begun, state.pixels))
    assert after.sum() < 0.6 * before.sum()
    assert logits.argmax(1).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("options", [{}, {"crop": True, "cmi_ratio": 0.2}])
def test_bfloat16_is_as_near_as_it_can_be(pool, options):
    model = trained(width=64)
    found, exact = (
        distilled(sre2l(**options), pool, context_with(model, precision=precision), steps=1)
        for precision in ("bfloat16", "float32")
    )
    assert found.pixels.dtype == torch.float32
    assert found.curve[0]["loss"] == pytest.approx(exact.curve[0]["loss"], rel=0.02)
    gradients = [state.tensors["first_moment"] for state in (found, exact)]
    assert torch.cosine_similarity(*(each.flatten() for each in gradients), dim=0) > 0.98


def test_a_state_that_was_saved_goes_on_to_the_same_bits(pool):
    method, context = sre2l(cmi_ratio=0.3), context_with(trained(width=8))
    whole = distilled(method, pool, context)
    half = distilled(method, pool, context, steps=3)
    half.tensors = {name: tensor.clone() for name, tensor in half.tensors.items()}
    ended = distilled(sre2l(cmi_ratio=0.3), pool, context, state=half)
    assert whole.tensors.keys() == ended.tensors.keys() >= {"first_moment", "second_moment", "cmi_weight"}
    assert all(torch.equal(tensor, ended.tensors[name]) for name, tensor in whole.tensors.items())
    assert whole.curve == ended.curve


def test_a_step_that_is_not_finite_names_itself_and_changes_nothing(pool):
    context = context_with(trained(width=8))
    method = sre2l()
    state = distilled(method, pool, context, steps=2)
    held = {name: tensor.clone() for name, tensor in state.tensors.items()}
    broken = sre2l(bn_weight=3e38)
    with pytest.raises(
        DivergedError, match=r"loss of sre2l .* at step 2 of 6: lower bn_weight, now 3e\+38"
    ) as caught:
        broken.step(2, state, pool, context)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, held[name]) for name, tensor in state.tensors.items())
    assert len(state.curve) == 2


# What a step looks at ----------------------------------------------------------------------------------------


def test_images_are_rolled_by_up_to_four_pixels_down_and_right():
    method, images, seen = sre2l(), torch.arange(3 * 64.0).view(1, 3, 8, 8), set()
    for step in range(200):
        found = method.augmented(images, generator(step))
        down, right = divmod(int((found[0, 0] == 0).nonzero()[0] @ torch.tensor([8, 1])), 8)
        assert torch.equal(found, images.roll((down, right), (2, 3)))
        seen.add((down, right))
    assert seen == {(down, right) for down in range(5) for right in range(5)}
    assert torch.equal(sre2l(shift=0).augmented(images, generator(0)), images)
    either = sre2l(shift=1, either_way=True)
    seen = {float(either.augmented(images, generator(step))[0, 0, 4, 4]) for step in range(80)}
    assert seen == {36.0 - 8 * down - right for down in (-1, 0, 1) for right in (-1, 0, 1)}


@pytest.mark.parametrize("either_way", [True, False])
def test_a_crop_is_torchvisions_then_mirrored_then_rolled(either_way):
    method = sre2l(crop=True, either_way=either_way)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    mirrors, rolls = set(), set()
    for step in range(40):
        found = method.augmented(images, generator("crop", step))
        draws = generator("crop", step)
        left, top, right, bottom = random_resized_boxes(1, 16, draws)[0].tolist()
        wanted = torchvision.resized_crop(
            images, top, left, bottom - top, right - left, [16, 16], antialias=True
        )
        mirrored = bool(torch.rand((), generator=draws) < 0.5)
        wanted = wanted.flip(-1) if mirrored else wanted
        offsets = torch.randint(-4 if either_way else 0, 5, (2,), generator=draws).tolist()
        torch.testing.assert_close(found, wanted.roll(offsets, (2, 3)), rtol=0, atol=1e-6)
        mirrors.add(mirrored)
        rolls.update(offsets)
    assert mirrors == {True, False}
    assert rolls == set(range(-4 if either_way else 0, 5))


# Batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "ipc", "options", "expected"),
    [
        # (first class, last class, first image, images of each) of every batch.
        (100, 2, {"batch": 100}, [(0, 99, 0, 1), (0, 99, 1, 1)]),
        (200, 1, {"batch": 100}, [(0, 99, 0, 1), (100, 199, 0, 1)]),
        (10, 10, {"batch": 100}, [(0, 9, 0, 10)]),
        (10, 11, {"batch": 100}, [(0, 9, 0, 5), (0, 9, 5, 6)]),
        (10, 1, {"batch": 100}, [(0, 9, 0, 1)]),
        (3, 5, {"batch": 7}, [(0, 2, 0, 1), (0, 2, 1, 2), (0, 2, 3, 2)]),
        (100, 2, {"batch": 100, "cmi": 1.0}, [(0, 49, 0, 2), (50, 99, 0, 2)]),
        (100, 2, {"batch": 100, "class_images": 2}, [(0, 49, 0, 2), (50, 99, 0, 2)]),
        (3, 3, {"batch": 6, "cmi": 1.0}, [(0, 0, 0, 3), (1, 2, 0, 3)]),
        (3, 5, {"batch": 6, "cmi_ratio": 1.0}, [(0, 2, 0, 2), (0, 0, 2, 3), (1, 2, 2, 3)]),
        (2, 3, {"batch": 2, "cmi": 1.0}, [(0, 0, 0, 3), (1, 1, 0, 3)]),
        (4, 3, {"batch": 1}, [(label, label, number, 1) for number in range(3) for label in range(4)]),
    ],
)
def test_batches_hold_all_classes_where_there_is_room(classes, ipc, options, expected):
    groups = sre2l(**options).groups(classes, ipc)
    assert [group.number for group in groups] == list(range(len(groups)))
    assert [(g.classes[0], g.classes[-1], g.first, g.each) for g in groups] == expected


def test_every_image_is_in_one_batch_and_no_batch_is_too_large():
    for classes in (1, 3, 10, 37):
        for ipc in (1, 2, 9, 50):
            for batch in (1, 2, 13, 100):
                groups = sre2l(batch=batch).groups(classes, ipc)
                held = [
                    (label, number)
                    for group in groups
                    for label in group.classes
                    for number in range(group.first, group.first + group.each)
                ]
                assert sorted(held) == [(label, number) for label in range(classes) for number in range(ipc)]
                assert all(len(group.classes) * group.each <= batch for group in groups)


@pytest.mark.parametrize("init", ["noise", "real"])
def test_an_image_begins_the_same_in_every_batch(init, pool):
    context = context_with(trained(width=8), ipc=4)

    def begun(**options):
        method, found = sre2l(init=init, **options), {}
        for group in method.groups(3, 4):
            pixels = iter(method.begin(group, pool, context).pixels)
            for label in group.classes:
                for number in range(group.first, group.first + group.each):
                    found[label, number] = next(pixels)
        return torch.stack([found[key] for key in sorted(found)])

    whole = begun(batch=12)
    assert whole.shape == (12, 3, 16, 16)
    assert torch.equal(whole, begun(batch=3))
    assert torch.equal(whole, begun(batch=4, class_images=4))
    assert len(torch.unique(whole.flatten(1), dim=0)) == 12
    if init == "real":
        shown = whole * torch.tensor(context.std).view(3, 1, 1) + torch.tensor(context.mean).view(3, 1, 1)
        drawn = torch.cat([pool.draw(label, 4, generator(context.seed, "init", label)) for label in range(3)])
        torch.testing.assert_close(shown, drawn / 255, rtol=0, atol=1e-6)
    else:
        assert abs(float(whole.mean())) < 0.05
        assert float(whole.std()) == pytest.approx(1, abs=0.05)


# CMI ---------------------------------------------------------------------------------------------------------


def cmi_of(model, images):
    """CMI of images [C, n, 3, H, W] in float64, and its gradient."""
    exact = images.double().requires_grad_()
    rows = []
    for of_class in exact:
        p = F.softmax(features(model.double(), of_class), dim=1)
        rows.append((p * (p.log() - p.mean(0).log())).sum(1))
    value = torch.cat(rows).mean()
    return value.detach(), torch.autograd.grad(value, exact)[0].flatten(0, 1)


def test_the_ratio_sets_the_weight_in_the_first_step_and_it_stays(pool):
    context = context_with(trained(width=8))
    method = sre2l(cmi_ratio=0.2)
    state = distilled(method, pool, context, steps=1)
    row, weight = state.curve[0], state.tensors["cmi_weight"].clone()
    assert row["cmi_gradient_norm"] == pytest.approx(0.2 * row["gradient_norm"], rel=1e-5)
    begun = method.begin(state.group, pool, context).pixels
    value, exact = cmi_of(trained(width=8), begun.unflatten(0, (3, 2)))
    assert row["cmi"] == pytest.approx(
        float(value), abs=1e-7
    )  # what float32 leaves of a difference of logarithms
    wanted = 0.2 * row["gradient_norm"] / torch.linalg.vector_norm(exact)
    assert float(weight) == pytest.approx(float(wanted), rel=1e-3)
    pixels = state.pixels
    state = distilled(method, pool, context, state=state, steps=1)
    assert torch.equal(state.tensors["cmi_weight"], weight)
    _, exact = cmi_of(trained(width=8), pixels.unflatten(0, (3, 2)))
    expected = float(weight * torch.linalg.vector_norm(exact))
    assert state.curve[1]["cmi_gradient_norm"] == pytest.approx(expected, rel=1e-3)


def test_a_ratio_of_no_gradient_is_told(pool):
    model = trained(width=8)
    for parameter in model.blocks[-4].parameters():
        nn.init.zeros_(parameter)
    nn.init.zeros_(model.blocks[-3].weight)  # features are the same of every image
    with pytest.raises(
        DivergedError, match="CMI has no gradient in the first step, so cmi_ratio finds no weight"
    ):
        distilled(sre2l(cmi_ratio=0.2), pool, context_with(model), steps=1)


def test_a_weight_is_the_one_that_the_ratio_finds(pool):
    context = context_with(trained(width=8))
    found = distilled(sre2l(cmi_ratio=0.3), pool, context)
    given = distilled(sre2l(cmi=float(found.tensors["cmi_weight"])), pool, context)
    assert torch.equal(found.pixels, given.pixels)
    assert "cmi_weight" not in given.tensors


def test_without_cmi_a_step_is_the_same_beside_its_gradient(pool, proxies):
    context = context_with(trained(width=8))
    plain, regular = distilled(sre2l(), pool, context), distilled(sre2l(cmi=5.0, proxies="p"), pool, context)
    assert regular.curve[0]["loss"] == plain.curve[0]["loss"]
    assert regular.curve[0]["gradient_norm"] == plain.curve[0]["gradient_norm"]
    assert not torch.equal(regular.pixels, plain.pixels)
    assert "cmi" not in plain.curve[0]
    measured = distilled(sre2l(proxies="p"), pool, context)
    assert measured.curve[0]["cmi"] == regular.curve[0]["cmi"]
    assert torch.equal(measured.pixels, plain.pixels)


def test_cmi_falls_with_the_regulariser(pool):
    context = context_with(trained(width=8))
    plain = distilled(sre2l(iterations=15), pool, context)
    regular = distilled(sre2l(iterations=15, cmi_ratio=3.0), pool, context)
    values = [cmi_of(trained(width=8), each.pixels.unflatten(0, (3, 2)))[0] for each in (regular, plain)]
    assert values[0] < 0.8 * values[1]


def test_cmi_acts_in_every_so_many_steps(pool):
    state = distilled(sre2l(iterations=7, cmi=5.0, cmi_every=3), pool, context_with(trained(width=8)))
    assert [int(row["step"]) for row in state.curve if "cmi_gradient_norm" in row] == [0, 3, 6]


# Options and checks ------------------------------------------------------------------------------------------


def test_sre2l_is_registered_with_the_authors_numbers():
    assert "sre2l" in list_methods()
    method = get_method("sre2l").from_options({})
    options = method.options
    assert (options.iterations, options.batch, options.lr_img, options.bn_weight) == (1000, 100, 0.25, 0.01)
    assert (options.first_bn, options.shift, options.crop, options.init) == (10.0, 4, False, "noise")
    assert method.stages == ("synthesize", "relabel")
    assert method.requires_teacher()
    tiny = SRe2L.from_options({}, "tiny_imagenet").options
    assert (tiny.iterations, tiny.batch, tiny.lr_img, tiny.bn_weight) == (4000, 100, 0.1, 1.0)
    assert (tiny.crop, tiny.shift, tiny.either_way) == (True, 4, True)
    large = SRe2L.from_options({}, "imagenet1k").options
    assert (large.iterations, large.lr_img, large.bn_weight, large.crop) == (4000, 0.25, 0.01, True)
    assert (large.shift, large.either_way) == (32, False)
    assert SRe2L.from_options({}, "tiny_imagenet_1k").options.iterations == 1000
    assert SRe2L.from_options({}, "cifar100").options == options == SRe2L.from_options({}, "cifar10").options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations"),
        ({"batch": 0}, "batch"),
        ({"shift": -1}, "shift"),
        ({"lr_img": 0.0}, "lr_img"),
        ({"bn_weight": -1.0}, "bn_weight"),
        ({"init": "mix"}, "init must be one of"),
        ({"batch": 4, "class_images": 5}, "class_images 5 do not fit in a batch of 4"),
        ({"cmi": 1.0, "cmi_ratio": 0.1}, "give either"),
        ({"cmi_every": 2}, "cmi_every is of no use without cmi or cmi_ratio"),
        ({"proxy_arch": "convnet3"}, "proxy_arch is of no use without proxies"),
        ({"cmi": 1.0, "class_images": 1}, "single image"),
        ({"cmi": 1.0, "batch": 1}, "single image"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        SRe2L.from_options(options)
    assert "\n" not in str(caught.value)


def test_cmi_of_single_images_is_refused():
    with pytest.raises(UsageError, match="ipc at least 2, or leave out cmi_ratio"):
        sre2l(cmi_ratio=0.1).check_ipc(1)
    sre2l(cmi_ratio=0.1).check_ipc(2)
    sre2l().check_ipc(1)


def test_a_class_without_images_to_begin_with_is_refused():
    counts, names = torch.tensor([3, 5, 2]), ("a", "b", "c")
    sre2l().check_pool(counts, names, 50)
    sre2l(init="real").check_pool(counts, names, 2)
    with pytest.raises(
        UsageError, match=r"4 different images of a class, but a has 3, c has 2: lower ipc to 2"
    ):
        sre2l(init="real").check_pool(counts, names, 4)


def test_a_teacher_without_statistics_is_refused():
    context = context_with(create_model("convnet3_in", 3, 16))
    with pytest.raises(
        UsageError, match=r"BatchNorm, and the teacher convnet3 keeps none: train one"
    ) as caught:
        sre2l().open(context)
    assert "rded" in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "ipc", "batch", "said"),
    [
        (10, 10, 100, None),
        (10, 5, 100, None),
        (10, 4, 100, "40 images, .* a higher ipc"),
        (10, 50, 49, "30 images, .* a higher batch"),
        (10, 9, 100, None),
        (10, 4, 49, "40 images, .* a higher ipc and batch would"),
        (40, 10, 79, "40 images, .* a higher batch would"),
        (10, 9, 101, "30 images, .* a higher class_images would"),
    ],
)
def test_small_batches_are_told_of(classes, ipc, batch, said):
    options = {"class_images": 3} if batch == 101 else {}
    notes = sre2l(batch=batch, **options).notes(context_of(classes, ipc=ipc))
    assert len(notes) == (said is not None)
    if said is not None:
        assert re.search(said, notes[0])


def test_steps_draw_no_real_images(pool):
    distilled(sre2l(), pool, context_with(trained(width=8)), steps=2)
    assert pool.drawn == []
    assert not SRe2L.draws_images
