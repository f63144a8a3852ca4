"""The layers of an engine, read from what the builder or the inspector say of it in words.

With detailed profiling verbosity, a builder logs the list that an inspector prints in its ``ONELINE`` format. Seen of
TensorRT for RTX 1.7; a line of it, shortened::

    Name: fc_myl0_3, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [1,-1,64], ..., Datatype: Half, ... }],
    Constants: [ ... ], Outputs: [ ... ], TacticName: ..., StreamId: 0, Metadata: [ONNX Layer: /q/MatMul]

``_myl0_3`` says that it is the third layer of the compiler's graph 0, which is of one profile. Inputs and outputs of
profiles behind the first are called ``x [profile 1]``.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["QUANTIZED", "Constant", "Layer", "Tensor", "parse_layers"]

QUANTIZED = ("Int4", "Int8", "FP8", "FP4", "FP4E2M1")
"""What the builder calls the types that quantized weights have."""

_FIELDS = (
    "LayerType",
    "Inputs",
    "Constants",
    "Outputs",
    "TacticName",
    "TacticValue",
    "StreamId",
    "EventId",
    "Metadata",
)
_FIELD = re.compile(rf"(?:^|, )(Name|{'|'.join(_FIELDS)}): ")
_TENSOR = re.compile(r"\{ Name: (.*?), (?=Dimensions|Location)(.*?)\}(?=,|\s*\]|\s*$)")
_DIMENSIONS = re.compile(r"Dimensions: \[([-\d, ]*)\]")
_DATATYPE = re.compile(r"Data[tT]ype: (\w+)")
_ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\[]|\s*$)")
_GRAPH = re.compile(r"_myl(\d+)(?:_\d+)?$")
_PROFILE = re.compile(r"\[profile (\d+)\]")


@dataclass(frozen=True)
class Tensor:
    """What a layer reads or writes.

    Attributes:
        name: in the engine.
        dtype: as the builder calls it, such as ``Half``; empty where it does not say.
        shape: -1 where a size varies.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class Constant(Tensor):
    """What a layer has of its own: weights, scales."""


@dataclass(frozen=True)
class Layer:
    """A layer of an engine: one kernel, or a few.

    Attributes:
        name: in the engine.
        kind: as the builder calls it, such as ``gemm``, ``runtime_fusion`` or ``kgen`` (a generated kernel).
        inputs, outputs: values.
        constants: weights and scales.
        origins: the ONNX nodes it was made of.
        profile: the index of the profile that it runs in.
        tactic: the kernel's name; empty where it is chosen on the GPU.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    constants: tuple[Constant, ...]
    origins: tuple[str, ...]
    profile: int = 0
    tactic: str = ""

    @property
    def quantized(self) -> tuple[Constant, ...]:
        """Its constants of quantized types."""
        return tuple(constant for constant in self.constants if constant.dtype in QUANTIZED)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON fields; the inverse is `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Layer":
        """Rebuilds a layer from `to_dict`."""

        def tensors(kind: type[Tensor], items: Iterable[Mapping[str, Any]]) -> tuple[Any, ...]:
            return tuple(kind(item["name"], item["dtype"], tuple(item["shape"])) for item in items)

        return cls(
            name=fields["name"],
            kind=fields["kind"],
            inputs=tensors(Tensor, fields["inputs"]),
            outputs=tensors(Tensor, fields["outputs"]),
            constants=tensors(Constant, fields["constants"]),
            origins=tuple(fields["origins"]),
            profile=fields["profile"],
            tactic=fields["tactic"],
        )


def parse_layers(text: str) -> tuple[Layer, ...]:
    """The layers that compute something; lines of another form are passed over.

    Args:
        text: with a line per layer.
    """
    found = [layer for line in text.split("\n") if (layer := _layer(line.strip())) is not None]
    profiles: dict[str, int] = {}
    for layer in found:
        if (graph := _graph(layer)) and (mentioned := _mentioned_profile(layer)) is not None:
            profiles[graph] = max(mentioned, profiles.get(graph, 0))
    return tuple(
        replace(layer, profile=profiles[graph])
        if (graph := _graph(layer)) in profiles
        else replace(layer, profile=_mentioned_profile(layer) or 0)
        for layer in found
        if layer.outputs
    )


def _graph(layer: Layer) -> str:
    found = _GRAPH.search(layer.name)
    return found[1] if found else ""


def _mentioned_profile(layer: Layer) -> int | None:
    names = (layer.name, *(tensor.name for tensor in (*layer.inputs, *layer.outputs)))
    found = [int(match[1]) for name in names if (match := _PROFILE.search(name))]
    return max(found, default=None)


def _layer(line: str) -> Layer | None:
    if not line.startswith("Name: "):
        return None
    parts = _FIELD.split(line)[1:]
    fields = dict(zip(parts[::2], parts[1::2], strict=True))
    if "LayerType" not in fields:
        return None
    return Layer(
        name=fields["Name"],
        kind=fields["LayerType"].strip(),
        inputs=_tensors(Tensor, fields.get("Inputs", "")),
        outputs=_tensors(Tensor, fields.get("Outputs", "")),
        constants=_tensors(Constant, fields.get("Constants", "")),
        origins=tuple(dict.fromkeys(_ORIGIN.findall(fields.get("Metadata", "")))),
        tactic=fields.get("TacticName", "").strip(),
    )


def _tensors(kind: type[Any], text: str) -> tuple[Any, ...]:
    found = []
    for name, rest in _TENSOR.findall(text):
        dims, dtype = _DIMENSIONS.search(rest), _DATATYPE.search(rest)
        shape = tuple(int(size) for size in dims[1].split(",") if size.strip()) if dims else ()
        found.append(kind(name, dtype[1] if dtype else "", shape))
    return tuple(found)
