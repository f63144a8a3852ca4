"""Checkpoints unpacked number by number, as the libraries describe their layouts; nothing here is the project's."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint; each name occurs once."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safetensors.safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                assert name not in found
                found[name] = file.get_tensor(name)
    return found


def read_config(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def codes_of_words(words: Tensor, bits: int, count: int) -> list[int]:
    """Unsigned codes of a row of int32 words, the first in the lowest bits."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return [(stream >> (bits * place)) & ((1 << bits) - 1) for place in range(count)]


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def fp4(nibble: int) -> float:
    return -GRID[nibble & 7] if nibble & 8 else GRID[nibble & 7]


def scaled(numbers: Any, scales: Any) -> np.ndarray:
    """Products in float32; scales are broadcast over equal parts of rows and columns."""
    values = np.asarray(numbers, np.float32)
    factors = np.asarray(scales, np.float32)
    out = np.empty_like(values)
    height, width = -(-values.shape[0] // factors.shape[0]), -(-values.shape[1] // factors.shape[1])
    for row in range(values.shape[0]):
        for column in range(values.shape[1]):
            out[row, column] = values[row, column] * factors[row // height, column // width]
    return out


def numbers(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.float().numpy()
    return found


def e4m3_matrix(tensor: Tensor) -> np.ndarray:
    return np.array([[e4m3(int(byte)) for byte in row] for row in tensor.view(torch.uint8)], np.float32)


def fp4_matrix(packed: Tensor) -> np.ndarray:
    """``[out, in / 2]`` bytes, the even column in the low nibble."""
    return np.array([[fp4(part) for b in row.tolist() for part in (b & 15, b >> 4)] for row in packed], np.float32)


def packed_integers(tensors: dict[str, Tensor], name: str, bits: int) -> np.ndarray:
    """compressed-tensors ``pack-quantized``: codes lie ``2^(bits-1)`` above what they mean."""
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    scale, zero = tensors[f"{name}.weight_scale"], tensors.get(f"{name}.weight_zero_point")
    middle, groups = 1 << (bits - 1), scale.shape[1]
    values = np.array([codes_of_words(row, bits, columns) for row in tensors[f"{name}.weight_packed"]]) - middle
    if zero is not None:
        zeros = np.array([codes_of_words(zero[:, group], bits, rows) for group in range(groups)]).T - middle
        values = values - zeros.repeat(columns // groups, axis=1)
    return scaled(values, numbers(scale))


def gptq(tensors: dict[str, Tensor], name: str, bits: int) -> np.ndarray:
    """Packed along the input channels; zero points are stored less one, packed along the output channels."""
    words, scales = tensors[f"{name}.qweight"], numbers(tensors[f"{name}.scales"])
    columns, rows = words.shape[0] * 32 // bits, words.shape[1]
    zeros = [codes_of_words(row, bits, rows) for row in tensors[f"{name}.qzeros"]]
    place = tensors[f"{name}.g_idx"].tolist()
    out = np.empty((rows, columns), np.float32)
    for row in range(rows):
        for column, code in enumerate(codes_of_words(words[:, row], bits, columns)):
            group = place[column]
            out[row, column] = np.float32(code - zeros[group][row] - 1) * scales[group, row]
    return out


def awq(tensors: dict[str, Tensor], name: str) -> np.ndarray:
    """Packed along the output channels: nibble ``i`` of word ``j`` is channel ``8 j + ORDER[i]``."""

    def rows_of(words: Tensor) -> np.ndarray:
        found = np.empty((words.shape[0], words.shape[1] * 8), np.int64)
        for line, row in enumerate(words):
            for word in range(words.shape[1]):
                for nibble, channel in enumerate(AWQ_ORDER):
                    found[line, 8 * word + channel] = (int(row[word]) & 0xFFFFFFFF) >> (4 * nibble) & 15
        return found

    codes, zeros = rows_of(tensors[f"{name}.qweight"]), rows_of(tensors[f"{name}.qzeros"])
    group = codes.shape[0] // zeros.shape[0]
    differences = codes - zeros.repeat(group, axis=0)
    return scaled(differences, numbers(tensors[f"{name}.scales"])).T
