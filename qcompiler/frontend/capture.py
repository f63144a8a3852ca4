"""A Hugging Face directory or an `nn.Module` becomes a `Graph`: traced without memory, weights left where they are."""

import contextlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from qcompiler.errors import InputError, UnsupportedModelError
from qcompiler.frontend.canonicalization import canonicalize
from qcompiler.frontend.checkpoints import place_layers
from qcompiler.frontend.directories import Opened, bound_checkpoint
from qcompiler.frontend.exporting import (
    Exported,
    export,
    first_line,
    untraceable,
)
from qcompiler.frontend.leftovers import unread_parameters, unused_tensors
from qcompiler.frontend.onnx_files import capture_onnx, find_onnx
from qcompiler.frontend.skeleton import (
    copy_for_tracing,
    quiet_transformers,
    tied_names,
)
from qcompiler.ir import (
    BATCH,
    PAST,
    SEQUENCE,
    TOTAL,
    Dim,
    Graph,
    Port,
    Role,
    Signature,
    symbolic_size,
)
from qcompiler.storage import SOURCE_ONLY, WeightStore

__all__ = ["capture_checkpoint", "capture_directory", "capture_module"]

_EXAMPLE = {BATCH: 2, SEQUENCE: 3, PAST: 5, TOTAL: 8}
_FREE = torch.export.Dim.DYNAMIC


def capture_directory(path: str | Path, *, trust_remote_code: bool = False) -> Graph:
    """Captures the model of a Hugging Face directory, without canonicalizing it. No weight is read.

    Args:
        path: a directory with ``config.json`` and safetensors; of a quantized checkpoint, float weights are computed
            from its codes when they are read.
        trust_remote_code: run modelling code the directory brings along.

    Raises:
        InputError: no such directory, or a missing or broken ``config.json``.
        WeightError: a damaged checkpoint, or one that lacks a parameter of the model.
        UnsupportedModelError: a quantized checkpoint in a format that is not read, or a model that cannot be built or
            exported.
    """
    return _capture_opened(Path(path), bound_checkpoint(Path(path), trust_remote_code))


def capture_checkpoint(path: str | Path, *, trust_remote_code: bool = False) -> Graph:
    """As `capture_directory`, to a canonical graph; layers of a quantized checkpoint are quantized sites of it. The
    path may be that of an ONNX model, too.

    Their codes and scales are read when they are wanted, as the weights of a float checkpoint are.
    """
    if (file := find_onnx(path)) is not None:
        return capture_onnx(file)
    opened = bound_checkpoint(Path(path), trust_remote_code)
    graph = canonicalize(_capture_opened(Path(path), opened))
    graph.provenance["companions"] = str(opened.companions)
    if opened.quantized is not None:
        graph.provenance["checkpoint"] = opened.quantized.method
        place_layers(graph, opened.quantized, opened.binding.unused)
    return graph


def _capture_opened(directory: Path, opened: Opened) -> Graph:
    graph = _capture_transformers(opened.model, opened.binding.weights)
    config = {key: value for key, value in opened.config.items() if key not in SOURCE_ONLY}
    graph.provenance.update(source=str(directory), config=config, fingerprint=opened.fingerprint)
    if (lost := unused_tensors(opened.binding.unused, opened.store, opened.model)) is not None:
        graph.lost.append(lost)
    graph.notes += [
        f"{first} and {second} are one tensor by config.json, but stored with different values: each is kept, as "
        "transformers keeps it"
        for first, second in opened.binding.untied
    ]
    return graph


