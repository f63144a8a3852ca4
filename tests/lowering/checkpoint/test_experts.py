"""Experts of mixtures: matrix by matrix under the names of the source, whatever transformers merges them into."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import qcompiler as qc
from qcompiler.artifacts import CompileResult, HFArtifact
from qcompiler.errors import TargetError
from qcompiler.ir.graph import Graph
from qcompiler.storage import read_companions
from tests.frontend.checkpoints.comparing import assert_same_parts
from tests.lowering.checkpoint import unpacking
from tests.lowering.checkpoint.conftest import Write, compiled, native_weight, passes_of, save_source

MIXTURE = "model.layers.0.block_sparse_moe"
STACKS = "model.layers.0.mlp.experts"
ROWS = {"w1": ("gate_up_proj", 0, 48), "w3": ("gate_up_proj", 48, 48), "w2": ("down_proj", 0, 32)}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts, 32 to 48 to 32."""
    return save_source(tmp_path_factory.mktemp("mixtral"), "mixtral")


@pytest.fixture(scope="module")
def mixture(mixtral: Path) -> Graph:
    return qc.capture(mixtral)


def unpacked(tensors: dict[str, Tensor], name: str, scheme: str) -> np.ndarray:
    """A matrix, number by number."""
    if scheme.startswith("w4"):
        return unpacking.packed_integers(tensors, name, 4)
    if scheme.startswith("nvfp4"):
        whole = tensors[f"{name}.weight_global_scale"].numpy()
        scales = unpacking.e4m3_matrix(tensors[f"{name}.weight_scale"]) / whole
        return unpacking.scaled(unpacking.fp4_matrix(tensors[f"{name}.weight_packed"]), scales)
    scale = unpacking.numbers(tensors[f"{name}.weight_scale"])
    codes = tensors[f"{name}.weight"]
    values = codes.numpy() if codes.dtype == torch.int8 else unpacking.e4m3_matrix(codes)
    return unpacking.scaled(values, scale.reshape(-1, 1))


@pytest.mark.parametrize(
    "scheme", ["w4a16-g16", "w4a16-g16-asym", "w4a16-channel-asym", "w8a8-dynamic", "fp8-tensor-dynamic", "nvfp4a16"]
)
def test_every_matrix_under_its_own_name(scheme: str, mixtral: Path, mixture: Graph, write: Write) -> None:
    directory, report, result = write(mixture, scheme)
    before, tensors = unpacking.read_tensors(mixtral), unpacking.read_tensors(directory)
    for name in (name.removesuffix(".weight") for name in before if ".experts." in name):
        number, part = name.split(".")[-2:]
        stack, first, rows = ROWS[part]
        expected = native_weight(result.graph, f"{STACKS}.{stack}.{number}")[first : first + rows]
        np.testing.assert_allclose(unpacked(tensors, name, scheme), expected, rtol=2**-22)
    layers = {re.sub(r"\.weight\w*$|\.input_\w+$", "", name) for name in tensors}
    assert layers == {name.removesuffix(".weight") for name in before}
    assert torch.equal(tensors[f"{MIXTURE}.gate.weight"], before[f"{MIXTURE}.gate.weight"])
    ignored = unpacking.read_config(directory)["quantization_config"]["ignore"]
    assert sorted(ignored) == report["ignored"] == ["lm_head", f"{MIXTURE}.gate"]
    if scheme == "w4a16-g16":
        assert report["notes"] == ["transformers rounds the weights of experts to bfloat16; engines do not"]
        assert report["parity"]["max_difference"] <= report["parity"]["tolerance"] < 0.2
    else:
        assert report["notes"] == ["not compared: transformers merges packed symmetric experts alone"]


def test_what_is_unpacked_computes_what_was_compiled(mixture: Graph, write: Write, tmp_path: Path) -> None:
    """As float weights, read by transformers, which merges them itself."""
    directory, _, result = write(mixture, "w4a16-g16")
    tensors, config = unpacking.read_tensors(directory), unpacking.read_config(directory)
    packed = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    plain = {name: tensor.float() for name, tensor in tensors.items() if re.search(r"\.weight$", name)}
    plain |= {f"{name}.weight": torch.from_numpy(unpacked(tensors, name, "w4a16-g16")) for name in packed}
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    del config["quantization_config"]
    for name, content in read_companions(directory).items():
        (tmp_path / "plain" / name).write_bytes(content)
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config))
    ids = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    found, expected = HFArtifact(tmp_path / "plain").forward(ids), result.artifact().forward(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_experts_that_stay_float(mixtral: Path, mixture: Graph, write: Write) -> None:
    directory, report, _ = write(mixture, "w4a16-g16", overrides={"*.experts.*": None})
    before, after = unpacking.read_tensors(mixtral), unpacking.read_tensors(directory)
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 12
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in experts)
    assert {name.removesuffix(".weight") for name in experts} < set(report["ignored"])
    assert "not compared: transformers merges packed symmetric experts alone" in report["notes"]


