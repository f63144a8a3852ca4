"""A real model, as each reader sees what was compiled of it: recipe × format × reader.

``python -m benchmarks.real_model SOURCE --calib FILE --text FILE --work DIR [--llama-cpp PYTHON]``. SOURCE is a
directory or a GGUF file; of a file, the weights that it stands for are written to ``DIR/original`` in bfloat16 first,
and that is the original from then on. Each recipe is compiled once, with groups of ``--group``, then lowered to each
format; every reader sees the same windows of the text. Perplexity is that of the text; ``KL`` is the divergence from
the original in thousandths of a nat per token, ``top-1`` how often the likeliest token is the same. Of llama.cpp only
the perplexity is asked.
"""

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import qcompiler as qc
from qcompiler.artifacts import HFArtifact, load_tokenizer
from qcompiler.errors import QCompilerError
from qcompiler.ir import with_float_tables
from qcompiler.lowering.checkpoint import CheckpointTarget
from qcompiler.passes.assign import Assign
from qcompiler.passes.recipes import recipe as named_recipe
from qcompiler.protocol import Pass
from qcompiler.storage import read_companions

DRIVER = Path(__file__).parent / "peer_drivers" / "read_llama_cpp.py"
RECIPES = ("w8a16", "w4a16-rtn", "w4a16-gptq", "w4a16-awq-gptq", "w8a8-dynamic")
PACKAGES = ("torch", "transformers", "compressed-tensors", "gguf")
FORMATS = ("compressed-tensors", "gptq", "awq", "gguf")
HEADINGS = ("recipe", "format", "reader", "perplexity", "KL", "top-1", "MB")


