"""`grad_norm`: how strongly each image pulls on the model; it bounds the utility in InfoUtil (Theorem 1)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from ddfast.gradients.ghost import INSTANCE_NORMS, UnservedModel, contiguous_gradient, ghost_squares
from ddfast.gradients.preservation import (
    differentiable,
    one_call_a_model,
    substituted,
    untouched,
    without_inference_tensors,
)
from ddfast.gradients.trial import Trial, raised
from ddfast.ops.reference import accumulation_dtype
from ddfast.ops.transfer import to_device
from ddfast.random_states import kept_random_states
from ddfast.unchanged import found_of

METHODS = ("auto", "ghost", "vmap", "loop", "last_layer")
LOSSES = ("cross_entropy",)

_CHUNK = 32  # images; bounds the activations that one backward pass keeps
_VMAP_BYTES = 2**28  # of per-sample gradients that live at a time

NormsAndLogits = tuple[Tensor, Tensor]
Norms = Callable[[nn.Module, Tensor, Tensor], NormsAndLogits]


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


@one_call_a_model
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

    InfoUtil's Definition 5, over all parameters, trainable or not, with the model in eval mode. Nothing of the
    model, the images or the streams of random numbers is changed by a call, whatever the model's forward pass does.

    Methods:
        ghost: one forward and one backward pass. Each layer's input and output gradient give the norm
            (`ddfast.ops.grad_sq_norm_*`); no per-sample gradient is made but of parameters used more than
            once. Serves linear, conv1d, conv2d, batch_norm in eval mode, instance_norm, group_norm,
            layer_norm, rms_norm and embedding, with the batch as first dimension. On the first use of a model,
            and of a batch size, its norms for two images are held against the loop's, in float64 and in the
            model's own precision; a model that is changed is tried again. A model that it does not serve falls
            back to `vmap`, or to `loop`, with one warning that names the layer.
        vmap: per-sample gradients by `torch.func`, chunk by chunk, tried likewise. A model that torch.func cannot
            transform (recurrent layers, sparse gradients, TorchScript, values read in the forward pass) falls back
            to `loop` with one warning that says why.
        loop: one image at a time by autograd, its squares added up in float64. Any model; slow, and the definition.
        auto: the same as ghost, which is the fastest wherever it serves the model.
        last_layer: not the norm over all parameters but that over the last Linear layer's, in closed form:
            ||p - e_y|| sqrt(||h||^2 + 1), with h the layer's input, p the softmax, and no 1 without a bias.
            A forward pass is all it takes.

    Args:
        model: maps [B, ...] to logits [B, C].
        images: [B, C, H, W] uint8 (scaled by 1/255) or floating point, or integer inputs [B, ...] of a model
            with an embedding, which pass as they are. Cast to the model's dtype.
        labels: int64 [B], each a class from 0 to C - 1.
        method: one of the above.
        mean, std: [C], subtracted from and divided into the scaled images; None leaves them.
        chunk_size: images per pass. Default 32 for ghost and last_layer; for vmap as many as keep the
            per-sample gradients within 256 MiB, 32 at most. The loop takes one image at a time.
        loss: "cross_entropy".
        return_logits: return the model's output as well, which the norm needs anyway.

    Returns:
        [B] float32, float64 for a model in float64; with return_logits the pair of it and the detached logits
        [B, C] in the model's dtype.

    Raises:
        TypeError: a model that is no module, or images or labels that are no tensors.
        ValueError: an unknown method or loss, shapes that do not fit, labels that are no classes, a model that does
            not return logits [B, C], has BatchNorm or dropout in training mode, or returns something else each time
            (the norm of an image would depend on its neighbours or on chance), or, for last_layer, a model that does
            not end in a Linear layer.
    """
    found = found_of(model)
    key = None if found is None else _kind(method, images, chunk_size)
    if found is not None and key in found:
        # What served the last call of this kind, on a model that was held unchanged since then.
        served, dtype = found[key]
        with torch.inference_mode(False):
            prepare = partial(_prepared, mean=mean, std=std, dtype=dtype)
            norms, logits = _in_chunks(
                served, model, images, to_device(labels, images.device), prepare, chunk_size or _CHUNK
            )
        return (norms, logits) if return_logits else norms

    _check_arguments(model, images, labels, method, loss, chunk_size)
    _require_eval(model)

    gpus = [images.device] if images.is_cuda else []
    with torch.inference_mode(False), _uncompiled(), kept_random_states(gpus):
        while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        labels = labels.to(images.device, copy=True)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        prepare = partial(_prepared, mean=mean, std=std, dtype=dtype)
        with without_inference_tensors(model):
            if len(images) == 0:
                logits = _forward(model, prepare(images)) if return_logits else images.new_empty(0)
                norms = torch.empty(0, dtype=accumulation_dtype(dtype), device=images.device)
            else:
                norms, logits, served = _dispatched(method, model, images, labels, prepare, chunk_size)
                if found is not None and served in (ghost_norms, last_layer_norms):
                    found[key] = served, dtype
    return (norms, logits) if return_logits else norms


