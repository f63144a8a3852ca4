"""Models without token ids: batches of their own inputs, what they compute of them, and how far two forms differ."""

from qcompiler.artifacts.inputs.comparing import check_by_inputs, check_outputs
from qcompiler.artifacts.inputs.given import GivenInputs, fit_inputs, made_inputs
from qcompiler.artifacts.inputs.measuring import InputEvaluation, evaluate_inputs

__all__ = [
    "GivenInputs",
    "InputEvaluation",
    "check_by_inputs",
    "check_outputs",
    "evaluate_inputs",
    "fit_inputs",
    "made_inputs",
]
