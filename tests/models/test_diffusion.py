"""Priors as diffusers saves them, in pixels and in latents, and what is said of those that cannot serve."""

import json
import shutil

import pytest
import torch

from ddfast.errors import UsageError
from ddfast.models.diffusion import (
    _SEVERAL,
    Prior,
    _places,
    find_prior,
    load_prior,
    new_denoiser,
    new_schedule,
    prior_identity,
    sample,
    save_prior,
)
from ddfast.seeding import generator, seeded
from tests.methods.diffusion.conftest import SIZE, save_pipeline, unet


def vae(kind, **settings):
    import diffusers

    return getattr(diffusers, kind)(
        **{
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "layers_per_block": 1,
            **settings,
        }
    )


def save_ldm(folder):
    from diffusers import DDIMScheduler, LDMPipeline

    with seeded("ldm"):
        network = unet(sample_size=8, in_channels=4, out_channels=4)
        decoder = vae("VQModel", num_vq_embeddings=16, vq_embed_dim=4)
        LDMPipeline(decoder, network, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


def save_dit(folder):
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    with seeded("dit"):
        network = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=3,
        )
        DiTPipeline(network, vae("AutoencoderKL"), DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    # As the published ones have it.
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "across", "1": "down, descending", "2": "rising"}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("priors")
    return {
        "DDPMPipeline": save_pipeline(root / "ddpm"),
        "LDMPipeline": save_ldm(root / "ldm"),
        "DiTPipeline": save_dit(root / "dit"),
    }


@pytest.mark.parametrize(
    ("kind", "shape", "classes"),
    [("DDPMPipeline", (3, 16, 16), 3), ("LDMPipeline", (4, 8, 8), 3), ("DiTPipeline", (4, 8, 8), 3)],
)
def test_every_kind_of_pipeline_samples(folders, kind, shape, classes):
    prior = load_prior(folders[kind])
    assert (prior.shape, prior.classes, prior.image_size) == (shape, classes, 16)
    assert not any(value.requires_grad for value in prior.denoiser.parameters())
    labels = torch.tensor(prior.labels_of(["across", "down", "rising"]))
    images = sample(prior, labels, [generator("draw", number) for number in range(3)], 3)
    assert images.shape == (3, 3, 16, 16)
    assert bool(images.isfinite().all())
    assert images.std() > 0
    assert prior_identity(folders[kind])["kind"] == kind


def test_samples_of_pixels_are_those_of_the_pipeline(folders):
    """Without classes and with the same draws, diffusers' own pipeline makes the same images."""
    from diffusers import DDPMPipeline, DDPMScheduler

    folder = folders["DDPMPipeline"].parent / "plain"
    save_pipeline(folder, num_class_embeds=None, scheduler=DDPMScheduler(timestep_spacing="linspace"))
    pipeline = DDPMPipeline.from_pretrained(folder)
    draws = torch.Generator().manual_seed(3)
    wanted = pipeline(batch_size=1, generator=draws, num_inference_steps=5, output_type="pt").images
    prior = load_prior(folder)
    found = sample(prior, None, [torch.Generator().manual_seed(3)], 5)
    torch.testing.assert_close((found + 1) / 2, wanted)


def test_decoding_latents_is_differentiable_and_scaled(folders):
    prior = load_prior(folders["DiTPipeline"])
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    images = prior.decode(latents)
    wanted = prior.vae.decode(latents / prior.vae.config.scaling_factor).sample
    torch.testing.assert_close(images, wanted)
    assert torch.autograd.grad(images.square().sum(), latents)[0].abs().max() > 0


def test_classifier_free_guidance_leads_away_from_no_class(folders):
    prior = load_prior(folders["DiTPipeline"])
    assert prior.no_class == 3
    assert load_prior(folders["DDPMPipeline"]).no_class is None
    noisy = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels, timestep = torch.tensor([0, 2]), torch.tensor(500)
    with torch.no_grad():
        said = [
            prior.denoiser(noisy, timestep.expand(2), class_labels=of).sample[:, :4]
            for of in (labels, torch.tensor([3, 3]))
        ]
        found = prior.predict(noisy, timestep, labels, cfg=4.0)
    torch.testing.assert_close(found, said[1] + 4 * (said[0] - said[1]))
    assert (said[0] - said[1]).abs().max() > 0


