"""ONNX files that are broken, hostile or unusual."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from qcompiler.errors import InputError
from qcompiler.lowering.tensorrt.legality import check, read_model
from tests.lowering.tensorrt.legality.linear_graphs import Linear

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'


def written(folder: Path, text: str) -> Path:
    return saved(folder, onnx.parser.parse_model(HEAD + text))


def saved(folder: Path, proto: onnx.ModelProto) -> Path:
    file = folder / "model.onnx"
    file.write_bytes(proto.SerializeToString())
    return file


def with_external_weight(folder: Path, **entry: object) -> Path:
    """A product with a float32 weight ``[64, 64]`` in ``weights.bin``, and its place as told."""
    (folder / "weights.bin").write_bytes(np.ones((64, 64), np.float32).tobytes())
    proto = onnx.parser.parse_model(HEAD + "g (float[b,64] x) => (float[b,64] y) { y = MatMul(x, w) }")
    tensor = proto.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[64, 64])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "weights.bin", **entry}.items():
        tensor.external_data.add(key=key, value=str(value))
    return saved(folder, proto)


def refused(file: Path, match: str) -> InputError:
    with pytest.raises(InputError, match=match) as caught:
        read_model(file)
    assert caught.value.where is not None
    return caught.value


@pytest.mark.parametrize("content", [b"", b"\x08\x0a", b"no protobuf at all", bytes(range(7, 71)), b"{}"])
def test_not_an_onnx_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    refused(file, "not an ONNX")


def test_no_file(tmp_path: Path) -> None:
    refused(tmp_path / "missing.onnx", "no such file")
    refused(tmp_path, "no such file")


def test_a_truncated_file(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    whole = Linear().model.SerializeToString()
    for size in (len(whole) // 3, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(file, "not an ONNX|that nothing makes|values that do not fill")


def test_a_protobuf_of_more_than_two_gigabytes(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    with file.open("wb") as stream:
        stream.truncate(2**31)  # a hole: no room on disk is taken
    error = refused(file, "larger than a protobuf")
    assert "save_as_external_data" in str(error.remedy)


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname", "a/../../weights.bin", "link.bin", ""])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "weights.bin").write_bytes(bytes(64 * 64 * 4))
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    refused(with_external_weight(folder, location=location), "outside the folder")


def test_external_data_missing(tmp_path: Path) -> None:
    refused(with_external_weight(tmp_path, location="nowhere.bin"), "is missing")


@pytest.mark.parametrize("entry", [{"offset": 1}, {"length": 10}, {"offset": -4}, {"offset": 0, "length": 20000}])
def test_external_data_too_short(tmp_path: Path, entry: dict[str, int]) -> None:
    refused(with_external_weight(tmp_path, **entry), "too short")


def test_external_data_without_a_number(tmp_path: Path) -> None:
    refused(with_external_weight(tmp_path, offset="far"), "no number")


def test_weights_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = with_external_weight(tmp_path)
    monkeypatch.setattr(ir.ExternalTensor, "numpy", None)  # would be called to read
    found = read_model(file)
    assert found.graph.initializers["w"].shape == [64, 64]
    assert check(file).builds


def test_cycle(tmp_path: Path) -> None:
    error = refused(
        written(tmp_path, "g (float[b,4] x) => (float[b,4] y) { a = Add(x, c) c = Relu(a) y = Relu(c) }"), "cycle"
    )
    assert "2 nodes" in str(error.got) or "3 nodes" in str(error.got)


def test_a_value_that_nothing_makes(tmp_path: Path) -> None:
    error = refused(written(tmp_path, "g (float[b,4] x) => (float[b,4] y) { y = MatMul(x, weight) }"), "nothing makes")
    assert error.got == "weight"


def test_an_output_that_nothing_makes(tmp_path: Path) -> None:
    refused(written(tmp_path, "g (float[b,4] x) => (float[b,4] y) { z = Relu(x) }"), "an output that nothing makes")


def test_a_value_made_twice(tmp_path: Path) -> None:
    refused(written(tmp_path, "g (float[b,4] x) => (float[b,4] y) { y = Relu(x) y = Neg(x) }"), "made twice")


@pytest.mark.parametrize(
    "text",
    [
        "g (float[b,4] x, float[3,5] w) => (float[b,5] y) { y = MatMul(x, w) }",
        "g (float[2,4] x, float[2,3] w) => (float[2,4] y) { y = Add(x, w) }",
        "g (float[b,4] x) => (float[b,5] y) { y = Relu(x) }",
        "g (float[b,4] x) => (float16[b,4] y) { y = Relu(x) }",
    ],
)
def test_shapes_and_types_that_do_not_fit(tmp_path: Path, text: str) -> None:
    refused(written(tmp_path, text), "do not fit")


def test_an_initializer_with_too_few_values(tmp_path: Path) -> None:
    proto = Linear().model
    scales = next(tensor for tensor in proto.graph.initializer if tensor.name == "ws")
    scales.raw_data = scales.raw_data[:-2]
    refused(saved(tmp_path, proto), "values that do not fill")


def test_nodes_in_another_order_are_sorted(tmp_path: Path) -> None:
    file = written(tmp_path, "g (float[b,4] x) => (float[b,4] y) { y = Neg(b1) b1 = Relu(a1) a1 = Abs(x) }")
    assert [node.op_type for node in read_model(file).graph] == ["Abs", "Relu", "Neg"]


IF = """g (float[b,4] x, bool c) => (float[b,4] y) {{
    a = Abs(x)
    y = If(c) <then_branch = t () => (float[b,4] p) {{ {then} }}, else_branch = e () => (float[b,4] n) {{ n = Neg(x) }}>
}}"""


def test_subgraphs_read_what_is_around_them(tmp_path: Path) -> None:
    found = read_model(written(tmp_path, IF.format(then="p = Relu(a)")))
    assert {node.op_type for node in found.graph.all_nodes()} == {"Abs", "If", "Relu", "Neg"}


def test_a_missing_value_and_a_cycle_inside_of_a_subgraph(tmp_path: Path) -> None:
    refused(written(tmp_path, IF.format(then="p = Relu(nobody)")), "nothing makes")
    refused(written(tmp_path, IF.format(then="q = Add(a, p) p = Relu(q)")), "cycle")


def test_local_functions_are_looked_into(tmp_path: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 21, "mine" : 1]>\n'
        "g (float[b,4] x) => (float[b,4] y) { y = mine.twice(x) }\n"
        '<domain: "mine", opset_import: ["" : 21]>\ntwice (x) => (y) { a = BitShiftLike(x) y = Relu(a) }'
    )
    findings = check(saved(tmp_path, onnx.parser.parse_model(text))).findings
    assert [(finding.rule, finding.found) for finding in findings] == [("unknown-operator", "BitShiftLike")]


def test_an_opset_and_ir_version_that_are_newer_than_the_library(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 99, opset_import: ["" : 99]>\ng (float[b,4] x) => (float[b,4] y) { y = Relu(x) }'
    )
    assert check(saved(tmp_path, proto)).builds


def test_a_model_in_memory_need_not_have_its_data_yet() -> None:
    proto = Linear().model
    found = ir.from_proto(proto)
    unwritten = ir.ExternalTensor("no.bin", 0, 1024, ir.DataType.FLOAT16, shape=ir.Shape([4, 128]), name="ws")
    found.graph.initializers["ws"].const_value = unwritten
    assert check(found).fused == {"INT4 weights": 1}
    assert isinstance(found.graph.initializers["ws"].const_value, ir.ExternalTensor)  # not changed


def test_large_inline_constants_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = Linear().model
    seen: list[int] = []
    inferring = onnx.shape_inference.infer_shapes

    def measured(skeleton: onnx.ModelProto, **options: bool) -> onnx.ModelProto:
        seen.append(skeleton.ByteSize())
        return inferring(skeleton, **options)

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", measured)
    read_model(ir.from_proto(proto))
    assert seen[0] < 4096 < proto.ByteSize()


def test_constant_nodes_hold_external_data_too(tmp_path: Path) -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["x", "w"], ["y"])]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    refused(saved(tmp_path, proto), "outside the folder")
