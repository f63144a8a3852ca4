"""llama.cpp as a reader: log-probabilities of given tokens and a greedy continuation, from a GGUF it loads itself.

``python read_llama_cpp.py CHECKPOINT TOKENS.json OUT.npz`` in an environment of its own (``xllamacpp``, ``numpy``).
CHECKPOINT is a ``.gguf`` file or a directory with one. TOKENS holds rows of token ids; OUT
gets ``logprobs`` float32 ``[rows, length - 1, vocab]``, the distribution after each token but the last, and
``continued`` int64 ``[rows, new]``. With ``--score`` behind them, OUT gets ``scored`` float32 ``[rows, length - 1]``
alone, the log-probability of each token behind the first, which is all that a perplexity needs.

The cache is kept in float32. Products with blocks round their inputs to 8 bits in blocks of 32 (scale: the largest
magnitude over 127, in float16), as llama.cpp does on a CPU: that is what its distance from the native artifact comes
to, so twice what such roundings change may be allowed. On the shipped model (2 x 24 tokens), as root mean square
of log-probabilities: llama.cpp from native 0.0164 (w8a16) and 0.0172 (w4a16), native with inputs rounded so from native
0.0170 and 0.0177; 64 of 64 greedy tokens the same.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import xllamacpp

NEW_TOKENS = 64
BIAS = 1e6  # what is sampled is told; the log-probability is that ahead of it


def opened(checkpoint, length):
    """A server of the model, for one sequence of that length at a time."""
    path = Path(checkpoint)
    params = xllamacpp.CommonParams()
    params.model.path = str(path if path.is_file() else next(path.glob("*.gguf")))
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = length, 1, False, 0
    params.cpuparams.n_threads = len(os.sched_getaffinity(0))
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = False
    return xllamacpp.Server(params)


def ask(server, prompt, number, probabilities, **options):
    """What follows token ids: an entry for each new token."""
    request = {"prompt": prompt, "n_predict": number, "max_tokens": number, "temperature": 0, "cache_prompt": True}
    answer = server.handle_completions({**request, "n_probs": probabilities, "ignore_eos": True, **options})
    if isinstance(answer, str):
        answer = json.loads(answer)
    if "choices" not in answer:
        raise SystemExit(f"llama.cpp: {json.dumps(answer)[:400]}")
    return answer["choices"][0]["logprobs"]["content"]


def distributions(server, rows, vocab):
    logprobs = np.full((len(rows), len(rows[0]) - 1, vocab), -np.inf, dtype=np.float32)
    for row, tokens in enumerate(rows):
        for position in range(1, len(tokens)):
            (entry,) = ask(server, tokens[:position], 1, vocab, ignore_eos=False)
            for found in entry["top_logprobs"]:
                logprobs[row, position - 1, found["id"]] = found["logprob"]
    continued = [[entry["id"] for entry in ask(server, tokens, NEW_TOKENS, 1)] for tokens in rows]
    return {"logprobs": logprobs, "continued": np.array(continued, dtype=np.int64)}


def scores(server, rows):
    scored = np.zeros((len(rows), len(rows[0]) - 1), dtype=np.float32)
    for row, tokens in enumerate(rows):
        for position in range(1, len(tokens)):
            wanted = tokens[position]
            options = {"logit_bias": [[wanted, BIAS]], "ignore_eos": False}
            (entry,) = ask(server, tokens[:position], 1, 1, **options)
            assert entry["id"] == wanted, (entry, wanted)
            scored[row, position - 1] = entry["logprob"]
    return {"scored": scored}


def main(checkpoint, tokens_file, out, mode=""):
    """Reads, and writes the arrays."""
    with open(tokens_file, encoding="utf-8") as file:
        rows = json.load(file)
    server = opened(checkpoint, len(rows[0]) + NEW_TOKENS + 8)
    if mode == "--score":
        np.savez(out, **scores(server, rows))
    else:
        config = Path(checkpoint) / "config.json"
        np.savez(out, **distributions(server, rows, json.loads(config.read_bytes())["vocab_size"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the server's threads would wait for requests
