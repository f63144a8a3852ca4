"""What a user gives as text: itself, files, lines of JSON, several texts; and what is no text."""

import json
import sys

import pytest
from transformers import AutoTokenizer

from qcompiler.artifacts.calibration import Calibration
from qcompiler.artifacts.corpus import Conversation, Corpus, read_corpus
from qcompiler.artifacts.hf import load_tokenizer
from qcompiler.artifacts.tokenizing import encode
from qcompiler.errors import InputError

CHAT = [{"role": "user", "content": "Who goes there?"}, {"role": "assistant", "content": "A friend."}]
TEMPLATE = "{% for m in messages %}<|bos|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def documents(given):
    return read_corpus(given).documents


def written(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_text_is_itself():
    for text in ("two words", "one line\nand a/file.txt", "x" * 5000, "今天天气很好我们去海边", '{"text": "a b"}'):
        assert documents(text) == (text,)


def test_a_file(tmp_path):
    (tmp_path / "corpus").write_text("The sea.\n")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfThe sea.\n")
    (tmp_path / "code.txt").write_text('{\n "text": "a"\n}\n')
    for given in (tmp_path / "corpus", str(tmp_path / "corpus"), tmp_path / "mark.txt"):
        assert documents(given) == ("The sea.\n",)
    assert documents(tmp_path / "code.txt") == ('{\n "text": "a"\n}\n',)


@pytest.mark.parametrize(
    "name", ["corpus.txt", "no/such/corpus", "wikitext2", "c4", "wikitext-2-raw-v1", "org/set_200k"]
)
def test_a_name_is_no_text(name):
    with pytest.raises(InputError, match="no such text file") as caught:
        read_corpus(name)
    if "." not in name:
        assert "not downloaded" in caught.value.remedy
    with pytest.raises(InputError, match="no such text file"):
        Calibration.from_text(name)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "zeros.txt").write_bytes(b"PAR1\0\0some\0text")
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    (tmp_path / "table.parquet").write_bytes(b"PAR1abc")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, match in [
        ("latin", "not UTF-8"),
        ("zeros.txt", "binary"),
        ("table.csv", "table"),
        ("table.parquet", "table"),
        ("empty.txt", "is empty"),
        ("empty.jsonl", "is empty"),
        (".", "cannot be read"),
    ]:
        with pytest.raises(InputError, match=match) as caught:
            read_corpus(tmp_path / name)
        assert str(tmp_path) in str(caught.value.where)
    with pytest.raises(InputError, match="is empty"):
        read_corpus("")


def test_several_texts():
    assert documents(["The sea.", "wikitext2"]) == ("The sea.", "wikitext2")
    assert documents(text for text in ("a", "", " \n", "b")) == ("a", "b")
    for bad in ([1, 2], [b"a"], [None], 7, b"abc", {"text": "a"}):
        with pytest.raises(InputError, match=r"no text|not a text"):
            read_corpus(bad)
    with pytest.raises(InputError, match="is empty"):
        read_corpus([])


RECORDS = [
    ({"text": "a b"}, "a b"),
    ({"content": "a b", "id": 3}, "a b"),
    ({"prompt": "a ", "completion": "b"}, "a b"),
    ("a b", "a b"),
]


@pytest.mark.parametrize(("record", "text"), RECORDS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
def test_texts_in_json(tmp_path, record, text, name):
    (tmp_path / name).write_text(f"{json.dumps(record)}\n\n{json.dumps(record)}\n")
    assert documents(tmp_path / name) == (text, text)
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps([record, record], indent=1))
    assert documents(whole) == (text, text)


CHATS = [
    {"messages": CHAT},
    {"conversations": [{"from": "human", "value": "Who goes there?"}, {"from": "gpt", "value": "A friend."}]},
    {"conversations": CHAT},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
]


@pytest.mark.parametrize("record", CHATS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a"])
def test_conversations_in_json_whatever_the_name(tmp_path, record, name):
    found = documents(written(tmp_path / name, [record, record]))
    assert [list(item.messages) for item in found] == [CHAT, CHAT]
    assert "2" in found[1].where or "1" in found[1].where


@pytest.mark.parametrize(
    "line",
    ['{"question": "a", "answer": "b"}', '{"a": ', "[1, 2]", "7", "null", '{"messages": [1]}', '{"text": 1}'],
)
def test_json_of_another_structure_is_refused(tmp_path, line):
    path = written(tmp_path / "a.jsonl", [{"text": "fine"}, line])
    with pytest.raises(InputError) as caught:
        read_corpus(path)
    assert caught.value.where == f"{path}: line 2"


def test_deeply_nested_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[" * (20 * sys.getrecursionlimit()))
    with pytest.raises(InputError, match="not JSON"):
        read_corpus(path)


def test_documents_become_one_stream(booklm):
    tokenizer = load_tokenizer(booklm)
    texts = ["The sea.", "It was night."]
    stream = Corpus(tuple(texts)).stream(tokenizer)
    assert tokenizer.decode(stream.ids.tolist()) == "The sea.\n\nIt was night."
    assert stream.opening == ()
    assert Corpus(("The sea.",)).stream(tokenizer).ids.tolist() == encode(tokenizer, "The sea.").tolist()


def test_conversations_go_through_the_template(booklm):
    tokenizer = load_tokenizer(booklm)
    chat = Conversation(tuple(CHAT), "here")
    with pytest.raises(InputError, match="chat template") as caught:
        Corpus((chat,)).stream(tokenizer)
    assert caught.value.where == "here"
    tokenizer.chat_template = TEMPLATE
    ids = Corpus((chat, "The sea.")).stream(tokenizer).ids.tolist()
    expected = "<|bos|>user: Who goes there?\n<|bos|>assistant: A friend.\n"
    assert ids.count(0) == 2  # of the template, which may give special tokens
    assert tokenizer.decode(ids) == f"{expected}The sea."
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="does not take") as caught:
        Corpus((chat,)).stream(tokenizer)
    assert "roles must alternate" in str(caught.value.got)


def test_a_chat_file_calibrates(booklm, tmp_path):
    path = written(tmp_path / "chat.jsonl", [{"messages": CHAT}] * 40)
    tokenizer = AutoTokenizer.from_pretrained(booklm)
    tokenizer.chat_template = TEMPLATE
    ids = Calibration.from_text(path, samples=4, length=64).bind(tokenizer=tokenizer).ids
    assert ids.shape == (4, 64)
    text = tokenizer.decode(ids.flatten().tolist())
    assert '"' not in text
    assert "{" not in text
    assert "goes there?\n<|bos|>assistant: A friend." in text
