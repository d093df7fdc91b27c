import gc
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from ddfast import grad_norm
from ddfast.gradients import ghost, trial
from ddfast.gradients import norms as implementation

METHODS = ("ghost", "vmap", "loop", "auto")


@contextmanager
def no_warnings():
    """Fails on a warning, but for torch.func's about operations that it maps one by one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*batching rule.*")
        yield


def looped(model, images, labels):
    """The definition: one image at a time, autograd over all parameters, the root of the sum of squares."""
    flags = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(True)
    found = []
    for image, label in zip(images, labels, strict=True):
        model.zero_grad()
        functional.cross_entropy(model(image[None]), label[None]).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append(torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt())
    model.zero_grad()
    for p, flag in zip(model.parameters(), flags, strict=True):
        p.requires_grad_(flag)
    return torch.stack(found)


class ConvNet(nn.Module):
    """Two blocks as in the field's ConvNet-D, with in-place activations."""

    def __init__(self, norm, width=8):
        super().__init__()
        layers = []
        for channels in (3, width):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                norm(width),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * 9, 5)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class Mixed(nn.Module):
    """Convolutions of every geometry and padding mode, and layers on the way that have no parameters."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding="same", dilation=2),
            nn.Conv2d(8, 8, (2, 3), padding="same", bias=False),
            nn.Conv2d(8, 12, 3, stride=2, padding=(2, 1), groups=4, padding_mode="reflect"),
            nn.GELU(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12, padding_mode="circular"),
            nn.BatchNorm2d(12, affine=False),
            nn.Conv2d(12, 6, (3, 1), stride=(1, 2), padding="valid"),
            nn.Dropout2d(0.5),
            nn.Flatten(2),
            nn.Conv1d(6, 6, 3, stride=2, padding=1, groups=2, dilation=1),
            nn.Conv1d(6, 4, 2, padding="same"),
            nn.BatchNorm1d(4),
            nn.RMSNorm(12),
            nn.AdaptiveAvgPool1d(2),
            nn.Flatten(),
            nn.BatchNorm1d(8),
            nn.Linear(8, 5, bias=False),
        )

    def forward(self, x):
        return self.body(x)


class Pooled(nn.Module):
    """Max pooling of every geometry, normalisation of the images themselves, 3-d and 1-d normalisation."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.GroupNorm(4, 8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.MaxPool2d((2, 3), dilation=(2, 1), ceil_mode=True),
            nn.Unflatten(1, (2, 3)),
            nn.BatchNorm3d(2),
            nn.GroupNorm(2, 2),
            nn.Flatten(1, 2),
            nn.MaxPool2d(2, return_indices=False),
            nn.Flatten(),
            nn.BatchNorm1d(6),
            nn.GroupNorm(2, 6),
            nn.Linear(6, 5),
        )

    def forward(self, x):
        return self.body(x)


class Transformer(nn.Module):
    def __init__(self, tied=False, padding_idx=None):
        super().__init__()
        self.token = nn.Embedding(11, 16, padding_idx=padding_idx)
        self.norm = nn.LayerNorm(16)
        self.query_key_value = nn.Linear(16, 48)
        self.output = nn.Linear(16, 16)
        self.feedforward = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 11)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens):
        x = self.token(tokens)
        query, key, value = self.query_key_value(self.norm(x)).chunk(3, -1)
        x = x + self.output((query @ key.mT / 4).softmax(-1) @ value)
        return self.head((x + self.feedforward(x)).mean(1))


class Twice(nn.Module):
    """Every parametrised layer is called twice, and two layers share a bias."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.line = nn.Conv1d(4, 4, 3, padding=1)
        self.mix = nn.Linear(6, 6)
        self.first, self.second = nn.Linear(24, 5), nn.Linear(24, 5)
        self.second.bias = self.first.bias

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            x = self.group(self.norm(self.conv(x)).relu_())
        x = self.mix(self.mix(self.line(self.line(x.mean(3))[..., ::2]))).flatten(1)
        return self.first(x) + self.second(x.sin())


def trained_statistics(model):
    """Random normalisation parameters and statistics, so that a mistake in either shows."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if "norm" in type(module).__name__.lower() and tensor.is_floating_point():
                spread = torch.rand(tensor.shape, generator=generator)
                tensor.data.copy_(spread + 0.5 if name in ("weight", "running_var") else spread - 0.5)
    return model.eval()


