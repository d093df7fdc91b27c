"""Per-sample gradient norms from one forward and one backward pass, without any per-sample gradient.

A parameter enters the computation where a function of `torch.nn.functional` is called with it. `ghost_norms`
watches those calls, so it does not matter which module makes them, and keeps of each what the parameter's
gradient is a product of: the input and, when the backward pass comes to the call, the gradient at its output.
From these two the ops `ddfast.ops.grad_sq_norm_*` take the squared norm, and the input is let go at once.

The layers run on detached parameters. So autograd computes the gradients of activations only, and neither
`requires_grad` nor `.grad` of any parameter is read or written.

A parameter that is used more than once (a module called twice, tied weights) needs the sum over its uses before
the square: for that parameter alone the per-sample gradients are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode, resolve_name

from ddfast.gradients.layers import LAYERS, Conv2d, Layer, squared
from ddfast.gradients.preservation import tensors_of, untouched
from ddfast.ops.reference import accumulation_dtype
from ddfast.unchanged import found_of


class UnservedModel(Exception):
    """The ghost method cannot serve a model; the message names the layer and says why."""


def ghost_squares(
    model: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Squared norm, for each image, of the gradient of its loss with respect to all parameters of `model`.

    Args:
        model: in eval mode.
        images: [B, ...], the model's input.
        loss: maps the model's output to the sum of one loss an image.

    Returns:
        the squared norms [B], float32 (float64 for a model in float64), and the model's output, detached.

    Raises:
        UnservedModel: a layer or a use of a parameter that is not known here, a layer that runs without the
            batch as its first dimension, or a model that reads what it computes, as `item` does: with a batch it
            would read one value for all images.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnservedModel(f"{_described(name, module)} is TorchScript, which hides its layers")
    if model not in _LAYOUT_BOUND:
        try:
            return _ghost_squares(model, images, loss, keep_layout=False)
        except _LayoutError:
            _LAYOUT_BOUND.add(model)
    return _ghost_squares(model, images, loss, keep_layout=True)


# Models that take a view of a feature map which only its own layout allows.
_LAYOUT_BOUND: WeakSet[nn.Module] = WeakSet()


class _LayoutError(Exception):
    """A model asks for a view that the layout of a feature map does not allow."""


def _ghost_squares(
    model: nn.Module, images: Tensor, loss: Callable[[Tensor], Tensor], *, keep_layout: bool
) -> tuple[Tensor, Tensor]:
    """`ghost_squares`; where `keep_layout`, every layer's output lies in memory as torch lays it.

    Raises:
        _LayoutError: a view of a feature map is impossible, and `keep_layout` is off.
    """
    uses = _ParameterUses(model, images.shape[0], keep_layout)
    # A model that is held unchanged is the caller's to run; of another's, a forward pass must leave no trace.
    traceless = untouched(model, parameters=False) if found_of(model) is None else nullcontext()
    with traceless, torch.enable_grad():
        with uses:
            outputs = model(uses.marked(images.clone()))
        if uses.refusal is not None:  # which the model may have caught
            raise UnservedModel(uses.refusal)
        total = loss(outputs)
        uses.squares = total.new_zeros(images.shape[0], dtype=accumulation_dtype(outputs.dtype))
        if total.requires_grad:
            torch.autograd.grad(total, uses.anchor, allow_unused=True)
    for gradient in uses.shared.values():
        uses.squares += squared(gradient)
    return uses.squares, outputs.detach()


Owners = dict[int, tuple[str, str, nn.Module]]


def _tensors_of(model: nn.Module) -> tuple[Owners, set[int]]:
    """Where each parameter stands, and every tensor that the model keeps, by `id`."""
    found = found_of(model)
    now = None if found is None else [id(parameter) for parameter in model.parameters()]
    if found is not None and "tensors" in found and found["tensors"][0] == now:  # it may run on substitutes
        return found["tensors"][1:]
    owners = {
        id(parameter): (name, module_name, module)
        for module_name, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    kept = {id(tensor) for tensor in tensors_of(model)}
    if found is not None:
        found["tensors"] = now, owners, kept
    return owners, kept


class _ParameterUses(TorchFunctionMode):
    """Watches the forward pass for uses of parameters, and adds up squared norms during the backward pass."""

    def __init__(self, model: nn.Module, batch: int, keep_layout: bool) -> None:
        super().__init__()
        self.batch = batch
        self.keep_layout = keep_layout
        self.owners, self.kept = _tensors_of(model)
        self.count: Counter[int] = Counter()  # uses of each parameter
        self.anchor = torch.zeros((), requires_grad=True)  # see _Tap
        self.shared: dict[int, Tensor] = {}  # per-sample gradients of parameters with more than one use
        self.refusal: str | None = None
        self.squares: Tensor

    def marked(self, result: Any) -> Any:
        """A result that depends on the images, marked so."""
        for value in _values(result):
            if isinstance(value, Tensor) and id(value) not in self.kept:
                value._ddfast_of_images = True  # type: ignore[attr-defined]
        return result

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        try:
            of_images = any(
                getattr(value, "_ddfast_of_images", False) or value.requires_grad
                for value in _values((args, kwargs))
                if isinstance(value, Tensor) and id(value) not in self.owners
            )
            if of_images and func in _READS:
                raise UnservedModel(
                    f"the model reads what it computes of the images, by {resolve_name(func)}"
                )
            result = self._run(func, args, kwargs)
        except UnservedModel as error:
            self.refusal = self.refusal or str(error)
            raise
        return self.marked(result) if of_images else result

    def _run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The call as the ghost method makes it."""
        parameters = [value for value in _values((args, kwargs)) if id(value) in self.owners]
        if not parameters:
            if func in INSTANCE_NORMS:
                return contiguous_gradient(func(*args, **kwargs))
            if func is functional.max_pool2d and args and _is_planar(args[0]):
                pooled = _pooled(*args, **kwargs)
                return pooled.contiguous() if self.keep_layout else pooled
            if func is Tensor.view and not self.keep_layout:
                try:
                    return func(*args, **kwargs)
                except RuntimeError as error:
                    raise _LayoutError from error
            return func(*args, **kwargs)
        if func not in LAYERS:
            if _works_in_place(func) or "out" in kwargs:
                raise UnservedModel(f"{self._named(parameters[0])} is modified by {resolve_name(func)}")
            result = func(*args, **kwargs)
            if any(isinstance(value, Tensor) for value in _values(result)):
                raise UnservedModel(f"{self._named(parameters[0])} is used in {resolve_name(func)}")
            return result  # a shape, a dtype, a device
        layer = LAYERS[func](*args, **kwargs)
        if self.keep_layout and isinstance(layer, Conv2d):
            layer.fused = False
        for parameter in parameters:
            if parameter is not layer.weight and parameter is not layer.bias:
                raise UnservedModel(f"{self._named(parameter)} is an input of {resolve_name(func)}")
        refusal = layer.refusal(self.batch)
        if refusal is not None:
            raise UnservedModel(
                f"{self._named(parameters[0])} is used in {resolve_name(func)}, which {refusal}"
            )

        def call() -> Tensor:
            return func(
                *(self._detached(value) for value in args),
                **{name: self._detached(value) for name, value in kwargs.items()},
            )

        take = self._taker(layer)
        if layer.fused:
            return _Fused.apply(args[0] if args else kwargs["input"], self.anchor, layer, call, take)
        output = contiguous_gradient(call()) if func in INSTANCE_NORMS else call()
        return _Tap.apply(output, self.anchor, take)

    def _taker(self, layer: Layer) -> Callable[[Tensor], Tensor | None]:
        """What the backward pass is to call with the gradient at a layer's output.

        It returns the gradient at the input of a fused layer, and None for other layers.
        """
        weight = layer.weight if id(layer.weight) in self.owners else None
        bias = layer.bias if id(layer.bias) in self.owners else None
        self.count.update(id(parameter) for parameter in (weight, bias) if parameter is not None)
        version = layer.input._version

        def take(grad: Tensor) -> Tensor | None:
            if layer.input._version != version:
                first = weight if weight is not None else bias
                raise UnservedModel(f"the input of {self._named(first)} is modified in place after its use")
            with torch.no_grad():
                grad_input = self._add(layer, weight, bias, grad)
            del layer.input
            return grad_input

        return take

    def _add(self, layer: Layer, weight: Tensor | None, bias: Tensor | None, grad: Tensor) -> Tensor | None:
        """Add one call's share, to the squares or to the gradient of a parameter that other calls use too."""
        own_weight = weight is not None and self.count[id(weight)] == 1
        own_bias = bias is not None and self.count[id(bias)] == 1
        grad_input, squares = layer.backward(grad, weight=own_weight, bias=own_bias)
        if squares is not None:
            self.squares += squares
        if weight is not None and not own_weight:
            self._add_shared(weight, layer.weight_gradient(grad))
        if bias is not None and not own_bias:
            self._add_shared(bias, layer.bias_gradient(grad))
        return grad_input

    def _add_shared(self, parameter: Tensor, gradient: Tensor) -> None:
        if id(parameter) in self.shared:
            self.shared[id(parameter)] += gradient
        else:
            self.shared[id(parameter)] = gradient

    def _detached(self, value: Any) -> Any:
        return value.detach() if id(value) in self.owners else value

    def _named(self, parameter: Any) -> str:
        name, module_name, module = self.owners[id(parameter)]
        return f"{name} of {_described(module_name, module)}"


