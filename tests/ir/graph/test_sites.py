"""Linear layers are found by what they are."""

import torch

from qcompiler.ir.graph import is_op
from tests.models import canonical_graph

canonical = torch.ops.qcompiler


def test_sites():
    graph = canonical_graph("llama")
    site = next(site for site in graph.sites() if site.name.endswith("layers.1.self_attn.k_proj"))
    assert (site.weight, site.out_features, site.in_features) == (f"{site.name}.weight", 16, 32)
    assert site.bias is None
    (x,) = site.inputs
    assert is_op(x, canonical.rms_norm.default)
    assert set(graph.weight_names()) >= {site.weight, "model.embed_tokens.weight", "model.norm.weight"}
