"""`torch.export` and what is made of its result: a plain fx graph over named tensors. `ExportedProgram` stays here."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from qcompiler.errors import QCompilerError, UnsupportedModelError
from qcompiler.ir import Dim, Signature, symbolic_size
from qcompiler.storage import WeightStore

__all__ = ["Exported", "export", "first_line", "untraceable"]

_aten = torch.ops.aten
_LONGEST_LIST = 64  # of numbers that are made into a tensor one by one


@dataclass(frozen=True)
class Exported:
    """An exported module.

    Attributes:
        program: as `torch.export` left it.
    """

    program: torch.export.ExportedProgram

    @property
    def inputs(self) -> list[Tensor]:
        """The fake tensors that went in, flattened in call order."""
        return [node.meta["val"] for node in self._input_nodes()]

    @property
    def outputs(self) -> list[Tensor]:
        """The fake tensors that came out.

        Raises:
            UnsupportedModelError: if something else came out, too.
        """
        return [node.meta["val"] for node in self._output_nodes()]

    def limits(self, dims: Mapping[str, Dim]) -> dict[str, int]:
        """The largest value of each size that the model's code allows, such as the length of a table of positions.

        Args:
            dims: symbols of the program → names.

        Raises:
            UnsupportedModelError: if the code would take another path for small sizes.
        """
        limits: dict[str, int] = {}
        for symbol, bounds in self.program.range_constraints.items():
            name = dims.get(str(symbol))
            if not isinstance(name, str) or not name.isidentifier():
                continue
            if bounds.lower > 2:  # that sizes are not 0 or 1 is assumed by export itself
                raise UnsupportedModelError(
                    "the model's code takes another path for small sizes",
                    where=name,
                    got=f"a graph that holds for {name} >= {bounds.lower} only",
                )
            if bounds.upper < torch.iinfo(torch.int32).max:
                limits[name] = int(bounds.upper)
        return limits

    def to_fx(
        self, signature: Signature, store: WeightStore, names: Mapping[str, Sequence[str]], strip: str
    ) -> fx.Graph:
        """Rebuilds the graph with placeholders for ports only, ``get_attr`` nodes for tensors, and our own metadata.

        Args:
            signature: the ports, in call order.
            store: the tensors; constants the model makes while it runs are added.
            names: for each name of a parameter, all its names, one per module.
            strip: a prefix of the program's tensor names that the store does not use.
        """
        return _Rebuilder(self, signature, store, names, strip).graph

    def symbols(self, signature: Signature) -> dict[str, Dim]:
        """The program's symbols by the names the ports give them."""
        found: dict[str, Dim] = {}
        for value, port in zip(self.inputs, signature.inputs, strict=True):
            for size, dim in zip(value.shape, port.shape, strict=True):
                if isinstance(dim, str) and not isinstance(size, int):
                    found.setdefault(str(size), dim)
        return found

    def _input_nodes(self) -> list[fx.Node]:
        names = set(self.program.graph_signature.user_inputs)
        return [node for node in self.program.graph.nodes if node.op == "placeholder" and node.name in names]

    def _output_nodes(self) -> list[fx.Node]:
        (nodes,) = self.program.graph.output_node().args
        assert isinstance(nodes, tuple)
        results: list[Any] = []
        for node, spec in zip(nodes, self.program.graph_signature.output_specs, strict=True):
            if spec.kind.name == "USER_OUTPUT":
                results.append(node)
            elif spec.kind.name != "BUFFER_MUTATION" or self._is_read(str(spec.target)):
                raise UnsupportedModelError(
                    "the model changes its buffers while it runs", got=f"{spec.kind.name} of {spec.target}"
                )
        if not all(isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor) for node in results):
            raise UnsupportedModelError("the model returns something else than tensors", got=results)
        return results

    def _is_read(self, buffer: str) -> bool:
        """Whether the model looks at what a buffer held; one that is written over before is no state."""
        names = {node for node, name in self.program.graph_signature.inputs_to_buffers.items() if name == buffer}
        return any(node.users for node in self.program.graph.nodes if node.op == "placeholder" and node.name in names)