class _Tap(torch.autograd.Function):
    """The identity, which hands the gradient that passes it to `take`.

    A hook on the output would do, but for a module that then works in place on an output that is a view
    (InstanceNorm's): such a hook is given the wrong gradient. The result shares the output's memory and is no
    view of it. The anchor is what autograd is asked to differentiate by: it makes every result require a gradient.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, take: Callable[[Tensor], Any]) -> Tensor:
        ctx.take = take
        return output.new_empty(0).set_(
            output.untyped_storage(), output.storage_offset(), output.size(), output.stride()
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        ctx.take(grad)
        return grad, None, None


# torch's instance_norm and the function that calls it.
INSTANCE_NORMS = (functional.instance_norm, torch.instance_norm)

# What hands values of a tensor to Python, where they may decide what is computed next.
_READS = {
    *(getattr(Tensor, name) for name in ("item", "tolist", "numpy", "equal", "allclose", "is_nonzero")),
    *(getattr(Tensor, f"__{name}__") for name in ("bool", "int", "float", "index", "complex", "array")),
    torch.equal,
    torch.allclose,
    torch.is_nonzero,
}


def contiguous_gradient(output: Tensor) -> Tensor:
    """The output of an instance_norm, whose gradient comes back to it contiguous where there is one image.

    torch folds the channels into the batch, and its backward pass then misreads a channels-last gradient of one
    image (torch 2.10 to 2.14): all gradients are wrong.
    """
    if not isinstance(output, Tensor) or output.ndim < 4 or len(output) != 1:
        return output
    return _Contiguous.apply(output)


class _Contiguous(torch.autograd.Function):
    """The identity, through which a gradient passes contiguous."""

    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor) -> Tensor:
        return output.clone()  # a view could not be worked on in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        return grad.contiguous()


class _Fused(torch.autograd.Function):
    """A call as `layer` computes it, whose whole backward pass is `take`."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        anchor: Tensor,
        layer: Layer,
        call: Callable[[], Tensor],
        take: Callable[[Tensor], Tensor | None],
    ) -> Tensor:
        ctx.take = take
        return layer.forward(call)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (grad,) = grads
        return ctx.take(grad), None, None, None, None