def test_names_of_classes_lead_to_labels(folders):
    prior = load_prior(folders["DiTPipeline"])
    assert prior.labels_of(["rising", "descending"]) == [2, 1]
    with pytest.raises(UsageError, match="does not know the class cat: it knows across"):
        prior.labels_of(["rising", "cat"])
    assert prior.labels_of(["rising", "0"], numbers=True) == [2, 0]
    with pytest.raises(UsageError, match="does not know the class 0"):
        prior.labels_of(["rising", "0"])
    with pytest.raises(UsageError, match=r"has labels up to 2, and prior_classes asks for 3"):
        prior.labels_of(["3"], numbers=True)
    unnamed = load_prior(folders["DDPMPipeline"])
    assert unnamed.labels_of(["2", "0"], numbers=True) == [2, 0]
    assert unnamed.labels_of(["a", "b", "c"]) == [0, 1, 2]
    with pytest.raises(UsageError, match="knows 3 classes, the run has 2"):
        unnamed.labels_of(["a", "b"])


def test_a_grey_prior_makes_rgb_images(tmp_path):
    prior = load_prior(save_pipeline(tmp_path / "grey", in_channels=1, out_channels=1))
    images = sample(prior, torch.zeros(2, dtype=torch.int64), [generator(0), generator(1)], 2)
    assert images.shape == (2, 3, 16, 16)
    assert torch.equal(images[:, 0], images[:, 2])


def test_a_network_alone_gets_the_noise_of_ddpm(tmp_path):
    with seeded("alone"):
        unet().save_pretrained(tmp_path / "unet")
    prior = load_prior(tmp_path / "unet")
    assert (prior.schedule["beta_start"], prior.schedule["beta_end"]) == (1e-4, 0.02)
    assert prior.scheduler(250).timesteps[[0, -1]].tolist() == [999, 0]
    assert len(prior.scheduler(250).timesteps) == 250


def test_our_network_is_saved_and_opened(tmp_path):
    with seeded("ours"):
        network = new_denoiser(16, 3, 8)
    save_prior(tmp_path / "ours", network, new_schedule())
    prior = load_prior(tmp_path / "ours")
    for name, value in network.state_dict().items():
        assert torch.equal(prior.denoiser.state_dict()[name], value)
    large = new_denoiser(32, 10, 32)
    assert 0.7e6 < sum(value.numel() for value in large.parameters()) < 2.5e6
    for size, width, message in ((32, 12, "width must be a multiple of 8"), (50, 8, "cannot be halved down")):
        with pytest.raises(UsageError, match=message):
            new_denoiser(size, 3, width)
    assert new_denoiser(28, 3, 8).config.sample_size == 28


def test_the_identity_follows_the_files(folders, tmp_path):
    first = prior_identity(folders["DDPMPipeline"])
    moved = tmp_path / "moved"
    shutil.copytree(folders["DDPMPipeline"], moved)
    assert prior_identity(moved) == first
    (moved / "prior.json").write_text(json.dumps({"class_names": ["a", "b", "c"]}))
    assert prior_identity(moved) != first


def broken(folder, tmp_path, change):
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    change(copy)
    with pytest.raises(UsageError) as caught:
        load_prior(copy)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_latent_prior_without_its_vae_is_refused(folders, tmp_path):
    said = broken(folders["DiTPipeline"], tmp_path, lambda folder: shutil.rmtree(folder / "vae"))
    assert "is a DiTPipeline, one of latents, and lacks its VAE (vae/)" in said
    with pytest.raises(UsageError, match="latents without its VAE"):
        load_prior(folders["DiTPipeline"] / "transformer")
    with pytest.raises(UsageError, match="has 4 channels, which are no pixels, and no VAE"):
        load_prior(folders["LDMPipeline"] / "unet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model_index.json").write_text("{"), "cannot be read"),
        (
            lambda folder: (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
            "is a FluxPipeline",
        ),
        (lambda folder: shutil.rmtree(folder / "unet"), r"lacks its network \(unet/\)"),
        (lambda folder: (folder / "model_index.json").unlink(), "holds no model_index.json of diffusers"),
        (
            lambda folder: (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"short"),
            "cannot be read",
        ),
    ],
)
def test_a_damaged_prior_is_refused(folders, tmp_path, change, message):
    import re

    assert re.search(message, broken(folders["DDPMPipeline"], tmp_path, change))


@pytest.mark.parametrize("name", ["DiffusionPipeline", "AutoModel", "load_image", "NoSuchModel"])
def test_a_part_that_is_no_network_of_diffusers_is_refused(folders, tmp_path, name):
    """A pipeline or an automatic class would read on, and might run the code that a folder brings."""

    def rename(folder):
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": name}))

    assert f"has a part {name}, which is no network of diffusers" in broken(
        folders["DDPMPipeline"], tmp_path, rename
    )