def main() -> None:
    """Prints the table, and writes it where ``--output`` says; every number is kept in ``DIR/rows.json``."""
    options = _options()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    source = options.source
    if source.suffix == ".gguf":
        source = options.work / "original"
        if not source.is_dir():
            write_original(options.source, source)
    ids = windows(source, options.text, options.windows, options.length)
    kept = options.work / "rows.json"
    rows = json.loads(kept.read_text()) if kept.is_file() else []
    for name in options.recipes:
        if any(row[0] == name for row in rows):
            continue
        print(time.strftime("%H:%M:%S"), name, file=sys.stderr)
        rows += measure(options, source, name, ids, is_first=not rows)
        kept.write_text(json.dumps(rows))
    table = render(rows, options)
    print(table)
    if options.output is not None:
        options.output.write_text(table, encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--llama-cpp", type=Path, help="the Python of an environment that has xllamacpp")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16, help="windows of 256 tokens to calibrate on")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def write_original(file: Path, directory: Path) -> None:
    """The weights of a GGUF file as a Hugging Face directory in bfloat16."""
    graph = with_float_tables(qc.capture(file))
    directory.mkdir(parents=True)
    names = [name for name in graph.weight_names() if not name.endswith(("_codes", "_scale", "_zero_point"))]
    save_file(
        {name: graph.weights.read(name).to(torch.bfloat16) for name in names},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    for name, content in read_companions(Path(graph.provenance["companions"])).items():
        (directory / name).write_bytes(content)
    config = {**graph.provenance["config"], "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def windows(source: Path, text: Path, count: int, length: int) -> Tensor:
    """int64 ``[count, length]``: the beginning of a text."""
    ids = load_tokenizer(source)(text.read_text(encoding="utf-8")[: 8 * count * length])["input_ids"]
    return torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)


def passes_of(name: str, group: int) -> list[Pass]:
    """A recipe with groups of another size, where its weights are in groups."""
    found: list[Pass] = []
    for item in named_recipe(name):
        if isinstance(item, Assign) and item.scheme in ("w8a16", "w4a16"):
            item = dataclasses.replace(item, scheme=f"{item.scheme}-g{group}")
        found.append(item)
    return found


def measure(options: argparse.Namespace, source: Path, name: str, ids: Tensor, is_first: bool) -> list[list[str]]:
    """The lines of one recipe, ahead of them that of the original where it is the first."""
    passes = passes_of(name, options.group)
    calibration = qc.Calibration.from_text(options.calib, samples=options.samples, length=256)
    result = qc.compile(source, passes, calibration if any(item.is_calibrated for item in passes) else None)
    readers: dict[tuple[str, str], Any] = {("native", "qcompiler"): result.artifact()}
    size = {"native": result.report.bytes_after, "none": (source / "model.safetensors").stat().st_size}
    lines, scored = [], dict[str, float]()
    for form in options.formats:
        place = options.work / f"{name}-{form}"
        shutil.rmtree(place, ignore_errors=True)
        try:
            written = qc.lower(result, CheckpointTarget(form), place, verify=False)  # type: ignore[arg-type]
        except QCompilerError as error:
            lines.append([name, form, f"refused: {error.expected or error.what}", "", "", "", ""])
            continue
        size[form] = written["bytes"]
        if form == "gguf" and options.llama_cpp is not None:
            scored[form] = llama_cpp(options.llama_cpp, place, ids, options.work)
        elif form == "compressed-tensors":
            readers[form, "transformers"] = HFArtifact(place)
        else:
            readers[form, "qcompiler"] = qc.load(place).artifact()
    found = compare(HFArtifact(source), readers, ids)
    if is_first:
        lines.insert(0, ["original", "none", "transformers", f"{found['original'][0]:.3f}", "", "", _mb(size["none"])])
    for (form, reader), (perplexity, divergence, same) in ((key, found[key]) for key in readers):
        numbers = [f"{perplexity:.3f}", f"{1000 * divergence:.2f}", f"{100 * same:.1f} %"]
        lines.append([name, form, reader, *numbers, _mb(size[form])])
    for form, perplexity in scored.items():
        lines.append([name, form, "llama.cpp", f"{perplexity:.3f}", "", "", _mb(size[form])])
    return lines


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}"


def compare(original: Any, readers: Mapping[Any, Any], ids: Tensor) -> dict[Any, tuple[float, float, float]]:
    """Perplexity, divergence from the original in nats, and how often the likeliest token is its, of each reader."""
    totals = {key: np.zeros(3) for key in ("original", *readers)}
    for row in ids[:, None]:
        wanted = torch.log_softmax(original.forward(row)[0, :-1], -1)
        for key, total in totals.items():
            found = wanted if key == "original" else torch.log_softmax(readers[key].forward(row)[0, :-1], -1)
            likelihood = found.gather(1, row[0, 1:, None]).sum()
            divergence = (wanted.exp() * (wanted - found)).sum()
            same = (found.argmax(-1) == wanted.argmax(-1)).sum()
            total += [float(likelihood), float(divergence), float(same)]
    count = ids.shape[0] * (ids.shape[1] - 1)
    return {key: (float(np.exp(-t[0] / count)), t[1] / count, t[2] / count) for key, t in totals.items()}


def llama_cpp(python: Path, place: Path, ids: Tensor, work: Path) -> float:
    """The perplexity that llama.cpp finds."""
    rows, out = work / "tokens.json", work / "scored.npz"
    rows.write_text(json.dumps(ids.tolist()))
    subprocess.run([python, DRIVER, place, rows, out], check=True, capture_output=True)
    return float(np.exp(-np.load(out)["scored"].mean(dtype=np.float64)))


def _llama_cpp_version(python: Path) -> str:
    code = "import importlib.metadata as m; print(m.version('xllamacpp'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def render(rows: list[list[str]], options: argparse.Namespace) -> str:
    """The table, as Markdown."""
    about = f"{options.windows} windows of {options.length} tokens of {options.text.name}; calibrated on "
    about += f"{options.samples} windows of 256 tokens of {options.calib.name}; groups of {options.group}."
    about += " " + ", ".join(f"{name} {version(name)}" for name in PACKAGES) + "."
    if options.llama_cpp is not None:
        about += f" llama.cpp of xllamacpp {_llama_cpp_version(options.llama_cpp)}."
    lines = [f"# A real model: {options.source.name}", "", about, ""]
    lines += [f"| {' | '.join(cells)} |" for cells in (HEADINGS, ["---"] * len(HEADINGS), *rows)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
