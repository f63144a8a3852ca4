"""What several tests of graphs begin with."""

import json

import torch
from torch import nn

from qcompiler import numerics
from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_module
from qcompiler.ir.graph import Graph
from qcompiler.ir.qtensor import Affine


def quantized(weight, spec):
    scale, zero_point = numerics.min_max_qparams(weight.float(), spec, torch.float16)
    return Affine(numerics.quantize(weight.float(), scale, zero_point, spec), scale, zero_point, spec, torch.float16)


def stored(graph):
    """The JSON form, as it comes back from a file."""
    return json.loads(json.dumps(graph.to_dict(), allow_nan=False))


def rebuilt(fields, graph):
    return Graph.from_dict(fields, graph.weights, {})


def half_model():
    model = nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 4)).eval().bfloat16()
    return canonicalize(capture_module(model, (torch.randn(3, 8).bfloat16(),)))
