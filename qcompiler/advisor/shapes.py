"""A model's sizes, which memory and time follow from: of a directory, by its headers, or as they are told."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from qcompiler.errors import InputError
from qcompiler.frontend import declared, declared_positions, is_quantized_checkpoint, read_config
from qcompiler.storage import WeightStore

__all__ = ["Matrix", "ModelShape", "read_shape", "told_shape"]

Part = Literal["attention", "mlp", "experts", "table", "head", "router"]
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
_INTERMEDIATE = ("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k")
_MOST = {"layers": 10_000, "hidden": 1 << 20, "heads": 1 << 14, "head_dim": 1 << 14, "vocab": 1 << 26}
_MOST |= {"kv_heads": 1 << 14, "intermediate": 1 << 22, "experts": 1 << 16, "active": 1 << 16}
_MOST_PARAMETERS = 1e14
_MULTIPLE = 256  # that widths of MLPs are of, where they follow from the parameters
_OFF = 0.15  # of the parameters told, that the other sizes may differ from them


@dataclass(frozen=True)
class Matrix:
    """Weights ``[rows, columns]`` of one shape; ``count`` of them. Rows are output channels."""

    rows: int
    columns: int
    count: int
    part: Part

    @property
    def elements(self) -> int:
        """Of all of them."""
        return self.rows * self.columns * self.count


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a language model.

    Attributes:
        name: for people.
        layers, hidden, heads, kv_heads, head_dim, vocab, intermediate: as configurations have them.
        matrices: all weights of two axes.
        others: elements of norms, biases, convolutions and tables of positions.
        experts, active: of a mixture in a layer, and those that a token is sent to; both 1 without.
        cached_layers: that keep all of their keys and values.
        windowed_layers: that keep those of the last ``window`` tokens.
        positions: the longest sequence; None: no limit.
        source: where the sizes are from.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    intermediate: int
    matrices: tuple[Matrix, ...]
    others: int
    experts: int = 1
    active: int = 1
    cached_layers: int = 0
    windowed_layers: int = 0
    window: int = 0
    positions: int | None = None
    source: str = "as told"

    @property
    def parameters(self) -> int:
        """Of all weights."""
        return self.others + sum(matrix.elements for matrix in self.matrices)

    @property
    def multiplied(self) -> int:
        """Weights that a token is multiplied with: layers, the chosen experts alone, and the head."""
        dense = sum(m.elements for m in self.matrices if m.part not in ("experts", "table"))
        head = 0 if any(m.part == "head" for m in self.matrices) else self.vocab * self.hidden
        return dense + head + self.in_experts * self.active // self.experts

    @property
    def in_experts(self) -> int:
        """Elements of the experts of all layers."""
        return sum(matrix.elements for matrix in self.matrices if matrix.part == "experts")

    def widths(self) -> tuple[int, ...]:
        """Input channels of the layers that recipes quantize."""
        return tuple(sorted({m.columns for m in self.matrices if m.part in ("attention", "mlp", "experts")}))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        parts: Counter[str] = Counter()
        for matrix in self.matrices:
            parts[matrix.part] += matrix.elements
        names = ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "intermediate", "experts", "active")
        return {
            "name": self.name,
            "source": self.source,
            "parameters": self.parameters,
            "active_parameters": self.multiplied,
            "parts": {**parts, "others": self.others},
            "positions": self.positions,
            **{name: getattr(self, name) for name in names},
        }


def told_shape(
    *,
    params: float | None = None,
    layers: int | None = None,
    hidden: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    vocab: int | None = None,
    intermediate: int | None = None,
    experts: int = 1,
    active: int = 1,
    positions: int | None = None,
    tied: bool = False,
    name: str | None = None,
    source: str = "as told",
) -> ModelShape:
    """The sizes of a decoder of gated MLPs (gate, up and down), as Llama and most models since have it.

    Args:
        params: of all weights; where ``intermediate`` is not told, it follows from them.
        layers, hidden: needed.
        heads, kv_heads, head_dim: of attention; ``kv_heads`` is needed and one of the others, as ``heads * head_dim``
            is taken for ``hidden`` where one is missing.
        vocab: rows of the embedding; 32000 if it is not told.
        intermediate: width of the MLP, or of one expert.
        experts, active: of a mixture.
        positions: the longest sequence.
        tied: the head is the embedding.
        name, source: for people.

    Raises:
        InputError: for missing or absurd sizes, and for ``params`` that the others contradict.
    """
    needed = {"layers": layers, "hidden": hidden, "kv_heads": kv_heads}
    missing = [key for key, value in needed.items() if value is None]
    missing += [] if heads or head_dim else ["heads or head_dim"]
    missing += [] if params or intermediate else ["params or intermediate"]
    if missing:
        raise InputError(
            "sizes of the model are missing",
            got="no " + ", no ".join(missing),
            expected="a directory, or --layers, --hidden, --kv-heads, --head-dim (or --heads) and --params (or "
            "--intermediate)",
            remedy="config.json has them as num_hidden_layers, hidden_size, num_key_value_heads, num_attention_heads, "
            "intermediate_size",
        )
    assert layers is not None
    assert hidden is not None
    assert kv_heads is not None
    heads = heads if heads is not None else max(hidden // (head_dim or hidden), 1)
    head_dim = head_dim if head_dim is not None else max(hidden // heads, 1)
    vocab = 32000 if vocab is None else vocab
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    sizes |= {"vocab": vocab, "experts": experts, "active": active}
    _check(sizes, params)
    tables = vocab * hidden * (1 if tied else 2)
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    norms = hidden * (2 * layers + 1)
    if intermediate is None:
        assert params is not None
        left = params - tables - norms - layers * attention
        intermediate = _MULTIPLE * round(left / (3 * hidden * layers * experts) / _MULTIPLE)
        if intermediate < 1:
            raise InputError(
                "the parameters told are fewer than attention and tables alone have",
                where="params",
                got=f"{params:.4g}",
                expected=f"more than {params - left:.4g}, as the other sizes have it",
            )
    _check({"intermediate": intermediate}, None)
    part: Part = "experts" if experts > 1 else "mlp"
    matrices = [
        Matrix(heads * head_dim, hidden, layers, "attention"),
        Matrix(kv_heads * head_dim, hidden, 2 * layers, "attention"),
        Matrix(hidden, heads * head_dim, layers, "attention"),
        Matrix(intermediate, hidden, 2 * layers * experts, part),
        Matrix(hidden, intermediate, layers * experts, part),
        Matrix(vocab, hidden, 1, "table"),
    ]
    matrices += [] if tied else [Matrix(vocab, hidden, 1, "head")]
    matrices += [Matrix(experts, hidden, layers, "router")] if experts > 1 else []
    found = ModelShape(
        name=name or (f"{params / 1e9:g}B" if params else "model"),
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        intermediate=intermediate,
        matrices=tuple(matrices),
        others=norms,
        experts=experts,
        active=active,
        cached_layers=layers,
        positions=positions,
        source=source,
    )
    if params is not None and abs(found.parameters / params - 1) > _OFF:
        raise InputError(
            "the sizes of the model contradict each other",
            where="params",
            got=f"{params:.4g}",
            expected=f"{found.parameters:.4g}, which the other sizes come to",
            remedy="leave --params out, or --intermediate",
        )
    return found


def _check(sizes: Mapping[str, Any], params: float | None) -> None:
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST[key]:
            raise InputError("no size of a model", where=key, got=value, expected=f"from 1 to {_MOST[key]}")
    if params is not None and not (math.isfinite(params) and 1e3 <= params <= _MOST_PARAMETERS):
        raise InputError("no number of parameters", where="params", got=params, expected="such as 7e9 or 70B")
    if "heads" in sizes and sizes["heads"] % sizes["kv_heads"]:
        raise InputError(
            "heads of keys and values divide those of queries",
            where="kv_heads",
            got=f"{sizes['kv_heads']} of {sizes['heads']}",
        )
    if "active" in sizes and sizes["active"] > sizes["experts"]:
        raise InputError(
            "a token is sent to no more experts than there are",
            where="active",
            got=f"{sizes['active']} of {sizes['experts']}",
        )


def read_shape(directory: Path) -> ModelShape:
    """The sizes of a Hugging Face directory: real shapes by the headers of its weights; without weights, by its
    ``config.json`` alone, as a decoder of gated MLPs.

    Raises:
        InputError: without ``config.json``, or where that lacks a size; for a quantized checkpoint.
        WeightError: for damaged weights.
    """
    config = read_config(directory)
    if is_quantized_checkpoint(directory):
        raise InputError(
            "this checkpoint is quantized already", where=directory, expected="the directory of the original model"
        )
    if not any(directory.glob("model*.safetensors*")):
        return _declared_shape(directory, config)
    return _stored_shape(directory, config)


def _number(config: Mapping[str, Any], names: Iterable[str]) -> int | None:
    value = declared(config, *names)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _needed(directory: Path, config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    found = _number(config, names)
    if found is None:
        raise InputError(
            "config.json lacks a size of the model",
            where=directory / "config.json",
            got=f"no {' or '.join(names)} above 0",
            remedy="give the sizes instead: --layers, --hidden, --kv-heads, --head-dim, --params",
        )
    return found


def _declared_shape(directory: Path, config: dict[str, Any]) -> ModelShape:
    heads = _needed(directory, config, _HEADS)
    found = told_shape(
        layers=_needed(directory, config, _LAYERS),
        hidden=_needed(directory, config, _HIDDEN),
        heads=heads,
        kv_heads=_number(config, _KV_HEADS) or heads,
        head_dim=_number(config, ("head_dim",)),
        vocab=_needed(directory, config, ("vocab_size",)),
        intermediate=_needed(directory, config, ("moe_intermediate_size", *_INTERMEDIATE))
        if _number(config, _EXPERTS)
        else _needed(directory, config, _INTERMEDIATE),
        experts=_number(config, _EXPERTS) or 1,
        active=_number(config, _ACTIVE) or 1,
        positions=declared_positions(config),
        tied=bool(declared(config, "tie_word_embeddings")),
        name=directory.resolve().name,
        source="config.json, as a decoder of gated MLPs: there are no weights in the directory",
    )
    return _with_caches(found, config)


def _stored_shape(directory: Path, config: dict[str, Any]) -> ModelShape:
    """By the headers: tables have a row for each word, experts a number that runs to theirs, routers a row for each."""
    store = WeightStore.from_directory(directory)
    vocab, hidden = _needed(directory, config, ("vocab_size",)), _needed(directory, config, _HIDDEN)
    heads, experts = _needed(directory, config, _HEADS), _number(config, _EXPERTS) or 1
    positions = declared_positions(config)
    shapes = {name: tuple(store.info(name).shape) for name in store.names()}
    numbered = _numbered(shapes, experts)
    inner = {size for names in _INTERMEDIATE if (size := _number(config, (names,)))}
    inner |= {2 * size for size in inner}
    alike = Counter(shapes.values())
    counts: Counter[tuple[int, int, Part]] = Counter()
    others, tables = 0, 0
    is_tied = bool(declared(config, "tie_word_embeddings"))
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[0] == vocab:
            tables += 1
            if not (is_tied and tables > 1):  # stored twice, read once
                counts[shape[0], shape[1], "table" if tables == 1 else "head"] += 1
        elif len(shape) == 3 and experts > 1 and shape[0] == experts:
            counts[shape[1], shape[2], "experts"] += experts
        elif len(shape) != 2 or shape[0] == 1 or (shape[0] == positions and alike[shape] == 1):  # of positions
            others += math.prod(shape)
        elif experts > 1 and shape[0] == experts:
            counts[shape[0], shape[1], "router"] += 1
        else:
            part: Part = "experts" if name in numbered else "mlp" if inner.intersection(shape) else "attention"
            counts[shape[0], shape[1], part] += 1
    found = ModelShape(
        name=directory.resolve().name,
        layers=_needed(directory, config, _LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=_number(config, _KV_HEADS) or heads,
        head_dim=_number(config, ("head_dim",)) or max(hidden // heads, 1),
        vocab=vocab,
        intermediate=_number(config, _INTERMEDIATE) or 4 * hidden,
        matrices=tuple(Matrix(rows, columns, count, part) for (rows, columns, part), count in counts.items()),
        others=others,
        experts=experts,
        active=_number(config, _ACTIVE) or 1,
        cached_layers=_needed(directory, config, _LAYERS),
        positions=positions,
        source="the headers of its weights",
    )
    return _with_caches(found, config)


def _numbered(shapes: Mapping[str, tuple[int, ...]], experts: int) -> set[str]:
    """Matrices that differ in a number from 0 to that of the experts, behind the number of the layer."""
    together: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for name in shapes if experts > 1 else ():
        parts = re.split(r"\.(\d+)(?=\.)", name)
        if len(parts) >= 5:
            together.setdefault((*parts[:-2], parts[-1]), []).append((name, int(parts[-2])))
    runs = [found for found in together.values() if {number for _, number in found} == set(range(experts))]
    return {name for found in runs for name, _ in found}


def _with_caches(shape: ModelShape, config: Mapping[str, Any]) -> ModelShape:
    """With the layers that cache a window, or nothing; and one narrow head where a latent is cached (MLA)."""
    kinds, window = declared(config, "layer_types"), _number(config, ("sliding_window",)) or 0
    if isinstance(kinds, list) and len(kinds) == shape.layers:
        windowed = sum("sliding" in str(kind) or "chunked" in str(kind) for kind in kinds) if window else 0
        cached = sum("attention" in str(kind) and "linear" not in str(kind) for kind in kinds)
        shape = replace(shape, cached_layers=cached - windowed, windowed_layers=windowed, window=window)
    elif window and declared(config, "use_sliding_window") is not False:
        shape = replace(shape, cached_layers=0, windowed_layers=shape.layers, window=window)
    latent = _number(config, ("kv_lora_rank",))
    if latent is not None:
        rotary = _number(config, ("qk_rope_head_dim",)) or 0
        shape = replace(shape, kv_heads=1, head_dim=(latent + rotary) // 2)
    return shape
