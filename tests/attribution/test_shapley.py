"""The engine on small networks: identities, arguments, and that chunks and neighbours change nothing."""

import itertools
import math

import pytest
import torch
from torch import nn

import ddfast
from ddfast.attribution import engine, list_estimators, shapley
from ddfast.ops.precision import cpu_multiplies_bfloat16

CLASSES = 5
INSPECTED = 4  # images that every call looks at before its game


def small_net(seed=0, dtype=torch.float32):
    """Two convolutions and a linear layer on the mean: takes images of any size."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )
    return net.to(dtype).eval()


def batch(count, height=16, width=16, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, height, width, dtype=torch.float64, generator=generator).to(dtype)
    return images, torch.randint(0, CLASSES, (count,), generator=generator)


class Recorder(nn.Module):
    """Passes on to a network and keeps what it was given."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.batches = []
        self.eval()

    def forward(self, images):
        self.batches.append(images)
        return self.net(images)

    @property
    def evaluated(self):
        return sum(len(images) for images in self.batches)


def brute_force(score, image, rows, cols, baseline=0.0):
    """Shapley values of one image, subset by subset in float64; `score` maps an image to a float."""
    height, width = image.shape[-2:]

    def cell_of(size, cells):
        return [max(c for c in range(cells) if c * size // cells <= pixel) for pixel in range(size)]

    player = torch.tensor([[r * cols + c for c in cell_of(width, cols)] for r in cell_of(height, rows)])
    d = rows * cols

    def v(members):
        present = torch.isin(player, torch.tensor(sorted(members), dtype=torch.int64))
        return score(torch.where(present, image, torch.as_tensor(baseline, dtype=image.dtype)))

    values = {s: v(s) for k in range(d + 1) for s in map(frozenset, itertools.combinations(range(d), k))}
    phi = torch.zeros(d, dtype=torch.float64)
    for s, value in values.items():
        for i in set(range(d)) - s:
            phi[i] += (values[s | {i}] - value) / (d * math.comb(d - 1, len(s)))
    return phi


@pytest.mark.parametrize(
    ("height", "width", "grid"),
    [(8, 8, 2), (7, 10, (2, 3)), (11, 5, (3, 2)), (5, 9, (1, 4)), (6, 6, 1)],
)
@pytest.mark.parametrize("value", ["logit", "prob", "logprob"])
def test_exact_is_brute_force(height, width, grid, value):
    net = small_net(dtype=torch.float64)
    images, labels = batch(2, height, width, torch.float64)
    rows, cols = (grid, grid) if isinstance(grid, int) else grid
    phi = shapley(net, images, labels, grid, estimator="exact", value=value, chunk_size=10)
    assert phi.shape == (2, rows * cols)
    assert phi.dtype == torch.float64
    transform = {"logit": lambda z: z, "prob": lambda z: z.softmax(1), "logprob": lambda z: z.log_softmax(1)}[
        value
    ]
    for image, label, found in zip(images, labels, phi, strict=True):
        with torch.no_grad():
            expected = brute_force(lambda x, y=label: float(transform(net(x[None]))[0, y]), image, rows, cols)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", sorted({*list_estimators()} - {"kernel"}))
@pytest.mark.parametrize("seed", [3, torch.tensor([3, 4, -5])], ids=["shared", "per-image"])
def test_efficiency(estimator, seed):
    net = small_net()
    images, labels = batch(3, 13, 18)
    phi = shapley(net, images, labels, (2, 4), n_samples=40, estimator=estimator, value="logprob", seed=seed)
    assert phi.dtype == torch.float32
    with torch.no_grad():
        full, empty = net(images).log_softmax(1), net(torch.zeros_like(images)).log_softmax(1)
    gain = (full - empty).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(phi.sum(dim=1), gain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", list_estimators())
def test_every_estimator_comes_close_to_enumeration(estimator):
    net = small_net(dtype=torch.float64)
    images, labels = batch(4, dtype=torch.float64)
    truth = shapley(net, images, labels, 3, estimator="exact")
    found = shapley(net, images, labels, 3, 1200, estimator, seed=torch.arange(4))
    assert float((found - truth).norm() / truth.norm()) < 0.05


def test_the_default_is_one_antithetic_pair_and_close():
    net = small_net(dtype=torch.float64)
    images, labels = batch(1, 8, 8, torch.float64)
    found = shapley(net, images, labels)
    assert found.shape == (1, 16)
    truth = shapley(net, images, labels, estimator="exact", chunk_size=4096)
    assert float((found - truth).norm() / truth.norm()) < 0.2


@pytest.mark.parametrize("estimator", list_estimators())
def test_linearity_in_the_model(estimator):
    one, other = small_net(1, torch.float64), small_net(2, torch.float64)
    images, labels = batch(2, dtype=torch.float64)

    def phi(model):
        return shapley(model, images, labels, (2, 3), estimator=estimator)

    merged = phi(lambda x: 2.0 * one(x) - 3.0 * other(x))
    torch.testing.assert_close(merged, 2.0 * phi(one) - 3.0 * phi(other), rtol=0, atol=1e-9)


@pytest.mark.parametrize("estimator", ["exact", "permutation"])
def test_cells_the_model_does_not_see_get_nothing(estimator):
    net = small_net(dtype=torch.float64)
    images, labels = batch(2, dtype=torch.float64)
    phi = shapley(lambda x: net(x[..., :8]), images, labels, (2, 4), estimator=estimator).view(2, 2, 4)
    torch.testing.assert_close(phi[..., 2:], torch.zeros(2, 2, 2, dtype=torch.float64), rtol=0, atol=1e-14)
    assert float(phi[..., :2].abs().min()) > 1e-6


def test_cells_the_model_cannot_tell_apart_share_alike():
    net = small_net(dtype=torch.float64)
    image, label = batch(1, 8, 4, torch.float64)
    images = torch.cat([image, image], dim=-1)
    phi = shapley(
        lambda x: net(x) + net(x.flip(-1)),
        torch.cat([image, image.flip(-1)], -1),
        label,
        2,
        estimator="exact",
    )
    torch.testing.assert_close(phi.view(2, 2)[:, 0], phi.view(2, 2)[:, 1], rtol=0, atol=1e-12)
    lopsided = shapley(net, images, label, 2, estimator="exact").view(2, 2)
    assert float((lopsided[:, 0] - lopsided[:, 1]).abs().min()) > 1e-6


def test_an_additive_model_is_solved_by_two_evaluations_a_cell():
    """A linear model plays an additive game: phi is the sum of weight times pixel over each cell."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES)).double().eval()
    images, labels = batch(3, 8, 8, torch.float64)
    weight = linear[1].weight.detach().view(CLASSES, 3, 8, 8)[labels]
    expected = (weight * images).sum(1).view(3, 4, 2, 4, 2).sum((2, 4)).flatten(1)
    torch.testing.assert_close(shapley(linear, images, labels), expected, rtol=0, atol=1e-10)


def test_uint8_with_normalisation_is_the_normalised_float_image():
    net = small_net()
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.tensor([0, 1, 2])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (pixels.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = shapley(net, normalised, labels)
    torch.testing.assert_close(
        shapley(net, pixels, labels, mean=mean, std=std), expected, rtol=1e-4, atol=1e-5
    )
    scaled = shapley(net, pixels.float() / 255, labels, mean=mean, std=std)
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(shapley(net, pixels, labels), expected, atol=1e-3)


@pytest.mark.parametrize("estimator", sorted({*list_estimators()} - {"exact"}))
def test_with_a_stream_an_image_the_neighbours_do_not_matter(estimator):
    net = small_net()
    images, labels = batch(5)
    seeds = torch.tensor([9, -8, 2**62, 9, 0])
    together = shapley(net, images, labels, 3, 30, estimator, seed=seeds, chunk_size=30)
    for i in range(5):
        alone = shapley(
            net, images[i : i + 1], labels[i : i + 1], 3, 30, estimator, seed=seeds[i : i + 1], chunk_size=30
        )
        assert torch.equal(alone[0], together[i])
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = shapley(net, images[order], labels[order], 3, 30, estimator, seed=seeds[order], chunk_size=30)
    assert torch.equal(shuffled, together[order])


@pytest.mark.parametrize("estimator", sorted({*list_estimators()} - {"exact"}))
def test_a_seed_is_the_same_stream_shared_or_per_image(estimator):
    net = small_net(dtype=torch.float64)
    images, labels = batch(3, dtype=torch.float64)
    shared = shapley(net, images, labels, 3, 30, estimator, seed=77)
    each = shapley(net, images, labels, 3, 30, estimator, seed=torch.full((3,), 77))
    torch.testing.assert_close(shared, each, rtol=0, atol=1e-9)
    other = shapley(net, images, labels, 3, 30, estimator, seed=78)
    assert float((shared - other).abs().max()) > 1e-6


def test_the_result_is_a_function_of_the_arguments():
    net = small_net()
    images, labels = batch(3)
    state = torch.get_rng_state()
    once = shapley(net, images, labels, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(999)
    assert torch.equal(shapley(net, images, labels, seed=4), once)
    assert not once.requires_grad


@pytest.mark.parametrize("estimator", list_estimators())
@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_chunks_change_only_the_last_bits(estimator, chunk_size):
    net = small_net()
    images, labels = batch(5)
    expected = shapley(net.double(), images.double(), labels, (2, 4), 30, estimator, seed=torch.arange(5))
    found = shapley(
        net.float(), images, labels, (2, 4), 30, estimator, seed=torch.arange(5), chunk_size=chunk_size
    )
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


def test_forward_passes_stay_within_the_chunk():
    recorder = Recorder(small_net())
    images, labels = batch(3)
    shapley(recorder, images, labels, estimator="exact", grid=3, chunk_size=100)
    assert max(len(images) for images in recorder.batches) == 100
    assert recorder.evaluated == INSPECTED + 1 + 1 + 3 * 511  # the second 1: a row of the first batch alone


def test_the_model_sees_channels_last_images_of_its_own_dtype():
    images, labels = batch(2)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        recorder = Recorder(small_net(dtype=dtype))
        phi = shapley(recorder, images, labels)
        assert all(seen.is_contiguous(memory_format=torch.channels_last) for seen in recorder.batches)
        assert {seen.dtype for seen in recorder.batches} == {dtype}
        assert phi.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_the_empty_image_is_evaluated_once():
    recorder = Recorder(small_net())
    images, labels = batch(3)
    shapley(recorder, images, labels)
    assert recorder.evaluated == INSPECTED + 1 + 3 * 31
    recorder.batches.clear()
    shapley(recorder, images, labels, baseline=torch.zeros(3, 3, 16, 16))
    assert recorder.evaluated == INSPECTED + 3 * 32


@pytest.mark.parametrize("seed", [0, torch.tensor([0, 0])], ids=["shared", "per-image"])
def test_forms_of_the_baseline(seed):
    net = small_net(dtype=torch.float64)
    images, labels = batch(2, dtype=torch.float64)
    colour = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    picture = colour.view(3, 1, 1).expand(3, 16, 16)

    def phi(baseline):
        return shapley(net, images, labels, 2, estimator="exact", baseline=baseline, seed=seed)

    with torch.no_grad():
        expected = torch.stack(
            [
                brute_force(lambda x, y=label: float(net(x[None])[0, y]), image, 2, 2, picture)
                for image, label in zip(images, labels, strict=True)
            ]
        )
    for baseline in (colour, colour.view(3, 1, 1), picture, picture[None], picture.expand(2, 3, 16, 16)):
        torch.testing.assert_close(phi(baseline), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(phi(0.5), phi(torch.full((3,), 0.5, dtype=torch.float64)), rtol=0, atol=1e-12)
    # A baseline for each image goes to its own image: the images themselves leave nothing to explain.
    torch.testing.assert_close(phi(images), torch.zeros(2, 4, dtype=torch.float64), rtol=0, atol=1e-12)
    with torch.no_grad():
        gain = (net(images) - net(images.flip(0))).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(phi(images.flip(0)).sum(dim=1), gain, rtol=0, atol=1e-12)


def test_no_images_give_no_values():
    images, labels = batch(0)
    assert shapley(small_net(), images, labels, 4).shape == (0, 16)


def test_auto_precision_stays_close_and_float32_does_not_move():
    net = small_net()
    images, labels = batch(3)
    plain = shapley(net, images, labels)
    auto = shapley(net, images, labels, precision="auto")
    assert auto.dtype == torch.float32
    assert float((auto - plain).norm() / plain.norm()) < 0.1
    assert torch.equal(auto, plain) != cpu_multiplies_bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(shapley(net, images, labels), plain)


def test_a_function_serves_as_a_model():
    images, labels = batch(2, 8, 8)
    phi = shapley(lambda x: x.flatten(1)[:, :CLASSES], images, labels, 2)
    assert phi.shape == (2, 4)


def test_it_is_the_public_function():
    assert ddfast.shapley is shapley
    assert engine.DEFAULT_CHUNK_SIZE == 128


class Poisoned(nn.Module):
    """NaN where the top left pixel is present: one of two images, under half of its coalitions."""

    def forward(self, images):
        scores = images.mean((2, 3)).repeat(1, 2)
        return torch.where(images[:, :1, 0, 0] > 100, torch.tensor(float("nan")), scores)


def test_nan_from_the_model_is_counted():
    images = torch.ones(2, 3, 8, 8)
    images[1, :, 0, 0] = 101.0
    with pytest.raises(ValueError, match=r"the model returned NaN or infinity for 8 of 31 masked images"):
        shapley(Poisoned().eval(), images, torch.tensor([0, 1]), 2, estimator="exact")


def test_training_mode_is_refused_by_name():
    net = small_net()
    images, labels = batch(1)
    net[1].train()
    with pytest.raises(ValueError, match=r"its module '1' is in training mode: call model\.eval"):
        shapley(net, images, labels)
    with pytest.raises(ValueError, match="but it is in training mode"):
        shapley(net.train(), images, labels)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"images": torch.zeros(3, 16, 16)},
            r"images must be \[B, C, H, W\] uint8 or float, got \[3, 16, 16\]",
        ),
        ({"images": torch.zeros(2, 3, 16, 16, dtype=torch.int64)}, "uint8 or float, got .* torch.int64"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels must be \[2\] int64, got \[3\]"),
        ({"labels": torch.tensor([0.0, 1.0])}, r"labels must be \[2\] int64, got \[2\] torch.float32"),
        ({"labels": torch.tensor([0, 5])}, r"labels must lie in 0..4, the classes of the model, got 0..5"),
        ({"labels": torch.tensor([-1, 2])}, "got -1..2"),
        ({"labels": torch.tensor([0, 5]), "baseline": torch.zeros(2, 3, 16, 16)}, "got 0..5"),
        ({"grid": 0}, r"grid must be 1..16 rows by 1..16 columns for these images, got 0"),
        ({"grid": (4, 17)}, r"got \(4, 17\)"),
        ({"n_samples": 16}, "n_samples >= 17"),
        (
            {"estimator": "captum"},
            r"estimator must be one of designed, enumerated, exact, .*permutation, ramc, got 'captum'",
        ),
        ({"estimator": "exact", "grid": 5}, "at most 20 players"),
        ({"value": "loss"}, "value must be one of logit, prob, logprob, got 'loss'"),
        ({"baseline": torch.zeros(2)}, r"baseline must be a number or \[3\], .* got \[2\]"),
        (
            {"baseline": torch.zeros(3, 3, 16, 16)},
            r"baseline must be one image or 2, .* got \[3, 3, 16, 16\]",
        ),
        ({"precision": "half"}, "precision must be one of float32, bfloat16, auto, got 'half'"),
        ({"seed": torch.tensor([1])}, r"seed must be an int or \[2\] int64, got \[1\]"),
        ({"seed": torch.tensor([1.0, 2.0])}, "got .*float32"),
        ({"seed": 2**64}, "seed must fit in 64 bits, got 18446744073709551616"),
        ({"chunk_size": 0}, "chunk_size must be at least 1 image, got 0"),
        ({"model": lambda x: x}, r"the model must return class scores \[1, classes\], got \[1, 3, 16, 16\]"),
        ({"model": lambda x: (x,)}, "class scores .* got tuple"),
    ],
)
def test_arguments_that_do_not_fit(changed, message):
    images, labels = batch(2)
    arguments = {"model": small_net(), "images": images, "labels": labels, **changed}
    with pytest.raises(ValueError, match=message):
        shapley(**arguments)


def test_an_integer_baseline_is_refused():
    images, labels = batch(1)
    with pytest.raises(
        TypeError, match=r"baseline must be a number or a floating-point tensor, got torch\.int64"
    ):
        shapley(small_net(), images, labels, baseline=torch.tensor([1, 2, 3]))
