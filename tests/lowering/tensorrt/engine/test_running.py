import base64
import json
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qcompiler.ir import Port
from qcompiler.lowering.tensorrt.engine import command_lines, default_profiles, parse_profiles, run_script

imitation = pytest.importorskip("tests.lowering.tensorrt.engine.imitation")

LENGTH, PIECE, VOCAB = 24, 4, 32
IDS = Port("input_ids", "ids", "int64", ("batch", "sequence"))
MASK = Port("attention_mask", "mask", "int64", ("batch", "past_sequence + sequence"))
POSITIONS = Port("position_ids", "positions", "int64", ("batch", "sequence"))
KEYS = Port("past_key_values.0.key", "past", "float16", ("batch", 1, "past_sequence", 1), 0, "key")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run.py`` with a plan of the imitation: it continues with the sum of what it was given, of 32 tokens."""
    onnx, np = pytest.importorskip("onnx"), pytest.importorskip("numpy")
    pytest.importorskip("onnxruntime")
    tokenizers = pytest.importorskip("tokenizers")
    node, types = onnx.helper.make_node, onnx.TensorProto
    constants = {"ids_as": np.array([1, 1, -1, 1]), "vocab": np.array(VOCAB), "zero": np.array([0])}
    constants["ends"] = np.array([0, 1], dtype=np.float32)
    nodes = [
        node("Cast", ["input_ids"], ["half"], to=types.FLOAT16),
        node("Reshape", ["half", "ids_as"], ["new"]),
        node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        node("Cast", ["present.0.key"], ["all"], to=types.INT64),
        node("ReduceSum", ["all"], ["sum"], keepdims=0),
        node("ReduceSum", ["attention_mask"], ["length"], keepdims=0),
        node("ReduceMax", ["position_ids"], ["last"], keepdims=0),
        node("Sum", ["sum_f", "length_f", "last_f"], ["total_f"]),
        node("Cast", ["total_f"], ["total"], to=types.INT64),
        node("Mod", ["total", "vocab"], ["next"]),
        node("Mul", ["input_ids", "zero"], ["zeros"]),
        node("Add", ["zeros", "next"], ["each"]),
        node("OneHot", ["each", "vocab", "ends"], ["logits"]),
    ]
    for place, name in enumerate(("sum", "length", "last")):
        nodes.insert(7 + place, node("Cast", [name], [f"{name}_f"], to=types.FLOAT))
    value, ports = onnx.helper.make_tensor_value_info, (IDS, MASK, POSITIONS, KEYS)
    kinds = {"int64": types.INT64, "float16": types.FLOAT16}
    graph = onnx.helper.make_graph(
        nodes,
        "sums",
        [value(port.name, kinds[port.dtype], port.shape) for port in ports],
        [value("logits", types.FLOAT, None), value("present.0.key", types.FLOAT16, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    found = tmp_path_factory.mktemp("engine")
    profiles = [
        {name: [three[0], three[2]] for name, three in profile.shapes.items()}
        for profile in default_profiles(ports, length=LENGTH, piece=PIECE)
    ]
    plan = {"model": base64.b64encode(model.SerializeToString()).decode(), "profiles": profiles}
    (found / "engine-sm89.plan").write_text(json.dumps(plan))
    (found / "engine-sm120.plan").write_text("of another version")
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(found / "tokenizer.json"))
    (found / "config.json").write_text(json.dumps({"eos_token_id": 99}))
    (found / "run.py").write_text(run_script("tensorrt_rtx", "1.2"))
    return found


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs ``run.py`` in this process, on the imitation; gives what it printed, or the message that it ended with."""

    def ran(*arguments: str, gpu: tuple[int, int] = (8, 9), script: Path = folder / "run.py") -> str:
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: gpu)
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as end:
            return str(end)
        return capsys.readouterr().out

    for name in ("empty", "tensor"):
        monkeypatch.setattr(torch, name, _on_cpu(getattr(torch, name)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 7})())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", imitation)
    return ran


def _on_cpu(function):
    return lambda *arguments, device, **options: function(*arguments, **options)


def continued(ids, count, end=None):
    """What the model of ``folder`` says, written down once more."""
    ids, found = list(ids), []
    while len(found) < count and len(ids) <= LENGTH:
        found.append((sum(ids) + len(ids) + len(ids) - 1) % VOCAB)
        ids.append(found[-1])
        if found[-1] == end:
            break
    return found


def words(ids):
    return " ".join(f"w{i}" for i in ids)


