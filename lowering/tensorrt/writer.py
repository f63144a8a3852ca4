"""Writes a graph as a TensorRT folder: the ONNX, an engine for each GPU asked for, and what the builder made of it."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qcompiler.errors import MissingDependencyError, TargetError, VerificationError
from qcompiler.frontend import declared_positions
from qcompiler.ir import Graph, Port
from qcompiler.lowering.onnx.emitter import Emitter
from qcompiler.lowering.onnx.writer import MODEL_FILE, Emitted, companion_files, emit, store
from qcompiler.lowering.tensorrt.dialect import LEAST_KEYS, float8_attentions, has_float8_kernel, tensorrt_dialect
from qcompiler.lowering.tensorrt.dialect.activations import packed_ports
from qcompiler.lowering.tensorrt.dialect.floats4 import DOMAIN
from qcompiler.lowering.tensorrt.engine import (
    Api,
    Built,
    Placement,
    Profile,
    build_engine,
    command_lines,
    default_profiles,
    find_api,
    fused_attentions,
    fused_linears,
    how_to_build,
    parse_profiles,
    run_script,
)
from qcompiler.lowering.tensorrt.legality import CAPABILITIES
from qcompiler.lowering.tensorrt.legality import check as check_rules
from qcompiler.lowering.tensorrt.target import TensorRTTarget
from qcompiler.protocol import Progress, Support
from qcompiler.storage import StagedFiles

__all__ = ["LAYERS_FILE", "check", "profiles_of", "rounded_by_attention", "summary", "write"]

LAYERS_FILE = "layers.json"
_LONGEST = 4096
_RULES_OF = {90: 89}
"""A GPU that the rules were not seen on is held to those of one with the same number formats."""
_KERNEL_SUFFIX = re.compile(r"_myl\d+_\d+$")


def check(graph: Graph, target: TensorRTTarget) -> None:
    """Refuses what cannot be written or built, ahead of the weights.

    Raises:
        TargetError: for operators, compute capabilities or profiles.
        InputError: if a file that goes beside the model cannot be read.
    """
    companion_files(graph)
    if target.attention == "fp8" and not any(has_float8_kernel(node) for node in graph.fx.nodes):
        raise TargetError(
            "no attention of this model has a kernel in FP8",
            where="TensorRTTarget.attention",
            expected="several heads of up to 256 channels, a multiple of 8, and logits without a cap",
            remedy="leave attention=fp8 out",
        )
    _refuse(emit(graph, tensorrt_dialect(graph, target.float_dtype, target.attention)), target)
    profiles_of(graph, target)
    for capability in target.capabilities:
        _installed(capability)


def write(graph: Graph, directory: Path, target: TensorRTTarget, progress: Progress) -> dict[str, Any]:
    """Fills a directory, and reports as `qcompiler.lowering.tensorrt.TensorRTTarget` does.

    Raises:
        TargetError: if the builder fails.
        VerificationError: if ``strict``, for a layer that it fused nowhere.
        ResourceError: if the disk or the memory is full.
    """
    files = companion_files(graph)
    emitted = emit(graph, tensorrt_dialect(graph, target.float_dtype, target.attention))
    _refuse(emitted, target)
    profiles = profiles_of(graph, target, step=2 if emitted.emitter.floats_times_bytes else 1)
    builders = {capability: api for capability in target.capabilities if (api := _installed(capability)) is not None}
    for api in list(builders.values())[:1]:
        files["run.py"] = run_script(api.package, api.version).encode()
    store(emitted, directory, files)
    engines = {
        str(capability): build_engine(
            directory / MODEL_FILE,
            directory / f"engine-sm{capability}.plan",
            capability=capability,
            profiles=profiles,
            weight_streaming=target.weight_streaming,
            package=api.package,
            progress=progress,
        )
        for capability, api in builders.items()
    }
    return _report(graph, emitted, target, directory, profiles, engines)


def profiles_of(
    graph: Graph, target: TensorRTTarget, *, step: int = 1, ports: Sequence[Port] | None = None
) -> tuple[Profile, ...]:
    """The profiles asked for, or one to read prompts with and one to decode with (``step`` tokens at once).

    ``ports`` are those that caches of codes have in our dialect, unless given.

    Raises:
        TargetError: for a text that does not say any, or sizes that do not hold.
    """
    positions = declared_positions(graph.provenance.get("config"))
    ports = _ports(graph) if ports is None else ports
    if target.profiles is not None:
        return parse_profiles(target.profiles, ports, positions=positions)
    if target.length is not None and positions is not None and target.length > positions:
        raise TargetError(
            "the profiles are longer than the model's positions",
            where="length",
            got=target.length,
            expected=f"at most {positions}",
        )
    length = target.length or min(positions or _LONGEST, _LONGEST)
    if target.attention == "fp8":
        return default_profiles(ports, batch=target.batch, length=length, least=LEAST_KEYS)
    return default_profiles(ports, batch=target.batch, length=length, step=step)


def _ports(graph: Graph) -> list[Port]:
    """The inputs, as they are declared."""
    declared = packed_ports(graph)
    return [
        replace(port, shape=tuple(declared[port.name][1])) if port.name in declared else port
        for port in graph.signature.inputs
    ]


def _refuse(emitted: Emitted, target: TensorRTTarget) -> None:
    """Refuses what the parser or the builder would, by the rules that both were seen to follow."""
    asked = (_RULES_OF.get(capability, capability) for capability in target.capabilities)
    known = [capability for capability in dict.fromkeys(asked) if capability in CAPABILITIES]
    if not known:
        return
    refused = [found for found in check_rules(emitted.model, known).findings if found.verdict != "unfused"]
    if refused:
        first = refused[0]
        raise TargetError(
            "TensorRT does not take this model",
            where=first.node,
            got=first.found,
            expected=first.reason,
            remedy=first.remedy,
        )


def _installed(capability: int) -> Api | None:
    """The TensorRT that builds for a GPU; None where none is installed.

    Raises:
        TargetError: if those that are do not build for it.
    """
    try:
        return find_api(capability=capability)
    except MissingDependencyError:
        return None


# --- the report ------------------------------------------------------------------------------------------------------


def _report(
    graph: Graph,
    emitted: Emitted,
    target: TensorRTTarget,
    directory: Path,
    profiles: Sequence[Profile],
    engines: Mapping[str, Built],
) -> dict[str, Any]:
    emitter = emitted.emitter
    widths = {site.name: site.in_features for site in graph.sites()}
    sites = {}
    for site in emitter.products:
        scheme = graph.schemes.get(site)
        support = target.supports(scheme, widths[site]) if scheme is not None else Support("runs", "unknown scheme")
        sites[site] = {"status": support.status, "reason": support.reason}
    listed, summaries, findings = {}, {}, []
    for capability, built in engines.items():
        linears = fused_linears(built.layers, emitter.products)
        attentions = fused_attentions(built.layers, emitter.attentions, in_float8=target.attention == "fp8")
        found = _findings(linears, sites, profiles, capability) + _findings(attentions, {}, profiles, capability)
        findings += found
        told = {**built.to_dict(), "commands": _commands(built, profiles, target)}
        summaries[capability] = {**told, **summary(linears, attentions), "layers": len(built.layers)}
        listed[capability] = {
            **told,
            "linears": {site: [place.to_dict() for place in places] for site, places in linears.items()},
            "attentions": {name: [place.to_dict() for place in places] for name, places in attentions.items()},
            "layers": [layer.to_dict() for layer in built.layers],
        }
    if target.strict and findings:
        raise VerificationError(
            "the builder fused a quantized layer or an attention nowhere",
            where=findings[0]["where"],
            got=findings[0]["reason"],
            expected="a layer that multiplies codes, for each of them",
            remedy="leave strict out, and read the findings in the report",
        )
    document = {"profiles": [profile.to_dict() for profile in profiles], "findings": findings, "engines": listed}
    with StagedFiles(directory) as staged, staged.file(LAYERS_FILE) as append:
        append(json.dumps(document, indent=1).encode() + b"\n")
    files = sorted(entry.name for entry in directory.iterdir() if entry.is_file())
    return {
        "target": target.name,
        "path": str(directory),
        "opset": emitter.opset,
        "float_dtype": target.float_dtype,
        "attention": target.attention,
        "runs_in_onnxruntime": target.float_dtype != "bfloat16" and _has_kernels(emitter),
        "nodes": len(emitter.nodes),
        "bytes": sum((directory / name).stat().st_size for name in files),
        "weight_bytes": emitter.weight_bytes,
        "files": files,
        "sites": sites,
        "engines": summaries,
        "findings": findings,
        "notes": _notes(sites, findings, target, summaries),
    }


def _has_kernels(emitter: Emitter) -> bool:
    """Whether ONNX Runtime has kernels on a CPU: not for TensorRT's own operators, nor for 4-bit floats or bfloat16."""
    dtypes = {value.dtype for value in emitter.initializers.values() if value.dtype is not None}
    own = any(node.domain == DOMAIN for node in emitter.nodes)
    return not own and not any("FLOAT4" in dtype.name for dtype in dtypes)


