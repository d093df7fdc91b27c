"""The op layer: one documented face for each fused op `ddfast::<name>`."""

from ddfast.ops._attribution import masked_batch, noisy_crop_boxes, shapley_heatmap
from ddfast.ops._augment import augment_parameters, siamese_augment
from ddfast.ops._class_kl import class_kl
from ddfast.ops._convnet import convnet_block
from ddfast.ops._convnet_batch import convnet_block_batch_norm, convnet_block_batch_norm_eval
from ddfast.ops._crops import crop_batch, crop_resize
from ddfast.ops._dispatch import paths
from ddfast.ops._epilogue import add_bias_relu_
from ddfast.ops._gradients import (
    grad_sq_norm_conv2d,
    grad_sq_norm_embedding,
    grad_sq_norm_linear,
    grad_sq_norm_norm,
    normalization_backward,
)
from ddfast.ops._locality import assemble_masked_features
from ddfast.ops._tail import shapley_crop_boxes
from ddfast.ops._winograd import winograd_conv2d, winograd_weight
from ddfast.philox import normal_quantiles

__all__ = [
    "add_bias_relu_",
    "assemble_masked_features",
    "augment_parameters",
    "class_kl",
    "convnet_block",
    "convnet_block_batch_norm",
    "convnet_block_batch_norm_eval",
    "crop_batch",
    "crop_resize",
    "grad_sq_norm_conv2d",
    "grad_sq_norm_embedding",
    "grad_sq_norm_linear",
    "grad_sq_norm_norm",
    "masked_batch",
    "noisy_crop_boxes",
    "normal_quantiles",
    "normalization_backward",
    "paths",
    "shapley_crop_boxes",
    "shapley_heatmap",
    "siamese_augment",
    "winograd_conv2d",
    "winograd_weight",
]
