"""The drop-ins for the reference repository of dataset condensation, against the same written out by hand."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ddfast
from ddfast.condensation import DiffAugment, ParamDiffAug, match_loss
from ddfast.errors import UsageError

DSA = "color_crop_cutout_flip_scale_rotate"
EXAMPLE = Path(__file__).parent.parent / "examples" / "condensation.py"


def by_hand(x, strategy, seed, param):
    """The reference's augmentation: every draw for as many images as there are, behind a seed where there is one."""
    state = SimpleNamespace(seed=seed)

    def drawn(draw):
        if seed != -1:
            torch.manual_seed(state.seed)
            state.seed += 1
        values = draw((len(x), 1, 1, 1))
        return values[:1].expand_as(values) if seed != -1 else values

    def uniform():
        return drawn(torch.rand)

    def whole(low, high):
        return drawn(lambda shape: torch.randint(low, high, shape[:3])).flatten().tolist()

    def warped(x, theta):
        grid = F.affine_grid(torch.stack(theta).float(), x.shape, align_corners=False)
        return F.grid_sample(x, grid, align_corners=False)

    def color(x):
        x = x + (uniform() - 0.5) * param.brightness
        grey = x.mean(1, keepdim=True)
        x = (x - grey) * (uniform() * param.saturation) + grey
        mean = x.mean((1, 2, 3), keepdim=True)
        return (x - mean) * (uniform() + param.contrast) + mean

    def crop(x):
        most = [int(side * param.ratio_crop_pad + 0.5) for side in x.shape[2:]]
        downs, acrosses = (whole(-m, m + 1) for m in most)
        out = x * 0
        for n, i, j in np.ndindex(len(x), *x.shape[2:]):
            a, b = i + downs[n], j + acrosses[n]
            if 0 <= a < x.shape[2] and 0 <= b < x.shape[3]:
                out[n, :, i, j] = x[n, :, a, b]
        return out

    def cutout(x):
        cut = [int(side * param.ratio_cutout + 0.5) for side in x.shape[2:]]
        centres = [whole(0, side + 1 - c % 2) for side, c in zip(x.shape[2:], cut, strict=True)]
        mask = torch.ones_like(x)
        for n, (i, j) in enumerate(zip(*centres, strict=True)):
            top, left = i - cut[0] // 2, j - cut[1] // 2
            mask[n, :, max(top, 0) : max(top + cut[0], 0), max(left, 0) : max(left + cut[1], 0)] = 0
        return x * mask

    def flip(x):
        return torch.where(uniform() < param.prob_flip, x.flip(3), x)

    def scale(x):
        most = param.ratio_scale
        across, down = (
            drawn(lambda s: torch.rand(s[0])) * (most - 1.0 / most) + 1.0 / most for _ in range(2)
        )
        return warped(x, [torch.tensor([[a, 0, 0], [0, d, 0]]) for a, d in zip(across, down, strict=True)])

    def rotate(x):
        angles = (drawn(lambda s: torch.rand(s[0])) - 0.5) * 2 * param.ratio_rotate / 180 * float(np.pi)
        turns = [[[t.cos(), (-t).sin(), 0], [t.sin(), t.cos(), 0]] for t in angles]
        return warped(x, [torch.tensor(turn) for turn in turns])

    known = {
        "color": color,
        "crop": crop,
        "cutout": cutout,
        "flip": flip,
        "scale": scale,
        "rotate": rotate,
    }
    names = strategy.split("_")
    if param.aug_mode == "S":
        if seed != -1:
            torch.manual_seed(state.seed)
            state.seed += 1
        names = [names[torch.randint(0, len(names), size=(1,)).item()]]
    for name in names:
        x = known[name](x)
    return x.contiguous()


