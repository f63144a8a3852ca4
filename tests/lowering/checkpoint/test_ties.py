"""Layers that engines fuse have one scale of the whole tensor, so that what engines do to them changes nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch

import qcompiler as qc
from qcompiler.artifacts.calibration import Calibration
from qcompiler.ir.graph import Graph
from qcompiler.passes import RTN, Assign
from qcompiler.protocol import Pass
from tests.lowering.checkpoint import unpacking
from tests.lowering.checkpoint.conftest import Write, native_weight, passes_of
from tests.lowering.checkpoint.test_layers import GATED, QKV

FP8 = ["checkpoint", "checkpoint:format=modelopt"]


@pytest.mark.parametrize("target", FP8)
def test_floats_of_eight_bits_as_vllm_fuses_them(target: str, graph: Graph, write: Write) -> None:
    """It takes the largest scale of the fused layers for all, and rounds each one's weights to it again."""
    directory, report, result = write(graph, "fp8-tensor", target)
    tensors = unpacking.read_tensors(directory)
    for names in (QKV, GATED):
        scales = [tensors[f"{name}.weight_scale"].float().reshape(()) for name in names]
        largest = torch.stack(scales).max()
        assert len({float(tensors[f"{name}.input_scale"]) for name in names}) == 1
        for name, scale in zip(names, scales, strict=True):
            codes = tensors[f"{name}.weight"]
            again = (codes.float() * scale / largest).clamp(-448, 448).to(torch.float8_e4m3fn)
            assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
            fused = unpacking.scaled(unpacking.e4m3_matrix(again), largest.reshape(1, 1).numpy())
            np.testing.assert_array_equal(fused, native_weight(result.graph, name))
    assert not any("vLLM takes one" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("target", "packed", "stored", "is_inverse"),
    [("checkpoint", "weight_packed", "weight_global_scale", True), (FP8[1], "weight", "weight_scale_2", False)],
)
def test_floats_of_four_bits_as_vllm_fuses_them(
    target: str, packed: str, stored: str, is_inverse: bool, graph: Graph, write: Write
) -> None:
    """It takes the largest factor (of compressed-tensors: what is stored is its inverse) for all fused layers."""
    directory, _, result = write(graph, "nvfp4", target)
    tensors = unpacking.read_tensors(directory)
    for names in (QKV, GATED):
        largest = torch.stack([tensors[f"{name}.{stored}"].reshape(()) for name in names]).max()
        inputs = "input_global_scale" if is_inverse else "input_scale"
        assert len({float(tensors[f"{name}.{inputs}"]) for name in names}) == 1
        for name in names:
            assert torch.equal(tensors[f"{name}.{stored}"].reshape(()), largest)
            scales = unpacking.e4m3_matrix(tensors[f"{name}.weight_scale"])
            scales = scales / largest.numpy() if is_inverse else scales * largest.numpy()
            fused = unpacking.scaled(unpacking.fp4_matrix(tensors[f"{name}.{packed}"]), scales)
            np.testing.assert_allclose(fused, native_weight(result.graph, name), rtol=2**-22)  # 1 / (1 / factor)


@pytest.mark.parametrize("scheme", ["fp8-tensor", "nvfp4a16"])
def test_scales_chosen_together_lose_less_than_rounding_again(scheme: str, graph: Graph, write: Write) -> None:
    *_, tied = write(graph, scheme)
    own = qc.compile(graph, passes_of(scheme), Calibration.from_tokens(torch.arange(48).reshape(4, 12)))
    weights = {site.name: graph.weights.read(site.weight).float() for site in graph.sites()}
    for names in (QKV, GATED):
        part = "factor" if scheme == "nvfp4a16" else "scale"
        scales = {name: own.graph.weights.read(f"{name}.weight_{part}").float() for name in names}
        largest = max(float(scale) for scale in scales.values())
        assert min(float(scale) for scale in scales.values()) < largest
        lost = [0.0, 0.0]
        for name in names:
            found = torch.from_numpy(native_weight(own.graph, name))
            if part == "scale":
                again = (found / largest).clamp(-448, 448).to(torch.float8_e4m3fn).float() * largest
            else:
                again = found * largest / scales[name]  # what an engine makes of it that takes one factor
            lost[0] += float((weights[name] - torch.from_numpy(native_weight(tied.graph, name))).square().sum())
            lost[1] += float((weights[name] - again).square().sum())
        assert lost[0] <= lost[1]


@pytest.mark.parametrize("scheme", ["fp8-tensor-dynamic", "nvfp4a16", "w8a16-tensor"])
def test_models_compiled_without_the_target(scheme: str, graph: Graph, tmp_path: Path) -> None:
    """What was rounded is not rounded again; the report says what engines make of it, where that is another weight."""
    passes: list[Pass] = [Assign(scheme), *passes_of("w8a16")[1:]]
    if "dynamic" in scheme:
        passes = passes_of(scheme)
    tokens = Calibration.from_tokens(torch.arange(48).reshape(4, 12)) if "dynamic" in scheme else None
    report = qc.lower(qc.compile(graph, passes, tokens), "checkpoint", tmp_path / "out")
    notes = [note for note in report["notes"] if "vLLM takes one for all" in note]
    assert len(notes) == (0 if scheme == "w8a16-tensor" else 1)  # integers are repeated for each output channel
    assert all("Compiled for this target, they have one" in note for note in notes)


def test_a_target_that_fuses_nothing_changes_nothing(graph: Graph) -> None:
    free, onnx = (qc.compile(graph, [Assign("w8a16-tensor"), RTN()], targets=targets) for targets in ((), ("onnx",)))
    for name in free.graph.weight_names():
        assert torch.equal(free.graph.weights.read(name), onnx.graph.weights.read(name))
