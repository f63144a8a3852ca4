"""The batches that a compilation is calibrated with, on its device, and the held-out tokens set apart for measuring."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, fx

from qcompiler.artifacts import Calibration, CalibrationTokens, GivenInputs, NativeArtifact
from qcompiler.errors import CalibrationError
from qcompiler.frontend import declared, declared_positions
from qcompiler.ir import SEQUENCE, Graph, feed, is_op
from qcompiler.protocol import PassContext
from qcompiler.reporting import CompileReport
from qcompiler.sweep.position import Batch

__all__ = ["calibration_batches", "token_limits"]

# Tokens run through a segment at once: large enough for the matrix products (on the CPU, 4096 were no faster than
# 1024), and no larger, because what a segment computes on the way takes as much memory.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_HELD_OUT_ROWS = 16


def calibration_batches(
    graph: Graph,
    calibration: Calibration | Iterable[tuple[Tensor, ...]] | None,
    context: PassContext,
    report: CompileReport,
    trust_remote_code: bool,
    *,
    is_calibrated: bool,
) -> tuple[list[Batch], Tensor | None]:
    """Calibration inputs on the device, and the tokens set apart for measuring: all, where nothing is calibrated."""
    if graph.signature.input("ids") is None:
        given = calibration.inputs if isinstance(calibration, Calibration) else calibration
        if given is None:
            raise CalibrationError(
                "a model without token ids is calibrated with its own inputs",
                expected="Calibration.from_inputs, or an iterable of tuples of tensors",
            )
        values: list[Batch] = [
            {
                node: tensor.to(context.device, torch.float32 if tensor.is_floating_point() else tensor.dtype)
                for node, tensor in zip(graph.inputs, tensors, strict=True)
            }
            for tensors in GivenInputs.of(given).batches(graph.signature)
        ]
        report.calibration = {"source": "inputs", "samples": len(values)}
        return values, None
    if calibration is not None and not isinstance(calibration, Calibration):
        raise CalibrationError(
            "a language model is calibrated with tokens",
            got=type(calibration).__name__,
            expected="Calibration.from_text, .from_tokens or .self_generated",
        )
    bound = _bound_tokens(graph, calibration, context.seed, trust_remote_code)
    report.calibration = described = bound.to_dict()
    if not is_calibrated:
        described["use"] = "measurement"
        has_logits = graph.signature.index_of_output("logits") is not None
        use = "served to measure the result alone" if has_logits else "was not used"
        report.notes.append(f"nothing in this recipe is calibrated: what was given to calibrate with {use}")
        held_out = bound.groups[0] if bound.held_out is None else bound.held_out
        return [], held_out[:_HELD_OUT_ROWS]
    report.notes += [*bound.notes, *_doubts(graph, bound)]
    at_once = _BATCH_TOKENS.get(context.device.type, 1024)
    batches: list[Batch] = [
        feed(graph, ids.to(context.device))
        for group in bound.groups
        for ids in group.split(max(1, at_once // group.shape[1]))
    ]
    return batches, bound.held_out


def _doubts(graph: Graph, bound: CalibrationTokens) -> list[str]:
    """What speaks against calibration tokens: too few to measure with, or to tell the channels of a layer apart."""
    found = []
    widest = max((site.in_features for site in graph.sites()), default=0)
    if bound.tokens < widest:
        found.append(
            f"calibrated on {bound.tokens} tokens, fewer than the {widest} input channels of the widest layer: they "
            "cannot tell all channels apart; give more text, or more samples"
        )
    if bound.held_out is None and graph.signature.index_of_output("logits") is not None:
        found.append(
            "the result was not measured: calibration took every window there is; give more text, or fewer samples"
        )
    return found


def _bound_tokens(
    graph: Graph, calibration: Calibration | None, seed: int, trust_remote_code: bool
) -> CalibrationTokens:
    """Calibration data as tokens for this model; text that the model makes up itself where none is given."""
    vocab_size, max_positions = token_limits(graph)
    if calibration is None:
        calibration = Calibration.self_generated(seed=seed)
        if max_positions is not None and max_positions < (calibration.length or 0):
            calibration = replace(calibration, length=max_positions)
    if calibration.source == "self-generated":
        if graph.signature.index_of_output("logits") is None:
            raise CalibrationError(
                "this model predicts no tokens, so it cannot make up its own calibration text",
                where=graph.provenance.get("source"),
                got=f"output {graph.signature.outputs[0].name} {list(graph.signature.outputs[0].shape)}",
                remedy="give text of the kind the model reads: Calibration.from_text, or --calib FILE",
            )
        _check_finite(graph)
    companions = graph.provenance.get("companions")
    if "onnx" in graph.provenance and vocab_size is not None:
        artifact = NativeArtifact(graph) if calibration.source == "self-generated" else None
        return calibration.bind(
            companions,
            artifact=artifact,
            vocab_size=vocab_size,
            max_positions=max_positions,
            hold_out=_HELD_OUT_ROWS,
            trust_remote_code=trust_remote_code,
        )
    if companions is not None:
        return calibration.bind(companions, hold_out=_HELD_OUT_ROWS, trust_remote_code=trust_remote_code)
    artifact = NativeArtifact(graph) if calibration.source == "self-generated" else None
    return calibration.bind(
        artifact=artifact, vocab_size=vocab_size, max_positions=max_positions, hold_out=_HELD_OUT_ROWS
    )


def _check_finite(graph: Graph) -> None:
    """Reads every weight once, so that one that is not finite is named: what a model samples with it names nothing."""
    for name in graph.weight_names():
        graph.weights.read(name)


def token_limits(graph: Graph) -> tuple[int | None, int | None]:
    """Vocabulary and longest sequence, as the configuration declares them; or as the graph has them."""
    config = graph.provenance.get("config")
    longest = declared_positions(config) or graph.provenance.get("limits", {}).get(SEQUENCE)
    return declared(config, "vocab_size") or _rows_of_tokens(graph), longest


def _rows_of_tokens(graph: Graph) -> int | None:
    """The rows of the table that token ids are looked up in."""
    for node, port in zip(graph.inputs, graph.signature.inputs, strict=True):
        readers = node.users if port.role == "ids" else ()
        for reader in readers:
            table = reader.args[0] if is_op(reader, torch.ops.aten.embedding.default) else None
            if isinstance(table, fx.Node) and isinstance(table.meta["shape"][0], int):
                return int(table.meta["shape"][0])
    return None