def resnet18():
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet18(num_classes=10)


def pictures(size=12):
    return lambda: torch.randn(5, 3, size, size)


def tokens():
    return torch.randint(0, 11, (5, 7))


MODELS = {
    "batch norm": (lambda: ConvNet(nn.BatchNorm2d), pictures()),
    "instance norm": (lambda: ConvNet(lambda c: nn.InstanceNorm2d(c, affine=True)), pictures()),
    "tracked instance norm": (
        lambda: ConvNet(lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True)),
        pictures(),
    ),
    "group norm": (lambda: ConvNet(lambda c: nn.GroupNorm(2, c)), pictures()),
    "every geometry": (Mixed, pictures(14)),
    "pooling": (Pooled, pictures(14)),
    "resnet18": (resnet18, lambda: torch.randn(3, 3, 64, 64)),
    "transformer": (Transformer, tokens),
    "padding row": (lambda: Transformer(padding_idx=3), tokens),
    "tied weights": (lambda: Transformer(tied=True, padding_idx=3), tokens),
    "layers called twice": (Twice, pictures()),
}


def built(name):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, images = trained_statistics(make()), inputs()
    with torch.no_grad():
        classes = model(images).shape[1]
    return model, images, torch.randint(0, classes, (len(images),))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_a_loop_over_images(name, method):
    model, images, labels = built(name)
    expected = looped(model, images, labels)
    with no_warnings():  # no fallback
        norms = grad_norm(model, images, labels, method)
        chunked = grad_norm(model, images, labels, method, chunk_size=2)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(chunked, norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["batch norm", "every geometry", "layers called twice", "tied weights"])
@pytest.mark.parametrize("method", METHODS)
def test_in_float64_it_is_the_loop(name, method):
    model, images, labels = built(name)
    model = model.double()
    images = images.double() if images.is_floating_point() else images
    norms = grad_norm(model, images, labels, method)
    assert norms.dtype == torch.float64
    torch.testing.assert_close(norms, looped(model, images, labels), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_models(method, dtype):
    model, images, labels = built("group norm")
    expected = looped(model, images, labels).float()
    norms = grad_norm(model.to(dtype), images, labels, method)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, expected, rtol=0.05, atol=0)


class Viewed(nn.Module):
    """Convolutions of 64 channels, which lie channels-last, behind them a view that needs planes."""

    def __init__(self, flatten):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 64, 3, padding=1),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 64, 3, padding=1, bias=False),
        )
        self.flatten = flatten
        self.last = nn.Linear(64 * 8 * 8, 5)

    def forward(self, images):
        return self.last(self.flatten(self.layers(images).tanh()))


@pytest.mark.parametrize("flatten", [lambda maps: maps.flatten(1), lambda maps: maps.view(len(maps), -1)])
def test_wide_convolutions_and_views_of_them(flatten):
    torch.manual_seed(0)
    model, images, labels = Viewed(flatten).eval(), torch.randn(3, 3, 16, 16), torch.tensor([0, 4, 2])
    expected = looped(model, images, labels)
    for _ in range(2):
        with no_warnings():
            norms = grad_norm(model, images, labels, "ghost")
        torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=0)


def test_a_view_that_no_layout_allows_is_the_models_own_error():
    model = Viewed(lambda maps: maps.mT.view(len(maps), -1)).eval()
    with pytest.raises(RuntimeError, match="view"):
        implementation.ghost_norms(model, torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["batch norm", "group norm", "every geometry", "pooling"])
