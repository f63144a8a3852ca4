"""The commands: each reads its options, calls `qcompiler.api`, and prints."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import qcompiler
from qcompiler import api
from qcompiler.artifacts import Calibration
from qcompiler.cli.measuring import measure_by_inputs
from qcompiler.cli.options import (
    Engine,
    Json,
    Overwrite,
    Place,
    Stream,
    Threads,
    To,
    Trust,
    Verbose,
    parse_bytes,
    parse_overrides,
    parse_targets,
    read_calibration,
)
from qcompiler.cli.output import Kept, Output, directory_bytes, opened_output
from qcompiler.cli.printing import (
    Streamed,
    describe_engine,
    engine_in_short,
    print_compiled,
    print_converted,
    print_recipe,
    print_targets,
)
from qcompiler.cli.recommending import Batch, Context, For, Goal, choose_for
from qcompiler.protocol import Progress, Target
from qcompiler.reporting import peak_rss_bytes, print_rows, print_table, show_progress
from qcompiler.sweep import use_threads

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Compiles language models to low-bit ones, and measures them.")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"qcompiler {qcompiler.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Compiles language models to low-bit ones, and measures them."""


@app.command()
def compile(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A directory for native and the targets.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", "-r", help="A name (see `qcompiler recipes`), FILE.toml, or FILE.py:NAME, which is run."
        ),
    ] = None,
    gpu: For = None,
    tokens: Context = None,
    batch: Batch = None,
    goal: Goal = "quality",
    calib: Annotated[
        Path | None,
        typer.Option(help="A UTF-8 text, plain or JSON lines; or inputs.npz, for a model without token ids."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 512,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="PATTERN=SCHEME for sites, such as 'lm_head=w8a16' or '*.0.*=none'."),
    ] = None,
    to: To = None,
    overwrite: Overwrite = False,
    memory_budget: Annotated[
        str | None, typer.Option(help="For calibration values, such as 4GB; more goes to disk.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="The only source of randomness.")] = 0,
    strict: Annotated[
        bool, typer.Option(help="A site left alone unasked, or a part of the source that is lost, is an error.")
    ] = False,
    work_dir: Annotated[Path | None, typer.Option(help="Where temporary files go.")] = None,
    threads: Threads = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Quantize MODEL and write it to OUTPUT/native, and to OUTPUT/<target> for every --to (kernels are only tried)."""
    started = time.perf_counter()
    use_threads(threads)
    chosen = choose_for(context, model, recipe, gpu, to or [], context=tokens, batch=batch, goal=goal)
    recipe, targets = chosen.recipe, parse_targets(chosen.targets)
    overrides = parse_overrides(override or [])
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    calibration = None if calib is None else read_calibration(calib, samples, length, seed)
    if calibration is None and (samples, length) != (64, 512):
        calibration = Calibration.self_generated(samples=samples, length=length, seed=seed)
    passes = api.check_arguments(
        model, recipe, overrides=overrides, memory_budget=budget, device=device, seed=seed, work_dir=work_dir
    )
    kept: Kept = context.obj
    kept.wanted, kept.output = {target.name: text for text, target in targets.items()}, str(output)
    names = _names(targets)
    inputs = (calib, work_dir, Path(recipe.partition(":")[0]))
    with (
        opened_output(
            output, names, kept, overwrite=overwrite, targets=list(targets.values()), model=model, inputs=inputs
        ) as out,
        show_progress(as_json and not verbose) as progress,
    ):
        result = api.compile(
            model,
            passes,
            calibration,
            targets=list(targets.values()),
            memory_budget=budget,
            device=device,
            seed=seed,
            strict=strict,
            work_dir=work_dir,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
        with out.part("native", outdated=names) as place:
            result.save(place)
        result.saved_in = out.root / "native"
        for target in targets.values():
            api.check_target(result, target)  # of what the passes have made of the graph
            _add_target(result, target, out, progress)
        result.report.peak_rss_bytes = peak_rss_bytes()
    fields = result.report.to_dict()
    sizes = {name: directory_bytes(Path(path)) for name, path in kept.artifacts.items()}
    notes = [f"{name}: {note}" for name, entry in fields["targets"].items() for note in entry.get("notes", ())]
    fields["notes"] = [*fields["notes"], *notes]
    summary = {
        "artifacts": kept.artifacts,
        "artifact_bytes": sizes,
        "compared": {name: entry.get("parity") for name, entry in fields["targets"].items() if name not in sizes},
        "seconds": time.perf_counter() - started,
        **{key: fields[key] for key in ("peak_rss_bytes", "bytes_before", "bytes_after", "bits_per_weight")},
        **{key: fields[key] for key in ("cache_bytes_per_token", "held_out")},
        **{key: fields[key] for key in ("skipped", "sites", "notes")},
    }
    if chosen.fields is not None:
        summary["recommended"] = chosen.fields
    if not as_json:
        print_compiled(summary)
    return summary


@app.command()
def convert(
    context: typer.Context,
    artifact: Annotated[
        Path, typer.Argument(help="OUT or OUT/native, of an earlier compilation; or a quantized checkpoint.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A directory for the targets; OUT itself will do.")],
    to: To,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Write a compiled model to OUTPUT/<target> for every --to (kernels are only tried)."""
    started = time.perf_counter()
    targets = parse_targets(to or [])
    result = api.load(artifact)
    for target in targets.values():
        api.check_target(result, target)
    kept: Kept = context.obj
    kept.wanted, kept.output = {target.name: text for text, target in targets.items()}, str(output)
    kept.source = str(artifact)
    made = list(targets.values())
    model = artifact if result.saved_in is None else None  # a checkpoint of another program
    with (
        opened_output(
            output,
            [target.name for target in made if target.main_file is not None],
            kept,
            overwrite=overwrite,
            targets=made,
            model=model,
            inputs=(result.saved_in,),
        ) as out,
        show_progress(as_json) as progress,
    ):
        written = {target.name: _add_target(result, target, out, progress) for target in made}
    found = {
        "artifacts": kept.artifacts,
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": peak_rss_bytes(),
        "targets": {
            name: {key: entry.get(key) for key in ("bytes", "parity", "notes")} for name, entry in written.items()
        },
    }
    if not as_json:
        print_converted(found)
    return found


def _names(targets: Mapping[str, Target]) -> list[str]:
    """What may lie in an output directory."""
    written = [target["name"] for target in api.describe_targets() if target["writes"] is not None]
    return list(dict.fromkeys(["native", *written, *(t.name for t in targets.values() if t.main_file is not None)]))


def _add_target(result: api.CompileResult, target: Target, out: Output, progress: Progress) -> dict[str, Any]:
    """Writes a target into the output, or tries one without files; it is in the report as soon as that is done."""
    if target.main_file is None:
        written = api.try_target(result, target)
        out.kept.wanted.pop(target.name)
    else:
        with out.part(target.name) as place:
            written = {
                **api.write_target(result, target, place, progress=progress),
                "path": str(out.given / target.name),
            }
    api.record_target(result, target.name, written)
    return written


@app.command()
def evaluate(
    artifact: Annotated[Path, typer.Argument(help="OUT, OUT/native, OUT/onnx, or a Hugging Face directory.")],
    text: Annotated[
        Path | None, typer.Option(help="A UTF-8 text; by default the held-out tokens of the artifact.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="The original model, for KL divergence and agreement.")] = None,
    cached: Annotated[
        bool | None, typer.Option(help="Decode half of each window with the cache; by default if that is quantized.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Use no more of the text.")] = None,
    inputs: Annotated[Path | None, typer.Option(help="An .npz of inputs, for models without token ids.")] = None,
    metric: Annotated[str, typer.Option(help="With --inputs: cosine, max or top1.")] = "cosine",
    engine: Engine = None,
    device: Place = None,
    stream: Stream = None,
    threads: Threads = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Measure perplexity, and the distance to the original model."""
    use_threads(threads)
    if inputs is not None:
        return measure_by_inputs(artifact, against, inputs, metric, as_json=as_json)
    opened = api.open_artifact(
        artifact, engine=engine, device=device, streamed=stream, trust_remote_code=trust_remote_code
    )
    reference = None if against is None else api.open_artifact(against, trust_remote_code=trust_remote_code)
    with show_progress(as_json and not verbose) as progress:
        found: dict[str, Any] = api.evaluate(
            opened,
            text=text,
            against=reference,
            cached=cached,
            max_tokens=max_tokens,
            progress=lambda done, total: progress(done, total, "windows"),
        ).to_dict()
    found["engine"] = None if engine is None else describe_engine(opened)
    if not as_json:
        shown = found if engine is None else {**found, "engine": engine_in_short(found["engine"])}
        print_table({key: value for key, value in shown.items() if value is not None and key != "notes"})
        for note in found["notes"]:
            print(f"note: {note}")
    return found


@app.command()
def generate(
    artifact: Annotated[Path, typer.Argument(help="OUT, OUT/native, OUT/onnx, or a Hugging Face directory.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the most likely tokens of this total probability.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    engine: Engine = None,
    device: Place = None,
    threads: Threads = None,
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Continue a prompt: greedily, unless asked to sample (what generation_config.json says of that is not read)."""
    use_threads(threads)
    opened = api.open_artifact(artifact, exact=False, engine=engine, device=device, trust_remote_code=trust_remote_code)
    shown = None if as_json else Streamed(prompt)
    result = api.generate(
        opened,
        prompt,
        trust_remote_code=trust_remote_code,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        on_text=shown,
    )
    if shown is not None:
        shown.end()
        if result.finish == "positions":
            print(f"stopped: the model takes no more than {opened.max_positions} tokens", file=sys.stderr)
    described = None if engine is None else describe_engine(opened)
    if described is not None and not as_json:
        for note in described["notes"]:
            print(f"note: {note}", file=sys.stderr)
    return {**result.to_dict(), "engine": described}


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory, or a native artifact.")],
    trust_remote_code: Trust = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """List the sites of a model, and what was not recognised."""
    is_native = any((model / place / "manifest.json").is_file() for place in (".", "native"))
    graph = api.load(model).graph if is_native else api.capture(model, trust_remote_code=trust_remote_code)
    sites = [
        {
            "site": site.name,
            "shape": [site.out_features, site.in_features],
            "scheme": str(scheme.weight) if (scheme := graph.schemes.get(site.name)) and scheme.weight else None,
        }
        for site in graph.sites()
    ]
    found = {
        "parameters": graph.provenance["parameters"],
        "bytes": graph.weights.stored_bytes(graph.weight_names()),
        "cache_bytes_per_token": graph.signature.cache_bytes_per_token,
        "inputs": [port.name for port in graph.signature.inputs],
        "sites": sites,
        "unrecognized": graph.unrecognized,
    }
    if not as_json:
        print_rows(("site", "shape", "scheme"), [[str(value) for value in site.values()] for site in sites])
        for item in graph.unrecognized:
            print(f"not recognised: {item['pattern']} at {item['node']}: {item['reason']}")
    return found


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Tell what this one consists of.")] = None,
    verbose: Verbose = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """List the recipes and what each target makes of them, or tell what one consists of."""
    if name is not None:
        found = api.describe_recipe(name)
        if not as_json:
            print_recipe(found)
        return found
    matrix = api.recipe_matrix()
    if not as_json:
        targets = list(next(iter(matrix.values())))
        print_rows(("recipe", *targets), [[name, *cells.values()] for name, cells in matrix.items()])
    return {"recipes": matrix}


@app.command()
def targets(verbose: Verbose = False, as_json: Json = False) -> dict[str, Any]:
    """List the targets, their options, and what would have to be installed here for them."""
    found = api.describe_targets()
    if not as_json:
        print_targets(found)
    return {"targets": found}
