import pytest
import torch

from qcompiler import numerics
from qcompiler.artifacts.native import NativeArtifact
from qcompiler.ir.graph import Graph
from qcompiler.numerics import fp4
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import RTN, Assign
from qcompiler.passes.rtn import ScaleSearch
from qcompiler.protocol.pass_base import PassContext, PassResult, Tap
from qcompiler.protocol.pipeline import Pipeline
from qcompiler.protocol.statistics import Gram
from tests.tiny_graphs import interpret, language_model, token_batches

SCHEMES = ["w4a16-g8", "w4a16-g8-asym", "w3a16-g5", "w8a16", "w8a16-channel-asym", "w2a16-tensor", "w8a16-tensor-asym"]


def quantize(
    scheme: str, *, search: ScaleSearch = "minmax", dtype: torch.dtype = torch.bfloat16
) -> tuple[Graph, PassResult]:
    graph = language_model(dtype=dtype)
    context = PassContext(graph, torch.device("cpu"), 0)
    Assign(scheme).run(graph, context)
    return graph, RTN(search=search).rewrite(graph.sites(), {}, context)


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_scales_are_those_of_numerics(scheme, search):
    original = language_model(dtype=torch.bfloat16)
    graph, _ = quantize(scheme, search=search)
    spec = Scheme.parse(scheme).weight
    assert spec is not None
    choose = numerics.mse_qparams if search == "mse" else numerics.min_max_qparams
    for site in original.sites()[:-1]:
        weight = original.weights.read(site.weight).float()
        scale, zero = choose(weight, spec, torch.bfloat16)
        stored = graph.weights.read(f"{site.weight}_scale")
        assert stored.dtype == torch.bfloat16
        assert torch.equal(stored.float().flatten(), scale.flatten())
        assert torch.equal(graph.weights.read(f"{site.weight}_codes"), numerics.quantize(weight, scale, zero, spec))
        assert graph.weights.info(f"{site.weight}_codes").dtype == ("" if spec.symmetric else "u") + spec.dtype
        if zero is None:
            assert f"{site.weight}_zero_point" not in graph.weights
        else:
            assert torch.equal(graph.weights.read(f"{site.weight}_zero_point").flatten(), zero.flatten())
        assert site.weight not in graph.weights


@pytest.mark.parametrize(
    ("scheme", "axis", "block", "shape"),
    [
        ("w4a16-g8", 1, 8, (32, 2)),
        ("w3a16-g5", 1, 5, (32, 4)),
        ("w4a16-g128", 1, 16, (32, 1)),
        ("w8a16-asym", 0, 0, (32,)),
        ("w8a16-tensor", 0, 0, ()),
    ],
)
def test_place_in_the_graph(scheme, axis, block, shape):
    graph, _ = quantize(scheme)
    (site,) = (site for site in graph.sites() if site.name == "1.up")
    node = site.nodes[0].args[1]
    codes, scale, zero, *place = node.args
    assert node.target is torch.ops.qcompiler.dequantize.default
    assert place == [axis, block, torch.float32]
    assert codes.target == "1.up.weight_codes"
    assert scale.target == "1.up.weight_scale"
    assert (zero is not None) == scheme.endswith("asym")
    assert graph.weights.info("1.up.weight_scale").shape == shape
    assert (node.meta["dtype"], node.meta["shape"]) == (torch.float32, (32, 16))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_forward_equals_the_float_model_with_rounded_weights(scheme):
    spec = Scheme.parse(scheme).weight
    assert spec is not None
    manual = language_model(dtype=torch.float32)
    for site in manual.sites()[:-1]:
        weight = manual.weights.read(site.weight)
        scale, zero = numerics.min_max_qparams(weight, spec, torch.float32)
        manual.weights.set(site.weight, numerics.fake_quantize(weight, scale, zero, spec))
    graph, _ = quantize(scheme, dtype=torch.float32)
    (batch,) = token_batches(graph, (3,))
    expected = interpret(manual, batch)[manual.outputs[0].name]
    torch.testing.assert_close(NativeArtifact(graph).forward(batch[graph.inputs[0]]), expected, rtol=1e-5, atol=1e-5)


def test_report():
    original = language_model(dtype=torch.bfloat16)
    graph, result = quantize("w4a16-g8")
    assert result.modified
    assert [report.site for report in result.sites] == [site.name for site in original.sites()[:-1]]
    report = result.sites[0]
    assert (report.method, report.scheme, report.output_error) == ("rtn", "int4 g8 symmetric", None)
    weight = original.weights.read("0.q.weight").float()
    rounded = numerics.dequantize(
        graph.weights.read("0.q.weight_codes"),
        graph.weights.read("0.q.weight_scale").float(),
        None,
        Scheme.parse("w4a16-g8").weight,
    )
    assert report.sqnr_db == pytest.approx(numerics.sqnr_db(weight, rounded))
    assert 18 < report.sqnr_db < 30