def test_channels_last(name):
    model, images, labels = built(name)
    expected = looped(model, images, labels)
    model = model.to(memory_format=torch.channels_last)
    with no_warnings():
        norms = grad_norm(model, images.contiguous(memory_format=torch.channels_last), labels, "ghost")
    torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (2, 3), "dilation": (2, 1), "ceil_mode": True},
        {"kernel_size": 2, "stride": (1, 3)},
    ],
)
def test_pooling_and_its_gradient_are_torchs_to_the_byte(geometry):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 5, (2, 5, 11, 13), generator=generator).float()  # ties
    results = []
    for pool in (functional.max_pool2d, ghost._pooled):
        leaf = images.clone().requires_grad_()
        pooled = pool(leaf, **geometry)
        weight = torch.arange(pooled.numel(), dtype=pooled.dtype).view_as(pooled)
        results.append((pooled, *torch.autograd.grad((pooled * weight).sum(), leaf)))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_last_layer_is_the_norm_of_the_last_layers_gradient():
    for name, layer in [("batch norm", "classifier"), ("transformer", "head"), ("every geometry", "body.16")]:
        model, images, labels = built(name)
        model.requires_grad_(False)
        model.get_submodule(layer).requires_grad_(True)
        expected = []
        for image, label in zip(images, labels, strict=True):
            given = torch.autograd.grad(
                functional.cross_entropy(model(image[None]), label[None]),
                model.get_submodule(layer).parameters(),
            )
            expected.append(sum(g.square().sum() for g in given).sqrt())
        norms = grad_norm(model, images, labels, "last_layer")
        torch.testing.assert_close(norms, torch.stack(expected), rtol=1e-5, atol=0)
        torch.testing.assert_close(grad_norm(model, images, labels, "last_layer", chunk_size=2), norms)


def test_last_layer_needs_a_linear_layer_at_the_end():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Softmax(1)).eval()
    with pytest.raises(
        ValueError, match=r"last_layer needs a model that ends in a Linear layer.*Sequential does not"
    ):
        grad_norm(model, torch.randn(2, 3, 2, 2), torch.tensor([0, 1]), "last_layer")


class Scaled(nn.Module):
    """A bare parameter, used outside any layer."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 5)
        self.gain = nn.Parameter(torch.rand(12))

    def forward(self, x):
        assert self.gain.shape == (12,)  # to look at a parameter is no use of it
        assert self.gain.dtype == self.head.weight.dtype
        return self.head(x.flatten(1) * self.gain)


class Attention(nn.Module):
    """A layer that the ghost method does not know."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = x.flatten(2).mT.repeat(1, 1, 2)[..., :4]
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Table(nn.Module):
    """A layer on a constant, without the batch, as in Swin's position bias."""

    def __init__(self, rows):
        super().__init__()
        self.bias = nn.Linear(3, 5)
        self.head = nn.Linear(12, 5)
        self.register_buffer("table", torch.rand(rows, 3))

    def forward(self, x):
        return self.head(x.flatten(1)) + self.bias(self.table).mean(0)


class Folded(nn.Module):
    """A layer that sees [positions * B, C]: the batch comes second."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 5)

    def forward(self, x):
        flat = x.flatten(2).permute(2, 0, 1)
        return self.mix(flat.reshape(-1, 3)).unflatten(0, flat.shape[:2]).tanh().sum(0)


class Transposed(nn.Module):
    """A layer that runs on [T, B, C], and T may happen to equal B."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(3, 5)

    def forward(self, x):
        return self.mix(x.flatten(2)[..., :2].permute(2, 0, 1)).tanh().sum(0)


