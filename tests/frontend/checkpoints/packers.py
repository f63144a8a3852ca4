"""Quantized checkpoints written from the descriptions of their formats, in plain loops: nothing of ours packs a bit."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_checkpoint import save_checkpoint

Codes = NDArray[np.int64]
Floats = NDArray[np.float32]

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Weight:
    """A quantized weight: what stands in a checkpoint, and the numbers it means.

    Attributes:
        tensors: by their names behind the module's path.
        values: float32 ``[out, in]``.
    """

    tensors: dict[str, Tensor]
    values: Floats


Make = Callable[[str, int, int, np.random.Generator], Weight | None]


@dataclass(frozen=True)
class Pair:
    """A quantized checkpoint, and the float model of the same numbers."""

    quantized: Path
    floats: Path


def write_pair(place: Path, make: Make, settings: Mapping[str, Any], *, layers: int = 1) -> Pair:
    """Writes a tiny Llama whose linear layers are ``make(name, rows, columns, generator)``; None leaves one alone."""
    save_checkpoint(place / "quantized", layers=layers)
    return rewrite_pair(place, make, settings)


def rewrite_pair(place: Path, make: Make, settings: Mapping[str, Any]) -> Pair:
    """The same of a float model that lies in ``quantized``."""
    pair = Pair(place / "quantized", place / "floats")
    shutil.copytree(pair.quantized, pair.floats)
    tensors = load_file(pair.quantized / "model.safetensors")
    packed, floats = dict(tensors), dict(tensors)
    for index, name in enumerate(sorted(tensors)):
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            continue
        rows, columns = tensors[name].shape
        weight = make(module, rows, columns, np.random.default_rng(index))
        if weight is not None:
            del packed[name]
            packed |= {f"{module}.{part}": tensor.contiguous() for part, tensor in weight.tensors.items()}
            floats[name] = torch.from_numpy(weight.values)
    save_file(packed, pair.quantized / "model.safetensors", metadata={"format": "pt"})
    save_file(floats, pair.floats / "model.safetensors", metadata={"format": "pt"})
    edit_config(pair.quantized, quantization_config=dict(settings))
    return pair


def edit_config(directory: Path, **fields: Any) -> None:
    """Changes fields of a ``config.json``."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def edit_settings(directory: Path, **fields: Any) -> None:
    """Changes fields of the quantization settings."""
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_config(directory, quantization_config={**settings, **fields})


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Lets ``change`` work on the stored tensors by name."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def to_words(values: Codes, bits: int) -> Tensor:
    """Unsigned numbers ``[rows, n]`` as a stream of bits in int32 words ``[rows, ceil(n * bits / 32)]``."""
    count = -(-values.shape[1] * bits // 32)
    words = np.zeros((len(values), count), dtype=np.uint32)
    for row, line in enumerate(values.tolist()):
        stream = 0
        for place, value in enumerate(line):
            assert 0 <= value < 1 << bits
            stream |= value << (place * bits)
        for place in range(count):
            words[row, place] = (stream >> (32 * place)) & 0xFFFFFFFF
    return torch.from_numpy(words.view(np.int32))


def awq_words(values: Codes) -> Tensor:
    """Numbers ``[n, out]`` of four bits as AWQ packs them: ``[n, out / 8]``."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
    for row in range(values.shape[0]):
        for word in range(words.shape[1]):
            for nibble, column in enumerate(_AWQ_ORDER):
                words[row, word] |= np.uint32(int(values[row, 8 * word + column]) << (4 * nibble))
    return torch.from_numpy(words.view(np.int32))


def some_scales(generator: np.random.Generator, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Positive scales of the size that weights of a small model have."""
    return torch.from_numpy(generator.uniform(0.004, 0.02, shape)).to(dtype)


def expand(per_group: Any, group: int, columns: int) -> Any:
    """``[rows, groups]`` to ``[rows, columns]``."""
    return np.repeat(np.asarray(per_group), group, axis=1)[:, :columns]


def gptq_weight(
    rows: int,
    columns: int,
    generator: np.random.Generator,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    version: int = 1,
    g_idx: Codes | None = None,
) -> Weight:
    """A layer of GPTQ; ``g_idx`` by default groups of neighbours, as ``group`` -1 is one group."""
    group = columns if group == -1 else group
    places = np.arange(columns) // group if g_idx is None else g_idx
    groups = int(places.max()) + 1
    codes = generator.integers(0, 1 << bits, (rows, columns))
    if symmetric:
        zeros = np.full((rows, groups), 1 << (bits - 1))
    else:
        zeros = generator.integers(version == 1, 1 << bits, (rows, groups))
    scales = some_scales(generator, rows, groups) * (16 / (1 << bits))
    tensors = {
        "qweight": to_words(codes, bits).T,
        "qzeros": to_words((zeros - (version == 1)).T, bits),
        "scales": scales.T,
        "g_idx": torch.from_numpy(places.astype(np.int32)),
    }
    values = (codes - zeros[:, places]) * scales.float().numpy()[:, places]
    return Weight(tensors, values.astype(np.float32))


def awq_weight(
    rows: int, columns: int, generator: np.random.Generator, *, group: int = 32, symmetric: bool = False
) -> Weight:
    """A layer of AWQ."""
    group = columns if group == -1 else group
    groups = columns // group
    codes = generator.integers(0, 16, (rows, columns))
    zeros = np.full((rows, groups), 8) if symmetric else generator.integers(0, 16, (rows, groups))
    scales = some_scales(generator, rows, groups)
    tensors = {"qweight": awq_words(codes.T), "qzeros": awq_words(zeros.T), "scales": scales.T}
    values = (codes - expand(zeros, group, columns)) * expand(scales.float().numpy(), group, columns)
    return Weight(tensors, values.astype(np.float32))


def packed_weight(
    rows: int,
    columns: int,
    generator: np.random.Generator,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Weight:
    """A layer of compressed-tensors, ``pack-quantized``."""
    group, low = columns if group == -1 else group, -(1 << (bits - 1))
    groups = columns // group
    codes = generator.integers(low, -low, (rows, columns))
    scales = some_scales(generator, rows, groups, dtype=dtype) * (16 / (1 << bits))
    tensors = {
        "weight_packed": to_words(codes - low, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor([rows, columns]),
    }
    values = codes.astype(np.float32)
    if not symmetric:
        zeros = generator.integers(low, -low, (rows, groups))
        tensors["weight_zero_point"] = to_words((zeros - low).T, bits).T
        values = values - expand(zeros, group, columns)
    return Weight(tensors, (values * expand(scales.float().numpy(), group, columns)).astype(np.float32))


def plain_weight(
    rows: int, columns: int, generator: np.random.Generator, *, kind: str = "int8", strategy: str = "channel"
) -> Weight:
    """A layer of compressed-tensors whose codes are stored as they are: ``int-quantized`` or ``float-quantized``."""
    sides = {"tensor": (rows, columns), "channel": (1, columns), "block": (32, 32)}[strategy]
    shape = -(-rows // sides[0]), -(-columns // sides[1])
    if kind == "int8":
        codes = torch.from_numpy(generator.integers(-128, 128, (rows, columns)).astype(np.int8))
        size = 1 / 8
    else:
        codes = torch.from_numpy(generator.normal(0, 100, (rows, columns))).to(torch.float8_e4m3fn)
        size = 1 / 16
    scales = some_scales(generator, *shape, dtype=torch.float32) * size
    values = np.zeros((rows, columns), dtype=np.float32)
    for row in range(rows):
        for column in range(columns):
            values[row, column] = float(codes[row, column]) * float(scales[row // sides[0], column // sides[1]])
    stored = scales.reshape(1) if strategy == "tensor" else scales
    return Weight({"weight": codes, "weight_scale": stored}, values)


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def fp4_weight(rows: int, columns: int, generator: np.random.Generator, *, nv: bool) -> Weight:
    """A layer of compressed-tensors in 4-bit floats: ``nvfp4-pack-quantized`` or ``mxfp4-pack-quantized``."""
    group = 16 if nv else 32
    codes = generator.integers(0, 16, (rows, columns))
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    numbers = np.array([*_E2M1, *(-value for value in _E2M1)])[codes]
    tensors = {"weight_packed": torch.from_numpy(packed)}
    sizes: Any
    if nv:
        scales = torch.from_numpy(generator.uniform(16, 448, (rows, columns // group))).to(torch.float8_e4m3fn)
        tensors |= {"weight_scale": scales, "weight_global_scale": torch.tensor([20000.0])}
        sizes = scales.double().numpy() / 20000
    else:
        exponents = generator.integers(118, 122, (rows, columns // group)).astype(np.uint8)
        tensors |= {"weight_scale": torch.from_numpy(exponents)}
        sizes = 2.0 ** (exponents.astype(np.int64) - 127)
    return Weight(tensors, (numbers * expand(sizes, group, columns)).astype(np.float32))


def mxfp8_weight(rows: int, columns: int, generator: np.random.Generator) -> Weight:
    """E4M3 in groups of 32 with a power of two each, as compressed-tensors and ModelOpt have it."""
    codes = torch.from_numpy(generator.normal(0, 100, (rows, columns))).to(torch.float8_e4m3fn)
    exponents = generator.integers(113, 118, (rows, columns // 32))
    values = codes.float().numpy() * expand(2.0 ** (exponents - 127), 32, columns)
    tensors = {"weight": codes, "weight_scale": torch.from_numpy(exponents.astype(np.uint8))}
    return Weight(tensors, values.astype(np.float32))


def ct_settings(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    """What ``config.json`` says of one group of all linear layers but the head."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {"group_0": {**group, "format": layout}},
    }
