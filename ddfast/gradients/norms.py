"""`grad_norm`: how strongly each image pulls on the model; it bounds the utility in InfoUtil (Theorem 1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ddfast.gradients.ghost import UnservedModel, ghost_squares
from ddfast.ops.reference import accumulation_dtype

METHODS = ("auto", "ghost", "vmap", "last_layer")
LOSSES = ("cross_entropy",)

_CHUNK = 32  # images; bounds the activations that one backward pass keeps
_VMAP_BYTES = 2**28  # of per-sample gradients that live at a time

# Why the ghost method must not be used for a model, None where it may. Filled on a model's first use.
_REFUSALS: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()

NormsAndLogits = tuple[Tensor, Tensor]


@overload
def grad_norm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    method: str = ...,
    *,
    mean: Sequence[float] | Tensor | None = ...,
    std: Sequence[float] | Tensor | None = ...,
    chunk_size: int | None = ...,
    loss: str = ...,
    return_logits: Literal[False] = ...,
) -> Tensor: ...


@overload
def grad_norm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    method: str = ...,
    *,
    mean: Sequence[float] | Tensor | None = ...,
    std: Sequence[float] | Tensor | None = ...,
    chunk_size: int | None = ...,
    loss: str = ...,
    return_logits: Literal[True],
) -> NormsAndLogits: ...


def grad_norm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    method: str = "auto",
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    chunk_size: int | None = None,
    loss: str = "cross_entropy",
    return_logits: bool = False,
) -> Tensor | NormsAndLogits:
    """L2 norm, for each image, of the gradient of its cross-entropy in all parameters of the model.

    InfoUtil's Definition 5, over all parameters, trainable or not, with the model in eval mode. Neither the
    parameters' `requires_grad` nor their `.grad` is touched.

    Methods:
        ghost: one forward and one backward pass. Each layer's input and output gradient give the norm
            (`ddfast.ops.grad_sq_norm_*`); no per-sample gradient is made but of parameters used more than
            once. Serves linear, conv1d, conv2d, batch_norm in eval mode, instance_norm, group_norm,
            layer_norm, rms_norm and embedding, with the batch as first dimension. On a model's first use
            its norms for two images are held against autograd's. A model that it does not serve falls back
            to `vmap` with one warning that names the layer.
        vmap: per-sample gradients by `torch.func`, chunk by chunk. Any model that torch.func can transform.
        auto: the same as ghost, which is the fastest wherever it serves the model.
        last_layer: not the norm over all parameters but that over the last Linear layer's, in closed form:
            ||p - e_y|| sqrt(||h||^2 + 1), with h the layer's input, p the softmax, and no 1 without a bias.
            A forward pass is all it takes.

    Args:
        model: maps [B, ...] to logits [B, C].
        images: [B, C, H, W] uint8 (scaled by 1/255) or floating point, or integer inputs [B, ...] of a model
            with an embedding, which pass as they are. Cast to the model's dtype.
        labels: int64 [B].
        method: one of the above.
        mean, std: [C], subtracted from and divided into the scaled images; None leaves them.
        chunk_size: images per pass. Default 32 for ghost and last_layer; for vmap as many as keep the
            per-sample gradients within 256 MiB, 32 at most.
        loss: "cross_entropy".
        return_logits: return the model's output as well, which the norm needs anyway.

    Returns:
        [B] float32, float64 for a model in float64; with return_logits the pair of it and the detached logits
        [B, C] in the model's dtype.

    Raises:
        ValueError: an unknown method or loss, shapes that do not fit, a model with BatchNorm or dropout in
            training mode (the norm of an image would depend on its neighbours or on chance), or, for
            last_layer, a model that does not end in a Linear layer.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 [{len(images)}], one an image, got {labels.dtype} {tuple(labels.shape)}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    _require_eval(model)

    with torch.inference_mode(False), _uncompiled(model):
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        prepare = partial(_prepared, mean=mean, std=std, dtype=dtype)
        if len(images) == 0:
            with torch.no_grad():
                logits = model(prepare(images)) if return_logits else images.new_empty(0)
            norms = torch.empty(0, dtype=accumulation_dtype(dtype), device=images.device)
        else:
            norms, logits = _dispatched(method, model, images, labels, prepare, chunk_size)
    return (norms, logits) if return_logits else norms


