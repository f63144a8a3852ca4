"""The engines, and how one is run: a request, a child process, and what it wrote."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qcompiler.errors import InputError, MissingDependencyError, VerificationError

__all__ = ["ENGINES", "Engine", "Reading", "read"]


@dataclass(frozen=True)
class Engine:
    """Somebody's program that reads checkpoints.

    Attributes:
        name: as users call it.
        script: that runs it, beside this file.
        module: what its environment has.
        package: what ``pip`` installs it by.
        input_block: channels that share a scale of 8 bits where the engine rounds the inputs of all products; None
            where it does not.
    """

    name: str
    script: str
    module: str
    package: str
    input_block: int | None = None


ENGINES = (
    Engine("transformers", "run_transformers.py", "transformers", "transformers"),
    Engine("vllm", "run_vllm.py", "vllm", "vllm"),
    Engine("llama.cpp", "run_llama_cpp.py", "xllamacpp", "xllamacpp", input_block=32),
    Engine("gptqmodel", "run_transformers.py", "gptqmodel", "gptqmodel"),
)


@dataclass(frozen=True)
class Reading:
    """What an engine made of rows of tokens; an artifact that knows these tokens alone.

    Attributes:
        path: the checkpoint.
        ids: int64 ``[rows, length]``.
        first: tokens that were given at once.
        whole: float32 ``[rows, length, vocab]``, log-probabilities behind each token.
        decoded: float32 ``[rows, length - first + 1, vocab]``, those from the ``first`` on, through the cache.
        dtype: the engine computed in.
        version: of the engine.
    """

    path: Path
    ids: Tensor
    first: int
    whole: Tensor
    decoded: Tensor
    dtype: torch.dtype
    version: str

    @property
    def vocab_size(self) -> int:
        """Of the log-probabilities."""
        return self.whole.shape[-1]

    @property
    def max_positions(self) -> int | None:
        """As many as there are."""
        return self.ids.shape[1]

    @property
    def has_cache(self) -> bool:
        """It was read through one."""
        return True

    @property
    def provenance(self) -> Mapping[str, object]:
        """Nothing but the engine's version."""
        return {"engine": self.version}

    def forward(self, ids: Tensor) -> Tensor:
        """Log-probabilities behind each of the tokens."""
        self._expect(ids, 0)
        return self.whole

    def prefill(self, ids: Tensor) -> tuple[Tensor, object]:
        """Of the first tokens; the last of them as the engine decodes with what it has cached of the others."""
        self._expect(ids, 0)
        return torch.cat([self.whole[:, : self.first - 1], self.decoded[:, :1]], dim=1), self.first

    def step(self, ids: Tensor, cache: object) -> tuple[Tensor, object]:
        """Of the tokens behind those."""
        assert isinstance(cache, int)
        self._expect(ids, cache)
        end = cache + ids.shape[1]
        return self.decoded[:, cache + 1 - self.first : end + 1 - self.first], end

    def _expect(self, ids: Tensor, start: int) -> None:
        if not torch.equal(ids, self.ids[:, start : start + ids.shape[1]]):
            raise ValueError("the engine did not read these tokens")

    def stored_bytes(self) -> int:
        """Of all files with tensors."""
        return sum(path.stat().st_size for kind in ("*.safetensors", "*.gguf") for path in self.path.glob(kind))

    def bits_per_weight(self) -> float:
        """Not known: nobody counted the weights."""
        return float("nan")


def read(
    engine: Engine,
    directory: Path,
    ids: Tensor,
    first: int,
    vocab: int,
    *,
    python: Path | None = None,
    timeout: float = 3600,
) -> Reading:
    """Lets an engine read a checkpoint, in a process of its own.

    Args:
        engine: one of `ENGINES`.
        directory: the checkpoint.
        ids: int64 ``[rows, length]``.
        first: tokens of each row that are given at once; the others are decoded one by one.
        vocab: how many ids there are.
        python: the interpreter of an environment that has the engine; by default this one.
        timeout: seconds.

    Raises:
        MissingDependencyError: if that interpreter has no such engine.
        InputError: if there is no such interpreter.
        VerificationError: if the engine does not load the checkpoint, in its own words, or takes too long.
    """
    interpreter = _interpreter(engine, python)
    with tempfile.TemporaryDirectory(prefix="qcompiler-read-") as scratch:
        request, out = Path(scratch) / "request.json", Path(scratch) / "out.npz"
        fields = {"engine": engine.name, "directory": str(directory.resolve()), "rows": ids.tolist()}
        request.write_text(json.dumps({**fields, "first": first, "vocab": vocab}), encoding="utf-8")
        _run(
            [interpreter, str(Path(__file__).parent / engine.script), str(request), str(out)],
            engine,
            directory,
            timeout,
        )
        try:
            with np.load(out) as found:
                whole, decoded = (torch.from_numpy(found[name].astype(np.float32)) for name in ("whole", "decoded"))
                dtype, version = str(found["dtype"]), str(found["version"])
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise VerificationError(
                "the engine ended without an answer", where=engine.name, got=error, remedy="try again with more memory"
            ) from error
    return Reading(directory, ids, first, whole, decoded, getattr(torch, dtype), version)


def _interpreter(engine: Engine, python: Path | None) -> str:
    remedy = f"pip install {engine.package}, or name the Python of an environment that has it: --python PATH"
    if python is None:
        if importlib.util.find_spec(engine.module) is None:
            raise MissingDependencyError(
                f"{engine.name} is not installed here",
                where=sys.executable,
                got=f"no module {engine.module}",
                remedy=remedy,
            )
        return sys.executable
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({engine.module!r}) is None and 7)"
    try:
        status = subprocess.run(
            [str(python), "-c", code], capture_output=True, check=False, env=_environment()
        ).returncode
    except OSError as error:
        raise InputError("this Python cannot be run", where=python, got=error.strerror, remedy=remedy) from error
    if status == 7:
        raise MissingDependencyError(
            f"{engine.name} is not installed there", where=python, got=f"no module {engine.module}", remedy=remedy
        )
    if status != 0:
        raise InputError("this is no Python that runs", where=python, got=f"exit status {status}", remedy=remedy)
    return str(python)


def _environment() -> dict[str, str]:
    """Ours without what points Python at our own packages; nothing is downloaded."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _run(command: list[str], engine: Engine, directory: Path, timeout: float) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=timeout, env=_environment()
        )
    except subprocess.TimeoutExpired as error:
        raise VerificationError(
            f"{engine.name} did not end in time", where=directory, got=f"{timeout:.0f} seconds", remedy="give more time"
        ) from error
    if done.returncode != 0:
        raise VerificationError(
            f"{engine.name} does not read this checkpoint",
            where=directory,
            got=_last_words(done.stderr + done.stdout) or f"exit status {done.returncode}",
            expected="a checkpoint that it loads and runs on this machine",
            remedy="choose a scheme or layout that it has kernels for here, or verify where it has them",
        )


def _last_words(text: str) -> str | None:
    """The last line that tells of an error, and the indented one behind it, where some programs say which."""
    lines = text.splitlines()
    place = next((i for i in reversed(range(len(lines))) if "Error" in lines[i] or "error:" in lines[i]), None)
    if place is None:
        return None
    more = [line.strip() for line in lines[place + 1 : place + 2] if line[:1].isspace()]
    return " ".join([lines[place].strip(), *more])[:400]
