"""What capture costs: ``python -m benchmarks.capture_memory`` for the shape of Llama-2-7B; other shapes by option.

The checkpoint is a sparse file: its header names every tensor, its data takes no space on the disk. Each shape is
captured in a process of its own. Memory is peak resident memory, once with the imports and once less what was resident
after them; seconds are of capture and canonicalization, after the imports.
"""

import argparse
import json
import math
import os
import platform
import resource
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Runs the benchmark and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=32)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    rows = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory() as directory:
            size = build(Path(directory), layers, options)
            command = [sys.executable, "-m", "benchmarks.capture_memory", "--one", directory]
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        rows.append({"layers": layers, "checkpoint": size, **json.loads(output.splitlines()[-1])})
    print(render(rows, options))


def build(directory: Path, layers: int, options: argparse.Namespace) -> int:
    """Writes config.json and a sparse float16 checkpoint; returns the checkpoint's nominal size in bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocabulary,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: list(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(file.tell() + end)
    return end


def measure(directory: Path) -> dict[str, Any]:
    """Captures one directory in this process."""
    import torch
    import transformers.models.llama.modeling_llama

    import qcompiler

    imported = peak_bytes()
    start, cpu = time.perf_counter(), time.process_time()
    graph = qcompiler.capture(directory)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": peak_bytes(),
        "imported_bytes": imported,
        "nodes": len(graph.fx.nodes),
        "parameters": graph.provenance["parameters"],
        "unrecognized": len(graph.unrecognized),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def render(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """The rows as a Markdown table."""
    shape = f"hidden {options.hidden}, {options.heads} heads, {options.kv_heads} of keys, MLP {options.intermediate}"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {rows[0]['versions']}"
    lines = [
        f"Llama, {shape}, vocabulary {options.vocabulary}; {machine}",
        "",
        "| layers | parameters | checkpoint | seconds | CPU seconds | peak | less imports | nodes | unrecognized |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['layers']} | {row['parameters'] / 1e9:.2f} G | {row['checkpoint'] / 1e9:.1f} GB "
            f"| {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['peak_bytes'] / 1e6:.0f} MB "
            f"| {(row['peak_bytes'] - row['imported_bytes']) / 1e6:.0f} MB | {row['nodes']} | {row['unrecognized']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
