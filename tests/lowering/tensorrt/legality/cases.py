"""The generated graphs that rules and builder are held together over."""

from collections.abc import Iterator
from itertools import product

from tests.lowering.tensorrt.legality.attention_graphs import Attention, PlainAttention, QuantizedAttention
from tests.lowering.tensorrt.legality.linear_graphs import Linear
from tests.lowering.tensorrt.legality.operator_graphs import OPERATORS, Operator

Case = Linear | Attention | PlainAttention | QuantizedAttention | Operator

INT8, FP8 = ("int8", "channel"), ("fp8", "channel")
COMMON = (("int4", "64"), INT8, FP8)


def _weights() -> Iterator[Linear]:
    """Types, granularities, block sizes, sizes and capabilities, with activations in float."""
    for block in (
        "1",
        "2",
        "4",
        "8",
        "16",
        "24",
        "32",
        "96",
        "128",
        "192",
        "256",
        "channel",
        "tensor",
        "rows",
        "n2",
        "n128",
    ):
        yield Linear(block=block)
    for x, block in product(("f32", "bf16"), ("8", "32", "64", "128", "256", "channel", "tensor")):
        yield Linear(x=x, block=block)
    for (weight, block), sm, x in product(COMMON, (75, 80, 86, 120), ("f16", "f32", "bf16")):
        yield Linear(weight, block, x=x, sm=sm)
    for n in (1, 2, 7, 8, 63, 66, 100):
        yield Linear(n=n)
    for k, block, n in (
        (250, "64", 128),
        (66, "33", 128),
        (64, "64", 128),
        (8, "4", 128),
        (63, "21", 64),
        (63, "21", 63),
    ):
        yield Linear(k=k, block=block, n=n)
    for weight, block in product(("int8", "fp8"), ("32", "128", "256", "rows", "n32", "tensor")):
        yield Linear(weight, block)
    for (weight, block), (k, n) in product(
        (INT8, FP8, ("fp8", "tensor")), ((255, 128), (256, 127), (250, 126), (8, 8))
    ):
        yield Linear(weight, block, k=k, n=n)
    for weight, block in product(("int16", "e5m2", "int2", "uint4", "uint8"), ("channel", "64")):
        yield Linear(weight, block, opset=25)
    for block, sm in product(("16", "channel", "tensor"), (89, 120)):
        yield Linear("fp4", block, sm=sm)
    for opset, (weight, block) in product((21, 22, 24, 25), COMMON):
        yield Linear(weight, block, opset=opset)


def _placements() -> Iterator[Linear]:
    """What stands between weights and product, and how scales, zero points and outputs are typed."""
    for layout, rank, (weight, block) in product(
        ("nk", "gemm", "gemm_t", "experts", "bias"), (2, 3), (*COMMON, ("int4", "channel"))
    ):
        if not (rank == 3 and layout.startswith("gemm")) and not (rank == 2 and layout == "experts"):
            yield Linear(weight, block, layout=layout, rank=rank)
    for between, (weight, block), scale in product(("cast", "mul", "identity", "reshape", "sub"), COMMON, ("", "f32")):
        yield Linear(weight, block, between=between, scale=scale)
    for x, scale, (weight, block) in product(("f16", "f32", "bf16"), ("f16", "f32", "bf16"), COMMON):
        if x != scale:
            yield Linear(weight, block, x=x, scale=scale)
            yield Linear(weight, block, x=x, scale=scale, between="cast")
    for (weight, block), zero in product(COMMON, ("zero", "other")):
        yield Linear(weight, block, zero=zero)
    yield from (Linear(block="256", n=63, zero="zero"), Linear(block="tensor", k=255, zero="zero"))
    for (weight, block), sign in product(COMMON, ("-", "0")):
        yield Linear(weight, block, sign=sign)
    for (weight, block), scale, out in product((*COMMON, ("fp4", "16")), ("f16", "f32"), ("f16", "f32", "bf16")):
        yield Linear(weight, block, scale=scale, out=out, sm=120 if weight == "fp4" else 89)
    for (weight, block), rank in product(COMMON, (1, 2, 4)):
        yield Linear(weight, block, rank=rank)


