"""Which parts of an image carry its class: Shapley values of grid cells, and Grad-CAM beside them."""

from ddfast.attribution.crops import CropRule, shapley_crops, unread_crops
from ddfast.attribution.engine import VALUES, shapley
from ddfast.attribution.estimators.plans import ESTIMATORS, list_estimators
from ddfast.attribution.grad_cam import grad_cam
from ddfast.attribution.stopping import settled_shapley
from ddfast.masked_forward.forward import locality_of
from ddfast.masked_forward.locality import Locality

__all__ = [
    "ESTIMATORS",
    "VALUES",
    "CropRule",
    "Locality",
    "grad_cam",
    "list_estimators",
    "locality_of",
    "settled_shapley",
    "shapley",
    "shapley_crops",
    "unread_crops",
]
