"""Diffusion priors: trained models of `diffusers`, in pixels or in the latents of a VAE, behind one small face.

Networks, schedulers, VAEs and how their files are read are diffusers' own; what stands here says which parts of a
pipeline there are, which classes it knows, and how a step of it is taken.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddfast.arguments import path_of
from ddfast.errors import UsageError, one_line, shown
from ddfast.models.schedules import read_json, read_schedule
from ddfast.wording import argument, on_command_line, plural

PRIOR_FILE = "prior.json"
"""What `train_prior` says of a prior beside diffusers' own files: class names, image size, how it was trained."""

PIPELINES = {"DDPMPipeline": "unet", "LDMPipeline": "unet", "DiTPipeline": "transformer"}
"""Pipelines that serve as priors, and which of their parts denoises."""

_INDEX = "model_index.json"
_VAE = {"LDMPipeline": "vqvae", "DiTPipeline": "vae"}
_BARE = {
    "UNet2DModel": "DDPMPipeline",
    "DiTTransformer2DModel": "DiTPipeline",
}  # a network's folder by itself
_NAME = re.compile(r"[\w.-]+/[\w.-]+")

_SEVERAL = -1  # in place of a label: classes that share a name, which ImageNet has


@dataclass
class Prior:
    """A trained diffusion model. Its space holds images in [-1, 1], or the latents of `vae`.

    Attributes:
        denoiser: diffusers' network, eval mode, float32, frozen: (noisy [B, c, s, s], timestep [B], class labels [B]).
        schedule: settings of the scheduler that it was trained for.
        vae: between latents and images; None where the prior is one of pixels.
        places: the label of every class name that its files know; None where they know none.
        classes: labels that it takes, 0 for a prior without classes.
        no_class: the label that stands for none, of a prior that was trained with one (DiT); else None.
        image_size: side of its images in pixels.
        shape: (c, s, s) of a sample in its space.
        path: where it was found.
    """

    denoiser: nn.Module
    schedule: dict[str, Any]
    vae: nn.Module | None
    places: dict[str, int] | None
    classes: int
    image_size: int
    shape: tuple[int, int, int]
    path: str
    no_class: int | None = None

    def to(self, device: torch.device) -> Prior:
        """Move the networks to a device, and return the same prior."""
        self.denoiser.to(device)
        if self.vae is not None:
            self.vae.to(device)
        return self

    def scheduler(self, steps: int) -> Any:
        """diffusers' DDPM scheduler of the prior's noise, at `steps` of its timesteps from the last down to 0.

        Raises:
            UsageError: the prior was trained with fewer timesteps.
        """
        from diffusers import DDPMScheduler

        trained = int(self.schedule.get("num_train_timesteps", 1000))
        if not 2 <= steps <= trained:
            raise UsageError(
                f"{argument('steps')} must lie in 2..{trained}, the timesteps that the prior {self.path} was trained "
                f"with, got {steps}"
            )
        scheduler = DDPMScheduler.from_config(self.schedule, timestep_spacing="linspace")
        scheduler.set_timesteps(steps)
        return scheduler

    def labels_of(self, class_names: Sequence[str], *, numbers: bool = False) -> list[int] | None:
        """The prior's own labels of these classes; None where it has no classes.

        Args:
            class_names: as the prior's files spell them.
            numbers: a name that the prior does not know may be a label of it.

        Raises:
            UsageError: it was trained on others, or knows several by one name.
        """
        if not self.classes:
            return None
        if numbers:
            named = self.places or {}
            own = {name: int(name) for name in class_names if name not in named and name.isdecimal()}
            if beyond := [name for name, label in own.items() if label >= self.classes]:
                raise UsageError(
                    f"the prior {self.path} has labels up to {self.classes - 1}, and {argument('prior_classes')} "
                    f"asks for {beyond[0]}"
                )
            rest = [name for name in class_names if name not in own]
            known = dict(zip(rest, self.labels_of(rest) or [], strict=True)) if rest else {}
            return [{**known, **own}[name] for name in class_names]
        if self.places is None:
            if self.classes != len(class_names):
                raise UsageError(
                    f"the prior {self.path} knows {plural(self.classes, 'class')}, the run has {len(class_names)}: "
                    "give one that was trained on this run's data"
                )
            return list(range(len(class_names)))
        if lacking := [name for name in class_names if name not in self.places]:
            raise UsageError(
                f"the prior {self.path} does not know the class {shown(lacking[:1])}: it knows "
                f"{shown(self.places, 3)}; say with {argument('prior_classes')} which classes these are, or give a "
                "prior that was trained on this run's data"
            )
        if several := [name for name in class_names if self.places[name] == _SEVERAL]:
            raise UsageError(
                f"the prior {self.path} knows several classes by the name {shown(several[:1])}: give the label's "
                f"number in {argument('prior_classes')}"
            )
        return [self.places[name] for name in class_names]

    def predict(self, noisy: Tensor, timestep: Tensor, labels: Tensor | None, cfg: float = 1.0) -> Tensor:
        """What the network says of noisy samples [B, c, s, s] at one timestep, float32, for the scheduler's `step`.

        Args:
            noisy: in the prior's space.
            timestep: int64 scalar.
            labels: the prior's own, int64 [B]; None for a prior without classes.
            cfg: scale of classifier-free guidance, away from what it says of no class; 1: none.
        """
        if cfg != 1:
            assert labels is not None
            assert self.no_class is not None
            own = self.predict(noisy, timestep, labels)
            channels = noisy.shape[1]
            without = self.predict(noisy, timestep, torch.full_like(labels, self.no_class))[:, :channels]
            return torch.cat([without + cfg * (own[:, :channels] - without), own[:, channels:]], dim=1)
        said = self.denoiser(
            noisy,
            timestep=timestep.to(noisy.device).expand(len(noisy)),
            class_labels=labels,
            return_dict=False,
        )[0].float()
        learned = str(self.schedule.get("variance_type", "")).startswith("learned")
        # A network that says variances too, with a scheduler that takes fixed ones.
        return said if learned or said.shape[1] == noisy.shape[1] else said[:, : noisy.shape[1]]

    def decode(self, samples: Tensor) -> Tensor:
        """Images [B, 3, S, S] in [-1, 1], nearly, of samples of the prior's space; differentiable."""
        if self.vae is not None:
            scale = float(getattr(self.vae.config, "scaling_factor", 1.0))  # type: ignore[arg-type]
            samples = self.vae.decode(samples / scale, return_dict=False)[0].float()  # type: ignore[operator]
        return samples.expand(-1, 3, -1, -1) if samples.shape[1] == 1 else samples


