import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

import ddfast
from ddfast.models.fusing import FusedSequential
from ddfast.ops._dispatch import native_status

NATIVE = pytest.mark.skipif(not native_status()[0], reason=native_status()[1])


class ReferenceConvNet(nn.Module):
    """ConvNet as networks.py of the reference repository builds it, with InstanceNorm."""

    def __init__(self, channels=3, width=32, depth=3, image_size=32):
        super().__init__()
        layers, before = [], channels
        for block in range(depth):
            padding = 3 if channels == 1 and block == 0 else 1
            layers += [nn.Conv2d(before, width, kernel_size=3, padding=padding)]
            layers += [nn.GroupNorm(width, width, affine=True), nn.ReLU(inplace=True)]
            layers += [nn.AvgPool2d(kernel_size=2, stride=2)]
            before = width
        self.features = nn.Sequential(*layers)
        side = (image_size + (4 if channels == 1 else 0)) // 2**depth
        self.classifier = nn.Linear(width * side**2, 10)

    def forward(self, x):
        out = self.features(x)
        out = out.view(out.size(0), -1)
        return self.classifier(out)


class BatchNormOfMyOwn(nn.BatchNorm2d):
    """It may do anything."""


def calls(monkeypatch, name="convnet_block"):
    """The inputs of every call of the fused op from now on."""
    seen = []
    op = getattr(ddfast.models.fusing, name)

    def counted(*arguments):
        seen.append(arguments[0])
        return op(*arguments)

    monkeypatch.setattr(ddfast.models.fusing, name, counted)
    return seen


BATCH, EVAL = "convnet_block_batch_norm", "convnet_block_batch_norm_eval"


