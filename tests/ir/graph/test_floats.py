"""Float tensors rewritten, and rounded in the end."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from qcompiler.errors import PipelineError
from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.capture import capture_module
from qcompiler.numerics.spec import QuantSpec
from tests.ir.graph.beginnings import half_model, quantized

canonical = torch.ops.qcompiler


def test_a_rewritten_tensor_is_float32_and_knows_its_source():
    graph = half_model()
    value = torch.randn(4, 8)
    assert graph.source_dtype("1.weight") == "bfloat16"
    graph.rewrite_float("1.weight", value)
    assert torch.equal(graph.weights.read("1.weight"), value)
    assert graph.weights.info("1.weight").dtype == "float32"
    graph.rewrite_float("1.weight", value.double() * 2)
    assert torch.equal(graph.weights.read("1.weight"), value * 2)
    assert graph.weights.info("1.weight").dtype == "float32"
    assert graph.source_dtype("1.weight") == "bfloat16"
    assert graph.source_dtype("0.weight") == "bfloat16"


@pytest.mark.parametrize("shape", [(8, 4), (4, 8, 1), (32,)])
def test_a_rewritten_tensor_keeps_its_shape(shape):
    graph = half_model()
    with pytest.raises(PipelineError, match=r"wrong shape\n  where: 1.weight"):
        graph.rewrite_float("1.weight", torch.ones(shape))
    assert graph.weights.info("1.weight").dtype == "bfloat16"
    assert not graph.source_dtypes


def test_matrices_are_rounded_in_the_end_and_vectors_are_not():
    graph = half_model()
    values = {name: torch.randn(shape) for name, shape in {"0.weight": (8,), "1.weight": (4, 8)}.items()}
    for name, value in values.items():
        graph.rewrite_float(name, value)
    untouched = graph.weights.version("1.bias")
    graph.round_rewritten()
    assert torch.equal(graph.weights.read("1.weight"), values["1.weight"].bfloat16())
    assert graph.weights.info("1.weight").dtype == "bfloat16"
    assert torch.equal(graph.weights.read("0.weight"), values["0.weight"])
    assert graph.weights.version("1.bias") is untouched
    version = graph.weights.version("1.weight")
    graph.round_rewritten()
    assert graph.weights.version("1.weight") is version


def test_what_a_pass_stores_by_itself_gets_the_dtype_of_the_model():
    graph = half_model()
    usual = graph.remember_dtypes()
    assert usual == "bfloat16"
    site = graph.sites()[0]
    graph.weights.set(site.weight, torch.randn(4, 8))
    assert graph.source_dtype(site.weight) == "bfloat16"  # and so are scales that are chosen now
    added = {"matrix": torch.randn(8, 8), "vector": torch.randn(8), "integers": torch.zeros(2, 2, dtype=torch.int8)}
    for name, value in added.items():
        graph.weights.set(name, value)
        with graph.fx.inserting_before(site.nodes[0]):
            graph.fx.create_node("get_attr", name)
    graph.round_rewritten(usual)
    dtypes = {name: graph.weights.info(name).dtype for name in (*added, site.weight)}
    assert dtypes == {"matrix": "bfloat16", "vector": "float32", "integers": "int8", "1.weight": "bfloat16"}
    assert torch.equal(graph.weights.read("matrix"), added["matrix"].bfloat16())


def test_scales_keep_the_dtype_that_was_chosen():
    graph = half_model()
    usual = graph.remember_dtypes()
    (site,) = graph.sites()
    weight = quantized(graph.weights.read(site.weight), QuantSpec("int4", group_size=4))
    graph.set_weight(site, replace(weight, scale_dtype=torch.float32))
    graph.round_rewritten(usual)
    assert graph.weights.info("1.weight_scale").shape == (4, 2)
    assert graph.weights.info("1.weight_scale").dtype == "float32"


def test_float32_models_are_not_rounded():
    graph = canonicalize(capture_module(nn.Linear(8, 4).eval(), (torch.randn(3, 8),)))
    graph.rewrite_float("weight", torch.ones(4, 8) / 3)
    version = graph.weights.version("weight")
    graph.round_rewritten()
    assert graph.weights.version("weight") is version
