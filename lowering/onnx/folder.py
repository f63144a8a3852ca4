"""The files beside the model: tokenizer, configuration, and ONNX Runtime GenAI's ``genai_config.json``."""

import json
from pathlib import Path
from typing import Any

from qcompiler.errors import InputError
from qcompiler.frontend import declared, declared_positions
from qcompiler.ir import Graph
from qcompiler.storage import read_companions

__all__ = ["companions", "generation_config", "usual_names"]

_USUAL = {"ids": "input_ids", "mask": "attention_mask", "positions": "position_ids", "logits": "logits"}


def companions(source: Path | None, config: dict[str, Any] | None) -> dict[str, bytes]:
    """What the source directory has of tokenizer and configuration files, by name; ``config`` where it has none.

    Raises:
        InputError: if one cannot be read.
    """
    found = read_companions(source)
    if "config.json" not in found and config is not None:
        found["config.json"] = json.dumps(config, indent=2, default=str).encode() + b"\n"
    return found


def generation_config(
    graph: Graph, files: dict[str, bytes], *, shares_buffer: bool = False, provider: str | None = None
) -> tuple[dict[str, Any] | None, list[str]]:
    """``genai_config.json`` for a decoder with a cache, if everything it states is known.

    Source: the configuration reference of ONNX Runtime GenAI; ports are named in `qcompiler.ir.signature`.

    Args:
        graph: what is lowered.
        files: its `companions`.
        shares_buffer: whether attention itself keeps caches, and writes to them in place.
        provider: what it is run by, such as ``cuda``; None: the CPU.

    Returns:
        The object, or None and the names of the facts that are missing (none for a model that is no decoder).

    Raises:
        InputError: if ``generation_config.json`` is no JSON object.
    """
    signature = graph.signature
    if not signature.has_cache or signature.index_of_output("logits") is None or signature.input("mask") is None:
        return None, []
    config: dict[str, Any] = graph.provenance.get("config") or {}
    generation = _generation_settings(files)
    past = [port for port in signature.inputs if port.role == "past"]
    cache = past[0].shape
    (vocabulary,) = (port.shape[-1] for port in signature.outputs if port.role == "logits")

    def first(*names: str) -> Any:
        own = (source.get(name) for name in names for source in (generation, config))
        return next((value for value in own if value is not None), declared(config, *names))

    context = declared_positions(config)
    end = first("eos_token_id")
    facts = {
        "type": declared(config, "model_type"),
        "context_length": context,
        "eos_token_id": end,
        "bos_token_id": first("bos_token_id"),
        "hidden_size": declared(config, "hidden_size", "n_embd"),
        "num_attention_heads": declared(config, "num_attention_heads", "n_head"),
    }
    missing = [name for name, value in facts.items() if value is None]
    if signature.has_quantized_cache and not shares_buffer:
        missing.append("how scales of a quantized cache are passed on")
    if any(port.shape != cache for port in past):
        missing.append("one cache shape for all layers")
    if usual_names(graph):
        missing.append("how ports of other names are passed on")
    if missing:
        return None, missing
    padding = first("pad_token_id")
    if padding is None:
        padding = end[0] if isinstance(end, list) else end
    inputs = {port.name: port.name for port in signature.inputs if port.role in ("ids", "mask", "positions")}
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [{provider: {}}] if provider else []},
        "filename": "model.onnx",
        "head_size": cache[3],
        "hidden_size": facts["hidden_size"],
        "num_attention_heads": facts["num_attention_heads"],
        "num_key_value_heads": cache[1],
        "num_hidden_layers": len({port.layer for port in past}),
        "inputs": inputs | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    search = {
        "do_sample": bool(generation.get("do_sample", False)),
        "early_stopping": True,
        "max_length": context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": shares_buffer,
        "repetition_penalty": generation.get("repetition_penalty", 1.0),
        "temperature": generation.get("temperature", 1.0),
        "top_k": generation.get("top_k", 50),
        "top_p": generation.get("top_p", 1.0),
        "length_penalty": 1.0,
        "diversity_penalty": 0.0,
        "no_repeat_ngram_size": 0,
    }
    model = {
        "type": facts["type"],
        "vocab_size": vocabulary,
        "context_length": context,
        "bos_token_id": facts["bos_token_id"],
        "eos_token_id": end,
        "pad_token_id": padding,
        "decoder": decoder,
    }
    return {"model": model, "search": search}, []


def _generation_settings(files: dict[str, bytes]) -> dict[str, Any]:
    try:
        found = json.loads(files.get("generation_config.json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise InputError("not a JSON object", where="generation_config.json", got=error) from error
    if not isinstance(found, dict):
        raise InputError("not a JSON object", where="generation_config.json", got=type(found).__name__)
    return found


def usual_names(graph: Graph) -> dict[str, str]:
    """By name: what ports of a token model would be called, where they are called otherwise."""
    found = {}
    if graph.signature.input("ids") is None:
        return {}
    for port in (*graph.signature.inputs, *graph.signature.outputs):
        usual = _USUAL.get(port.role)
        if port.role in ("past", "present") and port.layer is not None:
            usual = f"{'past_key_values' if port.role == 'past' else 'present'}.{port.layer}.{port.part}"
        elif port.role == "other" and port in graph.signature.inputs:
            usual = "token_type_ids"
        if usual is not None and usual != port.name:
            found[port.name] = usual
    return found