def ghost_norms(model: nn.Module, images: Tensor, labels: Tensor) -> NormsAndLogits:
    """Gradient norms without per-sample gradients, see `ddfast.gradients.ghost`.

    Raises:
        UnservedModel: where the ghost method does not serve the model.
    """
    squares, logits = ghost_squares(model, images, lambda logits: _cross_entropy(logits, labels))
    return squares.sqrt(), logits


def vmap_norms(model: nn.Module, images: Tensor, labels: Tensor) -> NormsAndLogits:
    """Gradient norms from per-sample gradients by torch.func, in the model's own precision.

    Autocast is suspended: under it functional batch_norm meets two dtypes, which torch.func does not take.
    """
    parameters, buffers = _detached(model.named_parameters()), _detached(model.named_buffers())

    def sample_loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional_call(model, (parameters, buffers), (image[None],))
        return _cross_entropy(logits, label[None]), logits[0]

    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False):
        per_sample = vmap(grad(sample_loss, has_aux=True), in_dims=(None, 0, 0))
        gradients, logits = per_sample(parameters, images, labels)
    return _norm(gradients.values(), images), logits


def autograd_norms(model: nn.Module, images: Tensor, labels: Tensor) -> NormsAndLogits:
    """Gradient norms by plain autograd, one image at a time: slow, and the definition."""
    buffers = _detached(model.named_buffers())
    norms, outputs = [], []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        parameters = {name: p.requires_grad_() for name, p in _detached(model.named_parameters()).items()}
        with torch.enable_grad():
            logits = functional_call(model, (parameters, buffers), (image,))
            loss = _cross_entropy(logits, label)
        gradients: Sequence[Tensor | None] = ()
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        norms.append(_norm((g[None] for g in gradients if g is not None), image))
        outputs.append(logits.detach())
    return torch.cat(norms), torch.cat(outputs)


def last_layer_norms(model: nn.Module, images: Tensor, labels: Tensor) -> NormsAndLogits:
    """Gradient norms over the parameters of the last Linear layer alone: ||p - e_y|| sqrt(||h||^2 + 1).

    Raises:
        ValueError: the model's output is not that of a Linear layer on [B, features].
    """
    with torch.no_grad(), _LastLinear() as last:
        logits = model(images)
    if last.output is not logits or last.input.ndim != 2:
        raise ValueError(
            f"last_layer needs a model that ends in a Linear layer on [B, features]; {type(model).__name__} "
            "does not, use method='auto'"
        )
    dtype = accumulation_dtype(logits.dtype)
    error = functional.softmax(logits.to(dtype), 1) - functional.one_hot(labels, logits.shape[1])
    features = last.input.to(dtype).square().sum(1)
    return error.norm(dim=1) * (features + last.has_bias).sqrt(), logits


