"""The files that travel with a model: its tokenizer, its configuration, its generation settings, its license.

Tokenizers have files of their own: vocabularies in many formats, and code. What travels is found by its name,
as what the tokenizer's class declares, and as what another such file names.
"""

import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError

__all__ = ["SOURCE_ONLY", "companion_files", "left_behind", "read_companions"]

SOURCE_ONLY = ("quantization_config", "transformers_weights")
"""Fields of a ``config.json`` that speak of the weights beside it, and are untrue beside others."""

_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*.json",
    "vocab*.txt",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
    "*.model",
    "*.spm",
    "*.vocab",
    "chat_template*.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "chat_templates/*.jinja",
    "*processor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
_WEIGHTS = (  # what is compiled, and the same in other formats
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.onnx*",
    "*.ot",
    "*.mlmodel",
)
_NOT_WEIGHTS = ("adapter_*",)  # an adapter would change what the model computes
_DOCUMENTS = (".*", "*.md", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.pdf")
_LARGEST_NAMING_FILE = 1 << 20  # bytes; a vocabulary names no files


def companion_files(directory: Path | None) -> dict[str, Path]:
    """The companions found in a directory, by their path in it (``/`` between the parts)."""
    if directory is None or not directory.is_dir():
        return {}
    there = {name: path for name, path in _files(directory).items() if not _is_any(name, (*_WEIGHTS, *_NOT_WEIGHTS))}
    found = [name for name in there if _is_any(name, _NAMES)]
    found += [name for name in _declared_by_class(there.get("tokenizer_config.json")) if name in there]
    for name in found:  # grows while it is gone through
        found += [other for other in _named_in(there[name]) if other in there and other not in found]
    return {name: there[name] for name in sorted(set(found))}


def read_companions(directory: Path | None) -> dict[str, bytes]:
    """The contents of the companions, by path; ``config.json`` without what it says of the source's weights.

    Raises:
        InputError: if one cannot be read.
    """
    contents = {}
    for name, path in companion_files(directory).items():
        try:
            contents[name] = path.read_bytes()
        except OSError as error:
            raise InputError(
                "a file that belongs to the model cannot be read", where=path, got=error.strerror
            ) from error
    if "config.json" in contents:
        config = _json_object(contents["config.json"])
        if any(key in config for key in SOURCE_ONLY):
            plain = {key: value for key, value in config.items() if key not in SOURCE_ONLY}
            contents["config.json"] = json.dumps(plain, indent=2).encode() + b"\n"
    return contents


def left_behind(directory: Path) -> list[str]:
    """Files of a model directory that do not travel, of those that may matter: not weights, documents or pictures."""
    companions = companion_files(directory)
    others = (name for name in _files(directory) if name not in companions)
    return sorted(
        name
        for name in others
        if _is_any(name, _NOT_WEIGHTS) or not (_is_any(name, (*_WEIGHTS, *_DOCUMENTS)) or "/" in name)
    )


def _files(directory: Path) -> dict[str, Path]:
    """The files of a directory and of the folders in it, by path."""
    paths = [*directory.glob("*"), *directory.glob("*/*")]
    return {path.relative_to(directory).as_posix(): path for path in sorted(paths) if path.is_file()}


def _is_any(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _named_in(path: Path) -> set[str]:
    """Names of files that a small text file may mean: quoted words, code in ``auto_map``, imports of neighbours."""
    if path.suffix not in (".json", ".py") or path.stat().st_size > _LARGEST_NAMING_FILE:
        return set()
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".py":
        imports = re.findall(r"^\s*from\s+\.(\w+)\s+import", text, re.MULTILINE)
        return {f"{name}.py" for name in imports} | set(re.findall(r"[\"']([\w.-]+\.\w+)[\"']", text))
    auto_map = _json_object(text.encode()).get("auto_map")
    code = {f"{entry.split('--')[-1].split('.')[0]}.py" for entry in _strings(auto_map)}
    quoted = {word for word in re.findall(r"\"([\w./-]+\.\w+)\"", text) if not word.endswith(".py")}
    return code | quoted


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _declared_by_class(tokenizer_config: Path | None) -> set[str]:
    """The files that the tokenizer's class in transformers reads."""
    name = None if tokenizer_config is None else _json_object(tokenizer_config.read_bytes()).get("tokenizer_class")
    if not isinstance(name, str):
        return set()
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    try:
        found = tokenizer_class_from_name(name)
    except Exception:  # a class whose own package is not installed declares nothing here
        return set()
    return {file for file in getattr(found, "vocab_files_names", {}).values() if isinstance(file, str)}


def _json_object(content: bytes) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is none: those who need it say what is wrong."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
