"""What inputs and outputs of an ONNX graph are for: found by dtype, shape and what they feed; names are kept."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from qcompiler.errors import UnsupportedModelError
from qcompiler.frontend.onnx.nodes import Declared, Node, Source
from qcompiler.frontend.onnx.values import DTYPES
from qcompiler.ir import BATCH, PAST, SEQUENCE, TOTAL, Dim, Part, Port, Role

__all__ = ["Ports", "find_ports"]

_ATTENTIONS: dict[tuple[str, str], tuple[int, int]] = {
    ("", "Attention"): (4, 5),
    ("com.microsoft", "GroupQueryAttention"): (3, 4),
    ("com.microsoft", "MultiHeadAttention"): (6, 7),
}
"""The inputs that are past keys and values; the outputs 1 and 2 are the present ones."""
_PASSING = ("Cast", "Identity")
_RESHAPING = (*_PASSING, "Reshape", "Squeeze", "Unsqueeze", "Flatten")
_PARTS: tuple[Part, ...] = ("key_scale", "value_scale", "key_zero_point", "value_zero_point", "key", "value")
_BOTH = re.compile(r"(past_)?key_?values?(?=\W|_\d|$)|kv_?cache")
"""Of a name: what stands for keys and values together."""
_OTHERS = re.compile("position|type|segment")
"""Of names: integers that are looked up, too, and are no tokens."""
_WORD = re.compile(r"[^A-Za-z0-9_]")


@dataclass
class Ports:
    """The inputs and outputs; sizes of outputs are known when the graph is traced.

    Attributes:
        inputs: in the order of the file.
        outputs: by name: role, and of caches the layer and the part.
    """

    inputs: list[Port] = field(default_factory=list)
    outputs: dict[str, tuple[Role, int | None, Part | None]] = field(default_factory=dict)


def find_ports(source: Source) -> Ports:
    """The ports of a model.

    Raises:
        UnsupportedModelError: for an input of unknown rank, or of a dtype that is not read.
    """
    finder = _Finder(source)
    ports = Ports([finder.port(declared) for declared in source.inputs])
    for declared in source.outputs:
        ports.outputs[declared.name] = finder.presents.get(declared.name) or (finder.output_role(declared), None, None)
    return ports


class _Finder:
    def __init__(self, source: Source) -> None:
        self._source, self._readers, self._makers = source, source.readers(), source.makers()
        self._outputs = {declared.name for declared in source.outputs}
        for declared in source.inputs:
            if declared.dims is None or declared.type not in DTYPES:
                raise UnsupportedModelError(
                    "an input of unknown shape" if declared.dims is None else "an input of a dtype that is not read",
                    where=f"{source.path}: {declared.name}",
                    got=None if declared.dims is None else f"type {declared.type}",
                )
        self.presents: dict[str, tuple[Role, int | None, Part | None]] = {}
        self._past = self._find_caches()
        self._ids, self._rows = self._find_ids()
        self._dims = self._name_dims()

    # --- caches ---------------------------------------------------------------------------------------------------

    def _find_caches(self) -> dict[str, tuple[int, Part]]:
        found: dict[str, tuple[int, Part]] = {}
        counts: dict[Part, int] = {}
        for declared in self._source.inputs:
            if declared.dims is None or len(declared.dims) < 3 or declared.type == 7:
                continue
            for part, present in self._appended(declared.name):
                layer = counts.get(part, 0)
                counts[part] = layer + 1
                found[declared.name] = (layer, part)
                self.presents[present] = ("present", layer, part)
                break
        return found

    def _appended(self, name: str) -> Iterator[tuple[Part, str]]:
        """What part of a cache an input is, and the output that it leaves by."""
        for node, index in self._reached(name):
            places = _ATTENTIONS.get((node.domain, node.op))
            if places is not None and index in places:
                which = places.index(index)
                for present in self._leaves_by(node.outputs[which + 1] if len(node.outputs) > which + 1 else ""):
                    yield ("key", "value")[which], present
            elif node.op == "Concat" and index == 0 and len(node.inputs) == 2 and node.attributes["axis"] in (2, -2):
                for present in self._leaves_by(node.outputs[0]):
                    yield self._part(name), present

    def _part(self, name: str) -> Part:
        """By the name of the port; without a word of it, keys come ahead of values."""
        lower = _BOTH.sub("", name.lower())
        found = next((part for part in _PARTS if part in lower), None)
        if found is not None:
            return found
        inputs = [d.name for d in self._source.inputs if d.dims is not None and len(d.dims) == 4]
        return "key" if inputs.index(name) % 2 == 0 else "value"

    def _reached(self, name: str, passing: tuple[str, ...] = _PASSING) -> Iterator[tuple[Node, int]]:
        """The readers of a value, casts passed over."""
        for node, index in self._readers.get(name, ()):
            if node.op in passing and node.domain == "" and index == 0:
                yield from self._reached(node.outputs[0], passing)
            else:
                yield node, index

    def _leaves_by(self, name: str) -> Iterator[str]:
        if name in self._outputs:
            yield name
        for node, _ in self._readers.get(name, ()):
            if node.op in _PASSING and node.domain == "":
                yield from self._leaves_by(node.outputs[0])

    # --- tokens, masks, positions ----------------------------------------------------------------------------------

    def _find_ids(self) -> tuple[str | None, int]:
        """The integers that are looked up in a table of as many rows as an output scores, or of the most, and the rows.

        Where a table of positions has more, names tell.
        """
        tables: dict[str, int] = {}
        for declared in self._source.inputs:
            if declared.type not in (6, 7) or declared.dims is None or len(declared.dims) not in (1, 2):
                continue
            for node, index in self._reached(declared.name, _RESHAPING):
                rows = self._rows_of(node) if index == 1 else None
                if rows is not None:
                    tables[declared.name] = max(rows, tables.get(declared.name, 0))
        if not tables:
            return None, 0
        scored = {declared.dims[-1] for declared in self._source.outputs if declared.dims}
        kept = {name: rows for name, rows in tables.items() if rows in scored}
        kept = kept or {name: rows for name, rows in tables.items() if not _OTHERS.search(name.lower())} or tables
        chosen = max(kept, key=kept.__getitem__)
        return chosen, kept[chosen]

    def _rows_of(self, node: Node) -> int | None:
        """The rows of the table that a node looks up in."""
        is_lookup = node.op == "Gather" and node.attributes.get("axis", 0) == 0
        if not is_lookup and node.op != "GatherBlockQuantized":
            return None
        table = node.inputs[0]
        maker = self._makers.get(table)
        while maker is not None and maker.op in ("DequantizeLinear", "Cast", "Identity"):
            table = maker.inputs[0]
            maker = self._makers.get(table)
        if table not in self._source.stored:
            return None
        shape = self._source.stored.info(table).shape
        return shape[0] if len(shape) >= 2 else None

    def _is_table_lookup(self, name: str) -> bool:
        return any(index == 1 and self._rows_of(node) for node, index in self._reached(name, _RESHAPING))

    def _makes_angles(self, name: str) -> bool:
        """Whether sines are computed from a value ahead of any weight."""
        seen, ring = {name}, [name]
        while ring:
            value = ring.pop()
            for node, index in self._readers.get(value, ()):
                if node.op in ("Sin", "Cos") or (node.op == "RotaryEmbedding" and index in (1, 3)):
                    return True
                if node.op == "GroupQueryAttention" and index == 9:
                    return True
                if node.op in ("Gather", "Add") and any(
                    other in self._source.stored and len(self._source.stored.info(other).shape) == 2
                    for other in node.inputs
                ):
                    if node.op == "Gather" and index == 1 and self._rotates(node.outputs[0]):
                        return True
                    continue
                for output in node.outputs:
                    if output not in seen and node.op not in ("Shape", "Softmax", "Attention"):
                        seen.add(output)
                        ring.append(output)
        return False

    def _rotates(self, name: str) -> bool:
        """Whether rows of a table that were looked up are multiplied with, as cosines are."""
        return any(node.op in ("Mul", "Unsqueeze", "Reshape", "Concat") for node, _ in self._readers.get(name, ()))

    # --- sizes -----------------------------------------------------------------------------------------------------

    def _name_dims(self) -> dict[str, Dim]:
        """By the file's names of sizes: ours."""
        names: dict[str, Dim] = {}
        by_name = {declared.name: declared.dims for declared in self._source.inputs}
        ids = by_name.get(self._ids or "") or ()
        for size, ours in zip(ids[-2:], (BATCH, SEQUENCE) if len(ids) == 2 else (SEQUENCE,), strict=False):
            if isinstance(size, str):
                names.setdefault(size, ours)
        for name in self._past:
            dims = by_name[name] or ()
            for axis, ours in ((0, BATCH), (2, PAST)):
                size = dims[axis]
                if isinstance(size, str):
                    names.setdefault(size, ours)
        return names

    def port(self, declared: Declared) -> Port:
        """An input."""
        assert declared.dims is not None
        dtype = str(DTYPES[declared.type]).removeprefix("torch.")
        if declared.name in self._past:
            layer, part = self._past[declared.name]
            batch, heads, length, *rest = declared.dims
            if not isinstance(heads, int) or not all(isinstance(size, int) for size in rest):
                raise UnsupportedModelError(
                    "a cache whose heads or width vary",
                    where=f"{self._source.path}: {declared.name}",
                    got=declared.dims,
                )
            past: list[Dim] = [size for size in rest if isinstance(size, int)]
            shape = (self._dim(batch, BATCH, declared), heads, self._dim(length, PAST, declared), *past)
            return Port(declared.name, "past", dtype, shape, layer, part)
        role = self._role(declared)
        named: tuple[Dim, ...] = ()
        if role != "other" and len(declared.dims) == 2:
            second = TOTAL if role == "mask" and self._past else SEQUENCE
            named = (BATCH, second)
        shape = tuple(
            self._dim(size, named[axis] if named else None, declared, axis) for axis, size in enumerate(declared.dims)
        )
        return Port(declared.name, role, dtype, shape)

    def _dim(self, size: int | str | None, ours: Dim | None, declared: Declared, axis: int = 0) -> Dim:
        if isinstance(size, int):
            return size
        if ours is not None:
            return ours
        if size is not None and size in self._dims:
            return self._dims[size]
        if axis == 0 and self._ids is None:
            return BATCH
        return _WORD.sub("_", size) if size else f"{_WORD.sub('_', declared.name)}_{axis}"

    def _role(self, declared: Declared) -> Role:
        if declared.name == self._ids:
            return "ids"
        if self._ids is None or declared.type not in (6, 7, 9, 1, 10) or len(declared.dims or ()) != 2:
            return "other"
        if declared.type in (6, 7) and self._makes_angles(declared.name):
            return "positions"
        if declared.type in (6, 7) and self._is_table_lookup(declared.name):
            return "positions" if self._past else "other"
        return "mask"

    def output_role(self, declared: Declared) -> Role:
        """What an output is that is no cache."""
        dims = declared.dims or ()
        if self._ids is None:
            return "other"
        if len(dims) == 3 and dims[-1] == self._rows:
            return "logits"
        return "scores" if declared.name == "logits" else "other"