@torch.no_grad()
def sample(prior: Prior, labels: Tensor | None, draws: Sequence[torch.Generator], steps: int) -> Tensor:
    """Plain ancestral samples, a generator an image (or one for several in a row): images [B, 3, S, S] in [-1, 1].

    Args:
        prior: on its device.
        labels: the prior's own, int64 [B]; None for a prior without classes.
        draws: generators of the CPU, B of them.
        steps: of the scheduler.
    """
    scheduler, device = prior.scheduler(steps), next(prior.denoiser.parameters()).device
    noisy = noise(prior, draws, device)
    for timestep in scheduler.timesteps:
        noisy = scheduler.step(
            prior.predict(noisy, timestep, labels), timestep, noisy, generator=list(draws)
        ).prev_sample
    return prior.decode(noisy).clamp(-1, 1)


def noise(prior: Prior, draws: Sequence[torch.Generator], device: torch.device) -> Tensor:
    """What sampling begins with: standard normal [B, c, s, s], an image by each generator."""
    return torch.stack([torch.randn(prior.shape, generator=each) for each in draws]).to(device)


def new_denoiser(image_size: int, classes: int, width: int, channels: int = 3) -> nn.Module:
    """An untrained class-conditional `UNet2DModel` of RGB images, or of grey ones of one channel.

    Sides are halved down to 8 px, with attention on the smallest; the first level has `width` channels, the others
    twice as many. Width 32 at 32 px has 1.6 million parameters.

    Raises:
        UsageError: a width that is no multiple of 8, or a side that cannot be halved.
    """
    diffusers_is_there()
    from diffusers import UNet2DModel

    if width % 8 or width < 8:
        raise UsageError(f"{argument('width')} must be a multiple of 8, got {width}")
    sides = [image_size]
    while sides[-1] > 8 and sides[-1] % 2 == 0:
        sides.append(sides[-1] // 2)
    if sides[-1] > 16:
        raise UsageError(
            f"{argument('image_size')} {image_size} cannot be halved down to 16 px or fewer: give a multiple of "
            f"{2 ** max(1, math.ceil(math.log2(image_size / 16)))}"
        )
    plain, widths = len(sides) - 1, [width] + [2 * width] * (len(sides) - 1)
    network: nn.Module = UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=2,
        block_out_channels=tuple(widths),
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        norm_num_groups=8,
        num_class_embeds=classes,
    )
    return network


def new_schedule() -> dict[str, Any]:
    """Settings of the noise of DDPM: 1000 timesteps, beta from 0.0001 to 0.02 in equal steps, epsilon predicted."""
    diffusers_is_there()
    from diffusers import DDPMScheduler

    return dict(DDPMScheduler().config)


# Files
# ----------------------------------------------------------------------------------------------------------


