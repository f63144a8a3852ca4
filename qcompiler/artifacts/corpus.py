"""Texts to calibrate and to measure with: one text, several, or a file of them, plain or as lines of JSON."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompiler.artifacts.tokenizing import TokenStream, encode, opening_tokens
from qcompiler.errors import InputError
from qcompiler.storage import read_named

__all__ = ["Conversation", "Corpus", "read_corpus"]

_JSON = (".json", ".jsonl", ".ndjson")
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx")
_NAME = re.compile(r"[\w.\-/]{1,128}", re.ASCII)
_KNOWN = (
    "objects with messages (role, content), conversations (from, value), text, content, or prompt and completion; or "
    "strings"
)
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """Messages, each with ``role`` and ``content``, which a chat template makes a text of.

    Attributes:
        messages: in order.
        where: what to name in an error.
    """

    messages: tuple[Mapping[str, Any], ...]
    where: str


@dataclass(frozen=True)
class Corpus:
    """One or several documents.

    Attributes:
        documents: texts or conversations.
    """

    documents: tuple[str | Conversation, ...]

    def stream(self, tokenizer: Any) -> TokenStream:
        """The tokens of all documents, one behind the other.

        Each begins with the opening of the tokenizer (`opening_tokens`); of a tokenizer that has none, a blank line
        stands between two texts. A conversation is what the chat template makes of it.

        Raises:
            InputError: a conversation for a tokenizer without a chat template, or one that the template refuses.
        """
        opening = opening_tokens(tokenizer)
        separator = "" if opening else "\n\n"
        last = len(self.documents) - 1
        pieces = [
            _applied(tokenizer, document)
            if isinstance(document, Conversation)
            else encode(tokenizer, document if index == last else document + separator)
            for index, document in enumerate(self.documents)
        ]
        return TokenStream(torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64), opening)


def read_corpus(text: str | Path | Iterable[str]) -> Corpus:
    """Reads what a user gave as text.

    Args:
        text: a text; the path of a UTF-8 file; or several texts, each a document of its own. A string is a path if a
            file of that name exists, or if it is one word that looks like a name: such a word is no text, and no data
            set is downloaded. A file of JSON (by its suffix, or because its first line is a JSON object) holds one
            document a line, or a list of them: strings, or objects with ``text``, ``content``, ``prompt`` and
            ``completion``, ``messages`` or ``conversations``. Blank documents are left out.

    Raises:
        InputError: a file that is missing, cannot be read, is not UTF-8, is a table or is binary; JSON of another
            structure; several texts of which one is no string; or no text at all.
    """
    if isinstance(text, (str, Path)):
        path = Path(text) if isinstance(text, Path) or _is_path(text) else None
        corpus = Corpus((text,)) if path is None and isinstance(text, str) else Corpus(tuple(_read(Path(text))))
        where: Path | None = path
    elif hasattr(text, "__iter__") and not isinstance(text, (bytes, Mapping)):
        where = None
        texts: list[Any] = list(text)
        for index, item in enumerate(texts):
            if not isinstance(item, str):
                raise InputError(
                    "one of several texts is no text",
                    where=f"text {index}",
                    got=type(item).__name__,
                    expected="strings",
                    remedy="token ids are given to from_tokens",
                )
        corpus = Corpus(tuple(texts))
    else:
        raise InputError("not a text", got=type(text).__name__, expected="a text, a path, or several texts")
    found = tuple(d for d in corpus.documents if isinstance(d, Conversation) or d.strip())
    if not found:
        raise InputError("the text is empty", where=where, remedy="give more text")
    return Corpus(found)


def _is_path(text: str) -> bool:
    if not text or len(text) > 4096 or "\n" in text or "\0" in text:
        return False
    try:
        is_there = Path(text).exists()
    except OSError:  # a text longer than a file name can be
        return False
    is_one_word = len(text.split()) == 1
    looks_like_path = "/" in text or Path(text).suffix not in ("", ".")
    return is_there or (is_one_word and (looks_like_path or _NAME.fullmatch(text.strip()) is not None))


def _read(path: Path) -> list[str | Conversation]:
    if path.suffix.lower() in _TABLES:
        raise InputError(
            "a table is no text",
            where=path,
            got=path.suffix,
            expected="plain text, or JSON lines",
            remedy='write the column to a .jsonl file of lines such as {"text": "..."}',
        )
    try:
        content = read_named(path).decode("utf-8-sig")
    except FileNotFoundError as error:
        is_name = path.suffix == ""
        raise InputError(
            "no such text file",
            where=path,
            remedy="data sets are not downloaded: give a file, or a text of several words"
            if is_name
            else "check the path",
        ) from error
    except UnicodeDecodeError as error:
        raise InputError("the text file is not UTF-8", where=path, got=error) from error
    except OSError as error:
        raise InputError("the text file cannot be read", where=path, got=error.strerror) from error
    if "\0" in content:
        raise InputError("the text file is binary", where=path, got="bytes of zero", expected="UTF-8 text")
    if path.suffix.lower() in _JSON or _begins_with_an_object(content):
        return [_document(record, where) for where, record in _records(path, content)]
    return [content]


def _begins_with_an_object(content: str) -> bool:
    first = content.lstrip()[: 1 << 20].partition("\n")[0]
    if not first.startswith("{"):
        return False
    try:
        return bool(json.loads(first))
    except (ValueError, RecursionError):
        return False


def _records(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    """Lines of JSON, or the entries of one JSON list, each with its place."""
    problem: Exception | None = None
    if path.suffix.lower() == ".json":
        try:
            whole = json.loads(content)
        except (ValueError, RecursionError) as error:
            problem = error
        else:
            entries = whole if isinstance(whole, list) else [whole]
            yield from ((f"{path}: entry {index}", entry) for index, entry in enumerate(entries))
            return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}: line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    "the text file is not JSON", where=f"{path}: line {number}", got=problem or error, expected=_KNOWN
                ) from error


def _document(record: Any, where: str) -> str | Conversation:
    if isinstance(record, str):
        return record
    fields: Mapping[str, Any] = record if isinstance(record, Mapping) else {}
    for key in ("messages", "conversations"):
        if isinstance(fields.get(key), list):
            return Conversation(tuple(_message(item, where) for item in fields[key]), where)
    for key in ("text", "content"):
        if isinstance(fields.get(key), str):
            return str(fields[key])
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if isinstance(prompt, list) and isinstance(completion, list):
        return Conversation(tuple(_message(item, where) for item in prompt + completion), where)
    got = f"fields {', '.join(map(str, fields))}" if fields else type(record).__name__
    raise InputError(
        "JSON of an unknown structure is no text",
        where=where,
        got=got,
        expected=_KNOWN,
        remedy='write lines such as {"text": "..."}, or give plain text',
    )


def _message(item: Any, where: str) -> Mapping[str, Any]:
    if isinstance(item, Mapping) and isinstance(item.get("role"), str) and "content" in item:
        return item
    if isinstance(item, Mapping) and isinstance(item.get("from"), str) and isinstance(item.get("value"), str):
        return {"role": _ROLES.get(item["from"], item["from"]), "content": item["value"]}
    got = ", ".join(map(str, item)) if isinstance(item, Mapping) else type(item).__name__
    raise InputError("a message lacks its role or content", where=where, got=got, expected="role and content")


def _applied(tokenizer: Any, conversation: Conversation) -> torch.Tensor:
    """The tokens that a chat template makes of a conversation, int64 ``[n]``."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "a conversation needs a chat template, and this tokenizer has none",
            where=conversation.where,
            remedy='give texts: lines such as {"text": "..."}',
        )
    messages: Sequence[Any] = [dict(message) for message in conversation.messages]
    try:
        ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    except Exception as error:  # a template may raise anything of its own
        raise InputError(
            "the chat template does not take this conversation", where=conversation.where, got=error
        ) from error
    return torch.tensor(ids, dtype=torch.int64)
