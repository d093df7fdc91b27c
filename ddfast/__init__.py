"""ddfast: dataset distillation as an engine. An image data set goes in, a tiny set that trains models comes
out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ddfast.version import __version__

# Public name -> module that holds it. Loaded on first use, so that `import ddfast` stays cheap.
_LAZY = {
    "accelerate": "ddfast.captum.accelerate",
    "shapley": "ddfast.attribution",
    "grad_cam": "ddfast.attribution",
    "grad_norm": "ddfast.gradients",
    "unrolled_gradient": "ddfast.gradients",
    "cmi": "ddfast.information",
    "create_model": "ddfast.models",
    "fuse": "ddfast.models",
    "load_teacher": "ddfast.models",
    "Teacher": "ddfast.models",
    "DistilledSet": "ddfast.output",
    "distill": "ddfast.distillation",
    "evaluate": "ddfast.training",
    "compare": "ddfast.comparison",
    "train_teacher": "ddfast.training",
    "attribute": "ddfast.report.attribute",
    "export": "ddfast.output",
}
# Those that are called otherwise in their module.
_THERE = {"attribute": "attribute_images", "export": "export_webdataset"}
_MODULES = (
    "ops",
    "condensation",
    "attribution",
    "captum",
    "gradients",
    "data",
    "models",
    "training",
    "methods",
    "report",
    "errors",
)

__all__ = ["__version__", *_LAZY, *_MODULES]

if TYPE_CHECKING:
    from ddfast.attribution import grad_cam as grad_cam
    from ddfast.attribution import shapley as shapley
    from ddfast.captum.accelerate import accelerate as accelerate
    from ddfast.comparison import compare as compare
    from ddfast.distillation import distill as distill
    from ddfast.gradients import grad_norm as grad_norm
    from ddfast.gradients import unrolled_gradient as unrolled_gradient
    from ddfast.information import cmi as cmi
    from ddfast.models import Teacher as Teacher
    from ddfast.models import create_model as create_model
    from ddfast.models import fuse as fuse
    from ddfast.models import load_teacher as load_teacher
    from ddfast.output import DistilledSet as DistilledSet
    from ddfast.output import export_webdataset as _export_webdataset
    from ddfast.report.attribute import attribute_images as _attribute_images
    from ddfast.training import evaluate as evaluate
    from ddfast.training import train_teacher as train_teacher

    attribute, export = _attribute_images, _export_webdataset


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), _THERE.get(name, name))
    if name in _MODULES:
        return importlib.import_module(f"ddfast.{name}")
    raise AttributeError(f"module 'ddfast' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
