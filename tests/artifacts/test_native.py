import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qcompiler as qc
from qcompiler.artifacts import native
from qcompiler.artifacts.hf import read_limits
from qcompiler.artifacts.native import NativeArtifact, load_native, save_native
from qcompiler.errors import ArtifactError, InputError, QCompilerError, ResourceError, WeightError
from qcompiler.ir.graph import Graph
from qcompiler.numerics.scheme import Scheme
from qcompiler.passes import RTN
from qcompiler.protocol.artifact import Artifact
from qcompiler.protocol.pass_base import PassContext
from qcompiler.storage.weights import WeightStore
from tests.tiny_checkpoint import save_checkpoint
from tests.tiny_graphs import chain, interpret, language_model, token_batches

FILES = ["graph.json", "manifest.json", "report.html", "report.json", "weights.safetensors"]


def quantized(scheme: str = "w4a16-g8-asym", **options: Any) -> Graph:
    graph = language_model(**options)
    graph.schemes = {site.name: Scheme.parse(scheme) for site in graph.sites()[:-1]} | {"head": Scheme()}
    RTN().rewrite(graph.sites()[:-1], {}, PassContext(graph, torch.device("cpu"), 0))
    return graph


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_native(quantized(), tmp_path / "native", {"seed": 1}, {"notes": []})
    return tmp_path / "native"


