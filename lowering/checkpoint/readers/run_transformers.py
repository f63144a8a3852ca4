"""transformers or gptqmodel as a reader. ``python run_transformers.py REQUEST.json OUT.npz``.

What is asked and given, `qcompiler.lowering.checkpoint.readers` says. ``engine`` of the request is ``transformers`` or
``gptqmodel``, which loads GPTQ and AWQ checkpoints for transformers' models.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


def opened(engine: str, directory: str) -> Any:
    """The model, in the dtype that its configuration names."""
    if engine == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        return GPTQModel.load(directory, backend=BACKEND.TORCH, device="cpu").model
    from transformers import AutoModelForCausalLM

    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    groups = config.get("quantization_config", {}).get("config_groups", {}).values()
    options: dict[str, Any] = {}
    if any(not group["weights"].get("symmetric", True) for group in groups):
        from transformers import CompressedTensorsConfig

        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)  # the one way it takes zero points
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", local_files_only=True, **options)


def main(request_file: str, out: str) -> None:
    """Reads, and writes the arrays."""
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    rows, first = torch.tensor(request["rows"]), request["first"]
    model = opened(request["engine"], request["directory"]).eval()
    parts, cache = [], None
    with torch.inference_mode():
        whole = model(input_ids=rows, use_cache=False).logits.float().log_softmax(-1)
        for ids in (rows[:, :first], *rows[:, first:].split(1, dim=1)):
            answer = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            parts.append(answer.logits[:, -1:].float().log_softmax(-1))
    dtype = str(answer.logits.dtype).removeprefix("torch.")
    decoded = torch.cat(parts, dim=1)
    np.savez(out, whole=whole.numpy(), decoded=decoded.numpy(), dtype=dtype, version=version(request["engine"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
