"""Where a weight quantizer does not quantize, or not as its own function would: no rows, a refused format, a slip."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import qcompiler as qc
from qcompiler.errors import PipelineError, RecipeError, VerificationError, ZeroCoverageError
from qcompiler.ir.experts import is_expert
from qcompiler.ir.qtensor import Affine, QuantizedTensor
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.passes import Assign, InsertQDQ
from qcompiler.protocol.pass_base import PassContext, SiteReport, Tap
from qcompiler.protocol.pipeline import Pipeline
from qcompiler.protocol.solution import round_to_nearest
from qcompiler.protocol.statistics import Gram
from qcompiler.protocol.weight_quantizer import WeightQuantizer
from qcompiler.testing import check_pass
from tests.models import canonical_graph, copy_graph
from tests.protocol.guests import INPUTS, ROWS, Called, Nearest, OnlyIntegers, Uncalibrated
from tests.tiny_graphs import chain, language_model

CPU = torch.device("cpu")
ONE_TOKEN = torch.ones(1, 2).long()  # sent to two experts of four


# --- layers without rows ----------------------------------------------------------------------------------------------


def test_experts_without_rows_are_rounded_to_nearest() -> None:
    @dataclass(frozen=True)
    class Zero(Nearest):
        def quantize(self, weight: Tensor, gram: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> Affine:
            return super().quantize(torch.zeros_like(weight), gram, spec, scale_dtype)

    graph = copy_graph(canonical_graph("mixtral"))
    result = qc.compile(graph, [Assign("w4a16-g8"), Zero()], qc.Calibration.from_tokens(ONE_TOKEN), device="cpu")
    unreached = [report for report in result.report.sites if report.details["calibration_rows"] == 0]
    experts = {site.name for site in graph.sites() if is_expert(site)}
    assert 0 < len(unreached) < len(experts)
    for report in unreached:
        assert report.site in experts
        assert (report.method, report.output_error, report.rtn_output_error) == ("zero", None, None)
        assert report.details["fallback"] == "rounded to nearest: no calibration row was sent to this expert"
        spec = result.graph.schemes[report.site].weight
        assert spec is not None
        expected = round_to_nearest(graph.weights.read(f"{report.site}.weight").float(), spec, torch.float32)
        assert torch.equal(result.graph.weights.read(f"{report.site}.weight_codes"), expected.codes)
    assert all(report.sqnr_db > 10 for report in unreached)
    assert all(report.sqnr_db == 0 for report in result.report.sites if report not in unreached)


def rewrite_unreached(quantizer: WeightQuantizer) -> tuple[SiteReport, ...]:
    graph = chain()
    context = PassContext(graph, CPU, 0)
    Assign("w4a16-g8").run(graph, context)
    wave = graph.sites()[1:2]
    return quantizer.rewrite(wave, {tap: tap.kind() for tap in quantizer.statistics(wave, graph)}, context).sites


def test_another_layer_without_rows_is_an_error() -> None:
    with pytest.raises(ZeroCoverageError, match="never reached") as caught:
        rewrite_unreached(Nearest())
    assert caught.value.where == "1"
    assert len(rewrite_unreached(Uncalibrated())) == 1


# --- layers that are refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("behind", [False, True])
def test_a_format_that_is_refused_stays_in_float(behind: bool, tmp_path: Path) -> None:
    inputs = InsertQDQ(observer="minmax", least_sqnr_db=float("-inf"))
    quantizers = (inputs, OnlyIntegers()) if behind else (OnlyIntegers(), inputs)
    checked = check_pass([Assign("w8a8", overrides={"first": "fp8"}), *quantizers], Called(), INPUTS)
    (skip,) = checked.report.skipped
    assert (skip.site, skip.method, skip.reason) == ("first", "only-integers", "float codes are not for me")
    assert not skip.asked
    assert "first.weight" in checked.graph.weights
    assert [report.site for report in checked.report.sites if report.method == "only-integers"] == ["last"]
    activation = Scheme.parse("fp8").activation if behind else None  # rounded already, or not any more
    assert checked.graph.schemes["first"] == Scheme(None, activation)


@pytest.mark.parametrize("strict", [False, True])
def test_targets_take_it_and_strict_does_not(strict: bool, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    recipe = [Assign("w8a16", overrides={name: "fp8"}), InsertQDQ(least_sqnr_db=float("-inf")), OnlyIntegers()]
    graph, tokens = copy_graph(canonical_graph("llama")), qc.Calibration.from_tokens(ROWS[0][0])
    if strict:
        with pytest.raises(RecipeError, match="strict") as caught:
            qc.compile(graph, recipe, tokens, device="cpu", strict=True)
        assert (caught.value.where, caught.value.got) == (name, "float codes are not for me")
    else:
        result = qc.compile(graph, recipe, tokens, device="cpu")
        assert qc.lower(result, "onnx", tmp_path / "onnx")["parity"]["max_difference"] < 1e-4


def test_nothing_is_gathered_for_what_is_refused() -> None:
    graph = chain()
    Assign("fp8").run(graph, PassContext(graph, CPU, 0))
    assert OnlyIntegers().statistics(graph.sites(), graph) == []
    assert Nearest().statistics(graph.sites(), graph) == [Tap(site.inputs[0], Gram) for site in graph.sites()]


def test_codebooks_are_refused_before_anything_runs() -> None:
    @dataclass(frozen=True)
    class Tables(Uncalibrated):
        makes_codebooks: ClassVar[bool] = True

    graph = chain()
    Assign("w3a16-lut").run(graph, PassContext(graph, CPU, 0))
    with pytest.raises(RecipeError, match="nearest rounds to a grid of even steps"):
        Nearest().check(graph)
    Tables().check(graph)
    checked = check_pass([Assign("w3a16-lut"), Tables()], language_model, ROWS)
    assert {report.scheme for report in checked.report.sites} == {"int3 codebook per_channel"}
    steps = checked.graph.weights.read("0.q.weight_table").diff()
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), rtol=1e-3, atol=1e-6)


def test_a_quantizer_without_a_function_is_no_pass() -> None:
    @dataclass(frozen=True)
    class Empty(WeightQuantizer):
        pass

    with pytest.raises(PipelineError, match="a recipe is a sequence of passes"):
        Pipeline([Assign("w4a16"), Empty()])
    with pytest.raises(PipelineError, match="neither quantize nor quantize_together"):
        Empty().quantize(torch.ones(1, 1), torch.ones(1, 1), QuantSpec("int8", "per_tensor", None), torch.float32)


# --- slips ------------------------------------------------------------------------------------------------------------


def test_what_is_returned_is_checked_layer_by_layer() -> None:
    @dataclass(frozen=True)
    class Slipping(Nearest):
        def quantize(self, weight: Tensor, gram: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> Affine:
            found = super().quantize(weight, gram, spec, scale_dtype)
            return replace(found, codes=found.codes + 20) if len(weight) == 6 else found

    with pytest.raises(VerificationError, match="slipping gave something else") as caught:
        check_pass([Assign("w4a16-g8"), Slipping()], Called(), INPUTS)
    assert caught.value.where == "last"
    assert "not -8 to 7" in str(caught.value.got)


@pytest.mark.parametrize("which", ["weight", "gram"])
def test_what_is_given_must_stay_as_it_is(which: str) -> None:
    @dataclass(frozen=True)
    class Scribbling(WeightQuantizer):
        def quantize(self, weight: Tensor, gram: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> QuantizedTensor:
            found = round_to_nearest(weight, spec, scale_dtype)
            (weight if which == "weight" else gram)[:, 0] -= 1
            return found

    with pytest.raises(VerificationError, match="scribbling changed a weight or a moment") as caught:
        check_pass([Assign("w4a16-g8"), Scribbling()], Called(), INPUTS)
    assert caught.value.where == "first"
    with torch.inference_mode():  # torch does not count there
        graph = chain()
        context = PassContext(graph, CPU, 0)
        Assign("w8a16").run(graph, context)
        assert Uncalibrated().rewrite(graph.sites(), {}, context).modified
