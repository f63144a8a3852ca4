"""Rules and NVIDIA's own parser and builder, over generated graphs: what the rules let pass is built and fused."""

from pathlib import Path
from typing import Any

import onnx
import pytest

pytest.importorskip("tensorrt_rtx")

from qcompiler.errors import InputError
from qcompiler.lowering.tensorrt.legality import CAPABILITIES, RULES, Checked, check
from qcompiler.lowering.tensorrt.legality.operators import CUSTOM, STANDARD
from tests.lowering.tensorrt.legality.attention_graphs import Attention, PlainAttention, QuantizedAttention
from tests.lowering.tensorrt.legality.cases import CASES, Case
from tests.lowering.tensorrt.legality.operator_graphs import Operator
from tests.lowering.tensorrt.legality.rule_builder import Builder

CODES = {"Int4", "Int8", "FP8", "FP4E2M1"}
EVERY = len(CASES) // 40
STRICTER = {
    "int4-times-rounded": "in two dimensions, and with one scale per channel, weights are widened or lose their scales",
    "blocks-times-rounded": "in two dimensions a gemm is built whose layers hold no scales of blocks",
    "output-type-of-weights": "INT8 weights whose scales are of 16 bits are widened, those of 32 bits fail",
    "types-of-scales-differ": "as output-type-of-weights: what comes of DequantizeLinear decides",
    "int8-weight-only-on-turing": "experts, whose inputs the builder flattens, are fused",
    "attention-of-codes": "several queries are taken with heads that are no multiple of 8 channels, too",
    "attention-written-out": "without a mask, heads that move around the softmax do not matter",
}
"""Rules that say more than the builder does, for want of a simpler condition; none lets pass what fails."""
ILLEGAL = "x_zero_point has inconsistent type"  # what ONNX refuses, the parser need not


@pytest.fixture(scope="module")
def builder() -> Any:
    found = Builder()
    yield found
    found.close()


def outcome(case: Case, built: dict[str, Any]) -> str:
    """ "refused", "unfused" or "fused"; operators that need not be fused are "fused" where they build."""
    if built["outcome"] != "built":
        return "refused"
    if isinstance(case, Operator):
        return "fused"
    if isinstance(case, Attention | PlainAttention | QuantizedAttention):
        return "fused" if any("_mha" in name for name, *_ in built["layers"]) else "unfused"
    products = [types for _, kind, types, _ in built["layers"] if kind in ("gemm", "runtime_fusion")]
    return "fused" if any(CODES & set(types) for types in products) else "unfused"


def judged(checked: Checked) -> tuple[str, set[str]]:
    """The worst verdict, and the rules that gave it."""
    verdicts = {finding.verdict for finding in checked.findings}
    worst = next((each for each in ("refused", "wrong", "unfused") if each in verdicts), "fused")
    return worst, {finding.rule for finding in checked.findings if finding.verdict == worst}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if i % EVERY == 0 else pytest.mark.slow, id=str(case))
        for i, case in enumerate(CASES)
    ],
)
def test_rules_and_builder_agree(case: Case, builder: Builder, tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    onnx.save(case.model, file)
    verdict, rules = judged(check(file, (case.sm,)))
    built = builder.build(str(file), case.sm)
    assert built["outcome"] != "crash"
    found = outcome(case, built)
    if verdict == "fused":
        assert found == "fused", built["errors"]
    elif verdict == "wrong":
        assert found != "refused", built["errors"]
    else:
        assert found == verdict or rules & set(STRICTER), (rules, built["errors"])


def test_exceptions_name_rules() -> None:
    assert set(STRICTER) <= {rule.name for rule in RULES}


@pytest.mark.slow
def test_every_rule_is_reached(tmp_path: Path) -> None:
    reached = set()
    for case in CASES:
        file = tmp_path / "model.onnx"
        onnx.save(case.model, file)
        reached |= {finding.rule for finding in check(file, (case.sm,)).findings}
    assert {rule.name for rule in RULES} - reached == set()


def test_names_and_capabilities_are_those_of_the_builder() -> None:
    import tensorrt_rtx as trt

    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    known = {name for name in standard | {"SimplifiedLayerNormalization"} if parser.supports_operator(name)}
    assert known == STANDARD
    assert all(parser.supports_operator(name) for name in CUSTOM)
    named = {name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    assert named == {f"SM{capability}" for capability in CAPABILITIES}


def test_an_illegal_zero_point_is_no_model(tmp_path: Path) -> None:
    from tests.lowering.tensorrt.legality.linear_graphs import Linear

    onnx.save(Linear(zero="uint8").model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="types or shapes") as caught:
        check(tmp_path / "model.onnx")
    assert ILLEGAL in str(caught.value)
