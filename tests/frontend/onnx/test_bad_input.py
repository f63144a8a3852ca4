"""Files that are broken, hostile, or hold what is not read: one typed error, and what was wrong by name."""

import onnx
import pytest
import torch
from onnx import TensorProto, helper

import qcompiler as qc
from qcompiler.errors import InputError, QCompilerError, UnsupportedModelError
from qcompiler.frontend.onnx import capture_onnx
from tests.frontend.onnx.exported import port, saved, tensor

X, Y = port("x", ["b", 4]), port("y", ["b", 4])


def product(folder, **changes):
    """A model of one product, its weight in a file beside it; fields of the weight's place may be changed."""
    weight = tensor("w", torch.randn(4, 4))
    (folder / "w.bin").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", "offset": "0", "length": "64", **changes}.items():
        weight.external_data.add(key=key, value=value)
    return saved(folder, [helper.make_node("MatMul", ["x", "w"], ["y"])], [X], [Y], [weight])


def test_external_data_are_read_where_they_lie(tmp_path):
    graph = capture_onnx(product(tmp_path))
    assert [site.name for site in graph.sites()] == ["w"]
    (tmp_path / "w.bin").write_bytes(bytes(65))
    with pytest.raises(QCompilerError, match="changed while it was in use"):
        graph.weights.read("w")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"location": "../w.bin"}, "outside the folder"),
        ({"location": "/etc/passwd"}, "outside the folder"),
        ({"location": "none.bin"}, "missing"),
        ({"offset": "32"}, "too short"),
        ({"length": "8"}, "too short"),
        ({"offset": "-4"}, "too short"),
        ({"offset": "x"}, "no number"),
    ],
)
def test_external_data_that_lie_elsewhere(tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        capture_onnx(product(tmp_path, **changes))


def test_external_data_through_a_link(tmp_path):
    folder, other = tmp_path / "a", tmp_path / "b"
    folder.mkdir()
    other.mkdir()
    path = product(folder)
    (folder / "w.bin").rename(other / "w.bin")
    (folder / "w.bin").symlink_to(other / "w.bin")
    with pytest.raises(InputError, match="outside the folder"):
        capture_onnx(path)


def relu(name, out):
    return helper.make_node("Relu", [name], [out])


@pytest.mark.parametrize(
    ("nodes", "stored", "said"),
    [
        ([helper.make_node("Add", ["x", "b"], ["a"]), relu("a", "b"), relu("a", "y")], [], "cycle"),
        ([helper.make_node("MatMul", ["x", "w"], ["y"])], [], "nothing makes"),
        ([relu("x", "y"), relu("x", "y")], [], "made twice"),
        ([helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor("w", torch.ones(5, 4))], "cannot be computed"),
        ([helper.make_node("Nonsense", ["x"], ["y"])], [], "not read from ONNX"),
        ([helper.make_node("Relu", ["x"], ["y"], domain="some.where")], [], "not read from ONNX"),
        ([helper.make_node("SequenceConstruct", ["x"], ["s"]), relu("s", "y")], [], "not read from ONNX"),
        ([helper.make_node("If", ["c"], ["y"])], [tensor("c", torch.tensor(True))], "cannot be computed"),
        ([helper.make_node("Reshape", ["x", "n"], ["y"])], [tensor("n", torch.tensor([3, 5]))], "cannot be computed"),
        ([helper.make_node("Cast", ["x"], ["y"], to=8)], [], "a way that is not read"),
    ],
)
def test_graphs_that_contradict_themselves(tmp_path, nodes, stored, said):
    with pytest.raises(QCompilerError, match=said):
        capture_onnx(saved(tmp_path, nodes, [X], [Y], stored))


def test_what_is_not_read_is_named_all_at_once(tmp_path):
    nodes = [helper.make_node("Nonsense", ["x"], ["a"]), helper.make_node("Nonsense", ["a"], ["b"])]
    nodes.append(helper.make_node("Other", ["b"], ["y"], domain="some.where"))
    with pytest.raises(UnsupportedModelError) as caught:
        capture_onnx(saved(tmp_path, nodes, [X], [Y], []))
    assert caught.value.got == "Nonsense (2), some.where::Other (1)"


def test_an_initializer_of_another_size(tmp_path):
    weight = tensor("w", torch.ones(4, 4))
    weight.dims[0] = 1 << 40
    with pytest.raises(InputError, match="do not fill its shape"):
        capture_onnx(saved(tmp_path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [X], [Y], [weight]))


@pytest.mark.parametrize("kind", ["sequence", "optional"])
def test_inputs_that_are_no_tensors(tmp_path, kind):
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, [4])
    make = helper.make_sequence_type_proto if kind == "sequence" else helper.make_optional_type_proto
    given = helper.make_value_info("s", make(element))
    with pytest.raises(UnsupportedModelError, match="no tensor"):
        capture_onnx(saved(tmp_path, [relu("x", "y")], [X, given], [Y], []))


def test_sizes_that_cannot_be_one(tmp_path):
    """Both axes vary, but a stored vector of four has to fit the second."""
    given = [port("x", ["b", "n"]), port("z", ["b", "n"])]
    nodes = [helper.make_node("Concat", ["x", "z"], ["c"], axis=1), helper.make_node("Add", ["c", "x"], ["y"])]
    with pytest.raises(UnsupportedModelError, match="cannot be computed"):
        capture_onnx(saved(tmp_path, nodes, given, [port("y", ["b", "n"])], []))


@pytest.mark.parametrize("content", [b"", b"no model", None])
def test_files_that_are_no_models(tmp_path, content):
    path = product(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(InputError):
        capture_onnx(path)


def test_paths_that_name_no_model(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        qc.capture(tmp_path / "none.onnx")
    for name in ("a.onnx", "b.onnx"):
        product(tmp_path).rename(tmp_path / name)
    with pytest.raises(InputError, match="several ONNX models"):
        qc.capture(tmp_path)


def test_an_operator_set_that_nobody_knows(tmp_path):
    path = product(tmp_path)
    model = onnx.load(path, load_external_data=False)
    del model.opset_import[:]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="not an ONNX model"):
        capture_onnx(path)