def ghost_norms(model: nn.Module, images: Tensor, labels: Tensor) -> NormsAndLogits:
    """Gradient norms without per-sample gradients, see `ddfast.gradients.ghost`.

    Raises:
        UnservedModel: where the ghost method does not serve the model.
    """

    def loss(outputs: Any) -> Tensor:
        return _cross_entropy(_logits(outputs, len(labels)), labels)

    squares, logits = ghost_squares(model, images, loss)
    return squares.sqrt(), logits


def vmap_norms(model: nn.Module, images: Tensor, labels: Tensor) -> NormsAndLogits:
    """Gradient norms from per-sample gradients by torch.func, in the model's own precision.

    Autocast is suspended: under it functional batch_norm meets two dtypes, which torch.func does not take.

    Raises:
        UnservedModel: parameters that TorchScript keeps to itself.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UnservedModel("TorchScript, which torch.func does not transform")

    def sample_loss(parameters: dict[int, Tensor], image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        with substituted(model, {**own, **parameters}):
            logits = _logits(model(image[None]), 1)
        return _cross_entropy(logits, label[None]), logits[0]

    with (
        untouched(model, parameters=True),
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),
        _ContiguousGradients(),
    ):
        own = {id(parameter): parameter.detach() for parameter in model.parameters()}
        parameters = {key: parameter for key, parameter in own.items() if parameter.is_floating_point()}
        per_sample = vmap(grad(sample_loss, has_aux=True), in_dims=(None, 0, 0))
        gradients, logits = per_sample(parameters, images.clone(), labels)
    return _norm(gradients.values(), images), logits


def loop_norms(model: nn.Module, images: Tensor, labels: Tensor) -> NormsAndLogits:
    """Gradient norms by plain autograd, one image at a time, each on the model as it stands: the definition."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    norms, outputs = [], []
    with (
        differentiable(parameters),
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),
        _ContiguousGradients(),
    ):
        for image, label in zip(images.split(1), labels.split(1), strict=True):
            with untouched(model, parameters=True):
                logits = _logits(model(image.clone()), 1)
                gradients = _gradients(model, image, label, logits, parameters)
            squares = torch.zeros((), dtype=torch.float64, device=logits.device)
            for gradient in gradients:
                if gradient is not None:
                    dense = gradient.coalesce().values() if gradient.is_sparse else gradient
                    squares += dense.to(squares.device, torch.float64).square().sum()
            norms.append(squares.sqrt().to(images.device, accumulation_dtype(logits.dtype)))
            outputs.append(logits.detach())
    return torch.stack(norms), torch.cat(outputs)