class InPlace(nn.Module):
    """A layer's input is overwritten after the layer ran, which autograd refuses too when it needs the input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x):
        hidden = self.first(x.flatten(1))
        out = self.second(hidden)
        hidden.zero_()
        return out


FALLBACKS = {
    "bare parameter": (Scaled, "gain of the model .Scaled. is used in torch.Tensor.mul"),
    "unknown layer": (Attention, "in_proj_weight of layer 'attention' .MultiheadAttention. is used in"),
    "layer without the batch": (lambda: Table(7), r"weight of layer 'bias' .Linear. .* runs on \(7, 3\)"),
    "as many rows as images in the trial": (lambda: Table(2), "on two images it gives"),
    "batch folded into positions": (Folded, "weight of layer 'mix' .Linear. .* not the batch"),
    "as many positions as images in the trial": (Transposed, "on two images it gives"),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 2, 2), nn.Flatten(), nn.Linear(18, 5)),
        r"weight of layer '0' .ConvTranspose2d. is used in torch.conv_transpose2d|functional.conv_transpose2d",
    ),
    "rescaled embedding": (
        lambda: nn.Sequential(
            nn.Flatten(),
            Indices(),
            nn.Embedding(9, 4, scale_grad_by_freq=True),
            nn.Flatten(),
            nn.Linear(48, 5),
        ),
        "max_norm or scale_grad_by_freq",
    ),
}


class Indices(nn.Module):
    def forward(self, x):
        return (x * 4).long().clamp(0, 8)


@pytest.mark.parametrize("method", ["ghost", "auto"])
@pytest.mark.parametrize("name", FALLBACKS)
def test_what_ghost_does_not_serve_falls_back_with_one_warning(name, method):
    torch.manual_seed(0)
    make, message = FALLBACKS[name]
    model = make().eval()
    images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    expected = looped(model, images, labels)
    with pytest.warns(
        UserWarning, match=f"does not serve {type(model).__name__}, using vmap: .*(?:{message})"
    ) as seen:
        norms = grad_norm(model, images, labels, method)
    assert len([w for w in seen if "grad_norm" in str(w.message)]) == 1
    torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=0)
    with no_warnings():
        again = grad_norm(model, images, labels, method)
    assert torch.equal(again, norms)


def test_a_layer_that_shows_its_fault_later_falls_back_then():
    """The trial's two images go through; three make the model use its parameter in another way."""

    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(12, 5)

        def forward(self, x):
            x = x.flatten(1)
            return self.head(x) if len(x) < 3 else x @ self.head.weight.T + self.head.bias

    model, images, labels = Moody().eval(), torch.rand(3, 3, 2, 2), torch.arange(3)
    with pytest.warns(UserWarning, match="using vmap: weight of layer 'head' .* is used in torch.Tensor.T"):
        norms = grad_norm(model, images, labels, "ghost")
    torch.testing.assert_close(norms.double(), looped(model, images, labels), rtol=1e-5, atol=0)


def test_an_input_overwritten_later_is_refused():
    model = InPlace().eval()
    images, labels = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
    with (
        pytest.warns(
            UserWarning, match=r"the input of weight of layer 'second' .Linear. is modified in place"
        ),
        pytest.raises(RuntimeError, match=r"modified by an inplace operation|does not work with"),
    ):
        grad_norm(model, images, labels, "ghost")


def test_what_no_layer_shows_is_found_by_the_trial():
    torch.manual_seed(0)

    class Opaque(nn.Module):
        """Multiplies by a parameter out of sight of torch functions."""

        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.rand(12))
            self.head = nn.Linear(12, 5)

        def forward(self, x):
            with torch._C.DisableTorchFunction():
                x = x.flatten(1) * self.gain
            return self.head(x)

    model, images, labels = Opaque().eval(), torch.rand(3, 3, 2, 2), torch.tensor([0, 1, 2])
    with pytest.warns(UserWarning, match="on two images it gives"):
        norms = grad_norm(model, images, labels)
    torch.testing.assert_close(norms.double(), looped(model, images, labels), rtol=1e-5, atol=0)


