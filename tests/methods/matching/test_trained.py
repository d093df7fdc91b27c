"""Methods whose networks train between the steps, in float64 against plain loops after their papers' algorithms."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

from ddfast.data import tiles as tiles_module
from ddfast.errors import DivergedError, UsageError
from ddfast.methods import get_method
from ddfast.methods.matching import networks, queue
from ddfast.methods.synthesis import State
from ddfast.models import create_model
from ddfast.models.registry import features
from ddfast.seeding import derived_seed, generator, seeded
from ddfast.training.differentiable import DSA, draw_idc, draw_one
from ddfast.training.protocol import PROTOCOLS
from tests.methods.matching.conftest import begun_exactly, context_of, distilled, exact

SIZE = (16, 16)
SMALL = {
    "dc": {"iterations": 2, "real_batch": 6, "outer_loop": 3, "inner_loop": 2, "net_batch": 4},
    "dsa": {"iterations": 2, "real_batch": 6, "outer_loop": 3, "inner_loop": 2, "net_batch": 4},
    "idc": {"iterations": 2, "real_batch": 6, "inner_loop": 3, "net_samples": 10, "net_batch": 5},
    "idm": {"iterations": 5, "real_batch": 6, "queue_every": 2, "net_steps": 2, "net_batch": 7, "queue": 4},
}


def method_of(name, **options):
    method = get_method(name).from_options({**SMALL[name], **options})
    return method.resolved(method.factor, 2)


def network_of(context, *key):
    with seeded(context.seed, *key):
        return create_model("convnet3_in", context.classes, context.image_size).double()


def normalised(images, context):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (context.mean, context.std))
    return ((images.double() / 255 if images.dtype == torch.uint8 else images) - mean) / std


def real_of(pool, context, label, step, count=6):
    return normalised(pool.draw(label, count, generator(context.seed, "real", label, step)), context)


def weight_gradients(network, images, label, **how):
    loss = F.cross_entropy(network(images), torch.full((len(images),), label))
    return torch.autograd.grad(loss, list(network.parameters()), **how)


def dc_by_the_paper(pool, context, pixels, options, augmented):
    """Algorithm 1 of DC, with DSA's augmentation where asked for, as its authors' main.py has it."""
    pixels = pixels.clone().requires_grad_()
    optimizer = torch.optim.SGD([pixels], lr=options.lr_img, momentum=0.5)
    labels = torch.arange(context.classes).repeat_interleave(context.ipc)
    for iteration in range(options.iterations):
        network = network_of(context, "network", iteration)
        training = torch.optim.SGD(network.parameters(), lr=options.lr_net)
        for outer in range(options.outer_loop):
            step, loss = iteration * options.outer_loop + outer, 0
            for c in range(context.classes):
                augment = draw_one(DSA, 1, SIZE, generator(context.seed, "augment", c, step))
                augment = augment if augmented else lambda images: images
                real = weight_gradients(network, augment(real_of(pool, context, c, step)), c)
                made = augment(pixels[c * context.ipc : (c + 1) * context.ipc])
                found = weight_gradients(network, made, c, create_graph=True)
                for a, b in zip(found, real, strict=True):
                    if a.ndim > 1:
                        a, b = a.flatten(1), b.flatten(1)
                        loss = loss + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
            optimizer.zero_grad()
            loss.backward(inputs=[pixels])
            optimizer.step()
            if outer == options.outer_loop - 1:
                break
            draws = generator(context.seed, "training", step)
            for _ in range(options.inner_loop):
                for places in torch.randperm(len(pixels), generator=draws).split(options.net_batch):
                    images = pixels.detach()[places]
                    if augmented:
                        images = draw_one(DSA, len(images), SIZE, draws)(images)
                    training.zero_grad()
                    F.cross_entropy(network(images), labels[places]).backward()
                    training.step()
    return pixels.detach()


def tiles(pixels):
    half = SIZE[0] // 2
    return torch.cat(
        [
            F.interpolate(pixels[:, :, y : y + half, x : x + half], scale_factor=2, mode="bilinear")
            for y in (0, half)
            for x in (0, half)
        ]
    )


def idc_training_step(network, training, pool, context, places, draws, key):
    """A step of train_epoch in the authors' train.py, with CutMix on half of the batches."""
    images, labels = normalised(pool.images[places], context), pool.labels[places]
    images = draw_idc(("colour", "shift"), 5, SIZE, draws)(images)
    mixing = np.random.default_rng(derived_seed(context.seed, "cutmix", *key))
    share, partner = 0.0, torch.arange(5)
    if mixing.random() < 0.5:
        top, left, bottom, right = PROTOCOLS["idc"].cutmix_box(16, mixing)
        partner = torch.from_numpy(mixing.permutation(5))
        share = (bottom - top) * (right - left) / 256
        images[:, :, top:bottom, left:right] = images[partner][:, :, top:bottom, left:right]
    logits = network(images)
    own, others = F.cross_entropy(logits, labels), F.cross_entropy(logits, labels[partner])
    training.zero_grad()
    ((1 - share) * own + share * others).backward()
    training.step()