class _LastLinear(TorchFunctionMode):
    """Remembers the last linear layer that ran: its input, its output and whether it has a bias."""

    input: Tensor
    output: Tensor | None = None
    has_bias: bool

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is functional.linear:
            self._remember(result, *args, **(kwargs or {}))
        return result

    def _remember(self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        self.input, self.output, self.has_bias = input, output, bias is not None


def _dispatched(
    method: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    prepare: Callable[[Tensor], Tensor],
    chunk_size: int | None,
) -> NormsAndLogits:
    """Norms and logits of all images, by vmap where the ghost method does not serve the model."""

    def in_chunks(norms: Callable[..., NormsAndLogits], default: int) -> NormsAndLogits:
        parts = [
            norms(model, prepare(some), their_labels)
            for some, their_labels in zip(
                images.split(chunk_size or default), labels.split(chunk_size or default), strict=True
            )
        ]
        return torch.cat([norms for norms, _ in parts]), torch.cat([logits for _, logits in parts])

    if method == "last_layer":
        return in_chunks(last_layer_norms, _CHUNK)
    if method != "vmap":
        if model not in _REFUSALS:
            _remember(model, _ghost_refusal(model, prepare(_two(images))))
        if _REFUSALS[model] is None:
            try:
                return in_chunks(ghost_norms, _CHUNK)
            except UnservedModel as reason:  # a use that the trial did not show
                _remember(model, str(reason))
    gradient_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return in_chunks(vmap_norms, max(1, min(_CHUNK, _VMAP_BYTES // max(gradient_bytes, 1))))


def _remember(model: nn.Module, refusal: str | None) -> None:
    """Keep whether the ghost method serves the model, and warn once where it does not."""
    _REFUSALS[model] = refusal
    if refusal is not None:
        warnings.warn(
            f"grad_norm: the ghost method does not serve {type(model).__name__}, using vmap: {refusal}",
            UserWarning,
            stacklevel=4,
        )


class _Trial(nn.Module):
    """A model's norms by the ghost method and by autograd, for the least likely classes, whose gradients are large."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            labels = self.model(images).argmin(1)
        return ghost_norms(self.model, images, labels)[0], autograd_norms(self.model, images, labels)[0]


def _ghost_refusal(model: nn.Module, images: Tensor) -> str | None:
    """Why the ghost method must not be used for the model, after a trial on two images; None where it may.

    It is the algebra that is on trial, so the model runs in float64, whatever its precision and the autocast around
    the call. In float32 an activation that is zero but for rounding can be on in a batch of two and off in a batch of
    one, where other kernels run, and the norms then differ by more than rounding. A model that does not run in
    float64 is tried in its own precision.
    """
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    double = {
        f"model.{name}": tensor.detach().double() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    doubled = images.double() if images.is_floating_point() else images
    with torch.autocast(images.device.type, enabled=False):
        try:
            ghost, expected = functional_call(_Trial(model), double, (doubled,))
            tolerance = 1e-6
        except UnservedModel as reason:
            return str(reason)
        except (RuntimeError, TypeError, ValueError):
            try:
                ghost, expected = _Trial(model)(images)
            except UnservedModel as reason:
                return str(reason)
            tolerance = 1e-3 if images.dtype in (torch.float32, torch.float64) else 0.05
    if torch.allclose(ghost, expected, rtol=tolerance, atol=1e-6, equal_nan=True):
        return None
    return f"on two images it gives {ghost.tolist()} where autograd gives {expected.tolist()}"


def _prepared(
    images: Tensor,
    mean: Sequence[float] | Tensor | None,
    std: Sequence[float] | Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The model's input: uint8 scaled by 1/255, (x - mean) / std, and cast; other integers as they are."""
    images = images.detach()
    if images.dtype == torch.uint8:
        images = images.to(accumulation_dtype(dtype)) / 255
    elif not images.is_floating_point():
        return images.clone() if images.is_inference() else images
    if mean is not None:
        images = images - _channels(mean, images)
    if std is not None:
        images = images / _channels(std, images)
    images = images.to(dtype)
    return images.clone() if images.is_inference() else images


def _channels(values: Sequence[float] | Tensor, images: Tensor) -> Tensor:
    """[C] as [C, 1, 1], where C is the images' number of channels."""
    channels = torch.as_tensor(values, dtype=images.dtype, device=images.device)
    if images.ndim != 4 or channels.shape != images.shape[1:2]:
        raise ValueError(f"mean and std must be [C] for images [B, C, H, W], got {tuple(channels.shape)}")
    return channels[:, None, None]


def _two(images: Tensor) -> Tensor:
    """Two different inputs: the first two, or the only one and its mirror image."""
    return images[:2] if len(images) > 1 else torch.cat([images, images.flip(-1)])


def _require_eval(model: nn.Module) -> None:
    """Raise ValueError for a layer that makes the norm of an image depend on other images or on chance."""
    for name, module in model.named_modules():
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        if module.training and (batch_norm or dropout):
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) is in training mode, which makes the norm of an image "
                f"depend on {'the other images' if batch_norm else 'chance'}; call model.eval() first"
            )
        if batch_norm and module.running_mean is None:
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) keeps no running statistics, which makes the norm of "
                "an image depend on the other images; keep them or use another normalisation"
            )


def _uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Context in which modules that went through `torch.compile` run as they were written."""
    compiled = ("_orig_mod", "_compiled_call_impl")  # of torch.compile(module) and of module.compile()
    if any(getattr(module, name, None) is not None for module in model.modules() for name in compiled):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """The sum over the batch of the cross-entropy of logits [B, C]."""
    return functional.cross_entropy(outputs.to(accumulation_dtype(outputs.dtype)), labels, reduction="sum")


def _detached(named: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in named}


def _norm(gradients: Iterable[Tensor], images: Tensor) -> Tensor:
    """Norm [B] over all per-sample gradients [B, ...] of one set of images."""
    squares = torch.zeros(len(images), dtype=accumulation_dtype(images.dtype), device=images.device)
    for gradient in gradients:
        squares = squares + gradient.to(accumulation_dtype(gradient.dtype)).flatten(1).square().sum(1)
    return squares.sqrt()
