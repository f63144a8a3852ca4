"""`StreamedOnnxArtifact`: an ONNX folder run by ONNX Runtime in pieces, with the weights of one in memory at a time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor

from qcompiler.ir import Around, Trimmer
from qcompiler.lowering.onnx.pieces import cut_model, present_of
from qcompiler.lowering.onnx.reader import OnnxArtifact, as_tensor, session_options

__all__ = ["PIECE_BYTES", "StreamedOnnxArtifact", "describe"]

PIECE_BYTES = 32 << 20
"""Of weights that are loaded together, as they are stored; a model that has no more is run as a whole."""


@dataclass(frozen=True)
class _Port:
    """An input or output as ONNX Runtime describes it."""

    name: str
    type: str
    shape: list[int | str]

    @classmethod
    def of(cls, port: onnx.ValueInfoProto) -> "_Port":
        kind = port.type.tensor_type
        sizes = [size.dim_value if size.HasField("dim_value") else size.dim_param for size in kind.shape.dim]
        return cls(port.name, _TYPES[onnx.TensorProto.DataType.Name(kind.elem_type)], sizes)


def describe(model: onnx.ModelProto) -> tuple[list[_Port], list[_Port], dict[str, str]]:
    """Inputs, outputs and metadata of a model, as ONNX Runtime would tell of them."""
    sides = [[_Port.of(port) for port in side] for side in (model.graph.input, model.graph.output)]
    return sides[0], sides[1], {entry.key: entry.value for entry in model.metadata_props}


_TYPES = {
    "FLOAT": "tensor(float)",
    "FLOAT16": "tensor(float16)",
    "BFLOAT16": "tensor(bfloat16)",
    "INT64": "tensor(int64)",
    "INT32": "tensor(int32)",
    "INT8": "tensor(int8)",
    "INT4": "tensor(int4)",
    "UINT8": "tensor(uint8)",
    "FLOAT8E4M3FN": "tensor(float8e4m3fn)",
    "FLOAT8E5M2": "tensor(float8e5m2)",
}


class StreamedOnnxArtifact(OnnxArtifact):
    """As `OnnxArtifact`, for files that are too large for the memory: each piece is a session of its own.

    ONNX Runtime optimizes each piece by itself, so that the last bits may differ from those of the whole. Whatever is
    asked for reads all weights once; `run_together` for many texts.

    Args:
        path: the folder, or its ``model.onnx``.
        piece_bytes: of stored weights in a piece; more where it cannot be cut between them.

    Raises:
        InputError, ArtifactError, MissingDependencyError: as `OnnxArtifact`.
    """

    def __init__(self, path: str | Path, *, piece_bytes: int = PIECE_BYTES) -> None:
        file = self._find(path)
        self._options = session_options(accuracy_level=1, threads=None)
        self._options.enable_cpu_mem_arena = False  # which keeps what was freed
        self._options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(file.parent.resolve())
        )
        model = onnx.load(file, load_external_data=False)
        self._describe(*describe(model))
        self._pieces = cut_model(model, piece_bytes)
        self._sized = [  # caches of which a piece reads the sizes alone
            past
            for past in self._past
            if any(past in piece.inputs and present_of(past) not in piece.outputs for piece in self._pieces)
        ]

    def run_together(
        self, runs: Sequence[Sequence[Tensor]], around: Around = lambda _: nullcontext()
    ) -> Iterator[Tensor]:
        """See `qcompiler.protocol.RunsTogether`."""
        for (logits,) in self._by_pieces([self._feed_run(parts) for parts in runs], [self._result], around):
            yield as_tensor(logits)

    def _feed_run(self, parts: Sequence[Tensor]) -> list[dict[str, Any]]:
        """Inputs for parts of one sequence; behind the first, without caches that the part ahead fills."""
        found: list[dict[str, Any]] = []
        length = 0
        for ids in parts:
            self._check(ids, length)
            cache = self._empty(ids.shape[0], length, self._sized if length else self._past)
            found.append(self._feed(ids, cache))
            length += ids.shape[1]
        return found

    def _run(self, ids: Tensor, cache: Any, outputs: list[str]) -> tuple[Tensor, list[Any]]:
        first, *rest = next(self._by_pieces([[self._feed(ids, cache)]], outputs))
        return as_tensor(first), rest

    def _by_pieces(
        self,
        runs: Sequence[Sequence[Mapping[str, Any]]],
        wanted: Sequence[str],
        around: Around = lambda _: nullcontext(),
    ) -> Iterator[list[Any]]:
        """What `qcompiler.ir.run_by_segments` does, with sessions."""
        memory = Trimmer()
        present = {past: present_of(past) for past in self._past} if any(len(run) > 1 for run in runs) else {}
        carried: list[list[dict[str, Any]]] = [[dict(feed) for feed in run] for run in runs]
        for place, piece in enumerate(self._pieces):
            behind = {name for later in self._pieces[place + 1 :] for name in later.inputs} | set(wanted)
            chained = {past: present[past] for past in piece.inputs if present.get(past) in piece.outputs}
            names = [name for name in piece.outputs if name in behind or name in chained.values()]
            session = self._open(piece.model.SerializeToString())
            number = 0
            for run in carried:
                ahead: dict[str, Any] = {}
                for at, values in enumerate(run):
                    if ahead:
                        values.update({past: ahead[made] for past, made in chained.items()})
                    with around(number):
                        given = {name: values[name] for name in piece.inputs}
                        results = session.run_with_ort_values(names, given)
                    ahead = dict(zip(names, results, strict=True))
                    del results, given
                    run[at] = {name: value for name, value in {**values, **ahead}.items() if name in behind}
                    if piece is self._pieces[-1]:
                        yield [run[at].pop(name) for name in wanted]
                    number += 1
            del session, ahead
            memory.trim()
