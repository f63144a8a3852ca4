"""Which files travel with a model."""

from pathlib import Path

from qcompiler.companions import companion_files


def test_finds_tokenizer_and_configuration_but_no_weights(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors", "notes.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "vocab.txt").mkdir()  # a directory of that name is no companion
    found = companion_files(tmp_path)
    assert sorted(found) == ["chat_template.jinja", "config.json", "tokenizer.json"]
    assert found["config.json"] == tmp_path / "config.json"


def test_nowhere_to_look() -> None:
    assert companion_files(None) == {}
