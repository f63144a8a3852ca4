"""A real model, as each reader sees what was compiled of it: recipe × format × reader.

``python -m benchmarks.real_model SOURCE --calib FILE --text FILE --work DIR [--engines .venv-engines]``. SOURCE is a
directory or a GGUF file; of a file, the weights that it stands for are written to ``DIR/original`` in bfloat16 first,
and that is the original from then on. Each recipe is compiled once, with groups of ``--group``, then written in every
format that holds it; every reader scores the same windows of the text. Perplexity is that of the text; ``KL`` is the
divergence from the original in thousandths of a nat per token, ``top-1`` how often the likeliest token is the same. An
engine that tells only its likeliest tokens (256) gets a lower bound, ``≥``, with all others taken as one.

What stands in DIR is not done again: an interrupted run goes on where it was, and more recipes or engines join the
table. ``make test-engines`` makes the engines' environments.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import qcompiler as qc
from benchmarks.peer_drivers.score_rows import Scores
from benchmarks.runs import environment, keep
from qcompiler.artifacts import HFArtifact, load_tokenizer
from qcompiler.errors import QCompilerError
from qcompiler.ir import with_float_tables
from qcompiler.passes.assign import Assign
from qcompiler.passes.recipes import recipe as named_recipe
from qcompiler.protocol import Artifact, Pass
from qcompiler.reporting import machine
from qcompiler.storage import read_companions

DRIVER = Path(__file__).parent / "peer_drivers" / "score_rows.py"
RECIPES = ("w8a16", "w4a16-rtn", "w4a16-gptq", "w4a16-awq", "w8a8-dynamic", "fp8-dynamic")
PACKAGES = ("torch", "transformers", "compressed-tensors", "gguf", "onnxruntime")
OWN = "qcompiler"
READERS = {
    "native": (OWN,),
    "compressed-tensors": ("transformers", "vllm"),
    "gptq": (OWN, "gptqmodel", "vllm"),
    "awq": (OWN, "gptqmodel", "vllm"),
    "modelopt": (OWN, "vllm"),
    "gguf": (OWN, "llama.cpp"),
    "onnx": ("onnxruntime",),
}
"""Of each format; transformers and those behind it here compute in float32, engines in their own dtype."""
HERE: dict[str, Callable[[Path], Artifact]] = {
    OWN: qc.open_artifact,
    "transformers": HFArtifact,
    "onnxruntime": qc.open_artifact,
}
ORIGINAL = "original"


@dataclasses.dataclass
class Row:
    """One line: what a reader made of a recipe in a format.

    Attributes:
        recipe, format, reader: which; no reader where the format does not hold the recipe.
        size: bytes of all files; of the original, of its weights.
        found: what `Scores.means` gives; nothing where it was refused or not read.
        words: why not.
        version: of the engine.
    """

    recipe: str
    format: str
    reader: str
    size: int = 0
    found: dict[str, Any] = dataclasses.field(default_factory=dict)
    words: str = ""
    version: str = ""

    def cells(self) -> list[str]:
        """As text, in the order of the headings."""
        names = [self.recipe, self.format, self.reader]
        if not self.found:
            return [*names, self.words, "", "", f"{self.size / 1e6:.1f}" if self.size else ""]
        divergence, same = f"{1000 * self.found['divergence']:.2f}", f"{100 * self.found['same']:.1f} %"
        divergence = f"≥ {divergence}" if self.found["is_bound"] else divergence
        exact = self.recipe == ORIGINAL and self.format == "none"
        numbers = ["", ""] if exact else [divergence, same]
        return [*names, f"{self.found['perplexity']:.3f}", *numbers, f"{self.size / 1e6:.1f}"]


HEADINGS = ("recipe", "format", "reader", "perplexity", "KL", "top-1", "MB")


class Table:
    """The rows so far, kept in ``DIR/rows.json``."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._kept = options.work / "rows.json"
        self.rows = [Row(**fields) for fields in json.loads(self._kept.read_text())] if self._kept.is_file() else []

    def has(self, *names: str) -> bool:
        """Whether a recipe, format and reader are there."""
        return any((row.recipe, row.format, row.reader) == names for row in self.rows)

    def add(self, row: Row) -> None:
        """Prints and keeps a row, and writes the table where ``--output`` says."""
        self.rows.append(row)
        keep(self._kept, [dataclasses.asdict(row) for row in self.rows])
        print(time.strftime("%H:%M:%S"), *row.cells(), file=sys.stderr, flush=True)
        if self._options.output is not None:
            self._options.output.write_text(self.render(), encoding="utf-8")

    def render(self) -> str:
        """The table, as Markdown."""
        options = self._options
        about = f"{options.windows} windows of {options.length} tokens of {options.text.name} "
        about += f"({options.windows * (options.length - 1)} predictions); calibrated on {options.samples} windows of "
        about += f"256 tokens of {options.calib.name}; groups of {options.group}."
        here = {key: value for key, value in machine().items() if key not in PACKAGES}
        packages = {name: version(name) for name in PACKAGES}
        engines = {row.reader: row.version for row in self.rows if row.version}
        said = "; ".join(
            ", ".join(f"{name} {value}" for name, value in part.items()) for part in (here, packages, engines) if part
        )
        order = [ORIGINAL, *RECIPES, *options.recipes]
        rows = sorted(self.rows, key=lambda row: order.index(row.recipe) if row.recipe in order else len(order))
        lines = [f"# A real model: {options.source.stem}", "", textwrap.fill(f"{about} {said}.", 118), ""]
        lines += [f"| {' | '.join(cells)} |" for cells in (HEADINGS, ["---"] * 7, *(row.cells() for row in rows))]
        return "\n".join(lines) + "\n"


