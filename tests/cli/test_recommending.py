"""`qcompiler recommend`, `qcompiler hardware`, `qcompiler compile --for`: what they print, and what they refuse."""

import json
from pathlib import Path

import pytest

from qcompiler.cli.recommending import parse_count
from qcompiler.errors import InputError
from tests.tiny_checkpoint import command, save_checkpoint

LLAMA = ("--params", "70B", "--layers", 80, "--hidden", 8192, "--kv-heads", 8, "--head-dim", 128)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("for") / "model")


def test_a_recommendation_in_a_terminal() -> None:
    outcome = command("recommend", "--gpu", "h100", *LLAMA)
    assert outcome.status == 0
    assert "w4a16-awq+kv-fp8-static" in outcome.output
    assert "163,840 bytes per token" in outcome.output
    assert "qcompiler compile MODEL --recipe w4a16-awq+kv-fp8-static --to checkpoint --output OUT" in outcome.output
    assert "arXiv 2306.00978" in outcome.output
    assert "vLLM by checkpoint (layers fused, cache fused)" in outcome.output
    assert "note: training" in outcome.output
    everything = command("recommend", "--gpu", "h100", "--all", *LLAMA).output
    assert "nvfp4: NVIDIA H100 SXM does not multiply float4" in everything
    assert "fp8: needs" in everything


def test_a_recommendation_as_json() -> None:
    found = command("recommend", "--gpu", "h100", "--context", 32768, "--batch", 1, "--json", *LLAMA).result
    assert found["recommendation"] == "w4a16-awq+kv-fp8-static"
    assert (found["context"], found["batch"]) == (32768, 1)
    assert found["options"][0]["rank"] == 1
    assert found["options"][1]["why_not_first"]


def test_recipes_that_are_named(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text('base = "w4a16-gptq"\n')
    arguments = ("--gpu", "h200", "-r", own, "-r", "w8a16", "--json", *LLAMA)
    found = command("recommend", *arguments).result
    assert [option["recipe"] for option in found["options"]] == ["w8a16", str(own)]
    assert found["refused"] == {}


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (("--gpu", "h10", *LLAMA), "InputError", "h100"),
        (("--gpu", "h100"), "InputError", "neither"),
        (("--gpu", "h100", "--params", "70B"), "InputError", "no layers"),
        (("--gpu", "h100", "--params", "lots"), "InputError", "lots"),
        (("--gpu", "h100", "--context", -1, *LLAMA), "InputError", "-1"),
        (("--gpu", "rtx-3090", *LLAMA), "InputError", "GB too much"),
        (("nowhere", "--gpu", "h100"), "InputError", "nowhere"),
        (("--gpu", "h100", "--hardware", "nowhere.toml", *LLAMA), "InputError", "nowhere.toml"),
    ],
)
def test_bad_questions(arguments: tuple[object, ...], kind: str, said: str) -> None:
    outcome = command("recommend", *arguments, "--json")
    assert outcome.status == 2
    assert outcome.error["type"] == kind
    assert said in " ".join(outcome.error.values())


def test_hardware() -> None:
    shown = command("hardware", "--no-measure").output
    for key in ("a100-40gb", "h100-pcie", "rtx-pro-6000", "mi355x", "grace"):
        assert key in shown
    one = command("hardware", "mi300x").output
    assert "AMD Instinct MI300X data sheet" in one
    assert "float8 2614.9" in one
    listed = command("hardware", "--no-measure", "--json").result["hardware"]
    assert len(listed) == 18
    assert all(item["source"] for item in listed)
    assert "did you mean h100" in command("hardware", "h1000").errors


def test_compile_for_a_gpu(model: Path, tmp_path: Path) -> None:
    outcome = command("compile", model, "-o", tmp_path / "out", "--for", "rtx-4090", "--context", 64, "--json")
    assert outcome.result["recommended"]["recipe"] == "w8a16"
    assert outcome.result["recommended"]["hardware"] == "rtx-4090"
    assert "for NVIDIA GeForce RTX 4090: w8a16 (goal quality, 1 x 64 tokens" in outcome.errors
    assert {site["scheme"] for site in outcome.result["sites"]} == {"int8 per_channel symmetric"}


@pytest.mark.slow
def test_a_checkpoint_for_a_gpu(model: Path, tmp_path: Path) -> None:
    arguments = ("--for", "rtx-4090", "--context", 64, "--to", "checkpoint")
    outcome = command("compile", model, "-o", tmp_path / "out", *arguments, "--json")
    assert outcome.result["recommended"]["recipe"] == "w8a16"
    config = json.loads((tmp_path / "out" / "checkpoint" / "config.json").read_text())
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == 8


def test_compile_for_a_gpu_fits_the_target(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def stop(*arguments: object, **options: object) -> None:
        seen.append(arguments[1])
        raise InputError("far enough")

    monkeypatch.setattr("qcompiler.api.check_arguments", stop)
    command("compile", model, "-o", tmp_path / "out", "--for", "a100", "--to", "tensorrt")
    outcome = command("compile", model, "-o", tmp_path / "out", "--for", "a100", "--to", "tensorrt", "-r", "w8a16")
    assert seen == ["w8a16", "w8a16"]
    assert "to tensorrt:sm=80" in outcome.errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--for", "h10"), "did you mean h100"),
        (("--for", "h100", "--goal", "training"), "nothing is to be quantized"),
        (("--for", "h100", "--context", 65), "longer than the model takes"),
        (("--recipe", "w8a16", "--context", 64), "give --for GPU"),
        (("--for", "a100", "--recipe", "fp8"), "does not multiply float8"),
        (("--for", "h100", "--to", "nowhere"), "unknown target"),
    ],
)
def test_compile_for_what_cannot_be(model: Path, tmp_path: Path, arguments: tuple[object, ...], said: str) -> None:
    outcome = command("compile", model, "-o", tmp_path / "out", *arguments)
    assert outcome.status == 2
    assert said in outcome.errors
    assert not (tmp_path / "out").exists()


def test_counts() -> None:
    assert [parse_count(text) for text in ("70B", "135m", "6.74e9", "1T", "2k")] == [70e9, 135e6, 6.74e9, 1e12, 2e3]
    for text in ("", "B", "many"):
        with pytest.raises(InputError, match="not a number of parameters"):
            parse_count(text)
