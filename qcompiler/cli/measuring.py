"""What ``evaluate`` does for models without token ids."""

from pathlib import Path
from typing import Any

from qcompiler.artifacts import evaluate_inputs
from qcompiler.errors import InputError
from qcompiler.reporting import print_table

__all__ = ["measure_by_inputs"]


def measure_by_inputs(
    artifact: Path, against: Path | None, inputs: Path, metric: str, *, as_json: bool
) -> dict[str, Any]:
    """See `qcompiler.artifacts.evaluate_inputs`.

    Raises:
        InputError: without an original.
    """
    if against is None:
        raise InputError("outputs are measured against the original", where=artifact, remedy="--against model.onnx")
    found = evaluate_inputs(artifact, against, inputs, metric).to_dict()
    if not as_json:
        outputs = {f"{metric} of {name}": value for name, value in found["outputs"].items()}
        print_table({**outputs, **{key: value for key, value in found.items() if key not in ("outputs", "metric")}})
    return found
