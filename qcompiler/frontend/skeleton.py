"""Models without their memory: built or copied with parameters on meta, and bound to a checkpoint by name."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qcompiler.errors import UnsupportedModelError, WeightError
from qcompiler.frontend.conversions import convert_names
from qcompiler.storage import WeightStore

__all__ = ["Binding", "bind_checkpoint", "build_on_meta", "copy_for_tracing", "quiet_transformers", "tied_names"]

_FLOATS = ("float32", "float16", "bfloat16", "float64")


_MOST_COMPUTED = 1 << 30  # elements of one tensor that a model computes as it is built: a mask of 32768 x 32768
_MAKERS = (torch.arange, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randn, torch.zeros)


class _EmptyOnMeta(TorchFunctionMode):
    """``torch.empty`` gives meta tensors, so parameters cost nothing while small computed buffers stay real.

    A configuration may ask for anything; what no checkpoint of this size can fill is refused while it is built, since
    a billion layers, or norms of that length, would take all the time or memory there is.

    Args:
        stored_bytes: of the checkpoint; None for no limit.
    """

    def __init__(self, stored_bytes: int | None) -> None:
        super().__init__()
        self._most = None if stored_bytes is None else 8 * stored_bytes  # no parameter takes less than a bit
        self._made = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        elif func in _MAKERS and self._most is not None:
            size = func(*args, **{**kwargs, "device": "meta"}).numel()
            if size > _MOST_COMPUTED:
                raise WeightError(
                    "config.json describes a model that no machine can build",
                    got=f"a computed tensor of {size} elements",
                    expected=f"{_MOST_COMPUTED} elements or fewer",
                    remedy="check the sizes in config.json",
                )
        result = func(*args, **kwargs)
        if func is torch.empty and self._most is not None:
            self._made += result.numel()
            if self._made > self._most:
                raise WeightError(
                    "config.json describes a much larger model than the checkpoint holds",
                    got=f"more than {self._most} parameters",
                    expected=f"no more than the {self._most // 8} bytes of weights can hold",
                    remedy="check that config.json belongs to these weights (num_hidden_layers, hidden_size, ...)",
                )
        return result


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences the advice transformers logs while it builds a model."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def build_on_meta(
    directory: Path, config: Mapping[str, Any], trust_remote_code: bool, *, stored_bytes: int | None = None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Builds the model that a ``config.json`` describes, every tensor on meta, in float32.

    Args:
        directory: of the model.
        config: its ``config.json``.
        trust_remote_code: run modelling code the directory brings along.
        stored_bytes: of its checkpoint; a model of more parameters than that has bits is not built. None for any.

    Returns:
        The model, and the values of the buffers that it computed.

    Raises:
        UnsupportedModelError: if transformers cannot build it.
        WeightError: if it is larger than the checkpoint, or the machine, can hold.
    """
    import transformers

    with quiet_transformers():
        try:
            settings = transformers.AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=trust_remote_code
            )
            names = config.get("architectures") or []
            model_class = getattr(transformers, names[0], None) if names else None
            attention = "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager"
            options = {"dtype": torch.float32, "attn_implementation": attention}
            with _EmptyOnMeta(stored_bytes):
                if model_class is not None:
                    model: nn.Module = model_class._from_config(settings, **options)
                else:
                    model = transformers.AutoModelForCausalLM.from_config(
                        settings, trust_remote_code=trust_remote_code, **options
                    )
        except WeightError as error:
            error.where = error.where or str(directory / "config.json")
            raise
        except Exception as error:  # a configuration can make the model's own code fail in any way
            raise UnsupportedModelError(
                "transformers cannot build this model from its config.json",
                where=directory / "config.json",
                got=f"{type(error).__name__}: {error}",
                expected="a model_type and fields that this version of transformers knows",
            ) from error
    model.eval()
    return model, _move_to_meta(model)


