"""What happens to a model before it runs: tracing, folding, casting, fusing, splitting."""

import operator
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddfast.attribution import shapley
from ddfast.masked_forward import folding, forward, locality, tracing
from ddfast.models import create_model
from ddfast.ops import graphs
from ddfast.ops.precision import cpu_multiplies_bfloat16
from tests.masked_forward.networks import Residual, local_net, randomise


def random_images(count=3, size=32, dtype=torch.float32):
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))
    return images.to(dtype).contiguous(memory_format=torch.channels_last)


class Written(nn.Module):
    """A network whose forward is the function it is given."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.function = function
        self.eval()

    def forward(self, images, scale=None):
        scores = self.function(self, images).flatten(1)[:, :5]
        return scores if scale is None else scores * scale


def relu_in_place(net, x):
    out = net.conv(x)
    F.relu(out, inplace=True)
    return out


def method_in_place(net, x):
    out = net.conv(x)
    early = out + 1
    out.mul_(2.0).add_(early)
    return out - early


def operators_in_place(net, x):
    out = net.conv(x)
    out += 1.0
    out *= out
    return out


def view_of_channels_last(net, x):
    return net.conv(x).view(x.shape[0], -1)


@pytest.mark.parametrize(
    "function", [relu_in_place, method_in_place, operators_in_place, view_of_channels_last]
)
def test_traces_have_no_in_place_calls_and_the_same_values(function):
    model, images = Written(function), random_images()
    graph = tracing.trace(model)
    for node in graph.graph.nodes:
        assert node.target not in (operator.iadd, operator.imul)
        assert not str(node.target).endswith("_")
        assert "inplace" not in node.kwargs or node.kwargs["inplace"] is False
    with torch.no_grad():
        assert torch.equal(graph(images), model(images.contiguous()))


def assigns(net, x):
    out = net.conv(x)
    out[:, 0] = 0
    return out


def draws(net, x):
    return net.conv(x) + torch.rand(1)


def keeps(net, x):
    net.last = x
    return net.conv(x)


def branches(net, x):
    return net.conv(x) if x.mean() > 0 else net.conv(-x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (assigns, "does not support item assignment"),
        (draws, "draws random numbers"),
        (keeps, "changes its attribute 'last'"),
        (branches, "torch.fx cannot trace the model"),
    ],
)
def test_what_a_graph_cannot_stand_for_is_refused(function, reason):
    model = Written(function)
    before, state = dict(vars(model)), torch.get_rng_state()
    with pytest.raises(tracing.CannotTraceError, match=reason):
        tracing.trace(model)
    assert vars(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_graph_that_gives_something_else_is_not_used():
    def alias(net, x):
        out = net.conv(x)
        kept = out
        out += 1.0  # to the tracer a new tensor, to torch the one that `kept` names
        return kept

    model, images, labels = Written(alias), random_images(), torch.tensor([0, 1, 2])
    expected = shapley(lambda x: model(x), images, labels, n_samples=64)
    assert torch.equal(shapley(model, images, labels, n_samples=64), expected)
    (made,) = forward._PREPARED[model].forwards.values()
    assert made.reason == "the traced graph does not give what the model gives"


@pytest.mark.parametrize("name", ["resnet18_small", "convnet3", "mobilenet_v2"])
def test_folding_leaves_no_batch_norm_and_float32_accuracy(name):
    model = randomise(create_model(name, num_classes=5, image_size=32))
    graph, images = tracing.trace(model), random_images(2)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    with torch.no_grad():
        exact = create_model(name, num_classes=5, image_size=32).eval().double()
        exact.load_state_dict(
            {k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        )
        wanted = exact(images.double())
        assert folding.fold_batch_norms(graph) == norms
        folded = (graph(images).double() - wanted).norm() / wanted.norm()
        plain = (model(images).double() - wanted).norm() / wanted.norm()
    assert folded < max(4 * plain, 1e-6)


def test_only_a_convolution_of_one_reader_is_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.other, self.last = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            x = self.norm(self.conv(x))
            x = self.norm(self.conv(x))
            middle = self.other(x)
            return self.last(middle) + middle

    model, images = randomise(Shared()), random_images()
    graph = tracing.trace(model)
    assert folding.fold_batch_norms(graph) == 0
    with torch.no_grad():
        assert torch.equal(graph(images), model(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_epilogues_have_the_bits_of_separate_ones(dtype):
    if not folding._has_onednn_fusions():
        pytest.skip("this torch has no oneDNN")
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Residual(8), Residual(8, 2), Residual(8)))
    images = random_images(dtype=dtype)
    graph = tracing.trace(model)
    folding.fold_batch_norms(graph)
    with torch.no_grad():
        locality.measure(graph, random_images(1))
        folding.cast(graph, dtype)
        separate = graph(images)
        fused = folding.fuse_epilogues(graph, torch.device("cpu"), dtype)
        together = graph(images)
    # The first convolution, two of each block; the shortcut is the other term of a sum.
    assert fused == 7
    assert not any(node.target in (operator.add, torch.add, F.relu) for node in graph.graph.nodes)
    if dtype == torch.float32:
        torch.testing.assert_close(together, separate, rtol=0, atol=1e-6 * float(separate.abs().max()))
    else:  # fused sums are rounded once, separate ones twice
        torch.testing.assert_close(together, separate, rtol=0, atol=2**-6 * float(separate.abs().max()))


@pytest.fixture
def cudnn(monkeypatch):
    """Stands in for cuDNN's fused convolutions on the CPU; its value decides whether one raises."""
    refuses = []

    def relu(x, weight, bias, stride, padding, dilation, groups):
        if refuses and refuses[0](x, weight, None):
            raise RuntimeError("FIND was unable to find an engine\nto execute this computation")
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
        if refuses and refuses[0](x, weight, z):
            raise RuntimeError("FIND was unable to find an engine\nto execute this computation")
        return (F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    return refuses


def gpu_epilogues(model, dtype):
    """How many were fused, what is said of it, and the scores before and after, by stand-ins on the CPU."""
    images = random_images(dtype=dtype)
    graph = tracing.trace(model)
    folding.fold_batch_norms(graph)
    with torch.no_grad():
        locality.measure(graph, random_images(1))
        folding.cast(graph, dtype)
        separate = graph(images)
        fused = folding.fuse_gpu_epilogues(graph, torch.device("cpu"), dtype)
        together = graph(images)
    return fused, graph.meta["epilogues"], separate.double(), together.double()


RESIDUAL = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Residual(8), Residual(8, 2), Residual(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_takes_sums_and_relus_into_the_convolution(dtype, cudnn):
    fused, told, separate, together = gpu_epilogues(randomise(RESIDUAL), dtype)
    assert (fused, told) == (7, "epilogues fused: 7 by cuDNN")
    torch.testing.assert_close(
        together, separate, rtol=0, atol=torch.finfo(dtype).eps * float(separate.abs().max())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_cudnn_refuses_is_one_pass_behind_the_convolution(dtype, cudnn):
    cudnn.append(lambda x, weight, z: True)
    fused, told, separate, together = gpu_epilogues(randomise(RESIDUAL), dtype)
    why = (
        "cuDNN fuses nothing in float64"
        if dtype == torch.float64
        else "cuDNN refuses it (FIND was unable to find an engine)"
    )
    assert (fused, told) == (7, f"epilogues fused: 7 by one pass behind the convolution: {why}")
    if dtype.itemsize > 2:
        atol = 8 * torch.finfo(dtype).eps
    else:  # one rounding where there were up to three a layer
        atol = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(together, separate, rtol=0, atol=atol * float(separate.abs().max()))


def test_each_geometry_is_tried_once_and_takes_its_own_way(cudnn):
    tried = []

    def refuses(x, weight, z):
        tried.append((tuple(x.shape), tuple(weight.shape), z is None))
        return len(x) == 2 and z is not None  # a trial, of a sum

    cudnn.append(refuses)
    fused, told, separate, together = gpu_epilogues(randomise(RESIDUAL), torch.float32)
    assert fused == 7
    assert told == (
        "epilogues fused: 4 by cuDNN, 3 by one pass behind the convolution: "
        "cuDNN refuses it (FIND was unable to find an engine)"
    )
    trials = [each for each in tried if each[0][0] == 2]
    assert len(trials) == len(set(trials)) >= 4
    torch.testing.assert_close(together, separate, rtol=0, atol=1e-6 * float(separate.abs().max()))


@pytest.mark.parametrize(("error", "tf32"), [(0.1, True), (1e-4, False)])
def test_wrong_numbers_of_cudnn_are_not_taken(error, tf32, cudnn, monkeypatch):
    """Nor those of TF32 where the plain convolution may not take it."""
    right = torch.cudnn_convolution_relu
    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda *arguments: right(*arguments) * (1 + error))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    _, told, separate, together = gpu_epilogues(randomise(RESIDUAL), torch.float32)
    fused = "4 by one pass behind the convolution: cuDNN gives other numbers, 3 by cuDNN"
    assert told == f"epilogues fused: {fused}"
    torch.testing.assert_close(together, separate, rtol=0, atol=1e-6 * float(separate.abs().max()))


@pytest.mark.parametrize("asked", ["deterministic", "off"])
def test_settings_of_cudnn_are_respected(asked, cudnn, monkeypatch):
    monkeypatch.setattr(
        torch.backends.cudnn, "deterministic" if asked == "deterministic" else "enabled", asked != "off"
    )
    _, told, _, _ = gpu_epilogues(randomise(RESIDUAL), torch.float32)
    assert ("deterministic algorithms" if asked == "deterministic" else "cuDNN is switched off") in told


def test_a_relu_alone_is_left_where_cudnn_does_not_take_it(cudnn):
    cudnn.append(lambda *_: True)
    net = randomise(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Tanh()))
    fused, told, separate, together = gpu_epilogues(net, torch.float32)
    assert (fused, told) == (0, "")
    assert torch.equal(separate, together)


def test_sums_of_maps_of_one_pixel_stay_apart():
    """torch 2.11's oneDNN cannot fuse them."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), Residual(8)))
    images = random_images()
    graph = tracing.trace(model)
    folding.fold_batch_norms(graph)
    with torch.no_grad():
        locality.measure(graph, random_images(1))
        separate = graph(images)
        folding.fuse_epilogues(graph, torch.device("cpu"), torch.float32)
        together = graph(images)
    assert sum(node.target in (operator.add, torch.add) for node in graph.graph.nodes) == 1
    torch.testing.assert_close(together, separate, rtol=0, atol=1e-6 * float(separate.abs().max()))


def test_scores_of_a_lowered_network_are_float32():
    model, images = local_net(), random_images()
    graph = tracing.trace(model)
    folding.fold_batch_norms(graph)
    assert folding.low_precision_reason(graph) == ""
    folding.cast(graph, torch.bfloat16)
    with torch.no_grad():
        lowered, plain = graph(images.bfloat16()), model(images)
    assert lowered.dtype == torch.float32
    assert float((lowered - plain).norm() / plain.norm()) < 0.02
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.LayerNorm(8), "it has a LayerNorm"),
        (nn.Softmax(1), "it has a Softmax"),
    ],
)
def test_other_layers_stay_under_autocast(layer, reason):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 1024, 8), layer, nn.Linear(8, 5)
    ).eval()
    assert folding.low_precision_reason(tracing.trace(model)) == reason
    images, labels = random_images(), torch.tensor([0, 1, 2])
    auto = shapley(model, images, labels, precision="auto")
    expected = shapley(lambda x: model(x), images, labels, precision="auto")
    torch.testing.assert_close(auto, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    if cpu_multiplies_bfloat16():
        (made,) = forward._PREPARED[model].forwards.values()
        assert made.reason.endswith(f"autocast runs it: {reason}")
        assert made.dtype == torch.float32


@pytest.mark.parametrize("name", ["swin_v2_t", "efficientnet_b0", "resnetap10", "alexnet"])
def test_every_kind_of_network_gives_what_it_gave(name):
    size = 64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = create_model(name, num_classes=5, image_size=size).eval()
    images, labels = random_images(1, size), torch.tensor([1])
    expected = shapley(lambda x: model(x), images, labels, grid=2, n_samples=8)
    found = shapley(model, images, labels, grid=2, n_samples=8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_parts_of_a_graph_are_the_graph():
    model, images = local_net(), random_images()
    graph = tracing.trace(model)
    folding.fold_batch_norms(graph)
    with torch.no_grad():
        locality.measure(graph, images[:1])
        found = locality.find(graph, (3, 32, 32), (4, 4), 65536, {})
        assert len(found.cuts) == 2
        values = (images,)
        for part in forward._split(graph, found.cuts):
            values = part(*values)
        assert torch.equal(values[0], graph(images))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_recorded_passes_repeat_the_results():
    model, images = local_net().cuda(), random_images(8).cuda()
    recorded = graphs.Recorded(lambda x: (model(x),))
    with torch.no_grad():
        wanted = model(images)
        results = [recorded(images + shift)[0] for shift in (0, 1, 2, 3, 0)]
    assert recorded._recorded
    assert torch.equal(results[0], wanted)
    assert torch.equal(results[4], wanted)
    assert not torch.equal(results[3], wanted)
