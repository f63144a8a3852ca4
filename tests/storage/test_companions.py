"""Which files travel with a model."""

import json
from pathlib import Path

from qcompiler.storage.companions import companion_files, left_behind, read_companions


def write(directory: Path, *names: str, **contents: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(contents.get(name, "{}"))


def test_finds_tokenizer_and_configuration_but_no_weights(tmp_path: Path) -> None:
    write(tmp_path, "config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "notes.txt")
    (tmp_path / "vocab.txt").mkdir()  # a directory of that name is no companion
    found = companion_files(tmp_path)
    assert sorted(found) == ["chat_template.jinja", "config.json", "tokenizer.json"]
    assert found["config.json"] == tmp_path / "config.json"


def test_vocabularies_of_many_kinds(tmp_path: Path) -> None:
    names = (
        "tekken.json",
        "qwen.tiktoken",
        "tiktoken.model",
        "sentencepiece.bpe.model",
        "source.spm",
        "additional_chat_templates/tool_use.jinja",
        "preprocessor_config.json",
        "LICENSE",
        "NOTICE.txt",
        "tokenizer_config.json",
        "added_tokens.json",
    )
    write(tmp_path, *names)
    assert sorted(companion_files(tmp_path)) == sorted(names)
    assert left_behind(tmp_path) == []


def test_code_travels_where_it_is_named_with_what_it_names(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", "config.json", "merge_table.bin2", "words.list", "stray.py", "helpers.py")
    write(tmp_path, "tokenization_own.py", "deeper.py", "configuration_own.py", "modeling_own.py")
    names = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": names, "vocab_file": "words.list"}))
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "configuration_own.Own"}}))
    (tmp_path / "tokenization_own.py").write_text(
        "from .helpers import x\nVOCAB = {'vocab_file': 'merge_table.bin2'}\nimport stray\n"
    )
    (tmp_path / "helpers.py").write_text("    from .deeper import y\n")
    assert sorted(companion_files(tmp_path)) == [
        "config.json",
        "configuration_own.py",
        "deeper.py",
        "helpers.py",
        "merge_table.bin2",
        "tokenization_own.py",
        "tokenizer_config.json",
        "words.list",
    ]
    assert left_behind(tmp_path) == ["modeling_own.py", "stray.py"]


def test_files_that_the_class_of_a_tokenizer_declares(tmp_path: Path) -> None:
    write(tmp_path, "tokenizer_config.json", "bpe.codes", "dict.txt", "emoji.txt")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PhobertTokenizer"}))
    before = sorted(companion_files(tmp_path))
    (tmp_path / "vocab.txt").write_text("a")
    assert before == ["bpe.codes", "tokenizer_config.json"]
    assert sorted(companion_files(tmp_path)) == ["bpe.codes", "tokenizer_config.json", "vocab.txt"]


def test_a_name_in_a_file_leads_nowhere_else(tmp_path: Path) -> None:
    """Weights are no companions, whoever names them, nor is what lies outside."""
    root = tmp_path / "model"
    write(root, "tokenizer_config.json", "model.safetensors")
    write(tmp_path, "outside.json")
    content = {"a": "model.safetensors", "b": "../outside.json", "c": str(tmp_path / "outside.json"), "d": "gone.json"}
    (root / "tokenizer_config.json").write_text(json.dumps(content))
    assert sorted(companion_files(root)) == ["tokenizer_config.json"]


def test_what_stays_behind(tmp_path: Path) -> None:
    write(tmp_path, "config.json", "model.safetensors", "pytorch_model.bin", "README.md", ".gitattributes", "a.png")
    write(tmp_path, "original/params.json", "modules.json", "adapter_config.json", "adapter_model.safetensors")
    assert left_behind(tmp_path) == ["adapter_config.json", "adapter_model.safetensors", "modules.json"]


def test_a_configuration_says_nothing_of_weights_that_are_not_beside_it(tmp_path: Path) -> None:
    text = '{"model_type":   "llama"}'
    (tmp_path / "config.json").write_text(text)
    assert read_companions(tmp_path) == {"config.json": text.encode()}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": {}, "transformers_weights": "x"})
    )
    assert json.loads(read_companions(tmp_path)["config.json"]) == {"model_type": "llama"}
    (tmp_path / "config.json").write_text("{broken")
    assert read_companions(tmp_path) == {"config.json": b"{broken"}


def test_nowhere_to_look(tmp_path: Path) -> None:
    assert companion_files(None) == {}
    assert companion_files(tmp_path / "nowhere") == {}
    assert read_companions(None) == {}