def distance_by_hand(syn, real, metric):
    if metric == "ours":
        total = torch.tensor(0.0)
        for a, b in zip(real, syn, strict=True):
            if a.ndim > 1:
                for row_a, row_b in zip(a.flatten(1), b.flatten(1), strict=True):
                    total = total + 1 - (row_a @ row_b) / (row_a.norm() * row_b.norm() + 1e-6)
        return total
    a, b = (torch.cat([each.flatten() for each in grads]) for grads in (real, syn))
    return ((b - a) ** 2).sum() if metric == "mse" else 1 - (a @ b) / (a.norm() * b.norm() + 1e-6)


def param_of(**changed):
    param = ParamDiffAug()
    vars(param).update(changed)
    return param


def assert_same(x, strategy, seed, **changed):
    """The same images, gradients and state of the generator, from the same state or seed."""
    found, states = [], []
    for function in (DiffAugment, by_hand):
        torch.manual_seed(11)
        leaf = x.clone().requires_grad_()
        made = function(leaf, strategy, seed, param_of(**changed))
        states.append(torch.get_rng_state())
        grad = torch.randn(made.shape, generator=torch.Generator().manual_seed(5))
        found.append((made.detach(), torch.autograd.grad(made, leaf, grad)[0]))
        assert made.is_contiguous()
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(*states)


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", [-1, 0, 3, 9, 12345])
@pytest.mark.parametrize("strategy", [DSA, *DSA.split("_")])
def test_one_operation_a_call(strategy, seed):
    assert_same(images(5, 3, 8, 8), strategy, seed)
    assert_same(images(3, 1, 7, 10), strategy, seed)


@pytest.mark.parametrize("seed", [-1, 4])
@pytest.mark.parametrize(
    "strategy", [DSA, "cutout_flip", "rotate_scale_color", "crop_crop", "color_crop_flip_scale_rotate"]
)
def test_all_operations_in_their_order(strategy, seed):
    assert_same(images(4, 3, 9, 8), strategy, seed, aug_mode="M")


@pytest.mark.parametrize("seed", [-1, 7])
@pytest.mark.parametrize(
    ("strategy", "changed"),
    [
        ("scale", {"ratio_scale": 3.0}),
        ("rotate", {"ratio_rotate": 180.0}),
        ("crop", {"ratio_crop_pad": 1.5}),
        ("crop", {"ratio_crop_pad": 0.0}),
        ("cutout", {"ratio_cutout": 1.0}),
        ("cutout", {"ratio_cutout": 0.0}),
        ("cutout", {"ratio_cutout": 0.3}),
        ("flip", {"prob_flip": 1.0}),
        ("color", {"brightness": 3.0, "saturation": 0.0, "contrast": 0.0}),
    ],
)
def test_strengths_are_those_of_the_parameters(strategy, changed, seed):
    assert_same(images(6, 2, 6, 9), strategy, seed, **changed)


@pytest.mark.parametrize("mode", ["S", "M"])
def test_a_seed_changes_real_and_synthetic_images_alike(mode):
    real = images(40, 3, 8, 8)
    for seed in range(12):
        whole = DiffAugment(real, DSA, seed, param_of(aug_mode=mode))
        torch.manual_seed(99)  # what happens between the calls does not matter
        few = DiffAugment(real[17:20], DSA, seed, param_of(aug_mode=mode))
        torch.testing.assert_close(few, whole[17:20], rtol=0, atol=0)


def test_the_parameters_say_what_was_done_as_theirs_do():
    param = ParamDiffAug()
    DiffAugment(images(2, 3, 8, 8), "color", 20, param)
    assert (param.Siamese, param.latestseed) == (True, 24)
    DiffAugment(images(2, 3, 8, 8), "color", param=param)
    assert (param.Siamese, param.latestseed) == (False, -1)


