"""One method of each family, as small as it comes, with what it needs: what the trials break."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.trials.processes import SIDE, launch

CLASSES = ("across", "down", "rising")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


@dataclass(frozen=True)
class Subject:
    """A method, the options of its runs, and what is made for it once.

    Attributes:
        method: as `ddfast distill` takes it.
        options: of a run.
        needs: option -> what makes the file or folder at a path, of the data.
        per_class: images of the rendered set.
        scores: whether it has a score table; else a state for each group of classes.
    """

    method: str
    options: tuple[str, ...]
    needs: tuple[tuple[str, Callable[[Path, Path], Path]], ...] = ()
    per_class: int = 100
    scores: bool = False

    def made(self, folder: Path, data: Path) -> list[str]:
        """The options that name what it needs, which is made in `folder`."""
        given = [(name, make(folder / name.removeprefix("--"), data)) for name, make in self.needs]
        return [word for name, path in given for word in (name, str(path))]

    def command(self, data: Path, out: Path, needs: Sequence[str], *extra: str) -> list[str]:
        """Arguments of `ddfast`."""
        where = ("distill", self.method, "--data", str(data), "--out", str(out), *needs)
        return [*where, "--ipc", "2", "--workers", "1", *self.options, "--resume", "--quiet", *extra]


def render_set(root: Path, per_class: int = 100, seed: int = 0) -> Path:
    """An image folder of stripes, `per_class` PNG images of 16 px in each of three classes."""
    from PIL import Image

    draws = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    for name, along in zip(CLASSES, (y, x, x + y), strict=True):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for number in range(per_class):
            wave = np.sin(along * 1.1 + draws.uniform(0, 6.28))[..., None] * draws.uniform(0.3, 1.0, 3)
            pixels = 128 + 70 * wave + draws.normal(0, 20, (SIDE, SIDE, 3))
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{number:04d}.png")
    return root


def make_teacher(path: Path, data: Path | None = None) -> Path:
    """A ConvNet of random weights: faults do not care what it knows."""
    import torch

    from ddfast.models import create_model, save_teacher

    path = path.with_suffix(".safetensors")
    torch.manual_seed(0)
    model = create_model("convnet3", len(CLASSES), image_size=SIDE, width=8).eval()
    save_teacher(
        path,
        model,
        arch="convnet3",
        arch_options={"width": 8},
        class_names=CLASSES,
        image_size=SIDE,
        mean=MEAN,
        std=STD,
    )
    return path


def make_experts(path: Path, data: Path) -> Path:
    """An expert of two epochs, trained in a process of its own: a process that has trained cannot be forked."""
    words = ["train-experts", "--data", str(data), "--out", str(path), "--count", "1", "--epochs", "2"]
    outcome = launch([*words, "--images-per-class", "8", "--lr", "0.02", "--quiet"])
    if not outcome.done:
        raise SystemExit(f"the experts were not trained: {outcome.said}")
    return path


def make_prior(path: Path, data: Path | None = None) -> Path:
    """A diffusers pipeline of a random network."""
    import torch

    from ddfast.models.diffusion import diffusers_is_there

    diffusers_is_there()
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=SIDE,
        layers_per_block=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=len(CLASSES),
        add_attention=False,
    )
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(path)
    return path


def make_estimator(path: Path, data: Path | None = None) -> Path:
    """An estimator of random weights."""
    import torch
    from torch import nn

    from ddfast.models.estimator import Encoder, estimator_bytes

    path = path.with_suffix(".safetensors")
    torch.manual_seed(0)
    encoder = Encoder("convnet3_in", SIDE, width=8)
    classifier = nn.Linear(encoder.width, len(CLASSES))
    content = estimator_bytes(
        encoder,
        classifier,
        arch="convnet3_in",
        arch_options={"width": 8},
        class_names=CLASSES,
        image_size=SIDE,
        mean=MEAN,
        std=STD,
        tau=0.07,
    )
    path.write_bytes(content)
    return path


_TAUGHT = (("--teacher", make_teacher),)
SUBJECTS = {
    "selection": Subject("infoutil", ("--factor", "2", "--no-preflight"), _TAUGHT, scores=True),
    "matching": Subject("dm", ("--iterations", "4", "--real-batch", "4", "--class-batch", "1"), per_class=20),
    "trajectory": Subject(
        "mtt",
        (
            *("--iterations", "4", "--syn-steps", "2", "--expert-epochs", "1", "--max-start-epoch", "1"),
            *("--lr-img", "1"),
        ),
        (("--experts", make_experts),),
        per_class=20,
    ),
    "diffusion": Subject(
        "igds",
        ("--steps", "4", "--class-batch", "1", "--no-preflight"),
        (*_TAUGHT, ("--prior", make_prior), ("--estimator", make_estimator)),
        per_class=20,
    ),
}
"""A method of each family, by the family."""
