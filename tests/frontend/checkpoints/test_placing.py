"""What a quantized checkpoint is good for once it is a graph: to run, measure, write elsewhere and read again."""

import pytest
import torch

import qcompiler as qc
from qcompiler.numerics import Scheme
from qcompiler.passes import RTN, Assign
from qcompiler.protocol import verify_graph
from qcompiler.storage.safetensors_io import SafetensorsFile
from tests.frontend.checkpoints.comparing import IDS, assert_same_parts
from tests.frontend.checkpoints.packers import (
    ct_settings,
    gptq_weight,
    packed_weight,
    plain_weight,
    write_pair,
)
from tests.tiny_checkpoint import command, file_bytes, save_checkpoint, write_text

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("gptq"), lambda name, *sizes: gptq_weight(*sizes), GPTQ)


def test_capturing_reads_no_codes(pair, monkeypatch):
    read = []
    original = SafetensorsFile.read
    monkeypatch.setattr(SafetensorsFile, "read", lambda file, name, *rest: read.append(name) or original(file, name))
    graph = qc.capture(pair.quantized)
    assert read
    assert {name.rpartition(".")[2] for name in read} == {"qzeros", "g_idx"}
    read.clear()
    graph.weights.read(f"{UP}.weight_codes")
    assert read == [f"{UP}.qweight"]


def test_the_graph_is_a_legal_one(pair):
    graph = qc.capture(pair.quantized)
    verify_graph(graph)
    assert f"{UP}.weight" not in graph.weights
    assert graph.schemes[UP] == Scheme.parse("w4a16-g32")
    assert "quantization_config" not in graph.provenance["config"]
    assert graph.provenance["checkpoint"] == "gptq"
    floats = qc.capture(pair.floats)
    for key in ("parameters", "limits"):
        assert graph.provenance[key] == floats.provenance[key]
    assert graph.provenance["fingerprint"] != floats.provenance["fingerprint"]


def test_inspect_evaluate_generate_convert(pair, tmp_path):
    found = command("inspect", pair.quantized, "--json").result
    schemes = {site["site"]: site["scheme"] for site in found["sites"]}
    assert schemes[UP] == "int4 g32 symmetric"
    assert schemes["lm_head"] is None
    text = write_text(tmp_path / "text.txt", 200)
    measured = [command("evaluate", d, "--text", text, "--json").result for d in (pair.quantized, pair.floats)]
    assert measured[0]["perplexity"] == pytest.approx(measured[1]["perplexity"], rel=1e-5)
    assert measured[0]["bits_per_weight"] < measured[1]["bits_per_weight"]
    texts = [
        command("generate", d, "--prompt", "the sea", "--max-new-tokens", 8, "--json").result["text"]
        for d in (pair.quantized, pair.floats)
    ]
    assert texts[0] == texts[1]
    before = file_bytes(pair.quantized)
    made = command("convert", pair.quantized, "--to", "onnx", "-o", tmp_path / "out", "--json").result
    assert made["targets"]["onnx"]["parity"]["max_difference"] <= 1e-4
    assert file_bytes(pair.quantized) == before
    inside = command("convert", pair.quantized, "--to", "onnx", "-o", pair.quantized / "out", "--json").error
    assert inside["what"] == "the output lies in the model's directory"


def test_the_distance_to_the_original_is_measured(pair, tmp_path):
    text = write_text(tmp_path / "text.txt", 200)
    found = qc.evaluate(pair.quantized, text=text, against=pair.floats)
    assert abs(found.kl_divergence) < 1e-6
    assert any("quantized by another program" in note for note in found.notes)


def test_kernels_run_it(pair):
    model = qc.lower(pair.quantized, "kernels", device="cpu", dtype="float32")
    expected = qc.open_artifact(pair.quantized).forward(IDS)
    torch.testing.assert_close(model.forward(IDS), expected, rtol=1e-4, atol=1e-4)