def test_search_rounds_better():
    by_range, by_error = (quantize("w3a16-channel", search=search)[1].sites for search in ("minmax", "mse"))
    assert all(b.sqnr_db >= a.sqnr_db for a, b in zip(by_range, by_error, strict=True))
    assert sum(b.sqnr_db - a.sqnr_db for a, b in zip(by_range, by_error, strict=True)) > len(by_range) * 0.5


@pytest.mark.parametrize("scheme", ["w3a16-g8", "w3a16-channel", "w3a16-tensor", "w3a16-g8-asym"])
def test_search_by_the_gram_matrix_makes_outputs_better(scheme):
    graph = language_model()
    context = PassContext(graph, torch.device("cpu"), 0)
    Assign(scheme).run(graph, context)
    site = graph.sites()[0]
    weight, spec = context.weight(site), graph.schemes[site.name].weight
    assert spec is not None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(200, site.in_features, generator=generator) * torch.logspace(-1, 1, site.in_features)
    gram = Gram()
    gram.update(rows)
    (value,) = site.inputs
    item = RTN(search="gram")
    assert item.is_calibrated
    assert item.statistics([site], graph) == [Tap(value, Gram)]
    (report,) = item.rewrite([site], {Tap(value, Gram): gram}, context).sites
    rounded = graph.weights.read(f"{site.weight}_codes").float()  # by hand, from what was stored
    scale = graph.weights.read(f"{site.weight}_scale").float()
    zero = 0
    if not spec.symmetric:
        zero = graph.weights.read(f"{site.weight}_zero_point").float().repeat_interleave(8, 1)
    if spec.granularity == "per_group":
        scale = scale.repeat_interleave(8, 1)
    elif spec.granularity == "per_channel":
        scale = scale[:, None]
    error = (rows @ ((rounded - zero) * scale - weight).T).square().sum() / (rows @ weight.T).square().sum()
    assert report.output_error == pytest.approx(error.item(), rel=1e-3)
    assert report.rtn_output_error is not None
    assert report.output_error < 0.98 * report.rtn_output_error


def test_sites_without_a_scheme_are_left_alone():
    graph, _ = quantize("w4a16-g8")
    assert graph.sites()[-1].nodes[0].args[1].op == "get_attr"
    again = RTN().rewrite(graph.sites()[-1:], {}, PassContext(graph, torch.device("cpu"), 0))
    assert again == PassResult(modified=False)


def test_a_tied_weight_stays_with_its_other_use():
    graph = language_model()
    context = PassContext(graph, torch.device("cpu"), 0)
    Assign("w8a16", overrides={"head": "w8a16"}).run(graph, context)
    table = graph.weights.read("embedding.weight")
    RTN().rewrite(graph.sites(), {}, context)
    assert torch.equal(graph.weights.read("embedding.weight"), table)
    assert "head.weight" not in graph.weights


def test_shorthand():
    assert RTN(bits=4, group_size=64, symmetric=False).implied_passes() == (
        Assign("w4a16", group_size=64, symmetric=False),
    )
    assert RTN().implied_passes() == ()
    assert not Pipeline([RTN(bits=8)]).is_calibrated


@pytest.mark.parametrize("search", ["minmax", "mse"])
@pytest.mark.parametrize("scheme", ["nvfp4a16", "mxfp4a16"])
def test_four_bit_floats_are_those_of_numerics(scheme, search):
    original = language_model(dtype=torch.bfloat16)
    graph, result = quantize(scheme, search=search)
    spec = Scheme.parse(scheme).weight
    assert spec is not None
    choose = numerics.mse_qparams if search == "mse" else numerics.min_max_qparams
    for site in original.sites()[:-1]:
        weight = original.weights.read(site.weight).float()
        scale, _ = choose(weight, spec, spec.scale_torch_dtype(weight.dtype))
        factor = graph.weights.read(f"{site.weight}_factor") if spec.has_factor else None
        assert (f"{site.weight}_factor" in graph.weights) is spec.has_factor
        assert torch.equal(fp4.decode_scale(graph.weights.read(f"{site.weight}_scale"), factor), scale)
        assert torch.equal(graph.weights.read(f"{site.weight}_codes"), numerics.quantize(weight, scale, None, spec))
    assert {report.scheme for report in result.sites} == {str(spec)}
