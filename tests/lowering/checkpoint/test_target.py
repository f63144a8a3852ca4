"""The target as a whole: files, faults that the comparison sees, and bad input, which leaves nothing behind."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import qcompiler as qc
from qcompiler.artifacts import CompileResult, HFArtifact
from qcompiler.artifacts.parity import check_parity
from qcompiler.errors import InputError, MissingDependencyError, QCompilerError, TargetError, VerificationError
from qcompiler.ir.graph import Graph
from qcompiler.lowering.checkpoint import CheckpointTarget
from qcompiler.lowering.checkpoint.contents import pack_words
from qcompiler.to_target import check_target
from tests.lowering.checkpoint import unpacking
from tests.lowering.checkpoint.conftest import Write, compiled, passes_of

DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def result(graph: Graph) -> CompileResult:
    return compiled(graph, passes_of("w4a16-g32-asym"), "checkpoint")


def test_files(source: Path, graph: Graph, write: Write) -> None:
    directory, report, _ = write(graph, "w4a16-g32")
    names = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in directory.iterdir()) == report["files"] == names
    assert report["bytes"] == sum(path.stat().st_size for path in directory.iterdir())
    assert (report["target"], report["format"], report["ignored"]) == ("checkpoint", "compressed-tensors", ["lm_head"])
    assert report["notes"] == []
    card = (directory / "README.md").read_text()
    assert "| int4 g32 symmetric, float | 7 |" in card
    assert "tags: [qcompiler, quantized, compressed-tensors]" in card
    assert CheckpointTarget.wrote(directory)
    assert not CheckpointTarget.wrote(source)


def test_what_is_opened_computes_what_was_compiled(graph: Graph, write: Write) -> None:
    directory, _, result = write(graph, "w4a16-g32-asym", verify=False)
    ids = torch.randint(61, (2, 9))
    opened = CheckpointTarget.open(directory, exact=True, device="cpu")
    torch.testing.assert_close(opened.forward(ids), result.artifact().forward(ids), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w4a16-g32-asym"])
def test_what_the_card_says_loads_it(scheme: str, graph: Graph, write: Write) -> None:
    directory, _, result = write(graph, scheme, verify=False)
    code = (directory / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert ("dequantize=True" in code) is scheme.endswith("asym")
    names: dict[str, Any] = {}
    exec(code.replace("PATH", str(directory)), names)  # what a reader would paste
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        found = names["model"](ids)
    expected = result.artifact().forward(ids)
    assert float((found.logits.float() - expected).abs().max()) < 0.05 * float(expected.abs().max())  # in bfloat16


def flip_a_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_scale"][3, 1] *= -1


def flip_codes(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_packed"][5] ^= 0x11111111


def flip_a_zero_point(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weight_zero_point"][0, 2] ^= 0x7


def rename(tensors: dict[str, Tensor]) -> None:
    tensors[f"{DOWN}.weights_scale"] = tensors.pop(f"{DOWN}.weight_scale")


def change_a_norm(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight"][7] += 1


@pytest.mark.parametrize("damage", [flip_a_scale, flip_codes, flip_a_zero_point, rename, change_a_norm])
def test_damage_is_seen(damage: Callable[[dict[str, Tensor]], None], result: CompileResult, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    assert qc.lower(result, "checkpoint", directory)["parity"]["max_difference"] == 0
    tensors = unpacking.read_tensors(directory)
    damage(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(QCompilerError) as caught:
        check_parity(result.artifact(), HFArtifact(directory), tolerance=1e-3)
    assert caught.value.what in (
        "what was written does not compute what the native artifact computes",
        "the checkpoint lacks parameters of the model",
    )


def test_a_writer_with_a_fault_leaves_nothing(
    result: CompileResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = "qcompiler.lowering.checkpoint.compressed_tensors.pack_words"
    monkeypatch.setattr(place, lambda codes, bits: pack_words(codes.roll(1, -1), bits))
    with pytest.raises(VerificationError):
        qc.lower(result, "checkpoint", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_the_library(graph: Graph, result: CompileResult, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def missing(name: str, *rest: Any) -> Any:
        return None if name == "compressed_tensors" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", missing)
    assert CheckpointTarget.missing_packages() == ["compressed-tensors"]
    for attempt in (
        lambda: compiled(graph, passes_of("w4a16-g32"), "checkpoint"),
        lambda: check_target(result, CheckpointTarget()),
    ):
        with pytest.raises(MissingDependencyError) as caught:
            attempt()
        assert caught.value.remedy == "pip install compressed-tensors"
    compiled(graph, passes_of("w4a16-g32"), "checkpoint:format=gptq")


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq", "modelopt"])
def test_a_directory_with_something_in_it(name: str, graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    target = f"checkpoint:format={name}"
    with pytest.raises(InputError, match="not empty"):
        qc.lower(compiled(graph, passes_of("w4a16-g32"), target), target, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("options", [{"format": "ggml"}, {"shard_bytes": 0}])
def test_options_that_it_does_not_take(options: dict[str, Any]) -> None:
    with pytest.raises(TargetError):
        CheckpointTarget(**options)


def test_a_model_that_stays_float(graph: Graph, write: Write) -> None:
    directory, report, _ = write(graph, "w4a16-g32", overrides={"*": None})
    assert "quantization_config" not in unpacking.read_config(directory)
    assert report["parity"]["max_difference"] == 0


def test_what_a_config_says_of_the_weights_of_the_source(graph: Graph, tmp_path: Path) -> None:
    result = compiled(graph, passes_of("w4a16-g32", {"*": None}), "checkpoint")
    says = {"quantization_config": {"quant_method": "fp8"}, "transformers_weights": "elsewhere.safetensors"}
    result.graph.provenance["config"] = {**result.graph.provenance["config"], **says}
    qc.lower(result, "checkpoint", tmp_path / "out")
    assert not says.keys() & unpacking.read_config(tmp_path / "out").keys()