def _activations() -> Iterator[Linear]:
    """Rounded activations of all forms."""
    pairs = ((*INT8, "int8"), ("int8", "tensor", "int8"), (*FP8, "fp8"), ("int4", "64", "int8"), ("int8", "64", "int8"))
    forms = ("static", "static_cast", "static_zp", "asymmetric", "static_negative", "static_f32", "default", "mulled")
    for how, (weight, block, act), rank in product(
        (*forms, "channel", "block", "token", "token_before"), pairs, (2, 3)
    ):
        yield Linear(weight, block, act=f"{how}:{act}", rank=rank)
    for (weight, block, act), sm, x in product(pairs[:3], (75, 80, 86, 120), ("f16", "f32", "bf16")):
        yield Linear(weight, block, act=f"static:{act}", sm=sm, x=x)
    for layout, (weight, block, act) in product(("nk", "gemm", "gemm_t", "experts"), pairs):
        yield Linear(weight, block, act=f"static:{act}", layout=layout, rank=3 if layout == "experts" else 2)
    for k, n, (weight, block, act) in ((k, n, pair) for k, n in ((255, 127), (3, 5), (1, 4)) for pair in pairs[:3]):
        yield Linear(weight, block, act=f"static:{act}", k=k, n=n)
    for weight, block, act in ((*INT8, "fp8"), (*FP8, "int8"), ("int4", "channel", "int8"), ("int4", "tensor", "fp8")):
        yield Linear(weight, block, act=f"static:{act}")
        yield Linear(weight, block, act=f"token:{act}")
    for act, rank in (("static:int8", 1), ("static:int8", 3), ("channel:int8", 1), ("channel:fp8", 3)):
        yield Linear("int8", "rows", act=act, rank=rank)
    yield from (Linear(*INT8, act="channel:fp8"), Linear(*INT8, act="channel:int8", k=255))
    yield from (Linear(*INT8, act=f"static_f32:{act}", layout="gemm_t", rank=2, n=63) for act in ("int8", "fp8"))
    yield from (Linear("fp4", block, act="token:int8", sm=120) for block in ("channel", "n32"))
    for scale, out in product(("f16", "f32"), ("f16", "f32", "bf16")):
        yield Linear(*INT8, act="static:int8", scale=scale, out=out)


def _attentions() -> Iterator[Attention | PlainAttention]:
    for x, sm in product(("f16", "bf16", "f32"), (75, 80, 86, 89, 120)):
        yield Attention(x, sm=sm)
    for head in (7, 8, 9, 16, 33, 64, 100, 256, 257, 512):
        yield Attention(head=head)
    for mask, rank in product(("", "bool", "causal", "causal+add", "f32"), (3, 4)):
        yield Attention(mask=mask, rank=rank)
    for form in ("past", "outputs", "softcap", "precision", "scale", "decomposable"):
        yield Attention(form=form)
    for heads, kv, mask in ((4, 4, "add"), (4, 1, "add"), (4, 3, "add"), (1, 1, "add"), (1, 1, ""), (1, 1, "causal")):
        yield Attention(heads=heads, kv=kv, mask=mask)
    yield from (Attention(head=128, v_head=64), Attention(form="nonpad", opset=24), Attention(opset=25))
    yield from (Attention(form="trt", mask="", rank=rank) for rank in (3, 4))
    yield from (Attention(form="trt"), Attention("f32", form="decomposable"), Attention(head=512, form="decomposable"))
    types = (("f16", "f16"), ("f16", "f32"), ("bf16", "f32"), ("f32", "f32"))
    for (x, soft), axes in product(types, ("same", "expand", "grouped", "rows", "moved")):
        yield PlainAttention(x, soft, axes, mask=axes != "rows")


def _quantized_attentions() -> Iterator[QuantizedAttention]:
    """Types, heads and lengths."""
    yield from (QuantizedAttention(sm=sm) for sm in (86, 89, 120))
    yield from (QuantizedAttention(x) for x in ("bf16", "f32"))
    yield from (QuantizedAttention(rounded=rounded) for rounded in ("", "kv", "qk"))
    yield from (QuantizedAttention(codes="int8"), QuantizedAttention(heads=1, kv=1))
    yield from (QuantizedAttention(queries=n, keys=keys) for n in (1, 2, 64) for keys in (1, 31, 40))
    yield from (QuantizedAttention(head=head, queries=n) for head in (8, 20, 256, 264) for n in (1, 32))


CASES: tuple[Case, ...] = tuple(
    dict.fromkeys((*_weights(), *_placements(), *_activations(), *_attentions(), *_quantized_attentions(), *OPERATORS))
)
