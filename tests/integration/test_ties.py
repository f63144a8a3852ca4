"""Layers that an engine makes one layer of: rounded as one weight where one number scales a whole tensor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import qcompiler as qc
from qcompiler.artifacts import CompileResult
from qcompiler.ir.graph import Graph
from qcompiler.numerics import QuantSpec, Scheme, min_max_qparams, quantize, scale_factor
from qcompiler.passes import GPTQ, RTN, Assign, InsertQDQ
from qcompiler.protocol import Lowered, Pass, Support, Target, WeightQuantizer, tied_layers
from tests.protocol.guests import ROWS
from tests.tiny_graphs import language_model

QKV, GATED = ("0.q", "0.k", "0.v"), ("0.gate", "0.up")


@dataclass(frozen=True)
class Fusing(Target):
    """An engine that makes one layer of some in the first block."""

    groups: tuple[tuple[str, ...], ...] = (QKV, GATED)

    name: ClassVar[str] = "fusing"

    def ties(self, graph: Graph) -> tuple[tuple[str, ...], ...]:
        return self.groups

    def supports(self, scheme: Scheme, width: int) -> Support:
        return Support("runs")

    def lower(self, graph: Graph, directory: Path | None) -> Lowered:
        raise NotImplementedError


@dataclass(frozen=True)
class Uneven(WeightQuantizer):
    """A quantizer of somebody else's, by one function."""

    is_calibrated: ClassVar[bool] = False

    def quantize(self, weight: Tensor, gram: Tensor | None, spec: QuantSpec, scale_dtype: torch.dtype) -> Any:
        return RTN(search="mse").quantize(weight, gram, spec, scale_dtype)


def compiled(passes: list[Pass], *targets: Target) -> CompileResult:
    """With keys twice as large as queries, and values half."""
    graph = language_model()
    for name, factor in (("0.k", 2.0), ("0.v", 0.5), ("0.up", 3.0)):
        graph.weights.set(f"{name}.weight", graph.weights.read(f"{name}.weight") * factor)
    return qc.compile(graph, passes, qc.Calibration.from_tokens(ROWS[0][0]), targets=targets, device="cpu")


def part(result: CompileResult, name: str, kind: str) -> Tensor:
    return result.graph.weights.read(f"{name}.weight_{kind}")


def matrix(result: CompileResult, name: str) -> Tensor:
    (site,) = (site for site in result.graph.sites() if site.name == name)
    return result.graph.read_weight(site)


METHODS = {"rtn": RTN(), "mse": RTN(search="mse"), "gram": RTN(search="gram"), "gptq": GPTQ(), "guest": Uneven()}


@pytest.mark.parametrize(
    ("scheme", "method"),
    [
        ("w8a16-tensor", "rtn"),
        ("nvfp4a16", "rtn"),
        ("w4a16-tensor-asym", "mse"),
        ("nvfp4a16", "gram"),
        ("w4a16-tensor-asym", "gptq"),
        ("fp8-tensor-dynamic", "gptq"),
        ("nvfp4a16", "gptq"),
        ("fp8-tensor-dynamic", "guest"),
    ],
)
def test_one_number_for_layers_that_are_one(scheme: str, method: str) -> None:
    passes: list[Pass] = [Assign(scheme), *([InsertQDQ(observer=None)] if "dynamic" in scheme else [])]
    free, tied = (compiled([*passes, METHODS[method]], *targets) for targets in ((), (Fusing(),)))
    kind = "factor" if scheme == "nvfp4a16" else "scale"
    for names in (QKV, GATED):
        own = [float(part(free, name, kind)) for name in names]
        common = {float(part(tied, name, kind)) for name in names}
        assert len(common) == 1
        assert len(set(own)) == len(own)
        if method == "rtn":
            assert common == {max(own)}
        for name in names:
            report = next(item for item in tied.report.sites if item.site == name and "act" not in item.scheme)
            assert report.details["one_scale_with"] == list(names)
    for name in ("0.o", "0.down", *(site.name for site in free.graph.sites() if site.name.startswith("1."))):
        if method in ("rtn", "mse", "guest"):  # others see what was rounded ahead
            assert torch.equal(part(free, name, "codes"), part(tied, name, "codes")), name


