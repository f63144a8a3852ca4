"""What a user can get wrong, through the whole program: one typed error that names the culprit, nothing left behind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qcompiler.sweep import compiling
from tests.integration.bad_input.edits import SITE, WEIGHT, check_error, compile_to, rewrite_json, rewrite_weights
from tests.tiny_checkpoint import Outcome, command, write_text


def test_calibration_text_shorter_than_a_window(captured: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt", words=5)
    outcome = compile_to(tmp_path, captured, "--calib", text, "--length", 32, recipe="w4a16-gptq")
    check_error(outcome, "CalibrationError", "32")


def test_calibration_windows_longer_than_the_model_takes(captured: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    outcome = compile_to(tmp_path, captured, "--calib", text, recipe="w4a16-gptq")
    check_error(outcome, "CalibrationError", "512", "64")


def test_no_such_text(captured: Path, tmp_path: Path) -> None:
    outcome = compile_to(tmp_path, captured, "--calib", tmp_path / "text.txt", recipe="w4a16-gptq")
    check_error(outcome, "InputError", str(tmp_path / "text.txt"))


def test_evaluation_text_shorter_than_a_window(model: Path, tmp_path: Path) -> None:
    outcome = command("evaluate", model, "--text", write_text(tmp_path / "text.txt", words=5), "--json")
    assert outcome.status == 2
    assert outcome.error["type"] == "InputError"
    assert "64" in outcome.error["expected"]


@pytest.mark.parametrize("option", [("--max-tokens", "0"), ("--max-tokens", "-4")])
def test_evaluating_on_no_tokens(model: Path, tmp_path: Path, option: tuple[str, str]) -> None:
    outcome = command("evaluate", model, "--text", write_text(tmp_path / "text.txt"), *option, "--json")
    assert outcome.status == 2
    assert (outcome.error["type"], outcome.error["got"]) == ("InputError", option[1])


def test_generating_with_a_seed_that_is_too_large(model: Path) -> None:
    outcome = command("generate", model, "--prompt", "the sea", "--temperature", "1", "--seed", 1 << 63, "--json")
    assert outcome.status == 2
    assert outcome.error["what"] == "the seed is too large"


# --- recipes, targets, options ---------------------------------------------------------------------------------------


def test_unknown_recipe(model: Path, tmp_path: Path) -> None:
    check_error(compile_to(tmp_path, model, recipe="w5a16"), "RecipeError", "w5a16", "w4a16-gptq")


@pytest.mark.parametrize(
    ("name", "content", "mentioned"),
    [
        ("file.toml", 'base = "w8a16"\nbits = 4', ("file.toml: bits", "base, schemes, passes")),
        ("file.toml", None, ("file.toml",)),
        ("file.py:RECIPE", None, ("file.py",)),
        ("file.py:RECIPE", "RECIPES = ()", ("file.py", "RECIPE")),
        ("file.py:RECIPE", "1 / 0", ("file.py", "ZeroDivisionError")),
        ("file.py:RECIPE", "print('noise')\nRECIPE = 3", ("file.py", "3")),
    ],
)
def test_damaged_recipe(
    captured: Path, tmp_path: Path, name: str, content: str | None, mentioned: tuple[str, ...]
) -> None:
    file = tmp_path / "kept" / name.partition(":")[0]
    file.parent.mkdir()
    if content is not None:
        file.write_text(content)
    outcome = compile_to(tmp_path, captured, recipe=f"{file.parent}/{name}")
    check_error(outcome, "RecipeError", *mentioned)


@pytest.mark.parametrize(
    ("option", "kind", "mentioned"),
    [
        (("--to", "tensorflow"), "TargetError", ("tensorflow", "onnx")),
        (("--to", "onnx:colour=red"), "TargetError", ("colour", "opset")),
        (("--to", "onnx:opset=9"), "TargetError", ("9", "21")),
        (("--to", "onnx:float=float64"), "TargetError", ("float64",)),
        (("--to", "onnx", "--to", "onnx:opset=23"), "TargetError", ("onnx, onnx",)),
        (("--set", "lm_head"), "RecipeError", ("lm_head", "PATTERN=SCHEME")),
        (("--set", "lm_head=w9a16"), "RecipeError", ("w9a16",)),
        (("--set", "*.no_such=w8a16"), "RecipeError", ("*.no_such", "q_proj")),
        (("--set", "*.up_proj=w4a16-g1", "--to", "onnx"), "TargetError", (SITE, "g1")),
        (("--set", "*.up_proj=w4a16-g0"), "RecipeError", ("*.up_proj",)),
        (("--set", "*.up_proj=w4a16", "--set", "*.up_proj=none"), "RecipeError", ("*.up_proj=w4a16, *.up_proj=none",)),
        (("--memory-budget", "much"), "InputError", ("much",)),
        (("--device", "abacus"), "InputError", ("abacus",)),
        (("--work-dir", "/proc/nowhere"), "InputError", ("/proc/nowhere",)),
        (("--samples", "0"), "CalibrationError", ("samples",)),
        (("--seed", str(1 << 63)), "InputError", (str(1 << 63), "64 bits")),
    ],
)
def test_unknown_option(
    captured: Path, tmp_path: Path, option: tuple[str, ...], kind: str, mentioned: tuple[str, ...]
) -> None:
    check_error(compile_to(tmp_path, captured, *option), kind, *mentioned)


@pytest.mark.parametrize(
    "option", [("--no-such-option",), ("--samples", "many"), ("surplus",), ("--seed",)], ids=lambda option: option[0]
)
def test_usage(model: Path, tmp_path: Path, option: tuple[str, ...]) -> None:
    check_error(compile_to(tmp_path, model, *option), "Usage")


# --- the output ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taken", ["native", "onnx"])
def test_output_with_an_artifact(model: Path, tmp_path: Path, taken: str) -> None:
    (tmp_path / "kept" / taken).mkdir(parents=True)
    outcome = command("compile", model, "-r", "w8a16", "-o", tmp_path / "kept", "--json")
    check_error(outcome, "InputError", str(tmp_path / "kept" / taken), "--overwrite")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [taken]


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        (("-r", "no-such-recipe"), "RecipeError"),
        (("--set", "lm_head=w9a16"), "RecipeError"),
        (("--to", "tensorflow"), "TargetError"),
        (("--to", "onnx:opset=9"), "TargetError"),
        (("--device", "abacus"), "InputError"),
        (("--memory-budget", "much"), "InputError"),
        (("--seed", str(1 << 63)), "InputError"),
        (("--work-dir", "/proc/nowhere"), "InputError"),
        (("--calib", "/proc/nowhere"), "InputError"),
        (("--samples", "0"), "CalibrationError"),
    ],
)
def test_an_existing_output_hides_no_other_mistake(
    model: Path, tmp_path: Path, option: tuple[str, str], kind: str
) -> None:
    (tmp_path / "kept" / "native").mkdir(parents=True)
    outcome = command("compile", model, "-r", "w8a16", "-o", tmp_path / "kept", "--json", *option)
    check_error(outcome, kind, option[1].removeprefix("lm_head=").removeprefix("onnx:opset="))


@pytest.mark.parametrize("damage", ["gone", "config", "weights", "quantized"])
def test_an_existing_output_hides_no_damaged_model(model: Path, tmp_path: Path, damage: str) -> None:
    (tmp_path / "kept" / "native").mkdir(parents=True)
    if damage == "gone":
        shutil.rmtree(model)
    elif damage == "config":
        (model / "config.json").write_text("{")
    elif damage == "weights":
        (model / "model.safetensors").write_bytes(b"damaged")
    else:
        rewrite_json(model / "config.json", lambda fields: fields.update(quantization_config={"quant_method": "x"}))
    outcome = command("compile", model, "-r", "w8a16", "-o", tmp_path / "kept", "--json")
    kind = {"weights": "WeightError", "quantized": "UnsupportedModelError"}.get(damage, "InputError")
    check_error(outcome, kind, str(model))


def test_failing_overwrite_keeps_what_is_there(model: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "precious").write_text("x")
    rewrite_weights(model, lambda tensors: tensors[WEIGHT].fill_(float("nan")))
    outcome = command("compile", model, "-r", "w8a16", "-o", tmp_path / "kept", "--overwrite", "--json")
    check_error(outcome, "WeightError", WEIGHT)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["precious"]


@pytest.mark.parametrize("output", ["model", "model/out"])
def test_writing_into_the_model(model: Path, tmp_path: Path, output: str) -> None:
    before = sorted(path.name for path in model.iterdir())
    outcome = command("compile", model, "-r", "w8a16", "-o", tmp_path / output, "--overwrite", "--json")
    check_error(outcome, "InputError", "model's directory")
    assert sorted(path.name for path in model.iterdir()) == before


@pytest.mark.parametrize("output", ["file", "file/out", "file/deeper/out"])
def test_output_in_the_place_of_a_file(model: Path, tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("x")
    outcome = command("compile", model, "-r", "w8a16", "-o", tmp_path / output, "--overwrite", "--json")
    check_error(outcome, "InputError", str(tmp_path / output))
    assert (tmp_path / "file").read_text() == "x"


def test_output_not_writable(captured: Path, tmp_path: Path) -> None:
    outcome = command("compile", captured, "-r", "w8a16", "-o", "/proc/out", "--json")
    check_error(outcome, "InputError", "/proc/out")


def test_disk_full(model: Path, tmp_path: Path) -> None:
    """A limit on file sizes that the tokenizer and the spilled codes stay below, and the saved weights do not."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000)); "
        "from qcompiler.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["compile", str(model), "-r", "w8a16", "-o", str(tmp_path / "out"), "--to", "onnx", "--json"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    check_error(Outcome(done.returncode, done.stdout, done.stderr), "ResourceError", "disk is full")


def test_disk_full_in_the_sweep(captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(descriptor: int, data: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qcompiler.storage.staging.os.write", write)
    check_error(compile_to(tmp_path, captured), "ResourceError", "disk is full", "segment-")


# --- interruption, verification, faults ------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["check_schemes", "verify_graph"])
def test_interrupted(captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compiling, moment, interrupt)
    outcome = compile_to(tmp_path, captured, "--to", "onnx")
    assert outcome.status == 130
    assert outcome.error["type"] == "Interrupted"


def test_interrupted_while_saving(captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, calls = os.replace, []

    def interrupt(source: object, target: object) -> None:
        calls.append(target)
        if str(target).endswith("graph.json"):
            raise KeyboardInterrupt
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr("qcompiler.storage.staging.os.replace", interrupt)
    assert compile_to(tmp_path, captured).status == 130
    assert str(calls[-1]).endswith("graph.json")


def test_a_fault_of_the_program(captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(compiling, "verify_graph", fail)
    outcome = compile_to(tmp_path, captured)
    assert outcome.status == 1
    assert outcome.error["type"] == "ZeroDivisionError"
    assert "Traceback" in outcome.errors
    assert "please report it" in outcome.errors