@pytest.mark.parametrize("prompt", [[3], [1, 2, 3], [1, 2, 3, 4], [5, 6, 7, 8, 9, 10], list(range(20))])
def test_a_prompt_is_continued_through_the_cache(run, prompt):
    assert run(words(prompt), "--tokens", "7") == words(prompt) + words(continued(prompt, 7)) + "\n"


@pytest.mark.parametrize("prompt", [[3], [1, 2], [1, 2, 3], [5, 6, 7, 8, 9, 10], list(range(20))])
def test_what_is_too_short_to_be_read_at_once_is_read_one_by_one(run, folder, tmp_path, prompt):
    plan = json.loads((folder / "engine-sm89.plan").read_text())
    for name, axis in (("input_ids", 1), ("position_ids", 1), ("attention_mask", 1)):
        plan["profiles"][0][name][0][axis] = 3
    (tmp_path / "longer.plan").write_text(json.dumps(plan))
    said = run(words(prompt), "--tokens", "7", "--plan", str(tmp_path / "longer.plan"))
    assert said == words(prompt) + words(continued(prompt, 7)) + "\n"


def test_it_ends_where_the_engine_or_the_model_does(run, folder):
    found = continued([1, 2], 1000)
    assert len(found) == LENGTH - 1
    assert run(words([1, 2]), "--tokens", "1000") == words([1, 2]) + words(found) + "\n"
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [found[2], 77]}))
    try:
        assert run(words([1, 2])) == words([1, 2]) + words(continued([1, 2], 1000, found[2])) + "\n"
    finally:
        settings.unlink()


def test_help_says_how_it_was_checked(folder):
    command = [sys.executable, folder / "run.py", "--help"]
    assert "not yet on a GPU" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("prompt", "gpu", "said"),
    [
        ("w1", (9, 0), "run.py: no engine-sm90.plan here, but engine-sm120.plan, engine-sm89.plan"),
        ("w1", (12, 0), "run.py: engine-sm120.plan does not load on sm120 with 1.0; tensorrt_rtx 1.2 built it"),
        ("", (8, 9), "run.py: a prompt of 0 tokens; the engine takes 1 to 23"),
        ("w1 " * 24, (8, 9), "run.py: a prompt of 24 tokens; the engine takes 1 to 23"),
    ],
)
def test_what_cannot_run_is_one_message(run, prompt, gpu, said):
    assert run(prompt, gpu=gpu) == said


def test_without_a_gpu_it_says_so(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("w1") == "run.py: torch sees no NVIDIA GPU (or no driver), and engines run on nothing else"


def test_without_tensorrt_it_says_so(run, monkeypatch, tmp_path):
    (tmp_path / "run.py").write_text(run_script("tensorrt", "11.4"))
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.11 is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    said = "run.py needs tensorrt 11.4, torch and tokenizers: libnvinfer.so.11 is missing"
    assert run("w1", script=tmp_path / "run.py") == said


def test_command_lines_build_the_same_engine():
    profiles = parse_profiles("a:sequence=1..2..4:past_sequence=0..8/b:sequence=1:past_sequence=0..5..9", (IDS, KEYS))
    lines = command_lines("my model.onnx", "e.plan", profiles, capability=89, weight_streaming=True, workspace=1 << 29)
    assert shlex.split(lines["trtexec"]) == [
        "trtexec",
        "--onnx=my model.onnx",
        "--profile=0",
        "--minShapes=input_ids:1x1,past_key_values.0.key:1x1x0x1",
        "--optShapes=input_ids:1x2,past_key_values.0.key:1x1x8x1",
        "--maxShapes=input_ids:1x4,past_key_values.0.key:1x1x8x1",
        "--profile=1",
        "--minShapes=input_ids:1x1,past_key_values.0.key:1x1x0x1",
        "--optShapes=input_ids:1x1,past_key_values.0.key:1x1x5x1",
        "--maxShapes=input_ids:1x1,past_key_values.0.key:1x1x9x1",
        "--allowWeightStreaming",
        "--memPoolSize=workspace:512",
        "--profilingVerbosity=detailed",
        "--saveEngine=e.plan",
        "--skipInference",
        "--stronglyTyped",
    ]
    rtx = shlex.split(lines["tensorrt_rtx"])
    assert rtx[0] == "tensorrt_rtx"
    assert rtx[-1] == "--computeCapabilities=89"
    assert "--stronglyTyped" not in rtx
    only = command_lines("m.onnx", "e.plan", profiles[:1], capability=120)["trtexec"]
    assert "--profile=" not in only
