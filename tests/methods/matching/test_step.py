"""The step of DM: against a plain loop, and under every way of cutting a run into pieces."""

import copy

import pytest
import torch
from safetensors.torch import load, save

from ddfast.errors import DivergedError, UsageError
from ddfast.methods.matching.dm import DM
from ddfast.methods.matching.networks import Fresh, Networks
from ddfast.methods.matching.options import MatchingOptions
from ddfast.methods.synthesis import State
from ddfast.models import create_model
from ddfast.models.registry import features
from ddfast.seeding import generator, seeded
from ddfast.training.differentiable import DSA, draw_one
from tests.methods.matching.conftest import TensorPool, context_of, distilled


class Eager(Networks):
    """The networks of DM as PyTorch's layers, in any dtype."""

    def __init__(self, dtype=torch.float32):
        self.dtype = dtype

    def at(self, step, state, pool, context):
        return plain_network(context, step, self.dtype)


def plain_network(context, step, dtype):
    with seeded(context.seed, "network", step):
        network = create_model("convnet3_in", context.classes, context.image_size)
    return network.to(dtype).requires_grad_(False)


def dm(**options):
    return DM(MatchingOptions(**{"iterations": 4, "real_batch": 6, **options}))


def by_the_paper(pool, context, steps, *, dtype, real_batch=6, lr_img=1.0, momentum=0.5):
    """Algorithm 1 of DM, class by class, on PyTorch's layers and with its optimiser."""
    mean, std = (torch.tensor(v, dtype=dtype).view(3, 1, 1) for v in (context.mean, context.std))

    def normalised(images):
        return (images.to(dtype) / 255 - mean) / std

    begun = [
        normalised(pool.draw(c, context.ipc, generator(context.seed, "init", c)))
        for c in range(context.classes)
    ]
    pixels = torch.cat(begun).requires_grad_()
    optimizer = torch.optim.SGD([pixels], lr=lr_img, momentum=momentum)
    losses = []
    for step in range(steps):
        network = plain_network(context, step, dtype)
        loss = 0
        for c in range(context.classes):
            augment = draw_one(DSA, 1, (16, 16), generator(context.seed, "augment", c, step))
            real = augment(normalised(pool.draw(c, real_batch, generator(context.seed, "real", c, step))))
            synthetic = augment(pixels[c * context.ipc : (c + 1) * context.ipc])
            wanted = features(network, real).mean(0).detach()
            loss = loss + ((wanted - features(network, synthetic).mean(0)) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return pixels.detach(), losses


def relative(found, exact):
    return float(torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact))


def test_a_run_is_the_papers_algorithm(pool):
    context = context_of(3)
    exact, losses = by_the_paper(pool, context, 4, dtype=torch.float64)
    plain, _ = by_the_paper(pool, context, 4, dtype=torch.float32)
    state = distilled(dm(), pool, context)
    assert relative(state.pixels.double(), exact) <= 2 * relative(plain.double(), exact)
    assert [row["loss"] for row in state.curve] == pytest.approx(losses, rel=1e-4)
    begun = dm().begin(state.group, pool, context).pixels
    assert relative(begun.double(), exact) > 0.01  # the run went somewhere


def test_in_float64_a_run_is_the_papers_algorithm_to_float64(pool):
    context = context_of(3)
    exact, _ = by_the_paper(pool, context, 4, dtype=torch.float64)
    method = dm()
    method.networks = Eager(torch.float64)
    state = method.begin(method.groups(3, 2)[0], pool, context)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (context.mean, context.std))
    drawn = [pool.draw(c, 2, generator(context.seed, "init", c)) for c in range(3)]
    state.tensors = {
        "pixels": (torch.cat(drawn).double() / 255 - mean) / std,
        "momentum": state.tensors["momentum"].double(),
    }
    assert relative(distilled(method, pool, context, state=state).pixels, exact) < 1e-12


def test_no_momentum_and_another_rate(pool):
    context = context_of(3)
    exact, _ = by_the_paper(pool, context, 4, dtype=torch.float64, lr_img=7.0, momentum=0.0)
    plain, _ = by_the_paper(pool, context, 4, dtype=torch.float32, lr_img=7.0, momentum=0.0)
    found = distilled(dm(lr_img=7.0, momentum=0.0), pool, context).pixels
    assert relative(found.double(), exact) <= 2 * relative(plain.double(), exact)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("class_batch", [1, 2])
