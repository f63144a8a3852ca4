"""Engines: what TensorRT's own builder makes of an ONNX file, for GPUs that need not be there.

In: ``model.onnx`` and the sizes its inputs may have. Out: a plan, and the layers that the builder fused.
"""

from qcompiler.lowering.tensorrt.engine.api import Api, check_capability, find_api, how_to_build
from qcompiler.lowering.tensorrt.engine.build import Built, build_engine
from qcompiler.lowering.tensorrt.engine.layers import Constant, Layer, parse_layers
from qcompiler.lowering.tensorrt.engine.placement import Placement, fused_attentions, fused_linears
from qcompiler.lowering.tensorrt.engine.profiles import Profile, default_profiles, parse_profiles
from qcompiler.lowering.tensorrt.engine.running import command_lines, run_script

__all__ = [
    "Api",
    "Built",
    "Constant",
    "Layer",
    "Placement",
    "Profile",
    "build_engine",
    "check_capability",
    "command_lines",
    "default_profiles",
    "find_api",
    "fused_attentions",
    "fused_linears",
    "how_to_build",
    "parse_layers",
    "parse_profiles",
    "run_script",
]
