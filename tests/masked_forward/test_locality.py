"""Locality reuse: what is found, what is refused and why, and that no value changes."""

import gc
import logging
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ddfast
from ddfast.attribution import locality_of, shapley
from ddfast.masked_forward import folding, forward, locality, tracing
from ddfast.models import create_model
from tests.masked_forward.networks import (
    Residual,
    Select,
    SelfAttention,
    SqueezeExcite,
    head,
    local_net,
    randomise,
)


def batch(count, size=32, dtype=torch.float32, seed=1):
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, height, width, dtype=torch.float64, generator=generator).to(dtype)
    return images, torch.randint(0, 5, (count,), generator=generator)


def as_function(model):
    """The same model, of which the engine knows nothing."""
    return lambda images: model(images)


def compare(model, images, labels, *, atol=None, **arguments):
    """phi with reuse against phi of the same model as a function."""
    expected = shapley(as_function(model), images, labels, **arguments)
    found = shapley(model, images, labels, **arguments)
    scale = float(expected.abs().max())
    assert scale > 0
    if atol is None:
        atol = 1e-12 if images.dtype == torch.float64 else 2e-5
    # phi is a difference of outputs, rounded as these are: where they are far larger than phi, that is what is left.
    with torch.no_grad():
        outputs = model(images if images.is_floating_point() else images / 255)
        rounding = 2 * torch.finfo(found.dtype).eps * float(outputs.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=max(atol * scale, rounding))
    return found


def cuts_of(model):
    return [len(made.cuts) for made in forward._PREPARED[model].forwards.values()]


# --- what is found


def test_resnet18_is_cut_inside_the_second_layer():
    """Sec. 4.1 of the design: the receptive field there is 51 pixels, patches are 56 wide."""
    import torchvision

    found = locality_of(torchvision.models.resnet18().eval(), 224, 4, 64)
    assert found.cut == "model_layer2_0_relu, model_layer2_0_downsample_0"
    assert [cut.scheme for cut in found.cuts] == [(2, 2)]
    assert 0.3 < found.share_of_work < 0.6
    assert found.speedup > 1.3
    assert "layer2.0.relu (ReLU)" in found.reason


def test_convnet3_is_cut_before_its_last_block():
    model = create_model("convnet3", num_classes=10, image_size=32).eval()
    assert locality_of(model, 32, 4, 64).cut == "model_blocks_7"
    assert locality_of(model, 32, 4, 65536).cut == "model_blocks_11"


def test_all_coalitions_are_put_together_in_two_steps():
    found = locality_of(local_net(), 32, 4, 65536)
    assert [cut.scheme for cut in found.cuts] == [(2, 2), (3, 3)]
    assert found.cuts[0].inside < found.cuts[1].inside


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.InstanceNorm2d(8), r"InstanceNorm2d\) sees too many patches"),
        (nn.GroupNorm(2, 8), r"GroupNorm\) sees too many patches"),
        (SqueezeExcite(8), "mean sees too many patches"),
        (SelfAttention(8), "flatten gives no feature map"),
    ],
)
def test_layers_that_see_everything_are_named(layer, reason):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), layer, nn.Conv2d(8, 64, 3, padding=1), head(64)
    ).eval()
    found = locality_of(model, 32, 4, 64)
    assert found.cut is None
    assert found.share_of_work == 0
    assert re.search(reason, found.reason)
    images, labels = batch(2)
    compare(model, images, labels, n_samples=64, estimator="paired")
    assert cuts_of(model) == [0]


def test_reasons():
    model = local_net()
    assert locality_of(as_function(model), 32).reason == "the model is a function, not a module"
    assert "no more than the variants" in locality_of(model, 32, 4, 2).reason
    assert (
        "cannot be run by itself"
        in locality_of(nn.Sequential(nn.Flatten(), nn.Linear(5, 5)).eval(), 32).reason
    )
    assert "forward hooks" in _hooked().reason


def _hooked():
    model = local_net()
    model[0].register_forward_hook(lambda *_: None)
    return locality_of(model, 32)


