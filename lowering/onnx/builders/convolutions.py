"""ATen convolutions as Conv and ConvTranspose."""

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.errors import TargetError
from qcompiler.lowering.onnx.builders.elementwise import result_dtype
from qcompiler.lowering.onnx.emitter import Builders, Emitter, argument

__all__ = ["CONVOLUTION_BUILDERS"]

_aten = torch.ops.aten


def _convolution(e: Emitter, node: fx.Node) -> ir.Value:
    """``conv1d`` to ``conv3d``; padding as numbers, or as a word."""
    padding, dilation = argument(node, 4, "padding", 0), argument(node, 5, "dilation", 1)
    if isinstance(padding, str):
        pads = _pads_of_word(padding, node, _per_axis(dilation, _axes(node)))
    else:
        pads = _pads(padding, _axes(node))
    return _emit(e, node, "Conv", dilation, argument(node, 6, "groups", 1), pads)


def _general_convolution(e: Emitter, node: fx.Node) -> ir.Value:
    """``convolution``, transposed or not."""
    pads = _pads(argument(node, 4, "padding"), _axes(node))
    dilation, groups = argument(node, 5, "dilation"), argument(node, 8, "groups")
    if not argument(node, 6, "transposed"):
        return _emit(e, node, "Conv", dilation, groups, pads)
    more = {"output_padding": _per_axis(argument(node, 7, "output_padding"), _axes(node))}
    return _emit(e, node, "ConvTranspose", dilation, groups, {**pads, **more})


def _emit(e: Emitter, node: fx.Node, kind: str, dilation: object, groups: object, more: dict[str, Any]) -> ir.Value:
    axes, dtype = _axes(node), result_dtype(e, node)
    bias = argument(node, 2, "bias")
    inputs = [e.value(source, dtype) for source in (*node.args[:2], *(() if bias is None else (bias,)))]
    strides = _per_axis(argument(node, 3, "stride", 1), axes)
    return e.op(kind, *inputs, strides=strides, dilations=_per_axis(dilation, axes), group=groups, **more)


def _axes(node: fx.Node) -> int:
    """How many axes the window has.

    Raises:
        TargetError: for an input without a batch.
    """
    x, weight = node.args[:2]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    if len(x.meta["shape"]) != len(weight.meta["shape"]):
        raise TargetError("a convolution without a batch has no ONNX form", where=node.name, got=list(x.meta["shape"]))
    return len(weight.meta["shape"]) - 2


def _per_axis(value: object, axes: int) -> list[int]:
    given = [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]
    return given * axes if len(given) == 1 else given


def _pads(padding: object, axes: int) -> dict[str, Any]:
    return {"pads": _per_axis(padding, axes) * 2}


def _pads_of_word(word: str, node: fx.Node, dilation: list[int]) -> dict[str, Any]:
    """Of ``same``, the larger part is behind where it is uneven; ONNX's own word takes no dilation in ONNX Runtime."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    window = weight.meta["shape"][2:]
    pads = [step * (size - 1) if word == "same" else 0 for step, size in zip(dilation, window, strict=True)]
    return {"pads": [*(pad // 2 for pad in pads), *(pad - pad // 2 for pad in pads)]}


CONVOLUTION_BUILDERS: Builders = {
    _aten.conv1d.default: _convolution,
    _aten.conv2d.default: _convolution,
    _aten.conv3d.default: _convolution,
    _aten.conv1d.padding: _convolution,
    _aten.conv2d.padding: _convolution,
    _aten.conv3d.padding: _convolution,
    _aten.convolution.default: _general_convolution,
}
