"""A tiny prior and a tiny estimator of three classes at 16 px, untrained, as files."""

import pytest
import torch
from torch import nn

from ddfast.methods.base import Context
from ddfast.models.diffusion import diffusers_is_there
from ddfast.models.estimator import Encoder, estimator_bytes
from ddfast.seeding import seeded

diffusers_is_there()  # ahead of the tests' own imports of it

CLASSES = ["across", "down", "rising"]
SIZE = 16
MEAN, STD = (0.49, 0.48, 0.45), (0.20, 0.21, 0.22)


def unet(**settings):
    from diffusers import UNet2DModel

    return UNet2DModel(
        **{
            "sample_size": SIZE,
            "layers_per_block": 1,
            "block_out_channels": (8, 8),
            "down_block_types": ("DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
            "num_class_embeds": len(CLASSES),
            "add_attention": False,
            **settings,
        }
    )


def save_pipeline(folder, scheduler=None, **settings):
    """A `DDPMPipeline` of a random network."""
    from diffusers import DDPMPipeline, DDPMScheduler

    with seeded("prior"):
        DDPMPipeline(unet(**settings), scheduler or DDPMScheduler()).save_pretrained(folder)
    return folder


def save_estimator(path, class_names=CLASSES, arch="convnet3_in", size=SIZE, **facts):
    with seeded("estimator"):
        encoder = Encoder(arch, size, width=8)
        classifier = nn.Linear(encoder.width, len(class_names))
    path.write_bytes(
        estimator_bytes(
            encoder,
            classifier,
            arch=arch,
            arch_options={"width": 8},
            class_names=class_names,
            image_size=size,
            mean=MEAN,
            std=STD,
            tau=0.07,
            **facts,
        )
    )
    return path


def context_of(*, classes=CLASSES, ipc=1, factor=2, seed=5, precision="float32"):
    return Context(
        teacher=None,
        image_size=SIZE,
        factor=factor,
        seed=seed,
        precision=precision,
        forward_batch=0,
        device=torch.device("cpu"),
        ipc=ipc,
        class_names=tuple(classes),
        mean=MEAN,
        std=STD,
    )


@pytest.fixture(scope="session")
def prior(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("prior") / "prior")


@pytest.fixture(scope="session")
def estimator(tmp_path_factory):
    return save_estimator(tmp_path_factory.mktemp("estimator") / "estimator.safetensors")
