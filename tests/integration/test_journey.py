"""The main job from end to end, through the command line: compile, measure, generate, inspect, load, lower again."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler as qc
from qcompiler import api
from qcompiler.artifacts.hf import load_tokenizer
from qcompiler.artifacts.native import NativeArtifact
from qcompiler.artifacts.streamed import StreamedArtifact
from qcompiler.artifacts.tokenizing import encode
from tests.tiny_checkpoint import POSITIONS, command, file_bytes, save_checkpoint, write_text

COMPILE_KEYS = {
    "artifacts",
    "artifact_bytes",
    "compared",
    "seconds",
    "peak_rss_bytes",
    "bytes_before",
    "bytes_after",
    "bits_per_weight",
    "cache_bytes_per_token",
    "held_out",
    "skipped",
    "sites",
    "notes",
}
EVALUATE_KEYS = {
    "perplexity",
    "reference_perplexity",
    "kl_divergence",
    "top1_agreement",
    "tokens",
    "bytes",
    "bits_per_weight",
    "cache_bytes_per_token",
    "cached",
    "notes",
    "seconds",
    "engine",
}
SITES = 14  # 2 layers of q, k, v, o, gate, up, down


@dataclass(frozen=True)
class Journey:
    model: Path
    text: Path
    out: Path
    printed: dict[str, Any]


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Journey:
    root = tmp_path_factory.mktemp("journey")
    model, calibration, out = save_checkpoint(root / "model"), write_text(root / "calibration.txt"), root / "out"
    options = ("--samples", 8, "--length", 32, "--set", "*.down_proj=w8a16", "--to", "onnx", "-o", out, "--json")
    outcome = command("compile", model, "-r", "w4a16-gptq", "--calib", calibration, *options)
    assert outcome.status == 0, outcome.errors
    return Journey(model, write_text(root / "text.txt", seed=1), out, outcome.fields)


def test_compile_prints_one_object_with_every_key(journey: Journey) -> None:
    assert {key: journey.printed[key] for key in ("schema", "command", "ok")} == {
        "schema": 1,
        "command": "compile",
        "ok": True,
    }
    result = journey.printed["result"]
    assert set(result) == COMPILE_KEYS
    assert result["artifacts"] == {"native": str(journey.out / "native"), "onnx": str(journey.out / "onnx")}
    for name, path in result["artifacts"].items():
        size = sum(map(len, file_bytes(Path(path)).values()))  # other tests add lines to the report
        assert result["artifact_bytes"][name] == pytest.approx(size, rel=1e-3)
    assert result["seconds"] > 0
    assert result["peak_rss_bytes"] > 1 << 26
    assert [skip["site"] for skip in result["skipped"]] == ["lm_head"]
    assert result["held_out"]["kl_divergence"] > 0
    schemes = {site["site"]: site["scheme"] for site in result["sites"]}
    assert len(schemes) == SITES
    assert {s for name, s in schemes.items() if name.endswith("down_proj")} == {"int8 per_channel symmetric"}
    assert {s for name, s in schemes.items() if not name.endswith("down_proj")} == {"int4 g128 symmetric"}


def test_sizes_are_those_of_the_files(journey: Journey) -> None:
    result = journey.printed["result"]
    native = journey.out / "native" / "weights.safetensors"
    for key, path in (("bytes_before", journey.model / "model.safetensors"), ("bytes_after", native)):
        file = path.read_bytes()
        data = len(file) - 8 - int.from_bytes(file[:8], "little")
        assert data == pytest.approx(result[key], abs=64)  # padding between tensors
    # 4096·64 embeddings and as many output weights in 16 bits, the layers in 4 or 8 with scales
    linear = 2 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 96 * 64)
    parameters = 2 * 4096 * 64 + linear + 5 * 64
    frequencies = 8 * 4  # of the rotary embedding, a constant of the graph
    assert result["bytes_before"] == 2 * parameters + frequencies
    assert result["bits_per_weight"] == pytest.approx(8 * result["bytes_after"] / parameters)
    assert result["bytes_after"] < 2 * (parameters - linear) + 0.75 * linear


def test_only_what_was_asked_for_is_left(journey: Journey) -> None:
    assert sorted(path.name for path in journey.out.iterdir()) == ["native", "onnx"]
    assert sorted(path.name for path in journey.out.parent.iterdir() if path.is_dir()) == ["model", "out"]
    for name in ("native", "onnx"):
        assert (journey.out / name / "tokenizer.json").read_bytes() == (journey.model / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("place", [".", "native", "onnx"])
def test_every_form_evaluates_alike(journey: Journey, place: str) -> None:
    arguments = ("--text", journey.text, "--against", journey.model, "--max-tokens", 1024, "--json")
    result = command("evaluate", journey.out / place, *arguments).result
    assert set(result) == EVALUATE_KEYS
    assert result["tokens"] == 1024 // POSITIONS * (POSITIONS - 1)
    assert result["kl_divergence"] > 0
    assert 0.5 < result["top1_agreement"] <= 1
    reference = qc.evaluate(journey.model, text=journey.text, max_tokens=1024).perplexity
    native = qc.evaluate(journey.out, text=journey.text, max_tokens=1024, against=journey.model)
    assert result["reference_perplexity"] == pytest.approx(reference, rel=1e-6)
    assert result["perplexity"] == pytest.approx(native.perplexity, rel=1e-4)
    assert result["kl_divergence"] == pytest.approx(native.kl_divergence, rel=1e-2)


@pytest.mark.parametrize("place", ["native", "onnx"])
def test_the_cache_changes_nothing(journey: Journey, place: str) -> None:
    arguments = (journey.out / place, "--text", journey.text, "--max-tokens", 256, "--json")
    whole, cached = command("evaluate", *arguments).result, command("evaluate", *arguments, "--cached").result
    assert cached["tokens"] == whole["tokens"]
    assert cached["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-4)


def test_without_text_the_held_out_tokens_are_used(journey: Journey) -> None:
    result = command("evaluate", journey.out, "--json").result
    assert [key for key, value in result.items() if value is None] == [
        "reference_perplexity",
        "kl_divergence",
        "top1_agreement",
        "engine",
    ]
    held_out = qc.load(journey.out).held_out
    assert held_out is not None
    assert held_out.shape == (16, 32)
    assert result["tokens"] == 16 * 31
    assert result["perplexity"] == pytest.approx(qc.evaluate(journey.out, tokens=held_out).perplexity)
    beside = command("evaluate", journey.out / "onnx", "--json").result
    assert beside["perplexity"] == pytest.approx(result["perplexity"], rel=1e-4)


def test_weights_are_in_memory_segment_by_segment_or_at_once(journey: Journey, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[type] = []
    evaluate = api.evaluate

    def recorded(artifact: Any, **options: Any) -> Any:
        used.append(type(artifact))
        return evaluate(artifact, **options)

    monkeypatch.setattr(api, "evaluate", recorded)
    arguments = ("evaluate", journey.out, "--max-tokens", 256, "--json")
    streamed, whole = (command(*arguments, option).result for option in ("--stream", "--no-stream"))
    assert used == [StreamedArtifact, NativeArtifact]
    assert {**streamed, "seconds": 0} == {**whole, "seconds": 0}
    for place, options in ((journey.out / "onnx", ()), (journey.model, ()), (journey.out, ("--engine", "kernels"))):
        refused = command("evaluate", place, "--stream", *options, "--json").error
        assert (refused["type"], refused["what"]) == ("InputError", "this is not run segment by segment")


def test_a_model_that_keeps_no_tokens_asks_for_text(journey: Journey) -> None:
    outcome = command("evaluate", journey.model, "--json")
    assert outcome.status == 2
    assert (outcome.error["type"], outcome.error["where"]) == ("InputError", str(journey.model))
    assert "--text" in outcome.error["remedy"]


@pytest.mark.parametrize("place", [".", "onnx"])
def test_generates(journey: Journey, place: str) -> None:
    arguments = ("generate", journey.out / place, "--prompt", "The captain said", "--max-new-tokens", 6)
    result = command(*arguments, "--json").result
    again = command(*arguments, "--json").result
    assert len(result["tokens"]) == 6
    assert result["tokens"] == again["tokens"]
    plain = command(*arguments)
    assert plain.status == 0
    assert plain.output == "The captain said" + result["text"] + "\n"


def test_stopping_at_the_context_limit_is_said(journey: Journey) -> None:
    arguments = ("generate", journey.model, "--prompt", "The captain said", "--max-new-tokens", 200)
    result = command(*arguments, "--json").result
    assert result["finish"] == "positions"
    assert len(result["tokens"]) + result["prompt_tokens"] == POSITIONS
    plain = command(*arguments)
    assert f"no more than {POSITIONS} tokens" in plain.errors
    assert "no more than" not in plain.output
    short = command("generate", journey.model, "--prompt", "The captain said", "--max-new-tokens", 3)
    assert "no more than" not in short.errors


def test_a_text_measures_a_recipe_that_does_not_calibrate(journey: Journey, tmp_path: Path) -> None:
    arguments = (
        journey.model,
        "-r",
        "w8a16",
        "--calib",
        journey.text,
        "--length",
        32,
        "-o",
        tmp_path / "out",
        "--json",
    )
    result = command("compile", *arguments).result
    assert result["held_out"]["kl_divergence"] > 0
    assert any("served to measure the result alone" in note for note in result["notes"])


def test_padded_rows_are_calibrated_on_as_if_they_were_not(journey: Journey, tmp_path: Path) -> None:
    lengths = [5, 30, 17, 30, 5, 44, 23, 9]
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 4096, (length,), generator=draw) for length in lengths]
    for index, recipe in enumerate(("w4a16-gptq", "w8a8-smoothquant")):
        made = []
        for side in (None, "left", "right"):
            calibration = qc.Calibration.from_tokens(rows if side is None else padded(rows, side))
            out = tmp_path / f"{index}-{side}"
            qc.compile(journey.model, recipe, calibration).save(out)
            made.append((out / "weights.safetensors").read_bytes())
        assert made[0] == made[1] == made[2]
    whole = torch.stack([torch.nn.functional.pad(row, (0, 44 - len(row)), value=2) for row in rows])
    qc.compile(journey.model, "w8a8-smoothquant", qc.Calibration.from_tokens(whole)).save(tmp_path / "pads")
    assert (tmp_path / "pads" / "weights.safetensors").read_bytes() != made[0]


def padded(rows: list[torch.Tensor], side: str) -> list[dict[str, torch.Tensor]]:
    """Batches of three as a collator makes them."""
    batches = []
    for start in range(0, len(rows), 3):
        some = rows[start : start + 3]
        width = max(map(len, some))
        pads = [((width - len(row), 0) if side == "left" else (0, width - len(row))) for row in some]
        ids = torch.stack([torch.nn.functional.pad(r, p, value=2) for r, p in zip(some, pads, strict=True)])
        mask = torch.stack([torch.nn.functional.pad(torch.ones_like(r), p) for r, p in zip(some, pads, strict=True)])
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def test_kernels_run_the_native_artifact(journey: Journey) -> None:
    arguments = (journey.out, "--engine", "kernels", "--device", "cpu", "--json")
    result = command("evaluate", *arguments, "--text", journey.text, "--max-tokens", 512).result
    assert set(result) == EVALUATE_KEYS
    native = qc.evaluate(journey.out, text=journey.text, max_tokens=512)
    assert result["perplexity"] == pytest.approx(native.perplexity, rel=1e-2)
    engine = result["engine"]
    assert (engine["device"], engine["dtype"], engine["references"]) == ("cpu", "bfloat16", {})
    assert engine["sites"] == {"cpu": SITES, "float": 1}
    generated = command("generate", *arguments, "--prompt", "The captain said", "--max-new-tokens", 6).result
    assert len(generated["tokens"]) == 6
    assert generated["engine"]["sites"] == engine["sites"]
    refused = command("evaluate", journey.out / "onnx", "--engine", "kernels", "--json")
    assert (refused.status, refused.error["type"]) == (2, "TargetError")


def test_kernels_are_tried_and_nothing_is_written(journey: Journey, tmp_path: Path) -> None:
    """Piece by piece; `qcompiler.lower` gives the whole module."""
    arguments = ("compile", journey.model, "-r", "w8a16", "-o", tmp_path / "out")
    found = command(*arguments, "--to", "kernels:device=cpu", "--json").result
    assert list(found["artifacts"]) == ["native"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["native"]
    parity = found["compared"]["kernels"]
    assert 0 < parity["max_difference"] <= parity["tolerance"] < 0.2
    saved = json.loads((tmp_path / "out" / "native" / "report.json").read_text())["targets"]["kernels"]
    assert saved["parity"] == parity
    assert any(note.startswith("kernels: ") for note in found["notes"])
    module = qc.lower(tmp_path / "out", "kernels", device="cpu")
    whole = dict(module.report)
    assert whole.pop("parity")["max_difference"] == pytest.approx(parity["max_difference"], rel=1e-3)
    assert whole == {key: value for key, value in saved.items() if key != "parity"}
    again = command("convert", tmp_path / "out", "--to", "kernels:device=cpu", "-o", tmp_path / "out")
    assert again.status == 0, again.errors
    assert "compared: kernels" in again.output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["native"]


def test_inspect_shows_schemes(journey: Journey) -> None:
    before, after = (command("inspect", path, "--json").result for path in (journey.model, journey.out))
    assert [site["site"] for site in before["sites"]] == [site["site"] for site in after["sites"]]
    assert {site["scheme"] for site in before["sites"]} == {None}
    assert [site["site"] for site in after["sites"] if site["scheme"] is None] == ["lm_head"]
    assert before["unrecognized"] == []
    assert before["inputs"][:3] == ["input_ids", "attention_mask", "position_ids"]
    assert (before["parameters"], before["bytes"]) == (after["parameters"], journey.printed["result"]["bytes_before"])
    assert "lm_head" in command("inspect", journey.out).output


def test_a_loaded_result_is_saved_to_the_same_bytes(journey: Journey, tmp_path: Path) -> None:
    result = qc.load(journey.out)
    result.save(tmp_path / "again")
    assert file_bytes(tmp_path / "again") == file_bytes(journey.out / "native")


def test_a_loaded_result_is_lowered_to_the_same_bytes(journey: Journey, tmp_path: Path) -> None:
    report = qc.lower(qc.load(journey.out), "onnx", tmp_path / "onnx")
    assert 0 <= report["parity"]["max_difference"] < 1e-4
    assert report["parity"]["cached_difference"] < 1e-4
    assert file_bytes(tmp_path / "onnx") == file_bytes(journey.out / "onnx")


def test_generation_is_that_of_the_graph(journey: Journey) -> None:
    artifact = qc.load(journey.out).artifact()
    found = qc.generate(journey.out, "The captain said", max_new_tokens=4)
    ids = encode(load_tokenizer(journey.out / "native"), "The captain said")[None]
    for expected in found.tokens:
        assert int(artifact.forward(ids)[0, -1].argmax()) == expected
        ids = torch.cat([ids, torch.tensor([[expected]])], dim=1)


def test_verbose_tells_phases_and_segments(journey: Journey, tmp_path: Path) -> None:
    told = command("compile", journey.model, "-r", "w8a16", "-o", tmp_path / "out", "-v")
    assert told.status == 0
    assert "INFO: segment 1 of " in told.errors
    assert "segment" not in command("compile", journey.model, "-r", "w8a16", "-o", tmp_path / "other").errors