def idc_by_the_paper(pool, context, pixels, options, factor):
    """Algorithm 1 of IDC as its authors' condense.py has it: the optimiser steps once a class over all pixels."""
    pixels = pixels.clone().requires_grad_()
    rate = options.lr_img * context.ipc / 10 * (SIZE[0] / 32) ** 2
    optimizer = torch.optim.SGD([pixels], lr=rate, momentum=0.5)
    for iteration in range(options.iterations):
        network = network_of(context, "network", iteration)
        training = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        pixels.data.clamp_(0, 1)
        for epoch in range(options.net_epochs):
            draws = generator(context.seed, "pretraining", iteration * options.inner_loop, epoch)
            order = torch.randperm(len(pool.labels), generator=draws)
            for number in range(len(order) // 5):
                key = ("pretraining", iteration * options.inner_loop, epoch, number)
                places = order[5 * number : 5 * number + 5]
                idc_training_step(network, training, pool, context, places, draws, key)
        for inner in range(options.inner_loop):
            step = iteration * options.inner_loop + inner
            for c in range(context.classes):
                draws = generator(context.seed, "augment", c, step)
                augment = draw_idc(("colour", "shift", "cutout"), 1, SIZE, draws)
                real = weight_gradients(network, augment(real_of(pool, context, c, step)), c)
                made = pixels[c * context.ipc : (c + 1) * context.ipc]
                made = augment(normalised(tiles(made) if factor == 2 else made, context))
                found = weight_gradients(network, made, c, create_graph=True)
                pairs = zip(found, real, strict=True)
                loss = sum(((a - b) ** 2).sum() for a, b in pairs if a.ndim == 4)
                optimizer.zero_grad(set_to_none=False)
                loss.backward(inputs=[pixels])
                optimizer.step()
            if inner == options.inner_loop - 1:
                break  # the next network is a new one
            for number in range(2):
                draws = generator(context.seed, "training", step, number)
                places = torch.randperm(len(pool.labels), generator=draws)[:5]
                idc_training_step(network, training, pool, context, places, draws, (step, number))
    return pixels.detach()


def idm_by_the_paper(pool, context, pixels, options):
    """IDM as its authors' IDM_cifar10.py has it, with one network a step."""
    pixels = pixels.clone().requires_grad_()
    optimizer = torch.optim.SGD([pixels], lr=options.lr_img, momentum=0.5)
    networks = []

    def join(number):
        network = network_of(context, "queue", number)
        training = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        networks.append([network, training, 0, 0])
        del networks[: -options.queue]

    for number in range(3):
        join(number)
    for step in range(options.iterations):
        if step % options.queue_every == 0:
            join(3 + step)
        if step % options.accuracy_every == 0:
            for held in networks:
                held[2:] = [0, 0]
        draws = generator(context.seed, "network", step)
        network, _, right, seen = networks[int(torch.randint(len(networks), (), generator=draws))]
        accuracy = 100 * right / max(seen, 1)
        for c in range(context.classes):
            augment = draw_one(DSA, 1, SIZE, generator(context.seed, "augment", c, step))
            made = augment(tiles(pixels[c * context.ipc : (c + 1) * context.ipc]))
            wanted = features(network, augment(real_of(pool, context, c, step))).mean(0).detach()
            loss = ((wanted - features(network, made).mean(0)) ** 2).sum()
            entropy = F.cross_entropy(network(made), torch.full((len(made),), c))
            loss = loss + options.ce_weight * accuracy * entropy
            optimizer.zero_grad(set_to_none=False)
            loss.backward(inputs=[pixels])
            optimizer.step()
        order = torch.randperm(len(networks), generator=generator(context.seed, "training", step))
        for place in order[:2].tolist():
            held = networks[place]
            for number in range(options.net_steps):
                draws = generator(context.seed, "training", step, place, number)
                places = torch.randperm(len(pool.labels), generator=draws)[: options.net_batch]
                images, labels = normalised(pool.images[places], context), pool.labels[places]
                logits = held[0](images)
                held[1].zero_grad()
                F.cross_entropy(logits, labels).backward()
                held[1].step()
                held[2] += int((logits.argmax(1) == labels).sum())
                held[3] += len(labels)
    return pixels.detach()


def relative(found, wanted, begun):
    return float((found - wanted).norm() / (wanted - begun).norm())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dc", {}),
        ("dsa", {}),
        ("dsa", {"class_batch": 2}),
        ("idc", {}),
        ("idc", {"class_batch": 1}),
        ("idc", {"net_epochs": 2}),
        ("idm", {}),
        ("idm", {"class_batch": 2, "accuracy_every": 2}),
    ],
)
def test_a_run_is_the_papers_algorithm(pool, name, options):
    context = context_of(3)
    method = exact(method_of(name, **options))
    state = begun_exactly(method, pool, context)
    begun = state.pixels.clone()
    if name == "idc":
        wanted = idc_by_the_paper(pool, context, begun, method.options, 2)
    elif name == "idm":
        wanted = idm_by_the_paper(pool, context, begun, method.options)
    else:
        wanted = dc_by_the_paper(pool, context, begun, method.options, name == "dsa")
    assert relative(distilled(method, pool, context, state=state).pixels, wanted, begun) < 1e-10


