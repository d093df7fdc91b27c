"""MTT: a whole step against its formula written down once more, runs that survive a kill, and what is refused."""

import functools
import json
import math

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional

import ddfast
from ddfast.cli import main
from ddfast.errors import DivergedError, UsageError
from ddfast.methods.matching.mtt import MTT
from ddfast.models import create_model
from ddfast.output import export_huggingface, export_webdataset
from ddfast.output.pixels import read_curve, read_pixels
from ddfast.output.whitening import Whitening, read_whitening
from ddfast.pipeline import judging, synthesize
from ddfast.seeding import generator
from ddfast.training import evaluation as evaluation_module
from ddfast.training import student as student_module
from ddfast.training import train_experts
from ddfast.training.differentiable import DSA, draw_one
from ddfast.training.experts import load_experts
from tests.conftest import digests
from tests.methods.matching.conftest import context_of

EPOCHS = 3
SETTINGS = {
    "ipc": 2,
    "iterations": 3,
    "image_size": 16,
    "arch": "convnet3_in",
    "syn_steps": 3,
    "expert_epochs": 1,
    "max_start_epoch": 2,
    "lr_img": 1.0,
    "lr_lr": 1e-9,
    "lr_student": 0.02,
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory, toy_folder):
    out = tmp_path_factory.mktemp("mtt") / "experts"
    return train_experts(
        toy_folder, count=2, epochs=EPOCHS, out=out, image_size=16, images_per_class=8, lr=0.02, quiet=True
    ).folder


@pytest.fixture(scope="module")
def proxies(tmp_path_factory, toy_folder):
    out = tmp_path_factory.mktemp("mtt") / "proxies"
    settings = {"arch": "convnet3_in", "images_per_class": 8, "image_size": 16, "quiet": True}
    return ddfast.training.train_proxies(toy_folder, count=1, epochs=1, out=out, **settings).folder


def distil(folder, experts, out, **settings):
    return ddfast.distill(
        "mtt", data=folder, out=out, experts=str(experts), quiet=True, **{**SETTINGS, **settings}
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, toy_folder, experts):
    return distil(toy_folder, experts, tmp_path_factory.mktemp("mtt") / "out")


# A step
# ----------------------------------------------------------------------------------------------------------


class Held:
    """Experts in memory: random weights, in float64."""

    whitening = None

    def __init__(self, network, epochs):
        draws = torch.Generator().manual_seed(7)
        start = {name: weight.detach().double() for name, weight in network.named_parameters()}
        moved = [
            {
                name: weight + 0.02 * epoch * torch.randn(weight.shape, generator=draws, dtype=torch.float64)
                for name, weight in start.items()
            }
            for epoch in range(epochs + 1)
        ]
        self._weights = moved

    def __len__(self):
        return 1

    def weights(self, expert, epoch):
        return self._weights[epoch]


