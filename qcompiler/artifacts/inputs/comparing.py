"""Whether what was lowered of a model without token ids computes what its graph computes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qcompiler.artifacts.inputs.given import made_inputs
from qcompiler.artifacts.inputs.measuring import largest_difference
from qcompiler.artifacts.inputs.running import outputs_of
from qcompiler.artifacts.noise import noisy_samples
from qcompiler.artifacts.parity import LOOSEST
from qcompiler.errors import VerificationError
from qcompiler.ir import Graph
from qcompiler.protocol import Lowered, RunsInputs

__all__ = ["check_by_inputs", "check_outputs"]


def check_by_inputs(graph: Graph, lowered: Lowered, inputs: Sequence[Tensor] | None = None) -> None:
    """Lets every reader that can run a model without token ids run what came out; the report grows.

    Args:
        graph: the reference.
        lowered: what was made of it.
        inputs: one tensor per port; by default made at random.

    Raises:
        VerificationError: if it computes something else.
        CalibrationError: if no inputs are given, and none can be made.
    """
    readers = [reader for reader in lowered.readers if reader.open_for_inputs is not None]
    batch = made_inputs(graph.signature) if inputs is None and readers else list(inputs or ())
    rounds = any(scheme.activation is not None for scheme in graph.schemes.values())
    for reader in readers:
        assert reader.open_for_inputs is not None
        lowered.report[reader.entry] = check_outputs(
            graph,
            reader.open_for_inputs(),
            batch,
            tolerance=reader.tolerance,
            noisy=noisy_samples(graph, reader.rounded, reader.dtype) if reader.rounded is not None or rounds else (),
            rounds=rounds,
            device=lowered.device,
        )


def check_outputs(
    graph: Graph,
    actual: RunsInputs,
    inputs: Sequence[Tensor],
    *,
    tolerance: float,
    noisy: Iterable[Graph] = (),
    rounds: bool = False,
    device: str = "cpu",
    where: Path | str | None = None,
) -> dict[str, Any]:
    """Compares all outputs on one batch.

    What roundings of activations make of a difference in the last bit is allowed as in
    `qcompiler.artifacts.check_parity`: twice the largest difference of samples with such errors, and twice the
    difference to the model that rounds none, unless that makes the bound too loose and there are samples.

    Args:
        graph: the reference.
        actual: what was written.
        inputs: one tensor per port.
        tolerance: largest difference allowed, relative to the largest value of an output.
        noisy: samples of the graph with errors as large as ``actual`` may make.
        rounds: whether the graph rounds activations.
        device: where the graph runs.
        where: what to name in an error.

    Returns:
        ``max_difference``, ``tolerance``, and ``outputs``: the difference of each by name.

    Raises:
        VerificationError: beyond the tolerance, or where it is too loose to see a fault.
    """
    (expected,) = outputs_of(graph, [inputs], device)
    names = [port.name for port in graph.signature.outputs]

    def differences(found: Sequence[Tensor]) -> dict[str, float]:
        shapes = [tuple(output.shape) for output in found]
        if shapes != [tuple(output.shape) for output in expected]:
            raise VerificationError(
                "what was written gives outputs of other shapes",
                where=where,
                got=shapes,
                expected=[tuple(output.shape) for output in expected],
            )
        return {name: largest_difference(*pair) for name, *pair in zip(names, found, expected, strict=True)}

    samples = [max(differences(outputs_of(sample, [inputs], device)[0]).values()) for sample in noisy]
    own = 2 * max(samples, default=0.0)
    if rounds:
        unrounded = 2 * max(differences(outputs_of(graph, [inputs], device, rounded=False)[0]).values())
        own += unrounded if own + unrounded <= LOOSEST or not samples else 0.0
    if not own <= LOOSEST:
        raise VerificationError(
            "this model cannot be verified: its own rounding moves its outputs as far as a fault would",
            where=where,
            got=f"relative differences of up to {own:.2g}",
            expected=f"at most {LOOSEST}",
            remedy="give inputs of the kind it will meet, use more bits of activations, or lower with verify=False",
        )
    found = differences(actual.run(inputs))
    most = max(found.values())
    if not all(value <= tolerance + own for value in found.values()):  # a NaN is not
        raise VerificationError(
            "what was written does not compute what the native artifact computes",
            where=where,
            got=f"relative differences of {', '.join(f'{value:.2e} in {name}' for name, value in found.items())}",
            expected=f"at most {tolerance + own:.0e}",
            remedy="this is a fault of the lowering; please report the model and the recipe",
        )
    return {"max_difference": most, "tolerance": tolerance + own, "outputs": found}
