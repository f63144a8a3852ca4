"""ONNX: standard operators with quantized weights, written with `lower`, run with `OnnxArtifact`."""

from pathlib import Path
from typing import Any, Literal

from qcompiler.frontend import import_with_onnx
from qcompiler.ir import Graph
from qcompiler.lowering.onnx.reader import OnnxArtifact
from qcompiler.lowering.onnx.target import OnnxTarget, by_onnxruntime, check_onnxruntime, readers_of

__all__ = ["OnnxArtifact", "OnnxTarget", "by_onnxruntime", "check_onnxruntime", "lower", "readers_of"]


def lower(
    graph: Graph,
    directory: str | Path,
    *,
    opset: int = 21,
    float_dtype: Literal["float32", "float16"] = "float32",
    int8_weights: Literal["uint8", "int8"] = "uint8",
    companions: str | Path | None = None,
) -> dict[str, Any]:
    """Writes a graph as an ONNX folder.

    ``model.onnx`` holds standard operators only, ``model.onnx.data`` the weights, written one at a time: memory does
    not grow with the model. Beside them go tokenizer and configuration files, and ``genai_config.json`` for a decoder
    whose configuration tells everything that file states. The files appear together, ``model.onnx`` last, or not at
    all, and only after ``onnx.checker`` with shape inference has accepted them.

    Args:
        graph: quantized or not; it is not changed.
        directory: made; it may exist if it is empty, be a link to such a one, or a mount point.
        opset: 21 to 25. From 25 on, 2-bit codes take 2 bits; below, like 3-bit codes, 4.
        float_dtype: of weights, scales, activations and caches; logits are float32 in either. Positions, masks and
            norms are computed in float32.
        int8_weights: what 8-bit weights that meet 8-bit activations are stored as, see `OnnxTarget`.
        companions: the directory to copy tokenizer and configuration files from; by default where the model came from.

    Returns:
        A report: ``path``, ``files``, ``bytes``, ``weight_bytes``, ``opset``, ``ir_version``, ``nodes``, ``notes``, and
        ``sites``: for each quantized layer, how it is stored and whether it is fused.

    Raises:
        TargetError: for an operator, dtype or value that has no ONNX form.
        InputError: if the directory is not empty or cannot be written.
        ResourceError: if the disk is full.
        VerificationError: if the checker refuses the result.
        MissingDependencyError: without onnx and onnx_ir.
    """
    target = OnnxTarget(opset, float_dtype, int8_weights)
    writer = import_with_onnx("qcompiler.lowering.onnx.writer")
    written: dict[str, Any] = writer.write(graph, directory, target, companions=companions)
    return written
