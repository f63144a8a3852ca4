"""Files of GGUF, ours and others', as graphs; and what is wrong with a file."""

import gc
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import qcompiler as qc
from qcompiler.errors import InputError, MissingDependencyError, QCompilerError, UnsupportedModelError, WeightError
from qcompiler.ir import quantized_tables
from qcompiler.ir.graph import Graph
from qcompiler.lowering.checkpoint import CheckpointTarget
from tests.lowering.checkpoint.conftest import Write
from tests.lowering.checkpoint.gguf.conftest import MakeFile, tensors

TARGET = "checkpoint:format=gguf"
DOWN = "model.layers.0.mlp.down_proj"
IDS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("scheme", ["w4a16-g64", "w4a16-g32-asym", "mxfp4a16"])
def test_what_was_written_is_read_back(scheme: str, graph: Graph, write: Write) -> None:
    """Zero points too: minima tell them without the rounding that they have had."""
    directory, report, result = write(graph, scheme, TARGET)
    read = qc.load(directory)
    torch.testing.assert_close(read.artifact().forward(IDS), result.artifact().forward(IDS), rtol=0, atol=0)
    assert len(read.graph.schemes) == 7
    assert read.graph.provenance["checkpoint"] == "gguf"
    assert report["parity"]["max_difference"] < 1e-5


@pytest.fixture(scope="module")
def blocks() -> dict[str, Kind]:
    return {
        "blk.0.attn_q": Kind.Q8_0,
        "blk.0.attn_k": Kind.Q4_0,
        "blk.0.ffn_down": Kind.Q4_1,
        "blk.0.ffn_up": Kind.Q5_0,
    }


def test_a_file_of_another_writer(blocks: dict[str, Kind], make_file: MakeFile) -> None:
    """Against transformers' own reader, which knows all of it."""
    file = make_file(kinds={**blocks, "token_embd": Kind.Q8_0, "output": Kind.Q4_0})
    graph = qc.capture(file)
    assert {name: str(scheme.weight) for name, scheme in graph.schemes.items()} == {
        "model.layers.0.self_attn.q_proj": "int8 g32 symmetric",
        "model.layers.0.self_attn.k_proj": "int4 g32 symmetric",
        "lm_head": "int4 g32 symmetric",
    }
    notes = " ".join(graph.notes)
    assert f"Q5_0 is read as float weights, which no format here has the codes of: {DOWN[:-9]}up_proj" in notes
    assert f"Q4_1 is read as float weights, which no format here has the codes of: {DOWN}" in notes
    (table,) = quantized_tables(graph)
    assert (table.name, str(table.spec)) == ("model.embed_tokens", "int8 g32 symmetric")
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"])
    with torch.inference_mode():
        wanted = model(IDS).logits
    artifact = qc.open_artifact(file)
    torch.testing.assert_close(artifact.forward(IDS), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    assert artifact.max_positions == 48


def test_a_float_file_is_an_original(make_file: MakeFile, tmp_path: Path) -> None:
    file = make_file()
    result = qc.compile(file, "w8a16", torch_tokens())
    result.save(tmp_path / "out")
    assert "config.json" in [path.name for path in (tmp_path / "out").iterdir()]
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        qc.compile(make_file("y.gguf", kinds={"output": Kind.Q8_0}), "w8a16")


def torch_tokens() -> Any:
    return qc.Calibration.from_tokens(torch.randint(61, (4, 12)))


def test_codes_go_into_other_formats(make_file: MakeFile, tmp_path: Path) -> None:
    kinds = {f"blk.0.attn_{part}": Kind.Q4_0 for part in "qkv"} | {"blk.0.ffn_down": Kind.Q8_0}
    result = qc.load(make_file(kinds=kinds))
    report = qc.lower(result, CheckpointTarget(), tmp_path / "ct", verify=False)
    assert report["format"] == "compressed-tensors"
    read = qc.load(tmp_path / "ct")
    torch.testing.assert_close(read.artifact().forward(IDS), result.artifact().forward(IDS), rtol=0, atol=1e-5)


def test_companions_go_with_the_graph(make_file: MakeFile) -> None:
    graph = qc.capture(make_file())
    companions = Path(graph.provenance["companions"])
    assert (companions / "config.json").is_file()
    del graph
    gc.collect()
    assert not companions.exists()


def _changed(file: Path, at: int, data: bytes) -> Path:
    content = bytearray(file.read_bytes())
    content[at : at + len(data)] = data
    file.write_bytes(content)
    return file


def test_no_such_format(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no GGUF file"):
        qc.capture(tmp_path / "x.gguf")


def test_a_newer_version(make_file: MakeFile) -> None:
    with pytest.raises(UnsupportedModelError, match="version of GGUF") as caught:
        qc.capture(_changed(make_file(), 4, struct.pack("<I", 4)))
    assert caught.value.got == "4"


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.99])
def test_a_truncated_file(share: float, make_file: MakeFile) -> None:
    file = make_file()
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightError, match="truncated"):
        qc.capture(file)


