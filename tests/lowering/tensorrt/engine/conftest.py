"""A decoder layer of seven small linear layers, written by hand, and the engine made of it once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qcompiler.ir import Port
from qcompiler.lowering.tensorrt.engine import Built, build_engine, default_profiles

HEADS, HEAD, WIDTH = 4, 16, 64
LENGTH = 64


@pytest.fixture(scope="session")
def ports() -> tuple[Port, ...]:
    """The inputs of the decoder layer."""
    cache = ("batch", HEADS, "past_sequence", HEAD)
    mask = ("batch", 1, "sequence", "past_sequence + sequence")
    return (
        Port("x", "other", "float16", ("batch", "sequence", WIDTH)),
        Port("mask", "mask", "float16", mask),
        Port("past_key_values.0.key", "past", "float16", cache, 0, "key"),
        Port("past_key_values.0.value", "past", "float16", cache, 0, "value"),
    )


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory, ports: tuple[Port, ...]) -> Path:
    """INT4 q, k, v, o around an Attention; INT8 up and FP8 down with rounded inputs; INT4 ``cast`` that cannot fuse."""
    pytest.importorskip("tensorrt_rtx")
    ir, np, ml_dtypes = pytest.importorskip("onnx_ir"), pytest.importorskip("numpy"), pytest.importorskip("ml_dtypes")
    onnx = pytest.importorskip("onnx")
    node, random = onnx.helper.make_node, np.random.default_rng(0)
    nodes, constants = [], []

    def constant(name: str, values: object, dtype: str) -> str:
        tensor = ir.tensor(np.asarray(values), dtype=ir.DataType[dtype], name=name)
        constants.append(ir.serde.serialize_tensor(tensor))
        return name

    def linear(site: str, x: str, kind: str, scale: str = "FLOAT16") -> str:
        make = {"INT4": ml_dtypes.int4, "INT8": np.int8, "FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn}[kind]
        codes = constant(f"{site}.codes", random.integers(-8, 8, (WIDTH, WIDTH)).astype(make), kind)
        groups = {"axis": 0, "block_size": 32} if kind == "INT4" else {"axis": 1}
        shape = (WIDTH // 32, WIDTH) if kind == "INT4" else (WIDTH,)
        floats = np.float16 if scale == "FLOAT16" else np.float32
        scales = constant(f"{site}.scale", (random.random(shape) * 0.01 + 0.01).astype(floats), scale)
        if kind != "INT4":
            step = constant(f"{site}.step", np.float16(0.05), "FLOAT16")
            code = getattr(onnx.TensorProto, kind)
            nodes.append(node("QuantizeLinear", [x, step], [f"{site}.q"], output_dtype=code, name=f"{site}/Q"))
            nodes.append(node("DequantizeLinear", [f"{site}.q", step], [f"{site}.x"], name=f"{site}/DQ_x"))
            x = f"{site}.x"
        weight = f"{site}.weight"
        nodes.append(node("DequantizeLinear", [codes, scales], [weight], name=f"{site}/DQ", **groups))
        if scale != "FLOAT16":
            nodes.append(node("Cast", [weight], [f"{site}.half"], to=onnx.TensorProto.FLOAT16, name=f"{site}/Cast"))
            weight = f"{site}.half"
        nodes.append(node("MatMul", [x, weight], [f"{site}.y"], name=f"{site}/MatMul"))
        return f"{site}.y"

    def heads(x: str) -> str:
        split = constant(f"{x}.split", np.array([0, 0, HEADS, HEAD]), "INT64")
        nodes.append(node("Reshape", [x, split], [f"{x}.4d"]))
        nodes.append(node("Transpose", [f"{x}.4d"], [f"{x}.heads"], perm=[0, 2, 1, 3]))
        return f"{x}.heads"

    query = heads(linear("q", "x", "INT4"))
    for site, part in (("k", "key"), ("v", "value")):
        new = heads(linear(site, "x", "INT4"))
        nodes.append(node("Concat", [f"past_key_values.0.{part}", new], [f"present.0.{part}"], axis=2))
    nodes.append(node("Attention", [query, "present.0.key", "present.0.value", "mask"], ["a"], name="attention"))
    nodes.append(node("Transpose", ["a"], ["a.t"], perm=[0, 2, 1, 3]))
    nodes.append(node("Reshape", ["a.t", constant("join", np.array([0, 0, WIDTH]), "INT64")], ["a.3d"]))
    y = linear("o", "a.3d", "INT4")
    y = linear("down", linear("up", y, "INT8"), "FLOAT8E4M3FN")
    nodes.append(node("Identity", [linear("cast", y, "INT4", "FLOAT")], ["y"]))

    half, value = onnx.TensorProto.FLOAT16, onnx.helper.make_tensor_value_info
    inputs = [value(port.name, half, port.shape) for port in ports]
    outputs = [value(name, half, None) for name in ("y", "present.0.key", "present.0.value")]
    graph = onnx.helper.make_graph(nodes, "decoder", inputs, outputs, constants)
    path = tmp_path_factory.mktemp("decoder") / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=11), path)
    return path


@pytest.fixture(scope="session")
def progress() -> list[tuple[int, int, str]]:
    """What the build of `built` said of its progress."""
    return []


@pytest.fixture(scope="session")
def built(decoder: Path, ports: tuple[Port, ...], progress: list[tuple[int, int, str]]) -> Built:
    """The decoder layer for SM 89, with a profile to read a prompt and one to decode."""
    tell: Callable[[int, int, str], None] = lambda done, total, what: progress.append((done, total, what))  # noqa: E731
    profiles = default_profiles(ports, length=LENGTH, piece=32)
    return build_engine(
        decoder, decoder.parent / "out" / "engine-sm89.plan", capability=89, profiles=profiles, progress=tell
    )
