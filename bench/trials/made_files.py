"""Files that methods which make pixels keep and read, by the family of the method: whole ones, and their readers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.trials.subjects import CLASSES, MEAN, STD, make_estimator, make_prior, render_set

SIDE = 16
_DIGEST = "of this run"


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        family: of the methods that read it.
        path: within the folder that `make` fills.
        make: fills a folder with whole files.
        read: reads the folder; returns what came out in a few words.
    """

    family: str
    path: str
    make: Callable[[Path], None]
    read: Callable[[Path], str]


@cache
def _template(make: Callable[[Path], None]) -> Path:
    """A folder of whole files, made once in a process."""
    folder = Path(tempfile.mkdtemp(prefix="ddfast-fuzz-"))
    make(folder)
    return folder


def whole_file(kind: str) -> bytes:
    """The whole file of a kind."""
    found = KINDS[kind]
    return (_template(found.make) / found.path).read_bytes()


def read_damaged(kind: str, data: bytes, folder: Path) -> str:
    """Read a folder in which the file of a kind has this content."""
    found = KINDS[kind]
    shutil.copytree(_template(found.make), folder, dirs_exist_ok=True)
    (folder / found.path).write_bytes(data)
    return found.read(folder)


# Whole folders ----------------------------------------------------------------------------------------------


def _pixels() -> torch.Tensor:
    return torch.randn(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def _make_set(folder: Path) -> None:
    """What `dm` leaves, after one step."""
    from ddfast.distillation import distill

    with tempfile.TemporaryDirectory() as data:
        settings: dict[str, Any] = {"ipc": 2, "iterations": 1, "real_batch": 4, "quiet": True, "workers": 1}
        distill("dm", data=render_set(Path(data), 6), out=folder / "out", threads=1, **settings)


def _make_regions(folder: Path) -> None:
    from ddfast.output.pixels import Regions, write_pixels

    boxes = torch.tensor([[0, 0, 8, 8], [8, 0, 16, 8], [0, 8, 8, 16]])
    regions = Regions(boxes, torch.tensor([[0, 1]] * 6))
    labels = torch.arange(3).repeat_interleave(2)
    write_pixels(folder, _pixels(), labels, space="unit", factor=1, learned_rate=None, regions=regions)


def _make_state(folder: Path) -> None:
    from ddfast.state import FileCheckpoint

    tensors = {"pixels": _pixels(), "momentum": _pixels(), "curve.loss": torch.ones(3).double()}
    FileCheckpoint(folder / "group-00000.safetensors", _DIGEST).save({**tensors, "step": torch.tensor(3)})


def _make_networks(folder: Path) -> None:
    from ddfast.training import train_experts, train_proxies

    with tempfile.TemporaryDirectory() as root:
        data = render_set(Path(root), 6)
        shared = {"count": 1, "image_size": SIDE, "normalization": (MEAN, STD), "quiet": True}
        train_experts(data, out=folder / "experts", epochs=1, lr=0.02, zca=False, **shared)  # type: ignore[arg-type]
        train_proxies(data, out=folder / "proxies", epochs=1, arch="convnet3_in", **shared)  # type: ignore[arg-type]


def _make_whitening(folder: Path) -> None:
    from ddfast.output.whitening import Whitening

    Whitening.fit(torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))).write(folder)


def _make_diffusion(folder: Path) -> None:
    make_prior(folder / "prior")
    make_estimator(folder / "estimator")


# Readers ----------------------------------------------------------------------------------------------------


def _read_set(folder: Path) -> str:
    from ddfast.output import DistilledSet
    from ddfast.output.pixels import read_curve
    from ddfast.pipeline.plan import read_plan
    from ddfast.training.evaluation import read_distilled

    opened = DistilledSet(folder / "out")
    images = read_distilled(opened).decoded()
    read_plan(folder / "out")
    return f"{len(images.labels)} images, {len(read_curve(folder / 'out'))} rows"