def prepared(pool, **options):
    """A method in float64 with experts in memory, its context and its first state."""
    method = MTT.from_options(
        {
            "experts": "in memory",
            "iterations": 4,
            "syn_steps": 3,
            "expert_epochs": 2,
            "max_start_epoch": 3,
            **options,
        }
    )
    context = context_of(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = create_model("convnet3_in", 3, 16, width=8).double()
    method._experts = Held(network, 4)
    method._student._built = ((context.classes, context.image_size, context.device), network.train())
    state = method.begin(method.groups(3, 2)[0], pool, context)
    state.tensors = {name: tensor.double() for name, tensor in state.tensors.items()}
    return method, context, state, network


def expected_step(method, context, state, network, number):
    """Pixels, rate and their momenta after a step, by one graph of the whole training."""
    options = method.options
    draws = generator(context.seed, "expert", number)
    torch.randint(1, (), generator=draws)
    epoch = int(torch.randint(options.max_start_epoch, (), generator=draws))
    start = method._experts.weights(0, epoch)
    goal = method._experts.weights(0, epoch + options.expert_epochs)
    pixels = state.pixels.clone().requires_grad_()
    rate = state.tensors["learned_rate"].clone().requires_grad_()
    labels = torch.arange(3).repeat_interleave(2)
    weights = {name: weight.clone().requires_grad_() for name, weight in start.items()}
    orders, waiting = generator(context.seed, "order", number), []
    for inner in range(options.syn_steps):
        waiting = waiting or list(torch.randperm(6, generator=orders).split(options.batch_syn or 6))
        places = waiting.pop(0)
        augment = draw_one(DSA, len(places), (16, 16), generator(context.seed, "augment", number, inner))
        loss = functional.cross_entropy(
            functional_call(network, weights, (augment(pixels[places]),)), labels[places]
        )
        found = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {n: w - rate * g for (n, w), g in zip(weights.items(), found, strict=True)}
    left = sum((weights[name] - goal[name]).square().sum() for name in goal)
    loss = left / sum((start[name] - goal[name]).square().sum() for name in goal)
    of_pixels, of_rate = torch.autograd.grad(loss, [pixels, rate])
    momentum = options.momentum * state.tensors["momentum"] + of_pixels
    rate_momentum = options.momentum * state.tensors["learned_rate_momentum"] + of_rate
    return {
        "loss": loss.detach(),
        "pixels": state.pixels - options.lr_img * momentum,
        "momentum": momentum,
        "learned_rate": rate.detach() - options.lr_lr * rate_momentum,
        "learned_rate_momentum": rate_momentum,
    }


@pytest.mark.parametrize(
    "options", [{}, {"batch_syn": 4, "syn_steps": 5}, {"momentum": 0.9, "lr_lr": 1e-3}], ids=str
)
def test_steps_are_the_papers(pool, options):
    method, context, state, network = prepared(pool, **options)
    for number in range(2):
        wanted = expected_step(method, context, state, network, number)
        loss = method.step(number, state, pool, context)
        assert math.isclose(loss, wanted.pop("loss").item(), rel_tol=1e-10)
        for name, tensor in wanted.items():
            torch.testing.assert_close(state.tensors[name], tensor, rtol=1e-8, atol=1e-14, msg=name)
    assert [row["step"] for row in state.curve] == [0, 1]


def test_unroll_decides_the_gradient(pool):
    moved = {}
    for unroll in ("exact", "truncated:1", "detached"):
        method, context, state, _ = prepared(pool, unroll=unroll, lr_student=0.05)
        before = state.pixels
        method.step(0, state, pool, context)
        moved[unroll] = state.pixels - before
    for other in ("truncated:1", "detached"):
        assert (moved["exact"] - moved[other]).norm() > 1e-4 * moved["exact"].norm()


def test_a_starting_epoch_is_drawn_from_all_that_are_allowed(pool):
    method, context, _, _ = prepared(pool)
    starts = []
    method._experts.weights = lambda expert, epoch: starts.append(epoch) or {}
    for number in range(40):
        method._drawn(number, context)
    assert set(starts[::2]) == {0, 1, 2}
    assert [goal - start for start, goal in zip(starts[::2], starts[1::2], strict=True)] == [2] * 40


class Constant:
    """CMI whose gradient is that of a sum of squares."""

    def value_and_gradient(self, images, step, seed, *, wanted=True):
        images = images.detach()
        return images.square().sum(), 2 * images if wanted else None


def test_cmi_is_weighed_by_the_first_steps_gradients_and_then_fixed(pool):
    method, context, state, _ = prepared(pool, cmi=0.2, proxies="in memory", lr_img=0.01)
    plain_method, _, plain, _ = prepared(pool, lr_img=0.01)
    method._regulariser = Constant()
    begun = state.pixels
    method.step(0, state, pool, context)
    plain_method.step(0, plain, pool, context)
    added = state.tensors["momentum"] - plain.tensors["momentum"]
    gradient = plain.tensors["momentum"]
    assert math.isclose(added.norm() / gradient.norm(), 0.2, rel_tol=1e-6)
    torch.testing.assert_close(added / added.norm(), begun / begun.norm(), rtol=1e-6, atol=1e-9)
    scale = state.tensors["cmi_scale"].clone()
    assert scale > 0
    method.step(1, state, pool, context)
    assert state.tensors["cmi_scale"] == scale
    assert math.isclose(state.curve[0]["cmi_gradient_norm"], added.norm().item(), rel_tol=1e-6)


@pytest.mark.parametrize("change", [{"lr_img": 1e300}, {"lr_lr": 1e12}, {"lr_student": 1e200}], ids=str)
def test_what_diverges_keeps_the_last_good_state(pool, change):
    method, context, state, _ = prepared(pool, **change)
    before: dict = {}

    def steps():
        for number in range(4):
            before.update({name: tensor.clone() for name, tensor in state.tensors.items()})
            method.step(number, state, pool, context)

    with pytest.raises(DivergedError, match=r"at step \d of 4: lower .*; what was made before") as error:
        steps()
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.tensors.items())
    assert all(tensor.isfinite().all() for tensor in state.tensors.values())


