import pytest
import torch
import torch.nn.functional as F

from ddfast.models import create_model, features, list_models
from ddfast.models.convnet import ConvNet

SMALLEST = {"alexnet": 64, "convnet5": 64, "convnet6": 64, "convnet5_in": 64, "convnet6_in": 64}


@pytest.mark.parametrize("name", list_models())
def test_every_listed_model_maps_images_to_logits(name):
    size = SMALLEST.get(name, 32)
    with torch.device("meta"):
        model = create_model(name, 7, size)
        logits = model(torch.empty(2, 3, size, size))
    assert logits.shape == (2, 7)


def test_listed_names_are_the_contracts():
    names = list_models()
    assert names == sorted(names)
    for family in ("convnet3", "convnet4", "convnet5", "convnet6"):
        assert {family, f"{family}_in"} <= set(names)
    resnets = {f"resnet{depth}{stem}" for depth in (18, 50, 101) for stem in ("", "_small")}
    others = {"resnetap10", "mobilenet_v2", "vgg11", "alexnet", "swin_v2_t", "efficientnet_b0"}
    assert resnets | others <= set(names)


def test_convnet_is_conv_norm_relu_pool_then_linear():
    model = create_model("convnet3", 10, 32).eval()
    # 3 x 128 x 9 + 128; 128 x 128 x 9 + 128, twice; three BatchNorms of 2 x 128; 2048 x 10 + 10.
    assert sum(p.numel() for p in model.parameters()) == 3584 + 2 * 147584 + 3 * 256 + 20490
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    state = dict(model.state_dict())
    hidden = images
    for block in range(3):
        conv, norm = f"blocks.{4 * block}", f"blocks.{4 * block + 1}"
        hidden = F.conv2d(hidden, state[f"{conv}.weight"], state[f"{conv}.bias"], padding=1)
        hidden = F.batch_norm(
            hidden,
            state[f"{norm}.running_mean"],
            state[f"{norm}.running_var"],
            state[f"{norm}.weight"],
            state[f"{norm}.bias"],
        )
        hidden = F.avg_pool2d(F.relu(hidden), 2)
    expected = hidden.flatten(1) @ state["classifier.weight"].T + state["classifier.bias"]
    torch.testing.assert_close(model(images), expected)


def test_instance_norm_variant_normalises_every_channel_of_every_image():
    model = create_model("convnet3_in", 10, 32, width=8)
    assert isinstance(model, ConvNet)
    hidden = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.blocks[1](hidden), F.instance_norm(hidden))


def test_width_is_an_option():
    assert create_model("convnet4", 3, 32, width=16).classifier.in_features == 16 * 2 * 2


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 512), ("resnet50", 2048), ("resnet101", 2048)])
def test_small_resnets_keep_a_4x4_map_at_32_px(name, channels):
    with torch.device("meta"):
        model = create_model(f"{name}_small", 10, 32)
        maps = []
        model.layer4.register_forward_hook(lambda _, __, output: maps.append(output.shape))
        assert model(torch.empty(1, 3, 32, 32)).shape == (1, 10)
    assert maps == [(1, channels, 4, 4)]
    assert model.conv1.stride == (1, 1)
    assert model.conv1.bias is None


@pytest.mark.parametrize("name", ["convnet3", "resnet18_small", "mobilenet_v2"])
def test_features_are_what_the_last_linear_layer_reads(name):
    torch.manual_seed(0)
    model = create_model(name, 5, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    penultimate = features(model, images)
    last = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    torch.testing.assert_close(last(penultimate), model(images))
    assert penultimate.requires_grad


def test_features_need_a_linear_layer():
    with pytest.raises(ValueError, match="no linear layer"):
        features(torch.nn.Conv2d(3, 3, 1), torch.zeros(1, 3, 4, 4))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("convnet7", 10, 32), {}, "unknown model 'convnet7'; known: alexnet, alexnet_in, convnet3"),
        (("convnet3", 10, 30), {}, "multiple of 8, got 30"),
        (("convnet6", 10, 32), {}, "multiple of 64, got 32"),
        (("convnet3", 10, 0), {}, "multiple of 8, got 0"),
        (("convnet3", 10, None), {}, "needs image_size"),
        (("convnet3", 0, 32), {}, "at least 1, got 0"),
        (("convnet3", 10, 32), {"depth": 4}, "does not take the option depth; it takes: width"),
        (("resnet18", 10, 32), {"width": 4}, "does not take the option width; it takes: none"),
        (("alexnet", 10, 32), {}, "at least 63 px"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(arguments, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        create_model(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_timm_names_pass_through():
    pytest.importorskip("timm")
    with torch.device("meta"):
        model = create_model("timm:resnet10t", 4, 32)
        assert model(torch.empty(2, 3, 32, 32)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"timm has no model 'resnet10x'.*resnet10t"):
        create_model("timm:resnet10x", 4)