def test_a_mixture_that_stays_float(mixture: Graph, write: Write) -> None:
    _, report, _ = write(mixture, "w4a16-g16", overrides={"*": None})
    assert report["parity"]["max_difference"] < 1e-5


def test_static_inputs_of_experts_are_said(mixture: Graph, write: Write) -> None:
    directory, report, result = write(mixture, "fp8-tensor")
    tensors = unpacking.read_tensors(directory)
    for number in range(4):
        stored = result.graph.weights.read(f"{STACKS}.gate_up_proj.{number}.input_scale").reshape(1)
        for part in ("w1", "w3"):
            assert torch.equal(tensors[f"{MIXTURE}.experts.{number}.{part}.input_scale"], stored)
    assert any("input scales of their own" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("scheme", "overrides", "target", "what"),
    [
        ("w4a16-g16", {"*.down_proj.2": "w8a16"}, "checkpoint", "experts of one mixture have different formats"),
        (
            "w4a16-g16",
            {"*.experts.gate_up_proj.*": None},
            "checkpoint",
            "experts of one mixture have different formats",
        ),
        ("fp8-block", {}, "checkpoint", "a block of weights reaches"),
        ("w4a16-g32", {}, "checkpoint:format=gguf", "mixtures of experts are not written"),
    ],
)
def test_what_is_refused_ahead_of_calibration(
    scheme: str, overrides: dict[str, Any], target: str, what: str, mixture: Graph
) -> None:
    with pytest.raises(TargetError, match=what):
        compiled(mixture, passes_of(scheme, overrides), target)


def test_experts_that_checkpoints_have_in_one_tensor(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="mixtures of experts are not written") as caught:
        qc.compile(save_source(tmp_path / "source", "gpt_oss"), passes_of("w8a16"), targets=["checkpoint"])
    assert caught.value.got == "experts that checkpoints have in one tensor"