# A run
# ----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_set_with_its_learning_rate(undisturbed, experts):
    pixels = read_pixels(undisturbed)
    assert pixels.images.shape == (6, 3, 16, 16)
    assert pixels.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert pixels.learned_rate > 0
    assert pixels.learned_rate != SETTINGS["lr_student"]
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert [row["file"] for row in manifest["inputs"]["experts"]] == [
        "expert-00000.safetensors",
        "expert-00001.safetensors",
    ]
    assert "experts" not in manifest["options"]["synthesize"]
    assert "real_batch" not in manifest["options"]["synthesize"]
    curve = read_curve(undisturbed)
    assert [(row["group"], row["step"]) for row in curve] == [(0, 0), (0, 1), (0, 2)]
    assert curve[0]["learned_rate"] == SETTINGS["lr_student"]  # before the step
    assert curve[1]["learned_rate"] != curve[2]["learned_rate"] != pixels.learned_rate


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_stops_anywhere_resumes_to_the_same_bytes(
    stop, undisturbed, toy_folder, experts, tmp_path, monkeypatch
):
    monkeypatch.setattr(synthesize, "_SAVE_SECONDS", 0.0)
    steps, step = [], MTT.step

    def stopping(self, *arguments):
        if len(steps) == stop:
            raise KeyboardInterrupt
        steps.append(arguments[0])
        return step(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(MTT, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            distil(toy_folder, experts, tmp_path / "out")
    distil(toy_folder, experts, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(undisturbed)


def test_cmi_moves_the_pixels_and_survives_a_kill(
    toy_folder, experts, proxies, undisturbed, tmp_path, monkeypatch
):
    settings = {"cmi": 0.3, "proxies": str(proxies), "cmi_every": 2}
    whole = distil(toy_folder, experts, tmp_path / "whole", **settings)
    assert not torch.equal(read_pixels(whole).images, read_pixels(undisturbed).images)
    row = read_curve(whole)[0]
    assert math.isclose(row["cmi_gradient_norm"], 0.3 * row["gradient_norm"], rel_tol=1e-4)
    monkeypatch.setattr(synthesize, "_SAVE_SECONDS", 0.0)
    steps, step = [], MTT.step

    def stopping(self, *arguments):
        if steps:
            raise KeyboardInterrupt
        steps.append(arguments[0])
        return step(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(MTT, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            distil(toy_folder, experts, tmp_path / "out", **settings)
    distil(toy_folder, experts, tmp_path / "out", resume=True, **settings)
    assert digests(tmp_path / "out") == digests(whole)


def test_students_take_the_learned_rate_under_dsa_alone(undisturbed, toy_folder, monkeypatch):
    rates = []
    original = student_module.constant
    monkeypatch.setattr(student_module, "constant", lambda rate: rates.append(rate) or original(rate))
    for protocol in ("dsa", "dc"):
        ddfast.evaluate(undisturbed, toy_folder, protocol=protocol, epochs=1, seeds=1, quiet=True)
    assert rates[0] == read_pixels(undisturbed).learned_rate
    assert rates[-1] == pytest.approx(0.01)


def test_the_learned_rate_belongs_to_the_digest_of_the_images(undisturbed):
    from dataclasses import replace

    from ddfast.training.evaluation import read_distilled
    from ddfast.training.recipe import data_digests

    images = read_distilled(undisturbed)
    test = ddfast.training.ImageSet(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1).long())
    found = {
        data_digests(replace(images, learned_rate=rate), "hard", None, test)["images"]
        for rate in (None, 0.1, 0.2)
    }
    assert len(found) == 3


@pytest.fixture(scope="module")
def whitened_experts(tmp_path_factory, toy_folder):
    settings = {"image_size": 16, "images_per_class": 8, "lr": 0.02, "quiet": True, "zca": True}
    return train_experts(
        toy_folder, count=1, epochs=1, out=tmp_path_factory.mktemp("mtt") / "zca", **settings
    ).folder


def test_whitening_goes_with_the_set(toy_folder, whitened_experts, proxies, tmp_path, monkeypatch):
    settings = {"normalization": "none", "max_start_epoch": 1, "iterations": 1}
    out = distil(toy_folder, whitened_experts, tmp_path / "still", lr_img=1e-30, **settings)
    held = (whitened_experts / "zca.safetensors").read_bytes()
    assert (out / "zca.safetensors").read_bytes() == held
    pixels, whitening = read_pixels(out), read_whitening(out)
    # What it begins with are real images, whitened; its pictures are those images.
    shown = whitening.undone(pixels.images) * 255
    torch.testing.assert_close(shown, shown.round(), atol=2e-2, rtol=0)
    opened = ddfast.DistilledSet(out)
    pictures = torch.stack([opened[place][0] for place in range(6)])
    assert torch.equal(pictures, shown.round().clamp(0, 255).to(torch.uint8))
    floats = ddfast.DistilledSet(out, float=True)
    torch.testing.assert_close(floats[4][0], pictures[4] / 255, atol=1e-4, rtol=0)

    seen = []
    original = evaluation_module.train_student

    def watched(images, test, **how):
        seen.append((images.images, test.images))
        return original(images, test, **how)

    monkeypatch.setattr(evaluation_module, "train_student", watched)
    for rounded in (False, True):
        ddfast.evaluate(out, toy_folder, protocol="dsa", epochs=1, seeds=1, quiet=True, rounded=rounded)
    assert torch.equal(seen[0][0], pixels.images)
    torch.testing.assert_close(seen[1][0], whitening(pictures), atol=1e-5, rtol=1e-5)
    for _, test in seen:
        assert test.dtype == torch.float32
        back = whitening.undone(test) * 255
        torch.testing.assert_close(back, back.round(), atol=2e-2, rtol=0)
    export_webdataset(out, tmp_path / "shards" / "all.tar")
    export_huggingface(out, tmp_path / "hub")
    for folder in ("shards", "hub"):
        assert (tmp_path / folder / "zca.safetensors").read_bytes() == held
    with pytest.raises(UsageError, match="trained on whitened images: give normalization='none'"):
        distil(toy_folder, whitened_experts, tmp_path / "out", max_start_epoch=1)


def test_students_are_judged_on_the_way(toy_folder, whitened_experts, tmp_path, monkeypatch):
    quick = functools.partial(ddfast.evaluate, epochs=1)
    monkeypatch.setattr(judging, "evaluate", quick)
    settings = {"normalization": "none", "max_start_epoch": 1, "iterations": 2, "evaluate_every": 1}
    out = distil(toy_folder, whitened_experts, tmp_path / "out", **settings)
    assert all(row["accuracy"] is not None for row in read_curve(out))
    told = json.loads((out / "manifest.json").read_text())["accuracy"]
    assert told["float32"]["images"] == "pixels, float32"
    assert told["8 bits"]["images"] == "8 bits"
    # What the folder gives students is what was judged.
    again = ddfast.evaluate(out, toy_folder, protocol="dsa", epochs=1, seeds=[0], quiet=True)
    assert again.top1 == told["float32"]["top1"]
    assert again.digests["images"] == told["float32"]["digests"]["images"]
    rounded = ddfast.evaluate(out, toy_folder, protocol="dsa", epochs=1, seeds=[0], quiet=True, rounded=True)
    assert rounded.digests["images"] == told["8 bits"]["digests"]["images"]


def test_cmi_sees_whitened_pixels_as_pictures(pool):
    method, context, state, _ = prepared(pool, cmi=0.2, proxies="in memory")
    draws = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (30, 3, 16, 16), generator=draws).byte()
    method._experts.whitening = Whitening.fit(images)
    state.tensors["pixels"] = method._experts.whitening(images[:6].double() / 255)
    looked = []

    class Looking(Constant):
        def value_and_gradient(self, images, step, seed, *, wanted=True):
            looked.append(images.detach())
            return super().value_and_gradient(images, step, seed, wanted=wanted)

    method._regulariser = Looking()
    method.step(0, state, pool, context)
    torch.testing.assert_close(looked[0].flatten(0, 1), images[:6].double() / 255, atol=1e-4, rtol=0)


def test_the_command(toy_folder, experts, tmp_path, capsys):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    words = ["distill", "mtt", "--data", str(toy_folder), "--out", str(tmp_path / "out"), "--quiet", *flags]
    assert main(words) == 2
    assert "mtt needs --experts" in capsys.readouterr().err
    assert main([*words, "--experts", str(experts), "--unroll", "truncated:2"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["options"]["synthesize"]["unroll"] == "truncated:2"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": "nowhere"}, "nowhere is no folder: give one that"),
        (
            {"max_start_epoch": 4},
            r"has 3 epochs, the run goes to epoch 4 \(max_start_epoch - 1 \+ expert_epochs\)",
        ),
        ({"arch": "convnet3"}, "convnet3 has BatchNorm.*take convnet3_in"),
        ({"arch": "alexnet_in"}, "is a convnet3_in, wanted alexnet_in"),
        ({"image_size": 8}, "takes images of 16 px, the run has 8 px"),
        ({"normalization": "cifar10"}, "normalised by"),
        ({"ipc": 10_000}, r"init='real' begins with 10000 different images of a class, but .* has 6"),
        ({"unroll": "truncated:x"}, "unroll must be exact, truncated:K with K of at least 1, or detached"),
        ({"syn_steps": 0}, "syn_steps must be at least 1"),
        ({"batch_syn": -1}, "batch_syn must be at least 0"),
        ({"lr_student": 0}, "lr_student must be positive"),
        ({"cmi": 0.1}, "cmi 0.1 needs proxies"),
        ({"real_batch": 8}, "has no option 'real_batch'"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_nothing(settings, message, toy_folder, experts, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        ddfast.distill(
            "mtt",
            data=toy_folder,
            out=tmp_path / "out",
            quiet=True,
            **{"experts": str(experts), **SETTINGS, **settings},
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_experts_of_other_classes_are_one_line(experts, tmp_path, toy_folder):
    data = tmp_path / "data"
    for split in ("train", "test"):
        (data / split).mkdir(parents=True)
        for place, folder in enumerate(sorted((toy_folder / split).iterdir())):
            (data / split / f"other{place}").symlink_to(folder)
    with pytest.raises(UsageError, match="as class 0, the run has 'other0'"):
        distil(data, experts, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_presets_are_runs_that_experts_of_50_epochs_serve():
    for name in MTT.presets:
        options = MTT.from_options({}, name).options
        assert options.max_start_epoch - 1 + options.expert_epochs <= 50


def test_experts_are_read_as_they_are(experts, toy_folder):
    import numpy as np

    found = load_experts(
        experts,
        class_names=sorted(path.name for path in (toy_folder / "train").iterdir()),
        image_size=16,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        arch="convnet3_in",
        epochs=EPOCHS,
    )
    start, end = found.weights(0, 0), found.weights(0, EPOCHS)
    assert np.mean([float((start[name] - end[name]).abs().max()) for name in start]) > 0
