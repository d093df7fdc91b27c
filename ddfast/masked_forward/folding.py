"""A traced model made fast: batch norms inside convolutions, weights laid out and cast once, fused epilogues.

Folding multiplies a convolution's weight by its batch norm's scale, and 3x3 convolutions in float32 take Winograd's
form where the CPU has AVX-512 (`ddfast.ops.winograd_conv2d`), so float32 results keep float32's accuracy but not the
same last bits as the model's. There, what masked images of one image have in common is computed once, to the same
bits: `locality.note_reach` says which tiles a patch can change. In bfloat16 that is done too, with float products.

`precision="auto"` casts weights and activations to the low precision once, where autocast would cast the
weights on every call. It is done where every layer of the graph is known to keep float32 sums inside
(convolutions, linear layers, poolings, activations); the last linear layer, which gives the scores, stays in
float32. Other graphs run under autocast.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ddfast.masked_forward.locality import tile_reach
from ddfast.ops import add_bias_relu_, winograd_conv2d, winograd_weight
from ddfast.ops._winograd import INPUTS, OUTPUTS, winograd_is_fast, winograd_pays

_LOW_PRECISION_MODULES = (
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.GroupNorm,
    nn.Linear,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.SiLU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Sigmoid,
    nn.GELU,
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.Flatten,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
)
_LOW_PRECISION_FUNCTIONS = (
    operator.add,
    operator.mul,
    operator.getitem,
    torch.add,
    torch.mul,
    torch.cat,
    torch.flatten,
    torch.relu,
    torch.sigmoid,
    F.relu,
    F.relu6,
    F.silu,
    F.gelu,
    F.hardswish,
    F.dropout,
    F.avg_pool2d,
    F.max_pool2d,
    F.adaptive_avg_pool2d,
    getattr,
)
_LOW_PRECISION_METHODS = ("add", "mul", "relu", "flatten", "view", "reshape", "size", "mean", "contiguous")
_RELU_FUNCTIONS = (F.relu, torch.relu)
_ADD_FUNCTIONS = (operator.add, torch.add)


def fold_batch_norms(traced: fx.GraphModule) -> int:
    """Move every batch norm that alone reads a convolution into that convolution's weight and bias.

    Changes the graph module, whose convolutions become copies. Returns how many were folded.
    """
    modules = dict(traced.named_modules())
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    folded = 0
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) is not nn.BatchNorm2d:
            continue
        source = node.args[0]
        if (
            source.op != "call_module"
            or type(modules[source.target]) is not nn.Conv2d
            or len(source.users) != 1
        ):
            continue
        if calls.count(node.target) != 1 or calls.count(source.target) != 1:
            continue
        norm = modules[node.target]
        if norm.running_mean is None or norm.running_var is None:
            continue
        _set_module(traced, source.target, folded_convolution(modules[source.target], norm))
        node.replace_all_uses_with(source)
        traced.graph.erase_node(node)
        folded += 1
    traced.recompile()
    return folded


def folded_convolution(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution that gives norm(conv(x)) of a batch norm in eval mode."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    exact = torch.float64 if conv.weight.dtype == torch.float64 else torch.float32
    scale = (variance.to(exact) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().to(exact)
    shift = -mean.to(exact) if conv.bias is None else conv.bias.detach().to(exact) - mean.to(exact)
    bias = shift * scale if norm.bias is None else shift * scale + norm.bias.detach().to(exact)
    weight = conv.weight.detach().to(exact) * scale[:, None, None, None]
    return _with_weights(conv, weight.to(conv.weight.dtype), bias.to(conv.weight.dtype))


def _with_weights(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """The same convolution with other weights, without a copy of its own."""
    new = copy.copy(conv)
    new._parameters = {
        "weight": nn.Parameter(weight, requires_grad=False),
        "bias": None if bias is None else nn.Parameter(bias, requires_grad=False),
    }
    return new.eval()


def _set_module(traced: fx.GraphModule, target: str, module: nn.Module) -> None:
    parent, _, name = target.rpartition(".")
    setattr(traced.get_submodule(parent), name, module)


def low_precision_reason(traced: fx.GraphModule) -> str:
    """Why the graph is not cast as a whole to a low precision; empty where it can be."""
    modules = dict(traced.named_modules())
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            return f"it reads the bare tensor {node.target}"
        if node.op == "call_module" and type(modules[node.target]) not in _LOW_PRECISION_MODULES:
            return f"it has a {type(modules[node.target]).__name__}"
        if node.op == "call_function" and node.target not in _LOW_PRECISION_FUNCTIONS:
            return f"it calls {getattr(node.target, '__name__', node.target)}"
        if node.op == "call_method" and node.target not in _LOW_PRECISION_METHODS:
            return f"it calls {node.target}"
    return ""


def cast(traced: fx.GraphModule, dtype: torch.dtype) -> None:
    """Bring weights to `dtype`, convolutions' in channels-last layout, the last linear layer's to float32.

    The modules that change become copies, the model's own stay as they are.
    """
    modules = dict(traced.named_modules())
    (result,) = (node for node in traced.graph.nodes if node.op == "output")
    last = result.args[0]
    for node in list(traced.graph.nodes):
        if node.op != "call_module":
            continue
        module = modules[node.target]
        if type(module) is nn.Conv2d:
            weight = module.weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
            bias = None if module.bias is None else module.bias.detach().to(dtype)
            _set_module(traced, node.target, _with_weights(module, weight, bias))
        elif node is last and type(module) is nn.Linear and dtype.itemsize == 2:
            with traced.graph.inserting_before(node):
                wide = traced.graph.call_method("float", (node.args[0],))
            node.args = (wide,)
            _set_module(traced, node.target, copy.deepcopy(module).float())
        elif any(t.is_floating_point() and t.dtype != dtype for t in _tensors(module)):
            _set_module(traced, node.target, copy.deepcopy(module).to(dtype))
    traced.recompile()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def fuse_epilogues(
    traced: fx.GraphModule, device: torch.device, dtype: torch.dtype, share: bool = False
) -> int:
    """Let convolutions add a residual block's shortcut and apply the ReLU while they write their output.

    conv -> relu, conv -> add -> relu and conv -> add, on the CPU in float32 and bfloat16: one pass over memory
    where there were two or three. It changes the graph after `measure` has noted shapes and after `cast`. Returns
    how many convolutions were replaced. On a GPU it is `fuse_gpu_epilogues`.

    With `share`, on a graph that `note_reach` has seen, tiles of Winograd's convolutions that masked images of one
    image have in common are computed once. The graph then takes one input more, `sets` int64 [images, maps] of
    `winograd_conv2d` or None, and `traced.meta["takes_sets"]` is true.
    """
    if device.type == "cuda":
        return fuse_gpu_epilogues(traced, device, dtype)
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return 0
    modules = dict(traced.named_modules())
    replaced = 0
    sets: fx.Node | None = None
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) is not nn.Conv2d:
            continue
        conv = modules[node.target]
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        winograd = _takes_winograd(conv, node.meta.get("shape"))
        end, other, relu = _epilogue(node, modules)
        reach = end.meta.get("reach") if share and winograd else None
        reads = None if reach is None else tile_reach(reach)
        if dtype == torch.bfloat16:
            # Float products take as long as bfloat16's of the direct way where no tile is cut off, so that whatever
            # is shared is gained.
            winograd = (
                winograd and reads is not None and all(side % 2 == 0 for side in node.meta["shape"][-2:])
            )
        if not winograd and not _has_onednn_fusions():
            continue
        if end is node and not winograd:
            continue
        with traced.graph.inserting_before(end):
            bias = None if conv.bias is None else traced.graph.get_attr(f"{node.target}.bias")
            if winograd:
                conv.register_buffer(
                    "winograd", winograd_weight(conv.weight.detach().float()), persistent=False
                )
                weight = traced.graph.get_attr(f"{node.target}.winograd")
                if conv.bias is not None and dtype != torch.float32:
                    conv.register_buffer("wide_bias", conv.bias.detach().float(), persistent=False)
                    bias = traced.graph.get_attr(f"{node.target}.wide_bias")
                arguments: tuple[Any, ...] = (node.args[0], weight, bias, other, relu)
                if reads is not None:
                    sets = sets or _placeholder(traced.graph, "sets")
                    conv.register_buffer("reads", reads, persistent=False)
                    arguments += (sets, traced.graph.get_attr(f"{node.target}.reads"))
                new = traced.graph.call_function(_winograd_conv2d, arguments)
            else:
                weight = traced.graph.get_attr(f"{node.target}.weight")
                geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
                new = traced.graph.call_function(
                    _onednn_conv2d, (node.args[0], weight, bias, other, relu, *geometry)
                )
        new.meta.update(end.meta)
        end.replace_all_uses_with(new)
        replaced += 1
    traced.graph.eliminate_dead_code()
    _add_in_place(traced.graph, modules)
    traced.recompile()
    traced.meta["takes_sets"] = sets is not None
    return replaced


def fuse_gpu_epilogues(traced: fx.GraphModule, device: torch.device, dtype: torch.dtype) -> int:
    """`fuse_epilogues` for cuDNN and Triton.

    A ReLU, and a sum before it, go into cuDNN's convolution where that takes it: this is tried once here for every
    geometry, and compared with the separate operations. Else bias, sum and ReLU become one pass over the convolution's
    output by `ddfast.ops.add_bias_relu_`, where they were at least two. The convolutions compute as plain ones do:
    cuDNN's read the same settings for TF32 and for the choice of an algorithm.

    Returns how many convolutions were replaced; `traced.meta["epilogues"]` says by what, and why not by cuDNN.
    """
    modules = dict(traced.named_modules())
    counts: Counter[str] = Counter()
    refusals: dict[tuple, str] = {}
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) is not nn.Conv2d:
            continue
        conv = modules[node.target]
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        end, other, relu = _epilogue(node, modules)
        passes = (conv.bias is not None) + (other is not None) + relu
        if end is node:
            continue
        refusal = "there is no ReLU"
        if relu:
            shape = _input_size(conv, node.meta.get("shape"))
            kind = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
            tried = (shape, conv.weight.shape, kind, conv.bias is None, other is None)
            if tried not in refusals:
                refusals[tried] = _cudnn_refusal(conv, shape, other is not None, device, dtype)
            refusal = refusals[tried]
        if refusal and passes < 2:
            continue
        with traced.graph.inserting_before(end):
            bias = None if conv.bias is None else traced.graph.get_attr(f"{node.target}.bias")
            weight = traced.graph.get_attr(f"{node.target}.weight")
            arguments: tuple[Any, ...] = (node.args[0], weight, bias, other)
            geometry = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
            if not refusal:
                new = traced.graph.call_function(_cudnn_conv2d, (*arguments, *geometry))
                counts["cuDNN"] += 1
            else:
                new = traced.graph.call_function(_conv2d_then_add, (*arguments, relu, *geometry))
                counts[f"one pass behind the convolution: {refusal}"] += 1
        new.meta.update(end.meta)
        end.replace_all_uses_with(new)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    traced.meta["takes_sets"] = False
    told = ", ".join(f"{count} by {how}" for how, count in counts.items())
    traced.meta["epilogues"] = f"epilogues fused: {told}" if told else ""
    return counts.total()


def _input_size(conv: nn.Conv2d, shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The least height and width of what a convolution makes maps of this shape from, where it is known."""
    if shape is None or isinstance(conv.padding, str):
        return None
    return tuple(
        (made - 1) * conv.stride[d] + conv.dilation[d] * (conv.kernel_size[d] - 1) + 1 - 2 * conv.padding[d]
        for d, made in enumerate(shape[-2:])
    )


