"""What a user can get wrong, through the whole program: one typed error that names the culprit, nothing left behind."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qcompiler import api
from qcompiler.ir.graph import Graph
from qcompiler.sweep import compiling
from tests.models import copy_graph
from tests.tiny_checkpoint import Outcome, command, save_checkpoint, write_text

INDEX = "model.safetensors.index.json"
WEIGHT = "model.layers.0.mlp.up_proj.weight"
SITE = WEIGHT.removesuffix(".weight")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``whole``, one file, and ``sharded``, several."""
    root = tmp_path_factory.mktemp("originals")
    save_checkpoint(root / "whole", layers=1)
    save_checkpoint(root / "sharded", layers=1, max_shard_size="300KB")
    return root


@pytest.fixture
def model(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "whole", tmp_path / "model"))


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "sharded", tmp_path / "model"))


@pytest.fixture(scope="module")
def graph(originals: Path) -> Graph:
    return api.capture(originals / "whole")


@pytest.fixture
def captured(model: Path, graph: Graph, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model, for errors that come after capture: it is captured once for all of them."""

    def capture(directory: Path, **options: Any) -> Graph:
        weights = copy.deepcopy(graph.weights)  # what is written to disk is shared otherwise
        provenance = {**graph.provenance, "companions": str(directory)}
        return replace(copy_graph(graph), weights=weights, provenance=provenance)

    monkeypatch.setattr(api, "capture", capture)
    return model


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever happens, there is no output, nothing beside it, and nothing in the temporary directory."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    yield
    names = {path.name for path in tmp_path.iterdir()}
    assert names <= {"model", "text.txt", "temporary", "kept", "file"}
    assert not list(temporary.glob("*"))


def compile_to(tmp_path: Path, model: Path, *arguments: object, recipe: str = "w8a16") -> Outcome:
    return command("compile", model, "-r", recipe, "-o", tmp_path / "out", "--json", *arguments)


def check_error(outcome: Outcome, kind: str, *mentioned: str) -> None:
    """Exit status 2, one JSON object, the right type, and every word in it."""
    assert outcome.status == 2, outcome.errors
    assert outcome.fields["command"] == "compile"
    assert outcome.error["type"] == kind
    text = " ".join(outcome.error.values())
    for word in mentioned:
        assert word in text
    assert "Traceback" not in outcome.errors


def rewrite_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


# --- weights ---------------------------------------------------------------------------------------------------------


def last_shard(model: Path) -> Path:
    found = sorted(model.glob("model-*.safetensors"))
    assert len(found) > 1
    return found[-1]


def test_truncated_shard(sharded: Path, tmp_path: Path) -> None:
    shard = last_shard(sharded)
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    check_error(compile_to(tmp_path, sharded), "WeightError", shard.name)


def test_corrupt_shard(sharded: Path, tmp_path: Path) -> None:
    shard = last_shard(sharded)
    with shard.open("r+b") as file:
        file.write(b"\xff" * 16)
    check_error(compile_to(tmp_path, sharded), "WeightError", shard.name)


def test_missing_shard(sharded: Path, tmp_path: Path) -> None:
    shard = last_shard(sharded)
    shard.unlink()
    check_error(compile_to(tmp_path, sharded), "WeightError", shard.name)


@pytest.mark.parametrize("recipe", ["w8a16", "w4a16-gptq"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite(model: Path, tmp_path: Path, value: float, recipe: str) -> None:
    rewrite_weights(model, lambda tensors: tensors[WEIGHT].__setitem__((3, 5), value))
    text = write_text(tmp_path / "text.txt")
    outcome = compile_to(tmp_path, model, "--calib", text, "--samples", 2, "--length", 16, recipe=recipe)
    check_error(outcome, "WeightError", WEIGHT)


def test_weight_that_is_not_finite_is_named_before_anything_is_sampled_with_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bind(*arguments: object, **options: object) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr("qcompiler.artifacts.calibration.Calibration.bind", bind)
    rewrite_weights(model, lambda tensors: tensors[WEIGHT].__setitem__((3, 5), float("nan")))
    outcome = compile_to(tmp_path, model, "--samples", 2, "--length", 16, recipe="w4a16-gptq")
    check_error(outcome, "WeightError", WEIGHT)


def test_index_of_a_tensor_that_is_not_there(sharded: Path, tmp_path: Path) -> None:
    shard = last_shard(sharded).name
    rewrite_json(sharded / INDEX, lambda fields: fields["weight_map"].update(ghost=shard))
    check_error(compile_to(tmp_path, sharded), "WeightError", "ghost", shard)


def test_index_that_leaves_the_directory(sharded: Path, tmp_path: Path) -> None:
    shard = json.loads((sharded / INDEX).read_text())["weight_map"][WEIGHT]
    shutil.copy(sharded / shard, tmp_path / "file")
    rewrite_json(sharded / INDEX, lambda fields: fields["weight_map"].update({WEIGHT: "../file"}))
    check_error(compile_to(tmp_path, sharded), "WeightError", "../file")


def test_tensor_missing(model: Path, tmp_path: Path) -> None:
    rewrite_weights(model, lambda tensors: tensors.pop(WEIGHT))
    check_error(compile_to(tmp_path, model), "WeightError", WEIGHT)


def test_tensor_of_another_shape(model: Path, tmp_path: Path) -> None:
    rewrite_weights(model, lambda tensors: tensors.update({WEIGHT: torch.zeros(95, 64, dtype=torch.bfloat16)}))
    check_error(compile_to(tmp_path, model), "WeightError", WEIGHT, "95")


def test_pickle_weights(model: Path, tmp_path: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    check_error(compile_to(tmp_path, model), "WeightError", "pytorch_model.bin", "safetensors")


# --- configuration, tokenizer, text ----------------------------------------------------------------------------------


def test_no_such_model(tmp_path: Path) -> None:
    check_error(compile_to(tmp_path, tmp_path / "nowhere"), "InputError", str(tmp_path / "nowhere"))


def test_missing_config(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    check_error(compile_to(tmp_path, model), "InputError", str(model), "config.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-type"}', '{"hidden_size": "many"}'])
def test_broken_config(model: Path, tmp_path: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    outcome = compile_to(tmp_path, model)
    assert outcome.error["type"] in ("InputError", "UnsupportedModelError")
    check_error(outcome, outcome.error["type"], str(model))


def test_vocabulary_smaller_than_the_tokenizer(model: Path, tmp_path: Path) -> None:
    rewrite_json(model / "config.json", lambda fields: fields.update(vocab_size=100))
    embeddings = ("model.embed_tokens.weight", "lm_head.weight")
    rewrite_weights(model, lambda tensors: tensors.update({name: tensors[name][:100].clone() for name in embeddings}))
    text = write_text(tmp_path / "text.txt")
    outcome = compile_to(tmp_path, model, "--calib", text, "--length", 16, recipe="w4a16-gptq")
    check_error(outcome, "InputError", str(model), "4095", "100")


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
        (("--to", "onnx:colour=red"), "TargetError", ("colour=red", "opset")),
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