def copy_for_tracing(model: nn.Module, device: str | None = None) -> nn.Module:
    """A copy in evaluation mode and float32; what is float32 on that device already is shared with the model.

    Args:
        model: left as it is.
        device: where the copy's tensors are; "meta" takes no memory. By default the CPU.
    """
    target = torch.device(device or "cpu")

    def moved(tensor: Tensor) -> Tensor:
        return tensor.detach().to(target, torch.float32 if tensor.is_floating_point() else tensor.dtype)

    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(moved(parameter), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = moved(buffer)
    return copy.deepcopy(model, memo).eval()


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """For each name of a parameter: its names, one per module that has it. A module known by two names counts once."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return {name: names[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}


def _move_to_meta(model: nn.Module) -> dict[str, Tensor]:
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


@dataclass(frozen=True)
class Binding:
    """A model's tensors in a checkpoint.

    Attributes:
        weights: the tensors by the names of the model's parameters and buffers.
        unused: stored names that belong to none of them.
        untied: pairs of names that the configuration ties, but that are stored with different values.
    """

    weights: WeightStore
    unused: list[str]
    untied: list[tuple[str, str]]


def bind_checkpoint(
    store: WeightStore,
    model: nn.Module,
    computed: Mapping[str, Tensor],
    check: Callable[[WeightStore, nn.Module], None] | None = None,
) -> Binding:
    """Finds the tensors of a model in a checkpoint, as transformers does (`qcompiler.frontend.conversions`).

    A tied parameter may be stored under any of its names. Where several are stored and their values differ, the
    parameters are not tied, whatever the configuration says.

    Args:
        store: left as it is.
        model: on meta; parameters that turn out not to be tied are given apart.
        computed: values of buffers that are not in the checkpoint.
        check: called with the tensors by the names of the model, ahead of all other checks of them.

    Raises:
        WeightError: if a parameter is missing or of another shape.
        UnsupportedModelError: if a parameter is stored as codes, or a buffer has no value.
    """
    weights, unused = convert_names(store, model)
    if check is not None:
        check(weights, model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owners: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        owners.setdefault(id(parameter), []).append(name)
    missing = [names[0] for names in owners.values() if not any(name in weights for name in names)]
    if missing:
        raise WeightError(
            "the checkpoint lacks parameters of the model",
            got=f"{len(missing)} missing: {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}",
            expected="one tensor per parameter",
            remedy="check that config.json belongs to these weights",
        )
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name in weights.names():
        _check_tensor(weights, name, parameters[name] if name in parameters else buffers[name])
    for name, buffer in buffers.items():
        if name not in weights and name in computed:
            weights.set(name, computed[name])
        elif name not in weights:
            raise UnsupportedModelError(
                "a computed buffer has no value", where=name, got=f"shape {tuple(buffer.shape)}"
            )
    untied = [pair for names in owners.values() for pair in _tie(weights, model, names)]
    return Binding(weights, unused, untied)


def _tie(weights: WeightStore, model: nn.Module, names: list[str]) -> list[tuple[str, str]]:
    """Gives one parameter all its names, or each of the modules that share it one of its own where values differ.

    Source: `PreTrainedModel.tie_weights` of transformers, which compares what is stored with the source of the tie.

    Returns:
        The pairs that are not tied.
    """
    from transformers.core_model_loading import dot_natural_key

    places: dict[tuple[int, str], list[str]] = {}  # one module may be known by several names, and has one tensor
    for name in names:
        path, _, attribute = name.rpartition(".")
        places.setdefault((id(model.get_submodule(path)), attribute), []).append(name)
    sources = getattr(model, "all_tied_weights_keys", {})
    source = next((sources[name] for name in names if sources.get(name) in names), names[0])
    first: str | None = None
    untied = []
    for place in sorted(places.values(), key=lambda place: source not in place):
        stored = [name for name in sorted(place, key=dot_natural_key) if name in weights]
        if not stored:
            continue
        for name in place:  # the last one that is loaded stays
            weights.alias(name, stored[-1])
        if first is None:
            first = stored[-1]
        elif weights.is_equal(stored[-1], first):
            weights.alias(stored[-1], first)
        else:
            untied.append((stored[-1], first))
            path, _, attribute = stored[-1].rpartition(".")
            parameter = model.get_parameter(stored[-1]).detach().clone()
            model.get_submodule(path)._parameters[attribute] = nn.Parameter(parameter, requires_grad=False)
    assert first is not None
    apart = {name for name, _ in untied}
    for place in places.values():
        if not apart.intersection(place):
            for name in place:
                weights.alias(name, first)
    return untied


def _check_tensor(store: WeightStore, stored: str, wanted: Tensor) -> None:
    info = store.info(stored)
    if tuple(info.shape) != tuple(wanted.shape):
        raise WeightError(
            "a tensor's shape is not the one config.json implies",
            where=stored,
            got=tuple(info.shape),
            expected=tuple(wanted.shape),
            remedy="check that config.json belongs to these weights (vocab_size, hidden_size, ...)",
        )
    if wanted.is_floating_point() and info.dtype not in _FLOATS:
        raise UnsupportedModelError(
            "this checkpoint is quantized already",
            where=stored,
            got=info.dtype,
            expected=" or ".join(_FLOATS),
            remedy="compile the original model",
        )