def _cudnn_refusal(
    conv: nn.Conv2d, size: tuple[int, ...] | None, add: bool, device: torch.device, dtype: torch.dtype
) -> str:
    """Why cuDNN does not compute a convolution with its (sum and) ReLU; "" where it does, and rightly."""
    if not hasattr(torch, "cudnn_convolution_add_relu" if add else "cudnn_convolution_relu"):
        return "this torch has no such operation of cuDNN"
    if not torch.backends.cudnn.enabled:
        return "cuDNN is switched off"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"cuDNN fuses nothing in {str(dtype).removeprefix('torch.')}"
    if torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for, which cuDNN's fused convolution may leave"
    if size is None:
        return "the size of its input is unknown"
    last = torch.channels_last
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).contiguous(memory_format=last)

    images, weight, bias = normal(2, conv.in_channels, *size), conv.weight.detach(), conv.bias
    geometry: tuple[Any, ...] = (conv.stride, conv.padding, conv.dilation, conv.groups)
    try:
        wanted = F.conv2d(images, weight, bias, *geometry)
        other = normal(*wanted.shape) if add else None
        wanted = torch.relu(wanted if other is None else wanted + other)
        given = _cudnn_conv2d(images, weight, bias, other, *geometry)
    except RuntimeError as error:
        return f"cuDNN refuses it ({str(error).splitlines()[0][:80]})"
    if given.shape != wanted.shape or given.dtype != wanted.dtype:
        return "cuDNN gives another shape or dtype"
    # A few roundings of the dtype, or of TF32 where the plain convolution may take it.
    unit = torch.finfo(dtype).eps
    if dtype == torch.float32:
        unit = 2**-10 if torch.backends.cudnn.allow_tf32 else 2**-18
    difference = float((given.double() - wanted.double()).abs().amax())
    agrees = difference <= 8 * unit * float(wanted.double().abs().amax())
    return "" if agrees else "cuDNN gives other numbers"