def _is_planar(images: Tensor) -> bool:
    """Whether images [B, C, H, W] are on the CPU and no channels-last batch."""
    last = images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last)
    return images.device.type == "cpu" and images.ndim == 4 and not last


def _pooled(
    images: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """`functional.max_pool2d` of planar images, without the indices, into channels-last memory.

    torch's forward kernel for planar images takes four times as long as its channels-last kernel, a copy
    included, to the same bytes.
    """
    pairs = (
        (n, n) if isinstance(n, int) else n for n in (kernel_size, stride or kernel_size, padding, dilation)
    )
    return _Pool.apply(images, *pairs, ceil_mode)


class _Pool(torch.autograd.Function):
    """Max pooling forward in channels-last memory and backward in planar memory."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, *geometry: Any) -> Tensor:
        last = images.contiguous(memory_format=torch.channels_last)
        pooled, indices = torch.ops.aten.max_pool2d_with_indices(last, *geometry)
        ctx.save_for_backward(images, indices.contiguous())
        ctx.geometry = geometry
        return pooled  # channels-last, as the layers behind it are fastest

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        images, indices = ctx.saved_tensors
        pool_backward = torch.ops.aten.max_pool2d_with_indices_backward
        return pool_backward(grad.contiguous(), images, *ctx.geometry, indices), *(None for _ in ctx.geometry)


def _values(nested: Any) -> Iterator[Any]:
    """The leaves of nested tuples, lists and dicts."""
    if isinstance(nested, tuple | list):
        for item in nested:
            yield from _values(item)
    elif isinstance(nested, dict):
        yield from _values(list(nested.values()))
    else:
        yield nested


def _works_in_place(func: Callable[..., Any]) -> bool:
    """Whether a function is one of those that change what they are given: `add_`, `__iadd__`, `__setitem__`."""
    name = getattr(func, "__name__", "")
    special = (
        name.startswith("__i") and name.endswith("__") and name not in ("__index__", "__int__", "__invert__")
    )
    return special or name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))


def _described(name: str, module: nn.Module) -> str:
    return f"layer {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
