"""What the target says ahead of calibration, and what it does without TensorRT or with a builder that fails."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler as qc
from qcompiler.errors import MissingDependencyError, TargetError, VerificationError
from qcompiler.ir.cache_format import CacheFormat
from qcompiler.lowering.tensorrt import TensorRTTarget, writer
from qcompiler.lowering.tensorrt.engine import Placement
from qcompiler.lowering.tensorrt.support import equal_blocks
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import RTN
from qcompiler.to_target import write_target
from tests.tiny_checkpoint import save_checkpoint


@pytest.mark.parametrize(
    ("name", "sm", "status", "reason"),
    [
        ("w4a16-g128", "80", "fused", ""),
        ("w4a16-g96-asym", "89", "refused", "do not divide"),
        ("w4a16-channel", "89", "fused", ""),
        ("w3a16-g64", "89", "fused", "stored in 4 bits"),
        ("w8a16", "89", "fused", ""),
        ("w8a16-g64", "89", "runs", "INT8 weights in groups"),
        ("w8a8", "80", "fused", ""),
        ("w8a8-dynamic", "80", "fused", ""),
        ("w8a8-dyngroup", "80", "fused", "product is one of floats"),
        ("w4a8-dynamic", "80", "fused", "product is one of floats"),
        ("w4a16-lut", "89", "refused", "codebooks"),
        ("fp8", "89", "fused", ""),
        ("fp8", "86", "refused", "FP8 needs SM 89"),
        ("fp8-e5m2", "89", "refused", "E5M2"),
        ("fp8-block", "89", "runs", "FP8 weights in groups"),
        ("nvfp4", "120", "fused", ""),
        ("nvfp4a16", "120", "runs", "dequantized anew"),
        ("nvfp4", "89", "refused", "need SM 120"),
        ("mxfp4", "120", "runs", "no product of these"),
        ("w4a16-g128", "75", "refused", "INT4 needs SM 80"),
        ("w4a16-g128", "75+89", "refused", "INT4 needs SM 80"),  # the least of the GPUs decides
    ],
)
def test_support(name, sm, status, reason):
    support = TensorRTTarget(sm).supports(Scheme.parse(name), 256)
    assert support.status == status
    assert re.search(reason, support.reason) if reason else support.reason == ""


def test_support_in_bfloat16():
    target = TensorRTTarget(float_dtype="bfloat16")
    assert target.supports(Scheme.parse("w4a16-g128"), 256).status == "fused"
    assert target.supports(Scheme.parse("w8a8"), 256).status == "fused"
    support = target.supports(Scheme.parse("w8a16"), 256)
    assert (support.status, "bfloat16" in support.reason) == ("runs", True)


def test_support_of_caches():
    assert TensorRTTarget("89").supports_cache(CacheFormat("int4", group_size=16)).status == "runs"
    assert TensorRTTarget("89").supports_cache(CacheFormat("float8_e4m3fn")).status == "runs"
    assert TensorRTTarget("80").supports_cache(CacheFormat("float8_e4m3fn")).status == "refused"


def test_one_scale_per_channel_becomes_equal_blocks():
    assert [equal_blocks(width) for width in (4096, 576, 128, 48, 16, 100, 7)] == [128, 64, 64, 16, 8, None, None]


@pytest.mark.parametrize("sm", ["", "89,80", "sm89", "89+89", "8.9"])
def test_what_is_no_compute_capability(sm):
    with pytest.raises(TargetError, match="compute capabilities"):
        TensorRTTarget(sm)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return qc.compile(
        save_checkpoint(tmp_path_factory.mktemp("tiny") / "model", layers=1), [RTN(bits=4, group_size=16)]
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sm": "90"}, "(?s)the builder does not know this compute capability.*on a GPU of SM 90"),
        ({"length": 65}, "longer than the model's positions"),
        ({"profiles": "decode:sequence=1:past_sequence=0..99"}, "longer texts than the model"),
        ({"profiles": "decode:sequence=9..1:past_sequence=0"}, "sizes of a profile do not hold"),
    ],
)
def test_what_cannot_be_built_is_refused_ahead_of_work(options, words, result, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(TargetError, match=words):
        qc.lower(result, "tensorrt", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("sm", "words"), [("86", "tensorrt-rtx"), ("90", "on a GPU of SM 90")])
def test_without_tensorrt_the_onnx_is_written_and_held_to_the_rules(sm, words, result, tmp_path, monkeypatch):
    def missing(*_: object, **__: object) -> None:
        raise MissingDependencyError("no TensorRT")

    monkeypatch.setattr(writer, "find_api", missing)
    report = qc.lower(result, "tensorrt", tmp_path / "out", sm=sm, verify=False)
    assert report["engines"] == {}
    assert any(f"no engine for SM {sm}" in note and words in note for note in report["notes"])
    assert {"model.onnx", "model.onnx.data", "layers.json"} <= set(report["files"])
    assert not any(name.endswith(".plan") for name in report["files"])


def test_a_gpu_without_rules_of_its_own_has_those_of_its_kin(result, tmp_path, monkeypatch):
    def missing(*_: object, **__: object) -> None:
        raise MissingDependencyError("no TensorRT")

    monkeypatch.setattr(writer, "find_api", missing)
    asked: list[list[int]] = []
    honest = writer.check_rules

    def heard(model: Any, sm: list[int]) -> Any:
        asked.append(sm)
        return honest(model, sm)

    monkeypatch.setattr(writer, "check_rules", heard)
    qc.lower(result, "tensorrt", tmp_path / "out", sm="90+89", verify=False)
    assert asked
    assert all(sm == [89] for sm in asked)


def test_a_builder_that_fails_leaves_nothing(result, tmp_path, monkeypatch):
    def failing(*_: object, **__: object) -> None:
        raise TargetError("the builder crashed")

    monkeypatch.setattr(writer, "build_engine", failing)
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(TargetError, match="the builder crashed"):
        qc.lower(result, "tensorrt", tmp_path / "out")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_findings_come_first_and_strict_makes_them_errors(result, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    site = next(iter(result.graph.schemes))
    honest = writer.fused_linears

    def one_is_not(layers: Any, nodes: Any) -> Any:
        found = honest(layers, nodes)
        return found | {site: (Placement(site, 1, None, None, (), (), False, "dequantized by a kernel of its own"),)}

    monkeypatch.setattr(writer, "fused_linears", one_is_not)
    report = qc.lower(result, "tensorrt", tmp_path / "out", verify=False)
    assert report["findings"] == [
        {"where": site, "engine": "sm89", "profile": "decode", "reason": "dequantized by a kernel of its own"}
    ]
    assert report["notes"][0] == "1 not fused for sm89, decode: dequantized by a kernel of its own"
    kept = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert kept["findings"] == report["findings"]
    with pytest.raises(VerificationError, match="fused a quantized layer or an attention nowhere"):
        qc.lower(result, "tensorrt", tmp_path / "strict", verify=False, strict=True)


def test_an_engine_in_bfloat16(result, tmp_path):
    """Values of 8 bits of mantissa: what is written is evaluated operator by operator, and differs by as much."""
    pytest.importorskip("tensorrt_rtx")
    report = qc.lower(result, "tensorrt", tmp_path / "out", float_dtype="bfloat16", strict=True)
    engine = report["engines"]["89"]
    assert (engine["fused_linears"], engine["fused_attentions"]) == ("7 of 7", "1 of 1")
    assert engine["attention_kernels"] == ["gemm_mha_v2", "gemv_mha_v1"]
    assert 2e-4 < report["parity"]["mean_difference"] < 2e-2
    layers = json.loads((tmp_path / "out" / "layers.json").read_text())["engines"]["89"]["layers"]
    read = {tensor["dtype"] for layer in layers for tensor in layer["inputs"]}
    assert "BFloat16" in read
    assert "Half" not in read


def test_progress_of_the_builder_is_told(result, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    told: list[tuple[int, int, str]] = []
    target = TensorRTTarget(length=16)
    write_target(result, target, tmp_path / "out", verify=False, progress=lambda *state: told.append(state))
    assert told
    assert all(isinstance(done, int) and isinstance(total, int) and what for done, total, what in told)


def test_weights_of_bytes_alone_get_a_decode_profile_of_two_tokens(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    made = qc.compile(save_checkpoint(tmp_path / "model", layers=1), "w8a16")
    report = qc.lower(made, "tensorrt", tmp_path / "out", verify=False)
    profiles = json.loads((tmp_path / "out" / "layers.json").read_text())["profiles"]
    assert profiles[1]["shapes"]["input_ids"] == [[1, 1], [1, 1], [1, 2]]
    assert report["engines"]["89"]["fused_linears"] == "7 of 7"


def test_ports_of_packed_codes_are_int4(tmp_path):
    onnx = pytest.importorskip("onnx")
    made = qc.compile(save_checkpoint(tmp_path / "model", layers=1), "kv-int4")
    qc.lower(made, TensorRTTarget(length=32), tmp_path / "out", verify=False)
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    types = {port.name: port.type.tensor_type.elem_type for port in (*model.graph.input, *model.graph.output)}
    for name in ("past_key_values.0.key", "present.0.key"):
        assert types[name] == onnx.TensorProto.INT4
    for name in ("past_key_values.0.key_zero_point", "present.0.key_zero_point"):
        assert types[name] == onnx.TensorProto.INT8


def test_a_folder_is_opened_and_recognised(result, tmp_path):
    qc.lower(result, "tensorrt", tmp_path / "out", verify=False)
    assert TensorRTTarget.wrote(Path(tmp_path / "out"))
    assert not TensorRTTarget.wrote(tmp_path)
    ids = torch.arange(8)[None]
    assert qc.open_artifact(tmp_path / "out").forward(ids).shape == (1, 8, 4096)
