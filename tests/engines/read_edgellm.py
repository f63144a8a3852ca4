"""What TensorRT-Edge-LLM's exporter takes the weights of a checkpoint for.

``python read_edgellm.py CHECKPOINT OUT.npz``, in an environment with ``tensorrt-edgellm``. The exporter's own loader
reads the checkpoint. Codes of 4 bits are seen where it packs them for its kernel, which multiplies with
``(code - 8) * scale``; OUT gets float32 ``[out, in]`` by the layer's path, without ``.weight``.
"""

import sys
from typing import Any

import numpy as np
import torch
from tensorrt_edgellm.checkpoint import repacking
from tensorrt_edgellm.model import AutoModel


def main(checkpoint: str, out: str) -> None:
    """Reads, and writes the arrays."""
    packed: list[Any] = []
    pack = repacking.repack_to_cutedsl_fragment

    def seen(codes: Any) -> Any:
        packed.append(codes.copy())
        return pack(codes)

    repacking.repack_to_cutedsl_fragment = seen
    model = AutoModel.from_pretrained(checkpoint)
    kinds = {"AWQLinear", "GPTQLinear"}
    layers = [(name, module) for name, module in model.named_modules() if type(module).__name__ in kinds]
    assert len(layers) == len(packed), (len(layers), len(packed))
    found = {}
    for (name, module), codes in zip(layers, packed, strict=True):
        scales = module.scales.float().numpy().T
        found[name] = (codes - 8) * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)
    for name, module in model.named_modules():
        if type(module).__name__ == "FP8Linear":
            found[name] = (module.weight.to(torch.float32) * module.weight_scale.float()).numpy()
    arrays: dict[str, Any] = {name: np.asarray(weight, dtype=np.float32) for name, weight in found.items()}
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
