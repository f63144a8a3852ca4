from typing import Any

import pytest
import torch
from torch import Tensor

from qcompiler import numerics
from qcompiler.artifacts.calibration import Calibration
from qcompiler.artifacts.native import load_native
from qcompiler.errors import CalibrationError, PipelineError, RecipeError, ZeroCoverageError
from qcompiler.ir.graph import Graph
from qcompiler.ir.qtensor import Codebook
from qcompiler.numerics.scheme import Scheme
from qcompiler.numerics.spec import QuantSpec
from qcompiler.passes import AWQ, GPTQ, RTN, Assign, Fisher, SqueezeLLM
from qcompiler.passes.squeezellm import Moments, squeeze
from qcompiler.protocol.pass_base import PassContext, Tap
from qcompiler.protocol.pipeline import Pipeline
from qcompiler.protocol.statistics import Gram
from qcompiler.reporting.report import CompileReport
from qcompiler.storage.weights import WeightStore
from qcompiler.sweep.compiling import compile_graph
from qcompiler.testing import check_pass
from tests.tiny_graphs import chain, input_batches, language_model, residual_mlp, token_batches

CPU = torch.device("cpu")
SPEC = QuantSpec("int3", "per_channel", None, codebook=True)


def heavy_tailed(rows: int = 16, width: int = 64) -> tuple[Tensor, Tensor]:
    """A weight with outliers, and a sensitivity."""
    return torch.randn(rows, width) * (1 + 6 * (torch.rand(rows, width) < 0.02)), torch.rand(rows, width) ** 4


def weighted_error(weight: Tensor, sensitivity: Tensor, quantized: Codebook) -> float:
    return float((sensitivity * (weight - quantized.dequantize()).square()).sum())


# --- squeeze ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_less_error_than_even_steps_and_codes_made_after_rounding(bits, dtype):
    weight, sensitivity = heavy_tailed()
    spec = QuantSpec(f"int{bits}", "per_channel", None, codebook=True)
    quantized = squeeze(weight, sensitivity, spec, dtype)
    assert quantized.sparse is None
    assert (quantized.table.dtype, quantized.table.shape) == (dtype, (16, 1 << bits))
    distance = (weight[:, :, None] - quantized.table.float()[:, None, :]).abs()
    chosen = distance.gather(2, quantized.codes.long()[:, :, None])[:, :, 0]
    assert torch.equal(chosen, distance.amin(-1))
    for symmetric in (True, False):
        grid = QuantSpec(spec.dtype, "per_channel", None, symmetric=symmetric)
        for choose in (numerics.min_max_qparams, numerics.mse_qparams):
            rounded = numerics.fake_quantize(weight, *choose(weight, grid, dtype), grid)
            error = float((sensitivity * (weight - rounded).square()).sum())
            assert weighted_error(weight, sensitivity, quantized) < error


@pytest.mark.parametrize("moments", [False, True])
def test_weights_kept_apart(moments):
    weight, sensitivity = heavy_tailed(32, 64)
    sensitivity[5, 7] = 1e4
    x = torch.randn(200, 64)
    given = (Moments(x.T @ x), 2) if moments else (None, 0)
    quantized = squeeze(weight, sensitivity, SPEC, torch.float16, 0.02, *given)
    sparse = quantized.sparse
    assert sparse is not None
    assert len(sparse.values) == round(0.02 * weight.numel())
    assert sparse.values.dtype == torch.float16
    assert sparse.columns.dtype == sparse.row_offsets.dtype == torch.int32
    rows = torch.arange(32).repeat_interleave(sparse.row_offsets.diff())
    places = rows * 64 + sparse.columns
    assert bool((places.diff() > 0).all())
    missed = (weight - quantized.dequantize())[rows, sparse.columns]
    assert float(missed.abs().max()) < 0.01
    kept = set(places.tolist())
    assert 5 * 64 + 7 in kept  # the most sensitive
    farthest = (weight / weight.std(-1, keepdim=True)).abs().flatten().topk(10).indices
    assert set(farthest.tolist()) <= kept
    dense = squeeze(weight, sensitivity, SPEC, torch.float16, 0.0, *given)
    assert weighted_error(weight, sensitivity, quantized) < 0.8 * weighted_error(weight, sensitivity, dense)


def test_weights_kept_apart_do_not_count_in_the_table():
    weight = torch.randn(4, 50)
    weight[:, 3] = 1e3
    quantized = squeeze(weight, torch.ones(1, 50), SPEC, torch.float32, 4 / 200 * 1.2)
    assert float(quantized.table.max()) < 10


def test_turns_lower_the_error_of_the_output():
    weight = torch.randn(24, 48)
    x = torch.randn(600, 8) @ torch.randn(8, 48) + 0.2 * torch.randn(600, 48)
    gram = x.T @ x

    def error(quantized: Codebook) -> float:
        return float(((weight - quantized.dequantize()) @ x.T).square().sum())

    plain = squeeze(weight, gram.diagonal()[None], SPEC, torch.bfloat16, 0.01)
    found = [
        error(squeeze(weight, gram.diagonal()[None], SPEC, torch.bfloat16, 0.01, Moments(gram), n)) for n in (1, 4)
    ]
    assert found[0] < 0.6 * error(plain)
    assert found[1] < found[0]


