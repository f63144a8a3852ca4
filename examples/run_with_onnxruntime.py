"""Greedy generation with ONNX Runtime alone: python run_with_onnxruntime.py OUT/onnx PROMPT [TOKENS]."""

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession, OrtValue, SessionOptions
from tokenizers import Tokenizer

FLOAT8 = 17  # its number in ONNX; NumPy has no such type
TYPES = {"float": np.float32, "float16": np.float16, "int8": np.int8, "uint8": np.uint8, "float8e4m3fn": FLOAT8}

folder, prompt, most = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 128
files = [file for file in (folder / "config.json", folder / "generation_config.json") if file.exists()]
settings = {key: value for file in files for key, value in json.loads(file.read_text()).items()}
ends = np.ravel(settings.get("eos_token_id", -1))  # none, one or several
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
options = SessionOptions()
options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")  # 8-bit activations; "1": float, slower
session = InferenceSession(folder / "model.onnx", options)
ports = {port.name: port for port in session.get_inputs()}
cache = {  # keys and values; of quantized ones codes, and scales
    name: OrtValue.ortvalue_from_shape_and_type((1, port.shape[1], 0, port.shape[3]), TYPES[port.type[7:-1]])
    for name, port in ports.items()
    if name.startswith("past_key_values.")
}
outputs = ["logits", *(name.replace("past_key_values", "present") for name in cache)]
ids, length, tokens = tokenizer.encode(prompt).ids, 0, list[int]()
most = min(most, int(session.get_modelmeta().custom_metadata_map.get("qcompiler.max_positions", 2**31)) - len(ids))
while len(tokens) < most and not np.isin(tokens[-1:], ends).any():
    given = {"input_ids": ids, "position_ids": range(length, length + len(ids))}
    length += len(ids)
    given["attention_mask"] = [1] * length
    feeds = {name: OrtValue.ortvalue_from_numpy(np.array([given[name]], np.int64)) for name in ports if name in given}
    logits, *present = session.run_with_ort_values(outputs, cache | feeds)
    cache = dict(zip(cache, present, strict=True))
    ids = [int(logits.numpy()[0, -1].argmax())]
    tokens += ids
print(prompt + tokenizer.decode(tokens))
