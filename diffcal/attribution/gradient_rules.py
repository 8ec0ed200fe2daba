"""The operations through which parameters act, and the parts that each leaves behind."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffcal.attribution.gradient_conv import ConvGeometry, ConvPart
from diffcal.attribution.gradient_parts import (
    BroadcastPart,
    GroupScalePart,
    NormScalePart,
    OuterPart,
    Part,
    TablePart,
)
from diffcal.attribution.gradient_taps import Alias, Taps, UnsupportedUse, rule

__all__: list[str] = []


def _bind(names: str, args: tuple[Any, ...], kwargs: dict[str, Any], **defaults: Any) -> list[Any]:
    """Arguments in the order of ``names``."""
    ordered = names.split()
    given = dict(zip(ordered, args, strict=False)) | kwargs
    if len(args) > len(ordered) or not given.keys() <= set(ordered):
        raise UnsupportedUse
    return [given.get(name, defaults.get(name)) for name in ordered]


def _bias(taps: Taps, bias: Any, viewed_axes: int) -> list[Part]:
    alias = taps.alias(bias)
    if alias is None:
        return []
    viewed = (*alias.tensor.shape, *(1,) * viewed_axes)
    return [BroadcastPart(alias.name, alias.shape, viewed, None, taps.rows)]


@rule(F.linear)
def _linear(taps: Taps, args: Any, kwargs: Any) -> tuple[Tensor, list[Part]]:
    x, weight, bias = _bind("input weight bias", args, kwargs)
    x = taps.activation(x)
    if x.ndim < 2 or weight.ndim != 2:
        raise UnsupportedUse
    x = _as_multiplied(x)
    if x.dtype == torch.bfloat16:
        x = x.contiguous()  # torch multiplies anything else image by image
    output = F.linear(x, weight, bias)
    parts = _bias(taps, bias, 0)
    if alias := taps.alias(weight):
        parts.append(_outer(alias, x.detach(), output, taps.rows, transposed=False))
    return output, parts


@rule(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm)
def _product(taps: Taps, args: Any, kwargs: Any) -> tuple[Tensor, list[Part]]:
    if kwargs or len(args) != 2:
        raise UnsupportedUse
    x, weight = taps.activation(args[0]), args[1]
    alias = taps.alias(weight)
    if alias is None or x.ndim < 2 or weight.ndim != 2:
        raise UnsupportedUse
    x = _as_multiplied(x)
    output = x @ weight
    return output, [_outer(alias, x.detach(), output, taps.rows, transposed=True)]


def _outer(alias: Alias, x: Tensor, output: Tensor, rows: int, transposed: bool) -> Part:
    # Under autocast the product was taken of rounded operands: keep what it saw.
    x = x.to(output.dtype)
    part = OuterPart(alias.name, alias.shape, x, rows, transposed)
    part.is_sketchable = alias.keeps_rows
    return part


def _as_multiplied(x: Tensor) -> Tensor:
    """As autocast hands it to a product: rounded once, for the product and for its part."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@rule(*_CONVOLUTIONS.values())
def _convolution(taps: Taps, args: Any, kwargs: Any) -> tuple[Tensor, list[Part]]:
    x, weight, bias, stride, padding, dilation, groups = _bind(
        "input weight bias stride padding dilation groups",
        args,
        kwargs,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
    )
    x = taps.activation(x)
    axes = weight.ndim - 2
    if x.ndim != weight.ndim:
        raise UnsupportedUse
    x = _as_multiplied(x)
    dilation, stride = _each(dilation, axes), _each(stride, axes)
    kernel = tuple(weight.shape[2:])
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
        x, padding = F.pad(x, sides), 0
    padding = _each(0 if padding == "valid" else padding, axes)
    output = _CONVOLUTIONS[axes](x, weight, bias, stride, padding, dilation, groups)
    parts = _bias(taps, bias, axes)
    if alias := taps.alias(weight):
        geometry = ConvGeometry(kernel, stride, padding, dilation, groups)
        parts.append(_convolved(alias, x, output, taps.rows, geometry))
    return output, parts


