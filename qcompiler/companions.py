"""The files that travel with a model: its tokenizer, its configuration, its generation settings."""

from pathlib import Path

from qcompiler.errors import InputError

__all__ = ["companion_files", "read_companions"]

_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)


def companion_files(directory: Path | None) -> dict[str, Path]:
    """The companions found in a directory, by name."""
    if directory is None:
        return {}
    return {name: directory / name for name in _NAMES if (directory / name).is_file()}


def read_companions(directory: Path | None) -> dict[str, bytes]:
    """What the companions found in a directory hold, by name.

    Raises:
        InputError: if one cannot be read.
    """
    found = {}
    for name, path in companion_files(directory).items():
        try:
            found[name] = path.read_bytes()
        except OSError as error:
            raise InputError(
                "a file that belongs to the model cannot be read", where=path, got=error.strerror
            ) from error
    return found
