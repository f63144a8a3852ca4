"""Gives a model outlier channels without changing what it computes.

``python -m benchmarks.plant MODEL OUT [--factor 64] [--channels 4] [--seed 0]``. Small models have none of the outlier
channels that make large ones hard to quantize. Here every norm that a scale can be folded through (`qcompiler.proofs`)
gets its weight multiplied by a power of two on a few channels, and the columns that read them are divided by the same.
A power of two is exact in float32, bfloat16 and, within its range, float16: logits computed in float32 are the
original's, bit for bit.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

import qcompiler as qc
from qcompiler.ir import Graph
from qcompiler.proofs import find_regions, fold_scale

__all__ = ["plant", "plant_directory"]


def plant(graph: Graph, *, factor: float = 64.0, channels: int = 4, seed: int = 0) -> list[str]:
    """Plants outliers in a captured graph, in place; returns the norms that were changed."""
    generator = torch.Generator().manual_seed(seed)
    changed = []
    for region in find_regions(graph).found:
        if all(producer.kind == "norm" for producer in region.producers):
            scale = torch.ones(region.size)
            scale[torch.randperm(region.size, generator=generator)[:channels]] = 1 / factor
            fold_scale(graph, region, scale)
            changed += [producer.name for producer in region.producers]
    graph.round_rewritten()
    return changed


def plant_directory(model: Path, out: Path, *, factor: float = 64.0, channels: int = 4, seed: int = 0) -> list[str]:
    """Writes a Hugging Face directory with planted outliers; the stored dtypes stay.

    Raises:
        ValueError: if the model's tensors are not stored as the graph reads them.
    """
    from safetensors.torch import load_file, save_file

    graph = qc.capture(model)
    before = {name: graph.weights.version(name) for name in graph.weight_names()}
    changed = plant(graph, factor=factor, channels=channels, seed=seed)
    tensors: dict[str, Tensor] = {}
    for path in sorted(model.glob("*.safetensors")):
        tensors |= load_file(path)
    for name in graph.weight_names():
        if graph.weights.version(name) != before[name]:
            if name not in tensors or tuple(tensors[name].shape) != graph.weights.info(name).shape:
                raise ValueError(f"{name} is not stored as the graph reads it")
            tensors[name] = graph.weights.read(name).to(tensors[name].dtype)
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for path in model.glob("*.json"):
        if path.name != "model.safetensors.index.json":
            shutil.copy(path, out / path.name)
    return changed


def main() -> None:
    """Plants and says where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--factor", type=float, default=64.0)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    changed = plant_directory(
        options.model, options.out, factor=options.factor, channels=options.channels, seed=options.seed
    )
    print(json.dumps({"planted": changed}))


if __name__ == "__main__":
    main()