def capture_module(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Graph:
    """Captures a module that lives in memory; its weights are shared, not copied.

    Args:
        model: any module; captured as in evaluation mode, and left as it is. A transformers model needs no example and
            gets the same ports as from a directory.
        example_inputs: positional tensor inputs.
        dynamic_shapes: as `torch.export.export` takes them; by default the first axis of every input varies where the
            model allows it.

    Raises:
        InputError: no example inputs for a plain module, or others than tensors.
        UnsupportedModelError: the module cannot be exported.
    """
    tensors = {name: t.detach() for name, t in model.named_parameters(remove_duplicate=False)}
    tensors |= {name: t.detach() for name, t in model.named_buffers(remove_duplicate=False)}
    store = WeightStore.from_tensors(tensors)
    config: Any = None
    if example_inputs is not None:
        graph = _capture_plain(model, example_inputs, dynamic_shapes, store)
    elif hasattr(model, "config") and hasattr(model, "can_generate"):
        graph = _capture_transformers(copy_for_tracing(model, "meta"), store)
        config = model.config.to_dict()  # type: ignore[operator, union-attr]
    else:
        raise InputError(
            "a plain module is captured with example inputs",
            where=type(model).__name__,
            remedy="qc.capture(model, (x,))",
        )
    graph.provenance.update(source=type(model).__name__, config=config, fingerprint=store.fingerprint(), in_memory=True)
    return graph


# --- transformers models ----------------------------------------------------------------------------------------------


class _Flat(nn.Module):
    """A transformers model whose inputs and outputs are flat tuples of tensors."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str) -> None:
        super().__init__()
        self.model = model
        self._names, self._output = names, output

    def forward(self, inputs: tuple[Tensor, ...], past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        arguments: dict[str, Any] = dict(zip(self._names, inputs, strict=True))
        if past:
            arguments.update(past_key_values=_filled_cache(past), use_cache=True)
        result = self.model(**arguments, return_dict=True)
        present = [t for layer in result.past_key_values.layers for t in (layer.keys, layer.values)] if past else []
        return (getattr(result, self._output), *present)


def _filled_cache(past: tuple[Tensor, ...]) -> Any:
    """A cache that holds these keys and values: as if they had been appended to empty ones, without tracing that."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _capture_transformers(model: nn.Module, store: WeightStore) -> Graph:
    name = type(model).__name__
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError("encoder-decoder models are not captured", where=name)
    parameters = inspect.signature(model.forward).parameters
    with torch.no_grad(), quiet_transformers():
        _choose_implementations(model)
        example = _run_on_example(model, parameters, name)
    output = next((field for field in ("logits", "last_hidden_state") if hasattr(example, field)), None)
    if output is None:
        raise UnsupportedModelError("the model returns neither logits nor hidden states", where=name)
    past = _cache_ports(example, name)
    has_types = bool(getattr(config, "type_vocab_size", 0))  # else what is asked for is read as tokens, and 0 is one
    inputs = _input_ports(parameters, has_cache=bool(past), has_types=has_types)
    sizes = {_EXAMPLE[BATCH]: BATCH, _EXAMPLE[SEQUENCE]: SEQUENCE}
    *leading, width = getattr(example, output).shape
    shape = (*(sizes.get(size, size) for size in leading), width)
    result = Port(output, _role(model, output, shape), "float32", shape)
    present = tuple(
        Port(f"present.{p.layer}.{p.part}", "present", p.dtype, (BATCH, p.shape[1], TOTAL, p.shape[3]), p.layer, p.part)
        for p in past
    )
    with quiet_transformers():
        exported = export(
            _Flat(model, tuple(port.name for port in inputs), output),
            (tuple(_example(port) for port in inputs), tuple(_example(port) for port in past)),
            (tuple({0: _FREE, 1: _FREE} for _ in inputs), tuple({0: _FREE, 2: _FREE} for _ in past)),
            name,
        )
    return _graph(exported, Signature((*inputs, *past), (result, *present)), store, model, strip="model.")


def _run_on_example(model: nn.Module, parameters: Mapping[str, Any], name: str) -> Any:
    """What the model returns for token ids alone, on tensors without values; nothing stays behind in the model.

    Raises:
        UnsupportedModelError: if it takes no token ids, or wants more than them.
    """
    wanted = [key for key, one in parameters.items() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    if wanted and "input_ids" not in wanted:  # one that names nothing hands all on
        raise UnsupportedModelError(
            "this model takes no token ids",
            where=name,
            got=f"inputs {', '.join(wanted[:4])}",
            expected="a language model, which takes input_ids",
            remedy="capture it as a module, with example inputs: qc.capture(model, (x,)); or name its language model",
        )
    attributes = {module: dict(module.__dict__) for module in model.modules()}
    options = {"use_cache": True} if "use_cache" in parameters else {}
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):  # fake tensors tell models that look at values not to
            ids = torch.empty((_EXAMPLE[BATCH], _EXAMPLE[SEQUENCE]), dtype=torch.int64, device="meta")
            return model(input_ids=ids, return_dict=True, **options)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise untraceable(name, error) from error
    except Exception as error:  # a model's own code can fail in any way
        raise UnsupportedModelError(
            "this model does not run on token ids alone",
            where=name,
            got=first_line(error),
            expected=f"that of its inputs ({', '.join(wanted[:4])}, ...) input_ids are enough",
            remedy="compile its language model, or capture it as a module with example inputs: qc.capture(model, (x,))",
        ) from error
    finally:
        for module, before in attributes.items():  # what it kept for the next call has no values
            module.__dict__.clear()
            module.__dict__.update(before)


def _role(model: Any, output: str, shape: tuple[Dim, ...]) -> Role:
    """What an output is for: transformers calls the scores of a classifier logits, too."""
    if output != "logits":
        return "other"
    head_of = getattr(model, "get_output_embeddings", None)
    is_head = head_of is None or head_of() is not None or shape[-1] == model.config.get_text_config().vocab_size
    return "logits" if is_head and shape[:-1] == (BATCH, SEQUENCE) else "scores"


def _choose_implementations(model: Any) -> None:
    """Attention as one operator, and experts as products with selected weights, where the model lets itself be told."""
    for setter, choice in (("set_attn_implementation", "sdpa"), ("set_experts_implementation", "batched_mm")):
        with contextlib.suppress(ValueError, AttributeError):  # a model without that implementation keeps its own
            getattr(model, setter)(choice)


def _input_ports(parameters: Any, *, has_cache: bool, has_types: bool) -> tuple[Port, ...]:
    """What the model takes besides the cache, of what we know how to feed."""
    shape: tuple[Dim, ...] = (BATCH, SEQUENCE)
    ports = [Port("input_ids", "ids", "int64", shape)]
    if "attention_mask" in parameters:
        ports.append(Port("attention_mask", "mask", "int64", (BATCH, TOTAL if has_cache else SEQUENCE)))
    if "position_ids" in parameters and has_cache:
        ports.append(Port("position_ids", "positions", "int64", shape))
    if "token_type_ids" in parameters and has_types and not has_cache:
        ports.append(Port("token_type_ids", "other", "int64", shape))
    return tuple(ports)


def _cache_ports(example: Any, name: str) -> tuple[Port, ...]:
    """One port per layer and part of the cache the model returned; none if it has no cache."""
    cache, state = getattr(example, "past_key_values", None), getattr(example, "cache_params", None)
    if state is not None and state is not cache:  # from transformers 5.24 on, these are two names of one thing
        raise UnsupportedModelError("a recurrent state is not captured", where=name, expected="a key-value cache")
    if cache is None:
        return ()
    ports = []
    for layer, entry in enumerate(cache.layers):
        for part in ("key", "value"):
            tensor = getattr(entry, f"{part}s", None)
            if tensor is None or tensor.dim() != 4:
                raise UnsupportedModelError(
                    "this kind of cache is not captured",
                    where=f"{name}, layer {layer}",
                    got=type(entry).__name__,
                    expected="keys and values [batch, heads, length, width]",
                )
            shape = (BATCH, tensor.shape[1], PAST, tensor.shape[3])
            ports.append(Port(f"past_key_values.{layer}.{part}", "past", "float32", shape, layer, part))
    return tuple(ports)


def _example(port: Port) -> Tensor:
    sizes = [_EXAMPLE[dim] if isinstance(dim, str) else dim for dim in port.shape]
    return torch.empty(sizes, dtype=getattr(torch, port.dtype), device="meta")


# --- plain modules ----------------------------------------------------------------------------------------------------


def _capture_plain(model: nn.Module, example_inputs: Any, dynamic_shapes: Any, store: WeightStore) -> Graph:
    if not isinstance(example_inputs, tuple) or not all(isinstance(value, Tensor) for value in example_inputs):
        raise InputError(
            "example inputs are a tuple of tensors",
            got=[type(value).__name__ for value in example_inputs]
            if isinstance(example_inputs, tuple)
            else type(example_inputs).__name__,
        )
    inputs = [v.detach().to("cpu", torch.float32 if v.is_floating_point() else v.dtype) for v in example_inputs]
    skeleton, name = copy_for_tracing(model), type(model).__name__
    if dynamic_shapes is None:
        # a batch of one would be taken for a constant
        inputs = [v.repeat_interleave(2, dim=0) if v.dim() and v.shape[0] == 1 else v for v in inputs]
        axes = tuple({0: torch.export.Dim.AUTO} if v.dim() else None for v in inputs)
        exported, strip = export(_Positional(skeleton), (tuple(inputs),), (axes,), name), "model."
    else:
        exported, strip = export(skeleton, tuple(inputs), dynamic_shapes, name), ""
    symbols: dict[str, Dim] = {}
    input_ports = []
    for index, value in enumerate(exported.inputs):
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and str(size) not in symbols:
                is_batch = axis == 0 and BATCH not in symbols.values()
                symbols[str(size)] = BATCH if is_batch else f"dim_{len(symbols)}"
        input_ports.append(_plain_port(f"input_{index}", value, symbols))
    output_ports = [_plain_port(f"output_{i}", value, symbols) for i, value in enumerate(exported.outputs)]
    return _graph(exported, Signature(tuple(input_ports), tuple(output_ports)), store, skeleton, strip=strip)


class _Positional(nn.Module):
    """A module whose inputs are one tuple, whatever their number and names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: tuple[Tensor, ...]) -> Any:
        return self.model(*inputs)


def _plain_port(name: str, value: Tensor, symbols: dict[str, Dim]) -> Port:
    dtype = str(value.dtype).removeprefix("torch.")
    return Port(name, "other", dtype, tuple(symbolic_size(size, symbols) for size in value.shape))


def _graph(exported: Exported, signature: Signature, store: WeightStore, model: nn.Module, *, strip: str) -> Graph:
    names, limits = tied_names(model), exported.limits(exported.symbols(signature))
    graph = Graph(exported.to_fx(signature, store, names, strip), signature, store, provenance={"limits": limits})
    read = set(graph.weight_names())
    taking_part = {name: not read.isdisjoint(names[name]) for name, _ in model.named_parameters()}
    graph.provenance["parameters"] = sum(p.numel() for name, p in model.named_parameters() if taking_part[name])
    unread = [name for name, takes_part in taking_part.items() if not takes_part]
    if (lost := unread_parameters(unread, (name for name in taking_part if taking_part[name]), store)) is not None:
        graph.lost.append(lost)
    return graph