# --- the layouts of other libraries -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def square_mixture(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Four experts, 32 to 32 to 32, called gate, up and down."""
    options: dict[str, Any] = {"hidden_size": 32, "moe_intermediate_size": 32}
    return qc.capture(save_source(tmp_path_factory.mktemp("qwen"), "qwen3_moe", **options))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """The same with an expert for all rows, whose output is weighted by a gate."""
    sizes: dict[str, Any] = {"hidden_size": 32, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    return qc.capture(save_source(tmp_path_factory.mktemp("shared"), "qwen2_moe", **sizes))


def integers_in_bytes(packed: Tensor) -> list[list[int]]:
    """ModelOpt's: two output channels to a byte, the even one low, in two's complement."""
    rows = [[(byte >> 4 * (row % 2)) & 15 for byte in packed[row // 2].tolist()] for row in range(2 * len(packed))]
    return [[value - 16 if value > 7 else value for value in row] for row in rows]


def foreign(tensors: dict[str, Tensor], name: str, layout: str, scheme: str) -> np.ndarray:
    """A matrix in the layout of another library, number by number."""
    if layout == "gptq":
        return unpacking.gptq(tensors, name, int(scheme[1]))
    if layout == "awq":
        return unpacking.awq(tensors, name)
    weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
    if scheme.startswith("w4"):
        return unpacking.scaled(integers_in_bytes(weight), scale.numpy())
    if scheme.startswith("nvfp4"):
        factor = tensors[f"{name}.weight_scale_2"].numpy()
        return unpacking.scaled(unpacking.fp4_matrix(weight), unpacking.e4m3_matrix(scale) * factor)
    return unpacking.scaled(unpacking.e4m3_matrix(weight), scale.reshape(-1, 1).numpy())


@pytest.mark.parametrize(
    ("layout", "scheme"),
    [
        ("gptq", "w4a16-g16"),
        ("gptq", "w8a16-channel"),
        ("awq", "w4a16-g16"),
        ("awq", "w4a16-g16-asym"),
        ("modelopt", "w4a16-g16"),
        ("modelopt", "fp8-tensor"),
        ("modelopt", "fp8-dynamic"),
        ("modelopt", "nvfp4a16"),
    ],
)
def test_other_layouts(layout: str, scheme: str, square_mixture: Graph, write: Write) -> None:
    directory, report, result = write(square_mixture, scheme, f"checkpoint:format={layout}")
    tensors, parts = unpacking.read_tensors(directory), {"gate_proj": 0, "up_proj": 32, "down_proj": 0}
    for number in range(4):
        for part, first in parts.items():
            stack = "down_proj" if part == "down_proj" else "gate_up_proj"
            expected = native_weight(result.graph, f"{STACKS}.{stack}.{number}")[first : first + 32]
            found = foreign(tensors, f"{STACKS}.{number}.{part}", layout, scheme)
            np.testing.assert_allclose(found, expected, rtol=2**-22)
    assert not any("experts.gate_up_proj" in name for name in tensors)
    assert report["ignored"] == ["lm_head", "model.layers.0.mlp.gate"]
    assert any(note.startswith("compared as qcompiler reads it back") for note in report["notes"])
    assert report["parity"]["max_difference"] < 1e-4
    is_unknown = any(note.startswith("vLLM has no kernel for experts") for note in report["notes"])
    assert is_unknown is (layout == "modelopt" and scheme in ("w4a16-g16", "fp8-dynamic"))
    assert_same_parts(result.graph, qc.capture(directory))


def test_experts_in_blocks_are_mixed_precision(tmp_path: Path, write: Write) -> None:
    """vLLM has no other way to blocks in experts."""
    sizes: dict[str, Any] = {"hidden_size": 128, "moe_intermediate_size": 128, "num_experts": 2}
    graph = qc.capture(save_source(tmp_path / "source", "qwen3_moe", num_experts_per_tok=1, **sizes))
    overrides: dict[str, str | None] = {"*.o_proj": None}
    directory, _, result = write(graph, "fp8-block-dyngroup", "checkpoint:format=modelopt", overrides=overrides)
    settings = unpacking.read_config(directory)["quantization_config"]
    layer = settings["quantized_layers"][f"{STACKS}.1.up_proj"]
    assert (settings["quant_algo"], layer) == ("MIXED_PRECISION", {"quant_algo": "FP8_PB_WO", "group_size": 128})
    assert_same_parts(result.graph, qc.capture(directory))


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_engines_find_the_experts_that_stay_float(layout: str, square_mixture: Graph, write: Write) -> None:
    """They ask for the module that all experts of a mixture are in."""
    target = f"checkpoint:format={layout}"
    directory, *_ = write(square_mixture, "w4a16-g16", target, overrides={"*.experts.*": None})
    settings = unpacking.read_config(directory)["quantization_config"]
    if layout == "awq":
        assert settings["modules_to_not_convert"] == ["lm_head", "model.layers.0.mlp.gate", STACKS]
        return
    assert [pattern for pattern in settings["dynamic"] if re.match(pattern.removeprefix("-:"), STACKS)]
    assert len(settings["dynamic"]) == 2
    assert not qc.capture(directory).schemes.keys() & {f"{STACKS}.gate_up_proj.0"}


def test_experts_of_a_format_of_their_own(square_mixture: Graph, write: Write) -> None:
    overrides: dict[str, str | None] = {"*.experts.*": "w8a16-g32"}
    directory, _, result = write(square_mixture, "w4a16-g16", "checkpoint:format=gptq", overrides=overrides)
    dynamic = unpacking.read_config(directory)["quantization_config"]["dynamic"]
    (fields,) = [dynamic[pattern] for pattern in dynamic if re.match(pattern.removeprefix("+:"), STACKS)]
    assert fields == {"bits": 8, "group_size": -1}
    assert_same_parts(result.graph, qc.capture(directory))


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "awq"])
def test_the_gate_of_a_shared_expert_stays_float(layout: str, shared: Graph, write: Write) -> None:
    """One output channel, which no word holds, beside layers that engines make one of."""
    gate = "model.layers.0.mlp.shared_expert_gate"
    directory, report, result = write(shared, "w4a16-g16", f"checkpoint:format={layout}")
    assert gate in report["ignored"]
    assert f"{gate}.weight" in unpacking.read_tensors(directory)
    (skip,) = [skip for skip in result.report.skipped if skip.site == gate]
    assert skip.reason.startswith("one output channel, left in float")
    assert_same_parts(result.graph, qc.capture(directory))


def test_a_native_artifact_that_is_read_back(mixture: Graph, tmp_path: Path) -> None:
    result: CompileResult = compiled(mixture, passes_of("w4a16-g16"), "checkpoint")
    result.save(tmp_path / "native")
    qc.lower(result, "checkpoint", tmp_path / "one")
    qc.lower(tmp_path / "native", "checkpoint", tmp_path / "other")
    one, other = (unpacking.read_tensors(tmp_path / name) for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
