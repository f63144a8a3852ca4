"""llama.cpp as a reader: what it makes of text, from a GGUF it loads itself.

``python read_llama_cpp.py CHECKPOINT TOKENS.json OUT.npz`` in an environment of its own (``xllamacpp``, ``numpy``).
CHECKPOINT is a ``.gguf`` file or a directory with one. TOKENS holds rows of token ids; OUT gets ``scored`` float32
``[rows, length - 1]``, the log-probability of each token behind the first, which is all that a perplexity needs. Whole
distributions, and a comparison with the native artifact: ``qcompiler verify --reader llama.cpp``.

The cache is kept in float32. Products with blocks round their inputs to 8 bits in blocks of 32 (scale: the largest
magnitude over 127, in float16), as llama.cpp does on a CPU. On the shipped model (2 x 24 tokens), as root mean square
of log-probabilities: llama.cpp from native 0.0164 (w8a16) and 0.0172 (w4a16), native with inputs rounded so from native
0.0170 and 0.0177; 64 of 64 greedy tokens the same.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import xllamacpp

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


def ask(server, prompt, **options):
    """The token behind token ids, with its log-probability."""
    request = {"prompt": prompt, "n_predict": 1, "max_tokens": 1, "temperature": 0, "cache_prompt": True, "n_probs": 1}
    answer = server.handle_completions({**request, **options})
    if isinstance(answer, str):
        answer = json.loads(answer)
    if "choices" not in answer:
        raise SystemExit(f"llama.cpp: {json.dumps(answer)[:400]}")
    return answer["choices"][0]["logprobs"]["content"][0]


def scores(server, rows):
    scored = np.zeros((len(rows), len(rows[0]) - 1), dtype=np.float32)
    for row, tokens in enumerate(rows):
        for position in range(1, len(tokens)):
            wanted = tokens[position]
            entry = ask(server, tokens[:position], logit_bias=[[wanted, BIAS]])
            assert entry["id"] == wanted, (entry, wanted)
            scored[row, position - 1] = entry["logprob"]
    return scored


def main(checkpoint, tokens_file, out):
    """Reads, and writes the array."""
    with open(tokens_file, encoding="utf-8") as file:
        rows = json.load(file)
    np.savez(out, scored=scores(opened(checkpoint, len(rows[0]) + 8), rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the server's threads would wait for requests