def diffusers_is_there() -> None:
    """Check for the package, and import what is used of it.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise UsageError(
            "diffusion priors need the package diffusers, which is not installed: pip install 'ddfast[diffusion]'"
        )
    with _own_kernels_hidden():
        from diffusers import DDPMPipeline, UNet2DModel
        from diffusers.training_utils import EMAModel

        assert DDPMPipeline is not None
        assert UNet2DModel is not None
        assert EMAModel is not None


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@contextmanager
def _own_kernels_hidden() -> Iterator[None]:
    """Keep a checkout's folder `kernels` from being taken for the package of that name, where Python's path has it.

    `transformers`, which diffusers imports where it is installed, imports whatever is found by that name, and asks for
    the version that only an installed package has.
    """
    if "kernels" in sys.modules or importlib.util.find_spec("kernels") is None or _is_installed("kernels"):
        yield
        return
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]


def save_prior(folder: Path, denoiser: nn.Module, schedule: dict[str, Any]) -> None:
    """Write a network and its scheduler into a folder as `DDPMPipeline.save_pretrained` does."""
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(denoiser, DDPMScheduler.from_config(schedule)).save_pretrained(folder)


def find_prior(spec: str | Path) -> Path:
    """The folder of a prior: the one that is named, or what diffusers fetches, or has fetched, by a name `owner/name`.

    Raises:
        UsageError: no such folder, or the name cannot be fetched.
    """
    diffusers_is_there()
    path = path_of(spec, "prior")
    if path.is_dir():
        return path
    advice = "ddfast train-prior" if on_command_line() else "ddfast.training.train_prior"
    if path.exists() or not _NAME.fullmatch(str(spec)):
        what = "is a file, not a folder" if path.exists() else "is no folder"
        raise UsageError(f"the prior {spec} {what}: give one of {advice}, or a diffusers pipeline's")
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    spoken = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what goes wrong is told below, in a line
    try:
        return Path(DiffusionPipeline.download(str(spec)))
    except Exception as error:  # whatever a network, a hub or a cache may raise
        raise UsageError(
            f"the prior {spec} is no folder, and cannot be fetched by that name ({one_line(error)}): give the folder "
            "of one that is here"
        ) from error
    finally:
        logging.set_verbosity(spoken)


def load_prior(spec: str | Path) -> Prior:
    """Load a prior in eval mode, float32, on the CPU, frozen.

    Args:
        spec: a folder of `train_prior`, of `DDPMPipeline`, `LDMPipeline` or `DiTPipeline.save_pretrained`, or of a
            `UNet2DModel` alone, which gets DDPM's own noise; or a name `owner/name` that diffusers can fetch.

    Raises:
        UsageError: one line: no such prior, another kind of pipeline, a latent prior without its VAE, a damaged file.
    """
    folder = find_prior(spec)
    kind, parts = _parts(folder)
    denoiser = _network(parts["denoiser"], folder)
    vae = _network(parts["vae"], folder) if "vae" in parts else None
    held = denoiser.config
    channels, side = int(held.in_channels), held.sample_size  # type: ignore[union-attr, arg-type]
    if isinstance(side, (list, tuple)):
        side = side[0] if len(set(side)) == 1 else None
    if not isinstance(side, int):
        raise UsageError(f"the prior {folder} says no square sample_size: give one of square images")
    if vae is None and channels not in (1, 3):
        raise UsageError(
            f"the prior {folder} has {channels} channels, which are no pixels, and no VAE that decodes them: give the "
            "whole pipeline's folder"
        )
    scale = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)  # type: ignore[union-attr, arg-type]
    said = read_json(folder / PRIOR_FILE) if (folder / PRIOR_FILE).is_file() else {}
    return Prior(
        denoiser=denoiser,
        schedule=read_schedule(parts.get("scheduler")) or new_schedule(),
        vae=vae,
        places=_places(said, read_json(folder / _INDEX) if (folder / _INDEX).is_file() else {}),
        classes=_classes(denoiser, kind, folder),
        image_size=side * scale,
        shape=(channels, side, side),
        path=str(spec),
        no_class=_no_class(denoiser, kind),
    )


def prior_identity(spec: str | Path) -> dict[str, Any]:
    """What a manifest says of a prior: "kind", its pipeline, and "sha256", of the names and bytes of its parts' files.

    Raises:
        UsageError: see `load_prior`.
    """
    folder = find_prior(spec)
    kind, parts = _parts(folder)
    paths = sorted(
        path
        for part in parts.values()
        for path in ([part / "config.json", *_weights(part)] if part.name != "scheduler" else part.iterdir())
        if path.is_file()
    )
    paths += [path for name in (_INDEX, PRIOR_FILE) if (path := folder / name).is_file()]
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\0".encode())
            while block := file.read(1 << 20):
                digest.update(block)
    return {"kind": kind, "sha256": digest.hexdigest()}


def _weights(part: Path) -> list[Path]:
    return [path for path in part.iterdir() if path.suffix in (".safetensors", ".bin")]


def _parts(folder: Path) -> tuple[str, dict[str, Path]]:
    """The pipeline that a folder is of, and the folders of its denoiser, its scheduler and its VAE.

    Raises:
        UsageError: no pipeline of diffusers, another kind, or a part is missing.
    """
    if (folder / _INDEX).is_file():
        kind = str(read_json(folder / _INDEX).get("_class_name"))
        if kind not in PIPELINES:
            raise UsageError(f"the prior {folder} is a {kind}, wanted one of {', '.join(PIPELINES)}")
        names = {"denoiser": PIPELINES[kind], "scheduler": "scheduler"}
        if kind in _VAE:
            names["vae"] = _VAE[kind]
        for part, name in names.items():
            if part == "vae" and not _holds_network(folder / name):
                raise UsageError(
                    f"the prior {folder} is a {kind}, one of latents, and lacks its VAE ({name}/): give the whole "
                    "pipeline's folder"
                )
            if part == "denoiser" and not _holds_network(folder / name):
                raise UsageError(f"the prior {folder} lacks its network ({name}/): copy it again")
        return kind, {part: folder / name for part, name in names.items()}
    if (folder / "config.json").is_file():
        kind = _BARE.get(str(read_json(folder / "config.json").get("_class_name")), "")
        if kind == "DDPMPipeline" and _holds_network(folder):
            return kind, {"denoiser": folder}
        if kind in _VAE:
            raise UsageError(
                f"the prior {folder} is a network of latents without its VAE: give the whole pipeline's folder"
            )
    unfinished = (folder / "training.state").is_file()
    why = "is unfinished: go on with --resume" if unfinished else f"holds no {_INDEX} of diffusers"
    raise UsageError(f"the prior {folder} {why}; wanted the folder of {', '.join(PIPELINES)} or train-prior")


def _holds_network(folder: Path) -> bool:
    return (folder / "config.json").is_file() and bool(_weights(folder))


def _network(folder: Path, prior: Path) -> nn.Module:
    """The network of a folder, by diffusers' class of that name."""
    import diffusers

    name = str(read_json(folder / "config.json").get("_class_name"))
    kind: Any = getattr(diffusers, name, None)
    is_network = isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)
    if not is_network:
        raise UsageError(
            f"the prior {prior} has a part {name}, which is no network of diffusers {diffusers.__version__}"
        )
    try:
        network = kind.from_pretrained(folder, low_cpu_mem_usage=False, local_files_only=True)
    except Exception as error:  # each library raises its own for a damaged file
        raise UsageError(f"the prior {prior} cannot be read ({one_line(error)}): copy it again") from error
    found: nn.Module = network.float().eval().requires_grad_(False)
    bad = next((name for name, value in found.named_parameters() if not bool(value.isfinite().all())), None)
    if bad is not None:
        raise UsageError(f"the prior {prior} holds NaN or infinity in {bad}: train it again")
    return found