def test_nothing_to_do():
    x = images(2, 3, 8, 8)
    for strategy in ("", "none", "None", None):
        assert DiffAugment(x, strategy, 3) is x
    assert DiffAugment(x[:0], DSA, 3).shape == (0, 3, 8, 8)
    torch.manual_seed(3)
    expected = DiffAugment(x, DSA, -1, ParamDiffAug())
    torch.manual_seed(3)
    assert torch.equal(DiffAugment(x, DSA), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_keep_theirs(dtype):
    for strategy in DSA.split("_"):
        assert DiffAugment(images(2, 3, 8, 8).to(dtype), strategy, 3).dtype == dtype


@pytest.mark.parametrize("metric", ["ours", "mse", "cos"])
def test_distances_and_their_gradients(metric):
    shapes = [(8, 3, 3, 3), (8,), (4, 2, 6), (10, 12), (10,)]
    real, syn = ([images(*shape, seed=10 * k + n) for n, shape in enumerate(shapes)] for k in (1, 2))
    syn = [each.requires_grad_() for each in syn]
    args = SimpleNamespace(dis_metric=metric, device="cpu")
    found, wanted = match_loss(syn, real, args), distance_by_hand(syn, real, metric)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found, syn, allow_unused=True),
        torch.autograd.grad(wanted, syn, allow_unused=True),
        strict=True,
    ):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_vectors_alone_are_no_distance_apart():
    args = SimpleNamespace(dis_metric="ours", device="cpu")
    assert float(match_loss([torch.ones(3)], [torch.zeros(3)], args)) == 0


def test_rows_of_zeros_give_finite_gradients():
    syn = torch.zeros(2, 3, requires_grad=True)
    loss = match_loss([syn], [torch.zeros(2, 3)], SimpleNamespace(dis_metric="ours", device="cpu"))
    assert float(loss.detach()) == 2
    assert torch.autograd.grad(loss, syn)[0].isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DiffAugment(images(1, 3, 4, 4), "color_blur"), "joined by _, got 'blur' in 'color_blur'"),
        (lambda: DiffAugment(images(1, 3, 4, 4), "color", param=param_of(aug_mode="X")), "S or M, got 'X'"),
        (lambda: match_loss([], [], SimpleNamespace(dis_metric="l1")), "ours, mse or cos, got 'l1'"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_a_step_of_their_loop_has_the_same_loss_and_moves_the_images_alike():
    """Gradients of real and synthetic images of each class, their distance, and its gradient through the network."""
    torch.manual_seed(0)
    net = ddfast.create_model("convnet3_in", num_classes=2, image_size=16, width=16)
    real, start = images(2, 6, 3, 16, 16), images(2, 2, 3, 16, 16, seed=2)
    args = SimpleNamespace(dis_metric="ours", device="cpu")

    def step(net, augment, distance):
        made, weights = start.clone().requires_grad_(), list(net.parameters())
        loss = torch.tensor(0.0)
        for label in range(2):
            grads = []
            for x, graph in ((real[label], False), (made[label], True)):
                of_label = torch.full((len(x),), label)
                each = F.cross_entropy(net(augment(x, 40 + label)), of_label)
                grads.append(torch.autograd.grad(each, weights, create_graph=graph))
            loss = loss + distance(grads[1], grads[0])
        loss.backward()
        return loss.detach(), made.grad

    ours = step(
        ddfast.fuse(net),
        lambda x, seed: DiffAugment(x, DSA, seed, ParamDiffAug()),
        lambda syn, real: match_loss(syn, real, args),
    )
    theirs = step(
        net,
        lambda x, seed: by_hand(x, DSA, seed, ParamDiffAug()),
        lambda syn, real: distance_by_hand(syn, real, "ours"),
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    apart = torch.linalg.vector_norm(ours[1] - theirs[1]) / torch.linalg.vector_norm(theirs[1])
    assert apart < 1e-3  # a ReLU within rounding of zero may flip


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    draws = np.random.default_rng(0)
    for name in ("cup", "mug"):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.fromarray(draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
                folder / f"{number}.png"
            )
    arguments = ["--ipc", "1", "--iterations", "2", "--size", "16", "--real-batch", "3"]
    monkeypatch.setattr(sys, "argv", ["condensation.py", str(tmp_path), *arguments])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in told[:2]] == [["step", "0:"], ["step", "1:"]]
    assert torch.load(tmp_path / "condensed.pt").shape == (2, 1, 3, 16, 16)
