"""Greedy generation with an engine: python run.py PROMPT [--tokens N] [--plan FILE]; torch for memory, tokenizers."""

import argparse
import importlib
import json
import math
import sys
from pathlib import Path

PACKAGE, VERSION = "tensorrt_rtx", "of any version"  # built the plans beside this file, which no other loads

folder = Path(__file__).resolve().parent
parser = argparse.ArgumentParser(description="Continues a prompt. Checked against an imitation, not yet on a GPU.")
parser.add_argument("prompt")
parser.add_argument("--tokens", type=int, default=128, help="at most")
parser.add_argument("--plan", type=Path, help="by default the one for this GPU")
options = parser.parse_args()
try:
    tokenizers, torch, trt = (importlib.import_module(name) for name in ("tokenizers", "torch", PACKAGE))
except (ImportError, OSError) as error:
    sys.exit(f"run.py needs {PACKAGE} {VERSION}, torch and tokenizers: {error}")
if not torch.cuda.is_available():
    sys.exit("run.py: torch sees no NVIDIA GPU (or no driver), and engines run on nothing else")
gpu = "sm{}{}".format(*torch.cuda.get_device_capability())
plan = options.plan or folder / f"engine-{gpu}.plan"
if not plan.exists():
    sys.exit(f"run.py: no {plan.name} here, but {', '.join(sorted(p.name for p in folder.glob('*.plan'))) or 'none'}")
runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
if (engine := runtime.deserialize_cuda_engine(plan.read_bytes())) is None:
    sys.exit(f"run.py: {plan.name} does not load on {gpu} with {trt.__version__}; {PACKAGE} {VERSION} built it")
files = [file for file in (folder / "config.json", folder / "generation_config.json") if file.exists()]
settings = {key: value for file in files for key, value in json.loads(file.read_text()).items()}
ends = settings.get("eos_token_id")
ends = ends if isinstance(ends, list) else [ends]  # none, one or several
tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
contexts = [engine.create_execution_context() for _ in range(min(2, engine.num_optimization_profiles))]
stream = torch.cuda.current_stream().cuda_stream
for profile, context in enumerate(contexts):  # to read a prompt, and to decode
    context.set_optimization_profile_async(profile, stream)
dtypes = {name: engine.get_tensor_dtype(name) for name in map(engine.get_tensor_name, range(engine.num_io_tensors))}
inputs = [name for name in dtypes if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
nothing = torch.empty(1, dtype=torch.uint8, device="cuda")
shapes = {name: engine.get_tensor_profile_shape(name, len(contexts) - 1) for name in inputs}
cache = {name: (nothing, tuple(shapes[name][0])) for name in inputs if name.startswith("past_")}
least, _, piece = (shape[1] for shape in engine.get_tensor_profile_shape("input_ids", 0))
most = max(shapes[name][2][2] + 1 for name in cache)
ids = tokenizer.encode(options.prompt).ids
if not 0 < len(ids) < most:
    sys.exit(f"run.py: a prompt of {len(ids)} tokens; the engine takes 1 to {most - 1}")
tokens: list[int] = []
length = 0
while len(tokens) < options.tokens and length < most and not set(tokens[-1:]) & set(ends):
    part = ids[length : length + ((len(ids) - length) % piece or piece)] or tokens[-1:]  # the shorter part first
    part = part if len(part) >= least else part[:1]  # what is too short for the first profile, by the second
    context, end = contexts[-1 if len(part) == 1 else 0], length + len(part)
    given = {"input_ids": part, "position_ids": range(length, end), "attention_mask": [1] * end}
    held = dict(cache)
    for name in given.keys() & inputs:
        dtype = torch.int64 if dtypes[name] == trt.DataType.INT64 else torch.int32
        held[name] = torch.tensor([list(given[name])], dtype=dtype, device="cuda"), (1, len(given[name]))
    for name, (_, shape) in held.items():
        if not context.set_input_shape(name, shape):
            sys.exit(f"run.py: the engine does not take {name} of {shape}")
    for name in dtypes.keys() - inputs:
        shape = tuple(context.get_tensor_shape(name))
        size = max(1, math.ceil(math.prod(shape) * dtypes[name].itemsize))
        held[name] = torch.empty(size, dtype=torch.uint8, device="cuda"), shape
    bound = [context.set_tensor_address(name, memory.data_ptr()) for name, (memory, _) in held.items()]
    if not all(bound) or not context.execute_async_v3(stream):
        sys.exit("run.py: the engine failed")
    torch.cuda.synchronize()
    cache, length = {name: held[name.replace("past_key_values", "present")] for name in cache}, end
    if length >= len(ids):
        kind = {"HALF": torch.float16, "BF16": torch.bfloat16}.get(dtypes["logits"].name, torch.float32)
        logits, shape = held["logits"]
        tokens.append(int(logits.view(kind).reshape(shape)[0, -1].argmax()))
print(options.prompt + tokenizer.decode(tokens))
