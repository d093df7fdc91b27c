"""Weights that others have published: torchvision's, timm's, and image classifiers in the Hub's layout."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ddfast
from ddfast.cli import main
from ddfast.errors import UsageError
from ddfast.models import create_model, load_teacher, published
from tests.models import huggingface
from tests.models.huggingface import MEAN, STD, make_classifier

CLASSES = ["across", "down", "rising"]  # of the rendered set


def refused(*args, **kwargs):
    with pytest.raises(UsageError) as caught:
        load_teacher(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No call of these tests waits for a network, and transformers is there or stands in."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if not huggingface.INSTALLED:
        monkeypatch.setitem(sys.modules, "transformers", huggingface.STAND_IN)


def images(size, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# timm ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a file into the Hub's cache on this machine, as a download would have."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def put(repository, name, write):
        folder = cache / f"models--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / "0123abcd"
        snapshot.mkdir(parents=True, exist_ok=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text("0123abcd")
        write(snapshot / name)

    return put


def timm_model(name, **options):
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


def test_timm_brings_weights_size_normalisation_and_the_wordnet_ids_of_imagenet(hub):
    theirs = timm_model("mobilenetv3_small_050")
    hub(
        "timm/mobilenetv3_small_050.lamb_in1k",
        "model.safetensors",
        lambda path: save_file(theirs.state_dict(), path),
    )
    teacher = load_teacher("timm:mobilenetv3_small_050.lamb_in1k")
    assert (teacher.arch, teacher.image_size) == ("timm:mobilenetv3_small_050.lamb_in1k", 224)
    assert teacher.mean == (0.485, 0.456, 0.406)
    assert (len(teacher.class_names), teacher.class_names[0]) == (1000, "n01440764")
    assert teacher.path == "timm:mobilenetv3_small_050.lamb_in1k"
    assert not teacher.model.training
    torch.testing.assert_close(teacher.model(images(64)), theirs(images(64)), atol=0, rtol=0)
    # Without the tag it is the same, and other words for the classes replace the ids.
    words = [f"class {place}" for place in range(1000)]
    again = load_teacher("timm:mobilenetv3_small_050", class_names=words)
    assert (again.class_names, again.sha256) == (words, teacher.sha256)
    # Names that it knows are looked up: all in another order, or some.
    turned = load_teacher("timm:mobilenetv3_small_050", class_names=teacher.class_names[::-1])
    torch.testing.assert_close(turned.model(images(64)), theirs(images(64)).flip(1), atol=1e-5, rtol=1e-5)
    some = load_teacher("timm:mobilenetv3_small_050", class_names=["n01443537", "n01440764"])
    torch.testing.assert_close(some.model(images(64)), theirs(images(64))[:, [1, 0]], atol=1e-5, rtol=1e-5)
    first = load_teacher("timm:mobilenetv3_small_050", class_names=teacher.class_names[:3])
    assert first.model(images(64)).shape == (2, 3)


def test_what_timm_says_of_its_images_is_taken():
    import timm

    for name, size, mean in (
        ("vit_tiny_patch16_224", 224, (0.5, 0.5, 0.5)),
        ("tf_efficientnet_b1", 240, (0.485, 0.456, 0.406)),
        ("vit_tiny_patch16_384", 384, (0.5, 0.5, 0.5)),
        ("inception_v3", 299, (0.5, 0.5, 0.5)),
    ):
        config = timm.get_pretrained_cfg(name)
        found = published.described_input(f"timm:{name}")
        assert found == (size, mean, tuple(config.std)), name


def test_timm_that_cannot_be_had_is_one_line(hub, monkeypatch):
    told = refused("timm:mobilenetv3_small_050.lamb_in1k")
    assert told.startswith("the weights of timm:mobilenetv3_small_050.lamb_in1k could not be downloaded: ")
    assert told.endswith(
        "; where there is no network give a file of them, with the architecture timm:mobilenetv3_small_050.lamb_in1k"
    )
    assert "did you mean resnet18, " in refused("timm:resnett18")
    assert "it has resnet18.a1_in1k, " in refused("timm:resnet18.nobody")
    assert "timm: wants a name behind the colon, as timm:resnet18.a1_in1k" in refused("timm:")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert refused("timm:resnet18") == "timm:resnet18 needs the package timm: pip install timm"


def test_a_timm_model_without_a_classifier_is_refused(tmp_path):
    import timm

    model = timm_model("resnet10t", num_classes=0)
    timm.models.save_for_hf(model, tmp_path / "features")
    assert "has no classifier, only features" in refused(f"hf:{tmp_path / 'features'}")


def test_a_folder_in_timms_layout_needs_no_other_library(tmp_path, monkeypatch):
    import timm

    model = timm_model("resnet10t", num_classes=3)
    config = {"label_names": CLASSES, "pretrained_cfg": {"mean": (0.1, 0.2, 0.3), "input_size": (3, 96, 96)}}
    timm.models.save_for_hf(model, tmp_path / "mine", model_config=config)
    monkeypatch.setitem(sys.modules, "transformers", None)
    teacher = load_teacher(tmp_path / "mine", class_names=CLASSES[::-1])
    assert (teacher.arch, teacher.image_size, teacher.class_names) == ("timm:resnet10t", 96, CLASSES[::-1])
    torch.testing.assert_close(teacher.model(images(96)), model(images(96)).flip(1), atol=1e-5, rtol=1e-5)


# State dicts of timm and torchvision -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "size", "built"),
    [
        ("timm:resnet10t", 64, lambda: timm_model("resnet10t", num_classes=3)),
        (
            "timm:vit_tiny_patch16_224",
            32,
            lambda: timm_model("vit_tiny_patch16_224", num_classes=3, img_size=32),
        ),
        ("torchvision:shufflenet_v2_x0_5", 64, lambda: torchvision_model("shufflenet_v2_x0_5")),
        ("torchvision:squeezenet1_1", 64, lambda: torchvision_model("squeezenet1_1")),
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_of_timm_and_torchvision_load_by_their_architecture(arch, size, built, ending, tmp_path):
    model = built()
    path = tmp_path / f"weights.{ending}"
    (save_file if ending == "safetensors" else torch.save)(model.state_dict(), path)
    teacher = load_teacher(path, arch=arch, class_names=CLASSES, image_size=size)
    assert (teacher.arch, teacher.image_size, teacher.class_names) == (arch, size, CLASSES)
    torch.testing.assert_close(teacher.model(images(size)), model(images(size)), atol=0, rtol=0)


def torchvision_model(name):
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, num_classes=3).eval()


def test_size_and_normalisation_of_such_weights_are_their_librarys(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(timm_model("vit_tiny_patch16_224", num_classes=3).state_dict(), path)
    teacher = load_teacher(path, arch="timm:vit_tiny_patch16_224", class_names=CLASSES)
    assert (teacher.image_size, teacher.mean, teacher.std) == (224, (0.5,) * 3, (0.5,) * 3)
    own = load_teacher(path, arch="timm:vit_tiny_patch16_224", class_names=CLASSES, normalization="cifar10")
    assert own.mean == (0.4914, 0.4822, 0.4465)
    torch.save(torchvision_model("shufflenet_v2_x0_5").state_dict(), path)
    teacher = load_teacher(path, arch="torchvision:shufflenet_v2_x0_5", class_names=CLASSES)
    assert (teacher.image_size, teacher.mean) == (224, (0.485, 0.456, 0.406))
    assert "needs image_size as well" in refused(path, arch="resnet18", class_names=CLASSES)


def test_architectures_of_torchvision_are_students_too(monkeypatch):
    with torch.device("meta"):
        assert create_model("torchvision:vit_b_16", 4, 32)(torch.empty(2, 3, 32, 32)).shape == (2, 4)
        assert create_model("timm:vit_tiny_patch16_224", 4, 32)(torch.empty(2, 3, 32, 32)).shape == (2, 4)
    with pytest.raises(ValueError, match="torchvision has no classifier 'resnet17'; did you mean resnet1"):
        create_model("torchvision:resnet17", 4)
    with pytest.raises(ValueError, match="no classifier 'fcn_resnet50'"):
        create_model("torchvision:fcn_resnet50", 4)
    import timm

    def assertive(*_, **__):
        raise AssertionError("image size must be\na multiple of 16")

    monkeypatch.setattr(timm, "create_model", assertive)
    with pytest.raises(ValueError, match="cannot be built for 30 px: image size must be a multiple of 16"):
        create_model("timm:vit_tiny_patch16_224", 4, 30)


def test_torchvision_that_is_no_classifier_is_refused():
    assert "is no classifier of images" in refused("torchvision:fcn_resnet50")


# Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["hf:{}", "{}"])
def test_a_folder_of_the_hubs_layout_is_a_teacher(spec, tmp_path):
    model = make_classifier(tmp_path / "net", CLASSES[::-1])
    teacher = load_teacher(spec.format(tmp_path / "net"))
    assert (teacher.arch, teacher.image_size, teacher.class_names) == ("hf:resnet", 16, CLASSES[::-1])
    assert teacher.mean == pytest.approx(MEAN, abs=1e-5)
    assert teacher.std == pytest.approx(STD, abs=1e-5)
    wanted = model(pixel_values=images(16)).logits
    torch.testing.assert_close(teacher.model(images(16)), wanted, atol=1e-6, rtol=1e-6)
    ours = load_teacher(spec.format(tmp_path / "net"), class_names=CLASSES)
    torch.testing.assert_close(ours.model(images(16)), wanted.flip(1), atol=1e-6, rtol=1e-6)
    assert ours.sha256 == teacher.sha256
    assert "has 3 classes, the data has 2, of which it does not know 'ant'" in refused(
        tmp_path / "net", class_names=["down", "ant"]
    )


def test_what_a_processor_does_to_pixels_is_measured(tmp_path):
    model = make_classifier(tmp_path / "turned", CLASSES, turned=True)
    teacher = load_teacher(tmp_path / "turned")
    assert (teacher.mean, teacher.std) == ((0, 0, 0), (1, 1, 1))
    wanted = model(pixel_values=images(16).flip(1)).logits
    torch.testing.assert_close(teacher.model(images(16)), wanted, atol=1e-6, rtol=1e-6)
    # Pixels up to 2, as 1/127.5 makes them, with the same mean and deviation.
    make_classifier(tmp_path / "scaled", CLASSES, factor=1 / 127.5)
    teacher = load_teacher(tmp_path / "scaled")
    assert teacher.mean == pytest.approx([value / 2 for value in MEAN], abs=1e-5)
    assert teacher.std == pytest.approx([value / 2 for value in STD], abs=1e-5)


def test_mean_and_deviation_of_blue_green_and_red_are_turned():
    mean, std = (np.array(values)[None, :, None, None] for values in (MEAN, STD))
    size, found_mean, found_std, turned = published._reading(Odd(lambda p: (p[:, ::-1] - mean) / std), "net")
    assert (size, turned) == (16, True)
    assert found_mean == pytest.approx(MEAN[::-1], abs=1e-5)
    assert found_std == pytest.approx(STD[::-1], abs=1e-5)


def test_a_folder_without_a_processor_is_read_as_the_caller_says(tmp_path):
    model = make_classifier(tmp_path / "net", CLASSES)
    (tmp_path / "net" / "preprocessor_config.json").unlink()
    assert refused(tmp_path / "net").endswith(
        "has no preprocessor_config.json, which says how it reads pixels: give normalization as well"
    )
    assert "give an image_size in its config.json" in refused(tmp_path / "net", normalization="cifar10")
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    (tmp_path / "net" / "config.json").write_text(json.dumps({**config, "image_size": 24}))
    teacher = load_teacher(tmp_path / "net", normalization="cifar10")
    assert (teacher.image_size, teacher.mean) == (24, (0.4914, 0.4822, 0.4465))
    wanted = model(pixel_values=images(24)).logits
    torch.testing.assert_close(teacher.model(images(24)), wanted, atol=1e-6, rtol=1e-6)


class Odd:
    """A processor that does what no mean and deviation does."""

    def __init__(self, how):
        self.how = how

    def __call__(self, images, return_tensors):
        pixels = np.asarray(images, np.float64)[:16, :16].transpose(2, 0, 1)[None] / 255
        return {"pixel_values": self.how(pixels)}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda pixels: pixels**2, "does not read pixels by a mean and a deviation"),
        (lambda pixels: pixels * 0, "does not read pixels by a mean and a deviation"),
        (lambda pixels: pixels[:, :, :8], "reads 8 x 16 px, wanted square"),
        (lambda pixels: pixels[:, :1], r"reads \[1, 1, 16, 16\] of an image"),
        (lambda pixels: pixels[0], r"reads \[3, 16, 16\] of an image"),
    ],
)
def test_a_processor_that_does_more_is_refused(how, message):
    with pytest.raises(UsageError, match=message):
        published._reading(Odd(how), "net")


def test_what_is_no_trained_classifier_is_refused_in_one_line(tmp_path, monkeypatch):
    make_classifier(tmp_path / "net", CLASSES)
    weights = tmp_path / "net" / "model.safetensors"
    held = load_file(weights)
    lacking = next(name for name in sorted(held) if "classifier" in name and name.endswith("weight"))
    save_file({name: value for name, value in held.items() if name != lacking}, weights, {"format": "pt"})
    assert refused(tmp_path / "net").endswith(f"its weights lack {lacking}, so it is no trained classifier")
    (tmp_path / "net" / "config.json").write_text("{}")
    assert "is no image classifier that can be read here" in refused(tmp_path / "net")
    (tmp_path / "net" / "config.json").write_text("{")
    assert "config.json cannot be read" in refused(tmp_path / "net")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(f"hf:{tmp_path / 'empty'}")
    assert "no folder ./nowhere" in refused("hf:./nowhere")
    told = refused("hf:nobody/nothing")
    assert told.startswith("the weights of hf:nobody/nothing could not be downloaded: ")
    assert told.endswith("; where there is no network give its folder as hf:FOLDER")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refused("hf:nobody/nothing") == (
        "hf:nobody/nothing needs the package transformers: pip install transformers"
    )


def learn(model, images):
    """Fit a classifier of the reversed classes to the rendered set."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    inputs = (images.images / 255 - mean) / std
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(model(pixel_values=inputs).logits, 2 - images.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_every_command_takes_one(tmp_path, toy_folder, toy_train, capsys):
    """Its classes stand in another order than the data's; what is made with it is made again by its folder."""
    model = make_classifier(tmp_path / "net", CLASSES[::-1])
    learn(model, toy_train)
    model.save_pretrained(tmp_path / "net")
    spec = f"hf:{tmp_path / 'net'}"
    run = ["--data", str(toy_folder), "--teacher", spec, "--quiet"]
    out = tmp_path / "set"
    assert main(["distill", "rded", *run, "--ipc", "1", "--out", str(out)]) == 0
    plan = json.loads((out / "manifest.json").read_text())
    assert (plan["class_names"], plan["image_size"], plan["teacher"]["arch"]) == (CLASSES, 16, "hf:resnet")
    assert plan["teacher"]["sha256"] == load_teacher(spec).sha256
    student = ["--arch", "convnet3", "--width", "4", "--epochs", "1", "--seeds", "1"]
    assert main(["evaluate", "--distilled", str(out), *run, *student]) == 0
    compared = ["--coreset", "none", "--out", str(tmp_path / "compared")]
    assert main(["compare", str(out), *run, *student, *compared]) == 0
    heat = ["--limit", "1", "--n-samples", "32", "--out", str(tmp_path / "heat")]
    assert main(["attribute", *run, *heat]) == 0
    assert main(["score", "rded", *run, "--ipc", "1", "--out", str(tmp_path / "stages")]) == 0
    for stage in ("select", "compose", "relabel"):
        assert main([stage, str(tmp_path / "stages"), "--teacher", spec, "--quiet"]) == 0
    labels = load_file(tmp_path / "stages" / "soft_labels.safetensors")["soft_labels"]
    assert torch.equal(labels, load_file(out / "soft_labels.safetensors")["soft_labels"])
    capsys.readouterr()
    # From Python: by name, and as labels of its own.
    same = ddfast.distill("rded", data=toy_folder, teacher=spec, ipc=1, out=tmp_path / "again", quiet=True)
    assert torch.equal(load_file(same.path / "soft_labels.safetensors")["soft_labels"], labels)


def test_a_teacher_in_another_order_reads_the_same(tmp_path, toy_folder):
    """Soft labels are those of the model's own outputs, by name."""
    make_classifier(tmp_path / "net", CLASSES[::-1])
    theirs, ours = load_teacher(tmp_path / "net"), load_teacher(tmp_path / "net", class_names=CLASSES)
    batch = images(16, 4)
    for name in CLASSES:
        torch.testing.assert_close(
            theirs.model(batch)[:, theirs.class_names.index(name)],
            ours.model(batch)[:, ours.class_names.index(name)],
        )