@rule(*_TRANSPOSED.values())
def _transposed_convolution(taps: Taps, args: Any, kwargs: Any) -> tuple[Tensor, list[Part]]:
    x, weight, bias, stride, padding, output_padding, groups, dilation = _bind(
        "input weight bias stride padding output_padding groups dilation",
        args,
        kwargs,
        stride=1,
        padding=0,
        output_padding=0,
        groups=1,
        dilation=1,
    )
    x = taps.activation(x)
    axes = weight.ndim - 2
    if x.ndim != weight.ndim:
        raise UnsupportedUse
    x = _as_multiplied(x)
    stride, padding, extra, dilation = (
        _each(value, axes) for value in (stride, padding, output_padding, dilation)
    )
    output = _TRANSPOSED[axes](x, weight, bias, stride, padding, extra, groups, dilation)
    parts = _bias(taps, bias, axes)
    if alias := taps.alias(weight):
        kernel = tuple(weight.shape[2:])
        geometry = ConvGeometry(kernel, stride, padding, dilation, groups, extra)
        parts.append(_convolved(alias, x, output, taps.rows, geometry))
    return output, parts


def _convolved(alias: Alias, x: Tensor, output: Tensor, rows: int, geometry: ConvGeometry) -> Part:
    x = x.detach().to(output.dtype)
    shape = tuple(alias.tensor.shape)
    part = ConvPart(alias.name, alias.shape, x, rows, geometry, shape)
    part.is_sketchable = alias.keeps_rows
    return part


def _each(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _normalisation(
    taps: Taps,
    x: Tensor,
    output: Tensor,
    weight: Any,
    bias: Any,
    normalise: Callable[[Tensor], Tensor],
    channel_axis: int | None,
) -> tuple[Tensor, list[Part]]:
    parts = _bias(taps, bias, 0 if channel_axis is None else x.ndim - 2)
    if alias := taps.alias(weight):
        parts.append(
            NormScalePart(alias.name, alias.shape, x.detach(), taps.rows, normalise, channel_axis)
        )
    return output, parts


@rule(F.group_norm)
def _group_norm(taps: Taps, args: Any, kwargs: Any) -> tuple[Tensor, list[Part]]:
    x, groups, weight, bias, eps = _bind("input num_groups weight bias eps", args, kwargs, eps=1e-5)
    x = taps.activation(x)
    alias = taps.alias(weight)
    # A CPU's kernel takes activations of half precision with the norm's own float32 numbers.
    if alias is not None and x.is_contiguous() and _like_autocast(x, alias.tensor):
        # The operation inside F.group_norm, for the statistics that it also gives.
        sizes = (len(x), x.shape[1], x[0, 0].numel())
        output, mean, inverse_std = torch.native_group_norm(
            x.reshape(sizes), weight, bias, *sizes, groups, eps
        )
        statistics = (mean.detach(), inverse_std.detach())
        part = GroupScalePart(alias.name, alias.shape, x.detach(), taps.rows, *statistics)
        return output.reshape(x.shape), [*_bias(taps, bias, x.ndim - 2), part]
    output = F.group_norm(x, groups, weight, bias, eps)
    return _normalisation(
        taps, x, output, weight, bias, lambda t: F.group_norm(t, groups, eps=eps), 1
    )


def _like_autocast(x: Tensor, weight: Tensor) -> bool:
    """Whether a group norm's own operation gives what ``F.group_norm`` would."""
    if not torch.is_autocast_enabled(x.device.type):
        return x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)
    return x.device.type == "cpu" and weight.dtype == torch.float32 and x.dtype != torch.float16


@rule(F.layer_norm)
def _layer_norm(taps: Taps, args: Any, kwargs: Any) -> tuple[Tensor, list[Part]]:
    x, shape, weight, bias, eps = _bind(
        "input normalized_shape weight bias eps", args, kwargs, eps=1e-5
    )
    x = taps.activation(x)
    if x.ndim <= len(shape):
        raise UnsupportedUse  # the rows themselves are normalised over
    output = F.layer_norm(x, shape, weight, bias, eps)
    return _normalisation(
        taps, x, output, weight, bias, lambda t: F.layer_norm(t, shape, eps=eps), None
    )


