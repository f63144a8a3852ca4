"""Inputs of layers that an ONNX file rounds already: their formats become part of the schemes of sites."""

import operator
from dataclasses import replace

import torch
from torch import fx

from qcompiler.ir import Graph, is_op, quantized_value
from qcompiler.numerics import QuantSpec, Scheme

__all__ = ["describe_activations"]

_canonical = torch.ops.qcompiler
_DTYPES = {
    torch.int8: ("int8", True),
    torch.uint8: ("int8", False),
    torch.float8_e4m3fn: ("float8_e4m3fn", True),
    torch.float8_e5m2: ("float8_e5m2", True),
}


def describe_activations(graph: Graph) -> None:
    """Says of each site whose input is rounded in what format that is.

    What is rounded otherwise than schemes can say stays as it is, with a note.
    """
    for site in graph.sites():
        specs = [_spec(value, site.in_features) for value in site.inputs if quantized_value(value) is not None]
        if not specs:
            continue
        scheme = graph.schemes.get(site.name, Scheme())
        if len(specs) < len(site.inputs) or specs[0] is None or any(spec != specs[0] for spec in specs):
            graph.notes.append(f"the input of {site.name} is rounded in a way that no scheme describes")
        else:
            graph.schemes[site.name] = replace(scheme, activation=specs[0])


def _spec(value: fx.Node, width: int) -> QuantSpec | None:
    """The format that ``dequantize(quantize(x))`` rounds to."""
    codes = value.args[0]
    if not is_op(value, _canonical.dequantize.default) or not is_op(codes, _canonical.quantize.default):
        return None
    assert isinstance(codes, fx.Node)
    _, scale, zero, axis, block, dtype = codes.args[:6]
    if not isinstance(dtype, torch.dtype) or dtype not in _DTYPES or not isinstance(scale, fx.Node):
        return None
    kind, symmetric = _DTYPES[dtype]
    if (zero is None) is not symmetric:
        return None
    dynamic = is_op(scale, operator.getitem) and is_op(scale.args[0], _canonical.choose_qparams.default)
    if not dynamic and not (scale.op == "get_attr" and scale.meta["shape"] == ()):
        return None
    spec = QuantSpec(kind, "per_tensor", None, symmetric, dynamic=dynamic)
    return spec if (axis, block) == spec.input_place(width) else None
