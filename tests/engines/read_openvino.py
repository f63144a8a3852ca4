"""What OpenVINO computes of an ONNX folder: python read_openvino.py FOLDER TOKENS.npy OUT.npz; needs nothing of ours.

The tokens are read twice: at once, and the last of them behind a cache of the others.
"""

import sys
from pathlib import Path

import numpy as np
import openvino as ov

SIZES = {"f32": np.float32, "f16": np.float16, "i64": np.int64, "i8": np.int8, "u8": np.uint8}


def main(folder: Path, tokens: np.ndarray, out: Path) -> None:
    """Writes ``whole`` ``[B, S, V]`` and ``step`` ``[B, 1, V]``."""
    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}
    model = core.compile_model(core.read_model(folder / "model.onnx"), "CPU", settings)
    whole, _ = run(model, tokens, {})
    if any(name.startswith("past_") for port in model.inputs for name in port.names):
        _, cache = run(model, tokens[:, :-1], {})
        step, _ = run(model, tokens[:, -1:], cache)
    else:
        step = whole[:, -1:]
    np.savez(out, whole=whole, step=step)


def run(model: ov.CompiledModel, tokens: np.ndarray, cache: dict[str, np.ndarray]) -> tuple[np.ndarray, dict]:
    """Logits, and the cache by the names of the inputs that take it."""
    batch, length = tokens.shape
    past = next(iter(cache.values())).shape[2] if cache else 0
    feed = {}
    for port in model.inputs:
        name, dtype = port.any_name, SIZES[port.element_type.to_string()]
        if name.startswith("past_key_values."):
            shape = [batch, port.partial_shape[1].get_length(), 0, port.partial_shape[3].get_length()]
            feed[name] = cache.get(name, np.zeros(shape, dtype))
        elif name == "attention_mask":
            feed[name] = np.ones((batch, past + length), dtype)
        elif name == "position_ids":
            feed[name] = np.broadcast_to(np.arange(past, past + length, dtype=dtype), tokens.shape).copy()
        else:
            feed[name] = tokens if name == "input_ids" else np.zeros(tokens.shape, dtype)
    found = {port.any_name: value for port, value in model(feed).items()}
    kept = {name.replace("present.", "past_key_values."): v.copy() for name, v in found.items() if "present." in name}
    return found["logits"], kept


if __name__ == "__main__":
    main(Path(sys.argv[1]), np.load(sys.argv[2]), Path(sys.argv[3]))
