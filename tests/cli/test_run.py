"""The command line itself: usage and exit statuses. The journeys are in tests/integration."""

import logging
import os
import subprocess
import sys

import pytest

import qcompiler
from qcompiler import api
from qcompiler.errors import InputError, VerificationError
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
    ("recipes", "w8a16", "surplus"),
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
        (PermissionError(13, "Permission denied", "/secret/model"), 2, "InputError"),
        (OSError("of nothing that was named"), 1, "OSError"),
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
        assert as_json.fields["error"] == {**error.to_dict(), "artifacts": None, "next_command": None}


def test_recipes() -> None:
    outcome = command("recipes", "--json")
    assert outcome.fields.keys() == {"schema", "command", "ok", "result"}
    matrix = outcome.result["recipes"]
    assert matrix.keys() == RECIPES.keys()
    for cells in matrix.values():
        assert cells.keys() == {"native", "ort", "onnx", "tensorrt", "checkpoint", "kernels (CUDA)", "kernels (CPU)"}
        assert set(cells.values()) <= {"fused", "runs", "writes-only", "refused"}
    table = command("recipes").output
    for name in RECIPES:
        assert name in table


def test_what_others_print_does_not_stand_beside_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    def matrix() -> dict[str, dict[str, str]]:
        print("noise")
        return {"w8a16": {"native": "runs"}}

    monkeypatch.setattr(api, "recipe_matrix", matrix)
    outcome = command("recipes", "--json")
    assert outcome.result == {"recipes": {"w8a16": {"native": "runs"}}}
    assert "noise" in outcome.errors
    assert "noise" in command("recipes").output


def test_version() -> None:
    outcome = command("--version")
    assert (outcome.status, outcome.output) == (0, f"qcompiler {qcompiler.__version__}\n")


def test_completion_can_be_asked_for() -> None:
    shown = command("--help").output
    assert "--install-completion" in shown
    asked = {"_QCOMPILER_COMPLETE": "complete_bash", "COMP_WORDS": "qcompiler eval", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = 'qcompiler'; from qcompiler.cli import main; sys.exit(main([]))"
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert ran.stdout.split() == ["evaluate"], ran.stderr


def test_what_a_recipe_consists_of() -> None:
    found = command("recipes", "w8a8-smoothquant+kv-int4", "--json").result
    assert [item["pass"] for item in found["passes"]] == [
        "Assign",
        "SmoothQuant",
        "QuantizeKVCache",
        "InsertQDQ",
        "GPTQ",
    ]
    assert found["passes"][-1]["options"] == {"correction": 0}
    assert found["scheme"]["activation"].startswith("int8 per_tensor")
    assert (found["is_calibrated"], len(found["caches"]), found["targets"]["onnx"]["status"]) == (True, 1, "fused")
    shown = command("recipes", "nvfp4").output
    assert "InsertQDQ(observer=minmax)" in shown
    assert "onnx: refused (4-bit floats" in shown
    assert command("recipes", "w8a16", "--json").result["is_calibrated"] is False
    assert "did you mean w4a16-rtn?" in command("recipes", "w4a16_rtn").errors


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_told(name: str) -> None:
    outcome = command("recipes", name)
    assert outcome.status == 0
    assert outcome.output.startswith(f"{name}: ")


def test_verbose_tells_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def matrix() -> dict[str, dict[str, str]]:
        logging.getLogger("qcompiler.somewhere").info("noticed")
        return {"w8a16": {"native": "runs"}}

    monkeypatch.setattr(api, "recipe_matrix", matrix)
    assert "noticed" in command("recipes", "-v").errors
    assert "noticed" in command("recipes", "--verbose", "--json").errors
    assert "noticed" not in command("recipes").errors