def test_idc_without_tiles_is_the_papers_algorithm(pool):
    context = context_of(3)
    method = exact(get_method("idc").from_options({**SMALL["idc"], "init": "real"}).resolved(1, 2))
    state = begun_exactly(method, pool, context)
    begun = state.pixels.clone()
    wanted = idc_by_the_paper(pool, context, begun, method.options, 1)
    assert relative(distilled(method, pool, context, state=state).pixels, wanted, begun) < 1e-10


@pytest.mark.parametrize("name", ["dc", "dsa", "idc", "idm"])
def test_a_run_in_float32_ends_where_one_in_float64_does(pool, name):
    context = context_of(3)
    method = exact(method_of(name))
    state = begun_exactly(method, pool, context)
    begun = state.pixels.clone()
    wanted = distilled(method, pool, context, state=state).pixels
    found = distilled(method_of(name), pool, context).pixels
    assert relative(found.double(), wanted, begun) < 0.05  # a ReLU at zero may flip


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize(
    ("name", "given"), [("dc", {}), ("dsa", {}), ("idc", {}), ("idc", {"net_epochs": 1}), ("idm", {})]
)
def test_a_run_goes_on_from_its_tensors_to_the_same_bits(pool, proxies, name, given, stop):
    context, options = context_of(3), {"cmi": 10.0, "proxies": "p", **given}
    whole = distilled(method_of(name, **options), pool, context)
    half = distilled(method_of(name, **options), pool, context, steps=stop)
    tensors = load(save({key: tensor.contiguous() for key, tensor in half.tensors.items()}))
    again = State(half.group, tensors, half.step, copy.deepcopy(half.curve))
    state = distilled(method_of(name, **options), pool, context, state=again)
    assert set(state.tensors) == set(whole.tensors)
    for key, tensor in whole.tensors.items():
        assert torch.equal(state.tensors[key], tensor), key
    assert state.curve == whole.curve


@pytest.mark.parametrize(
    ("name", "given"), [("dc", {}), ("dsa", {}), ("idc", {"net_epochs": 1}), ("idm", {})]
)
def test_networks_that_draw_in_training_draw_the_same_after_a_kill(pool, name, given, monkeypatch):
    def dropping(*arguments):
        return torch.nn.Sequential(torch.nn.Dropout(0.3), create_model(*arguments))

    monkeypatch.setattr(networks, "create_model", dropping)
    found = []
    for stir in (1, 2):
        torch.manual_seed(stir)
        found.append(distilled(method_of(name, **given), pool, context_of(3)).pixels)
    assert torch.equal(*found)


