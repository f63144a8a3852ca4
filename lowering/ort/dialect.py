"""The builders of ONNX Runtime's own operators."""

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from qcompiler.lowering.onnx.dialect import WORKING, Dialect
from qcompiler.lowering.onnx.dtypes import dtype_of
from qcompiler.lowering.onnx.emitter import Builders, Emitter
from qcompiler.lowering.ort.fusing import operators
from qcompiler.lowering.ort.weights import Blocked, biases_of, codes_of, scales_of, zero_points_of

__all__ = ["DOMAIN", "OPSET", "ort_dialect"]

DOMAIN = "com.microsoft"
OPSET = 23
"""The first with RMSNormalization; ONNX Runtime writes Attention of later ones out (1.32)."""
_FLOAT, _INT32, _INT64 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.INT64


def ort_dialect(float_dtype: str) -> Dialect:
    """How a fused graph is written, in ``float32`` or ``float16``; products are exact until their level is chosen."""
    return Dialect(OPSET, WORKING[float_dtype], True, builders=_BUILDERS, domains={DOMAIN: 1})


def _matmul_nbits(e: Emitter, node: fx.Node) -> ir.Value | tuple[ir.Value, ...]:
    x_node, codes, scales, zeros, biases = node.args
    options: dict[str, Any] = dict(node.kwargs)
    form = {"block": options["block"], "bits": options["bits"]}
    parts = [
        Blocked.of(e, *names, group=group, **form)
        for *names, group in zip(codes, scales, zeros, options["groups"], strict=True)  # type: ignore[arg-type]
    ]
    x = e.value(x_node, e.float_like(x_node))
    dtype, rows = dtype_of(x), [part.rows for part in parts]
    name = f"{options['sites'][0]}/MatMulNBits"
    (result,) = e.ops(
        "MatMulNBits",
        x,
        codes_of(e, parts),
        scales_of(e, parts, dtype),
        zero_points_of(e, parts),
        None,
        biases_of(e, rows, biases, dtype),  # type: ignore[arg-type]
        dtypes=(dtype,),
        name=name,
        domain=DOMAIN,
        K=parts[0].width,
        N=sum(rows),
        bits=options["bits"],
        block_size=options["block"],
        accuracy_level=0,
    )
    e.products.update(dict.fromkeys(options["sites"], name))
    if not options["split"]:
        return result
    return e.ops("Split", result, e.const(rows), dtypes=(dtype,) * len(rows), axis=-1)


# --- attention -------------------------------------------------------------------------------------------------------


def _group_query_attention(e: Emitter, node: fx.Node) -> tuple[ir.Value, ...]:
    *tokens, past_key, past_value, mask, cos, sin, key_scale, value_scale = node.args
    options: dict[str, Any] = dict(node.kwargs)
    dtype, bits = e.working, options["bits"]
    parts = [None if part is None else e.value(part, dtype) for part in tokens]
    pasts = [e.value(past) for past in (past_key, past_value)]
    lengths = e.op("ReduceSum", e.value(mask, _INT64), e.const([1]), keepdims=0)
    last = e.cast(e.op("Sub", lengths, e.const(1)), _INT32)
    total = e.op("Gather", e.op("Shape", e.value(mask), dtype=_INT64), e.const(1), axis=0)
    tables = [None if table is None else _stored(e, table, dtype) for table in (cos, sin)]
    scales = [None if scale is None else _stored(e, scale, _FLOAT) for scale in (key_scale, value_scale)]
    kinds = [None if scale is None else _kind(scale) for scale in (key_scale, value_scale)]
    name = f"{node.name}/GroupQueryAttention"
    results = e.ops(
        "GroupQueryAttention",
        *parts,
        *pasts,
        last,
        e.cast(total, _INT32),
        *tables,
        None,  # position_ids
        None,  # attention_bias
        None,  # head_sink
        *scales,
        dtypes=(dtype, *(dtype_of(past) for past in pasts)),
        name=name,
        domain=DOMAIN,
        num_heads=options["heads"],
        kv_num_heads=options["kv_heads"],
        scale=options["scale"],
        do_rotary=int(cos is not None),
        rotary_interleaved=int(options["interleaved"]),
        local_window_size=-1 if options["window"] is None else options["window"],
        softcap=options["softcap"],
        k_quant_type=kinds[0],
        v_quant_type=kinds[1],
        kv_cache_bit_width=bits,
    )
    e.attentions[node.name] = [name]
    return results


