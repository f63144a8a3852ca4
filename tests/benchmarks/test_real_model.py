"""A real model's table: what is scored, and that what stands is not done again."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import qcompiler as qc
from benchmarks import real_model
from benchmarks.peer_drivers.score_rows import Scores
from tests.tiny_checkpoint import save_checkpoint, write_text

TOKENS = torch.tensor([3, 1, 4, 1, 5])


def log_probabilities(seed: int, vocab: int = 12) -> np.ndarray:
    logits = 2 * torch.randn(1, 4, vocab, generator=torch.Generator().manual_seed(seed))
    return logits.log_softmax(-1).numpy()


def test_scores_are_those_of_the_definition() -> None:
    wanted, found = log_probabilities(0), log_probabilities(1)
    scores = Scores(wanted)
    scores.add_row(0, TOKENS.tolist(), found[0])
    likelihood = np.take_along_axis(found[0], TOKENS[1:, None].numpy(), 1).mean()
    means = scores.means()
    assert means["perplexity"] == pytest.approx(math.exp(-likelihood))
    assert means["divergence"] == pytest.approx(float((np.exp(wanted) * (wanted - found)).sum(-1).mean()), rel=1e-5)
    assert means["same"] == (found.argmax(-1) == wanted.argmax(-1)).mean()
    assert (means["is_bound"], means["positions"]) == (False, 4)


def test_the_likeliest_tokens_bound_the_divergence_from_below() -> None:
    wanted, found = log_probabilities(0), log_probabilities(1)
    exact = Scores(wanted)
    exact.add_row(0, TOKENS.tolist(), found[0])

    def bounded(count: int) -> dict[str, float]:
        scores = Scores(wanted)
        for position, tells in enumerate(found[0]):
            ids = np.argsort(-tells)[:count]
            scores.add_likeliest(0, position, tells[TOKENS[position + 1]], ids, tells[ids])
        return scores.means()

    divergences = [bounded(count)["divergence"] for count in (2, 6, 12)]
    assert 0 < divergences[0] < divergences[1] < divergences[2]
    assert divergences[2] == pytest.approx(exact.means()["divergence"], abs=1e-5)
    assert bounded(2) | {"divergence": 0, "is_bound": False} == exact.means() | {"divergence": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"), layers=1)


def test_what_stands_is_not_done_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text.txt", words=200)
    engine = tmp_path / "engines" / "vllm" / "bin" / "python"
    engine.parent.mkdir(parents=True)
    engine.symlink_to(sys.executable)

    def run(*more: str) -> list[str]:
        common = [str(model), "--calib", str(text), "--text", str(text), "--work", str(tmp_path / "work")]
        options = ["--windows", "2", "--length", "16", "--group", "32", "--recipes", "w8a16", *more]
        monkeypatch.setattr(sys, "argv", ["real_model", *common, *options])
        threads = torch.get_num_threads()
        real_model.main()
        torch.set_num_threads(threads)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]

    (tmp_path / "work" / "w8a16" / "compressed-tensors" / ".partial-1").mkdir(parents=True)  # of an interrupted run
    original, native, packed, refused = run("--formats", "native", "compressed-tensors", "awq")
    assert original.startswith("| original | none | transformers | ")
    assert native.split(" | ")[3:6] == packed.split(" | ")[3:6]
    assert 0 < float(native.split(" | ")[4]) < 10
    assert "refused: AWQ checkpoints hold integers of 4 bits" in refused
    rows = json.loads((tmp_path / "work" / "rows.json").read_text())
    ids = real_model.windows(model, text, 2, 16)
    expected = qc.evaluate(tmp_path / "work" / "w8a16" / "native", tokens=ids, against=model)
    assert rows[1]["found"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert rows[1]["found"]["divergence"] == pytest.approx(expected.kl_divergence, rel=1e-3)
    assert rows[1]["found"]["same"] == expected.top1_agreement

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it is done already")

    for name in ("compile", "lower"):
        monkeypatch.setattr(qc, name, fail)
    monkeypatch.setattr(real_model, "score", fail)
    again = run("--formats", "native", "compressed-tensors", "awq", "--engines", str(tmp_path / "engines"))
    assert [again[0], again[1], again[2], again[3]] == [original, native, packed, refused]
    assert "| w8a16 | compressed-tensors | vllm | no: ModuleNotFoundError" in again[4]
    with pytest.raises(SystemExit, match="holds another measurement: windows"):
        run("--windows", "3")
