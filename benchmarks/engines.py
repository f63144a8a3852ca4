"""TensorRT engines as NVIDIA's builder makes them: recipe × compute capability, and the portable ONNX beside them.

``python -m benchmarks.engines MODEL --calib FILE [--keep FILE] [--output FILE]``, or ``--random`` instead of a model: a
Llama of 270 million random weights, calibrated on random tokens. Each recipe is compiled once. An engine has a profile
to read prompts with and one to decode with; a layer counts as fused where both profiles multiply its codes.
``products`` is how many layers of the engine the quantized layers went to, reading and decoding: fewer where the
builder merged some that read one value. ``attention`` names the kernels of both profiles. ``portable`` is what
``--to onnx`` writes (opset 23, float16) in the same builder. Builder memory is that of its process. No engine is run.

``--keep FILE`` holds the rows as JSON: what stands there is not built again.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import qcompiler as qc
from benchmarks.formats import WIDTH, schemes_of, table
from benchmarks.runs import keep
from qcompiler.errors import QCompilerError
from qcompiler.ir import Graph
from qcompiler.lowering.onnx import OnnxTarget
from qcompiler.lowering.tensorrt import TensorRTTarget
from qcompiler.lowering.tensorrt.engine import build_engine, find_api, fused_attentions, fused_linears
from qcompiler.lowering.tensorrt.writer import profiles_of, summary
from qcompiler.passes.recipes import RECIPES
from qcompiler.reporting import machine

CACHES = ("w4a16-rtn+kv-int8", "w4a16-rtn+kv-int4", "fp8+kv-fp8-static")
CAPABILITIES = (80, 86, 89, 120)
PORTABLE = 89
HEADINGS = ("recipe", "SM", "builds", "fused", "products", "attention", "s", "plan MB", "builder MB", "portable")
LENGTH = 1024


@dataclass
class Row:
    """One line of the table, as text; of an engine that was not built, ``builds`` says why."""

    recipe: str
    capability: str
    builds: str
    fused: str = ""
    products: str = ""
    attention: str = ""
    seconds: str = ""
    plan: str = ""
    memory: str = ""
    portable: str = ""

    def cells(self) -> list[str]:
        """The values in order."""
        return [str(getattr(self, item.name)) for item in dataclasses.fields(self)]


def main() -> None:
    """Builds every engine that is not kept yet, and prints the table."""
    options = _options()
    is_kept = options.keep is not None and options.keep.is_file()
    rows = [Row(**fields) for fields in json.loads(options.keep.read_text())] if is_kept else []
    with tempfile.TemporaryDirectory(prefix="engines-") as scratch:
        model = random_llama(Path(scratch) / "llama") if options.random else options.model
        graph = qc.capture(model)
        for recipe in options.recipes:
            if all(any((row.recipe, row.capability) == (recipe, str(sm)) for row in rows) for sm in options.sm):
                continue
            began = time.perf_counter()
            rows = [row for row in rows if row.recipe != recipe]
            rows += rows_of(recipe, graph, options, Path(scratch) / recipe.replace("+", "-"))
            print(f"{recipe}: {time.perf_counter() - began:.0f} s", flush=True)
            if options.keep is not None:
                keep(options.keep, [dataclasses.asdict(row) for row in rows])
            if options.output is not None:
                options.output.write_text(render(rows, options), encoding="utf-8")
    print(render(rows, options))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a Hugging Face directory")
    parser.add_argument("--random", action="store_true", help="a Llama of 270 million random weights instead")
    parser.add_argument("--calib", type=Path, help="text to calibrate on")
    parser.add_argument("--recipes", nargs="+", default=[*RECIPES, *CACHES])
    parser.add_argument("--sm", nargs="+", type=int, default=CAPABILITIES)
    parser.add_argument("--keep", type=Path, help="JSON that rows are kept in")
    parser.add_argument("--output", type=Path, help="the table, in Markdown")
    options = parser.parse_args()
    if not options.random and (options.model is None or options.calib is None):
        parser.error("give a model and --calib, or --random")
    return options


def random_llama(place: Path) -> Path:
    """A Llama in bfloat16: 16 layers of 1024 channels, 16 heads on 8, a vocabulary of 32000."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16}
    config = LlamaConfig(**sizes, num_attention_heads=16, num_key_value_heads=8, max_position_embeddings=LENGTH)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
    return place


