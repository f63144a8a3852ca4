"""What becomes one operator and what does not, on families of models; each is run beside the native artifact."""

from pathlib import Path

import pytest

import qcompiler as qc
from qcompiler.passes import RTN, Assign
from tests.models import canonical_graph, copy_graph

ATTENTION, ROTARY, PRODUCT = "GroupQueryAttention", "RotaryEmbedding", "MatMulNBits"
RMS, LAYER = "SkipSimplifiedLayerNormalization", "SkipLayerNormalization"


@pytest.mark.parametrize(
    ("family", "wanted", "products"),
    [
        ("gemma2", {ATTENTION: 2, ROTARY: 4, PRODUCT: 8, RMS: 4}, 14),  # windows, capped logits
        pytest.param("falcon_alibi", {PRODUCT: 8, LAYER: 4}, 8, marks=pytest.mark.slow),  # a mask that is added
        ("gpt2", {ATTENTION: 2, PRODUCT: 8, LAYER: 5}, 8),  # no rotary embedding, biases
        pytest.param("mistral", {ATTENTION: 2, ROTARY: 4, PRODUCT: 8, RMS: 4}, 14, marks=pytest.mark.slow),
        pytest.param("mixtral", {ATTENTION: 2, ROTARY: 4, PRODUCT: 20, RMS: 4}, 24, marks=pytest.mark.slow),
        pytest.param("gpt_oss", {ROTARY: 4, PRODUCT: 20, RMS: 4}, 24, marks=pytest.mark.slow),
        pytest.param("bert", {PRODUCT: 9, LAYER: 4}, 13, marks=pytest.mark.slow),
        pytest.param("gpt_neox", {ATTENTION: 2, ROTARY: 4, PRODUCT: 8, LAYER: 2}, 8, marks=pytest.mark.slow),
    ],
)
def test_families(family: str, wanted: dict[str, int], products: int, tmp_path: Path) -> None:
    result = qc.compile(copy_graph(canonical_graph(family)), [Assign("w4a16-g16"), RTN()], device="cpu")
    report = qc.lower(result, "ort", tmp_path / "out", accuracy_level=0)
    assert report["operators"] == wanted
    assert sum(site["operator"] == PRODUCT for site in report["sites"].values()) == products
    assert report["shared_caches"] is (ATTENTION in wanted)
    assert report["parity"]["max_difference"] < 1e-5
    assert (report["parity"]["cached_difference"] or 0) < 1e-5


@pytest.mark.parametrize(
    "name", ["w4a16-rtn", "w8a8-rtn", "w8a16+kv-int8", pytest.param("w4a16-rtn+kv-int4", marks=pytest.mark.slow)]
)
def test_rotary_embedding_goes_where_queries_and_keys_go(name, tiny, tmp_path):
    report = qc.lower(tiny(name), "ort", tmp_path / "out", accuracy_level=0)
    own = "+" not in name
    assert report["operators"].get(ATTENTION, 0) == own
    assert report["operators"].get(ROTARY, 0) == (0 if own else 2)
    assert report["shared_caches"] is own


def test_layers_that_read_one_value_are_one_product(tiny, tmp_path):
    report = qc.lower(tiny("w4a16-rtn"), "ort", tmp_path / "out", accuracy_level=0)
    assert report["operators"][PRODUCT] == 4  # queries, keys and values; the output; gate and up; down
    assert sum(site["operator"] == PRODUCT for site in report["sites"].values()) == 7
