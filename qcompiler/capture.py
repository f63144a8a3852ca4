"""A Hugging Face directory or an `nn.Module` becomes a `Graph`: exported on meta tensors, weights left on disk."""

import contextlib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from qcompiler.errors import InputError, UnsupportedModelError, WeightError
from qcompiler.graph import Graph
from qcompiler.signature import BATCH, PAST, SEQUENCE, TOTAL, Dim, Port, Signature
from qcompiler.weights import WeightStore

__all__ = ["capture_directory", "capture_module"]

_EXAMPLE = {BATCH: 2, SEQUENCE: 3, PAST: 5}
_FREE = torch.export.Dim.DYNAMIC


def capture_directory(path: str | Path, *, trust_remote_code: bool = False) -> Graph:
    """Captures the model of a Hugging Face directory. No weight is read.

    Args:
        path: a directory with ``config.json`` and safetensors.
        trust_remote_code: run modelling code the directory brings along.

    Raises:
        InputError: no such directory, or a missing or broken ``config.json``.
        WeightError: a damaged checkpoint, or one that lacks a parameter of the model.
        UnsupportedModelError: the model cannot be built or exported.
    """
    directory = Path(path)
    config = read_config(directory)
    if "quantization_config" in config:
        raise UnsupportedModelError(
            "this checkpoint is quantized already",
            where=directory / "config.json",
            got=config["quantization_config"].get("quant_method"),
            expected="a float checkpoint",
            remedy="compile the original model",
        )
    store = WeightStore.from_directory(directory)
    model = _build_on_meta(directory, config, trust_remote_code)
    real_buffers = _to_meta(model)
    _bind_checkpoint(store, model, real_buffers)
    graph = _capture_transformers(model, store)
    graph.provenance.update(source=str(directory), config=config, fingerprint=store.fingerprint())
    return graph


