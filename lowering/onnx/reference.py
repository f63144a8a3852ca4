"""`Float16Artifact`: an ONNX folder evaluated in the arithmetic it is written in, float16 where it says float16.

ONNX Runtime's CPU provider computes float16 graphs in float32, so that nothing overflows there. `onnx.reference` rounds
the result of every operator to its dtype, as accelerators do.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from qcompiler.errors import VerificationError
from qcompiler.lowering.onnx.reader import OnnxArtifact, token_input
from qcompiler.lowering.onnx.streamed import describe

__all__ = ["MARGIN", "Float16Artifact"]

MARGIN = 2.0
"""How many times as large as on the tokens seen a value must be able to become: others exceed those."""

_LARGEST = float(np.finfo(np.float16).max)


class Float16Artifact(OnnxArtifact):
    """A model whose `forward` is evaluated operator by operator in its own dtypes; slow, for a few tokens.

    Weights are read as they are used.

    Args:
        path: the folder.
        operators: that are no standard ones.

    Raises:
        InputError, ArtifactError, MissingDependencyError: as `OnnxArtifact`.
    """

    def __init__(self, path: str | Path, *, operators: Sequence[type[OpRun]] = ()) -> None:
        file = self._find(path)
        model = onnx.load(file, load_external_data=False)
        self._describe(*describe(model))
        self.has_cache = False  # nothing but `forward` is evaluated here
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        del model.graph.initializer[:]
        self._evaluator = ReferenceEvaluator(model, new_ops=list(operators))
        self._last_uses: dict[str, int] = {}
        for place, node in enumerate(self._evaluator.rt_nodes_):
            self._last_uses.update(dict.fromkeys([*node.input, *node.output], place))

    def forward(self, ids: Tensor) -> Tensor:
        """int64 ``[B, S]`` → float32 ``[B, S, V]``.

        Raises:
            VerificationError: if a float16 value is not finite, or no further than `MARGIN` from that.
        """
        values: dict[str, Any] = {"": None}
        values.update({port.name: _given(port, ids) for port in self._evaluator.proto_.graph.input})
        with np.errstate(all="ignore"):  # what overflows is found below
            for place, node in enumerate(self._evaluator.rt_nodes_):
                for name in node.input:
                    if name not in values:
                        values[name] = self._read(name)
                results = node.run(*(values[name] for name in node.input))
                for name, result in zip(node.output, results, strict=False):  # it gives optional ones unasked
                    if name:
                        values[name] = result
                        self._check_range(name, result)
                for name in (*node.input, *node.output):
                    if name and name != self._result and self._last_uses[name] == place:
                        values.pop(name, None)
        return torch.from_numpy(np.asarray(values[self._result], dtype=np.float32))

    def _read(self, name: str) -> Any:
        """A weight: of a copy of its description, which reading fills."""
        tensor = onnx.TensorProto()
        tensor.CopyFrom(self._weights[name])
        return onnx.numpy_helper.to_array(tensor, str(self.path))

    def _check_range(self, name: str, result: object) -> None:
        if not isinstance(result, np.ndarray) or result.dtype != np.float16 or not result.size:
            return
        largest = float(np.abs(result).max())  # NaN if one is
        if not largest <= _LARGEST / MARGIN:
            raise VerificationError(
                "a value of this model does not fit float16",
                where=f"{self.path}: {name}",
                got=f"magnitude {largest:.3g}",
                expected=f"finite, and at most {_LARGEST / MARGIN:.0f}: half of what float16 holds, as other tokens "
                "may give larger values than the few that were tried",
                remedy="lower with float_dtype='float32'",
            )


def _given(port: onnx.ValueInfoProto, ids: Tensor) -> Any:
    """What an input is given: the tokens, or an empty cache."""
    kind = port.type.tensor_type
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if port.name.startswith("past_key_values."):
        sizes = [size.dim_value for size in kind.shape.dim]
        return np.zeros((ids.shape[0], sizes[1], 0, sizes[3]), dtype)
    return np.ascontiguousarray(token_input(port.name, ids, 0, ids.shape[1]), dtype)