def export(model: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: Any, name: str) -> Exported:
    """Traces a module on fake tensors.

    Args:
        model: in evaluation mode; tensors on one device, meta included.
        inputs: positional arguments, tensors or tuples of tensors.
        dynamic_shapes: as `torch.export.export` takes them.
        name: of the model, for messages.

    Raises:
        UnsupportedModelError: the model cannot be traced, or not into a graph of plain operators.
    """
    try:
        with torch.no_grad(), _without_fake_tensor_cache(), _Traceable(), warnings.catch_warnings():
            # what a model keeps for its next call, a graph computes anew
            warnings.filterwarnings("ignore", r"The tensor attributes? .* assigned during export", UserWarning)
            program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes, strict=False)
            if _has_effects(program.graph):
                warnings.simplefilter("ignore", FutureWarning)  # torch uses its own old interfaces
                program = program.run_decompositions({})
    except QCompilerError:
        raise
    except Exception as error:
        raise untraceable(name, error) from error
    for node in program.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)
        ):
            raise UnsupportedModelError(
                "the model has control flow inside its graph", where=name, got=node.target, expected="plain operators"
            )
    return Exported(program)


def untraceable(name: str, error: Exception) -> UnsupportedModelError:
    """What a model's own code raised while it was traced, as an error of ours."""
    return UnsupportedModelError(
        "the model cannot be exported as a graph",
        where=name,
        got=first_line(error),
        remedy="control flow that depends on data, and values computed on meta tensors, cannot be traced",
    )


def first_line(error: Exception) -> str:
    """Kind and first line of what a model's own code raised."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _has_effects(graph: fx.Graph) -> bool:
    """Whether a graph writes into tensors or wraps parts of itself in sub-graphs; both then need a second tracing."""

    def writes(node: fx.Node) -> bool:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target is _aten.detach_.default:
            return False
        return bool(node.target._schema.is_mutable)

    return any(node.op == "get_attr" or (node.op == "call_function" and writes(node)) for node in graph.nodes)


# --- faster tracing ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_fake_tensor_cache() -> Iterator[None]:
    """With symbolic shapes, looking operators up in torch's cache of fake results costs more than running them."""
    import torch._dynamo.config as config

    if hasattr(config, "fake_tensor_cache_enabled"):
        with config.patch(fake_tensor_cache_enabled=False):
            yield
    else:
        yield


_LIBRARY = torch.library.Library("qcompiler_tracing", "DEF")  # apart from the operators that graphs may hold
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float dropout_p=0.0, "
    "bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor"
)