def rounded_by_attention(graph: Graph, target: TensorRTTarget) -> list[str]:
    """Names of the nodes that attention in FP8 rounds and the graph does not: queries, and results of attentions."""
    found = float8_attentions(graph) if target.attention == "fp8" else []
    return [node.name for attention in found for node in (attention, *attention.all_input_nodes[:1])]


def _commands(built: Built, profiles: Sequence[Profile], target: TensorRTTarget) -> dict[str, str]:
    """The lines that build the same engine elsewhere."""
    streams = target.weight_streaming
    return command_lines(MODEL_FILE, built.plan.name, profiles, capability=built.capability, weight_streaming=streams)


def _findings(
    places: Mapping[str, Sequence[Placement]],
    sites: Mapping[str, Mapping[str, str]],
    profiles: Sequence[Profile],
    capability: str,
) -> list[dict[str, str]]:
    """What was to be fused and is not, under one of the profiles."""
    return [
        {
            "where": name,
            "engine": f"sm{capability}",
            "profile": profiles[place.profile].name if place.profile < len(profiles) else str(place.profile),
            "reason": place.reason,
        }
        for name, found in places.items()
        for place in found
        if not place.fused and sites.get(name, {}).get("status", "fused") == "fused"
    ]


def summary(
    linears: Mapping[str, Sequence[Placement]], attentions: Mapping[str, Sequence[Placement]]
) -> dict[str, Any]:
    """Counts of what an engine has: what is fused under every profile; for each profile, layers and kernels."""
    profiles = sorted({place.profile for found in (*linears.values(), *attentions.values()) for place in found})

    def share(places: Mapping[str, Sequence[Placement]]) -> str:
        return f"{sum(all(place.fused for place in found) for found in places.values())} of {len(places)}"

    def layers(places: Mapping[str, Sequence[Placement]], profile: int) -> set[str]:
        every = [place for found in places.values() for place in found if place.profile == profile]
        return {place.layer for place in every if place.fused and place.layer is not None}

    kernels = [{_KERNEL_SUFFIX.sub("", name).strip("_") for name in layers(attentions, p)} for p in profiles]
    return {
        "fused_linears": share(linears),
        "fused_attentions": share(attentions),
        "products": [str(len(layers(linears, profile))) for profile in profiles],
        "attention_kernels": ["+".join(sorted(names)) for names in kernels],
    }


def _notes(
    sites: Mapping[str, Mapping[str, str]],
    findings: Sequence[Mapping[str, str]],
    target: TensorRTTarget,
    engines: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Findings first, then what was built, then what was known ahead."""
    counts = Counter((found["engine"], found["profile"], found["reason"]) for found in findings)
    notes = [f"{count} not fused for {where}, {profile}: {why}" for (where, profile, why), count in counts.items()]
    for engine in engines.values():
        notes.append(
            f"{engine['plan']}: {engine['fused_linears']} quantized layers and {engine['fused_attentions']} attentions "
            f"fused, {engine['plan_bytes'] / 2**20:.1f} MiB, built in {engine['seconds']:.1f} s"
        )
    if not engines:
        notes += [
            f"no engine for SM {capability}: TensorRT is not installed; {how_to_build(capability)}"
            for capability in target.capabilities
        ]
    return notes + sorted({site["reason"] for site in sites.values() if site["reason"]})