def test_leaves_the_model_as_it_was():
    model, images, labels = built("layers called twice")
    frozen = model.conv.weight.requires_grad_(False)
    model.stem.weight.grad = marker = torch.full_like(model.stem.weight, 7)
    images.requires_grad_()
    flags = [p.requires_grad for p in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = looped(model, images.detach(), labels)
    model.stem.weight.grad = marker
    for method in ("ghost", "vmap"):
        torch.testing.assert_close(
            grad_norm(model, images, labels, method).double(), expected, rtol=1e-5, atol=0
        )
    assert not frozen.requires_grad  # its gradient counts all the same
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.stem.weight.grad is marker
    assert torch.equal(marker, torch.full_like(marker, 7))
    assert all(p.grad is None for p in model.parameters() if p is not model.stem.weight)
    assert images.grad is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_an_error_in_the_model_passes_through_and_leaves_nothing_behind():
    model, images, labels = built("batch norm")
    expected = grad_norm(model, images, labels)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        grad_norm(model, images[..., :6], labels)
    assert torch.equal(grad_norm(model, images, labels), expected)
    grads = torch.autograd.grad(model(images).sum(), list(model.parameters()))
    assert all(g.isfinite().all() for g in grads)


def test_works_within_no_grad_and_inference_mode_and_autocast():
    model, images, labels = built("batch norm")
    expected = grad_norm(model, images, labels)
    for method in METHODS:
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                norms = grad_norm(model, images * 1, labels, method)
            torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        norms = grad_norm(model, images, labels, "ghost")
    torch.testing.assert_close(norms, expected, rtol=0.05, atol=0)


def test_lets_go_of_each_layers_input_in_the_backward_pass():
    """When the first layer's gradient is taken, the inputs of the later layers are free."""
    layers = [nn.Linear(6, 6) for _ in range(4)]
    model = nn.Sequential(*layers, nn.Linear(6, 3)).eval()
    alive, seen = [], []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            gc.collect()
            seen.append([not storage.expired() for storage in alive])
            return grad

    def remember(module, arguments):
        alive.append(StorageWeakRef(arguments[0].untyped_storage()))

    handles = [layer.register_forward_pre_hook(remember) for layer in layers]
    handles.append(layers[0].register_forward_hook(lambda module, arguments, output: Probe.apply(output)))
    images = torch.randn(3, 6)
    grad_norm(model, images, torch.tensor([0, 1, 2]), "ghost")
    alive.clear(), seen.clear()  # of the trial
    grad_norm(model, images, torch.tensor([0, 1, 2]), "ghost")
    for handle in handles:
        handle.remove()
    assert seen == [[True, False, False, False]]  # the images are the caller's


def test_logits_come_along():
    model, images, labels = built("batch norm")
    for method in (*METHODS, "last_layer"):
        norms, logits = grad_norm(model, images, labels, method, return_logits=True, chunk_size=2)
        assert torch.equal(norms, grad_norm(model, images, labels, method, chunk_size=2))
        assert not logits.requires_grad
        torch.testing.assert_close(logits, model(images).detach())
    norms, logits = grad_norm(model, images[:0], labels[:0], return_logits=True)
    assert (norms.shape, logits.shape) == ((0,), (0, 5))


def test_bytes_are_scaled_and_normalised():
    model, _, labels = built("batch norm")
    images = torch.randint(0, 256, (5, 3, 12, 12), dtype=torch.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    shaped = (torch.tensor(numbers)[:, None, None] for numbers in (mean, std))
    centre, spread = shaped
    expected = looped(model, (images / 255 - centre) / spread, labels)
    for given_mean, given_std in [(mean, std), (torch.tensor(mean), torch.tensor(std))]:
        norms = grad_norm(model, images, labels, mean=given_mean, std=given_std)
        torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=0)
    floats = grad_norm(model, images / 255, labels, mean=mean, std=std)
    torch.testing.assert_close(floats.double(), expected, rtol=1e-5, atol=0)
    plain = grad_norm(model, images, labels)
    torch.testing.assert_close(plain.double(), looped(model, images / 255, labels), rtol=1e-5, atol=0)


def test_no_images_and_one_image():
    model, images, labels = built("batch norm")
    for method in (*METHODS, "last_layer"):
        none = grad_norm(model, images[:0], labels[:0], method)
        assert (none.shape, none.dtype) == ((0,), torch.float32)
    expected = looped(model, images[:1], labels[:1])
    for method in METHODS:
        fresh, *_ = built("batch norm")
        norms = grad_norm(fresh, images[:1], labels[:1], method)
        torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=0)