def rows_of(recipe: str, graph: Graph, options: argparse.Namespace, place: Path) -> Iterator[Row]:
    """The lines of one recipe."""
    refused = {sm: refusal(recipe, sm) for sm in options.sm}
    for sm, reason in refused.items():
        if reason:
            yield Row(recipe, str(sm), f"refused: {reason}")
    wanted = [sm for sm in options.sm if not refused[sm]]
    if not wanted:
        return
    if options.random:
        calibration = qc.Calibration.from_tokens(torch.randint(32000, (4, 64)))
    else:
        calibration = qc.Calibration.from_text(options.calib, samples=16, length=128)
    result = qc.compile(graph, recipe, calibration)
    for sm in wanted:
        yield engine_row(result, recipe, sm, place)


def refusal(recipe: str, sm: int) -> str:
    """Why a GPU does not take a recipe; nothing where it does."""
    target = TensorRTTarget(str(sm))
    answers = [target.supports(scheme, WIDTH) for scheme in schemes_of(recipe)]
    return next((answer.reason for answer in answers if answer.status == "refused"), "")


def engine_row(result: qc.CompileResult, recipe: str, sm: int, place: Path) -> Row:
    """What the builder makes of a compiled model in our dialect and, for one GPU, of the portable file."""
    target = TensorRTTarget(str(sm), length=LENGTH)
    try:
        report = qc.lower(result, target, place / f"sm{sm}", verify=False)
    except QCompilerError as error:
        return Row(recipe, str(sm), f"no: {str(error.got or error.what)[:120]}")
    (engine,) = report["engines"].values()
    return Row(
        recipe,
        str(sm),
        "yes",
        engine["fused_linears"],
        "/".join(engine["products"]),
        "/".join(engine["attention_kernels"]),
        f"{engine['seconds']:.1f}",
        f"{engine['plan_bytes'] / 1e6:.1f}",
        f"{engine['peak_rss_bytes'] / 1e6:.0f}",
        portable(result, sm, target, place / f"portable{sm}") if sm == PORTABLE else "",
    )


def portable(result: qc.CompileResult, sm: int, target: TensorRTTarget, place: Path) -> str:
    """What the builder makes of the ONNX that every runtime takes."""
    try:
        qc.lower(result, OnnxTarget(23, "float16"), place, verify=False)
        profiles = profiles_of(result.graph, target, ports=result.graph.signature.inputs)
        built = build_engine(place / "model.onnx", place / "engine.plan", capability=sm, profiles=profiles)
    except QCompilerError as error:
        return f"no: {str(error.got or error.what)[:100]}"
    origins = {origin for layer in built.layers for origin in layer.origins}
    sites = [site for site in result.graph.schemes if result.graph.schemes[site].weight is not None]
    linears = fused_linears(built.layers, {site: f"{site}/MatMul" for site in sites})
    attention = torch.ops.qcompiler.attention.default
    names = {node.name for node in result.graph.fx.nodes if node.target is attention}
    attentions = fused_attentions(
        built.layers, {name: [origin for origin in origins if origin.startswith(f"{name}/")] for name in names}
    )
    found = summary(linears, attentions)
    return f"{found['fused_linears']} fused, {found['fused_attentions']} attentions"


def render(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """The table, as Markdown."""
    api = find_api()
    where = ", ".join(f"{name} {value}" for name, value in {**machine(), api.package: api.version}.items())
    title = "Random Llama of 270 M parameters" if options.random else f"`{options.model.name}`"
    order = {recipe: place for place, recipe in enumerate(options.recipes)}
    ordered = sorted(rows, key=lambda row: (order.get(row.recipe, len(order)), int(row.capability)))
    return (
        "\n".join(
            [f"{title}, sequences of {LENGTH} tokens. {where}.", "", *table(HEADINGS, [r.cells() for r in ordered])]
        )
        + "\n"
    )


if __name__ == "__main__":
    main()
