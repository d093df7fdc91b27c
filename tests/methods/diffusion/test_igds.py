"""A step of IGDS against Algorithm 1 written down again, and what it refuses."""

import dataclasses
import math

import pytest
import torch

from ddfast.errors import DivergedError, UsageError
from ddfast.methods import get_method
from ddfast.methods.diffusion import igds as module
from ddfast.methods.diffusion.igds import IGDS
from ddfast.models.diffusion import load_prior
from ddfast.models.estimator import load_estimator
from ddfast.seeding import generator
from tests.methods.diffusion.conftest import CLASSES, SIZE, context_of, save_estimator, save_pipeline

STEPS = 4


def method_of(prior, estimator, **options):
    given = {
        name: str(path) for name, path in (("prior", prior), ("estimator", estimator)) if path is not None
    }
    return IGDS.from_options({**given, "steps": STEPS, **options})


def sampled(method, context, *, steps=None, state=None):
    state = state or method.begin(method.groups(context.classes, context.ipc)[0], None, context)
    for _ in range(method.steps - state.step if steps is None else steps):
        method.step(state.step, state, None, context)
        state.step += 1
    return state


def posterior(prior_folder, number, samples, labels, context):
    """x'_{t-1}, x_0, alpha bar_t and sigma_t^2 of 13.3 in float64, from the network's epsilon."""
    prior = load_prior(prior_folder)
    times = [round(value) for value in torch.linspace(0, 999, STEPS, dtype=torch.float64).tolist()][::-1]
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bars = torch.cumprod(1 - betas, dim=0)
    now = bars[times[number]]
    before = bars[times[number + 1]] if number + 1 < STEPS else torch.tensor(1.0, dtype=torch.float64)
    alpha = now / before
    with torch.no_grad():
        timestep = torch.tensor(times[number]).expand(len(samples))
        epsilon = prior.denoiser(samples, timestep, class_labels=labels).sample.double()
    x = samples.double()
    score = -epsilon / (1 - now).sqrt()
    clean = ((x + (1 - now) * score) / now.sqrt()).clamp(-1, 1)
    mean = alpha.sqrt() * (1 - before) / (1 - now) * x + before.sqrt() * (1 - alpha) / (1 - now) * clean
    variance = (1 - before) / (1 - now) * (1 - alpha)
    each = len(samples) // len(CLASSES)
    noise = [
        torch.randn(each, *samples.shape[1:], generator=generator(context.seed, "noise", label, number))
        for label in range(len(CLASSES))
    ]
    z = torch.cat(noise).double() if number + 1 < STEPS else 0
    return mean + variance.sqrt() * z, clean, float(now), float(variance)