def _attention_shape(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


_LIBRARY.impl("attention", _attention_shape, "Meta")
_stand_in = torch.ops.qcompiler_tracing.attention.default


class _Traceable(TorchFunctionMode):
    """What a model's code does, said in a way that traces quickly and loses nothing on meta tensors.

    Attention becomes one opaque operator, whose shape is known, in place of a dozen that find it step by step;
    `_Rebuilder` puts ``aten.scaled_dot_product_attention`` back, the arguments are the same. A tensor made of numbers,
    whose value a constant on meta would lose, becomes an operator that makes it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args and args[0].dim() == 4:
            func = _stand_in
        elif func is torch.tensor and _is_meta(kwargs.get("device")) and _are_numbers(args[0]):
            return _tensor_of(args[0], **{k: v for k, v in kwargs.items() if k in ("dtype", "device")})
        elif func is Tensor.__getitem__ and _is_meta(args[0].device):
            args = (args[0], _without_lists(args[1], args[0].device))
        return func(*args, **kwargs)


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"


def _are_numbers(data: Any) -> bool:
    items = data if isinstance(data, (list, tuple)) else [data]
    return 0 < len(items) <= _LONGEST_LIST and all(isinstance(item, (bool, int, float)) for item in items)


def _tensor_of(data: Any, **options: Any) -> Tensor:
    """``torch.tensor(data)`` of a number or a flat list of numbers, made by operators."""
    if not isinstance(data, (list, tuple)):
        return torch.full((), data, **options)
    kinds = {type(item) for item in data}
    dtype = torch.get_default_dtype() if float in kinds else torch.int64 if int in kinds else torch.bool
    options.setdefault("dtype", dtype)
    return torch.stack([torch.full((), item, **options) for item in data])


def _without_lists(index: Any, device: torch.device) -> Any:
    """An index in which lists of integers are tensors, or a slice for one integer where nothing else is a tensor."""
    parts = index if isinstance(index, tuple) else (index,)
    lists = [part for part in parts if isinstance(part, list) and _are_numbers(part) and not isinstance(part[0], bool)]
    if not lists:
        return index
    is_alone = len(lists) == 1 and not any(isinstance(part, Tensor) for part in parts)

    def replaced(part: Any) -> Any:
        if not any(part is item for item in lists):
            return part
        if is_alone and len(part) == 1:
            return slice(part[0], part[0] + 1 if part[0] != -1 else None)
        return _tensor_of(part, device=device)

    return tuple(replaced(part) for part in parts)


# --- our graph --------------------------------------------------------------------------------------------------------


class _Rebuilder:
    def __init__(
        self,
        exported: Exported,
        signature: Signature,
        store: WeightStore,
        names: Mapping[str, Sequence[str]],
        strip: str,
    ) -> None:
        self.graph = fx.Graph()
        self._program, self._store, self._names, self._strip = exported.program, store, names, strip
        self._symbols = exported.symbols(signature)
        self._shapes: dict[str, Dim] = {}
        self._mapping: dict[fx.Node, fx.Node] = {}
        self._tensors = self._stored_tensors()
        ports = dict(zip(exported._input_nodes(), signature.inputs, strict=True))
        for node in exported.program.graph.nodes:
            if node in ports:
                self._map(node, self.graph.placeholder(ports[node].name.replace(".", "_")))
            elif node.op == "call_function":
                self._copy(node)
        self.graph.output(tuple(self._value(node, None) for node in exported._output_nodes()))

    def _stored_tensors(self) -> dict[str, str]:
        """The store's name of each tensor that the program takes as an input."""
        spec = self._program.graph_signature
        stored = {}
        taken = {**spec.inputs_to_parameters, **spec.inputs_to_buffers, **spec.inputs_to_lifted_tensor_constants}
        for placeholder, name in taken.items():
            short = name.removeprefix(self._strip)
            if name in self._program.constants and short not in self._store:
                self._keep_constant(name, self._program.constants[name])
            stored[placeholder] = name if name in self._store else short
        return stored

    def _keep_constant(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor) or (value.device.type == "meta" and value.numel()):
            raise UnsupportedModelError(
                "the model creates a constant tensor while it runs, and its value is lost on meta tensors", where=name
            )
        self._store.set(name, torch.empty(value.shape, dtype=value.dtype) if value.device.type == "meta" else value)

    def _copy(self, node: fx.Node) -> None:
        new = self.graph.node_copy(node, lambda source: self._value(source, node))
        new.meta = {}
        if new.target is _stand_in:
            new.target = _aten.scaled_dot_product_attention.default
            new.name = self.graph._graph_namespace.create_name("scaled_dot_product_attention", new)
        self._map(node, new)

    def _map(self, node: fx.Node, new: fx.Node) -> None:
        self._mapping[node] = new
        self._describe(new, node.meta.get("val"))

    def _value(self, node: fx.Node, user: fx.Node | None) -> fx.Node:
        """The node's image; a tensor's is made at its first use, or at each use where it is tied."""
        name = self._tensors.get(node.name) if node.op == "placeholder" else None
        if name is None:
            return self._mapping[node]
        name = self._name_for(name, user)
        image = self._mapping.get(node)
        if image is None or image.target != name:
            image = self.graph.create_node("get_attr", name)
            self._map(node, image)
        return image

    def _name_for(self, name: str, user: fx.Node | None) -> str:
        """A tied tensor goes by the name of the module that uses it."""
        stack = (user.meta.get("nn_module_stack") or {}) if user is not None else {}
        modules = {path.removeprefix(self._strip) for path, _ in stack.values()}
        candidates = self._names.get(name) or [name]
        return next((c for c in candidates if c.rpartition(".")[0] in modules), candidates[0])

    def _describe(self, node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            node.meta["dtype"] = value.dtype
            node.meta["shape"] = tuple(self._dim(size) for size in value.shape)

    def _dim(self, size: Any) -> Dim:
        text = str(size)
        if text not in self._shapes:
            self._shapes[text] = symbolic_size(size, self._symbols)
        return self._shapes[text]
