"""Operators against the cases that ONNX itself tests its backends with; modules with convolutions."""

import importlib
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import qcompiler as qc
from qcompiler.errors import UnsupportedModelError
from qcompiler.frontend.onnx import capture_onnx
from qcompiler.frontend.onnx.interpreter import Interpreter
from qcompiler.frontend.onnx.nodes import read_source
from qcompiler.storage import WeightStore
from tests.frontend.onnx.exported import by_onnxruntime, computed, port, saved, tensor

OPERATORS = {
    "elementwise": (
        "add",
        "clip",
        "div",
        "erf",
        "gelu",
        "isinf",
        "mod",
        "neg",
        "not_",
        "and_",
        "or_",
        "pow",
        "sigmoid",
        "sqrt",
    ),
    "more": (
        "bitshift",
        "equal",
        "greater",
        "max",
        "mean",
        "reciprocal",
        "softplus",
        "sub",
        "swish",
        "tanh",
        "where",
        "xor",
    ),
    "shapes": ("concat", "expand", "flatten", "pad", "reshape", "shape", "slice", "split", "squeeze", "tile", "trilu"),
    "places": ("gather", "gatherelements", "gathernd", "scatterelements", "transpose", "unsqueeze", "cumsum", "topk"),
    "reductions": ("reducemean", "reducesum", "reducemax", "reduceprod", "softmax", "argmax", "logsoftmax"),
    "products": ("matmul", "gemm", "einsum", "conv", "averagepool", "globalaveragepool", "matmulinteger"),
    "norms": ("layernormalization", "rmsnormalization", "groupnormalization"),
    "attention": ("attention", "rotaryembedding"),
    "quantized": ("quantizelinear", "dequantizelinear", "dynamicquantizelinear"),
}
LEAST = {"elementwise": 50, "more": 45, "shapes": 50, "places": 20, "reductions": 50, "products": 35, "norms": 25,
         "attention": 50, "quantized": 9}  # fmt: skip
MOST_KNOWN = 64
_LONG = ("products", "attention", "norms")


def cases(modules):
    """The cases of one node each that ONNX has for some operators."""
    from onnx.backend.test.case import node as package

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        for name in modules:
            importlib.import_module(f"{package.__name__}.{name}")
    wanted = {name.strip("_").replace("norm", "").replace("alization", "") for name in modules}
    for case in package._NodeTestCases:
        kind = case.model.graph.node[0].op_type.lower()
        if "same_values" in case.name:  # which of equal values comes first, torch does not say
            continue
        is_one = len(case.model.graph.node) == 1 and kind.replace("norm", "").replace("alization", "") in wanted
        arrays = [np.asarray(value) for value in case.data_sets[0][0]] if is_one else []
        if is_one and all(array.dtype.kind in "fib" or array.dtype == np.uint8 for array in arrays):
            yield case, arrays


def run(case, arrays, path):
    """What the interpreter makes of a case; inputs that may be shapes are stored, as they are in models."""
    path.write_bytes(case.model.SerializeToString())
    source = read_source(path)
    given = {declared.name: torch.from_numpy(a.copy()) for declared, a in zip(source.inputs, arrays, strict=True)}
    scalars = {n for n, t in given.items() if t.dim() <= 1 and t.numel() <= MOST_KNOWN and len(given) > 1}
    stored = {n: t for n, t in given.items() if n in scalars and (not t.is_floating_point() or t.numel() == 1)}
    if len(stored) == len(given):
        stored.popitem()
    store = WeightStore.from_tensors(stored)
    rest = [name for name in given if name not in stored]
    outputs = [declared.name for declared in source.outputs]
    interpreter = Interpreter(source.nodes, rest, outputs, store, source.versions, on_meta=False)
    return interpreter(tuple(given[n].float() if given[n].dtype == torch.float16 else given[n] for n in rest))


@pytest.mark.parametrize(
    "group", [pytest.param(group, marks=pytest.mark.slow) if group in _LONG else group for group in OPERATORS]
)
def test_operators_compute_what_onnx_says(group, tmp_path):
    """Every case is computed as ONNX has it, or refused by name; most are computed."""
    refused, agreed = Counter(), 0
    for case, arrays in cases(OPERATORS[group]):
        try:
            results = run(case, arrays, tmp_path / "case.onnx")
        except UnsupportedModelError as error:
            refused[str(error.got)] += 1
            continue
        for result, expected in zip(results, case.data_sets[0][1], strict=False):
            expected = np.asarray(expected)
            kind = np.float64 if expected.dtype.kind == "f" else expected.dtype
            found = result.double().numpy() if result.is_floating_point() else result.numpy()
            np.testing.assert_allclose(found, expected.astype(kind), rtol=2e-3, atol=1e-4, err_msg=case.name)
        agreed += 1
    assert agreed >= LEAST[group], (agreed, refused)


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, pixels):
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def test_convolutions_stay_and_layers_are_quantized(tmp_path):
    path = tmp_path / "vision.onnx"
    pixels = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Vision().eval(), (pixels,), str(path), dynamo=False, input_names=["pixels"], output_names=["features"],
            dynamic_axes={"pixels": {0: "batch"}, "features": {0: "batch"}}, opset_version=17,
        )  # fmt: skip
    graph = qc.capture(path)
    assert [site.name for site in graph.sites()] == ["up", "down"]
    assert [port.name for port in (*graph.signature.inputs, *graph.signature.outputs)] == ["pixels", "features"]
    other = torch.randn(3, 3, 8, 8)
    expected = by_onnxruntime(path, {"pixels": other})[0]
    torch.testing.assert_close(computed(graph, [other])[0], expected, rtol=1e-4, atol=1e-5)
    compiled = qc.compile(graph, "w8a8-rtn", [(torch.randn(2, 3, 8, 8),) for _ in range(3)]).graph
    assert {str(scheme.weight) for scheme in compiled.schemes.values()} == {"int8 per_channel symmetric"}
    assert any("conv" in str(node.target) for node in compiled.fx.nodes)