@pytest.mark.parametrize("fraction", [0.0, 0.05])
def test_degenerate_weights(fraction):
    weight = torch.randn(6, 40)
    weight[0] = 0
    weight[1] = -2.5
    weight[2] = torch.tensor([1.0, -3.0, 0.5]).repeat(14)[:40]
    weight[3] = 0
    weight[3, 9] = 1e-30
    for sensitivity in (torch.rand(6, 40), torch.zeros(6, 40), torch.zeros(1, 40)):
        quantized = squeeze(weight, sensitivity, SPEC, torch.float32, fraction, Moments(torch.eye(40)), 2)
        assert bool(quantized.table.isfinite().all())
        torch.testing.assert_close(quantized.dequantize()[:4], weight[:4], rtol=1e-6, atol=1e-12)


def test_a_singular_gram_matrix():
    weight, row = torch.randn(6, 40), torch.randn(1, 40)
    row[0, :3] = 0
    quantized = squeeze(weight, row.square(), SPEC, torch.float32, 0.01, Moments(row.T @ row), 3)
    assert bool(quantized.dequantize().isfinite().all())
    assert float((weight - quantized.dequantize())[:, :3].abs().max()) < 4
    zero = torch.zeros(40, 40)
    expected = squeeze(weight, torch.ones(1, 40), SPEC, torch.float32).dequantize()
    assert torch.equal(squeeze(weight, zero[:1], SPEC, torch.float32, 0.0, Moments(zero), 3).dequantize(), expected)


@pytest.mark.parametrize(
    ("sensitivity", "gram", "found"),
    [
        (torch.ones(4, 9), None, "do not fit"),
        (torch.full((4, 8), torch.nan), None, "not finite"),
        (torch.full((1, 8), torch.inf), None, "not finite"),
        (-torch.ones(1, 8), None, "negative"),
        (torch.ones(1, 8), torch.ones(7, 7), "do not fit"),
        (torch.ones(1, 8), torch.full((8, 8), torch.nan), "not finite"),
    ],
)
def test_bad_statistics(sensitivity, gram, found):
    with pytest.raises(CalibrationError, match=found) as caught:
        squeeze(
            torch.randn(4, 8),
            sensitivity,
            SPEC,
            torch.float32,
            0.0,
            gram if gram is None else Moments(gram),
            2,
            where="a",
        )
    assert caught.value.where == "a"


# --- the pass ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"sensitivity": "hessian"},
        {"sparse_fraction": -0.1},
        {"sparse_fraction": 0.5},
        {"sparse_fraction": float("nan")},
        {"bits": 8},
        {"bits": 1},
        {"rounds": -1},
        {"damping": 0},
        {"correction": 1.5},
    ],
)
def test_bad_options(options):
    with pytest.raises(RecipeError):
        SqueezeLLM(**options)


def test_what_it_implies_and_needs():
    passes = Pipeline([SqueezeLLM(bits=3, sensitivity="fisher")]).passes
    assert passes == (Assign("w3a16-lut"), Fisher(), SqueezeLLM(bits=3, sensitivity="fisher"))
    assert Pipeline([SqueezeLLM(bits=4, sensitivity="gram")]).passes[0] == Assign("w4a16-lut")
    assert len(Pipeline([SqueezeLLM(bits=4, sensitivity="gram")]).passes) == 2
    late = Pipeline([Assign("w3a16-lut"), SqueezeLLM(sensitivity="fisher")])
    assert late.passes == (Assign("w3a16-lut"), Fisher(), SqueezeLLM(sensitivity="fisher"))
    assert len(late.stages) == 1


def test_rewriting_weights_behind_fisher_is_refused():
    with pytest.raises(PipelineError) as caught:
        Pipeline([Assign("w3a16-lut"), Fisher(), AWQ(), SqueezeLLM(sensitivity="fisher")])
    assert "SqueezeLLM (position 3) needs 'Fisher information" in str(caught.value)
    assert "AWQ (position 2)" in str(caught.value)
    ahead = Pipeline([Assign("w3a16-lut"), AWQ(), SqueezeLLM(sensitivity="fisher")]).passes  # measured where it is read
    assert [item.name for item in ahead] == ["assign", "awq", "fisher", "squeeze-llm"]
    with pytest.raises(PipelineError, match="cannot run in this order"):
        Pipeline([Assign("w3a16-lut"), SqueezeLLM(sensitivity="fisher"), GPTQ()])


