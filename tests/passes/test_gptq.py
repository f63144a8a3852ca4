"""The pass: what it gathers, in which order, and what it makes of it; the solver has tests of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import qcompiler as qc
from qcompiler.errors import PipelineError, ZeroCoverageError
from qcompiler.ir.graph import Graph, Site
from qcompiler.passes import GPTQ, RTN, Assign
from qcompiler.passes.solvers.gptq_solver import solve_gptq
from qcompiler.protocol.pass_base import Pass, PassContext, SiteReport
from qcompiler.protocol.pipeline import Pipeline
from qcompiler.reporting.report import CompileReport
from qcompiler.sweep.position import Batch
from qcompiler.sweep.streaming import sweep
from tests.tiny_checkpoint import file_bytes
from tests.tiny_graphs import chain, input_batches, interpret, language_model, token_batches

CPU = torch.device("cpu")
WAVES = ("qkv", "o", ("gate", "up"), ("down",))


def quantize(
    graph: Graph, passes: Sequence[Pass], batches: Sequence[Batch], work_dir: Path, **options: Any
) -> list[SiteReport]:
    context, reports = PassContext(graph, CPU, 0), []
    (stage,) = Pipeline(passes).stages
    for item in stage.whole_graph:
        item.run(graph, context)
    reports += sweep(graph, stage.swept, batches, context, work_dir=work_dir, **options).sites
    return reports


def sites(graph: Graph) -> dict[str, Site]:
    return {site.name: site for site in graph.sites()}


def codes(graph: Graph) -> dict[str, Tensor]:
    """Integer codes of every quantized site."""
    stored = {site.name: f"{site.weight}_codes" for site in graph.sites()}
    return {name: graph.weights.read(tensor) for name, tensor in stored.items() if tensor in graph.weights}


def rows_at(everywhere: Sequence[Mapping[str, Any]], node: fx.Node) -> Tensor:
    return torch.cat([values[node.name].flatten(0, -2) for values in everywhere])


def share_of_other_codes(done: Graph, scheme: str, correction: float, *, sequential: bool = True) -> float:
    """Runs the whole model again before every group of layers, the original beside it, and solves the group.

    Returns how many of the codes differ from those of ``done``, which the loop goes on with: where rounding tips one
    value, the next layers are not judged by it.
    """
    graph, original = language_model(), language_model()
    Assign(scheme).run(graph, PassContext(graph, CPU, 0))
    expected = [interpret(original, batch) for batch in token_batches(original)]
    differ = []
    for layer in range(2):
        for wave in WAVES:
            found = [interpret(graph, batch) for batch in token_batches(graph)] if sequential else expected
            together = [sites(graph)[f"{layer}.{name}"] for name in wave]
            (value,) = together[0].inputs
            x, y = rows_at(found, value), rows_at(expected, value)
            spec = graph.schemes[together[0].name].weight
            assert spec is not None
            solutions = solve_gptq(
                [graph.weights.read(site.weight) for site in together],
                x.T @ x,
                spec,
                torch.float32,
                act_order=True,
                damping=0.05,
                sweeps=2,
                cross=y.T @ x if correction else None,
                correction=correction,
            )
            for site, solution in zip(together, solutions, strict=True):
                names = ("codes", "scale") if spec.symmetric else ("codes", "scale", "zero_point")
                tensors: dict[str, Any] = {name: done.weights.read(f"{site.weight}_{name}") for name in names}
                differ.append((solution.qtensor.codes != tensors["codes"]).flatten())
                graph.set_weight(site, replace(solution.qtensor, **tensors))
    assert codes(graph).keys() == codes(done).keys()
    return float(torch.cat(differ).float().mean())


@pytest.mark.parametrize("correction", [0.0, 0.5])
@pytest.mark.parametrize("scheme", ["w4a16-g8", "w3a16-g12-asym"])
def test_equals_a_loop_over_the_whole_model(scheme: str, correction: float, tmp_path: Path) -> None:
    graph = language_model()
    quantize(graph, (Assign(scheme), GPTQ(correction=correction)), token_batches(graph), tmp_path)
    # sums in another order may tip a value that lies between two codes
    assert share_of_other_codes(graph, scheme, correction) < 0.01
    assert share_of_other_codes(graph, scheme, correction, sequential=False) > 0.03
    if correction:
        assert share_of_other_codes(graph, scheme, 0.25) > 0.03


def correlated(rows: int, width: int) -> Tensor:
    """Inputs in which a few directions carry most of the energy, as activations are."""
    random = torch.Generator().manual_seed(5)
    mixing = torch.randn(width, width, generator=random) * torch.logspace(0, -1.5, width)[:, None]
    return torch.randn(rows, width, generator=random) @ mixing


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [16, -1], ids=["group", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_beats_round_to_nearest(bits: int, group_size: int, symmetric: bool, tmp_path: Path) -> None:
    width = 40  # groups of 16 leave a short one
    x, errors = correlated(400, width), {}
    for kind in (GPTQ, RTN):
        graph = chain(1, width)
        weight = graph.weights.read("0.weight")
        passes = (kind(bits=bits, group_size=group_size, symmetric=symmetric),)
        (report,) = quantize(graph, passes, [{graph.inputs[0]: part} for part in x.split(150)], tmp_path)
        y = interpret(graph, {graph.inputs[0]: x})[graph.outputs[0].name]
        errors[kind] = float((y - x @ weight.T).square().sum() / (x @ weight.T).square().sum())
        found = codes(graph)["0"]
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
        assert low <= int(found.min()) < int(found.max()) <= high
        assert graph.weights.info("0.weight_codes").dtype == f"{'int' if symmetric else 'uint'}{bits}"
        assert graph.weights.info("0.weight_scale").shape == ((width,) if group_size == -1 else (width, 3))
        assert ("0.weight_zero_point" in graph.weights) is not symmetric
        if kind is GPTQ:  # what the report says is what was measured
            assert report.output_error == pytest.approx(errors[GPTQ], rel=1e-2)
    assert errors[GPTQ] < 0.6 * errors[RTN]


def test_every_site_of_a_model_beats_round_to_nearest(tmp_path: Path) -> None:
    graph = language_model()
    reports = quantize(graph, (GPTQ(bits=4, group_size=8),), token_batches(graph, (20, 20), 16), tmp_path)
    assert len(reports) == 14
    for report in reports:
        assert report.output_error is not None
        assert report.rtn_output_error is not None
        assert 0 < report.output_error < report.rtn_output_error
        assert report.details["calibration_rows"] == 40 * 16


def test_correction_brings_the_model_nearer_to_the_original(tmp_path: Path) -> None:
    distances = []
    for correction in (0.0, 0.5):
        graph, original = language_model(4), language_model(4)
        batches = token_batches(graph, (32,), 24)
        quantize(graph, (GPTQ(bits=3, group_size=16, correction=correction),), batches, tmp_path)
        (batch,) = token_batches(original, (32,), 24)
        y, expected = (interpret(g, b)[g.outputs[0].name] for g, b in ((graph, batches[0]), (original, batch)))
        distances.append(float((y - expected).square().mean()))
    assert distances[1] < 0.9 * distances[0]


def test_schemes_differ_by_site(tmp_path: Path) -> None:
    graph = language_model()
    overrides = {"*.down": "w8a16", "0.q": None, "*.o": "w3a16-channel-asym", "head": "w4a16-g4"}
    reports = quantize(graph, (Assign("w4a16-g8", overrides=overrides), GPTQ()), token_batches(graph), tmp_path)
    expected = {f"{i}.{name}": "int4 g8 symmetric" for i in range(2) for name in ("q", "k", "v", "gate", "up")}
    expected |= {f"{i}.o": "int3 per_channel asymmetric" for i in range(2)}
    expected |= {f"{i}.down": "int8 per_channel symmetric" for i in range(2)}
    expected |= {"head": "int4 g4 symmetric"}
    del expected["0.q"]
    assert {report.site: report.scheme for report in reports} == expected
    assert codes(graph).keys() == expected.keys()
    assert "0.q.weight" in graph.weights
    stored = {name: graph.weights.info(f"{name}.weight_codes").dtype for name in ("1.q", "0.o", "1.down", "head")}
    assert stored == {"1.q": "int4", "0.o": "uint3", "1.down": "int8", "head": "int4"}


@pytest.mark.parametrize("correction", [0.0, 0.5])
def test_an_unreached_layer_is_an_error(correction: float, tmp_path: Path) -> None:
    graph = chain()
    with pytest.raises(ZeroCoverageError) as caught:
        quantize(graph, (GPTQ(bits=4, correction=correction),), input_batches(graph, rows=0), tmp_path)
    assert caught.value.where == "0"


def saved(directory: Path, **options: Any) -> tuple[dict[str, bytes], CompileReport]:
    """The files of a compiled model but its report (which holds times), and the report."""
    graph = language_model()
    rows = torch.randint(32, (12, 16), generator=torch.Generator().manual_seed(1))
    recipe = (Assign("w3a16-g8"), GPTQ())
    result = qc.compile(graph, recipe, qc.Calibration.from_tokens(rows), device="cpu", **options)
    result.save(directory)
    files = file_bytes(directory)
    del files["report.json"], files["report.html"]  # they tell the time it took
    return files, result.report


def test_the_same_twice_is_the_same_bytes(tmp_path: Path) -> None:
    first, report = saved(tmp_path / "first")
    assert {"weights.safetensors", "graph.json", "manifest.json"} <= first.keys()
    assert report.bytes_spilled == 0
    assert saved(tmp_path / "second")[0] == first


def test_values_on_disk_change_nothing(tmp_path: Path) -> None:
    in_memory, _ = saved(tmp_path / "memory")
    on_disk, report = saved(tmp_path / "disk", memory_budget=0)
    assert report.bytes_spilled > 0
    assert on_disk == in_memory


def test_shorthand_and_assignment_must_agree() -> None:
    with pytest.raises(PipelineError):
        Pipeline((Assign("w4a16"), GPTQ(bits=3)))
    assert [type(item) for item in Pipeline((GPTQ(bits=3),)).passes] == [Assign, GPTQ]
