"""`qcompiler verify`: what an engine makes of a checkpoint, beside the native artifact; the engine is made up here."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import qcompiler as qc
from qcompiler.artifacts import CompileResult
from qcompiler.errors import InputError, MissingDependencyError, QCompilerError, TargetError, VerificationError
from qcompiler.ir.graph import Graph
from qcompiler.lowering.checkpoint.readers import Engine
from qcompiler.lowering.checkpoint.readers.comparing import continued
from tests.lowering.checkpoint.conftest import compiled, passes_of
from tests.tiny_checkpoint import command

READER = """
import json, os, sys
import numpy as np

request = json.load(open(sys.argv[1]))
assert "PYTHONPATH" not in os.environ
known = np.load(request["directory"] + "/../known.npz")
assert (known["rows"] == np.array(request["rows"])).all()
whole = known["whole"]
if open(request["directory"] + "/error").read() == "of settings":
    raise RuntimeError("1 error\\n  Value error, no such algorithm\\n    more")
whole[:, :, 5] += float(open(request["directory"] + "/error").read())
decoded = whole[:, request["first"] - 1 :].copy()
decoded[:, -2, 5] += float(open(request["directory"] + "/decoding_error").read())
np.savez(sys.argv[2], whole=whole, decoded=decoded, dtype="float32", version="1.2")
"""
PROMPTS = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(0))  # what verify makes for 48 positions
NEW = 24


@pytest.fixture(scope="module")
def out(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native artifact and a checkpoint beside it."""
    directory = tmp_path_factory.mktemp("out")
    result = compiled(graph, passes_of("w4a16-g32"), "checkpoint")
    result.save(directory / "native")
    qc.lower(result, "checkpoint", directory / "checkpoint", verify=False)
    native = result.artifact()
    ids = continued(native, PROMPTS, NEW)
    np.savez(directory / "known.npz", rows=ids.numpy(), whole=native.forward(ids).log_softmax(-1).numpy())
    return directory


@pytest.fixture
def made_up(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An engine that computes what the native artifact does, and the errors that two files of the checkpoint say."""
    (tmp_path / "run.py").write_text(READER)
    engine = Engine("made-up", str(tmp_path / "run.py"), "json", "made-up")
    monkeypatch.setattr("qcompiler.lowering.checkpoint.readers.ENGINES", (engine,))
    for name in ("error", "decoding_error"):
        (out / "checkpoint" / name).write_text("0")
    return out


def test_an_engine_that_computes_the_same(made_up: Path) -> None:
    found = qc.verify(made_up / "checkpoint", "made-up")
    assert (found["reader"], found["version"], found["dtype"]) == ("made-up", "1.2", "float32")
    assert found["max_difference"] < 1e-5
    assert found["cached_difference"] < 1e-5
    assert found["tolerance"] < 0.01
    assert found["greedy_tokens"] == NEW
    assert found["tokens"] == 2 * (23 + NEW)
    report = json.loads((made_up / "native" / "report.json").read_text())
    assert report["targets"]["checkpoint"]["parity with made-up"]["version"] == "1.2"


@pytest.mark.parametrize("kind", ["error", "decoding_error"])
def test_an_engine_that_computes_something_else(kind: str, made_up: Path) -> None:
    (made_up / "checkpoint" / kind).write_text("2.5")
    with pytest.raises(VerificationError, match="does not compute what the native artifact computes"):
        qc.verify(made_up / "checkpoint", "made-up")
    outcome = command("verify", made_up / "checkpoint", "--reader", "made-up", "--json")
    assert outcome.status == 3
    assert outcome.error["type"] == "VerificationError"


def test_the_command(made_up: Path, tmp_path: Path) -> None:
    arguments = ("verify", made_up / "checkpoint", "--reader", "made-up", "--python", sys.executable)
    assert command(*arguments, "--json").result["greedy_tokens"] > 0
    printed = command(*arguments)
    assert printed.status == 0
    assert "greedy_tokens" in printed.output
    assert qc.verify(made_up / "checkpoint", "made-up", tokens=PROMPTS)["greedy_tokens"] == NEW


def test_an_engine_that_does_not_load_it(made_up: Path) -> None:
    (made_up / "checkpoint" / "error").write_text("none")
    with pytest.raises(VerificationError) as caught:
        qc.verify(made_up / "checkpoint", "made-up")
    assert caught.value.got == "ValueError: could not convert string to float: 'none'"
    (made_up / "checkpoint" / "error").write_text("of settings")
    with pytest.raises(VerificationError) as caught:
        qc.verify(made_up / "checkpoint", "made-up")
    assert caught.value.got == "RuntimeError: 1 error Value error, no such algorithm"


def test_an_engine_that_takes_too_long(made_up: Path) -> None:
    with pytest.raises(VerificationError, match="did not end in time"):
        qc.verify(made_up / "checkpoint", "made-up", timeout=0.01)


@pytest.mark.parametrize(
    ("options", "error", "remedy"),
    [
        ({"reader": "vlm"}, TargetError, "did you mean vllm?"),
        ({"reader": "vllm"}, MissingDependencyError, "pip install vllm, or name the Python"),
        ({"reader": "vllm", "python": sys.executable}, MissingDependencyError, "pip install vllm"),
        ({"reader": "vllm", "python": "/nowhere/python"}, InputError, "--python PATH"),
        ({"reader": "vllm", "python": "/bin/false"}, InputError, "--python PATH"),
        ({"reader": "transformers", "checkpoint": "native"}, QCompilerError, ""),
        ({"reader": "transformers", "native": "nowhere"}, QCompilerError, ""),
    ],
)
def test_bad_input(out: Path, options: dict[str, str], error: type[QCompilerError], remedy: str) -> None:
    place = out / options.pop("checkpoint", "checkpoint")
    with pytest.raises(error) as caught:
        qc.verify(place if place.name == "checkpoint" else out / "nothing", **options)  # type: ignore[arg-type]
    assert remedy in (caught.value.remedy or "")


def test_transformers_reads_it(out: Path) -> None:
    found = qc.verify(out / "checkpoint", "transformers")
    assert found["dtype"] == "bfloat16"
    assert 0 < found["max_difference"] <= found["tolerance"]
    result: CompileResult = qc.load(out)
    assert "parity with transformers" in result.report.targets["checkpoint"]
