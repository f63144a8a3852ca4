"""llama.cpp as a reader. ``python run_llama_cpp.py REQUEST.json OUT.npz``, in an environment with ``xllamacpp``.

What is asked and given, `qcompiler.lowering.checkpoint.readers` says. The cache is kept in float32; products round
their inputs to 8 bits in blocks of 32, as llama.cpp does on a CPU.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp


def opened(place: str, length: int) -> Any:
    """A server of the model in a file or directory, for one sequence of that length at a time."""
    path, params = Path(place), xllamacpp.CommonParams()
    params.model.path = str(path if path.is_file() else next(path.glob("*.gguf")))
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = length, 1, False, 0
    params.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.fit_params = False
    return xllamacpp.Server(params)


def asked(server: Any, prompt: list[int], count: int, **options: Any) -> dict[str, Any] | None:
    """The token behind a prompt: ``id``, ``token`` (its text), ``logprob``; None where none is told.

    So are the likeliest, as many as asked for, in ``top_logprobs``.
    """
    request = {"prompt": prompt, "n_predict": 1, "max_tokens": 1, "temperature": 0, "n_probs": count, **options}
    answer = server.handle_completions(request)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    if "choices" not in answer:
        raise SystemExit(f"Error: {json.dumps(answer)[:400]}")
    content = (answer["choices"][0]["logprobs"] or {}).get("content")
    return dict(content[0]) if content else None


def plain_tokens(server: Any, prompt: list[int], vocab: int) -> list[int]:
    """Tokens that are letters."""
    told = (asked(server, prompt, vocab) or {}).get("top_logprobs", ())
    return [found["id"] for found in told if found["token"].isascii() and found["token"].isalpha()]


def following(server: Any, prompt: list[int], vocab: int, plain: int, *, cached: bool) -> Any:
    """float32 ``[vocab]``: the distribution behind a prompt.

    What is sampled is told to be a ``plain`` token, as nothing is answered for one that ends a text or is half a
    letter; log-probabilities are those ahead of that.
    """
    result = np.full(vocab, -np.inf, dtype=np.float32)
    told = asked(server, prompt, vocab, cache_prompt=cached, logit_bias=[[plain, 1e6]]) or {}
    for found in told.get("top_logprobs", ()):
        result[found["id"]] = found["logprob"]
    return result


def main(request_file: str, out: str) -> None:
    """Reads, and writes the arrays."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    rows, first, vocab = request["rows"], request["first"], request["vocab"]
    server = opened(request["directory"], len(rows[0]) + 8)
    plain = next(token for end in range(1, len(rows[0])) for token in plain_tokens(server, rows[0][:end], vocab))

    def from_prompt(row: list[int], start: int) -> list[Any]:
        """Behind a prompt of ``start`` tokens, and behind each token that then joins it in the cache."""
        return [following(server, row[:end], vocab, plain, cached=end > start) for end in range(start, len(row) + 1)]

    decoded = [from_prompt(row, first) for row in rows]
    whole = [from_prompt(row, 1) for row in rows]
    np.savez(out, whole=whole, decoded=decoded, dtype="float32", version=version("xllamacpp"))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the server's threads would wait for requests
