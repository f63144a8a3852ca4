"""The ``qcompiler`` command."""

import contextlib
import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qcompiler import api
from qcompiler.calibration import Calibration
from qcompiler.errors import InputError, QCompilerError, RecipeError, TargetError, VerificationError
from qcompiler.report import peak_rss_bytes
from qcompiler.terminal import print_rows, print_table, show_progress

__all__ = ["app", "main"]

SCHEMA = 1
_EXIT_BUG, _EXIT_ERROR, _EXIT_VERIFICATION, _EXIT_INTERRUPTED = 1, 2, 3, 130
# Typer raises click's usage errors or, in later versions, those of a copy of click it brings along: in either, the base
# of the one it exports.
_UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Compiles language models to low-bit ones, and measures them."
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Engine = Annotated[
    str | None, typer.Option(help="kernels: run a native artifact by fused low-bit operators, not by the reference.")
]
Place = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or auto; by default auto with kernels, and cpu without.")
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code the model directory brings along.")
]


@app.command()
def compile(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory with safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new directory.")],
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", "-r", help="A name (see `qcompiler recipes`), FILE.toml, or FILE.py:NAME, which is run."
        ),
    ],
    calib: Annotated[Path | None, typer.Option(help="A UTF-8 text to calibrate with.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens in each.")] = 512,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="PATTERN=SCHEME for sites, such as 'lm_head=w8a16' or '*.0.*=none'."),
    ] = None,
    to: Annotated[list[str] | None, typer.Option(help="A target, such as onnx or onnx:opset=23,float=float16.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what the output directory holds.")] = False,
    memory_budget: Annotated[
        str | None, typer.Option(help="For calibration values, such as 4GB; more goes to disk.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="The only source of randomness.")] = 0,
    strict: Annotated[bool, typer.Option(help="A site left alone unasked is an error.")] = False,
    work_dir: Annotated[Path | None, typer.Option(help="Where temporary files go.")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Quantize MODEL and write it to OUTPUT/native, and to OUTPUT/<target> for every --to."""
    started = time.perf_counter()
    targets = _targets(to or [])
    overrides = _overrides(override or [])
    budget = None if memory_budget is None else _bytes(memory_budget)
    calibration = None if calib is None else Calibration.from_text(calib, samples=samples, length=length, seed=seed)
    if calibration is None and (samples, length) != (64, 512):
        calibration = Calibration.self_generated(samples=samples, length=length, seed=seed)
    _refuse_to_replace(output, model)
    with _staged_directory(output, overwrite) as staged, show_progress(as_json) as progress:
        result = api.compile(
            model,
            recipe,
            calibration,
            targets=[api.target_spec(name, opset=options.get("opset")) for name, options in targets],
            overrides=overrides,
            memory_budget=budget,
            device=device,
            seed=seed,
            strict=strict,
            work_dir=work_dir,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
        for name, options in targets:
            written = api.lower(result, name, staged / name, **options)
            written["path"] = str(output / name)
        result.report.peak_rss_bytes = peak_rss_bytes()
        result.save(staged / "native")
    report = result.report
    fields = report.to_dict()
    summary = {
        "artifacts": {name: str(output / name) for name in ("native", *(name for name, _ in targets))},
        "seconds": time.perf_counter() - started,
        **{key: fields[key] for key in ("peak_rss_bytes", "bytes_before", "bytes_after", "bits_per_weight")},
        **{key: fields[key] for key in ("cache_bytes_per_token", "held_out")},
        **{key: fields[key] for key in ("skipped", "sites", "notes")},
    }
    if not as_json:
        _print_compiled(summary)
    return summary


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
    engine: Engine = None,
    device: Place = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Measure perplexity, and the distance to the original model."""
    opened = api.open_artifact(artifact, engine=engine, device=device, trust_remote_code=trust_remote_code)
    reference = None if against is None else api.open_artifact(against, trust_remote_code=trust_remote_code)
    with show_progress(as_json) as progress:
        found: dict[str, Any] = api.evaluate(
            opened,
            text=text,
            against=reference,
            cached=cached,
            max_tokens=max_tokens,
            progress=lambda done, total: progress(done, total, "windows"),
        ).to_dict()
    found["engine"] = None if engine is None else _engine(opened)
    if not as_json:
        shown = found if engine is None else {**found, "engine": _in_short(found["engine"])}
        print_table({key: value for key, value in shown.items() if value is not None})
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
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> dict[str, Any]:
    """Continue a prompt."""
    opened = api.open_artifact(artifact, exact=False, engine=engine, device=device, trust_remote_code=trust_remote_code)
    result = api.generate(
        opened, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    if not as_json:
        print(prompt + result.text)
    return {**result.to_dict(), "engine": None if engine is None else _engine(opened)}


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="A Hugging Face directory, or a native artifact.")],
    trust_remote_code: Trust = False,
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
def recipes(as_json: Json = False) -> dict[str, Any]:
    """List the recipes, and what each target makes of them."""
    matrix = api.recipe_matrix()
    if not as_json:
        targets = list(next(iter(matrix.values())))
        print_rows(("recipe", *targets), [[name, *cells.values()] for name, cells in matrix.items()])
    return {"recipes": matrix}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status.

    0: done. 1: a fault of ours. 2: an error of the `QCompilerError` family, or of usage. 3: a verification failed. 130:
    interrupted. With ``--json``, exactly one object goes to stdout in each case.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    as_json = "--json" in arguments
    command = next((item for item in arguments if not item.startswith("-")), "")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        # Nothing that a recipe's own code prints may stand beside the one object.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result = app(arguments, standalone_mode=False)
        if result == _EXIT_INTERRUPTED:  # Typer's answer to a KeyboardInterrupt
            raise KeyboardInterrupt
        if as_json and isinstance(result, dict):
            _emit({"schema": SCHEMA, "command": command, "ok": True, "result": result})
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail(command, as_json, {"type": "Interrupted", "what": "interrupted"}, "interrupted", _EXIT_INTERRUPTED)
    except QCompilerError as error:
        status = _EXIT_VERIFICATION if isinstance(error, VerificationError) else _EXIT_ERROR
        return _fail(command, as_json, error.to_dict(), f"error: {error}", status)
    except _UsageError as error:
        return _fail(command, as_json, {"type": "Usage", "what": error.format_message()}, None, _EXIT_ERROR, error.show)
    except BrokenPipeError:
        return _EXIT_BUG
    except Exception as error:  # the boundary of the program: a fault of ours is reported as one
        traceback.print_exc(file=sys.stderr)
        fields = {"type": type(error).__name__, "what": str(error)}
        return _fail(command, as_json, fields, "this is a fault of qcompiler; please report it", _EXIT_BUG)


def _fail(
    command: str,
    as_json: bool,
    fields: dict[str, Any],
    message: str | None,
    status: int,
    show: Callable[[], None] | None = None,
) -> int:
    if as_json:
        empty = dict.fromkeys(("type", "what", "where", "got", "expected", "remedy"))
        _emit({"schema": SCHEMA, "command": command, "ok": False, "error": {**empty, **fields}})
    if show is not None:
        show()
    elif message is not None:
        print(message, file=sys.stderr)
    return status


def _emit(content: dict[str, Any]) -> None:
    print(json.dumps(content, allow_nan=False, default=str), flush=True)


# --- options ---------------------------------------------------------------------------------------------------------


def _overrides(texts: Sequence[str]) -> dict[str, str | None]:
    """In the order given, so that the last match wins; a repeated pattern counts where it stands last."""
    found: dict[str, str | None] = {}
    for pattern, scheme in map(_override, texts):
        if pattern in found and found.pop(pattern) != scheme:
            raise RecipeError(
                "two overrides of one pattern", got=", ".join(t for t in texts if t.startswith(f"{pattern}="))
            )
        found[pattern] = scheme
    return found


def _override(text: str) -> tuple[str, str | None]:
    pattern, equals, scheme = text.partition("=")
    if not equals or not pattern:
        raise RecipeError("an override is PATTERN=SCHEME", got=text, expected="such as 'lm_head=w8a16' or '*.0.*=none'")
    return pattern, None if scheme.lower() in ("none", "float", "") else scheme


def _targets(texts: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    found = [_target(text) for text in texts]
    names = [name for name, _ in found]
    if len(set(names)) < len(names):
        raise TargetError("a target is named twice", got=", ".join(names), expected="each at most once")
    return found


def _target(text: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = text.partition(":")
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key == "opset" and value.isdecimal():
            options["opset"] = int(value)
        elif key == "float" and value in ("float32", "float16"):
            options["float_dtype"] = value
        else:
            raise TargetError(
                "unknown option of a target", where=name, got=item, expected="opset=<number>, float=float32 or float16"
            )
    api.target_spec(name, opset=options.get("opset"))
    if name == "kernels":
        raise TargetError(
            "kernels are not written anywhere",
            got=text,
            expected="a target with files",
            remedy="run the native artifact with --engine kernels",
        )
    return name, options


def _engine(artifact: Any) -> dict[str, Any]:
    """Where kernels ran, and what for want of one did not."""
    report = artifact.report
    sites = Counter(site["implementation"] for site in report["sites"])
    found = {key: report[key] for key in ("device", "dtype", "fused_norms", "caches")}
    reasons = {site["site"]: site["reason"] for site in report["sites"] if site["implementation"] == "reference"}
    return {**found, "sites": dict(sites), "references": reasons}


def _in_short(engine: dict[str, Any]) -> str:
    layers = ", ".join(f"{count} {implementation}" for implementation, count in engine["sites"].items())
    return f"kernels on {engine['device']} in {engine['dtype']}; layers: {layers}"


def _bytes(text: str) -> int:
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number, unit = text.upper().removesuffix("B").removesuffix("I"), ""
    if number and number[-1] in "KMGT":
        number, unit = number[:-1], number[-1]
    try:
        value = int(float(number) * units[unit])
    except (ValueError, OverflowError):
        value = -1
    if value < 0:
        raise InputError("not an amount of memory", got=text, expected="such as 500MB or 4GB")
    return value


def _refuse_to_replace(output: Path, model: Path) -> None:
    """Stops before an overwritten output takes the model with it."""
    if model.resolve().is_relative_to(output.resolve()):
        raise InputError("the output would replace the model", where=output, remedy="choose another directory")


@contextlib.contextmanager
def _staged_directory(output: Path, overwrite: bool) -> Iterator[Path]:
    """A directory that becomes ``output`` when all went well, and vanishes otherwise."""
    if output.exists() and not output.is_dir():
        raise InputError("the output is a file", where=output, remedy="choose another directory")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise InputError(
            "the output exists and is not empty", where=output, remedy="choose another directory, or add --overwrite"
        )
    staged = output.parent / f".{output.name}.{os.getpid()}.partial"
    with _write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
    replaced = output.parent / f".{output.name}.{os.getpid()}.replaced"
    try:
        yield staged
        with _write_errors(output):
            if output.exists():
                os.replace(output, replaced)
            os.replace(staged, output)
    finally:
        if replaced.exists() and not output.exists():
            os.replace(replaced, output)
        shutil.rmtree(staged, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _write_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError("the output cannot be written", where=output, got=os.strerror(error.errno or 0)) from error


_MOST_SKIPS = 8  # lines on the terminal


def _print_compiled(summary: dict[str, Any]) -> None:
    before, after = summary["bytes_before"], summary["bytes_after"]
    print_table(
        {
            "size": f"{before / 2**20:.1f} → {after / 2**20:.1f} MiB",
            "bits per weight": f"{summary['bits_per_weight']:.2f}",
            "sites rewritten": len({site["site"] for site in summary["sites"]}),
            "sites left alone": len({skip["site"] for skip in summary["skipped"]}),
            "seconds": f"{summary['seconds']:.1f}",
            "peak memory": f"{summary['peak_rss_bytes'] / 2**20:,.0f} MiB",
            **_held_out_row(summary["held_out"]),
            **{f"written: {name}": path for name, path in summary["artifacts"].items()},
        }
    )
    skipped = summary["skipped"]
    for skip in skipped if len(skipped) <= _MOST_SKIPS else skipped[: _MOST_SKIPS - 1]:
        print(f"left alone: {skip['site']}: {skip['reason']}")
    if len(skipped) > _MOST_SKIPS:
        print(
            f"left alone: {len(skipped) - _MOST_SKIPS + 1} more, listed in {summary['artifacts']['native']}/report.html"
        )
    for note in summary["notes"]:
        print(f"note: {note}")


def _held_out_row(found: dict[str, Any] | None) -> dict[str, str]:
    if found is None:
        return {}
    return {f"KL to original, {found['tokens']} held-out tokens": f"{found['kl_divergence']:.4f} nats per token"}


if __name__ == "__main__":
    sys.exit(main())
