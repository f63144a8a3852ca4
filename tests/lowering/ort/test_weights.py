"""Codes, scales and zero points of every format, multiplied by ONNX Runtime and compared with the weight itself."""

import pytest
import torch

import qcompiler as qc
from qcompiler.lowering.ort.support import block_of, stored_bits
from qcompiler.passes import RTN, Assign


def test_blocks_divide_groups_and_are_powers_of_two() -> None:
    assert [block_of(group, 4096) for group in (16, 32, 48, 96, 128, 512, 8, 24)] == [
        16,
        32,
        16,
        32,
        128,
        256,
        None,
        None,
    ]
    assert [block_of(None, width) for width in (4096, 128, 100, 40, 16, 8)] == [128, 128, 128, 64, 16, 16]
    assert block_of(64, 64) == 64


def test_bits_that_codes_take() -> None:
    assert [stored_bits(name) for name in ("int2", "uint3", "int4", "uint8", "int16", "float8_e4m3fn")] == [
        2,
        4,
        4,
        8,
        None,
        None,
    ]


@pytest.mark.parametrize(
    "scheme",
    [
        "w4a16-g32",
        "w4a16-g32-asym",
        "w4a16-channel",
        "w3a16-g16",
        "w2a16-g32-asym",
        "w8a16",
        "w8a16-g48-asym",
        "w4a16-g48",
    ],
)
def test_products_equal_those_of_the_weight(scheme, tmp_path):
    import onnxruntime

    torch.manual_seed(3)
    layers = torch.nn.Sequential(torch.nn.Linear(144, 40), torch.nn.Linear(40, 24, bias=False)).eval()
    example = torch.randn(2, 5, 144)
    graph = qc.capture(layers, (example,))
    result = qc.compile(graph, [Assign(scheme), RTN()], device="cpu")
    report = qc.lower(result, "ort", tmp_path / "out", accuracy_level=0)
    assert report["operators"] == {"MatMulNBits": 2}
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (port,) = session.get_inputs()
    (found,) = session.run(None, {port.name: example.numpy()})
    wanted = example
    for site, layer in zip(result.graph.sites(), layers, strict=True):
        wanted = torch.nn.functional.linear(wanted, result.graph.read_weight(site), layer.bias)
    assert (torch.from_numpy(found) - wanted).abs().max() < 1e-5 * wanted.abs().max()