def _read_pixels(folder: Path) -> str:
    from ddfast.output.pixels import read_pixels

    found = read_pixels(folder)
    return (
        f"{len(found.images)} images, {'no' if found.regions is None else len(found.regions.boxes())} regions"
    )


def _read_state(folder: Path) -> str:
    """A damaged state is told of and made anew; a whole one has to be what was saved."""
    from ddfast.state import FileCheckpoint

    found = FileCheckpoint(folder / "group-00000.safetensors", _DIGEST).load()
    if found and not torch.equal(found["pixels"], _pixels()):
        raise AssertionError("a damaged state is taken for a whole one")
    return f"{len(found)} tensors"


def _read_experts(folder: Path) -> str:
    from ddfast.training.experts import experts_identity, load_experts

    about = {"class_names": CLASSES, "image_size": SIDE, "mean": MEAN, "std": STD}
    experts_identity(folder / "experts")
    found = load_experts(folder / "experts", arch="convnet3_in", epochs=1, **about)  # type: ignore[arg-type]
    return f"{len(found.weights(0, 1))} weights"


def _read_proxies(folder: Path) -> str:
    from ddfast.training import load_proxies
    from ddfast.training.proxies import proxies_identity

    proxies_identity(folder / "proxies")
    about = {"class_names": CLASSES, "image_size": SIDE, "mean": MEAN, "std": STD}
    return f"{len(load_proxies(folder / 'proxies', **about))} proxies"  # type: ignore[arg-type]


def _read_whitening(folder: Path) -> str:
    from ddfast.output.whitening import read_whitening

    found = read_whitening(folder)
    assert found is not None
    return f"{len(found(torch.zeros(1, 3, 4, 4)))} whitened"


def _read_prior(folder: Path) -> str:
    from ddfast.models.diffusion import load_prior, prior_identity

    prior_identity(folder / "prior")
    prior = load_prior(folder / "prior")
    prior.labels_of(CLASSES)
    prior.scheduler(4)
    return f"a prior of {prior.image_size} px"


def _read_estimator(folder: Path) -> str:
    from ddfast.models.estimator import estimator_identity, load_estimator

    path = folder / "estimator.safetensors"
    estimator_identity(path)
    estimator = load_estimator(path)
    estimator.places_of(CLASSES)
    return f"an estimator of {estimator.arch}"


KINDS = {
    "matched manifest": Kind("matching", "out/manifest.json", _make_set, _read_set),
    "matched pixels": Kind("matching", "out/pixels.safetensors", _make_set, _read_set),
    "matched curve": Kind("matching", "out/curve.parquet", _make_set, _read_set),
    "regions": Kind("matching", "pixels.safetensors", _make_regions, _read_pixels),
    "state": Kind("matching", "group-00000.safetensors", _make_state, _read_state),
    "proxies": Kind("matching", "proxies/proxies.json", _make_networks, _read_proxies),
    "proxy": Kind("matching", "proxies/proxy-00000.safetensors", _make_networks, _read_proxies),
    "experts": Kind("trajectory", "experts/experts.json", _make_networks, _read_experts),
    "trajectory": Kind("trajectory", "experts/trajectory-00000.safetensors", _make_networks, _read_experts),
    "whitening": Kind("trajectory", "zca.safetensors", _make_whitening, _read_whitening),
    "prior index": Kind("diffusion", "prior/model_index.json", _make_diffusion, _read_prior),
    "prior network": Kind("diffusion", "prior/unet/config.json", _make_diffusion, _read_prior),
    "prior schedule": Kind(
        "diffusion", "prior/scheduler/scheduler_config.json", _make_diffusion, _read_prior
    ),
    "prior weights": Kind(
        "diffusion", "prior/unet/diffusion_pytorch_model.safetensors", _make_diffusion, _read_prior
    ),
    "estimator": Kind("diffusion", "estimator.safetensors", _make_diffusion, _read_estimator),
}
"""The kinds by name."""

TEXT = ("matched manifest", "proxies", "experts", "prior index", "prior network", "prior schedule")
"""Those that are JSON."""