def main() -> None:
    """Prints the table."""
    options = _options()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    _check_settings(options)
    source = options.source
    if source.suffix == ".gguf":
        source = options.work / "original"
        if not source.is_dir():
            write_original(options.source, source)
    ids = windows(source, options.text, options.windows, options.length)
    table = Table(options)
    reference = options.work / "reference.npy"
    if not reference.is_file():
        write_reference(source, ids, reference)
    if not table.has(ORIGINAL, "none", "transformers"):
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        table.add(Row(ORIGINAL, "none", "transformers", size, score(HFArtifact(source), ids, reference)))
    if options.source.suffix == ".gguf" and not table.has(ORIGINAL, "gguf", "llama.cpp"):
        for engine in _engines(options, ("llama.cpp",)):
            table.add(read(Row(ORIGINAL, "gguf", engine, options.source.stat().st_size), options.source, options, ids))
    for name in options.recipes:
        measure(options, source, name, ids, table)
    print(table.render())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--engines", type=Path, help="a directory with an environment for each engine")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--formats", nargs="+", choices=READERS, default=list(READERS))
    everyone = list(dict.fromkeys(reader for readers in READERS.values() for reader in readers))
    parser.add_argument("--readers", nargs="+", choices=everyone, default=everyone)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16, help="windows of 256 tokens to calibrate on")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=3600, help="seconds that an engine may take for one checkpoint")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def _check_settings(options: argparse.Namespace) -> None:
    """What stands in the working directory must have been measured as this is."""
    names = ("source", "calib", "text", "group", "samples", "windows", "length")
    own = {name: str(getattr(options, name)) for name in names}
    kept = options.work / "settings.json"
    if not kept.is_file():
        keep(kept, own)
    known = json.loads(kept.read_text())
    if known != own:
        different = ", ".join(name for name in names if known[name] != own[name])
        raise SystemExit(f"--work {options.work} holds another measurement: {different}; give another directory")


def _engines(options: argparse.Namespace, names: tuple[str, ...]) -> list[str]:
    """Those that have an environment."""
    return [name for name in names if options.engines is not None and _python(options, name).exists()]


def _python(options: argparse.Namespace, engine: str) -> Path:
    return Path(options.engines) / engine / "bin" / "python"


def write_original(file: Path, directory: Path) -> None:
    """The weights of a GGUF file as a Hugging Face directory in bfloat16, ``config.json`` last."""
    graph = with_float_tables(qc.capture(file))
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        place = Path(scratch) / "original"
        place.mkdir()
        config = {**graph.provenance["config"], "dtype": "bfloat16"}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        names = [name for name, _ in model.named_parameters()]  # tied ones once
        tensors = {name: graph.weights.read(name).to(torch.bfloat16) for name in names}
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        for name, content in read_companions(Path(graph.provenance["companions"])).items():
            (place / name).write_bytes(content)
        (place / "config.json").write_text(json.dumps(config, indent=2))
        place.rename(directory)


def windows(source: Path, text: Path, count: int, length: int) -> Tensor:
    """int64 ``[count, length]``: the beginning of a text."""
    ids = load_tokenizer(source)(text.read_text(encoding="utf-8")[: 8 * count * length])["input_ids"]
    return torch.tensor(ids[: count * length], dtype=torch.int64).reshape(count, length)