def _classes(denoiser: nn.Module, kind: str, folder: Path) -> int:
    """Labels that a network takes."""
    held: Any = denoiser.config
    if kind == "DiTPipeline":
        return int(held.num_embeds_ada_norm or 0)
    if getattr(held, "class_embed_type", None) is not None:
        raise UsageError(
            f"the prior {folder} takes embeddings for classes ({held.class_embed_type}), wanted class numbers"
        )
    return int(getattr(held, "num_class_embeds", None) or 0)


def _no_class(denoiser: nn.Module, kind: str) -> int | None:
    """The label behind the others, of a DiT that was trained with dropped labels."""
    embeddings = [module for module in denoiser.modules() if isinstance(module, nn.Embedding)]
    if kind != "DiTPipeline" or not embeddings:
        return None
    known = _classes(denoiser, kind, Path())
    return known if embeddings[0].num_embeddings > known else None


def _places(said: dict[str, Any], index: dict[str, Any]) -> dict[str, int] | None:
    """The label of every name: of `prior.json`, or of a DiT's `id2label`, where names stand with commas between."""
    if isinstance(names := said.get("class_names"), list):
        return {str(name): place for place, name in enumerate(names)}
    if isinstance(names := index.get("id2label"), dict):
        for place in names:
            if re.fullmatch(r"\s*[0-9]+\s*", place) is None:
                raise UsageError(
                    f"id2label of {_INDEX} has {place!r} for a label, wanted a number: copy the prior again"
                )
        found: dict[str, int] = {}
        for place, many in names.items():
            for name in {each.strip() for each in str(many).split(",")}:
                found[name] = int(place) if name not in found else _SEVERAL
        return found or None
    return None