def test_groups_give_the_bits_of_one_pass_over_all_classes(pool, fused, class_batch):
    context = context_of(3)

    def run(method, group=0):
        method.networks = Fresh("convnet3_in") if fused else Eager()
        return distilled(method, pool, context, group=group)

    together = run(dm())
    apart = [
        run(dm(class_batch=class_batch), group)
        for group in range(len(dm(class_batch=class_batch).groups(3, 2)))
    ]
    assert torch.equal(together.pixels, torch.cat([state.pixels for state in apart]))
    sums = [sum(row["loss"] for row in rows) for rows in zip(*(s.curve for s in apart), strict=True)]
    assert sums == pytest.approx([row["loss"] for row in together.curve], rel=1e-6)


@pytest.mark.parametrize(
    ("micro_batch", "pieces"), [(5, [5, 1] * 3), (13, [12, 6]), (6, [6] * 3), (256, [18]), (1, [1] * 18)]
)
def test_real_images_go_in_pieces_that_change_no_bit(pool, monkeypatch, micro_batch, pieces):
    from ddfast.methods.matching import objectives

    context = context_of(3)
    whole = distilled(dm(), pool, context)
    monkeypatch.setattr(objectives, "MICRO_BATCH", micro_batch)
    seen = []
    inner = objectives.features
    monkeypatch.setattr(objectives, "features", lambda net, x: (seen.append(len(x)), inner(net, x))[1])
    assert torch.equal(distilled(dm(), pool, context).pixels, whole.pixels)
    assert seen == [*pieces, 6] * 4  # real images, then the synthetic ones at once


@pytest.mark.parametrize("options", [{}, {"cmi": 50.0, "proxies": "p", "cmi_every": 2}])
def test_a_run_goes_on_from_its_tensors_to_the_same_bits(pool, proxies, options):
    context = context_of(3)
    whole = distilled(dm(iterations=6, **options), pool, context)
    half = distilled(dm(iterations=6, **options), pool, context, steps=3)
    tensors = load(save({name: tensor.contiguous() for name, tensor in half.tensors.items()}))
    again = State(half.group, tensors, half.step, copy.deepcopy(half.curve))
    state = distilled(dm(iterations=6, **options), pool, context, state=again)
    for name, tensor in whole.tensors.items():
        assert torch.equal(state.tensors[name], tensor), name
    assert state.curve == whole.curve


def test_a_regulariser_changes_no_draw(pool, proxies, monkeypatch):
    context = context_of(3)

    def trace(**options):
        method, asked = dm(**options), []
        pool.drawn.clear()
        inner = method.networks.at
        monkeypatch.setattr(
            method.networks, "at", lambda *a: asked.append(weights(net := inner(*a))) or net, raising=False
        )
        augmented = method.augmentation
        monkeypatch.setattr(
            method,
            "augmentation",
            lambda size, draws: asked.append(augmentation := augmented(size, draws)) or augmentation,
            raising=False,
        )
        state = distilled(method, pool, context)
        return list(pool.drawn), [repr(each) for each in asked], state

    drawn, asked, base = trace()
    assert trace(cmi=500.0, proxies="p")[:2] == (drawn, asked)
    assert not torch.equal(trace(cmi=500.0, proxies="p")[2].pixels, base.pixels)
    assert len(drawn) == 3 + 4 * 3
    assert len(asked) == 4 + 4 * 3
    assert len(set(map(repr, drawn))) == len(drawn)  # every class and step draws anew


def weights(network):
    return [float(p.double().sum()) for p in network.parameters()]


def test_the_callers_random_state_and_grad_mode_stay(pool):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    with torch.no_grad():
        distilled(dm(iterations=1), pool, context_of(3))
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)