def test_dc_keeps_no_network_behind_its_last_step(pool):
    assert set(distilled(method_of("dc"), pool, context_of(3)).tensors) == {"pixels", "momentum"}


@pytest.mark.parametrize(
    ("ipc", "loops"), [(1, (1, 1)), (9, (1, 1)), (10, (10, 50)), (35, (30, 20)), (200, (50, 10))]
)
def test_loops_follow_the_images_per_class(ipc, loops):
    for name in ("dc", "dsa"):
        found = get_method(name).from_options({}).resolved(1, ipc).options
        assert (found.outer_loop, found.inner_loop) == loops
    given = get_method("dsa").from_options({"outer_loop": 4}).resolved(1, 10).options
    assert (given.outer_loop, given.inner_loop) == (4, 50)


def test_a_network_with_batchnorm_has_statistics_of_real_images_that_stand_still(pool):
    context, method = context_of(3), method_of("dc", arch="convnet3")
    state = method.begin(method.groups(3, 2)[0], pool, context)
    network = method.networks.at(0, state, pool, context)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert all(float(norm.running_mean.abs().sum()) > 0 for norm in norms)
    before = [norm.running_mean.clone() for norm in norms]
    network(torch.randn(4, 3, 16, 16))
    assert all(torch.equal(a, norm.running_mean) for a, norm in zip(before, norms, strict=True))
    whole = distilled(method_of("dc", arch="convnet3"), pool, context)
    assert torch.isfinite(whole.pixels).all()


def test_idc_keeps_its_pixels_in_the_unit_interval(pool):
    method, context = method_of("idc", lr_img=5.0), context_of(3)
    state = distilled(method, pool, context, steps=2)
    assert state.pixels.min() < 0 or state.pixels.max() > 1
    images = method.images(state)
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(method.bounded(3, state.pixels), images)
    assert torch.equal(method.bounded(4, state.pixels), state.pixels)


def test_idc_takes_at_most_128_decoded_images_of_a_class(pool, monkeypatch):
    method, context = method_of("idc"), context_of(3)
    monkeypatch.setattr(type(method), "synthetic_batch", 5)
    seen = []
    inner = method.loss
    monkeypatch.setattr(method, "loss", lambda *a: (seen.append(a[2].shape), inner(*a))[1], raising=False)
    distilled(method, pool, context, steps=2)
    assert seen == [(3, 5, 3, 16, 16)] * 2


def test_cmi_of_idc_is_a_mean_over_a_class_and_its_proxy_sees_every_tile(pool, proxies):
    """The pull of lambda = 1 on a class does not fall with the number of classes (the authors' reduction)."""
    norms = []
    for classes in (1, 3):
        method = method_of("idc", cmi=1.0, proxies="p")
        context = context_of(classes)
        state = method.begin(method.groups(classes, 2)[0], pool, context)
        measured, _ = {}, method.open(context)
        network = method.networks.at(0, state, pool, context)
        pulled = method._regularise(0, network, state.group, state.pixels, context, measured)
        norms.append(float(pulled[:2].norm()))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@pytest.mark.parametrize("seen", ["normalized", "unit"])
def test_proxies_of_idc_see_normalised_images_or_as_its_code_has_it_those_in_the_unit_interval(
    pool, proxies, seen
):
    context, method = context_of(3), method_of("idc", cmi=2.0, proxies="p", proxy_input=seen)
    state = method.begin(method.groups(3, 2)[0], pool, context)
    measured, _ = {}, method.open(context)
    network = method.networks.at(0, state, pool, context)
    pulled = method._regularise(0, network, state.group, state.pixels, context, measured)
    pixels = state.pixels.double().requires_grad_()
    images = torch.cat([tiles(each) for each in pixels.split(2)])
    images = normalised(images, context) if seen == "normalized" else images
    proxy = proxies[int(torch.randint(2, (), generator=generator(context.seed, "proxy", 0)))].double()
    logs = F.log_softmax(features(proxy, images), dim=1).unflatten(0, (3, 8))
    centre = logs.exp().mean(1, keepdim=True).log()
    spreads = (logs.exp() * (logs - centre)).sum(2).mean(1)
    assert float(measured["cmi"]) == pytest.approx(float(spreads.detach().mean()), rel=1e-4)
    (wanted,) = torch.autograd.grad(2 * spreads.sum(), pixels)
    assert (pulled - wanted).norm() < 1e-3 * wanted.norm()


