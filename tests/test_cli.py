"""The command line itself: usage, exit statuses, options, what is printed. The journeys are in tests/integration."""

import os
from pathlib import Path

import pytest

from qcompiler import api, cli
from qcompiler.errors import InputError, RecipeError, TargetError, VerificationError
from qcompiler.passes.recipes import RECIPES
from tests.tiny_checkpoint import command

USAGE = [
    (),
    ("no-such-command",),
    ("compile",),
    ("compile", "model", "-o", "out"),
    ("evaluate", "out", "--max-tokens", "many"),
    ("evaluate", "out", "--no-such-option"),
    ("generate", "out"),
    ("recipes", "surplus"),
]


@pytest.mark.parametrize("arguments", USAGE, ids=" ".join)
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    plain = command(*arguments)
    assert plain.status == 2
    if arguments:
        assert plain.output == ""
        assert "Usage:" in plain.errors
    else:  # the help text
        assert "Usage:" in plain.output
    as_json = command(*arguments, "--json")
    assert as_json.status == 2
    assert as_json.error["type"] == "Usage"
    assert as_json.error["what"]
    assert as_json.fields["command"] == (arguments[0] if arguments else "")


@pytest.mark.parametrize("arguments", [("--help",), ("compile", "--help")])
def test_help_is_no_error(arguments: tuple[str, ...]) -> None:
    outcome = command(*arguments)
    assert outcome.status == 0
    assert "Usage:" in outcome.output


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InputError("wrong", where="there", got=1, expected=2, remedy="do this"), 2, "InputError"),
        (VerificationError("wrong"), 3, "VerificationError"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (ValueError("wrong"), 1, "ValueError"),
    ],
)
def test_exit_status(monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, kind: str) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(api, "recipe_matrix", fail)
    plain, as_json = command("recipes"), command("recipes", "--json")
    assert (plain.status, as_json.status) == (status, status)
    assert plain.output == ""
    assert plain.errors
    assert as_json.fields.keys() == {"schema", "command", "ok", "error"}
    assert as_json.error["type"] == kind
    if isinstance(error, InputError):
        assert plain.errors == "error: wrong\n  where: there\n  got: 1\n  expected: 2\n  remedy: do this\n"
        assert as_json.fields["error"] == error.to_dict()


def test_recipes() -> None:
    outcome = command("recipes", "--json")
    assert outcome.fields.keys() == {"schema", "command", "ok", "result"}
    matrix = outcome.result["recipes"]
    assert matrix.keys() == RECIPES.keys()
    for cells in matrix.values():
        assert cells.keys() == {"native", "onnx", "kernels (CUDA)", "kernels (CPU)"}
        assert set(cells.values()) <= {"fused", "runs", "writes-only", "refused"}
    table = command("recipes").output
    for name in RECIPES:
        assert name in table


@pytest.mark.parametrize(
    ("text", "found"),
    [("0", 0), ("512", 512), ("1K", 1024), ("4GB", 4 << 30), ("1.5GiB", 3 << 29), ("2 tb".replace(" ", ""), 2 << 40)],
)
def test_amounts_of_memory(text: str, found: int) -> None:
    assert cli._bytes(text) == found


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4XB", "nan", "inf"])
def test_no_amounts_of_memory(text: str) -> None:
    with pytest.raises(InputError) as caught:
        cli._bytes(text)
    assert caught.value.got == text


def test_overrides() -> None:
    assert cli._override("lm_head=w8a16-g64") == ("lm_head", "w8a16-g64")
    assert cli._override("*.0.*=none") == ("*.0.*", None)
    for text in ("lm_head", "=w8a16"):
        with pytest.raises(RecipeError):
            cli._override(text)


def test_several_overrides() -> None:
    texts = ["a*=w8a16", "b=none", "a*=w8a16"]
    assert list(cli._overrides(texts).items()) == [("b", None), ("a*", "w8a16")]  # the last match wins
    with pytest.raises(RecipeError, match="one pattern") as caught:
        cli._overrides([*texts, "a*=w4a16"])
    assert caught.value.got == "a*=w8a16, a*=w8a16, a*=w4a16"


def test_what_others_print_does_not_stand_beside_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    def matrix() -> dict[str, dict[str, str]]:
        print("noise")
        return {"w8a16": {"native": "runs"}}

    monkeypatch.setattr(api, "recipe_matrix", matrix)
    outcome = command("recipes", "--json")
    assert outcome.result == {"recipes": {"w8a16": {"native": "runs"}}}
    assert "noise" in outcome.errors
    assert "noise" in command("recipes").output


def test_targets() -> None:
    assert cli._targets(["onnx:opset=23,float=float16"]) == [("onnx", {"opset": 23, "float_dtype": "float16"})]
    assert cli._targets([]) == []
    with pytest.raises(TargetError, match="not written") as caught:
        cli._targets(["kernels"])
    assert "--engine kernels" in str(caught.value)


def test_output_appears_whole(tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    with cli._staged_directory(output, overwrite=False) as staged:
        (staged / "file").write_text("new")
        assert not output.exists()
    assert [path.name for path in output.parent.iterdir()] == ["out"]
    assert (output / "file").read_text() == "new"


def test_output_is_replaced_at_the_end(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    with cli._staged_directory(output, overwrite=True) as staged:
        (staged / "file").write_text("new")
        assert (output / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in output.iterdir()] == ["file"]


def test_output_stays_when_the_last_rename_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    rename = os.replace

    def fail(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr("qcompiler.cli.os.replace", fail)
    with pytest.raises(InputError), cli._staged_directory(output, overwrite=True) as staged:
        (staged / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in output.iterdir()] == ["old"]


def test_many_layers_left_alone_are_a_number_on_the_terminal(capsys):
    def printed(count):
        summary = dict.fromkeys(("bytes_before", "bytes_after", "bits_per_weight", "seconds", "peak_rss_bytes"), 1)
        summary |= {"sites": [], "notes": [], "artifacts": {"native": "out/native"}, "held_out": None}
        summary["skipped"] = [{"site": f"layer.{i}", "reason": "no"} for i in range(count)]
        cli._print_compiled(summary)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("left alone")]

    assert len(printed(8)) == 8
    many = printed(40)
    assert many[:2] == ["left alone: layer.0: no", "left alone: layer.1: no"]
    assert many[7:] == ["left alone: 33 more, listed in out/native/report.html"]