def everything(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_files(saved):
    assert everything(saved) == FILES
    manifest = json.loads((saved / "manifest.json").read_text())
    assert manifest["schema"] == 2
    assert manifest["seed"] == 1
    assert manifest["provenance"]["source"] == "tiny"
    assert "<h1>tiny</h1>" in (saved / "report.html").read_text()


@pytest.mark.parametrize("scheme", ["w4a16-g8-asym", "w3a16-channel", "w8a16-tensor", "w2a16-g5"])
def test_round_trip_is_byte_identical(tmp_path, scheme):
    graph = quantized(scheme)
    graph.provenance["config"] = {"limits": [0.0, float("inf")]}
    save_native(graph, tmp_path / "first", {"seed": 3, "recipe": ["rtn"]}, {"notes": ["ä"]})
    loaded, manifest, report = load_native(tmp_path / "first")
    save_native(loaded, tmp_path / "second", manifest, report)
    assert everything(tmp_path / "second") == FILES
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    ids = torch.arange(8).reshape(2, 4)
    assert torch.equal(NativeArtifact(loaded).forward(ids), NativeArtifact(graph).forward(ids))
    assert loaded.schemes == graph.schemes
    assert loaded.signature == graph.signature


@pytest.fixture(scope="module")
def beside_a_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that transformers knows, compiled and saved with its companions."""
    root = tmp_path_factory.mktemp("llama")
    save_checkpoint(root / "model", layers=1)
    (root / "model" / "additional_chat_templates").mkdir()
    (root / "model" / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    qc.compile(root / "model", [RTN(bits=4)]).save(root / "native")
    return root


@pytest.mark.parametrize(
    "load",
    [
        lambda path: transformers.AutoModelForCausalLM.from_pretrained(path),
        lambda path: transformers.AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, dtype="float32"),
        lambda path: transformers.AutoModel.from_pretrained(path),
        lambda path: transformers.LlamaForCausalLM.from_pretrained(path),
        lambda path: transformers.pipeline("text-generation", model=str(path)),
    ],
    ids=["causal", "safetensors", "base", "class", "pipeline"],
)
def test_others_refuse_it_and_say_what_to_do(beside_a_tokenizer, load):
    """Loading it as a checkpoint would give a model of random weights."""
    with pytest.raises(ValueError, match="compiled by qcompiler") as caught:
        load(beside_a_tokenizer / "native")
    assert "qcompiler.load(DIR)" in str(caught.value)


def test_nothing_in_it_is_called_as_weights_of_a_checkpoint_are(beside_a_tokenizer):
    native = beside_a_tokenizer / "native"
    assert [path.name for path in native.glob("*.safetensors*")] == ["weights.safetensors"]
    config = json.loads((native / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "qcompiler"}
    config_path = native / "config.json"
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "transformers_weights")}
    assert plain == json.loads((beside_a_tokenizer / "model" / "config.json").read_text())
    before = config_path.read_text()
    config_path.write_text(json.dumps(plain))  # whoever takes the marks out finds no weights
    try:
        with pytest.raises(OSError, match="no file named"):
            transformers.AutoModelForCausalLM.from_pretrained(native)
    finally:
        config_path.write_text(before)


def test_its_tokenizer_and_configuration_are_read_by_anyone(beside_a_tokenizer):
    native, model = beside_a_tokenizer / "native", beside_a_tokenizer / "model"
    text = "the captain said it was cold"
    tokenizers = [transformers.AutoTokenizer.from_pretrained(path) for path in (native, model)]
    assert type(tokenizers[0]) is type(tokenizers[1])
    assert tokenizers[0](text) == tokenizers[1](text)
    assert transformers.AutoConfig.from_pretrained(native).model_type == "llama"
    assert read_limits(native) == read_limits(model)
    assert (native / "additional_chat_templates" / "tools.jinja").is_file()


def test_the_marks_do_not_travel_on(beside_a_tokenizer, tmp_path):
    """What is lowered from it has the configuration of the original; saved again, it is the same."""
    qc.lower(beside_a_tokenizer / "native", "onnx", tmp_path / "onnx", verify=False)
    original = json.loads((beside_a_tokenizer / "model" / "config.json").read_text())
    assert json.loads((tmp_path / "onnx" / "config.json").read_text()) == original
    assert (tmp_path / "onnx" / "additional_chat_templates" / "tools.jinja").is_file()
    qc.load(beside_a_tokenizer / "native").save(tmp_path / "again")
    again = (tmp_path / "again" / "config.json").read_bytes()
    assert again == (beside_a_tokenizer / "native" / "config.json").read_bytes()


@pytest.mark.parametrize("text", ["{broken", "[1]"])
def test_a_broken_configuration_is_copied_as_it_is(tmp_path, text):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text(text)
    graph = quantized()
    graph.provenance["companions"] = str(tmp_path / "source")
    save_native(graph, tmp_path / "out", {}, {})
    assert (tmp_path / "out" / "config.json").read_text() == text


def test_companions_travel(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    (tmp_path / "source" / "pytorch_model.bin").write_text("weights")
    graph = quantized()
    graph.provenance["companions"] = str(tmp_path / "source")
    save_native(graph, tmp_path / "out", {}, {})
    assert everything(tmp_path / "out") == sorted([*FILES, "tokenizer.json"])
    assert "companions" not in json.loads((tmp_path / "out" / "manifest.json").read_text())["provenance"]
    assert load_native(tmp_path / "out")[0].provenance["companions"] == str(tmp_path / "out")


def test_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    save_native(quantized(), tmp_path / "out", {}, {})
    assert everything(tmp_path / "out") == FILES


def test_output_not_empty(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not empty"):
        save_native(quantized(), tmp_path, {}, {})
    assert everything(tmp_path) == ["mine.txt"]
    with pytest.raises(InputError, match="is a file"):
        save_native(quantized(), tmp_path / "mine.txt", {}, {})


def test_output_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        save_native(quantized(), tmp_path / "file" / "out", {}, {})


def failing(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException, when: Callable[..., bool]
) -> None:
    original = getattr(owner, name)

    def fail(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise error
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, fail)


def is_file(name: str) -> Callable[..., bool]:
    return lambda path, *_: Path(path).name == name


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), RuntimeError("bug")])
@pytest.mark.parametrize(
    "step", ["weights", "graph", "move of graph", "move of weights", "move of manifest", "manifest"]
)
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_is_left_by_an_interrupted_save(tmp_path, monkeypatch, error, step, exists):
    graph, out = quantized(), tmp_path / "out"
    if exists:
        out.mkdir()
    if step == "weights":
        failing(monkeypatch, WeightStore, "save", error, lambda *_: True)
    elif step == "graph":
        failing(monkeypatch, Graph, "to_dict", error, lambda *_: True)
    elif step == "manifest":
        failing(monkeypatch, native.StagedFiles, "file", error, lambda _, name: name == "manifest.json")
    else:
        name = {"graph": "graph.json", "weights": "weights.safetensors", "manifest": "manifest.json"}[step.split()[-1]]
        failing(monkeypatch, os, "rename", error, is_file(name))
    with pytest.raises(ResourceError if isinstance(error, OSError) else type(error)):
        save_native(graph, out, {"seed": 1}, {})
    assert out.exists() == exists
    assert everything(tmp_path) == (["out"] if exists else [])


def test_full_disk(tmp_path):
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    graph = quantized()
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(ResourceError, match="disk is full"):
            save_native(graph, tmp_path / "out", {}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert everything(tmp_path) == []


def damage(root: Path, name: str, change: Callable[[Any], Any]) -> None:
    content = change(json.loads((root / name).read_text()))
    (root / name).write_text(json.dumps(content))


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("manifest.json", None, ArtifactError, "no manifest.json"),
        ("manifest.json", b"{", ArtifactError, "damaged JSON"),
        ("manifest.json", b"\xff", ArtifactError, "damaged JSON"),
        ("manifest.json", b"[]", ArtifactError, "an object"),
        ("manifest.json", lambda m: m | {"schema": 1}, ArtifactError, "got: schema 1"),
        ("manifest.json", without("schema"), ArtifactError, "got: schema None"),
        ("manifest.json", lambda m: m | {"provenance": [1]}, ArtifactError, "manifest is damaged"),
        ("manifest.json", lambda m: m | {"provenance": {"parameters": "x"}}, ArtifactError, "manifest is damaged"),
        ("graph.json", None, ArtifactError, "no graph.json"),
        ("graph.json", b"not json", ArtifactError, "damaged JSON"),
        ("graph.json", without("nodes"), ArtifactError, "damaged"),
        ("graph.json", without("signature"), ArtifactError, "damaged"),
        ("graph.json", lambda g: g | {"nodes": g["nodes"][:-1]}, ArtifactError, "output node"),
        ("graph.json", lambda g: g | {"nodes": [{"op": "x"}]}, ArtifactError, "graph.json"),
        ("graph.json", lambda g: g | {"schemes": {"0.q": {"weight": {"dtype": "int5"}}}}, ArtifactError, "int5"),
        ("weights.safetensors", None, WeightError, "weights.safetensors"),
        ("weights.safetensors", b"", WeightError, "weights.safetensors"),
        ("report.json", b"{", ArtifactError, "damaged JSON"),
    ],
)
def test_damaged_artifacts(saved, name, change, error, message):
    if change is None:
        (saved / name).unlink()
    elif isinstance(change, bytes):
        (saved / name).write_bytes(change)
    else:
        damage(saved, name, change)
    with pytest.raises(error) as caught:
        load_native(saved)
    assert message in str(caught.value)
    assert isinstance(caught.value, QCompilerError)


def test_where_names_a_file_once(saved):
    (saved / "graph.json").write_text("[")
    with pytest.raises(ArtifactError) as caught:
        load_native(saved)
    assert caught.value.where == str(saved / "graph.json")


def test_truncated_weights(saved):
    path = saved / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightError, match="truncated"):
        load_native(saved)


def test_a_tensor_that_is_not_stored(saved):
    path = saved / "weights.safetensors"
    tensors = load_file(path)
    del tensors["norm.weight"]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(ArtifactError, match=r"norm\.weight"):
        load_native(saved)


def test_a_report_may_be_missing(saved):
    (saved / "report.json").unlink()
    assert load_native(saved)[2] == {}


@pytest.mark.parametrize("path", ["nothing", "file"])
def test_no_artifact(tmp_path, path):
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError):
        load_native(tmp_path / path)


def test_a_file_that_cannot_be_read(saved):
    (saved / "graph.json").unlink()
    (saved / "graph.json").mkdir()
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_native(saved)


# --- running ---------------------------------------------------------------------------------------------------------


def test_it_is_an_artifact():
    artifact = NativeArtifact(quantized())
    assert isinstance(artifact, Artifact)
    assert artifact.vocab_size == 32
    assert artifact.has_cache
    assert artifact.max_positions is None
    assert artifact.path is None


def test_positions_are_limited_by_the_config():
    graph = quantized()
    graph.provenance["config"] = {"n_positions": 64}
    assert NativeArtifact(graph).max_positions == 64


def test_forward_equals_the_graph_node_by_node():
    graph = quantized()
    (batch,) = token_batches(graph, (3,))
    logits = NativeArtifact(graph).forward(batch[graph.inputs[0]])
    assert logits.shape == (3, 6, 32)
    torch.testing.assert_close(logits, interpret(graph, batch)[graph.outputs[0].name])


@pytest.mark.parametrize("cuts", [(4, 5, 6, 7), (1, 6), (7, 8), (3,)])
def test_prefill_and_steps_equal_forward(cuts):
    artifact = NativeArtifact(quantized())
    ids = torch.randint(32, (2, 9))
    pieces = ids.tensor_split(cuts, dim=1)
    logits, cache = artifact.prefill(pieces[0])
    found = [logits]
    for piece in pieces[1:]:
        logits, cache = artifact.step(piece, cache)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, dim=1), artifact.forward(ids), rtol=1e-4, atol=1e-5)


def test_bits_per_weight():
    width, vocab = 16, 32
    graph = quantized("w4a16-g8", dtype=torch.float16)
    layer = 4 * width * width // 2 * 3 // 2 + 3 * 2 * width * width  # q, o; k, v of half the heads; gate, up, down
    rest = (vocab + 64) * width  # embedding, tied with the head; positions
    norms = 5 * width
    artifact = NativeArtifact(graph)
    parameters = 2 * layer + rest + norms
    assert graph.provenance["parameters"] == parameters
    expected = 2 * layer * (4 + 16 / 8) + rest * 16 + norms * 32
    assert 8 * artifact.stored_bytes() == expected
    assert artifact.bits_per_weight() == expected / parameters


def test_tied_weights_count_once_and_untied_ones_twice(tmp_path):
    tied, untied = NativeArtifact(quantized()), NativeArtifact(quantized(tied=False))
    assert untied.stored_bytes() - tied.stored_bytes() == 32 * 16 * 4
    save_native(tied._graph, tmp_path / "out", {}, {})
    graph, _, _ = load_native(tmp_path / "out")
    assert NativeArtifact(graph).stored_bytes() == tied.stored_bytes()


def test_a_graph_without_logits():
    with pytest.raises(InputError, match="next tokens"):
        NativeArtifact(chain())
