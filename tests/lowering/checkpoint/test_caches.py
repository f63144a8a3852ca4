"""Scales of quantized caches: where they are written, what is said of them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qcompiler as qc
from qcompiler.artifacts import CompileResult, HFArtifact
from qcompiler.artifacts.calibration import Calibration
from qcompiler.artifacts.parity import check_parity
from qcompiler.errors import TargetError, VerificationError
from qcompiler.ir import CacheFormat, cache_formats, float_caches
from qcompiler.ir.graph import Graph
from qcompiler.passes import RTN, Assign, QuantizeKVCache
from qcompiler.passes.recipes import recipe
from qcompiler.protocol import Pass
from tests.lowering.checkpoint import unpacking
from tests.lowering.checkpoint.conftest import Write, compiled, passes_of, save_source

ATTENTION = "model.layers.0.self_attn"
STATIC = QuantizeKVCache("fp8", scales="static")
PER_HEAD = QuantizeKVCache("fp8", scales="static", per_head=True)
MODELOPT = "checkpoint:format=modelopt"


def never(*_: Any) -> None:
    raise AssertionError


def scale_of(result: CompileResult, part: str) -> torch.Tensor:
    """What covers twice the range that was seen, by 8-bit floats up to 448."""
    low, high = result.graph.weights.read(f"cache.0.{part}_range").float().unbind()
    return 2 * torch.maximum(-low, high).max() / 448


@pytest.mark.parametrize("weights", [[Assign("w4a16-g32")], [Assign(None)]], ids=["w4", "float"])
def test_compressed_tensors(weights: list[Pass], graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, "w4a16-g32", passes=[*weights, STATIC, RTN()])
    tensors, config = unpacking.read_tensors(directory), unpacking.read_config(directory)
    for letter, part in (("k", "key"), ("v", "value")):
        stored = tensors[f"{ATTENTION}.{letter}_scale"]
        assert (stored.dtype, list(stored.shape)) == (torch.float32, [1])
        torch.testing.assert_close(stored, scale_of(result, part).reshape(1), rtol=2**-7, atol=0)  # of bfloat16
        assert torch.equal(stored, result.graph.weights.read(f"cache.0.{part}_scale").reshape(1))
    scheme = config["quantization_config"]["kv_cache_scheme"]
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    assert {name: value for name, value in scheme.items() if value is not None} == wanted
    assert not any(name.startswith("cache.") for name in tensors)
    assert report["notes"] == []
    assert report["parity"]["max_difference"] < 0.05
    assert report["parity"]["cached_difference"] < 0.05
    assert "cached in float8_e4m3fn static per tensor" in (directory / "README.md").read_text()


def test_a_scale_for_each_head(graph: Graph, write: Write) -> None:
    directory, report, result = write(graph, "w4a16-g32", passes=[Assign("w8a16"), PER_HEAD, RTN()])
    tensors, config = unpacking.read_tensors(directory), unpacking.read_config(directory)
    for letter, part in (("k", "key"), ("v", "value")):
        low, high = result.graph.weights.read(f"cache.0.{part}_range").float().unbind()
        expected = 2 * torch.maximum(-low, high).amax(-1) / 448
        stored = tensors[f"{ATTENTION}.{letter}_scale"]
        assert (stored.dtype, list(stored.shape)) == (torch.float32, [2, 1, 1])
        torch.testing.assert_close(stored.flatten(), expected, rtol=2**-7, atol=0)
        assert stored.unique().numel() == 2
    scheme = config["quantization_config"]["kv_cache_scheme"]
    wanted = {"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True, "dynamic": False}
    assert {name: value for name, value in scheme.items() if value is not None} == wanted
    assert report["parity"]["cached_difference"] < 0.05
    again = qc.capture(directory)
    assert cache_formats(again) == [CacheFormat("float8_e4m3fn", "static", per_head=True)]
    assert again.lost == []
    for name in ("cache.0.key_scale", "cache.0.value_scale"):
        assert torch.equal(again.weights.read(name), result.graph.weights.read(name))


def test_heads_whose_scales_are_exchanged_are_seen(graph: Graph, write: Write) -> None:
    directory, _, result = write(graph, "w4a16-g32", passes=[Assign("w8a16"), PER_HEAD, RTN()])
    tensors = unpacking.read_tensors(directory)
    tensors[f"{ATTENTION}.v_scale"][0] /= 64
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError):
        check_parity(result.artifact(), HFArtifact(directory), tolerance=1e-3)


def test_a_scale_for_each_head_in_other_targets(graph: Graph, tmp_path: Path) -> None:
    result = compiled(graph, [Assign("w8a16"), PER_HEAD, RTN()], "onnx")
    report = qc.lower(result, "onnx", tmp_path / "out")
    assert report["parity"]["cached_difference"] <= report["parity"]["tolerance"]
    with pytest.raises(TargetError, match="cache of this format") as caught:
        qc.lower(result, "kernels")
    assert caught.value.expected == "no kernel has a static scale for each head"


def test_a_wrong_scale_is_seen(graph: Graph, write: Write) -> None:
    directory, _, result = write(graph, "w4a16-g32", passes=[Assign("w8a16"), STATIC, RTN()])
    tensors = unpacking.read_tensors(directory)
    tensors[f"{ATTENTION}.v_scale"] /= 64  # what lies beyond is clamped
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError):
        check_parity(result.artifact(), HFArtifact(directory), tolerance=1e-3)


def test_modelopt(graph: Graph, write: Write) -> None:
    passes = [*passes_of("fp8-tensor")[:1], STATIC, *passes_of("fp8-tensor")[1:]]
    directory, _, result = write(graph, "fp8-tensor", MODELOPT, passes=passes)
    tensors = unpacking.read_tensors(directory)
    for letter, part in (("k", "key"), ("v", "value")):
        stored = tensors[f"{ATTENTION}.{letter}_proj.{letter}_scale"]
        assert (stored.dtype, list(stored.shape)) == (torch.float32, [])
        torch.testing.assert_close(stored, scale_of(result, part), rtol=2**-7, atol=0)
    config = unpacking.read_config(directory)["quantization_config"]
    beside = json.loads((directory / "hf_quant_config.json").read_text())["quantization"]
    assert config["kv_cache_quant_algo"] == beside["kv_cache_quant_algo"] == "FP8"
    assert config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}


@pytest.mark.parametrize(
    ("family", "attention"),
    [("phi3", "model.layers.0.self_attn"), ("gpt_neox", "gpt_neox.layers.0.attention"), ("qwen3", ATTENTION)],
)
def test_the_module_is_found_by_what_feeds_the_cache(family: str, attention: str, tmp_path: Path, write: Write) -> None:
    """Of one layer for all three, of a module by another name, and with norms between layer and cache."""
    graph = qc.capture(save_source(tmp_path / "source", family))
    directory, report, _ = write(graph, "w8a16", passes=[Assign("w8a16"), STATIC, RTN()])
    names = [name for name in unpacking.read_tensors(directory) if name.endswith(("k_scale", "v_scale"))]
    assert sorted(names) == [f"{attention}.k_scale", f"{attention}.v_scale"]
    is_known = family != "gpt_neox"
    assert report["parity"]["max_difference"] < (0.05 if is_known else report["parity"]["tolerance"])
    assert any("does not round keys and values" in note for note in report["notes"]) is not is_known


@pytest.mark.parametrize(
    ("target", "cache", "remedy"),
    [
        ("checkpoint", QuantizeKVCache("fp8"), "choose kv-fp8-static"),
        ("checkpoint", QuantizeKVCache("int8", scales="static"), "choose kv-fp8-static"),
        (MODELOPT, QuantizeKVCache("int4"), "choose kv-fp8-static"),
        (MODELOPT, PER_HEAD, "choose kv-fp8-static, or write format=compressed-tensors"),
        ("checkpoint:format=gptq", STATIC, "write format=compressed-tensors"),
        ("checkpoint:format=awq", STATIC, "write format=compressed-tensors"),
    ],
)
def test_what_engines_make_themselves_is_refused_ahead_of_calibration(
    target: str, cache: QuantizeKVCache, remedy: str, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QuantizeKVCache, "rewrite", never)
    scheme = "fp8-dynamic" if target == MODELOPT else "w4a16-g32"
    with pytest.raises(TargetError, match="cache of this format") as caught:
        compiled(graph, [passes_of(scheme)[0], cache, *passes_of(scheme)[1:]], target)
    assert str(caught.value.remedy).startswith(remedy)


def test_a_half_quantized_cache(graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused ahead of calibration, and where it was compiled for something else."""
    passes = [Assign("w8a16"), QuantizeKVCache("fp8", scales="static", keys="float"), RTN()]
    result = qc.compile(graph, passes, Calibration.from_tokens(torch.arange(48).reshape(4, 12)))
    with pytest.raises(TargetError, match="engines have one format for all"):
        qc.lower(result, "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(QuantizeKVCache, "rewrite", never)
    with pytest.raises(TargetError, match="engines have one format for all") as caught:
        compiled(graph, passes, "checkpoint")
    assert caught.value.where == "checkpoint: cache.0.key"
    assert caught.value.got == "float beside float8_e4m3fn static per tensor"
    assert str(caught.value.remedy).startswith("quantize both keys and values of all layers, or leave")


def test_a_layer_whose_cache_is_not_recognized(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = float_caches(graph)
    monkeypatch.setattr("qcompiler.passes.quantize_kv_cache.float_caches", lambda graph: float_caches(graph)[1:])
    monkeypatch.setattr(QuantizeKVCache, "rewrite", never)
    with pytest.raises(TargetError, match="engines have one format for all") as caught:
        compiled(graph, [Assign("w8a16"), STATIC, RTN()], "checkpoint")
    assert caught.value.where == f"checkpoint: {caches[0].name}"


def test_modelopt_with_nothing_but_a_cache(graph: Graph, tmp_path: Path) -> None:
    result = compiled(graph, [STATIC], MODELOPT)
    with pytest.raises(TargetError, match="no algorithm"):
        qc.lower(result, MODELOPT, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_recipe_by_name() -> None:
    assert recipe("kv-fp8-static") == (STATIC,)
    assert STATIC in recipe("w4a16-gptq+kv-fp8-static")
    assert recipe("kv-fp8-static-head") == (PER_HEAD,)