def _cudnn_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """relu(conv2d(x) + other) by cuDNN."""
    if other is None:
        return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
    return torch.cudnn_convolution_add_relu(x, weight, other, 1.0, bias, stride, padding, dilation, groups)


def _conv2d_then_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, relu: bool, *geometry: Any
) -> Tensor:
    """relu(conv2d(x) + bias + other), all behind the convolution in one pass over its output."""
    return add_bias_relu_(F.conv2d(x, weight, None, *geometry), bias, other, relu=relu)


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A new input of the graph, behind the others."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        return graph.placeholder(name)


def _add_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Let oneDNN write a sum over its other term where that is a convolution's output that nobody reads later."""
    order = {node: place for place, node in enumerate(graph.nodes)}

    def is_convolution(node: fx.Node) -> bool:
        fused = node.op == "call_function" and node.target in (_onednn_conv2d, _winograd_conv2d)
        return fused or (node.op == "call_module" and type(modules[str(node.target)]) is nn.Conv2d)

    for node in graph.nodes:
        if node.target is not _onednn_conv2d or node.args[3] is None:
            continue
        other = node.args[3]
        # A convolution's output is memory of its own, and another convolution keeps no view of it.
        if not is_convolution(other) or node.args[0] is other:
            continue
        if all(user is node or (is_convolution(user) and order[user] < order[node]) for user in other.users):
            node.target = _onednn_conv2d_


