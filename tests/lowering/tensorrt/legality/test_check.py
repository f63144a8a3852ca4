"""What is said of a model: grouped, the worst first, for which GPUs, and what is fused."""

from pathlib import Path

import onnx
import pytest

from qcompiler.errors import TargetError
from qcompiler.lowering.tensorrt.legality import RULES, check, check_model
from tests.lowering.tensorrt.legality.attention_graphs import Attention
from tests.lowering.tensorrt.legality.cases import Case
from tests.lowering.tensorrt.legality.linear_graphs import Linear
from tests.lowering.tensorrt.legality.operator_graphs import OPERATORS

NAMED = {str(operator): operator for operator in OPERATORS}
FIRES: dict[str, tuple[Case, str]] = {
    "int4-one-block": (Linear(block="channel"), "INT4 weights, scales per channel"),
    "bytes-in-blocks": (Linear("int8", "64"), "INT8 weights in 4 blocks"),
    "int4-times-rounded": (Linear(act="static:int8"), "INT4 weights by INT8 activations"),
    "blocks-times-rounded": (Linear("fp8", "64", act="static:fp8"), "FLOAT8E4M3FN weights in 4 blocks by rounded"),
    "types-of-codes-differ": (Linear("int8", "channel", act="static:fp8"), "INT8 weights by FLOAT8E4M3FN activations"),
    "types-of-scales-differ": (Linear("int8", "channel", act="static_f32:int8"), "FLOAT16 for weights and FLOAT for"),
    "scale-at-run-time": (Linear("int8", "channel", act="block:int8"), "per block of activations"),
    "cast-behind-scale": (Linear(scale="f32", between="cast"), "scales of FLOAT, multiplied in FLOAT16"),
    "odd-size": (Linear(n=63), "[256, 63]"),
    "vector": (Linear(rank=1), "by a vector"),
    "computed-weight": (Linear(between="sub"), "Sub between codes and product"),
    "fp4-weight-only": (Linear("fp4", "16", sm=120), "FLOAT4E2M1 weights"),
    "int8-weight-only-on-turing": (Linear("int8", "channel", sm=75), "INT8 weights on SM 75"),
    "float-on-turing": (Linear("int8", "channel", x="f32", sm=75), "MatMul in FLOAT on SM 75"),
    "compute-capability": (Linear("fp8", "channel", sm=86), "FLOAT8E4M3FN on SM 86, below 89"),
    "unknown-type": (Linear("uint4"), "UINT4 at a constant"),
    "uint8": (Linear("uint8", "channel"), "UINT8 read by DequantizeLinear"),
    "odd-count": (Linear(k=63, block="21", n=63), "3969 elements of INT4"),
    "zero-point": (Linear(zero="other"), "of weights"),
    "zero-point-of-fp8": (Linear("fp8", "channel", zero="other"), "other than 0"),
    "scale-sign": (Linear("int8", "channel", sign="0"), "a scale of 0"),
    "blocks": (Linear(k=250), "scales [4, 128] for data [250, 128]"),
    "output-type": (Linear(out="f32"), "scales of FLOAT16 and an output of FLOAT"),
    "unsigned-by-default": (NAMED["Q by default"], "neither a zero point nor output_dtype"),
    "unknown-operator": (NAMED["unknown inside of If"], "Foo"),
    "other-domain": (NAMED["known name elsewhere"], "my.Sigmoid"),
    "codes-between": (NAMED["fp8 cast"], "FLOAT8E4M3FN read by Cast"),
    "constant-codes": (NAMED["int8 constant gathered"], "a constant of INT8 read by Gather"),
    "attention-cache": (Attention(form="past"), "a cache inside of Attention"),
    "attention-kernel": (Attention("f32"), "attention in FLOAT"),
    "attention-lengths": (Attention(form="nonpad", opset=24), "nonpad_kv_seqlen"),
}


@pytest.mark.parametrize("rule", FIRES)
def test_rules_fire(rule: str, tmp_path: Path) -> None:
    case, text = FIRES[rule]
    onnx.save(case.model, tmp_path / "model.onnx")
    found = {each.rule: each for each in check_model(tmp_path / "model.onnx", (case.sm,))}
    assert text in found[rule].found
    assert found[rule].sm == (case.sm,)


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (Linear(), "INT4 weights"),
        (Linear(layout="nk", x="bf16"), "INT4 weights"),
        (Linear("int8", "channel", layout="gemm_t", rank=2), "INT8 weights"),
        (Linear("int8", "channel", act="token:int8"), "INT8 weights by INT8 activations"),
        (Linear("fp8", "channel", act="static:fp8"), "FLOAT8E4M3FN weights by FLOAT8E4M3FN activations"),
        (Linear(act="token_before:int8"), "INT4 weights"),
        (Attention(), "attention"),
        (Attention(form="trt", mask=""), "attention"),
    ],
    ids=str,
)
def test_what_is_fused_has_no_finding(case: Case, kind: str, tmp_path: Path) -> None:
    onnx.save(case.model, tmp_path / "model.onnx")
    checked = check(tmp_path / "model.onnx")
    assert checked.findings == ()
    assert checked.fused == {kind: 1}


def layers(count: int, refused: int) -> onnx.ModelProto:
    """A chain of INT4 products, the first of which are in one block."""
    good, bad = Linear(n=256).model, Linear(n=256, block="channel").model
    made = onnx.ModelProto()
    made.CopyFrom(good)
    del made.graph.node[:], made.graph.initializer[:]
    value = "x"
    for i in range(count):
        part = bad if i < refused else good
        for node in part.graph.node:
            copy = made.graph.node.add()
            copy.CopyFrom(node)
            copy.name = f"layer.{i}.{node.op_type}"
            copy.input[:] = [value if name == "x" else f"{name}.{i}" for name in node.input]
            copy.output[:] = ["y" if i == count - 1 and name == "y" else f"{name}.{i}" for name in node.output]
        for tensor in part.graph.initializer:
            named = made.graph.initializer.add()
            named.CopyFrom(tensor)
            named.name = f"{tensor.name}.{i}"
        value = f"y.{i}"
    return made


def test_equal_findings_are_one_with_a_count(tmp_path: Path) -> None:
    onnx.save(layers(7, 5), tmp_path / "model.onnx")
    checked = check(tmp_path / "model.onnx", (75, 89, 120))
    refused, unfused = checked.findings
    assert (refused.rule, refused.verdict, refused.sm, refused.count) == ("compute-capability", "refused", (75,), 7)
    assert (unfused.rule, unfused.verdict, unfused.sm, unfused.count) == ("int4-one-block", "unfused", (75, 89, 120), 5)
    assert unfused.node == "layer.0.MatMul"
    assert not checked.builds
    assert check(tmp_path / "model.onnx").builds  # unfused is no refusal
    assert check(tmp_path / "model.onnx").fused == {"INT4 weights": 2}


def test_what_is_refused_is_not_counted_as_fused(tmp_path: Path) -> None:
    onnx.save(Linear(zero="other").model, tmp_path / "model.onnx")
    assert check(tmp_path / "model.onnx").fused == {}


@pytest.mark.parametrize("sm", [(), (90,), (89, 8)])
def test_unknown_capabilities(sm: tuple[int, ...], tmp_path: Path) -> None:
    onnx.save(Linear().model, tmp_path / "model.onnx")
    with pytest.raises(TargetError, match="compute capability"):
        check(tmp_path / "model.onnx", sm)


def test_rules_are_told_apart_and_say_what_to_do() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.reason and rule.remedy and "tensorrt_rtx" in rule.source for rule in RULES)
