"""Batches of a model's own inputs: tuples, mappings by name, or the arrays of an ``.npz`` file."""

import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompiler.errors import CalibrationError
from qcompiler.ir import Port, Signature

__all__ = ["GivenInputs", "fit_inputs", "made_inputs"]

_ROWS_AT_ONCE = 32  # samples of a file that run together
_SIZES = (2, 8, 5, 3)
"""What symbolic sizes are where inputs are made, in the order in which they appear; the first is usually the batch."""


@dataclass(frozen=True, eq=False)
class GivenInputs:
    """Inputs that meet the ports of a model in `batches`.

    Attributes:
        given: tuples in the order of the ports, or mappings by their names; for a file, its arrays by name, whose
            leading axis counts samples.
        is_stacked: whether ``given`` is the arrays of a file.
    """

    given: Sequence[Any] | Mapping[str, Tensor]
    is_stacked: bool = False

    @classmethod
    def of(cls, inputs: "GivenInputs | str | Path | Iterable[Any]") -> "GivenInputs":
        """Reads what users give.

        Args:
            inputs: the path of an ``.npz`` file, or batches: tuples of tensors, or mappings from names to tensors.

        Raises:
            CalibrationError: for a file that cannot be read, or no batches.
        """
        if isinstance(inputs, GivenInputs):
            return inputs
        if isinstance(inputs, (str, Path)):
            return cls(_read_arrays(Path(inputs)), is_stacked=True)
        if isinstance(inputs, (Mapping, Tensor)):
            raise CalibrationError(
                "inputs are given in batches", got=type(inputs).__name__, expected="an iterable of tuples or mappings"
            )
        return cls(tuple(inputs))

    def batches(self, signature: Signature) -> Iterator[list[Tensor]]:
        """One tensor per port for each batch.

        Samples of a file run 32 at a time, or as many as the ports' leading size tells; what is left is a last, smaller
        batch, where that size varies.

        Raises:
            CalibrationError: for what does not fit the ports.
        """
        if not isinstance(self.given, Mapping):
            for index, batch in enumerate(self.given):
                yield fit_inputs(signature, batch, f"calibration[{index}]")
            return
        arrays = dict(zip((port.name for port in signature.inputs), _by_port(signature, self.given, ""), strict=True))
        samples = {len(array) for array in arrays.values()}
        fixed = {port.shape[0] for port in signature.inputs if port.shape and isinstance(port.shape[0], int)}
        rows = int(min(fixed)) if fixed else _ROWS_AT_ONCE
        if len(samples) != 1 or 0 in samples or (fixed and next(iter(samples)) % rows):
            raise CalibrationError(
                "arrays of samples do not fit together",
                got=", ".join(f"{len(array)} in {name}" for name, array in arrays.items()),
                expected=f"as many in each, a multiple of {rows}" if fixed else "as many in each, at least one",
            )
        for at in range(0, samples.pop(), rows):
            batch = {name: array[at : at + rows] for name, array in arrays.items()}
            yield fit_inputs(signature, batch, f"samples from {at}")


def fit_inputs(signature: Signature, batch: object, where: str) -> list[Tensor]:
    """One tensor per port, in their order, each of which fits it.

    Args:
        signature: the ports.
        batch: a tuple of tensors in the order of the ports, or a mapping from their names to tensors.
        where: what to name in an error.

    Raises:
        CalibrationError: for too few or too many tensors, unknown names, other shapes or kinds of dtypes, one symbolic
            size with two values, or values that are not finite.
    """
    tensors = _by_port(signature, batch, where)
    sizes: dict[str, int] = {}
    for port, tensor in zip(signature.inputs, tensors, strict=True):
        at = f"{where}: {port.name}"
        fits = len(port.shape) == tensor.dim() and all(
            size == (dim if isinstance(dim, int) else sizes.setdefault(dim, size))
            for dim, size in zip(port.shape, tensor.shape, strict=True)
        )
        if not fits or tensor.is_floating_point() is not _dtype(port).is_floating_point:
            known = {name: size for name, size in sizes.items() if name in port.shape}
            raise CalibrationError(
                "a batch does not fit the module",
                where=at,
                got=f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}",
                expected=f"{port.dtype} {list(port.shape)}" + (f" with {known}" if known else ""),
            )
        if not tensor.isfinite().all():
            raise CalibrationError("a calibration input is not finite", where=at)
    return tensors


def made_inputs(signature: Signature) -> list[Tensor]:
    """Random inputs for a model nobody gave any for: normal, or 0 and 1 where a port takes whole numbers.

    Raises:
        CalibrationError: where a size is no symbol of its own, so that nobody knows it.
    """
    sizes: dict[str, int] = {}
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for port in signature.inputs:
        shape = []
        for dim in port.shape:
            if isinstance(dim, str) and not dim.isidentifier():
                raise CalibrationError(
                    "inputs cannot be made for this model", where=port.name, got=dim, remedy="give inputs"
                )
            if isinstance(dim, str):
                dim = sizes.setdefault(dim, _SIZES[len(sizes) % len(_SIZES)])
            shape.append(dim)
        dtype = _dtype(port)
        made = torch.randn(shape, generator=generator)
        tensors.append(made.to(dtype) if dtype.is_floating_point else (made > 0).to(dtype))
    return tensors


def _by_port(signature: Signature, batch: object, where: str) -> list[Tensor]:
    names = [port.name for port in signature.inputs]
    values: Sequence[object] = ()
    if isinstance(batch, Mapping):
        if set(batch) != set(names):
            raise CalibrationError(
                "a batch does not match the model's inputs",
                where=where or None,
                got=", ".join(map(str, batch)) or "nothing",
                expected=", ".join(names),
                remedy="name the arrays after the model's inputs",
            )
        values = [batch[name] for name in names]
    elif isinstance(batch, (tuple, list)):
        values = batch
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise CalibrationError(
            "a batch of a module is a tuple of tensors, or a mapping of them by name",
            where=where or None,
            got=type(batch).__name__,
            expected="(x,)",
        )
    if len(values) != len(names):
        raise CalibrationError(
            "a batch does not match the model's inputs",
            where=where or None,
            got=f"{len(values)} tensors",
            expected=", ".join(names),
        )
    return [value for value in values if isinstance(value, Tensor)]


def _read_arrays(path: Path) -> dict[str, Tensor]:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            arrays = {name: archive[name] for name in archive.files}
        return {name: torch.from_numpy(np.atleast_1d(array)) for name, array in arrays.items()}
    except (OSError, ValueError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise CalibrationError(
            "this file of inputs cannot be read",
            where=path,
            got=error,
            expected="an .npz file of numbers, an array for each input of the model",
        ) from error


def _dtype(port: Port) -> torch.dtype:
    found: torch.dtype = getattr(torch, port.dtype)
    return found