def test_comparisons_are_seen_by_the_random_probe_alone():
    """NaN > 0 is false, whichever patch is NaN: only the random numbers show that a neighbour decides."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 1), Select(), nn.Conv2d(8, 8, 3, padding=1), head(8)))
    graph = tracing.trace(model)
    locality.measure(graph, torch.zeros(1, 3, 16, 16))
    probe = locality.Probe((3, 16, 16), (4, 4), ((2, 2),))
    probe.run(graph)
    (compared,) = (n for n in graph.graph.nodes if n.target is torch.where)
    seen = probe.seen[compared.name]
    column = torch.arange(16)
    right = (column >= 4) & (column < 8)  # the second patch of the first row is seen there, and two pixels on
    assert torch.equal(seen[1, 0], right | (column == 8) | (column == 9))
    nan = torch.ones(17, 3, 16, 16)
    nan[2, :, :4, 4:8] = torch.nan
    by_nan = probe._pass(graph, nan, locality._nan_reaches, None)[compared.name]
    assert torch.equal(by_nan[1, 0], right)


def test_the_map_of_a_max_pool_reaches_its_windows():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 8, 3), head(8)).eval()
    graph = tracing.trace(model)
    locality.measure(graph, torch.zeros(1, 3, 16, 16))
    probe = locality.Probe((3, 16, 16), (1, 2), ((1, 2),))
    probe.run(graph)
    seen = probe.seen["model_1"]
    # Output i reads pixels 2 i - 1 to 2 i + 1; the patches are columns 0-7 and 8-15.
    assert seen[0, 0].tolist() == [True] * 5 + [False] * 3
    assert seen[1, 0].tolist() == [False] * 4 + [True] * 4


def test_table_names_one_patch_of_each_class():
    seen = torch.zeros(4, 1, 3, dtype=torch.bool)
    seen[0, 0, 0] = seen[0, 0, 1] = seen[1, 0, 1] = seen[3, 0, 2] = True
    table = locality.table_of(seen, (1, 2), (1, 4))
    assert table.dtype == torch.int32
    assert table[0].tolist() == [[0, -1], [0, 1], [-1, 3]]
    seen[2, 0, 1] = True  # patches 0 and 2 are both even
    assert locality.table_of(seen, (1, 2), (1, 4)) is None
    assert locality.table_of(seen, (1, 3), (1, 4))[0].tolist() == [[0, -1, -1], [0, 1, 2], [3, -1, -1]]


# --- that no value changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", [3, torch.tensor([3, 4])], ids=["shared", "per-image"])
def test_phi_is_that_of_the_direct_way(dtype, seed):
    model = local_net().to(dtype)
    images, labels = batch(2, dtype=dtype)
    compare(model, images, labels, n_samples=64, seed=seed)
    assert cuts_of(model) == [1]


def test_exact_values_in_two_steps():
    model = create_model("convnet3", num_classes=5, image_size=32, width=16).eval()
    images, labels = batch(2)
    compare(model, images, labels, grid=(3, 4), estimator="exact", chunk_size=100)
    assert cuts_of(model) == [2]


@pytest.mark.parametrize(
    ("size", "grid"), [((33, 41), (4, 4)), ((32, 32), (3, 5)), ((64, 24), (7, 2)), ((24, 64), (1, 9))]
)
def test_uneven_grids(size, grid):
    model = local_net()
    images, labels = batch(2, size)
    compare(model, images, labels, grid=grid, n_samples=70)
    assert cuts_of(model) in ([1], [2])


def test_baselines():
    model = local_net()
    images, labels = batch(2)
    generator = torch.Generator().manual_seed(8)
    for baseline in (
        0.5,
        *(torch.randn(shape, generator=generator) for shape in [(3,), (3, 32, 32), (2, 3, 32, 32)]),
    ):
        compare(model, images, labels, baseline=baseline, n_samples=64)
    pixels = torch.randint(0, 256, images.shape, dtype=torch.uint8, generator=generator)
    compare(model, pixels, labels, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), n_samples=64)


def test_features_have_the_bits_that_the_model_computes():
    """Assembled maps against computed ones, at the cut, image by image: a gather changes nothing."""
    model = local_net()
    graph = tracing.trace(model)
    folding.fold_batch_norms(graph)
    made = forward.prepare(model, (3, 32, 32), (4, 4), 64, dtype=torch.float32, device=torch.device("cpu"))
    images, _ = batch(2)
    coalitions = torch.rand(20, 16, generator=torch.Generator().manual_seed(2)) < 0.5

    def masked(patterns):
        return ddfast.ops.masked_batch(images, patterns, grid=4)

    with torch.no_grad():
        maps = made.variants(masked, 2, 64)
        assembled = forward.assemble(made.cuts[-1], maps, coalitions)
        computed = made.stages[0](masked(coalitions))
    assert len(assembled) == len(computed) >= 1
    for ours, theirs in zip(assembled, computed, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.abs().max()))
        assert bool((ours == theirs).float().mean() > 0.9)  # the rest is another blocking of the same sums


def test_shapes_that_are_read_are_not_assembled():
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1))
            self.last = nn.Linear(4 * 64, 5)

        def forward(self, images):
            rows = images.shape[0]
            return self.last(nn.functional.adaptive_avg_pool2d(self.first(images), 8).reshape(rows, -1))

    model = randomise(Reshaped())
    found = locality_of(model, 32, 4, 64)
    assert "images" in found.cut
    assert [table is None for table in found.cuts[0].tables] == [True, False]
    images, labels = batch(3)
    compare(model, images, labels, n_samples=64)
    assert cuts_of(model) == [1]


def test_a_skip_from_the_images_is_assembled_too():
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 64, 3, padding=1)
            self.second = nn.Conv2d(64, 3, 3, padding=1)
            self.last = head(3)

        def forward(self, images):
            out = self.second(self.first(images).relu_())
            out = nn.functional.instance_norm(out)
            return self.last((out + images).relu())

    model = randomise(Skip())
    assert "images" in locality_of(model, 32, 4, 64).cut
    images, labels = batch(2)
    compare(model, images, labels, n_samples=64)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_networks(data):
    """Kernels, strides, paddings and dilations of every kind; float64, so that only a wrong map could differ."""
    layers, channels = [], 3
    for _ in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["conv", "conv", "max", "avg", "norm", "residual"]))
        kernel, stride = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 2))
        if kind == "conv":
            dilation, padding = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 2))
            mode = data.draw(st.sampled_from(["zeros", "circular", "reflect"]))
            width = data.draw(st.sampled_from([4, 6]))
            layers += [
                nn.Conv2d(channels, width, kernel, stride, padding, dilation, padding_mode=mode),
                nn.ReLU(inplace=True),
            ]
            channels = width
        elif kind == "max":
            layers.append(nn.MaxPool2d(kernel, stride, kernel // 2))
        elif kind == "avg":
            layers.append(nn.AvgPool2d(kernel, stride, kernel // 2))
        elif kind == "norm":
            layers.append(nn.BatchNorm2d(channels))
        else:
            layers.append(Residual(channels, stride))
    model = randomise(nn.Sequential(*layers, head(channels))).double()
    size = data.draw(st.integers(24, 40)), data.draw(st.integers(24, 40))
    grid = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 4))
    images, labels = batch(1, size, torch.float64)
    compare(model, images, labels, grid=grid, n_samples=80, estimator="paired")


# --- when it is not taken


def test_a_wrong_map_is_found_on_the_first_image_and_not_used(monkeypatch, caplog):
    right = locality.table_of

    def wrong(seen, scheme, grid):
        table = right(seen, scheme, grid)
        return table if table is None else table.roll(1, 0)

    monkeypatch.setattr(locality, "table_of", wrong)
    model = local_net()
    images, labels = batch(2)
    with caplog.at_level(logging.WARNING, "ddfast.masked_forward.forward"):
        compare(model, images, labels, n_samples=64)
    assert "locality reuse is off: features assembled at" in caplog.text
    assert cuts_of(model) == [0]


def test_modules_that_cannot_be_traced_run_as_they_are():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = local_net()

        def forward(self, images):
            return self.net(images) if images.sum() > 0 else -self.net(images)

    model = Branching().eval()
    assert "torch.fx cannot trace the model" in locality_of(model, 32).reason
    images, labels = batch(2)
    assert torch.equal(
        shapley(model, images, labels, n_samples=64),
        shapley(as_function(model), images, labels, n_samples=64),
    )


def test_changed_weights_and_layers_are_seen():
    model = local_net()
    images, labels = batch(1)
    compare(model, images, labels, n_samples=64)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    compare(model, images, labels, n_samples=64)
    model[0].weight.data.neg_()  # counts no version
    compare(model, images, labels, n_samples=64)
    model[1].running_var.data.mul_(0.5)
    compare(model, images, labels, n_samples=64)
    model[3] = nn.Identity().eval()
    compare(model, images, labels, n_samples=64)
    model[0].stride = (2, 2)
    compare(model, images, labels, n_samples=64)


def test_what_is_kept_of_a_model_goes_with_it():
    model = local_net()
    images, labels = batch(1)
    shapley(model, images, labels, n_samples=64)
    gc.collect()
    kept = len(forward._PREPARED)
    del model
    gc.collect()
    assert len(forward._PREPARED) == kept - 1


def test_the_users_model_is_left_alone():
    model = local_net()
    before = {name: (id(t), t.clone(), t.stride()) for name, t in model.state_dict(keep_vars=True).items()}
    modules = [(name, id(module), dict(vars(module))) for name, module in model.named_modules()]
    images, labels = batch(1)
    shapley(model, images, labels, n_samples=64, precision="auto")
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert before[name][0] == id(tensor)
        assert before[name][2] == tensor.stride()
        assert torch.equal(before[name][1], tensor)
    assert [(name, id(module), dict(vars(module))) for name, module in model.named_modules()] == modules


def test_windows_reach_no_less_than_is_measured():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 5, 2, 2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(3),
    ).eval()
    model(torch.zeros(1, 3, 64, 48))
    graph = tracing.trace(model)
    locality.measure(graph, torch.randn(1, 3, 64, 48))
    locality.note_reach(graph, (3, 64, 48), (4, 2))
    probe = locality.Probe((3, 64, 48), (4, 2), ((4, 2),))  # a class for each patch: every map is local
    probe.run(graph)
    noted = {
        node.name: node.meta["reach"] for node in graph.graph.nodes if node.meta.get("reach") is not None
    }
    assert len(noted) == 8
    for name, reach in noted.items():
        assert bool((reach | ~probe.seen[name]).all())
    assert not noted["model_3"].all()


def test_what_reaches_a_tile():
    reach = torch.zeros(3, 3, 3, dtype=torch.bool)
    reach[0, 0, 0] = reach[1, 2, 2] = reach[2, 0, 2] = reach[0, 0, 2] = True
    assert locality.tile_reach(reach).tolist() == [1, 5, 0, 2]
    assert locality.tile_reach(torch.ones(3, 3, 3, dtype=torch.bool)) is None
    assert locality.tile_reach(torch.zeros(63, 3, 3, dtype=torch.bool)) is None