def _epilogue(conv: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, fx.Node | None, bool]:
    """What alone reads a convolution: (last node of it, the other term of a sum or None, whether a ReLU is there)."""
    end, other = conv, None
    follower = _only_user(end)
    if follower is not None and _is_sum(follower) and follower.args[0] is not follower.args[1]:
        candidate = next(arg for arg in follower.args if arg is not end)
        # The convolution moves to the place of the sum, where both terms are there.
        if isinstance(candidate, fx.Node) and _same_shape(candidate, end) and not _is_one_pixel(end):
            end, other = follower, candidate
            follower = _only_user(end)
    if follower is not None and _is_relu(follower, modules):
        return follower, other, True
    return end, other, False


def _takes_winograd(conv: nn.Conv2d, shape: tuple[int, ...] | None) -> bool:
    """Whether `winograd_conv2d` computes it, and the tiles it adds at the edges leave it faster."""
    if (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) != (
        (3, 3),
        (1, 1),
        (1, 1),
        (1, 1),
        1,
    ):
        return False
    if shape is None or conv.in_channels % INPUTS or conv.out_channels % OUTPUTS or not winograd_is_fast():
        return False
    return winograd_pays(*shape[-2:])


def _winograd_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    relu: bool,
    sets: Tensor | None = None,
    reads: Tensor | None = None,
) -> Tensor:
    return winograd_conv2d(x, weight, bias, other, relu, sets, reads if sets is not None else None)


def _has_onednn_fusions() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _onednn_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None, relu: bool, *geometry: Any
) -> Tensor:
    """oneDNN's convolution with its sum and ReLU; `geometry` is padding, stride, dilation and groups."""
    run = torch.ops.mkldnn._convolution_pointwise
    if other is None:
        return run(x, weight, bias, *geometry, "relu" if relu else "none", [], "")
    activation = "relu" if relu else None
    return run.binary(x, other, weight, bias, *geometry, "add", 1.0, activation, [], "")


def _onednn_conv2d_(
    x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, relu: bool, *geometry: Any
) -> Tensor:
    """The same, written over `other`."""
    activation = "relu" if relu else None
    return torch.ops.mkldnn._convolution_pointwise_.binary(
        other, x, weight, bias, *geometry, "add", 1.0, activation, [], ""
    )


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_sum(node: fx.Node) -> bool:
    if node.kwargs or len(node.args) != 2:
        return False
    return (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target == "add"
    )


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Shapes were recorded by the analysis; unknown ones do not fit."""
    return a.meta.get("shape") is not None and a.meta.get("shape") == b.meta.get("shape")


def _is_one_pixel(node: fx.Node) -> bool:
    """Whether a map is 1x1: oneDNN's fused sum fails on it under torch 2.11 ("could not create a memory")."""
    return tuple(node.meta["shape"][-2:]) == (1, 1)


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS
    return node.op == "call_method" and node.target == "relu"
