"""The table of checkpoints and readers."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import qcompiler as qc
from benchmarks import formats
from benchmarks.formats import Row, greedy, matching, measure, render
from qcompiler.passes import RTN
from tests.tiny_checkpoint import save_checkpoint

READER = """
import json, sys
import numpy as np
tokens, out = json.load(open(sys.argv[2])), sys.argv[3]
given = np.load(sys.argv[1] + "/../given.npz")
assert np.array(tokens).shape == (2, 32)
np.savez(out, **given)
"""


def test_readers_and_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = qc.compile(save_checkpoint(tmp_path / "model", layers=1), [RTN(bits=8)])
    (transformers, missing) = measure(result, "w8a16", "compressed-tensors", tmp_path / "one", Path(sys.executable))
    assert (transformers.reader, transformers.loads) == ("transformers", "yes")
    assert float(transformers.largest) <= float(transformers.tolerance)
    assert missing.loads.startswith("no: No module named 'vllm'")
    (refused,) = measure(result, "w8a16", "awq", tmp_path / "two", None)
    assert refused.loads.startswith("refused: AWQ checkpoints hold integers of 4 bits")

    native = result.artifact()
    ids = torch.randint(native.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    continued = np.array([greedy(native, row) for row in ids])
    continued[1, 5] += 1
    logprobs = native.forward(ids)[:, :-1].log_softmax(-1).numpy()
    np.savez(tmp_path / "given.npz", logprobs=logprobs, continued=continued)
    (tmp_path / "reader.py").write_text(READER)
    monkeypatch.setattr(formats, "DRIVER", tmp_path / "reader.py")
    rows = measure(result, "w8a16", "compressed-tensors", tmp_path / "three", Path(sys.executable))
    assert (rows[1].reader, rows[1].loads, rows[1].largest, rows[1].divergence) == ("vLLM", "yes", "0.0e+00", "0.000")
    assert rows[1].greedy == "5"


def test_table() -> None:
    assert matching([1, 2, 3], [1, 2, 4]) == 2
    assert matching([1], [1]) == 1
    table = render([Row("w8a16", "gptq", "vLLM", "yes", megabytes="7.9").cells()])
    assert table.splitlines()[2] == "| w8a16 | gptq | vLLM | yes |  |  |  |  | 7.9 |"
    assert len({line.count("|") for line in table.splitlines()}) == 1
