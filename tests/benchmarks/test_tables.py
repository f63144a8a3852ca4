"""The benchmarks' own arithmetic: what is scored, where, and how the tables put it together."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qcompiler as qc
from benchmarks import decoding, peers, plot, quality, runs
from tests.tiny_checkpoint import POSITIONS, save_checkpoint, write_text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture(scope="module")
def protocol():
    """The drivers' half, which is no package: other tools' interpreters import it from beside the driver."""
    spec = importlib.util.spec_from_file_location("protocol", peers._DRIVERS / "protocol.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def request_(checkpoint, protocol, tmp_path, monkeypatch):
    """A request as `peers` writes it and a driver reads it."""
    options = Namespace(model=checkpoint, text=[write_text(tmp_path / "novel.txt", words=400)], max_tokens=200)
    windows = peers._write_windows(options, tmp_path)
    save_file({"ids": torch.arange(6).view(2, 3)}, tmp_path / "tokens")
    fields = {"model": str(checkpoint), "tokens": str(tmp_path / "tokens"), "windows": str(windows), "method": "m"}
    (tmp_path / "r").write_text(json.dumps({**fields, "threads": torch.get_num_threads(), "out": str(tmp_path)}))
    monkeypatch.setattr(sys, "argv", ["driver", str(tmp_path / "r")])
    return protocol.read_request()


def test_a_driver_scores_as_the_evaluator_does(checkpoint, protocol, request_, tmp_path):
    changed = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if "proj" in name:
                parameter.mul_(1.5)
    found = protocol.evaluate(changed, request_)["novel"]
    changed.save_pretrained(tmp_path / "changed")
    artifact, original = qc.open_artifact(tmp_path / "changed"), qc.open_artifact(checkpoint)
    expected = qc.evaluate(artifact, text=tmp_path / "novel.txt", max_tokens=200, against=original).to_dict()
    assert found["tokens"] == 200 // POSITIONS * (POSITIONS - 1)
    assert found["kl_divergence"] > 1e-4
    assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-5)


def test_a_result_comes_back(protocol, request_):
    assert request_.tokens.tolist() == [[0, 1, 2], [3, 4, 5]]
    result, numbers = protocol.measured(lambda: sum(range(10)))
    protocol.write_result(request_, numbers, {"w": torch.ones(2, dtype=torch.bfloat16)}, texts={"novel": {}})
    fields = json.loads((request_.out / "result.json").read_text())
    assert result == 45
    assert set(fields) == {"cpu_seconds", "wall_seconds", "peak_rss_mb", "grown_mb", "notes", "texts"}
    assert load_file(request_.out / "weights.safetensors")["w"].dtype == torch.float32


def run(model, divergence, **fields):
    costs = {"cpu_seconds": 2.0, "wall_seconds": 3.0, "peak_rss_mb": 400.0, "grown_mb": 50.0, "peak_mb": 500.0}
    texts = {"novel": {"kl_divergence": divergence, "perplexity": 50.0}}
    return {
        "model": model,
        "seed": 0,
        "texts": texts,
        "bits_per_weight": 5.83,
        "mebibytes": 4.0,
        "cache_bytes_per_token": None,
        "inputs_left_in_float": 3,
        **costs,
        **fields,
    }


OPTIONS = Namespace(samples=64, length=512, seeds=[0, 1], max_tokens=40_000, threads=1, text=[Path("novel.txt")])


def test_peers_are_compared_with_their_own_rounding_on_the_same_model():
    table = peers.render(
        [
            run("m", 0.010, tool="a", method="rtn"),
            run("m", 0.004, tool="a", method="gptq"),
            run("m", 0.006, tool="a", method="gptq"),
            run("m", 0.004, tool="a", method="int8"),
            run("m", 0.001, tool="a", method="smoothquant"),
            run("m", 0.001, tool="a", method="fp8"),
            run("m", 0.001, tool="b", method="awq"),
            {"model": "m", "tool": "b", "method": "rtn", "seed": 0, "error": "exit 1: no"},
            run("m, planted", 0.050, tool="a", method="rtn"),
            run("m, planted", 0.005, tool="a", method="gptq"),
        ],
        OPTIONS,
    )
    first, second = table.split("`m, planted`")
    assert "| a | gptq | 2 | 5.000 | 0.500 | 2.0 | 3.0 | 400 | 50 |" in first
    assert "| a | smoothquant | 1 | 1.000 | 0.250 |" in first
    assert "| a | fp8 | 1 | 1.000 | – |" in first
    assert "| b | awq | 1 | 1.000 | – |" in first
    assert "| b | rtn | 0 | – | – | – | – | – | – |" in first
    assert "b rtn seed 0 failed: exit 1: no" in first
    assert "| a | gptq | 1 | 5.000 | 0.100 |" in second


def test_recipes_are_compared_with_rounding_on_the_same_model():
    table = quality.render(
        [
            run("m", 0.010, recipe="w4a16-rtn"),
            run("m", 0.004, recipe="fp8"),
            run("m", 0.006, recipe="fp8"),
            {"model": "m", "recipe": "w8a16", "seed": 0, "error": "exit 1: no"},
            run("m, planted", 0.050, recipe="w8a16"),
        ],
        OPTIONS,
    )
    first, second = table.split("`m, planted`")
    assert "| fp8 | 2 | 5.83 | 4.0 | – | 50.00 | 5.000 | 0.500 | 3 | 2.0 | 500 |" in first
    assert "w8a16 seed 0 failed: exit 1: no" in first
    assert "| w8a16 | 1 | 5.83 | 4.0 | – | 50.00 | 50.000 | – |" in second


def test_a_cache_has_bytes_and_no_bits_of_weights():
    cache = run("m", 0.001, recipe="kv-int8") | {"bits_per_weight": None, "cache_bytes_per_token": 2112}
    assert "| kv-int8 | 1 | – | 4.0 | 2112 | 50.00 | 1.000 |" in quality.render([cache], OPTIONS)


def test_points_of_a_plot_are_means_and_caches_have_none(tmp_path):
    several = [
        run("m", 0.010, recipe="w4a16-rtn"),
        run("m", 0.004, recipe="w8a8-rtn"),
        run("m", 0.006, recipe="w8a8-rtn"),
        run("m", 0.002, recipe="w4a4-rotated"),
        run("m", 0.001, recipe="kv-int8") | {"bits_per_weight": None},
        run("other", 0.100, recipe="w8a16"),
        {"model": "m", "recipe": "w8a16", "seed": 0, "error": "exit 1: no"},
    ]
    found = plot.points(several, "m")
    assert [(point.recipe, point.activations) for point in found] == [
        ("w4a4-rotated", "4 bits"),
        ("w8a8-rtn", "8 bits"),
        ("w4a16-rtn", "float"),
    ]
    assert found[1].divergence == pytest.approx(0.005)
    pytest.importorskip("matplotlib")
    for name in ("first.svg", "second.svg"):
        plot.draw(found, tmp_path / name, "m")
    picture = (tmp_path / "first.svg").read_text()
    assert picture == (tmp_path / "second.svg").read_text()
    assert all(f"<!-- {point.recipe} -->" in picture for point in found)


def test_calibrated_recipes_are_run_for_every_seed():
    names = ("w4a16-rtn", "w4a16-awq", "w8a8-rtn", "w8a8-dynamic", "fp8")
    assert [quality._is_calibrated(name) for name in names] == [False, True, True, False, True]


def test_a_second_model_is_planted(checkpoint, tmp_path):
    assert list(runs.models(checkpoint, None, tmp_path).values()) == [checkpoint]
    original, planted = (qc.open_artifact(path) for path in runs.models(checkpoint, 64, tmp_path).values())
    ids = torch.arange(40)[None]
    assert torch.allclose(planted.forward(ids), original.forward(ids), atol=1e-5)
    before, after = (load_file(Path(artifact.path) / "model.safetensors") for artifact in (original, planted))
    assert any(
        after[name].abs().max() > 30 * before[name].abs().max() for name in before if name.endswith("norm.weight")
    )


def test_an_interruption_leaves_the_last_whole_file(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    path = tmp_path / "new" / "runs.json"
    runs.keep(path, {"runs": [1]})
    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runs.keep(path, {"runs": [1, 2]})
    assert json.loads(path.read_text()) == {"runs": [1]}


def test_the_table_of_decoding_compares_medians_with_the_first():
    made = decoding.table({"original": [2.0, 4.0, 30.0], "onnx": [10.0, 20.0, 12.0]})
    assert made.splitlines()[2:] == ["| original | 4 | 2 to 30 | 1.00 |", "| onnx | 12 | 10 to 20 | 3.00 |"]
