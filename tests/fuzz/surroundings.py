"""Where the command is run on input that nobody would write, and the one check of what it may do there."""

import contextlib
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.models import build
from tests.tiny_checkpoint import Outcome, command, write_text

__all__ = ["Surroundings", "save_original", "surroundings"]

_SHIPPED = Path(__file__).resolve().parent.parent.parent / "examples" / "booklm"
_SPARE_BYTES = 4 << 30  # what asks for more memory is to be refused, not tried


def save_original(root: Path) -> Path:
    """Writes ``model``, a Llama of one layer (hidden 32, 32 positions) with the shipped tokenizer, and ``text.txt``."""
    sizes = {"vocab_size": 4096, "intermediate_size": 32, "max_position_embeddings": 32}
    model: Any = build("llama", layers=1, **sizes, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.to(torch.bfloat16).save_pretrained(root / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(_SHIPPED / name, root / "model" / name)
    write_text(root / "text.txt", 200)
    return root


@dataclass(frozen=True)
class Surroundings:
    """A directory with all that the command could spoil.

    Attributes:
        root: holds the rest. ``model`` and ``text`` are copies of the original's, for an example to damage; ``output``
            is where it may write; ``temporary`` is ``TMPDIR``; the working directory is ``root``, too.
    """

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def text(self) -> Path:
        return self.root / "text.txt"

    @property
    def output(self) -> Path:
        return self.root / "out"

    @property
    def temporary(self) -> Path:
        return self.root / "temporary"

    def run(self, *arguments: object) -> Outcome:
        """Runs the command and checks what it may do, whatever it is given.

        It ends with a status of its own and without a traceback; with ``--json``, one object tells which. Only the
        output changes, and only if all went well; all else is as before, byte for byte.
        """
        before = _tree(self.root)
        with _little_memory():
            outcome = command(*arguments)
        told = f"{arguments}\n{outcome.output}\n{outcome.errors}"
        assert outcome.status in (0, 2, 3, 130), told
        assert "Traceback" not in outcome.errors, told
        if "--json" in arguments:
            fields = outcome.fields
            assert fields["ok"] is (outcome.status == 0), told
            if outcome.status:
                assert outcome.error["type"], told
                assert outcome.error["what"], told
        elif outcome.status:
            assert outcome.errors.strip(), told
        after = _tree(self.root)
        if outcome.status == 0:
            before, after = _without(before, "out"), _without(after, "out")
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        assert not changed, f"{changed}\n{told}"
        return outcome

    def compile(self, *arguments: object, recipe: object = "w8a16") -> Outcome:
        """Runs ``qcompiler compile`` on the model."""
        outcome = self.run("compile", self.model, "-r", recipe, "-o", self.output, "--json", *arguments)
        if outcome.status == 0:
            assert (self.output / "native" / "manifest.json").is_file()
        return outcome


@contextlib.contextmanager
def surroundings(original: Path) -> Iterator[Surroundings]:
    """Surroundings of one example, taken away behind it.

    Args:
        original: what `save_original` wrote.
    """
    with tempfile.TemporaryDirectory(dir=original, prefix="example-") as name:
        root, before = Path(name), Path.cwd()
        shutil.copytree(original / "model", root / "model")
        shutil.copy(original / "text.txt", root / "text.txt")
        (root / "temporary").mkdir()
        (root / "sibling").mkdir()
        (root / "sibling" / "kept.txt").write_text("not to be touched")
        os.chdir(root)
        try:
            with mock.patch.object(tempfile, "tempdir", str(root / "temporary")):
                yield Surroundings(root)
        finally:
            os.chdir(before)


def _tree(root: Path) -> dict[str, object]:
    """Kind, mode and content of everything below a directory, by its path in it."""
    found: dict[str, object] = {}
    for path in root.rglob("*"):
        status = path.lstat()
        content: object = None
        if stat.S_ISLNK(status.st_mode):
            content = path.readlink()
        elif stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK):
            content = path.read_bytes()
        found[str(path.relative_to(root))] = (status.st_mode, content)
    return found


def _without(tree: dict[str, object], top: str) -> dict[str, object]:
    return {path: content for path, content in tree.items() if Path(path).parts[0] != top}


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """A limit on what this process may have besides what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _SPARE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