def test_a_type_that_is_not_read(make_file: MakeFile) -> None:
    file = make_file()
    at = file.read_bytes().index(b"output.weight") + len(b"output.weight") + 4 + 16
    with pytest.raises(UnsupportedModelError, match="type of GGUF tensors") as caught:
        qc.capture(_changed(file, at, struct.pack("<I", 99)))
    assert (caught.value.where, caught.value.got) == (f"{file}: output.weight", "type 99")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"architecture": "mamba"}, UnsupportedModelError, "architecture that is not read"),
        ({"settings": {"block_count": None}}, WeightError, "lacks a setting"),
        ({"settings": {"rope.scaling.type": "longrope"}}, UnsupportedModelError, "rotary embeddings"),
        ({"settings": {"rope.scaling.type": "yarn"}}, WeightError, "lacks a setting"),
        ({"without": "token_embd"}, WeightError, "lacks a tensor"),
        ({"without": "blk.0.ffn_up"}, WeightError, "lacks parameters"),
        ({"settings": {"feed_forward_length": 128}}, WeightError, "shape"),
    ],
)
def test_a_file_that_lacks_something(
    options: dict[str, Any], error: type[QCompilerError], message: str, make_file: MakeFile
) -> None:
    with pytest.raises(error, match=message):
        qc.capture(make_file(**options))


def test_several_files(make_file: MakeFile) -> None:
    make_file("a.gguf")
    with pytest.raises(InputError, match="several GGUF files"):
        qc.capture(make_file("b.gguf").parent)


def test_without_the_package(make_file: MakeFile, monkeypatch: pytest.MonkeyPatch) -> None:
    file = make_file()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install gguf"):
        qc.capture(file)


def test_blocks_are_those_of_gguf(blocks: dict[str, Kind], make_file: MakeFile) -> None:
    """Number by number, ahead of any product."""
    graph = qc.capture(make_file(kinds=blocks))
    (site,) = (site for site in graph.sites() if site.name.endswith("k_proj"))
    data, kind = tensors(blocks)["blk.0.attn_k.weight"]
    wanted = gguf.dequantize(data, kind).reshape(2, 8, 2, 64)
    np.testing.assert_array_equal(graph.read_weight(site).numpy(), wanted.transpose(0, 2, 1, 3).reshape(32, 64))


# --- divided files ----------------------------------------------------------------------------------------------------


def divided(file: Path, count: int = 3) -> list[Path]:
    """The same as several files, as llama-gguf-split makes them: settings in the first, tensors in all."""
    whole = gguf.GGUFReader(file)
    size = -(-len(whole.tensors) // count)
    parts = []
    for number in range(count):
        parts.append(file.with_name(f"x-{number + 1:05}-of-{count:05}.gguf"))
        writer = gguf.GGUFWriter(parts[-1], "llama")
        for field in whole.fields.values() if number == 0 else ():
            if not field.name.startswith(("GGUF.", "general.architecture")):
                writer.add_key_value(field.name, field.contents(), field.types[0])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(whole.tensors))
        for tensor in whole.tensors[number * size : (number + 1) * size]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def test_a_divided_file(blocks: dict[str, Kind], make_file: MakeFile) -> None:
    """By its directory, and by any of its parts."""
    file = make_file(kinds=blocks)
    wanted = qc.open_artifact(file).forward(IDS)
    parts = divided(file)
    file.unlink()
    for place in (file.parent, parts[0], parts[2]):
        torch.testing.assert_close(qc.open_artifact(place).forward(IDS), wanted, rtol=0, atol=0)


def test_parts_that_do_not_belong_together(make_file: MakeFile) -> None:
    file = make_file()
    parts = divided(file)
    content = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(WeightError, match="says otherwise than its name") as caught:
        qc.capture(parts[0])
    assert (caught.value.got, caught.value.expected) == ("part 2 of 3", "part 1 of 3")
    parts[1].unlink()
    with pytest.raises(InputError, match="a part of a divided GGUF file is missing") as lost:
        qc.capture(parts[0])
    assert lost.value.where == str(parts[1])
    parts[1].write_bytes(content)
    _changed(parts[0], parts[0].read_bytes().index(b"split.tensors.count") + len("split.tensors.count") + 4, b"\x63")
    with pytest.raises(WeightError, match="do not hold all tensors"):
        qc.capture(parts[0])
