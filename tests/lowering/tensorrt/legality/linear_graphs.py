"""Small ONNX graphs with one quantized linear layer, in every way that one may be written."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

FLOATS = {"f16": TensorProto.FLOAT16, "f32": TensorProto.FLOAT, "bf16": TensorProto.BFLOAT16}
CODES = {
    "int2": TensorProto.INT2,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int16": TensorProto.INT16,
    "fp8": TensorProto.FLOAT8E4M3FN,
    "e5m2": TensorProto.FLOAT8E5M2,
    "fp4": TensorProto.FLOAT4E2M1,
}


@dataclass(frozen=True)
class Linear:
    """A quantized linear layer.

    Attributes:
        weight: type of the codes.
        block: their granularity: "tensor", "channel", or a number of rows that share a scale, as text.
        k, n: sizes of the matrix.
        x: type of the input and, unless ``scale`` says otherwise, of the scales.
        scale: type of the weight's scales.
        layout: of the codes: "kn", "nk" (behind a Transpose), "gemm", "gemm_t", "experts", "bias".
        rank: of the input.
        between: an operator between DequantizeLinear and the product.
        zero: of the weight's zero point: "none", "zero", "other", "uint8".
        sign: of the weight's scales: "+", "-", "0".
        out: ``output_dtype`` of the weight's DequantizeLinear, or "".
        act: how the input is rounded.
        opset, sm: of the file, and of the GPU.
    """

    weight: str = "int4"
    block: str = "64"
    k: int = 256
    n: int = 128
    x: str = "f16"
    scale: str = ""
    layout: str = "kn"
    rank: int = 3
    between: str = ""
    zero: str = "none"
    sign: str = "+"
    out: str = ""
    act: str = ""
    opset: int = 23
    sm: int = 89

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(changed) or "default"

    @property
    def model(self) -> onnx.ModelProto:
        return _Writer(self).write()


def constant(name: str, values: object, dtype: int) -> TensorProto:
    """An initializer, of a type that numpy may not have."""
    return ir.serde.serialize_tensor(ir.tensor(np.asarray(values), dtype=ir.DataType(dtype), name=name))


def numpy_of(dtype: int) -> np.dtype:
    """What numpy calls an ONNX type."""
    return np.dtype(ir.DataType(dtype).numpy())


class _Writer:
    def __init__(self, form: Linear) -> None:
        self.form = form
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.rng = np.random.default_rng(0)

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}_{kind}", **attributes))
        return output

    def const(self, name: str, values: object, dtype: str | int) -> str:
        number = dtype if isinstance(dtype, int) else {**FLOATS, **CODES, "i64": TensorProto.INT64}[dtype]
        self.constants.append(constant(name, np.asarray(values).astype(numpy_of(number)), number))
        return name

    def write(self) -> onnx.ModelProto:
        form = self.form
        a, w, after = self.activation(), self.weight(), ""
        if isinstance(a, tuple):
            a, after = a
        if form.layout in ("gemm", "gemm_t"):
            y = self.node("Gemm", [a, w], "y0", transB=int(form.layout == "gemm_t"))
        else:
            y = self.node("MatMul", [a, w], "y0")
        if after:
            y = self.node("Mul", [y, after], "y1")
        if form.layout == "bias":
            y = self.node("Add", [y, self.const("bias", self.rng.standard_normal(form.n), self.product)], "y2")
        self.node("Identity", [y], "y")
        leads: dict[int, list[str | int]] = {1: [], 2: ["b"], 3: ["b", "s"], 4: ["b", 2, "s"]}
        lead = leads[form.rank]
        if form.layout == "experts":
            lead = [4, "s"]
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", FLOATS[form.x], [*lead, form.k])],
            [helper.make_tensor_value_info("y", FLOATS[self.product], [*lead, form.n])],
            self.constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", form.opset)], ir_version=10)

    @property
    def product(self) -> str:
        """Type of what is multiplied."""
        if self.form.between == "cast":
            return self.form.x
        return self.form.out or self.form.scale or self.form.x

    def weight(self) -> str:
        form = self.form
        turned = form.layout in ("nk", "gemm_t")
        experts: list[int] = [4] if form.layout == "experts" else []
        k, n = form.k, form.n
        codes = self.rng.integers(-6, 7, (*experts, k, n))
        if form.weight in ("uint4", "uint8"):
            codes = np.abs(codes)
        if form.weight == "int2":
            codes = np.clip(codes, -2, 1)
        axis = -2
        attributes: dict[str, Any] = {}
        if form.block == "tensor":
            shape: list[int] = []
        elif form.block == "channel":
            shape, axis = [n], -1
        elif form.block == "rows":  # a scale for each input channel
            shape, axis = [k], -2
        elif form.block.startswith("n"):  # blocks along the output channels
            size, axis = int(form.block[1:]), -1
            shape = [*experts, k, -(-n // size)]
            attributes["block_size"] = size
        else:
            size = int(form.block)
            shape = [*experts, -(-k // size), n]
            attributes["block_size"] = size
        scales = self.rng.random(shape) * 0.01 + 0.001
        scales = {"+": scales, "-": -scales, "0": scales * (self.rng.random(shape) > 0.1)}[form.sign]
        if turned:
            codes, axis = np.swapaxes(codes, -1, -2), -3 - axis
            scales = np.swapaxes(scales, -1, -2) if scales.ndim > 1 else scales
        kind = form.scale or form.x
        if form.out:
            attributes["output_dtype"] = FLOATS[form.out]
        if scales.ndim:
            attributes["axis"] = codes.ndim + axis
        inputs = [self.const("w", codes, form.weight), self.const("ws", scales, kind)]
        if form.zero != "none":
            zero_type = "uint8" if form.zero == "uint8" else form.weight
            inputs.append(self.const("wz", np.full(scales.shape, int(form.zero == "other")), zero_type))
        w = self.node("DequantizeLinear", inputs, "wd", **attributes)
        if form.between == "cast":
            w = self.node("Cast", [w], "wc", to=FLOATS[form.x])
        elif form.between == "mul":
            w = self.node("Mul", [w, self.const("wm", 0.5, self.product)], "wm_")
        elif form.between == "identity":
            w = self.node("Identity", [w], "wi")
        elif form.between == "reshape":
            w = self.node(
                "Reshape", [w, self.const("wshape", [*experts, *(n, k)] if turned else [*experts, k, n], "i64")], "wr"
            )
        elif form.between == "sub":
            w = self.node("Sub", [w, self.const("wo", np.full((1, n), 0.25), self.product)], "wo_")
        if form.layout == "nk":
            w = self.node("Transpose", [w], "wt", perm=[1, 0])
        return w

    def activation(self) -> str | tuple[str, str]:
        form, act = self.form, self.form.act
        x = "x"
        if not act:
            return x if self.product == form.x else self.node("Cast", [x], "xc", to=FLOATS[self.product])
        how, _, kind = act.partition(":")
        if self.product != form.x:
            x = self.node("Cast", [x], "xc", to=FLOATS[self.product])
        code = CODES.get(kind, 0)
        scale_kind = self.product
        if how == "channel":
            scale = self.const("xs", np.full(form.k, 0.05), scale_kind)
            q = self.node("QuantizeLinear", [x, scale], "xq", axis=-1, output_dtype=code)
            return self.node("DequantizeLinear", [q, scale], "xd", axis=-1)
        if how in (
            "static",
            "static_cast",
            "static_zp",
            "asymmetric",
            "static_negative",
            "static_f32",
            "default",
            "mulled",
        ):
            if how == "static_f32":  # rounded in float32, multiplied in the type of x
                scale_kind = "f32"
                x = self.node("Cast", [x], "xf", to=FLOATS["f32"])
            scale = self.const("xs", -0.05 if how == "static_negative" else 0.05, scale_kind)
            zero = []
            if how in ("static_zp", "asymmetric"):
                zero = [self.const("xz", 3 if how == "asymmetric" else 0, kind)]
            attributes = {} if zero or how == "default" else {"output_dtype": code}
            q = self.node("QuantizeLinear", [x, scale, *zero], "xq", **attributes)
            d = self.node("DequantizeLinear", [q, scale, *zero], "xd")
            if how == "static_cast" or (how == "static_f32" and self.product != "f32"):
                d = self.node("Cast", [d], "xdc", to=FLOATS[self.product])
            if how == "mulled":
                d = self.node("Mul", [d, self.const("xm", 0.5, scale_kind)], "xdm")
            return d
        if how in ("block", "computed"):  # scales computed at run time go into QuantizeLinear
            top = self.node("ReduceMax", [self.node("Abs", [x], "xa"), self.const("ax", [-1], "i64")], "xm", keepdims=1)
            scale = self.node("Div", [top, self.const("big", 127.0, scale_kind)], "xs")
            q = self.node("QuantizeLinear", [x, scale], "xq", axis=form.rank - 1, block_size=form.k, output_dtype=code)
            return self.node("DequantizeLinear", [q, scale], "xd", axis=form.rank - 1, block_size=form.k)
        # token: divided by the scale ahead, multiplied with it behind the product; token_before: ahead of the product
        top = self.node("ReduceMax", [self.node("Abs", [x], "xa"), self.const("ax", [-1], "i64")], "xm", keepdims=1)
        scale = self.node("Div", [top, self.const("big", 127.0, scale_kind)], "xs")
        divided = self.node("Div", [x, scale], "xn")
        one = self.const("one", 1.0, scale_kind)
        q = self.node("QuantizeLinear", [divided, one], "xq", output_dtype=code)
        d = self.node("DequantizeLinear", [q, one], "xd")
        if how == "token_before":
            return self.node("Mul", [d, scale], "xe")
        return d, scale
