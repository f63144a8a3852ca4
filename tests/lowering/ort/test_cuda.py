"""float16: which nodes have no kernel on CUDA, over all recipes; what is written, evaluated operator by operator."""

import pytest
import torch

import qcompiler as qc
from qcompiler.errors import TargetError
from qcompiler.lowering.onnx.writer import emit
from qcompiler.lowering.ort import OrtTarget
from qcompiler.lowering.ort.cuda import nodes_off_cuda
from qcompiler.lowering.ort.dialect import ort_dialect
from qcompiler.lowering.ort.writer import _fused
from qcompiler.passes import RECIPES

FLOAT4 = ("nvfp4", "mxfp4")
MORE = ("kv-int8-static", "kv-int4-static", "w4a16-rtn+emb-int4", "w8a16+emb-int8", "w4a16-rtn+kv-int8")
OFF = {
    "w4a4-gptq": {"Cast"},  # zero points of four bits that are measured
    "w4a4-rotated": {"Cast"},
    "kv-int4-static": {"GroupQueryAttention"},
}


@pytest.mark.parametrize("name", [*(name for name in RECIPES if name not in FLOAT4), *MORE])
def test_no_node_is_on_the_cpu_unless_said(name, tiny):
    graph = _fused(tiny(name).graph, OrtTarget(float_dtype="float16"))
    emitted = emit(graph, ort_dialect("float16"))
    found = nodes_off_cuda(emitted.model)
    assert {text.split(": ")[1].split(" of ")[0] for text in found} == OFF.get(name, set())


@pytest.mark.parametrize("name", FLOAT4)
def test_four_bit_floats_are_refused(name, tiny):
    with pytest.raises(TargetError, match="scheme"):
        qc.lower(tiny(name), "ort", "unused", float_dtype="float16")


@pytest.mark.parametrize(
    "name", ["w4a16-rtn+emb-int4", "kv-int8-static", pytest.param("kv-int4-static", marks=pytest.mark.slow)]
)
def test_float16_is_evaluated_as_written(name, tiny, tmp_path):
    report = qc.lower(tiny(name), "ort", tmp_path / "out", float_dtype="float16", accuracy_level=0)
    assert report["float16_parity"]["max_difference"] < 5e-2
    assert report["parity"]["max_difference"] < 5e-2
    assert bool(report["off_cuda"]) is (name in OFF)
    assert any("run on the CPU" in note for note in report["notes"]) is (name in OFF)


@pytest.mark.gpu
def test_on_the_gpu(tiny, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    result = tiny("w4a16-rtn+kv-int8-static")
    qc.lower(result, "ort", tmp_path / "out", float_dtype="float16", accuracy_level=0)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = onnxruntime.InferenceSession(
        tmp_path / "out" / "model.onnx", options, providers=["CUDAExecutionProvider"]
    )
    ids = torch.randint(4096, (1, 8))
    feed = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    for port in session.get_inputs():
        if port.name.startswith("past"):
            feed[port.name] = torch.zeros(1, port.shape[1], 0, port.shape[3], dtype=torch.int8).numpy()
    found = torch.from_numpy(session.run(["logits"], feed)[0])
    wanted = result.artifact().forward(ids)
    assert (found - wanted).abs().max() < 2e-2 * wanted.abs().max()