@rule(F.rms_norm)
def _rms_norm(taps: Taps, args: Any, kwargs: Any) -> tuple[Tensor, list[Part]]:
    x, shape, weight, eps = _bind("input normalized_shape weight eps", args, kwargs)
    x = taps.activation(x)
    if x.ndim <= len(shape):
        raise UnsupportedUse
    output = F.rms_norm(x, shape, weight, eps)
    return _normalisation(
        taps, x, output, weight, None, lambda t: F.rms_norm(t, shape, eps=eps), None
    )


@rule(F.batch_norm)
def _batch_norm(taps: Taps, args: Any, kwargs: Any) -> tuple[Tensor, list[Part]]:
    x, mean, variance, weight, bias, training, momentum, eps = _bind(
        "input running_mean running_var weight bias training momentum eps",
        args,
        kwargs,
        training=False,
        momentum=0.1,
        eps=1e-5,
    )
    x = taps.activation(x)
    if training or mean is None:
        raise UnsupportedUse
    output = F.batch_norm(x, mean, variance, weight, bias, False, momentum, eps)

    def normalise(t: Tensor) -> Tensor:
        return F.batch_norm(t, mean.to(t.dtype), variance.to(t.dtype), eps=eps)

    return _normalisation(taps, x, output, weight, bias, normalise, 1)


@rule(F.instance_norm)
def _instance_norm(taps: Taps, args: Any, kwargs: Any) -> tuple[Tensor, list[Part]]:
    x, mean, variance, weight, bias, by_instance, momentum, eps = _bind(
        "input running_mean running_var weight bias use_input_stats momentum eps",
        args,
        kwargs,
        use_input_stats=True,
        momentum=0.1,
        eps=1e-5,
    )
    x = taps.activation(x)
    if mean is not None and by_instance:
        raise UnsupportedUse  # running statistics would be updated
    output = F.instance_norm(x, mean, variance, weight, bias, by_instance, momentum, eps)

    def normalise(t: Tensor) -> Tensor:
        if by_instance or mean is None:
            return F.instance_norm(t, eps=eps)
        return F.batch_norm(t, mean.to(t.dtype), variance.to(t.dtype), eps=eps)

    return _normalisation(taps, x, output, weight, bias, normalise, 1)


@rule(F.embedding)
def _embedding(taps: Taps, args: Any, kwargs: Any) -> tuple[Tensor, list[Part]]:
    index, table, padding_index, max_norm, norm_type, by_frequency, _ = _bind(
        "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse",
        args,
        kwargs,
        norm_type=2.0,
        scale_grad_by_freq=False,
        sparse=False,
    )
    index, alias = taps.activation(index), taps.alias(table)
    if alias is None or max_norm is not None or by_frequency:
        raise UnsupportedUse  # max_norm changes the table, frequencies mix rows
    output = F.embedding(index, table, padding_index, None, norm_type, False, False)
    if padding_index is not None and padding_index < 0:
        padding_index += len(table)
    part = TablePart(alias.name, alias.shape, index, taps.rows, padding_index)
    part.is_sketchable = alias.keeps_rows
    return output, [part]


def _broadcast(taps: Taps, args: Any, kwargs: Any, with_factor: bool) -> tuple[Tensor, list[Part]]:
    if kwargs or len(args) != 2:
        raise UnsupportedUse
    first, second = args
    alias, other = (taps.alias(first), second) if taps.alias(first) else (taps.alias(second), first)
    x = taps.activation(other)
    if alias is None:
        raise UnsupportedUse
    viewed = tuple(alias.tensor.shape)
    if len(viewed) > x.ndim or (len(viewed) == x.ndim and viewed[0] != 1):
        raise UnsupportedUse  # the parameter has a row axis of its own
    output = x * alias.tensor if with_factor else x + alias.tensor
    if len(output) != len(x):
        raise UnsupportedUse
    factor = x.detach().expand_as(output) if with_factor else None
    return output, [BroadcastPart(alias.name, alias.shape, viewed, factor, taps.rows)]


@rule(torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__)
def _sum(taps: Taps, args: Any, kwargs: Any) -> tuple[Tensor, list[Part]]:
    return _broadcast(taps, args, kwargs, with_factor=False)


@rule(torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)
def _scaled(taps: Taps, args: Any, kwargs: Any) -> tuple[Tensor, list[Part]]:
    return _broadcast(taps, args, kwargs, with_factor=True)