def test_a_network_with_dropout_draws_the_same_after_a_kill(pool):
    """A step's draws inside of the network are keyed as all others."""

    class Dropping(Eager):
        def at(self, step, state, pool, context):
            network = super().at(step, state, pool, context)
            return torch.nn.Sequential(torch.nn.Dropout(0.3), network)

    found = []
    for stir in (1, 2):
        torch.manual_seed(stir)
        method = dm(iterations=2)
        method.networks = Dropping()
        found.append(distilled(method, pool, context_of(3)).pixels)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("damage", "named"),
    [({"lr_img": 1e30}, "lr_img"), ({"lr_img": 1e30, "cmi": 1.0, "proxies": "p"}, "cmi, now 1")],
)
def test_what_diverges_says_where_and_leaves_the_state(pool, proxies, damage, named):
    method, context = dm(**damage), context_of(3)
    state = method.begin(method.groups(3, 2)[0], pool, context)
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    with pytest.raises(DivergedError, match=r"at step 0 of 4: lower lr_img, now 1e\+30") as error:
        method.step(0, state, pool, context)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
    assert state.curve == []
    for name, tensor in before.items():
        assert torch.equal(state.tensors[name], tensor), name


def test_a_loss_that_is_not_a_number_leaves_the_state(pool):
    method, context = dm(), context_of(3)
    state = distilled(method, pool, context, steps=1)
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    inner = method.loss
    method.loss = lambda *arguments: inner(*arguments) * float("nan")
    with pytest.raises(DivergedError, match=r"^the loss of dm .* at step 1 of 4"):
        method.step(1, state, pool, context)
    assert len(state.curve) == 1
    assert all(torch.equal(state.tensors[name], tensor) for name, tensor in before.items())


def test_the_curve_has_every_step_and_the_variance_of_the_first_and_the_last(pool):
    method, context = dm(iterations=25), context_of(3, ipc=3)
    method.networks = Eager()
    state = method.begin(method.groups(3, 3)[0], pool, context)
    begun = state.pixels.clone()
    distilled(method, pool, context, state=state)
    assert [row["step"] for row in state.curve] == list(range(25))
    assert all(row["gradient_norm"] > 0 for row in state.curve)
    measured = [int(row["step"]) for row in state.curve if "pixel_variance" in row]
    assert measured == [*range(0, 25, 2)]
    expected = begun.unflatten(0, (3, 3)).double().var(dim=1, correction=0).mean()
    assert state.curve[0]["pixel_variance"] == pytest.approx(float(expected), rel=1e-5)
    assert not any("cmi" in name for row in state.curve for name in row)


def test_a_network_with_batch_norm_sees_the_real_images_of_all_classes_at_once(pool, monkeypatch):
    from ddfast.methods.matching import objectives

    monkeypatch.setattr(objectives, "MICRO_BATCH", 5)
    seen = []
    inner = objectives.features
    monkeypatch.setattr(objectives, "features", lambda net, x: (seen.append(len(x)), inner(net, x))[1])
    distilled(dm(iterations=1, arch="convnet3"), pool, context_of(3))
    assert seen == [18, 6]


def test_bfloat16_is_what_the_context_says(pool):
    plain = distilled(dm(iterations=1), pool, context_of(3))
    rough = distilled(dm(iterations=1), pool, context_of(3, precision="bfloat16"))
    assert rough.pixels.dtype == torch.float32
    assert 0 < relative(rough.pixels, plain.pixels) < 0.05


def test_digits_are_not_mirrored(pool):
    draws = [dm(flip=False).augmentation((16, 16), generator("flip", n)).operation for n in range(60)]
    assert set(draws) == set(DSA) - {"flip"}
    draws = [dm().augmentation((16, 16), generator("flip", n)).operation for n in range(60)]
    assert set(draws) == set(DSA)


def test_a_class_of_which_too_few_files_can_be_read(pool):
    method, context = dm(real_batch=9), context_of(3)
    state = method.begin(method.groups(3, 2)[0], pool, context)
    with pytest.raises(
        UsageError, match="class 1 has 8 readable images, 9 are needed: lower real_batch to 8"
    ):
        method.step(0, state, pool, context)
    few = TensorPool((9, 1, 9), 16)
    with pytest.raises(UsageError, match="class 1 has 1 readable image, 2 are needed: lower ipc to 1"):
        method.begin(method.groups(3, 2)[0], few, context)