def test_parameters_that_nothing_uses_and_models_without_any():
    model, images, labels = built("batch norm")
    model.unused = nn.Linear(3, 3)
    norms = grad_norm(model, images, labels, "ghost")
    torch.testing.assert_close(norms.double(), looped(model, images, labels), rtol=1e-5, atol=0)
    empty = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    for method in METHODS:
        assert torch.equal(grad_norm(empty, images, labels % 3, method), torch.zeros(5))


def test_compiled_modules_run_as_they_were_written():
    model, images, labels = built("batch norm")
    expected = looped(model, images, labels)
    compiled = torch.compile(model, backend="eager")
    for method in (*METHODS, "last_layer"):
        with no_warnings():
            norms = grad_norm(compiled, images, labels, method)
        if method != "last_layer":
            torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=0)
    model.classifier.compile(backend="eager")
    with no_warnings():
        norms = grad_norm(model, images, labels, "ghost")
    torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=0)


def test_torchscript_hides_its_layers():
    traced = torch.jit.trace(nn.Linear(12, 5), torch.zeros(1, 12))
    model = nn.Sequential(nn.Flatten(), traced).eval()
    images, labels = torch.rand(2, 3, 2, 2), torch.tensor([0, 1])
    with pytest.raises(
        ghost.UnservedModel, match=r"^layer '1' \(.*\) is TorchScript, which hides its layers$"
    ):
        implementation.ghost_norms(model, images, labels)


@pytest.mark.parametrize("method", [*METHODS, "last_layer"])
@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3, track_running_stats=False).eval()]
)
def test_what_makes_a_norm_depend_on_other_images_is_an_error(layer, method):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer, nn.Flatten(), nn.Linear(12, 5))
    with pytest.raises(ValueError, match=rf"layer '1' \({type(layer).__name__}\) .* image depend on"):
        grad_norm(model, torch.rand(2, 3, 2, 2), torch.tensor([0, 1]), method)


def test_layers_that_do_not_mind_may_be_in_training_mode():
    model, images, labels = built("group norm")
    expected = grad_norm(model, images, labels)
    torch.testing.assert_close(grad_norm(model.train(), images, labels), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "exact"}, "method must be one of auto, ghost, vmap, loop, last_layer, got 'exact'"),
        ({"loss": "hinge"}, "loss must be one of cross_entropy, got 'hinge'"),
        ({"labels": torch.zeros(5)}, r"labels must be int64 \[5\], one an image, got torch.float32 \(5,\)"),
        (
            {"labels": torch.zeros(4, dtype=torch.int64)},
            r"labels must be int64 \[5\], .* got torch.int64 \(4,\)",
        ),
        ({"chunk_size": 0}, "chunk_size must be a whole number from 1 on, got 0"),
        ({"mean": (0.5,)}, r"mean and std must be \[C\] for images \[B, C, H, W\], got \(1,\)"),
    ],
)
def test_bad_arguments(change, message):
    model, images, labels = built("batch norm")
    with pytest.raises(ValueError, match=message):
        grad_norm(model, images, **{"labels": labels, **change})


def test_a_model_is_not_kept_alive():
    model, images, labels = built("batch norm")
    grad_norm(model, images, labels)
    assert model in trial._TRIALS
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("method", ["ghost", "vmap"])
def test_autocast_around_the_call_changes_no_more_than_the_precision(method, recwarn):
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).eval()
    images, labels = torch.randn(3, 3, 64, 64), torch.tensor([0, 3, 4])
    plain = grad_norm(model, images, labels, method=method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = grad_norm(model, images, labels, method=method)
    torch.testing.assert_close(lower, plain, rtol=0.1, atol=0)
    assert not [warning for warning in recwarn if "ghost method does not serve" in str(warning.message)]


@pytest.mark.parametrize("method", ["auto", "loop"])
def test_threads_with_one_model_wait_for_each_other(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    model[0].weight.requires_grad_(False)
    images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    places = [parameter.data_ptr() for parameter in model.parameters()]
    wanted = grad_norm(model, images, labels, method=method)
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(grad_norm, model, images, labels, method=method) for _ in range(24)]
        found = [call.result() for call in calls]
    assert all(torch.equal(one, wanted) for one in found)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert not model[0].weight.requires_grad
