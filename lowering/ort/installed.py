"""Whether the ONNX Runtime that is installed knows the operators of a model, by its own schemas."""

from typing import Any

import onnx_ir as ir

from qcompiler.errors import TargetError

__all__ = ["check_installed"]

_WRITTEN_FOR = "1.32"


def check_installed(model: ir.Model) -> None:
    """Refuses a model whose operators, their inputs or attributes are unknown to the ONNX Runtime installed.

    Raises:
        TargetError: that names the first.
    """
    import onnxruntime

    schemas = _schemas()
    for node in model.graph:
        if not node.domain or not schemas:
            continue
        schema = schemas.get((node.domain, node.op_type))
        unknown = sorted(set(node.attributes) - set(schema.attributes)) if schema is not None else []
        is_short = schema is not None and len(node.inputs) > len(schema.inputs)
        if schema is None or unknown or is_short:
            what = f"attributes {', '.join(unknown)} of " if unknown else f"{len(node.inputs)} inputs of "
            raise TargetError(
                "the ONNX Runtime that is installed is too old for an operator",
                where=node.name,
                got=f"{onnxruntime.__version__}, without {'' if schema is None else what}{node.op_type}",
                expected=f"{_WRITTEN_FOR} or later",
                remedy="pip install -U onnxruntime, or use the target onnx",
            )


def _schemas() -> dict[tuple[str, str], Any]:
    """By domain and name; empty where this ONNX Runtime does not tell them."""
    from onnxruntime.capi import _pybind_state

    listing = getattr(_pybind_state, "get_all_operator_schema", None)
    return {} if listing is None else {(schema.domain, schema.name): schema for schema in listing()}