@pytest.mark.parametrize(("name", "option"), [("dsa", "lr_net"), ("idc", "lr_net"), ("idm", "lr_net")])
def test_an_inner_loop_that_diverges_leaves_the_state(pool, name, option):
    method, context = method_of(name, **{option: 1e30}), context_of(3)
    state = method.begin(method.groups(3, 2)[0], pool, context)
    before = {key: tensor.clone() for key, tensor in state.tensors.items()}
    with pytest.raises(
        DivergedError, match=f"training of the networks became .* after step 0: lower {option}"
    ):
        distilled(method, pool, context, state=state)
    assert state.curve == []
    assert set(state.tensors) == set(before)
    for key, tensor in before.items():
        assert torch.equal(state.tensors[key], tensor), key


def test_a_queue_larger_than_memory_is_refused(pool, monkeypatch):
    method, context = method_of("idm"), context_of(3)
    bytes_of_one = sum(p.numel() * 4 for p in create_model("convnet3_in", 3, 16).parameters())
    monkeypatch.setattr(queue, "free_memory", lambda device: 5 * bytes_of_one)
    with pytest.raises(
        UsageError, match=rf"queue of 4 networks takes {8 * bytes_of_one:,} bytes .* queue to 2"
    ):
        method.open(context)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("dc", {"outer_loop": 0}, "outer_loop must be auto or a positive number"),
        ("dsa", {"inner_loop": "many"}, "inner_loop must be auto or a positive number"),
        ("dc", {"distance": "l2"}, "distance"),
        ("dc", {"lr_net": 0}, "lr_net"),
        ("dc", {"flip": False}, "flip=False is of no use to dc, which augments nothing"),
        ("idc", {"net_samples": 0}, "net_samples must be at least 1"),
        ("idm", {"queue": 0}, "queue must be at least 1"),
        ("idm", {"ce_weight": -1}, "ce_weight"),
    ],
)
def test_bad_options_are_refused_in_a_line(name, options, said):
    with pytest.raises(UsageError, match=said) as error:
        get_method(name).from_options(options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("side", "size"), [(8, 16), (7, 13), (3, 8)])
def test_tiles_are_enlarged_by_products_as_by_interpolation(side, size):
    images = torch.rand(2, 3, side, side, dtype=torch.float64, requires_grad=True)
    wanted = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    found = tiles_module._by_products(images, size)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn_like(wanted)
    theirs, ours = (torch.autograd.grad((each * weights).sum(), images)[0] for each in (wanted, found))
    torch.testing.assert_close(ours, theirs)


def test_tiles_of_odd_images_are_padded_with_grey_and_enlarged():
    """IDC's decoding of 5 px: padded to 6, cut into 3 x 3, enlarged."""
    images = torch.rand(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    method = get_method("idc").from_options({}).resolved(2, 1)
    found = method.decode(images)
    padded = F.pad(images, (0, 1, 0, 1), value=0.5)
    cut = [padded[:, :, y : y + 3, x : x + 3] for y in (0, 3) for x in (0, 3)]
    wanted = torch.stack([F.interpolate(each, size=5, mode="bilinear") for each in cut], dim=1)
    torch.testing.assert_close(found, wanted.flatten(0, 1))
    assert torch.autograd.grad(found.sum(), images)[0].shape == images.shape


@pytest.mark.parametrize(
    ("name", "given", "found"), [("idc", "auto", 2), ("idc", "1", 1), ("idm", "auto", 2)]
)
def test_factors_of_methods_that_decode(name, given, found):
    method = get_method(name).from_options({})
    assert method.tiles_per_side(given, 32) == found
    with pytest.raises(UsageError, match="factor of"):
        method.tiles_per_side("3", 33)


def test_only_idc_pads():
    assert get_method("idc").from_options({}).tiles_per_side("auto", 33) == 2
    with pytest.raises(UsageError, match="divide the image size 33"):
        get_method("idm").from_options({}).tiles_per_side("auto", 33)
