"""A tiny language model on disk, with the shipped tokenizer, a text for it, and the command run in this process."""

import contextlib
import functools
import io
import json
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompiler import cli
from tests.models import build

POSITIONS = 64
_TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "booklm"
_WORDS = [
    "the",
    "sea",
    "ship",
    "captain",
    "said",
    "under",
    "night",
    "of",
    "cold",
    "stone",
    "he",
    "she",
    "window",
    "light",
]


def save_checkpoint(directory: Path, *, layers: int = 2, **saving: Any) -> Path:
    """Writes a random Llama in bfloat16 (vocabulary 4096, hidden 64, 64 positions) and the shipped tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in _files(layers, tuple(sorted(saving.items()))).items():
        (directory / name).write_bytes(content)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_TOKENIZER / name, directory / name)
    return directory


@functools.cache
def _files(layers: int, saving: tuple[tuple[str, Any], ...]) -> dict[str, bytes]:
    """What is written of that model; made once per process."""
    sizes = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": POSITIONS}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model: Any = build("llama", layers=layers, **sizes, **ids)
    model.to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place, **dict(saving))
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


def write_text(path: Path, words: int = 2000, seed: int = 0) -> Path:
    """A text of so many words, at least a token each."""
    path.write_text(" ".join(random.Random(seed).choices(_WORDS, k=words)) + "\n", encoding="utf-8")
    return path


@dataclass(frozen=True)
class Outcome:
    """What the command did."""

    status: int
    output: str
    errors: str

    @property
    def fields(self) -> dict[str, Any]:
        """The one JSON object on stdout; anything else there is a failure."""
        assert self.output.count("\n") == 1, self.output
        found: dict[str, Any] = json.loads(self.output)
        return found

    @property
    def result(self) -> dict[str, Any]:
        """What a command that went well found."""
        assert self.status == 0, self.errors
        assert self.fields["ok"] is True
        assert "error" not in self.fields
        found: dict[str, Any] = self.fields["result"]
        return found

    @property
    def error(self) -> dict[str, str]:
        """The typed error of a command that failed, None as an empty string."""
        assert self.fields["ok"] is False
        assert "result" not in self.fields
        error = self.fields["error"]
        assert list(error) == ["type", "what", "where", "got", "expected", "remedy", "artifacts", "next_command"]
        return {key: value or "" for key, value in error.items() if key != "artifacts"}


def command(*arguments: object) -> Outcome:
    """Runs ``qcompiler`` with these arguments."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = cli.main([str(argument) for argument in arguments])
    return Outcome(status, output.getvalue(), errors.getvalue())


def file_bytes(directory: Path) -> dict[str, bytes]:
    """Every file under a directory by its path in it."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