def test_codes_are_those_of_the_common_scale() -> None:
    free, tied = (compiled([Assign("w8a16-tensor"), RTN()], *targets) for targets in ((), (Fusing(),)))
    original = compiled([Assign(None), RTN()])
    assert len({float(part(tied, name, "scale")) for name in QKV}) == 1
    for name in QKV:
        weight, scale = original.graph.weights.read(f"{name}.weight"), part(tied, name, "scale")
        spec = tied.graph.schemes[name].weight
        assert spec is not None
        assert torch.equal(part(tied, name, "codes"), quantize(weight, scale.float().reshape(1, 1), None, spec))
        again = quantize(matrix(free, name), scale.float().reshape(1, 1), None, spec).float() * scale.float()
        assert (weight - matrix(tied, name)).norm() <= (weight - again).norm()


def test_factors_are_that_of_all_weights() -> None:
    tied = compiled([Assign("nvfp4a16"), RTN()], Fusing())
    original = compiled([Assign(None), RTN()])
    stacked = torch.cat([original.graph.weights.read(f"{name}.weight") for name in QKV])
    spec = tied.graph.schemes["0.q"].weight
    assert spec is not None
    scale, _ = min_max_qparams(stacked, spec, torch.float8_e4m3fn)
    factor = scale_factor(stacked, spec)
    assert factor is not None
    assert torch.equal(part(tied, "0.k", "factor"), factor)
    assert torch.equal(torch.cat([part(tied, name, "codes") for name in QKV]), quantize(stacked, scale, None, spec))


@pytest.mark.parametrize("scheme", ["w4a16-g8", "w8a16", "mxfp4a16"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_formats_without_such_a_number_stay_as_they_are(scheme: str, method: str) -> None:
    free, tied = (compiled([Assign(scheme), METHODS[method]], *targets) for targets in ((), (Fusing(),)))
    names = free.graph.weight_names()
    assert names == tied.graph.weight_names()
    assert all(torch.equal(free.graph.weights.read(name), tied.graph.weights.read(name)) for name in names)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_inputs_have_one_scale_too(method: str) -> None:
    passes = [Assign("fp8-tensor"), InsertQDQ(least_sqnr_db=-float("inf")), METHODS[method]]
    tied = compiled(passes, Fusing())
    inputs = [site.inputs for site in tied.graph.sites() if site.name in QKV]
    assert len(inputs) == 3
    assert len(set(inputs)) == 1
    assert len({float(part(tied, name, "scale")) for name in QKV}) == 1


def test_ties_of_several_targets_are_joined() -> None:
    graph = language_model()
    targets = [Fusing((("0.q", "0.k"), ("0.gate", "0.up"))), Fusing((("0.v", "1.q"),)), Fusing((("0.k", "1.q"),))]
    assert set(tied_layers(graph, targets)) == {frozenset({"0.q", "0.k", "0.v", "1.q"}), frozenset(GATED)}
    assert tied_layers(graph, []) == []


def test_layers_of_other_formats_or_inputs_share_nothing() -> None:
    """A target refuses such ties by itself where they matter."""
    passes = [Assign("w8a16-tensor", overrides={"0.v": "w4a16-tensor", "0.k": None}), RTN()]
    free, tied = (compiled(passes, *targets) for targets in ((), (Fusing((QKV, ("0.o", "0.down"))),)))
    for name in ("0.q", "0.v", "0.o", "0.down"):
        assert torch.equal(part(free, name, "scale"), part(tied, name, "scale"))


def test_what_a_guest_returns_for_tied_layers_is_checked() -> None:
    @dataclass(frozen=True)
    class Forgetful(Uneven):
        def quantize(self, weight: Tensor, gram: Tensor | None, spec: QuantSpec, scale_dtype: torch.dtype) -> Any:
            return super().quantize(weight[:8], gram, spec, scale_dtype)

    with pytest.raises(qc.QCompilerError, match="something else than the scheme") as caught:
        compiled([Assign("w8a16-tensor"), Forgetful()], Fusing())
    assert caught.value.where == "0.q, 0.k, 0.v"