def test_a_native_artifact_of_it(pair, tmp_path):
    result = qc.load(pair.quantized)
    assert result.manifest["recipe"] == []
    assert result.report.parameters == result.graph.provenance["parameters"]
    expected = result.artifact().forward(IDS)
    result.save(tmp_path / "native")
    again = qc.load(tmp_path / "native")
    assert again.graph.schemes == result.graph.schemes
    assert torch.equal(again.artifact().forward(IDS), expected)


def test_another_layout_of_it(pair, tmp_path):
    qc.lower(pair.quantized, "checkpoint", tmp_path / "out", format="compressed-tensors")
    before, after = (qc.capture(directory) for directory in (pair.quantized, tmp_path / "out"))
    assert after.provenance["checkpoint"] == "compressed-tensors"
    assert_same_parts(before, after)


def test_a_layout_that_does_not_hold_the_codes(pair, tmp_path):
    source = write_pair(
        tmp_path,
        lambda name, *sizes: packed_weight(*sizes, bits=3),
        ct_settings("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}),
    )
    error = command(
        "convert", source.quantized, "--to", "checkpoint:format=awq", "-o", tmp_path / "out", "--json"
    ).error
    assert error["type"] == "TargetError"
    assert "4 bits" in " ".join(error.values())


@pytest.mark.parametrize(
    ("scheme", "layout"),
    [
        ("w4a16-g32", "compressed-tensors"),
        ("w4a16-g32-asym", "compressed-tensors"),
        ("w3a16-channel-asym", "compressed-tensors"),
        ("w2a16-g32", "compressed-tensors"),
        ("w8a16", "compressed-tensors"),
        ("nvfp4a16", "compressed-tensors"),
        ("mxfp4a16", "compressed-tensors"),
        ("w4a16-g32", "gptq"),
        ("w4a16-channel", "gptq"),
        ("w8a16", "gptq"),
        ("w4a16-g32", "awq"),
        ("w4a16-g32-asym", "awq"),
        ("w4a16-g32", "modelopt"),
        ("nvfp4a16", "modelopt"),
    ],
)
def test_what_was_written_is_read_bit_for_bit(tmp_path, scheme, layout):
    source = save_checkpoint(tmp_path / "source", layers=1)
    result = qc.compile(source, (Assign(scheme), RTN()), overrides={"lm_head": None})
    qc.lower(result, "checkpoint", tmp_path / "out", format=layout, verify=False)
    graph = qc.capture(tmp_path / "out")
    assert_same_parts(result.graph, graph)
    for name, one in graph.schemes.items():
        weight = result.graph.schemes[name].weight
        assert one.weight.stored_dtype == weight.stored_dtype
        assert one.weight.has_factor == weight.has_factor
    found = qc.open_artifact(tmp_path / "out").forward(IDS)
    torch.testing.assert_close(
        found, result.artifact().forward(IDS), rtol=1e-5, atol=2e-5
    )  # a factor of NVFP4 is stored inverted


# --- the library itself -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("kind", ["packed", "asymmetric", "channel", "float8"])
def test_what_the_library_makes_of_it(tmp_path, kind):
    """transformers with compressed-tensors unpacks the same checkpoint."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    pytest.importorskip("compressed_tensors")
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    layout = "pack-quantized"

    def make(name, *sizes):
        if kind == "float8":
            return plain_weight(*sizes, kind="float8", strategy="channel")
        return packed_weight(
            *sizes, group=-1 if kind == "channel" else 32, symmetric=kind != "asymmetric", dtype=torch.float32
        )

    if kind == "float8":
        weights, layout = {"num_bits": 8, "type": "float", "strategy": "channel"}, "float-quantized"
    elif kind == "channel":
        weights = {"num_bits": 4, "strategy": "channel"}
    elif kind == "asymmetric":
        weights["symmetric"] = False
    found = write_pair(tmp_path, make, ct_settings(layout, weights))
    options = {} if kind != "asymmetric" else {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(found.quantized, dtype=torch.float32, **options)
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits.float()
    torch.testing.assert_close(qc.open_artifact(found.quantized).forward(IDS), expected, rtol=1e-5, atol=1e-5)