def capture_module(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Graph:
    """Captures a module that lives in memory; its weights are shared, not copied.

    Args:
        model: any module. A transformers model needs no example and gets the same ports as from a directory.
        example_inputs: positional tensor inputs.
        dynamic_shapes: as `torch.export.export` takes them; by default the first axis of every input varies.

    Raises:
        InputError: no example inputs for a plain module.
        UnsupportedModelError: the module cannot be exported.
    """
    tensors = {name: t.detach() for name, t in model.named_parameters(remove_duplicate=False)}
    tensors |= {name: t.detach() for name, t in model.named_buffers(remove_duplicate=False)}
    store = WeightStore.from_tensors(tensors)
    skeleton = _skeleton(model)
    if example_inputs is None:
        if not hasattr(model, "config") or not hasattr(model, "can_generate"):
            raise InputError(
                "a plain module is captured with example inputs",
                where=type(model).__name__,
                remedy="qc.capture(model, (x,))",
            )
        graph = _capture_transformers(skeleton, store)
        graph.provenance.update(source=type(model).__name__, config=model.config.to_dict())
    else:
        graph = _capture_plain(skeleton, example_inputs, dynamic_shapes, store)
        graph.provenance.update(source=type(model).__name__, config=None)
    graph.provenance["fingerprint"] = store.fingerprint()
    return graph


def read_config(directory: Path) -> dict[str, Any]:
    """Reads ``config.json``.

    Raises:
        InputError: if the directory or the file is missing, or the file is not a JSON object.
    """
    if not directory.is_dir():
        raise InputError("no such model directory", where=directory, remedy="give the path of a Hugging Face directory")
    file = directory / "config.json"
    if not file.is_file():
        raise InputError("the model directory has no config.json", where=directory)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError("config.json is not valid JSON", where=file, got=error) from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError("config.json does not describe a model", where=file, expected="an object with a model_type")
    return config


# --- building without memory -------------------------------------------------------------------------------------------


class _EmptyOnMeta(TorchFunctionMode):
    """``torch.empty`` gives meta tensors, so parameters cost nothing while small computed buffers stay real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _build_on_meta(directory: Path, config: Mapping[str, Any], trust_remote_code: bool) -> nn.Module:
    import transformers

    with _quiet_transformers():
        try:
            settings = transformers.AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
            names = config.get("architectures") or []
            model_class = getattr(transformers, names[0], None) if names else None
            with _EmptyOnMeta():
                if model_class is not None:
                    model: nn.Module = model_class._from_config(
                        settings, dtype=torch.float32, attn_implementation="sdpa"
                    )
                else:
                    model = transformers.AutoModelForCausalLM.from_config(
                        settings,
                        dtype=torch.float32,
                        attn_implementation="sdpa",
                        trust_remote_code=trust_remote_code,
                    )
        except (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError) as error:
            raise UnsupportedModelError(
                "transformers cannot build this model from its config.json",
                where=directory / "config.json",
                got=f"{type(error).__name__}: {error}",
                expected="a model_type and fields that this version of transformers knows",
            ) from error
    return model.eval()


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of a module with meta tensors, sharing no storage; tied tensors stay tied."""
    import copy

    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta", torch.float32), requires_grad=False)
    for buffer in model.buffers():
        dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
        memo[id(buffer)] = buffer.detach().to("meta", dtype)
    return copy.deepcopy(model, memo).eval()


def _to_meta(model: nn.Module) -> dict[str, Tensor]:
    """Moves what is not on meta yet there, tied tensors staying tied; returns the buffers' real values."""
    buffers = {name: b for name, b in model.named_buffers(remove_duplicate=False) if b.device.type != "meta"}
    moved: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type != "meta":
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                module._parameters[name] = moved[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to("meta")
    return buffers


def _bind_checkpoint(store: WeightStore, model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Renames checkpoint tensors to the model's parameter names, adds computed buffers and drops what is not used."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        owners.setdefault(id(parameter), []).append(name)
    persistent = set(model.state_dict(keep_vars=True))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def in_checkpoint(name: str) -> str | None:
        candidates = [name, prefix + name, name.removeprefix(prefix)]
        candidates += [old for new in candidates for old in _older_spellings(new)]
        return next((c for c in candidates if c in store), None)

    missing = []
    bound: dict[str, str] = {}
    for names in owners.values():
        found = [(name, stored) for name in names if (stored := in_checkpoint(name)) is not None]
        if found:
            bound.update(found[:1])
        else:
            missing.append(names[0])
    if missing:
        raise WeightError(
            "the checkpoint lacks parameters of the model",
            got=f"{len(missing)} missing: {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}",
            expected="one tensor per parameter",
            remedy="check that config.json belongs to these weights",
        )
    values = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        stored = in_checkpoint(name) if name in persistent else None
        if stored is not None:
            bound[name] = stored
        elif name in buffers:
            values[name] = buffers[name]
        else:
            raise UnsupportedModelError("a computed buffer has no value", where=name, got=f"shape {tuple(buffer.shape)}")
    for name in set(store.names()) - set(bound.values()):
        store.remove(name)
    for name, stored in bound.items():
        if name != stored:
            store.rename(stored, name)
        expected = tuple((parameters[name] if name in parameters else model.get_buffer(name)).shape)
        if tuple(store.info(name).shape) != expected:
            raise WeightError(
                "a tensor's shape is not the one config.json implies",
                where=stored,
                got=tuple(store.info(name).shape),
                expected=expected,
                remedy="check that config.json belongs to these weights (vocab_size, hidden_size, ...)",
            )
    for name, value in values.items():
        store.set(name, value)
    for names in owners.values():
        (first,) = [name for name in names if name in bound]
        for name in names:
            if name != first:
                store.alias(name, first)


def _older_spellings(name: str) -> list[str]:
    """The TensorFlow-era names of a norm's parameters, which transformers still reads."""
    for new, old in ((".weight", ".gamma"), (".bias", ".beta")):
        if name.endswith(new):
            return [name.removesuffix(new) + old]
    return []


# --- export ------------------------------------------------------------------------------------------------------------


class _Decoder(nn.Module):
    """Wraps a transformers model so that inputs and outputs are flat tuples of tensors."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str, is_cached: bool) -> None:
        super().__init__()
        self.model = model
        self._names, self._output, self._is_cached = names, output, is_cached

    def forward(self, inputs: tuple[Tensor, ...], past: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        arguments: dict[str, Any] = dict(zip(self._names, inputs, strict=True))
        if self._is_cached:
            from transformers import DynamicCache

            cache = DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            arguments.update(past_key_values=cache, use_cache=True)
        result = self.model(**arguments, return_dict=True)
        present: tuple[Tensor, ...] = ()
        if self._is_cached:
            present = tuple(t for layer in result.past_key_values.layers for t in (layer.keys, layer.values))
        return (getattr(result, self._output), *present)


def _capture_transformers(model: nn.Module, store: WeightStore) -> Graph:
    parameters = inspect.signature(model.forward).parameters
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError("encoder-decoder models are not captured", where=type(model).__name__)
    is_cached = "past_key_values" in parameters and bool(model.can_generate())  # type: ignore[operator]
    ids = (BATCH, SEQUENCE)
    total: Dim = TOTAL if is_cached else SEQUENCE
    ports = [Port("input_ids", "ids", "int64", ids)]
    if "attention_mask" in parameters:
        ports.append(Port("attention_mask", "mask", "int64", (BATCH, total)))
    if "position_ids" in parameters and is_cached:
        ports.append(Port("position_ids", "positions", "int64", ids))
    if "token_type_ids" in parameters and not is_cached:
        ports.append(Port("token_type_ids", "other", "int64", ids))
    names = tuple(port.name for port in ports)

    def example(port: Port) -> Tensor:
        sizes = [_EXAMPLE[SEQUENCE] + _EXAMPLE[PAST] if d == TOTAL else _EXAMPLE.get(d, d) for d in port.shape]
        return torch.empty(sizes, dtype=getattr(torch, port.dtype), device="meta")  # type: ignore[arg-type]

    with torch.no_grad(), _quiet_transformers(), _exporting(type(model).__name__):
        probe_inputs = {
            port.name: torch.empty((2, 3), dtype=torch.int64, device="meta")
            for port in ports
            if port.name != "attention_mask"
        }
        if is_cached:
            probe_inputs["use_cache"] = True  # type: ignore[assignment]
        probe = model(**probe_inputs, return_dict=True)
    output = next((name for name in ("logits", "last_hidden_state") if hasattr(probe, name)), None)
    if output is None:
        raise UnsupportedModelError("the model returns neither logits nor hidden states", where=type(model).__name__)
    past: list[Port] = []
    if is_cached:
        for layer, entry in enumerate(probe.past_key_values.layers):
            for part, value in (("key", entry.keys), ("value", entry.values)):
                shape = (BATCH, value.shape[1], PAST, value.shape[3])
                past.append(
                    Port(f"past_key_values.{layer}.{part}", "past", "float32", shape, layer, part)  # type: ignore[arg-type]
                )
    present = [
        Port(p.name.replace("past_key_values", "present"), "present", p.dtype, (*p.shape[:2], TOTAL, p.shape[3]), p.layer, p.part)
        for p in past
    ]
    width = getattr(probe, output).shape[-1]
    result = Port(output, "logits" if output == "logits" else "other", "float32", (*ids, width))
    signature = Signature((*ports, *past), (result, *present))
    program = _export(
        _Decoder(model, names, output, is_cached),
        (tuple(example(p) for p in ports), tuple(example(p) for p in past)),
        (tuple({0: _FREE, 1: _FREE} for _ in ports), tuple({0: _FREE, 2: _FREE} for _ in past)),
        type(model).__name__,
    )
    return _to_graph(program, signature, store, model, strip="model.")


def _capture_plain(
    model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any, store: WeightStore
) -> Graph:
    if not all(isinstance(value, Tensor) for value in example_inputs):
        raise InputError(
            "example inputs are a tuple of tensors", got=[type(value).__name__ for value in example_inputs]
        )
    inputs = tuple(
        value.detach().to("meta", torch.float32 if value.is_floating_point() else value.dtype)
        for value in example_inputs
    )
    if dynamic_shapes is None:
        dynamic_shapes = tuple({0: _FREE} if value.dim() else None for value in inputs)
    program = _export(model, inputs, dynamic_shapes, type(model).__name__)
    symbols: dict[str, str] = {}
    input_ports = []
    user_inputs = [n for n in program.graph.nodes if n.op == "placeholder"][-len(inputs) :]
    for index, node in enumerate(user_inputs):
        shape: list[Dim] = []
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, int):
                shape.append(size)
            else:
                default = BATCH if axis == 0 and BATCH not in symbols.values() else f"dim_{len(symbols)}"
                shape.append(symbols.setdefault(str(size), default))
        input_ports.append(Port(f"input_{index}", "other", _name(node.meta["val"].dtype), tuple(shape)))
    outputs = [node for node in program.graph.output_node().args[0] if isinstance(node, fx.Node)]  # type: ignore[union-attr]
    output_ports = tuple(
        Port(
            f"output_{index}",
            "other",
            _name(node.meta["val"].dtype),
            tuple(s if isinstance(s, int) else _symbolic(s, symbols) for s in node.meta["val"].shape),
        )
        for index, node in enumerate(outputs)
    )
    return _to_graph(program, Signature(tuple(input_ports), output_ports), store, model, strip="")


@contextlib.contextmanager
def _exporting(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # export runs the model's own code, which may raise anything
        raise UnsupportedModelError(
            "the model cannot be exported as a graph",
            where=name,
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            remedy="control flow that depends on data, and values computed on meta tensors, cannot be traced",
        ) from error


def _export(model: nn.Module, args: tuple[Any, ...], shapes: Any, name: str) -> torch.export.ExportedProgram:
    with torch.no_grad(), _quiet_transformers(), _exporting(name):
        return torch.export.export(model, args, dynamic_shapes=shapes, strict=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _symbolic(size: Any, symbols: Mapping[str, str]) -> str:
    import sympy

    expression = size.node.expr if hasattr(size, "node") else size
    renamed = expression.subs({s: sympy.Symbol(symbols.get(str(s), str(s))) for s in expression.free_symbols})
    return str(renamed)


def _to_graph(
    program: torch.export.ExportedProgram, signature: Signature, store: WeightStore, model: nn.Module, *, strip: str
) -> Graph:
    """Rebuilds the exported graph with placeholders for ports only, ``get_attr`` for tensors, and our own metadata."""
    spec = program.graph_signature
    tensor_of = {**spec.inputs_to_parameters, **spec.inputs_to_buffers, **spec.inputs_to_lifted_tensor_constants}
    user_inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in set(spec.user_inputs)]
    ports = dict(zip((n.name for n in user_inputs), signature.inputs, strict=True))
    symbols: dict[str, str] = {}
    for node in user_inputs:  # plain symbols first; sums such as past + sequence are then named through them
        for size, dim in zip(node.meta["val"].shape, ports[node.name].shape, strict=True):
            if isinstance(dim, str) and not isinstance(size, int):
                symbols.setdefault(str(size), dim)
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    aliases = {name: names for names in tied.values() if len(names) > 1 for name in names}

    graph = fx.Graph()
    mapping: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name in ports:
                mapping[node] = graph.placeholder(node.name)
            else:
                name = tensor_of[node.name]
                if name in program.constants and name.removeprefix(strip) not in store:
                    _keep_constant(store, name, program.constants[name])
                mapping[node] = name if name in store else name.removeprefix(strip)
                continue  # a get_attr node is made at each use, under the name that fits the module
        elif node.op == "output":
            mapping[node] = graph.output(tuple(mapping[result] for result in node.args[0][: len(signature.outputs)]))
        else:
            for source in node.all_input_nodes:
                if isinstance(mapping[source], str):
                    mapping[source] = _use_tensor(graph, mapping[source], source, node, aliases, strip)
                elif mapping[source].op == "get_attr" and str(mapping[source].target) in aliases:
                    mapping[source] = _use_tensor(graph, str(mapping[source].target), source, node, aliases, strip)
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
            mapping[node].meta = {}
        if node.op != "output":
            _describe(mapping[node], node.meta.get("val"), symbols)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Graph(graph, signature, store, provenance={"parameters": parameters})


def _describe(node: fx.Node, value: Any, symbols: Mapping[str, str]) -> None:
    if isinstance(value, Tensor):
        node.meta["dtype"] = value.dtype
        node.meta["shape"] = tuple(s if isinstance(s, int) else _symbolic(s, symbols) for s in value.shape)


def _use_tensor(
    graph: fx.Graph, name: str, source: fx.Node, user: fx.Node, aliases: Mapping[str, list[str]], strip: str
) -> fx.Node:
    """A ``get_attr`` for one use of a tensor; a tied one goes by the name of the module that uses it."""
    for candidate in aliases.get(name, ()):
        module = candidate.rpartition(".")[0]
        stack = user.meta.get("nn_module_stack") or {}
        if any(path.removeprefix(strip) == module for path, _ in stack.values()):
            name = candidate
    node = graph.create_node("get_attr", name)
    node.meta.update(dtype=source.meta["val"].dtype, shape=tuple(source.meta["val"].shape))
    return node


def _keep_constant(store: WeightStore, name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or (value.device.type == "meta" and value.numel()):
        raise UnsupportedModelError(
            "the model creates a constant tensor while it runs, and its value is lost on meta tensors", where=name
        )
    store.set(name, torch.empty(value.shape, dtype=value.dtype) if value.device.type == "meta" else value)
