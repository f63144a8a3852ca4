"""`QuantizeEmbedding`: what becomes of the table, of a head that is the same matrix, and of targets without a form."""

from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler as qc
from qcompiler.artifacts import NativeArtifact
from qcompiler.errors import RecipeError, UnsupportedModelError
from qcompiler.ir import Graph, float_tables, quantized_tables, with_float_tables
from qcompiler.numerics import Scheme
from qcompiler.passes import RTN, Assign, QuantizeEmbedding, Rotate
from qcompiler.passes.recipes import recipe
from qcompiler.protocol import verify_graph
from tests.models import build, canonical_graph

IDS = torch.arange(18).reshape(2, 9)
TABLE = "model.embed_tokens"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """Hidden 64, and a head that is the embedding."""
    directory = tmp_path_factory.mktemp("tied")
    model: Any = build("llama", layers=1, hidden_size=64, intermediate_size=160, tie_word_embeddings=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    return qc.capture(directory)


def nearest(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Round to nearest, number by number."""
    out = torch.empty_like(weight)
    high = (1 << (bits - 1)) - 1
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], group):
            part = weight[row, first : first + group]
            scale = (part.abs().max() / (high + 0.5)).to(torch.bfloat16).float()
            out[row, first : first + group] = (part / scale).round().clamp(-high - 1, high) * scale
    return out


@pytest.mark.parametrize(("bits", "group", "size"), [(8, None, 64), (4, None, 32), (8, 16, 16)])
def test_rows_are_rounded_to_nearest(bits: Any, group: int | None, size: int, tied: Graph) -> None:
    result = qc.compile(tied, [QuantizeEmbedding(bits, group_size=group)])
    (table,) = quantized_tables(result.graph)
    assert (table.name, table.rows, table.columns) == (TABLE, 61, 64)
    copy = with_float_tables(result.graph)
    expected = nearest(tied.weights.read(f"{TABLE}.weight").float(), bits, size)
    torch.testing.assert_close(copy.weights.read(f"{TABLE}.weight"), expected, rtol=0, atol=0)
    found = NativeArtifact(result.graph).forward(IDS)
    torch.testing.assert_close(NativeArtifact(copy).forward(IDS), found, rtol=0, atol=0)
    assert not quantized_tables(copy)
    (report, head) = result.report.sites
    assert (report.site, head.site) == (TABLE, "lm_head")
    assert report.sqnr_db > (35 if bits == 8 else 15)
    assert report.sqnr_db == head.sqnr_db


def test_a_head_that_is_the_table_takes_its_codes(tied: Graph, tmp_path: Path) -> None:
    result = qc.compile(tied, [Assign("w4a16-g32"), QuantizeEmbedding(), RTN()])
    graph = result.graph
    verify_graph(graph)
    assert graph.schemes["lm_head"] == Scheme.parse("w8a16-channel")
    assert f"{TABLE}.weight" not in graph.weights
    codes = [graph.weights.read(f"{name}.weight_codes") for name in ("lm_head", TABLE)]
    assert torch.equal(*codes)
    result.save(tmp_path / "native")
    qc.compile(tied, [Assign("w4a16-g32"), RTN()]).save(tmp_path / "plain")
    sizes = [sum(p.stat().st_size for p in (tmp_path / n).glob("*.safetensors")) for n in ("native", "plain")]
    assert sizes[0] < sizes[1] - 61 * 64 / 2
    again = qc.load(tmp_path / "native").artifact().forward(IDS)
    torch.testing.assert_close(again, result.artifact().forward(IDS), rtol=0, atol=0)


def test_a_head_with_a_scheme_of_its_own(tied: Graph) -> None:
    result = qc.compile(tied, [Assign("w4a16-g32", overrides={"lm_head": "w4a16-g32"}), QuantizeEmbedding(), RTN()])
    assert result.graph.schemes["lm_head"] == Scheme.parse("w4a16-g32")
    verify_graph(result.graph)


def test_what_token_ids_do_not_choose_is_left() -> None:
    graph = canonical_graph("gpt2")
    (table,) = float_tables(graph)
    assert table.name == "transformer.wte"
    qc.compile(graph.copy(), [QuantizeEmbedding()])


def test_bad_input(tied: Graph) -> None:
    with pytest.raises(RecipeError, match="divide its rows") as caught:
        qc.compile(tied, [QuantizeEmbedding(4, group_size=48)])
    assert caught.value.where == TABLE
    with pytest.raises(RecipeError, match="out of range"):
        QuantizeEmbedding(group_size=0)
    with pytest.raises(UnsupportedModelError, match="no embedding table"):
        qc.compile(tied, [QuantizeEmbedding(), QuantizeEmbedding()])


def test_recipes_by_name() -> None:
    first, second, third = recipe("w4a16-gptq+emb-int8")
    assert second == QuantizeEmbedding(8)
    assert recipe("emb-int4") == (QuantizeEmbedding(4, search="mse"),)
    assert recipe("w4a16-gptq+kv-int8+emb-int8") == (first, second, *recipe("kv-int8"), third)
    assert recipe("w4a16-gptq+emb-int8+kv-int8") == (first, second, *recipe("kv-int8"), third)
    assert recipe("w4a4-rotated+emb-int8").index(QuantizeEmbedding(8)) == 2
    for name in ("w4a16-gptq+emb-int8+emb-int4", "w4a16-gptq+emb", "+emb-int8"):
        with pytest.raises(RecipeError, match="unknown recipe"):
            recipe(name)


def test_targets_without_a_form_get_a_float_table(tied: Graph, tmp_path: Path) -> None:
    result = qc.compile(tied, [QuantizeEmbedding()])
    report = qc.lower(result, "onnx", tmp_path / "onnx")
    assert "the embedding table is float, of the same numbers, not codes" in report["notes"]
    assert report["parity"]["max_difference"] <= report["parity"]["tolerance"]
    assert quantized_tables(result.graph)


def test_a_table_of_codes_is_not_rotated(tied: Graph) -> None:
    result = qc.compile(tied, [QuantizeEmbedding(), Rotate()])
    (refused,) = [region for region in result.report.regions if region["status"] == "refused"]
    assert refused["kind"] == "rotation"
    assert quantized_tables(result.graph)