def write_reference(source: Path, ids: Tensor, file: Path) -> None:
    """The original's log-probabilities, float32 ``[windows, length - 1, vocab]``, row by row."""
    original = HFArtifact(source)
    aside = file.with_suffix(".partial")
    shape = (ids.shape[0], ids.shape[1] - 1, original.vocab_size)
    with aside.open("wb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for row in ids[:, None]:
            stream.write(original.forward(row)[0, :-1].log_softmax(-1).numpy().tobytes())
    aside.replace(file)


def score(artifact: Artifact, ids: Tensor, reference: Path) -> dict[str, Any]:
    """What `Scores` finds of an artifact that runs here."""
    scores = Scores(np.load(reference, mmap_mode="r"))
    for number, row in enumerate(ids):
        scores.add_row(number, row.tolist(), artifact.forward(row[None])[0, :-1].log_softmax(-1).numpy())
    return scores.means()  # type: ignore[no-any-return]


def passes_of(name: str, group: int) -> list[Pass]:
    """A recipe with groups of another size, where its weights are in groups."""
    found: list[Pass] = []
    for item in named_recipe(name):
        if isinstance(item, Assign) and item.scheme in ("w8a16", "w4a16"):
            item = dataclasses.replace(item, scheme=f"{item.scheme}-g{group}")
        found.append(item)
    return found


def is_whole(place: Path) -> bool:
    """Whether a model was written there to its end; what an interrupted run left is removed."""
    last = {"native": "manifest.json", "onnx": "model.onnx"}.get(place.name, "config.json")
    if (place / last).is_file():
        return True
    shutil.rmtree(place, ignore_errors=True)
    return False


def measure(options: argparse.Namespace, source: Path, name: str, ids: Tensor, table: Table) -> None:
    """The rows of one recipe."""
    root = options.work / name
    if not is_whole(root / "native"):
        started = time.perf_counter()
        passes = passes_of(name, options.group)
        calibration = qc.Calibration.from_text(options.calib, samples=options.samples, length=256)
        result = qc.compile(source, passes, calibration if any(item.is_calibrated for item in passes) else None)
        result.save(root / "native")
        print(f"{name}: compiled in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    for form in options.formats:
        place = root / form
        if table.has(name, form, ""):
            continue
        if not is_whole(place):
            target = "onnx" if form == "onnx" else f"checkpoint:format={form}"
            try:
                qc.lower(root / "native", target, place, verify=False)
            except QCompilerError as error:
                table.add(Row(name, form, "", words=f"refused: {error.expected or error.what}"))
                continue
        size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
        for reader in READERS[form]:
            if reader not in options.readers or table.has(name, form, reader):
                continue
            if reader in HERE or _engines(options, (reader,)):
                table.add(read(Row(name, form, reader, size), place, options, ids))


def read(row: Row, place: Path, options: argparse.Namespace, ids: Tensor) -> Row:
    """A row with what its reader found, or with its own words where it does not take the files."""
    reference = options.work / "reference.npy"
    if row.reader in HERE:
        try:
            return dataclasses.replace(row, found=score(HERE[row.reader](place), ids, reference))
        except QCompilerError as error:
            return dataclasses.replace(row, words=f"no: {str(error.got or error.what)[:100]}")
    with tempfile.TemporaryDirectory(prefix="real-model-") as scratch:
        request, out = Path(scratch) / "request.json", Path(scratch) / "out.json"
        fields = {"engine": row.reader, "directory": str(place.resolve()), "rows": ids.tolist()}
        request.write_text(json.dumps({**fields, "reference": str(reference.resolve())}), encoding="utf-8")
        command = [_python(options, row.reader), DRIVER, request, out]
        own = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        own |= environment(options.threads)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=options.timeout, env=own
            )
        except subprocess.TimeoutExpired:
            return dataclasses.replace(row, words=f"no: not done after {options.timeout} s")
        if not out.is_file():
            return dataclasses.replace(row, words=f"no: {_last_words(done.stderr + done.stdout)}")
        found = json.loads(out.read_text(encoding="utf-8"))
    return dataclasses.replace(row, found=found, version=found.pop("version"))


def _last_words(text: str) -> str:
    """The last line that tells of an error."""
    lines = [line.strip() for line in text.splitlines() if "Error" in line or "error:" in line]
    return lines[-1][:120] if lines else "it ended without an answer"


if __name__ == "__main__":
    main()