def _stored(e: Emitter, node: object, dtype: ir.DataType) -> ir.Value:
    assert isinstance(node, fx.Node)
    return e.weight(node, dtype)


def _kind(scale: object) -> str:
    assert isinstance(scale, fx.Node)
    return "PER_CHANNEL" if len(scale.meta["shape"]) == 4 else "PER_TENSOR"


def _merge_heads(e: Emitter, node: fx.Node) -> ir.Value:
    (x,) = node.args
    value = e.value(x, e.float_like(x))
    if node.kwargs["swapped"]:
        value = e.op("Transpose", value, perm=[0, 2, 1, 3])
    return e.op("Reshape", value, e.const([0, 0, -1]))


def _split_heads(e: Emitter, node: fx.Node) -> ir.Value:
    value = e.op("Reshape", e.value(node.args[0]), e.const([0, 0, node.kwargs["heads"], -1]))
    return e.op("Transpose", value, perm=[0, 2, 1, 3])


def _rotary_embedding(e: Emitter, node: fx.Node) -> ir.Value:
    x_node, positions, cos, sin = node.args
    x = e.value(x_node, e.float_like(x_node))
    tables = [_stored(e, table, dtype_of(x)) for table in (cos, sin)]
    (result,) = e.ops(
        "RotaryEmbedding",
        x,
        e.value(positions, _INT64),
        *tables,
        dtypes=(dtype_of(x),),
        domain=DOMAIN,
        interleaved=int(bool(node.kwargs["interleaved"])),
    )
    return result


# --- norms and tables ------------------------------------------------------------------------------------------------


def _skip_rms_norm(e: Emitter, node: fx.Node) -> tuple[ir.Value, ...]:
    return _skip(e, "SkipSimplifiedLayerNormalization", node)


def _skip_layer_norm(e: Emitter, node: fx.Node) -> tuple[ir.Value, ...]:
    return _skip(e, "SkipLayerNormalization", node)


def _skip(e: Emitter, kind: str, node: fx.Node) -> tuple[ir.Value, ...]:
    dtype = e.float_like(*node.args[:2])
    values = [None if part is None else e.value(part, dtype) for part in node.args]
    dtypes = (dtype, None, None, dtype)
    normed, _, _, total = e.ops(kind, *values, dtypes=dtypes, domain=DOMAIN, epsilon=node.kwargs["eps"])
    return normed, total


def _rms_norm(e: Emitter, node: fx.Node) -> ir.Value:
    """In float32 inside, as ``stash_type`` has it."""
    x = e.value(node.args[0], e.float_like(node.args[0]))
    weight = e.value(node.args[1], dtype_of(x))
    return e.op("RMSNormalization", x, weight, dtype=dtype_of(x), axis=-1, epsilon=node.args[2])


def _gather_block_quantized(e: Emitter, node: fx.Node) -> ir.Value:
    ids, codes, scale, zero = node.args
    options: dict[str, Any] = dict(node.kwargs)
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    assert zero is None or isinstance(zero, fx.Node)
    table = [Blocked.of(e, codes, scale, zero, **options)]
    (result,) = e.ops(
        "GatherBlockQuantized",
        codes_of(e, table, flat=True),
        e.value(ids),
        scales_of(e, table, e.working),
        zero_points_of(e, table),
        dtypes=(e.working,),
        domain=DOMAIN,
        bits=options["bits"],
        block_size=options["block"],
        gather_axis=0,
        quantize_axis=1,
    )
    return result


_BUILDERS: Builders = {
    torch.ops.qcompiler.rms_norm.default: _rms_norm,
    operators.matmul_nbits: _matmul_nbits,
    operators.group_query_attention: _group_query_attention,
    operators.merge_heads: _merge_heads,
    operators.split_heads: _split_heads,
    operators.rotary_embedding: _rotary_embedding,
    operators.skip_rms_norm: _skip_rms_norm,
    operators.skip_layer_norm: _skip_layer_norm,
    operators.gather_block_quantized: _gather_block_quantized,
}
