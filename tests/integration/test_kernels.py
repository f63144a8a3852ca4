"""The shipped model on kernels: teacher-forced logits beside those of the native artifact, for every kind of recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qcompiler as qc
from qcompiler.artifacts.hf import load_tokenizer
from qcompiler.artifacts.native import NativeArtifact, load_native, save_native
from qcompiler.artifacts.noise import with_noise
from qcompiler.artifacts.tokenizing import encode
from qcompiler.errors import VerificationError
from qcompiler.ir.graph import Graph
from qcompiler.lowering.kernels.module.model import KernelModel
from qcompiler.lowering.kernels.weight_only.operator import WeightOnlyLinear
from qcompiler.passes import GPTQ, RTN, Assign, InsertQDQ, QuantizeKVCache, SqueezeLLM
from qcompiler.protocol.pass_base import Pass

ROOT = Path(__file__).resolve().parents[2]
LENGTH, STEPS = 128, 12
STATIC = InsertQDQ(observer="minmax")
DYNAMIC = InsertQDQ(observer=None)


BEHIND_THE_FIRST = [f"model.layers.{layer}.*" for layer in range(1, 8)]  # tables take long to make


def scheme(name: str, *passes: Pass) -> list[Pass]:
    return [Assign(name), *(passes or (RTN(),))]


RECIPES: dict[str, list[Pass]] = {
    "w8a16": scheme("w8a16"),
    "w4a16-rtn": scheme("w4a16"),
    "w4a16-asym-g64": scheme("w4a16-g64-asym"),
    "w4a16-gptq": scheme("w4a16", GPTQ()),
    "w3a16": scheme("w3a16"),
    "w3a16-squeezellm": [Assign("w3a16-lut", overrides=dict.fromkeys(BEHIND_THE_FIRST)), SqueezeLLM()],
    "w8a8": scheme("w8a8", RTN(), STATIC),
    "w8a8-dynamic": scheme("w8a8-dynamic", RTN(), DYNAMIC),
    "w4a8": scheme("w4a8-dynamic", RTN(), DYNAMIC),
    "fp8": scheme("fp8", RTN(), STATIC),
    "fp8-dynamic": scheme("fp8-dynamic", RTN(), DYNAMIC),
    "mxfp4": scheme("mxfp4", RTN(), DYNAMIC),
    "kv-int8": [QuantizeKVCache("int8")],
    "kv-fp8": [QuantizeKVCache("fp8")],
    "w4a16-rtn+kv-int4": [Assign("w4a16"), QuantizeKVCache("int4", rotate=True), RTN()],
}
FUSED = {"w8a16": 56, "w4a16-rtn": 56, "w4a16-asym-g64": 56, "w4a16-gptq": 56, "w3a16": 56, "w3a16-squeezellm": 7}
FUSED |= {"w8a8": 56, "w8a8-dynamic": 56, "w4a8": 56, "fp8": 0, "fp8-dynamic": 0, "mxfp4": 0}
FUSED |= {"kv-int8": 0, "kv-fp8": 0, "w4a16-rtn+kv-int4": 56}
"""Layers whose weights stay codes on the CPU."""
COVERED_BY_OTHERS = ("w4a16-rtn", "w3a16", "fp8-dynamic")


def words(path: str, count: int) -> Tensor:
    tokenizer = load_tokenizer(ROOT / "examples" / "booklm")
    return encode(tokenizer, (ROOT / path).read_text(encoding="utf-8"))[:count]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, booklm: Path) -> Path:
    """The float model as an artifact, which loads faster than it is captured."""
    root = tmp_path_factory.mktemp("float") / "native"
    save_native(qc.capture(booklm), root, {}, {})
    return root


@pytest.fixture(scope="module")
def text() -> Tensor:
    return words("docs/architecture.md", LENGTH)[None]


def compiled(captured: Path, name: str) -> Graph:
    graph, _, _ = load_native(captured)
    calibration = qc.Calibration.from_tokens(words("README.md", 256).reshape(4, 64))
    return qc.compile(graph, RECIPES[name], calibration, device="cpu").graph


def teacher_forced(model: KernelModel, ids: Tensor) -> Tensor:
    """Most in one piece, the last tokens one at a time."""
    logits, cache = model.prefill(ids[:, :-STEPS])
    pieces = [logits]
    for position in range(ids.shape[1] - STEPS, ids.shape[1]):
        logits, cache = model.step(ids[:, position : position + 1], cache)
        pieces.append(logits)
    return torch.cat(pieces, dim=1)


@dataclass(frozen=True)
class Comparison:
    """Logits beside those of the native artifact.

    Attributes:
        difference: the largest.
        allowed: twice the largest that rounding to the dtype makes, and twice what rounding of activations does.
        divergence: in nats per token; of the graph with noise in ``noisy_divergence``.
        wrong: how many first choices differ that are clear: by more than twice what is allowed.
    """

    difference: float
    allowed: float
    divergence: float
    noisy_divergence: float
    wrong: int


def compare(graph: Graph, model: KernelModel, ids: Tensor) -> Comparison:
    expected = NativeArtifact(graph).forward(ids)
    samples = (with_noise(graph, model.rounded, model.dtype, sample=sample) for sample in range(3))
    noisy = max((NativeArtifact(s).forward(ids) for s in samples), key=lambda logits: divergence(expected, logits))
    unrounded = NativeArtifact(graph, round_activations=False).forward(ids)
    found = teacher_forced(model, ids)
    allowed = 2 * ((noisy - expected).abs().max() + (unrounded - expected).abs().max()).item()
    best = expected.topk(2, dim=-1).values
    is_clear = best[..., 0] - best[..., 1] > 2 * allowed
    return Comparison(
        (found - expected).abs().max().item(),
        allowed,
        divergence(expected, found),
        divergence(expected, noisy),
        int((is_clear & (found.argmax(-1) != expected.argmax(-1))).sum()),
    )


def divergence(expected: Tensor, found: Tensor) -> float:
    p, q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in COVERED_BY_OTHERS else ()) for name in RECIPES]
)
def test_logits_are_those_of_the_native_artifact(name: str, captured: Path, text: Tensor) -> None:
    graph = compiled(captured, name)
    model = KernelModel(graph, torch.device("cpu"), torch.bfloat16)
    found = compare(graph, model, text)
    assert found.difference <= found.allowed
    assert found.wrong == 0
    assert found.divergence <= 2 * found.noisy_divergence
    assert sum(site["implementation"] == "cpu" for site in model.report["sites"]) == FUSED[name]
    for site in model.report["sites"]:
        assert site["reason"] or site["implementation"] == "cpu"
    assert len(model.report["caches"]) == 8


def test_one_wrong_scale_is_seen(captured: Path, text: Tensor) -> None:
    graph = compiled(captured, "w4a16-rtn")
    model = KernelModel(graph, torch.device("cpu"), torch.bfloat16)
    layer: Any = next(m for m in model.module.children() if isinstance(m, WeightOnlyLinear) and m.in_features == 768)
    before = layer.scale.flatten()[0].item()
    layer.scale.view(-1)[0] = 8 * before
    found = compare(graph, model, text)
    assert found.divergence > 4 * found.noisy_divergence  # the largest difference says less: noise has a long tail


def test_a_wrong_scale_is_no_lowered_model(captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = qc.compile(load_native(captured)[0], RECIPES["w4a16-rtn"], device="cpu")
    assert "parity" in qc.lower(result, "kernels", device="cpu").report
    read = result.graph.weights.read

    def damaged(name: str, **options: Any) -> Tensor:
        tensor = read(name, **options)
        return tensor * 1.5 if name == "model.layers.3.mlp.down_proj.weight_scale" else tensor

    def lowered(*arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(result.graph.weights, "read", damaged)
            make(*arguments)

    make = KernelModel.__init__
    monkeypatch.setattr(KernelModel, "__init__", lowered)
    with pytest.raises(VerificationError, match="native artifact"):
        qc.lower(result, "kernels", device="cpu")


def test_generation_is_that_of_the_native_artifact(captured: Path) -> None:
    result = qc.compile(load_native(captured)[0], RECIPES["w4a16-rtn"], device="cpu")
    model = qc.lower(result, "kernels", device="cpu", dtype="float32", verify=False)
    expected = qc.generate(result, "It was late in the evening when", max_new_tokens=24)
    assert qc.generate(model, "It was late in the evening when", max_new_tokens=24).tokens == expected.tokens
    assert model.generate("It was late in the evening when", max_new_tokens=24).text == expected.text
