"""Quantizers that leave all but the rounding to their base class."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import qcompiler as qc
from qcompiler.ir.feeding import feed
from qcompiler.ir.qtensor import Affine, QuantizedTensor
from qcompiler.ir.segments import segment_graph
from qcompiler.numerics import QuantSpec, min_max_qparams
from qcompiler.passes import RTN, Assign
from qcompiler.protocol.pass_base import PassContext
from qcompiler.protocol.pipeline import Pipeline
from qcompiler.protocol.solution import SharedInput, Solution, round_to_nearest
from qcompiler.protocol.statistics import CrossGram, Gram
from qcompiler.protocol.weight_quantizer import WeightQuantizer
from qcompiler.testing import CheckedPass, check_pass
from tests.protocol.guests import INPUTS, ROWS, Called, Nearest, Uncalibrated
from tests.tiny_graphs import interpret, language_model

CPU = torch.device("cpu")


def same_weights(checked: CheckedPass, other: CheckedPass) -> bool:
    names = checked.graph.weight_names()
    return names == other.graph.weight_names() and all(
        torch.equal(checked.graph.weights.read(name), other.graph.weights.read(name)) for name in names
    )


# --- what one function is enough for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w4a16-g8", "w3a16-channel-asym", "w8a16-tensor", "nvfp4a16", "mxfp4a16"])
def test_one_function(scheme: str) -> None:
    ours, shipped = (check_pass([Assign(scheme), item], language_model, ROWS) for item in (Nearest(), RTN()))
    assert same_weights(ours, shipped)
    expected = {report.site: report for report in shipped.report.sites}
    assert {report.site for report in ours.report.sites} == expected.keys()
    for report in ours.report.sites:
        assert (report.method, report.scheme) == ("nearest", expected[report.site].scheme)
        assert report.sqnr_db == expected[report.site].sqnr_db
        assert report.seconds > 0
        assert report.details == {"calibration_rows": 32}
        assert report.output_error == report.rtn_output_error


def test_errors_of_the_output_are_those_on_the_calibration_rows() -> None:
    @dataclass(frozen=True)
    class Halved(WeightQuantizer):
        def quantize(self, weight: Tensor, gram: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> Affine:
            scale, zero = min_max_qparams(weight, spec, scale_dtype)
            return Affine.of(weight, scale / 2, zero, spec, scale_dtype)

    checked = check_pass([Assign("w4a16-g4"), Halved()], Called(), INPUTS)
    graphs = [checked.graph, check_pass([Assign("w4a16-g4"), RTN()], Called(), INPUTS).graph]
    (report,) = (report for report in checked.report.sites if report.site == "last")
    first = checked.graph.sites()[0]
    rows = torch.cat([interpret(checked.graph, {checked.graph.inputs[0]: x})["tanh"] for (x,) in INPUTS])
    weight = Called().last.weight.detach()
    for error, graph in zip((report.output_error, report.rtn_output_error), graphs, strict=True):
        codes, scale = (graph.weights.read(f"last.weight_{part}").float() for part in ("codes", "scale"))
        wrong = weight - codes * scale.repeat_interleave(4, 1)
        assert error == pytest.approx(float((rows @ wrong.T).square().sum() / (rows @ weight.T).square().sum()), 1e-3)
    assert len(first.inputs) == 2


def test_in_a_real_compilation(tmp_path: Path) -> None:
    graph = language_model(dtype=torch.bfloat16)
    passes = [Assign("w4a16-g8", overrides={"*.q": None}), Nearest()]
    result = qc.compile(graph, passes, qc.Calibration.from_tokens(ROWS[0][0]), device="cpu", strict=True)
    result.save(tmp_path / "out")
    loaded = qc.load(tmp_path / "out")
    assert {report.site for report in loaded.report.sites} == {
        f"{layer}.{name}" for layer in range(2) for name in ("k", "v", "o", "gate", "up", "down")
    }
    assert [item["pass"] for item in loaded.manifest["recipe"]] == ["assign", "nearest"]
    assert torch.equal(loaded.artifact().forward(ROWS[0][0]), result.artifact().forward(ROWS[0][0]))


def test_the_gram_matrix_is_that_of_what_the_layer_will_read() -> None:
    """In true sequence: what stands before a layer has its final weights when the layer's input is gathered."""
    seen: dict[str, Tensor] = {}

    @dataclass(frozen=True)
    class Looking(Nearest):
        def quantize_together(self, layers: SharedInput) -> list[QuantizedTensor]:
            assert layers.gram is not None
            seen.update({site.name: layers.gram for site in layers.sites})
            return [Nearest.quantize(self, w, layers.gram, layers.spec, layers.scale_dtype) for w in layers.weights]

    graph = check_pass([Assign("w3a16-g8"), Looking()], language_model, ROWS).graph
    values = interpret(graph, feed(graph, ROWS[0][0]))
    assert len(seen) == 14
    for site in graph.sites():
        if site.name in seen:
            rows = values[site.inputs[0].name].flatten(0, -2)
            torch.testing.assert_close(seen[site.name], rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_waves_are_of_layers_with_a_scheme_alone() -> None:
    graph = language_model()
    Assign("w4a16-g8", overrides={"0.*": None, "1.o": None}).run(graph, PassContext(graph, CPU, 0))

    def waves(quantizer: WeightQuantizer) -> list[list[str]]:
        found = [wave for segment in segment_graph(graph).segments for wave in quantizer.waves(segment, graph)]
        return [[site.name for site in wave] for wave in found]

    assert waves(Nearest()) == [["1.q", "1.k", "1.v"], ["1.gate", "1.up"], ["1.down"]]
    assert waves(Uncalibrated()) == [["1.q", "1.k", "1.v"], ["1.gate", "1.up", "1.down"]]


def test_a_layer_that_is_called_on_two_values_has_one_gram_matrix() -> None:
    seen: list[Tensor] = []

    @dataclass(frozen=True)
    class Looking(Nearest):
        def quantize(self, weight: Tensor, gram: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> Affine:
            seen.append(gram)
            return super().quantize(weight, gram, spec, scale_dtype)

    checked = check_pass([Assign("w8a16"), Looking()], Called(), INPUTS)
    first = checked.report.sites[0]
    assert (first.site, first.details["calibration_rows"]) == ("first", 2 * 48)
    x = torch.cat([x for (x,) in INPUTS])
    again = torch.relu(Called().first(x)).detach()
    torch.testing.assert_close(seen[0], x.T @ x + again.T @ again, rtol=1e-4, atol=1e-4)


def test_without_calibration() -> None:
    assert not Pipeline([Assign("w4a16-g8"), Uncalibrated()]).is_calibrated
    checked = check_pass([Assign("w4a16-g8"), Uncalibrated()], language_model, ROWS)
    assert same_weights(checked, check_pass([Assign("w4a16-g8"), RTN()], language_model, ROWS))
    for report in checked.report.sites:
        assert (report.output_error, report.rtn_output_error, report.details) == (None, None, {})
    qc.compile(language_model(), [Assign("w4a16-g8"), Uncalibrated()], device="cpu")


def test_the_report_tells_more() -> None:
    @dataclass(frozen=True)
    class Telling(WeightQuantizer):
        def quantize(self, weight: Tensor, gram: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> Solution:
            energy = float((weight @ gram * weight).sum(dtype=torch.float64))
            found = round_to_nearest(weight, spec, scale_dtype)
            return Solution(found, {"largest": float(weight.abs().max())}, loss=0.25 * energy, rtn_loss=0.5 * energy)

    for report in check_pass([Assign("w4a16-g8"), Telling()], language_model, ROWS).report.sites:
        assert report.details.keys() == {"largest", "calibration_rows"}
        assert report.output_error == pytest.approx(0.25)
        assert report.rtn_output_error == pytest.approx(0.5)


# --- layers that are solved together ----------------------------------------------------------------------------------


def groups_of(overrides: dict[str, str | None], *, cross: bool = False) -> list[SharedInput]:
    """What `quantize_together` is given for a language model."""
    found: list[SharedInput] = []

    @dataclass(frozen=True)
    class Together(WeightQuantizer):
        def kinds(self, spec: QuantSpec) -> tuple[type[Gram] | type[CrossGram], ...]:
            return (Gram, CrossGram) if cross else (Gram,)

        def quantize_together(self, layers: SharedInput) -> list[QuantizedTensor]:
            found.append(layers)
            return [round_to_nearest(weight, layers.spec, layers.scale_dtype) for weight in layers.weights]

    qc.compile(
        language_model(dtype=torch.bfloat16),
        [Assign("w4a16-g8", overrides=overrides), Together()],
        qc.Calibration.from_tokens(ROWS[0][0]),
        device="cpu",
    )
    return found


def names(groups: Sequence[SharedInput]) -> list[list[str]]:
    return [[site.name for site in layers.sites] for layers in groups]


def test_layers_with_one_input_come_together() -> None:
    groups = groups_of({"1.*": None})
    assert names(groups) == [["0.q", "0.k", "0.v"], ["0.o"], ["0.gate", "0.up"], ["0.down"]]
    for layers in groups:
        assert layers.cross is None
        assert layers.gram is not None
        assert layers.scale_dtype == torch.bfloat16
        for site, weight in zip(layers.sites, layers.weights, strict=True):
            assert tuple(weight.shape) == (site.out_features, site.in_features)
            assert torch.equal(weight, language_model(dtype=torch.bfloat16).weights.read(site.weight).float())


def test_but_not_those_of_another_format() -> None:
    groups = groups_of({"1.*": None, "0.k": "w8a16", "0.up": "w4a16-g16"})
    assert names(groups) == [["0.q", "0.v"], ["0.k"], ["0.o"], ["0.gate"], ["0.up"], ["0.down"]]
    assert [str(layers.spec) for layers in groups[:2]] == ["int4 g8 symmetric", "int8 per_channel symmetric"]
    assert groups[0].gram is groups[1].gram  # of one value, made once


def test_the_cross_moment_is_there_where_it_is_asked_for() -> None:
    for layers in groups_of({}, cross=True):
        assert layers.gram is not None
        assert layers.cross is not None
        same = torch.allclose(layers.gram, layers.cross, rtol=1e-5)
        assert same is (layers.sites[0].name == "0.q")  # nothing is rounded before these


def test_layers_that_come_one_by_one_are_given_one_gram_matrix() -> None:
    seen: list[Tensor] = []

    @dataclass(frozen=True)
    class Looking(Nearest):
        def quantize(self, weight: Tensor, gram: Tensor, spec: QuantSpec, scale_dtype: torch.dtype) -> Affine:
            seen.append(gram)
            return super().quantize(weight, gram, spec, scale_dtype)

    recipe = [Assign("w4a16-g8", overrides={"1.*": None, "0.k": "w8a16"}), Looking()]
    result = qc.compile(language_model(), recipe, qc.Calibration.from_tokens(ROWS[0][0]), device="cpu")
    assert [report.site for report in result.report.sites][:3] == ["0.q", "0.k", "0.v"]  # as they stand, not by format
    q, k, v, o, gate, up, down = seen
    assert q is k is v
    assert gate is up
    assert len({id(gram) for gram in (q, o, gate, down)}) == 4