def test_a_branch_that_is_known_is_taken(tmp_path):
    def branch(factor):
        node = helper.make_node("Mul", ["x", f"c{factor}"], [f"o{factor}"])
        stored = [tensor(f"c{factor}", torch.tensor(float(factor)))]
        return helper.make_graph([node], f"b{factor}", [], [port(f"o{factor}", ["b", 4])], stored)

    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "one"], ["n"], axis=0),
        helper.make_node("Equal", ["n", "four"], ["is"]),
        helper.make_node("If", ["is"], ["y"], then_branch=branch(2), else_branch=branch(3)),
    ]
    numbers = [tensor("one", torch.tensor(1)), tensor("four", torch.tensor(4))]
    path = saved(tmp_path, nodes, [port("x", ["b", 4])], [port("y", ["b", 4])], numbers)
    x = torch.randn(2, 4)
    torch.testing.assert_close(computed(capture_onnx(path), [x])[0], 2 * x)


def test_functions_of_the_model_are_put_in_place(tmp_path):
    path = saved(tmp_path, [helper.make_node("Twice", ["x"], ["y"], domain="own")], [port("x", ["b", 4])],
                 [port("y", ["b", 4])], [])  # fmt: skip
    import onnx

    model = onnx.load(path)
    sets = [helper.make_opsetid("", 21)]
    body = [helper.make_node("Add", ["a", "a"], ["r"])]
    model.functions.append(helper.make_function("own", "Twice", ["a"], ["r"], body, sets))
    model.opset_import.append(helper.make_opsetid("own", 1))
    path.write_bytes(model.SerializeToString())
    x = torch.randn(2, 4)
    torch.testing.assert_close(computed(capture_onnx(path), [x])[0], 2 * x)


def grouped(folder, **attributes):
    """A GroupQueryAttention over a cache, as the builder of onnxruntime-genai makes it."""
    names = ["q", "k", "v", "past_key_values.0.key", "past_key_values.0.value", "lengths", "total", "cos", "sin"]
    node = helper.make_node(
        "GroupQueryAttention", names, ["y", "present.0.key", "present.0.value"], domain="com.microsoft",
        num_heads=4, kv_num_heads=2, do_rotary=1, **attributes,
    )  # fmt: skip
    angles = torch.arange(16.0)[:, None] * torch.rand(8)
    given = [port("q", ["b", "s", 64]), port("k", ["b", "s", 32]), port("v", ["b", "s", 32])]
    given += [port(name, ["b", 2, "p", 16]) for name in names[3:5]]
    given += [port("lengths", ["b"], TensorProto.INT32), port("total", [], TensorProto.INT32)]
    outputs = [port("y", ["b", "s", 64]), *(port(f"present.0.{p}", ["b", 2, "t", 16]) for p in ("key", "value"))]
    return saved(folder, [node], given, outputs, [tensor("cos", angles.cos()), tensor("sin", angles.sin())])


@pytest.mark.parametrize(
    "attributes",
    [
        {"local_window_size": 3, "softcap": 2.0},
        *(pytest.param(one, marks=pytest.mark.slow) for one in ({}, {"rotary_interleaved": 1})),
    ],
)
def test_grouped_attention_is_that_of_onnxruntime(tmp_path, attributes):
    path = grouped(tmp_path, **attributes)
    graph = capture_onnx(path)
    assert [(p.role, p.part) for p in graph.signature.inputs if p.role == "past"] == [
        ("past", "key"),
        ("past", "value"),
    ]
    assert Counter(str(node.target) for node in graph.fx.nodes)["qcompiler.kv_append.default"] == 2
    queries = 1
    inputs = {
        "q": torch.randn(2, queries, 64), "k": torch.randn(2, queries, 32), "v": torch.randn(2, queries, 32),
        "past_key_values.0.key": torch.randn(2, 2, 5, 16), "past_key_values.0.value": torch.randn(2, 2, 5, 16),
        "lengths": torch.tensor([5, 5], dtype=torch.int32), "total": torch.tensor(6, dtype=torch.int32),
    }  # fmt: skip
    expected = by_onnxruntime(path, inputs)
    for got, wanted in zip(computed(graph, list(inputs.values())), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