def test_a_prior_of_nan_is_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    def spoil(folder):
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        tensors["conv_in.weight"][0] = torch.nan
        save_file(tensors, path, metadata={"format": "pt"})

    assert "holds NaN or infinity in conv_in.weight" in broken(folders["DDPMPipeline"], tmp_path, spoil)


def test_a_name_that_cannot_be_fetched_is_one_line(monkeypatch, tmp_path):
    import diffusers

    def offline(name, **_):
        raise OSError(f"cannot reach the hub\nfor {name}")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", offline)
    with pytest.raises(
        UsageError, match=r"the prior some/model is no folder, and cannot be fetched"
    ) as caught:
        find_prior("some/model")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda name, **_: str(tmp_path))
    assert find_prior("some/model") == tmp_path


def test_without_diffusers_a_line_says_what_to_install(monkeypatch):
    from ddfast.models import diffusion

    monkeypatch.setattr(diffusion.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'ddfast\[diffusion\]'"):
        load_prior("anything")


def test_our_kernels_are_not_taken_for_the_package_of_that_name(monkeypatch):
    """In a checkout, where transformers would import the folder to see its version."""
    import importlib.util
    from pathlib import Path

    from ddfast.models.diffusion import _own_kernels_hidden

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    monkeypatch.delitem(__import__("sys").modules, "kernels", raising=False)
    assert importlib.util.find_spec("kernels") is not None
    with _own_kernels_hidden():
        assert importlib.util.find_spec("kernels") is None
    assert importlib.util.find_spec("kernels") is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beta_end": "0.02"}, "makes no schedule"),
        ({"beta_start": float("nan")}, "makes no schedule .*no shares"),
        ({"beta_schedule": []}, "makes no schedule"),
        ({"trained_betas": {"a": 1}}, "makes no schedule"),
        ({"num_train_timesteps": float("nan")}, "has num_train_timesteps nan, wanted a number from 2"),
        ({"num_train_timesteps": 10**18}, "has num_train_timesteps 10{18}, wanted"),
        ({"num_train_timesteps": "1000"}, "has num_train_timesteps 1000, wanted"),
        ({"num_train_timesteps": 1}, "has num_train_timesteps 1, wanted"),
    ],
)
def test_a_schedule_that_diffusers_does_not_take_is_refused_at_once(folders, tmp_path, settings, said):
    folder = shutil.copytree(folders["DDPMPipeline"], tmp_path / "prior")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(UsageError, match=said) as found:
        load_prior(folder)
    assert str(found.value).endswith("copy the prior again")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_json_that_nests_too_deep_is_refused(folders, tmp_path, name):
    folder = shutil.copytree(folders["DDPMPipeline"], tmp_path / "prior")
    (folder / name).write_text('{"_class_name": ' + "[" * 100_000)
    with pytest.raises(UsageError, match=r"cannot be read .*: copy the prior again"):
        load_prior(folder)


@pytest.mark.parametrize("label", ["one", "-1", "1.0", "²", ""])
def test_a_label_that_is_no_number_is_refused(folders, tmp_path, label):
    folder = shutil.copytree(folders["DiTPipeline"], tmp_path / "prior")
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {"0": "across", label: "down"}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match=r"has '.*' for a label, wanted a number: copy the prior again$"):
        load_prior(folder)


def test_a_name_of_two_classes_is_refused():
    places = _places({}, {"id2label": {"0": "crane, bird", "1": "crane, machine", "2": "tench, tench"}})
    assert places == {"crane": _SEVERAL, "bird": 0, "machine": 1, "tench": 2}
    prior = Prior(torch.nn.Identity(), {}, None, places, 3, SIZE, (3, SIZE, SIZE), "there")
    assert prior.labels_of(["tench", "bird"]) == [2, 0]
    with pytest.raises(
        UsageError, match="several classes by the name crane: give the label's number in prior_classes"
    ):
        prior.labels_of(["crane"])
    assert prior.labels_of(["1"], numbers=True) == [1]


def test_other_schedulers_of_the_same_noise_are_read_as_ddpm_and_clip_nothing(tmp_path):
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    for number, (kind, clips) in enumerate([(DPMSolverMultistepScheduler, False), (DDIMScheduler, True)]):
        folder = save_pipeline(tmp_path / str(number))
        kind().save_pretrained(folder / "scheduler")
        assert load_prior(folder).scheduler(10).config.clip_sample is clips
    folder = save_pipeline(tmp_path / "flow")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(UsageError, match="FlowMatchEulerDiscreteScheduler, whose noise is not that of DDPM"):
        load_prior(folder)
