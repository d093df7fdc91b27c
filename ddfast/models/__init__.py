"""Architectures by name, and teacher files."""

from ddfast.models.convnet import ConvNet
from ddfast.models.fusing import fuse
from ddfast.models.normalization import NORMALIZATIONS, normalization
from ddfast.models.registry import create_model, features, list_models
from ddfast.models.teacher import Teacher, load_teacher, save_teacher

__all__ = [
    "NORMALIZATIONS",
    "ConvNet",
    "Teacher",
    "create_model",
    "features",
    "fuse",
    "list_models",
    "load_teacher",
    "normalization",
    "save_teacher",
]