def randomised(model):
    """Norms that are not the identity, so that a parameter left out shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def images(count=3, channels=3, size=32):
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))


def loss_and_gradients(model, pixels):
    pixels = pixels.clone().requires_grad_()
    loss = functional.cross_entropy(model(pixels), torch.arange(len(pixels)) % 10)
    names = [name for name, _ in model.named_parameters()]
    return loss, names, torch.autograd.grad(loss, [pixels, *model.parameters()])


@NATIVE
@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        (lambda: ddfast.create_model("convnet3_in", 10, 32, width=16), 3),
        (lambda: ddfast.create_model("convnet4_in", 10, 32, width=16), 4),
        (lambda: ddfast.create_model("convnet3", 10, 32, width=16), 3),
        (ReferenceConvNet, 3),
        (lambda: ReferenceConvNet(channels=1), 2),  # the first block pads by 3
        (lambda: nn.Sequential(*ReferenceConvNet().features, nn.Flatten(), nn.Linear(512, 10)), 3),
    ],
)
def test_results_and_gradients_are_the_models(model, blocks, monkeypatch):
    model = randomised(model())
    channels = next(model.parameters()).shape[1]
    pixels = images(channels=channels)
    fused = ddfast.fuse(model)
    seen = [calls(monkeypatch), calls(monkeypatch, BATCH)]
    loss, names, gradients = loss_and_gradients(fused, pixels)
    assert sum(map(len, seen)) == blocks
    expected_loss, expected_names, expected = loss_and_gradients(model, pixels)
    assert sum(map(len, seen)) == blocks  # the model itself is as it was
    assert names == expected_names
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_parameters_are_the_models_own():
    model = ddfast.create_model("convnet3_in", 10, 32, width=8)
    before = copy.deepcopy(model.state_dict())
    types = [type(module) for module in model.modules()]
    fused = ddfast.fuse(model)
    assert type(fused) is type(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    for (name, ours), (same, theirs) in zip(fused.named_parameters(), model.named_parameters(), strict=True):
        assert name == same
        assert ours is theirs
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    fused(images()).square().sum().backward()
    optimizer.step()
    assert all(
        torch.equal(a, b)
        for a, b in zip(fused.state_dict().values(), model.state_dict().values(), strict=True)
    )
    fused.load_state_dict(before)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert [type(module) for module in model.modules()] == types


def test_modes_are_apart():
    model = nn.Sequential(ReferenceConvNet(), nn.BatchNorm1d(10))
    fused = ddfast.fuse(model).eval()
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in fused.modules())
    assert fused[1].running_mean is model[1].running_mean


def test_functional_call_takes_other_parameters():
    model = randomised(ReferenceConvNet(width=8))
    fused = ddfast.fuse(model)
    others = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    found, wanted = (torch.func.functional_call(each, others, (images(),)) for each in (fused, model))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@NATIVE
def test_hooked_blocks_run_as_they_are(monkeypatch):
    model, heard = ReferenceConvNet(width=8), []
    handle = model.features[5].register_forward_hook(lambda *_: heard.append("norm"))
    fused = ddfast.fuse(model)
    seen = calls(monkeypatch)
    fused(images())
    assert (heard, len(seen)) == (["norm"], 2)
    later = fused.features[0].register_full_backward_hook(lambda *_: heard.append("conv"))
    fused(images()).sum().backward()
    assert (heard, len(seen)) == (["norm", "norm", "conv"], 3)
    later.remove()
    handle.remove()
    fused(images())
    assert len(seen) == 5  # the copy keeps the hook it was made with


@NATIVE
@pytest.mark.parametrize("arch", ["convnet3", "convnet3_in"])
def test_hooks_of_all_modules_and_layers_with_a_forward_of_their_own_are_heard(arch, monkeypatch):
    model = ddfast.create_model(arch, 10, 32, width=8)
    fused, heard = ddfast.fuse(model), []
    seen = calls(monkeypatch), calls(monkeypatch, BATCH)
    handle = nn.modules.module.register_module_forward_hook(lambda layer, *_: heard.append(type(layer)))
    try:
        fused(images())
    finally:
        handle.remove()
    assert heard.count(nn.Conv2d) == 3
    assert sum(map(len, seen)) == 0
    own = fused.blocks[4]
    own.forward = lambda pixels: heard.append("mine") or type(own).forward(own, pixels)
    fused(images())
    assert heard[-1] == "mine"
    assert sum(map(len, seen)) == 2


@NATIVE
@pytest.mark.parametrize("affine", [False, True])
def test_instance_norm_layers(affine, monkeypatch):
    layers = (nn.Conv2d(3, 6, 3, padding="same", bias=False), nn.InstanceNorm2d(6, affine=affine), nn.ReLU())
    model = randomised(nn.Sequential(*layers, nn.AvgPool2d((2, 2))))
    fused, seen = ddfast.fuse(model), calls(monkeypatch)
    torch.testing.assert_close(fused(images()), model(images()), rtol=1e-4, atol=1e-4)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.GroupNorm(6, 6), nn.ReLU(), nn.AvgPool2d(2)),
        (nn.Conv2d(3, 6, 5, padding=2), nn.GroupNorm(6, 6), nn.ReLU(), nn.AvgPool2d(2)),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), nn.GroupNorm(6, 6), nn.ReLU(), nn.AvgPool2d(2)),
        (
            nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"),
            nn.GroupNorm(6, 6),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ),
        (nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.ReLU(), nn.AvgPool2d(2)),
        (nn.Conv2d(3, 6, 3, padding=1), BatchNormOfMyOwn(6), nn.ReLU(), nn.AvgPool2d(2)),
        (nn.Conv2d(3, 6, 3, padding=1), nn.SyncBatchNorm(6), nn.ReLU(), nn.AvgPool2d(2)),
        (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.LeakyReLU(), nn.AvgPool2d(2)),
        (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
        (nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2)),
        (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.InstanceNorm2d(6, track_running_stats=True),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ),
        (nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(6, 6), nn.LeakyReLU(), nn.AvgPool2d(2)),
        (nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(6, 6), nn.ReLU(), nn.MaxPool2d(2)),
        (nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(6, 6), nn.ReLU(), nn.AvgPool2d(2, stride=1)),
        (nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(6, 6), nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True)),
        (nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(6, 6), nn.ReLU()),
        (weight_norm(nn.Conv2d(3, 6, 3, padding=1)), nn.GroupNorm(6, 6), nn.ReLU(), nn.AvgPool2d(2)),
    ],
)
def test_other_layers_are_left_alone(layers):
    model = nn.Sequential(*layers).eval()
    fused = ddfast.fuse(model)
    assert not any(isinstance(module, FusedSequential) for module in fused.modules())
    assert torch.equal(fused(images(size=9)), model(images(size=9)))


@NATIVE
def test_layouts_and_shapes_are_the_layers(monkeypatch):
    model = ReferenceConvNet(width=8, depth=2, image_size=9).features
    fused, seen = ddfast.fuse(model), calls(monkeypatch)
    for pixels in (images(size=9), images(size=9).contiguous(memory_format=torch.channels_last)):
        found, wanted = fused(pixels), model(pixels)
        assert (found.shape, found.stride()) == (wanted.shape, wanted.stride())
    assert len(seen) == 4
    assert seen[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_the_op_does_not_speed_up_runs_as_it_is(dtype):
    model = ReferenceConvNet(width=8).to(dtype)
    fused = ddfast.fuse(model)
    assert torch.equal(fused(images().to(dtype)), model(images().to(dtype)))


def test_autocast_is_the_layers():
    model = ReferenceConvNet(width=8)
    fused = ddfast.fuse(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fused(images()), model(images()))


def test_bad_inputs_fail_as_the_layers_do():
    model = ReferenceConvNet(width=8)
    fused = ddfast.fuse(model)
    for wrong in (images(size=1), images(channels=2), torch.zeros(3)):
        with pytest.raises((RuntimeError, ValueError)):
            model(wrong)
        with pytest.raises((RuntimeError, ValueError)):
            fused(wrong)


def test_tracing_sees_the_layers():
    """As the masked forward pass and every tool on torch.fx needs it."""
    model = ReferenceConvNet(width=8)
    traced = torch.fx.symbolic_trace(ddfast.fuse(model))
    assert sum(node.op == "call_module" for node in traced.graph.nodes) == len(model.features) + 1
    assert torch.equal(traced(images()), model(images()))


def test_compiled_and_copied():
    fused = ddfast.fuse(randomised(ReferenceConvNet(width=8)))
    expected = fused(images())
    assert torch.equal(copy.deepcopy(fused)(images()), expected)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), expected, rtol=1e-5, atol=1e-5)


def batch_normed(**options):
    layers = []
    for before in (3, 6):
        layers += [
            nn.Conv2d(before, 6, 3, padding=1),
            nn.BatchNorm2d(6, **options),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]
    return randomised(nn.Sequential(*layers))


def buffers_after(model, steps=3):
    """The buffers after some passes in train mode, of batches that differ, and the last output."""
    for step in range(steps):
        output = model(images(2 + step, size=9) * (step + 1))
    return dict(model.named_buffers()), output.detach()


@NATIVE
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.3, "eps": 1e-2},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0},
        {"affine": False},
        {"track_running_stats": False},
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_batch_norm_moves_its_statistics_as_the_layer_does(options, grad, monkeypatch):
    model = batch_normed(**options)
    fused = ddfast.fuse(copy.deepcopy(model))
    seen = calls(monkeypatch, BATCH)
    with torch.set_grad_enabled(grad):
        found, output = buffers_after(fused)
        assert len(seen) == 6
        wanted, expected = buffers_after(model)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


@NATIVE
def test_batch_norm_without_running_statistics_is_fused_in_eval_mode_too(monkeypatch):
    model = batch_normed(track_running_stats=False).eval()
    fused, seen = ddfast.fuse(model), calls(monkeypatch, BATCH)
    torch.testing.assert_close(fused(images()), model(images()), rtol=1e-4, atol=1e-4)
    assert len(seen) == 2


@NATIVE
def test_batch_norm_that_is_told_to_keep_its_statistics_keeps_them(monkeypatch):
    model = batch_normed()
    for norm in (model[1], model[5]):
        norm.track_running_stats = False
    fused, seen = ddfast.fuse(model), calls(monkeypatch, BATCH)
    before = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(fused(images()), model(images()), rtol=1e-4, atol=1e-4)
    assert len(seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@NATIVE
def test_batch_norm_in_eval_mode_is_fused_where_no_gradient_is_asked_for(monkeypatch):
    model = batch_normed()
    buffers_after(model)
    fused, before = ddfast.fuse(model).eval(), copy.deepcopy(model.state_dict())
    seen, batch = calls(monkeypatch, EVAL), calls(monkeypatch, BATCH)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(images()), model(images()), rtol=1e-4, atol=1e-4)
    assert (len(seen), len(batch)) == (2, 0)
    pixels = images().requires_grad_()
    model.requires_grad_(False)
    found, wanted = (torch.autograd.grad(each(pixels).square().sum(), pixels)[0] for each in (fused, model))
    assert torch.equal(found, wanted)  # the layers' own
    fused(images())
    assert (len(seen), len(batch)) == (4, 0)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@NATIVE
def test_norms_in_different_modes_are_each_their_own(monkeypatch):
    model = batch_normed()
    buffers_after(model)
    model[1].eval()
    fused = ddfast.fuse(model)
    seen, batch = calls(monkeypatch, EVAL), calls(monkeypatch, BATCH)
    torch.testing.assert_close(fused(images()), model(images()), rtol=1e-4, atol=1e-4)
    assert (len(seen), len(batch)) == (0, 1)
    with torch.no_grad():
        torch.testing.assert_close(fused(images()), model(images()), rtol=1e-4, atol=1e-4)
    assert (len(seen), len(batch)) == (1, 2)


@pytest.mark.parametrize(
    "changed",
    [
        lambda model: model.double(),
        lambda model: model.eval(),
        lambda model: model.to(memory_format=torch.channels_last).bfloat16(),
    ],
)
def test_batch_norm_that_does_not_gain_is_the_layers(changed):
    model = changed(batch_normed())
    pixels = images().to(model[0].weight.dtype)
    other, fused = copy.deepcopy(model), ddfast.fuse(model)
    assert torch.equal(fused(pixels), other(pixels))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_batch_norm_of_no_images_is_the_layers():
    model = batch_normed()
    other, fused = copy.deepcopy(model), ddfast.fuse(model)
    assert torch.equal(fused(images(0)), other(images(0)))


def test_batch_norm_under_the_transforms_of_torch_func():
    model = batch_normed()
    fused, parameters = ddfast.fuse(model), dict(model.named_parameters())

    def loss(network, parameters):
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        return torch.func.functional_call(network, (parameters, buffers), (images(),)).square().sum()

    found, wanted = (
        torch.func.grad(lambda given, network=network: loss(network, given))(parameters)
        for network in (fused, model)
    )
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
    others = {name: value.clone() for name, value in model.named_buffers()}
    before = copy.deepcopy(dict(model.named_buffers()))
    torch.func.functional_call(fused, others, (images(),))
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name])
        assert not torch.equal(others[name], value)


def test_batch_norm_differentiated_twice():
    """The gradient at the images of the gradients of the parameters: what gradient matching takes."""
    model = batch_normed()
    fused = ddfast.fuse(model)

    def step(network):
        pixels = images().requires_grad_()
        loss = functional.cross_entropy(network(pixels).flatten(1), torch.arange(3))
        grads = torch.autograd.grad(loss, list(network.parameters()), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in grads), pixels)[0]

    found, wanted = step(fused), step(model)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@NATIVE
def test_batch_norm_compiled_and_copied():
    model = batch_normed()
    fused = ddfast.fuse(model)
    compiled = torch.compile(ddfast.fuse(copy.deepcopy(model)), backend="aot_eager", fullgraph=True)
    copied = copy.deepcopy(fused)
    expected = fused(images())
    torch.testing.assert_close(compiled(images()), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(copied(images()), expected)
    for one, other in zip(compiled.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(copied.buffers(), model.buffers(), strict=True))
