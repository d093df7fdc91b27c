"""The estimator: encoders of every source, Softplus for ReLU, and what is said of files that cannot serve."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ddfast.errors import UsageError
from ddfast.models.estimator import Encoder, Estimator, Softplus, estimator_identity, load_estimator, smoothed
from ddfast.models.registry import create_model, features
from ddfast.seeding import seeded
from tests.methods.diffusion.conftest import CLASSES, save_estimator


@pytest.mark.parametrize(
    ("arch", "size", "options"),
    [
        ("convnet3_in", 16, {"width": 8}),
        ("resnet18_small", 16, {}),
        ("timm:resnet10t", 32, {}),
        ("torchvision:shufflenet_v2_x0_5", 32, {}),
    ],
)
def test_encoders_of_every_source_project_to_length_1(arch, size, options):
    encoder = Encoder(arch, size, **options).eval()
    images = torch.randn(2, 3, size, size)
    seen = encoder(images)
    assert seen.shape == (2, 128)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(2))
    assert encoder.features(images).shape == (2, encoder.width)


def test_features_are_the_input_of_the_last_layer():
    with seeded("network"):
        network = create_model("convnet3_in", 2, 16, width=8)
    with seeded("network"):
        encoder = Encoder("convnet3_in", 16, width=8)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(encoder.features(images), features(network, images))


@pytest.mark.parametrize(
    "arch", ["convnet3_in", "resnet18_in", "resnetap10", "vgg11_in", "alexnet_in", "resnet18"]
)
def test_no_relu_hides_in_the_code_of_a_network(arch):
    """One that is called as a function would stay where the others are replaced."""

    class Watch(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            assert "relu" not in getattr(function, "__name__", ""), function
            return function(*args, **(kwargs or {}))

    smooth = smoothed(Encoder(arch, 32).eval())
    with torch.no_grad(), Watch():
        smooth(torch.randn(2, 3, 32, 32))


def test_softplus_stands_for_every_relu_and_shares_the_weights():
    encoder = Encoder("resnet18_small", 16).eval()
    smooth = smoothed(encoder)
    assert any(isinstance(module, nn.ReLU) for module in encoder.modules())
    assert not any(isinstance(module, nn.ReLU) for module in smooth.modules())
    sharp = [module.beta for module in smooth.modules() if isinstance(module, nn.Softplus)]
    assert sharp
    assert set(sharp) == {3.0}
    assert [id(value) for value in smooth.parameters()] == [id(value) for value in encoder.parameters()]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_our_softplus_is_pytorchs(layout):
    values = torch.cat([torch.linspace(-60, 60, 4003), torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30])])
    values = values.view(1, 3, -1, 4).contiguous(memory_format=layout)
    ours, theirs = values.clone().requires_grad_(), values.clone().double().requires_grad_()
    found, wanted = Softplus(beta=3.0)(ours), nn.functional.softplus(theirs, 3.0, threshold=600)
    torch.testing.assert_close(found.detach().double(), wanted.detach(), rtol=2e-7, atol=5e-8)
    weights = torch.randn_like(values)
    (pulled,) = torch.autograd.grad((found * weights).sum(), ours)
    torch.testing.assert_close(pulled, torch.sigmoid(3 * values) * weights, rtol=1e-5, atol=1e-7)
    assert torch.equal(ours.detach(), values)


def test_reading_is_smooth_in_the_images():
    """A second difference along a line falls with the square of the step, which a ReLU's kink would not let it."""
    encoder = Encoder("convnet3_in", 16, width=8).double().eval()
    estimator = Estimator(
        encoder,
        nn.Linear(encoder.width, 3).double(),
        "convnet3_in",
        CLASSES,
        16,
        (0.5,) * 3,
        (0.25,) * 3,
        0.07,
    )
    images, along = torch.randn(2, 2, 3, 16, 16, dtype=torch.float64).unbind()
    read = lambda step: estimator.smooth.features(estimator.normalised(images + step * along))  # noqa: E731
    second = [(read(h) - 2 * read(0.0) + read(-h)).norm() / h**2 for h in (1e-3, 5e-4)]
    torch.testing.assert_close(second[0], second[1], rtol=1e-2, atol=0)


def test_normalised_images_are_those_of_training():
    encoder = Encoder("convnet3_in", 16, width=8)
    estimator = Estimator(
        encoder,
        nn.Linear(encoder.width, 3),
        "convnet3_in",
        CLASSES,
        16,
        (0.5, 0.4, 0.3),
        (0.1, 0.2, 0.3),
        0.07,
    )
    unit = torch.rand(2, 3, 16, 16)
    wanted = (unit - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor([0.1, 0.2, 0.3]).view(
        3, 1, 1
    )
    torch.testing.assert_close(estimator.normalised(2 * unit - 1), wanted)
    assert estimator.normalised(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 16, 16)


def test_a_file_comes_back(tmp_path):
    path = save_estimator(tmp_path / "e.safetensors", top1=71.5, training={"kl": 0.1, "epochs": 3})
    estimator = load_estimator(path)
    assert (estimator.class_names, estimator.image_size, estimator.tau) == (CLASSES, 16, 0.07)
    assert not any(value.requires_grad for value in estimator.encoder.parameters())
    found = estimator_identity(path)
    assert (found["arch"], found["top1"], found["lambda"]) == ("convnet3_in", 71.5, 0.1)
    assert estimator.places_of(["rising", "across"]) == [2, 0]
    estimator.check_gradients()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no complete safetensors"),
        (b"PK\x03\x04 pickled", "is a pickle"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "e.safetensors"
    path.write_bytes(content)
    for read in (load_estimator, estimator_identity):
        with pytest.raises(UsageError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_a_teacher_is_no_estimator(tmp_path, toy_teacher):
    with pytest.raises(UsageError, match=r"is no estimator of this version: make one with"):
        load_estimator(toy_teacher)
    with pytest.raises(UsageError, match="is a folder, not a file"):
        load_estimator(tmp_path)


def test_unknown_encoders_are_refused():
    for arch, message in (("convnet9", "unknown model"), ("torchvision:nonet", "torchvision has no model")):
        with pytest.raises(ValueError, match=message):
            Encoder(arch, 16)