@pytest.mark.parametrize("number", [0, 2, 3])
def test_a_step_without_guidance_is_the_posterior(prior, estimator, number):
    context = context_of()
    method = method_of(prior, estimator, eta=0.0)
    state = sampled(method, context, steps=number)
    samples = state.tensors["samples"]
    labels = torch.arange(3).repeat_interleave(4)
    after, _ = method._sampled(number, samples, labels, state.group, context)
    wanted, _, _, _ = posterior(prior, number, samples, labels, context)
    torch.testing.assert_close(after.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("schedule", ["variance", "constant", "step"])
def test_guidance_is_eta_times_the_gradient(prior, estimator, literal, schedule):
    context, beta, clip = context_of(), 0.5, 2.0
    settings = {"eta": 0.7, "eta_schedule": schedule, "beta": beta, "clip": clip, "literal": literal}
    method = method_of(prior, estimator, unguided=False, **settings)
    state = sampled(method, context, steps=1)
    samples, labels = state.tensors["samples"].clone(), torch.arange(3).repeat_interleave(4)
    plain, clean, bar, variance = posterior(prior, 1, samples, labels, context)
    leaf = (plain if literal else clean).float().requires_grad_()
    with torch.enable_grad():
        projections, logits = load_estimator(estimator).read(leaf)
        spread = torch.softmax(projections / 0.07, dim=1)
        centre = spread.unflatten(0, (3, 4)).mean(dim=1).repeat_interleave(4, dim=0)
        kl = (spread * (spread.log() - centre.log())).sum()
        total = logits.log_softmax(dim=1).gather(1, labels[:, None]).sum() + beta * kl
    (gradient,) = torch.autograd.grad(total, leaf)
    gradient = gradient.double() if literal else gradient.double() / math.sqrt(bar)

    def lengths(x):
        return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    gradient = gradient * (clip / lengths(gradient)).clamp(max=1.0)
    eta = {
        "variance": 0.7 * variance,
        "constant": 0.7,
        "step": 0.7 * lengths(plain - samples.double()) / lengths(gradient),
    }[schedule]
    sampled(method, context, steps=1, state=state)
    moved = state.tensors["samples"].double() - plain
    torch.testing.assert_close(moved, eta * gradient, rtol=2e-2, atol=2e-5)
    row = state.curve[-1]
    assert row["information"] == pytest.approx(
        math.log(3) + float((total - beta * kl).detach()) / 12, rel=1e-3
    )
    assert row["context"] == pytest.approx(float(kl.detach()) / 12, rel=1e-3, abs=1e-6)
    assert row["loss"] == pytest.approx(-row["information"] - beta * row["context"])


def test_unguided_is_what_eta_0_samples_from_the_same_noise(prior, estimator):
    context = context_of(ipc=2)
    guided = sampled(method_of(prior, estimator, eta=5.0), context)
    plain = sampled(method_of(prior, estimator, eta=0.0), context)
    assert torch.equal(guided.tensors["before"], plain.tensors["pixels"])
    assert not torch.equal(guided.tensors["pixels"], plain.tensors["pixels"])
    assert "before" not in plain.tensors
    alone = sampled(method_of(prior, estimator, eta=5.0, unguided=False), context)
    assert torch.equal(alone.tensors["pixels"], guided.tensors["pixels"])
    assert "before" not in alone.tensors


def test_guidance_raises_what_it_is_guided_by(prior, estimator):
    context = context_of(ipc=2)
    options = {"eta": 0.3, "eta_schedule": "step", "clip": 0.0, "steps": 8}
    plain = sampled(method_of(prior, estimator, beta=0.0, **options), context).curve[-1]
    wide = sampled(method_of(prior, estimator, beta=50.0, **options), context).curve[-1]
    assert plain["information"] > plain["unguided_information"]
    assert wide["context"] > wide["unguided_context"]
    assert wide["context"] > plain["context"]


def test_classes_are_sampled_alike_alone_and_together(prior, estimator):
    context = context_of()
    together = sampled(method_of(prior, estimator), context)
    alone = method_of(prior, estimator, class_batch=1)
    for group in alone.groups(3, 1):
        state = sampled(alone, context, state=alone.begin(group, None, context))
        torch.testing.assert_close(
            state.pixels, together.pixels[group.number : group.number + 1], rtol=1e-3, atol=1e-4
        )


def test_pieces_change_nothing(prior, estimator, monkeypatch):
    context = context_of(ipc=3)
    whole = sampled(method_of(prior, estimator, beta=0.5), context)
    monkeypatch.setitem(module._ROWS, "cpu", 8)
    pieces = sampled(method_of(prior, estimator, beta=0.5), context)
    torch.testing.assert_close(pieces.pixels, whole.pixels, rtol=1e-3, atol=1e-4)


def test_fewer_go_through_at_once_the_larger_they_are(prior, estimator):
    method = method_of(prior, estimator)
    sizes = {16: 64, 64: 64, 128: 16, 224: 4, 256: 4, 512: 4}
    assert {size: method._rows(dataclasses.replace(context_of(), image_size=size)) for size in sizes} == sizes


def test_images_are_composed_of_four_samples_at_half_size(prior, estimator):
    context, method = context_of(ipc=2), method_of(prior, estimator)
    state = sampled(method, context, steps=STEPS - 1)
    made = {}
    finished = method._finished
    method._finished = lambda tensors, context: made.update(tensors) or finished(tensors, context)
    sampled(method, context, state=state)
    assert state.pixels.shape == (6, 3, SIZE, SIZE)
    assert 0 <= float(state.pixels.min()) <= float(state.pixels.max()) <= 1
    clean = (made["samples"] / 2 + 0.5).clamp(0, 1)
    small = torch.nn.functional.interpolate(
        clean, size=SIZE // 2, mode="bilinear", antialias=True, align_corners=False
    ).clamp(0, 1)
    for image in range(6):
        rows = [torch.cat(list(small[4 * image + 2 * row :][:2]), dim=-1) for row in range(2)]
        torch.testing.assert_close(state.pixels[image], torch.cat(rows, dim=-2), rtol=0, atol=1e-5)


def test_factor_1_keeps_the_samples(prior, estimator):
    assert sampled(method_of(prior, estimator), context_of(factor=1, ipc=2)).pixels.shape == (6, 3, 16, 16)
    method = method_of(prior, estimator)
    assert [method.tiles_per_side(given, 32) for given in ("auto", "1", "2")] == [2, 1, 2]
    assert method.tiles_per_side("auto", 25) == 1


def test_beta_grows_with_ipc_and_has_schedules(prior, estimator):
    method = method_of(prior, estimator)
    assert [method.beta_at(0, ipc) for ipc in (1, 9, 10, 49, 50, 100)] == [0, 0, 0.1, 0.1, 0.5, 0.5]
    rising = method_of(prior, estimator, beta=0.6, beta_schedule="rising")
    falling = method_of(prior, estimator, beta=0.6, beta_schedule="falling")
    assert [rising.beta_at(step, 1) for step in range(4)] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert [falling.beta_at(step, 1) for step in range(4)] == pytest.approx([0.6, 0.4, 0.2, 0])


def test_bfloat16_samples_nearly_the_same(prior, estimator):
    method = method_of(prior, estimator)
    exact = sampled(method, context_of())
    rough = sampled(method, context_of(precision="bfloat16"))
    assert rough.pixels.dtype == torch.float32
    assert not torch.equal(exact.pixels, rough.pixels)
    assert (exact.pixels - rough.pixels).abs().mean() < 0.05


def test_the_priors_network_gets_no_backward_pass(prior, estimator):
    method, context = method_of(prior, estimator), context_of()
    state = method.begin(method.groups(3, 1)[0], None, context)
    recorded = []
    hook = method._prior.denoiser.register_forward_hook(
        lambda module, inputs, output: recorded.append(torch.is_grad_enabled() or output[0].requires_grad)
    )
    sampled(method, context, state=state)
    hook.remove()
    assert recorded == [False] * (2 * STEPS)


def test_nan_names_the_step_and_keeps_the_state(prior, estimator, monkeypatch):
    method, context = method_of(prior, estimator), context_of()
    state = sampled(method, context, steps=2)
    held = {name: value.clone() for name, value in state.tensors.items()}
    read = method._read
    monkeypatch.setattr(method, "_read", lambda samples: tuple(x * torch.nan for x in read(samples)))
    with pytest.raises(
        DivergedError,
        match=r"of igds would no longer be finite at step 2 of 4: lower eta, now 3, or clip; what",
    ):
        method.step(2, state, None, context)
    assert all(torch.equal(state.tensors[name], value) for name, value in held.items())
    assert len(state.curve) == 2


def test_classes_of_a_larger_prior_and_estimator_are_found_by_name(prior, estimator, tmp_path):
    """A subset of what they know, in another order, is sampled as those classes."""
    named = save_pipeline(tmp_path / "named")
    (named / "prior.json").write_text('{"class_names": ["across", "down", "rising"]}')
    method = method_of(named, estimator)
    context = context_of(classes=("rising", "across"))
    sampled(method, context)
    assert method._labels == [2, 0]
    assert method._places == [2, 0]


def test_a_file_says_which_classes_of_the_prior_are_meant(prior, estimator, tmp_path):
    named = save_pipeline(tmp_path / "named")
    (named / "prior.json").write_text('{"class_names": ["sideways", "down", "up"]}')
    (tmp_path / "classes.txt").write_text("rising\tup\nacross\tsideways\n")
    context = context_of(classes=("rising", "across"))
    method = method_of(named, estimator, prior_classes=tmp_path / "classes.txt")
    sampled(method, context)
    assert method._labels == [2, 0]
    held = method.inputs()["prior_classes"]
    (tmp_path / "classes.txt").write_text("rising 1\nacross sideways\n")
    method = method_of(named, estimator, prior_classes=tmp_path / "classes.txt")
    sampled(method, context)
    assert method._labels == [1, 0]
    assert method.inputs()["prior_classes"] != held
    gone = method_of(named, estimator, prior_classes=tmp_path / "gone.txt")
    assert "gone.txt cannot be read" in refused(gone, context)


@pytest.mark.parametrize(("ipc", "beta"), [(1, 0.0), (10, 0.1), (50, 0.5)])
def test_beta_is_fixed_by_the_images_of_a_class(prior, estimator, ipc, beta):
    assert method_of(prior, estimator).resolved(2, ipc).options.beta == beta
    assert method_of(prior, estimator, beta=0.3).resolved(2, ipc).options.beta == 0.3


def test_beta_is_refused_where_a_class_has_one_sample(prior, estimator):
    method_of(prior, estimator, beta=0.1).resolved(2, 1).check_ipc(1)
    method_of(prior, estimator).resolved(1, 1).check_ipc(1)
    with pytest.raises(UsageError, match="single sample, so beta would do nothing"):
        method_of(prior, estimator, beta=0.1).resolved(1, 1).check_ipc(1)


def test_without_guidance_the_information_is_taken_in_some_steps_alone(prior, estimator, monkeypatch):
    method = method_of(prior, estimator, eta=0.0, steps=100)
    monkeypatch.setattr(method, "is_noted", lambda number, times: number in (0, 99))
    rows = sampled(method, context_of()).curve
    assert [int(row["step"]) for row in rows if "information" in row] == [0, 99]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, "beta must be at least 0, got -0.1"),
        ({"eta": -1.0}, "eta must be at least 0"),
        ({"clip": -1.0}, "clip must be at least 0"),
        ({"beta": float("nan")}, "beta must be at least 0, got nan"),
        ({"eta": float("inf")}, "eta must be a"),
        ({"cfg": -1.0}, "cfg must be at least 0"),
        ({"steps": 1}, "steps must be at least 2"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"class_batch": 0}, "class_batch must be at least 1"),
        ({"eta_schedule": "linear"}, "eta_schedule must be one of variance, step, constant"),
        ({"beta_schedule": "up"}, "beta_schedule must be one of constant, rising, falling"),
    ],
)
def test_bad_options_are_refused(prior, estimator, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        method_of(prior, estimator, **options)
    assert "\n" not in str(caught.value)


def opened(method, context):
    method.check(SIZE)
    method.inputs()
    method.open(context)


def refused(method, context):
    with pytest.raises(UsageError) as caught:
        opened(method, context)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_prior_that_does_not_fit_is_refused(prior, estimator, tmp_path):
    context = context_of()
    four = save_pipeline(tmp_path / "four", num_class_embeds=4)
    assert "knows 4 classes, the run has 3" in refused(method_of(four, estimator), context)
    large = save_pipeline(tmp_path / "large", sample_size=32)
    said = refused(method_of(large, estimator), context)
    assert "makes images of 32 px, the run has 16 px: give image_size=32" in said
    (prior_of_others := save_pipeline(tmp_path / "others")).joinpath("prior.json").write_text(
        '{"class_names": ["cat", "dog", "cow"]}'
    )
    assert "does not know the class across: it knows cat, dog, cow" in refused(
        method_of(prior_of_others, estimator), context
    )
    plain = save_pipeline(tmp_path / "plain", num_class_embeds=None)
    assert "knows no classes" in refused(method_of(plain, estimator, eta=0.0), context)
    assert sampled(method_of(plain, estimator), context).pixels.shape == (3, 3, 16, 16)
    assert "steps must lie in 2..1000" in refused(method_of(prior, estimator, steps=1001), context)
    assert "was not trained for classifier-free guidance" in refused(
        method_of(prior, estimator, cfg=2.0), context
    )
    assert "is no folder" in refused(method_of(tmp_path / "nowhere" / "x", estimator), context)
    assert "prior is missing" in refused(method_of(None, estimator), context)


def test_an_estimator_that_does_not_fit_is_refused(prior, tmp_path, monkeypatch):
    context = context_of()
    assert "estimator is missing: give a file" in refused(method_of(prior, None), context)
    others = save_estimator(tmp_path / "others.safetensors", class_names=["cat", "dog", "cow"])
    assert "does not know the class across" in refused(method_of(prior, others), context)
    assert "is no file" in refused(method_of(prior, tmp_path / "none.safetensors"), context)
    fine = save_estimator(tmp_path / "fine.safetensors")
    from ddfast.models.estimator import Encoder

    monkeypatch.setattr(Encoder, "features", lambda self, images: self.network(images).detach())
    assert "gives images no gradient (encoder convnet3_in)" in refused(method_of(prior, fine), context)


def test_an_estimator_of_another_size_is_fed_resized_images(prior, tmp_path):
    small = save_estimator(tmp_path / "small.safetensors", size=8)
    assert sampled(method_of(prior, small), context_of()).pixels.shape == (3, 3, 16, 16)


def test_it_is_listed_and_needs_no_teacher():
    method = get_method("igds")
    assert not method.requires_teacher()
    assert {"synthesize", "relabel", "teacher"} <= method.offers()
