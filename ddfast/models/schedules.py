"""The noise schedule of a diffusion prior, as diffusers keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ddfast.errors import UsageError, one_line

_MOST_TIMESTEPS = 100_000  # a schedule is held in memory


def read_schedule(folder: Path | None) -> dict[str, Any] | None:
    """The settings of a scheduler as DDPM's takes them; None where there are none.

    Raises:
        UsageError: one line: they cannot be read, or make no schedule.
    """
    path = None if folder is None else folder / "scheduler_config.json"
    if path is None or not path.is_file():
        return None
    said = read_json(path)
    _check_kind(path, said.get("_class_name"))
    held = {key: value for key, value in said.items() if not key.startswith("_")}
    if said.get("_class_name") not in (None, "DDPMScheduler"):
        held.setdefault("clip_sample", False)  # DDPM's default, which others do not have, cuts latents off
    if held.get("prediction_type", "epsilon") not in ("epsilon", "sample", "v_prediction"):
        raise UsageError(
            f"{path} predicts {held['prediction_type']!r}, wanted epsilon, sample or v_prediction"
        )
    _check_schedule(path, held)
    return held


def _check_kind(path: Path, kind: Any) -> None:
    """Refuse a scheduler whose noise is not DDPM's: one of flow matching, for example."""
    from diffusers import DDPMScheduler

    # Those that diffusers swaps for one another: the same noise levels, sampled in other ways.
    known = {"DDPMScheduler", *DDPMScheduler._compatibles} - {"EDMEulerScheduler"}
    if kind is not None and kind not in known:
        raise UsageError(
            f"{path} is a {str(kind)[:60]}, whose noise is not that of DDPM: give a prior with a DDPM, DDIM or "
            "DPM-Solver scheduler"
        )


def _check_schedule(path: Path, held: dict[str, Any]) -> None:
    """Refuse settings of which diffusers makes no scheduler, or one without noise levels, before a run begins."""
    from diffusers import DDPMScheduler

    trained = held.get("num_train_timesteps", 1000)
    if type(trained) is not int or not 2 <= trained <= _MOST_TIMESTEPS:
        raise UsageError(
            f"{path} has num_train_timesteps {str(trained)[:40]}, wanted a number from 2 to {_MOST_TIMESTEPS}: copy "
            "the prior again"
        )
    try:
        scheduler = DDPMScheduler.from_config(held, timestep_spacing="linspace")
        scheduler.set_timesteps(2)
        levels = scheduler.alphas_cumprod
        if not bool(((levels >= 0) & (levels <= 1)).all()):  # NaN is neither
            raise ValueError("noise levels that are no shares")
    except Exception as error:  # diffusers checks none of its settings
        raise UsageError(f"{path} makes no schedule ({one_line(error)}): copy the prior again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a prior's folder."""
    try:
        held = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({one_line(error)}): copy the prior again") from error
    if not isinstance(held, dict):
        raise UsageError(f"{path} holds no JSON object: copy the prior again")
    return held
