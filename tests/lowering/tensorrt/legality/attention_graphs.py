"""Small ONNX graphs with one attention, in the ways that it may be written."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.lowering.tensorrt.legality.linear_graphs import CODES, FLOATS, constant, numpy_of


@dataclass(frozen=True)
class Attention:
    """One attention.

    Attributes:
        x: type of queries, keys and values.
        heads, kv: of queries, and of keys and values.
        head: channels of each; v_head: of values, if others.
        mask: "", "add", "bool", "causal", "causal+add", "f32": an additive one of another type.
        rank: 4, or 3 with the heads side by side.
        form: "onnx", "past", "outputs", "softcap", "precision", "nonpad", "trt" (lower right), "decomposable".
        opset, sm: of the file, and of the GPU.
    """

    x: str = "f16"
    heads: int = 4
    kv: int = 2
    head: int = 64
    v_head: int = 0
    mask: str = "add"
    rank: int = 4
    form: str = "onnx"
    opset: int = 23
    sm: int = 89

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(["attention", *changed])

    @property
    def model(self) -> onnx.ModelProto:
        kind = FLOATS[self.x]
        v_head = self.v_head or self.head

        def port(name: str, heads: int, length: str, head: int, dtype: int = kind) -> onnx.ValueInfoProto:
            shape: list[str | int] = (
                ["b", heads, length, head] if self.rank == 4 or name.startswith("past") else ["b", length, heads * head]
            )
            return helper.make_tensor_value_info(name, dtype, shape)

        total = "t" if self.form != "past" else "p"
        inputs = [port("q", self.heads, "s", self.head), port("k", self.kv, "t", self.head)]
        inputs.append(port("v", self.kv, "t", v_head))
        names = ["q", "k", "v"]
        attributes: dict[str, Any] = {}
        mask = self.mask.removeprefix("causal").removeprefix("+")
        if mask:
            dtype = {"add": kind, "bool": TensorProto.BOOL, "f32": TensorProto.FLOAT}[mask]
            inputs.append(helper.make_tensor_value_info("m", dtype, ["b", 1, "s", "t"]))
            names.append("m")
        if self.mask.startswith("causal"):
            attributes["is_causal"] = 1
        outputs = ["y"]
        if self.rank == 3:
            attributes |= {"q_num_heads": self.heads, "kv_num_heads": self.kv}
        if self.form == "past":
            names = [*names, *[""] * (4 - len(names)), "past_k", "past_v"]
            inputs += [port("past_k", self.kv, total, self.head), port("past_v", self.kv, total, v_head)]
            outputs += ["present_k", "present_v"]
        elif self.form == "outputs":
            outputs += ["", "", "qk"]
        elif self.form == "softcap":
            attributes["softcap"] = 30.0
        elif self.form == "precision":
            attributes["softmax_precision"] = TensorProto.FLOAT
        elif self.form == "nonpad":
            names = [*names, *[""] * (6 - len(names)), "n"]
            inputs.append(helper.make_tensor_value_info("n", TensorProto.INT64, ["b"]))
        elif self.form == "scale":
            attributes["scale"] = 0.1
        operator = "Attention"
        imports = [helper.make_opsetid("", self.opset)]
        if self.form == "trt":
            operator = "TRT_Attention"
            attributes = {"causal_kind": "lower_right"}
            imports.append(helper.make_opsetid("trt", 1))
            node = helper.make_node(operator, names, outputs, domain="trt", name="attention", **attributes)
        else:
            if self.form == "decomposable":
                attributes["TRT_decomposable"] = 1
            node = helper.make_node(operator, names, outputs, name="attention", **attributes)
        results = [helper.make_tensor_value_info(name, kind, None) for name in outputs if name]
        graph = helper.make_graph([node], "g", inputs, results)
        return helper.make_model(graph, opset_imports=imports, ir_version=11)


@dataclass(frozen=True)
class QuantizedAttention:
    """One attention of codes, of fixed lengths.

    Attributes:
        x: type that codes are dequantized to.
        codes: of queries, keys, values and softmax: "fp8" or "int8".
        rounded: which of queries, keys and values are codes.
        heads, kv, head: as `Attention`.
        queries, keys: how many.
        sm: of the GPU.
    """

    x: str = "f16"
    codes: str = "fp8"
    rounded: str = "qkv"
    heads: int = 4
    kv: int = 2
    head: int = 64
    queries: int = 32
    keys: int = 32
    sm: int = 89

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ",".join(["quantized-attention", *changed])

    @property
    def model(self) -> onnx.ModelProto:
        kind, codes = FLOATS[self.x], CODES[self.codes]
        shapes = {"q": [1, self.heads, self.queries, self.head], "m": [1, 1, self.queries, self.keys]}
        shapes |= {name: [1, self.kv, self.keys, self.head] for name in "kv"}
        nodes, names = [], []
        for name in "qkv":
            if name in self.rounded:
                nodes.append(helper.make_node("QuantizeLinear", [name, "scale"], [f"{name}1"], output_dtype=codes))
                nodes.append(helper.make_node("DequantizeLinear", [f"{name}1", "scale"], [f"{name}2"]))
            names.append(f"{name}2" if name in self.rounded else name)
        operator, kinds = "TRT_QuantizedAttention", dict[str, Any](normalization_quantize_to_type=codes, scale=1.0)
        nodes.append(helper.make_node(operator, [*names, "m", "weight_scale"], ["y"], domain="trt", name="a", **kinds))
        inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]
        constants = [constant(name, np.array(0.01).astype(numpy_of(kind)), kind) for name in ("scale", "weight_scale")]
        results = [helper.make_tensor_value_info("y", kind, shapes["q"])]
        graph = helper.make_graph(nodes, "g", inputs, results, constants)
        imports = [helper.make_opsetid("", 23), helper.make_opsetid("trt", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=11)


@dataclass(frozen=True)
class PlainAttention:
    """Attention in plain operators.

    Attributes:
        x: type of queries, keys and values.
        soft: of the softmax.
        heads: "same": as many of keys and values as of queries; of half as many: "expand": repeated, "grouped": an axis
            of their own, "rows": merged with the length, "moved": besides, apart again for the softmax.
        mask: whether one is added.
        sm: of the GPU.
    """

    x: str = "f16"
    soft: str = "f16"
    heads: str = "same"
    mask: bool = True
    sm: int = 89

    def __str__(self) -> str:
        return f"plain-attention,x={self.x},soft={self.soft},heads={self.heads},mask={self.mask}"

    @property
    def model(self) -> onnx.ModelProto:
        kind, soft = FLOATS[self.x], FLOATS[self.soft]
        few = 4 if self.heads == "same" else 2
        nodes: list[onnx.NodeProto] = []
        shapes = {"expand_to": [1, 1, 2, 1, 1], "split": [0, 2, 1, -1, 64], "heads": [0, 4, -1, 64]}
        shapes |= {"groups": [0, 2, 2, -1, 64], "rows": [0, 2, -1, 64], "axis": [2]}
        constants = [constant(name, np.array(values), TensorProto.INT64) for name, values in shapes.items()]
        constants.append(constant("scale", np.array(0.125).astype(numpy_of(kind)), kind))

        def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
            nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
            return output

        q, k, v = "q", "k", "v"
        if self.heads == "expand":
            k, v = (
                node(
                    "Reshape",
                    [node("Expand", [node("Reshape", [x, "split"], x + "1"), "expand_to"], x + "2"), "heads"],
                    x + "3",
                )
                for x in ("k", "v")
            )
        elif self.heads == "grouped":
            q, k, v = node("Reshape", [q, "groups"], "q5"), *(node("Unsqueeze", [x, "axis"], x + "5") for x in (k, v))
        elif self.heads in ("rows", "moved"):
            q = node("Reshape", [q, "rows"], "q5")
        rank = 5 if self.heads == "grouped" else 4
        turned = node("Transpose", [k], "kt", perm=[*range(rank - 2), rank - 1, rank - 2])
        s = node("Mul", [node("MatMul", [q, turned], "s0"), "scale"], "s1")
        if self.soft != self.x:
            s = node("Cast", [s], "s2", to=soft)
        if self.heads == "moved":
            s = node("Reshape", [s, node("Concat", ["start", node("Shape", ["m"], "ms", start=2)], "to", axis=0)], "s3")
            constants.append(constant("start", np.array([0, 4]), TensorProto.INT64))
        if self.mask:
            s = node("Add", [s, "m"], "s4")
        p = node("Softmax", [s], "p", axis=-1)
        if self.heads == "moved":
            constants.append(constant("both", np.array([0, 2, -1]), TensorProto.INT64))
            length = node("Shape", ["m"], "mt", start=3)
            p = node("Reshape", [p, node("Concat", ["both", length], "back", axis=0)], "p1")
        if self.soft != self.x:
            p = node("Cast", [p], "p2", to=kind)
        y = node("MatMul", [p, v], "y0")
        node("Reshape", [y, "heads"], "y")
        ports = [helper.make_tensor_value_info("q", kind, ["b", 4, "s", 64])]
        ports += [helper.make_tensor_value_info(name, kind, ["b", few, "t", 64]) for name in ("k", "v")]
        if self.mask or self.heads == "moved":
            shape: list[str | int] = ["b", *[1] * (rank - 3), "s", "t"]
            ports.append(helper.make_tensor_value_info("m", soft, shape))
        results = [helper.make_tensor_value_info("y", kind, ["b", 4, "s", 64])]
        graph = helper.make_graph(nodes, "g", ports, results, constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
