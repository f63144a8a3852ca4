"""Models without their memory: built or copied with parameters on meta, and bound to a checkpoint by name."""

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qcompiler.conversions import convert_names
from qcompiler.errors import UnsupportedModelError, WeightError
from qcompiler.weights import WeightStore

__all__ = ["bind_checkpoint", "build_on_meta", "copy_for_tracing", "quiet_transformers", "tied_names"]

_FLOATS = ("float32", "float16", "bfloat16", "float64")


class _EmptyOnMeta(TorchFunctionMode):
    """``torch.empty`` gives meta tensors, so parameters cost nothing while small computed buffers stay real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


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
    directory: Path, config: Mapping[str, Any], trust_remote_code: bool
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Builds the model that a ``config.json`` describes, every tensor on meta, in float32.

    Returns:
        The model, and the values of the buffers that it computed.

    Raises:
        UnsupportedModelError: if transformers cannot build it.
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
            with _EmptyOnMeta():
                if model_class is not None:
                    model: nn.Module = model_class._from_config(settings, **options)
                else:
                    model = transformers.AutoModelForCausalLM.from_config(
                        settings, trust_remote_code=trust_remote_code, **options
                    )
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


def bind_checkpoint(store: WeightStore, model: nn.Module, computed: Mapping[str, Tensor]) -> None:
    """Gives the tensors of a checkpoint the names of the model's parameters and buffers, and drops the rest.

    Names may lack the prefix of the base model or have it where the model does not; a parameter with several names may
    be stored under any of them; what transformers renames, merges or splits on loading is (`qcompiler.conversions`).

    Args:
        store: changed in place.
        model: on meta.
        computed: values of buffers that are not in the checkpoint.

    Raises:
        WeightError: if a parameter is missing or of another shape.
        UnsupportedModelError: if a parameter is stored as codes, or a buffer has no value.
    """
    wanted = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    used = {stored for name in wanted if (stored := _stored_name(store, model, name)) is not None}
    if len(used) < len(store):
        convert_names(store, model, used.__contains__)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    bound, missing = _find_parameters(store, model, list(owners.values()))
    if missing:
        raise WeightError(
            "the checkpoint lacks parameters of the model",
            got=f"{len(missing)} missing: {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}",
            expected="one tensor per parameter",
            remedy="check that config.json belongs to these weights",
        )
    values: dict[str, Tensor] = {}
    persistent = set(model.state_dict(keep_vars=True))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        stored = _stored_name(store, model, name) if name in persistent else None
        if stored is not None:
            bound[name] = stored
        elif name in computed:
            values[name] = computed[name]
        else:
            raise UnsupportedModelError(
                "a computed buffer has no value", where=name, got=f"shape {tuple(buffer.shape)}"
            )
    for name, stored in bound.items():
        _check_tensor(store, stored, wanted[name])
    for unused in set(store.names()) - set(bound.values()):
        store.remove(unused)
    for name, stored in bound.items():
        store.rename(stored, name)
    for name, value in values.items():
        store.set(name, value)
    for names in owners.values():
        first = next(name for name in names if name in bound)
        for name in names:
            if name != first:
                store.alias(name, first)


def _find_parameters(store: WeightStore, model: nn.Module, groups: list[list[str]]) -> tuple[dict[str, str], list[str]]:
    """The stored name of the first name of each group that has one, and the groups (by first name) that have none."""
    bound: dict[str, str] = {}
    missing = []
    for names in groups:
        found = ((name, _stored_name(store, model, name)) for name in names)
        first = next(((name, stored) for name, stored in found if stored is not None), None)
        if first is None:
            missing.append(names[0])
        else:
            bound[first[0]] = first[1]
    return bound, missing


def _stored_name(store: WeightStore, model: nn.Module, name: str) -> str | None:
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    candidates = [name, prefix + name, name.removeprefix(prefix)]
    candidates += [old for new in candidates for old in _older_spellings(new)]
    return next((candidate for candidate in candidates if candidate in store), None)


def _older_spellings(name: str) -> list[str]:
    """The TensorFlow-era names of a norm's parameters, which transformers still reads."""
    for new, old in ((".weight", ".gamma"), (".bias", ".beta")):
        if name.endswith(new):
            return [name.removesuffix(new) + old]
    return []


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