def _gradients(
    model: nn.Module, image: Tensor, label: Tensor, logits: Tensor, parameters: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The gradient of one image's loss, for each parameter; None where it has none."""
    loss = _cross_entropy(logits, label)
    if not loss.requires_grad:
        return []
    try:
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
    # Reentrant checkpoints take neither autograd.grad nor an input without a gradient.
    leaves = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    with substituted(model, {id(p): leaf for p, leaf in zip(parameters, leaves, strict=True)}):
        image = image.clone().requires_grad_(image.is_floating_point())
        outputs = _logits(model(image * 1 if image.requires_grad else image), 1)
        _cross_entropy(outputs, label).backward()
    return [leaf.grad for leaf in leaves]


def last_layer_norms(model: nn.Module, images: Tensor, labels: Tensor) -> NormsAndLogits:
    """Gradient norms over the parameters of the last Linear layer alone: ||p - e_y|| sqrt(||h||^2 + 1).

    Raises:
        ValueError: the model's output is not that of a Linear layer on [B, features].
    """
    traceless = untouched(model, parameters=True) if found_of(model) is None else nullcontext()
    with torch.no_grad(), traceless, _LastLinear() as last:
        logits = _logits(model(images.clone()), len(images))
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


class _ContiguousGradients(TorchFunctionMode):
    """Keeps instance_norm right for one image: see `contiguous_gradient`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        return contiguous_gradient(result) if func in INSTANCE_NORMS else result


def _kind(method: str, images: Tensor, chunk_size: int | None) -> tuple[Any, ...]:
    """What decides how a model's norms are computed, beside the model."""
    autocast = torch.is_autocast_enabled(images.device.type)
    return ("grad_norm", method, images.dtype, tuple(images.shape), images.device, chunk_size, autocast)


def _dispatched(
    method: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    prepare: Callable[[Tensor], Tensor],
    chunk_size: int | None,
) -> tuple[Tensor, Tensor, Norms]:
    """Norms and logits of all images, by the first method of the chain that serves the model; and that method."""

    def in_chunks(norms: Norms, default: int) -> NormsAndLogits:
        return _in_chunks(norms, model, images, labels, prepare, chunk_size or default)

    trial = Trial(model, prepare(images[: chunk_size or _CHUNK]), _forward, loop_norms)
    if int(labels.max()) >= trial.classes:
        raise ValueError(
            f"labels must be classes from 0 to {trial.classes - 1}, the model's outputs, got {int(labels.max())}"
        )
    if method == "last_layer":
        return *in_chunks(last_layer_norms, _CHUNK), last_layer_norms
    gradient_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    defaults = {"ghost": _CHUNK, "vmap": max(1, min(_CHUNK, _VMAP_BYTES // max(gradient_bytes, 1)))}
    chain = {"auto": ("ghost", "vmap"), "ghost": ("ghost", "vmap"), "vmap": ("vmap",), "loop": ()}[method]
    norms_by = {"ghost": ghost_norms, "vmap": vmap_norms}
    for name in chain:
        if not trial.serves(name, norms_by[name]):
            continue
        trial.warn(chain, name)
        try:
            return *in_chunks(partial(trial.held, name, norms_by[name]), defaults[name]), norms_by[name]
        except UnservedModel as reason:  # a use that the trial did not show
            trial.refusals[name] = str(reason)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            found = in_chunks(loop_norms, _CHUNK)  # where the model itself fails, so does this
            trial.refusals[name] = raised(error)
            trial.warn(chain, "loop")
            return *found, loop_norms
    trial.warn(chain, "loop")
    return *in_chunks(loop_norms, _CHUNK), loop_norms


def _in_chunks(
    norms: Norms,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    prepare: Callable[[Tensor], Tensor],
    size: int,
) -> NormsAndLogits:
    """Norms and logits of all images, `size` in a pass."""
    parts = [
        norms(model, prepare(some), their_labels)
        for some, their_labels in zip(images.split(size), labels.split(size), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    return torch.cat([norms for norms, _ in parts]), torch.cat([logits for _, logits in parts])


def _forward(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits [B, C], without a gradient."""
    with torch.no_grad(), untouched(model, parameters=True):
        return _logits(model(images.clone()), len(images))


def _logits(outputs: Any, batch: int) -> Tensor:
    """What a model returned, where that is logits [B, C].

    Raises:
        ValueError: anything else.
    """
    if isinstance(outputs, Tensor) and outputs.ndim == 2 and len(outputs) == batch:
        if outputs.is_floating_point() and outputs.shape[1] > 0:
            return outputs
        found = f"{outputs.dtype} {tuple(outputs.shape)}"
    elif isinstance(outputs, Tensor):
        found = f"{tuple(outputs.shape)}"
    else:
        found = f"a {type(outputs).__name__}"
    raise ValueError(
        f"the model must return logits, a floating-point tensor [{batch}, C], got {found}; wrap it in a module "
        "that returns its logits alone"
    )


def _check_arguments(
    model: nn.Module, images: Tensor, labels: Tensor, method: str, loss: str, chunk_size: int | None
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; torch.as_tensor makes one")
    if images.ndim < 1 or images.is_complex() or images.layout != torch.strided:
        raise ValueError(
            f"images must be [B, ...] and dense, integers or floating point, got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 [{len(images)}], one an image, got {labels.dtype} {tuple(labels.shape)}"
        )
    if images.is_meta or labels.is_meta:
        raise ValueError("images and labels must hold values, got a tensor on the meta device")
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"labels must be classes, 0 or more, got {int(labels.min())}")
    if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
        raise ValueError(f"chunk_size must be a whole number from 1 on, got {chunk_size}")


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
        return images.clone()
    if mean is not None:
        images = images - _channels(mean, images)
    if std is not None:
        images = images / _channels(std, images)
    return images.to(dtype).clone()  # a model may work in place on it


def _channels(values: Sequence[float] | Tensor, images: Tensor) -> Tensor:
    """[C] as [C, 1, 1], where C is the images' number of channels."""
    channels = torch.as_tensor(values, dtype=images.dtype, device=images.device)
    if images.ndim != 4 or channels.shape != images.shape[1:2]:
        raise ValueError(f"mean and std must be [C] for images [B, C, H, W], got {tuple(channels.shape)}")
    return channels[:, None, None]


def _require_eval(model: nn.Module) -> None:
    """Raise ValueError for a layer that makes the norm of an image depend on other images or on chance."""
    for name, module in model.named_modules():
        for parameter in [*module._parameters.values(), *module._buffers.values()]:
            if parameter is not None and is_lazy(parameter):
                raise ValueError(
                    f"layer {name!r} ({type(module).__name__}) has no shape yet; run the model on an image first"
                )
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


def _uncompiled() -> AbstractContextManager[Any]:
    """Context in which what went through `torch.compile` runs as it was written."""
    if "torch._dynamo" not in sys.modules:  # nothing did
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """The sum over the batch of the cross-entropy of logits [B, C]."""
    return functional.cross_entropy(outputs.to(accumulation_dtype(outputs.dtype)), labels, reduction="sum")


def _norm(gradients: Iterable[Tensor], images: Tensor) -> Tensor:
    """Norm [B] over all per-sample gradients [B, ...] of one set of images."""
    squares = torch.zeros(len(images), dtype=accumulation_dtype(images.dtype), device=images.device)
    for gradient in gradients:
        squares = squares + gradient.to(accumulation_dtype(gradient.dtype)).flatten(1).square().sum(1)
    return squares.sqrt()