@pytest.mark.parametrize("sensitivity", ["fisher", "gram"])
@pytest.mark.parametrize(("rounds", "sparse"), [(0, 0.0), (0, 0.02), (3, 0.02)])
def test_contract(sensitivity, rounds, sparse):
    ids = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(1))
    squeezed = SqueezeLLM(bits=3, sensitivity=sensitivity, rounds=rounds, sparse_fraction=sparse)
    checked = check_pass(squeezed, lambda: language_model(dtype=torch.bfloat16), [(ids,)])
    quantized = {report.site: report for report in checked.report.sites}
    assert len(quantized) == 14
    for name, report in quantized.items():
        assert report.scheme == "int3 codebook per_channel"
        rows, columns = checked.graph.weights.info(f"{name}.weight_codes").shape
        assert report.details["sparse_values"] == round(sparse * rows * columns)
        if not rounds:
            assert report.details["weighted_error"] < report.details["rtn_weighted_error"]
        assert (report.output_error is not None) is (sensitivity == "gram" or rounds > 0)
        assert checked.graph.weights.info(f"{name}.weight_table").dtype == "bfloat16"
    assert 0 < checked.error < 0.1


def test_turns_lower_the_error_of_the_model():
    ids = torch.randint(32, (16, 12), generator=torch.Generator().manual_seed(1))

    def found(**options: Any) -> float:
        return check_pass(SqueezeLLM(bits=2, sensitivity="gram", **options), language_model, [(ids,)]).error

    assert found(rounds=3) < 0.8 * found(rounds=0)


def gathered(graph: Graph, width: int) -> dict[Tap, Gram]:
    statistics: dict[Tap, Gram] = {}
    for site in graph.sites():
        for value in site.inputs:
            statistics[Tap(value, Gram)] = gram = Gram()
            gram.update(torch.randn(50, site.in_features))
    return statistics


def test_sites_with_even_steps_are_rounded_to_nearest():
    graph = residual_mlp()
    context = PassContext(graph, CPU, 0)
    Assign("w3a16-lut", overrides={"*.down": "w8a16", "*.up": None}).run(graph, context)
    squeezed = SqueezeLLM(sensitivity="gram", rounds=0)
    result = squeezed.rewrite(
        [s for s in graph.sites() if graph.schemes[s.name] != Scheme()], gathered(graph, 8), context
    )
    assert {r.site: r.scheme for r in result.sites} == {
        f"{i}.{name}": scheme
        for i in range(3)
        for name, scheme in (("gate", "int3 codebook per_channel"), ("down", "int8 per_channel symmetric"))
    }
    other = residual_mlp()
    other.schemes = graph.schemes
    RTN(search="mse").rewrite([s for s in other.sites() if s.name == "0.down"], {}, PassContext(other, CPU, 0))
    assert torch.equal(graph.weights.read("0.down.weight_codes"), other.weights.read("0.down.weight_codes"))
    assert "0.up.weight" in graph.weights


@pytest.mark.parametrize("other", [RTN(), GPTQ(correction=0, sweeps=0), AWQ()])
def test_other_quantizers_refuse_codebooks(other, monkeypatch):
    graph = chain()
    monkeypatch.setattr("qcompiler.sweep.compiling.sweep", lambda *_, **__: pytest.fail("something long ran first"))
    with pytest.raises(RecipeError, match="codebook") as caught:
        compile_graph(
            graph,
            Pipeline([Assign("w3a16-lut"), other]),
            [(batch[graph.inputs[0]],) for batch in input_batches(graph)],
            report=CompileReport(parameters=1),
            device=CPU,
        )
    assert "SqueezeLLM" in str(caught.value)
    assert caught.value.where == "0"


def test_a_layer_without_sensitivity_and_one_never_reached():
    graph = chain()
    context = PassContext(graph, CPU, 0)
    Assign("w3a16-lut").run(graph, context)
    (site, *_) = graph.sites()
    graph.fisher = WeightStore.from_tensors({site.name: torch.zeros(8, 8)})
    result = SqueezeLLM(sensitivity="fisher", rounds=0).rewrite([site], {}, context)
    assert "count alike" in result.sites[0].details["fallback"]
    (_, site, _) = graph.sites()
    with pytest.raises(ZeroCoverageError, match="never reached"):
        SqueezeLLM(sensitivity="gram").rewrite(
            [site], {tap: tap.kind() for tap in SqueezeLLM(sensitivity="gram").statistics([site], graph)}, context
        )


def test_saved_and_loaded(tmp_path):
    graph, report = language_model(dtype=torch.bfloat16), CompileReport()
    ids = torch.cat([batch[graph.inputs[0]] for batch in token_batches(graph)])
    graph.provenance["parameters"] = 1000
    result = compile_graph(
        graph,
        Pipeline([SqueezeLLM(bits=3, sensitivity="fisher")]),
        Calibration.from_tokens(ids),
        report=report,
        device=CPU,
    )
    result.save(tmp_path / "out")
    loaded, _, _ = load_native(tmp_path / "out")
    assert loaded.schemes == graph.schemes
    assert loaded.to_dict() == graph.to_dict()
    assert loaded.weights.stored_bytes() == report.bytes_after
    for name in graph.weight_names():
        assert torch.equal(loaded.weights.read(name), graph.weights.read(name))
