"""Checkpoints whose tensors transformers renames, merges or splits while it loads them: the same, but deferred.

The experts of a mixture, for instance, lie apart in most checkpoints and together in the model. What is done with which
names is transformers' own knowledge; here its transforms are applied when a tensor is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from qcompiler.storage import WeightStore, stack

__all__ = ["ExpertPart", "SourceNames", "convert_names", "source_names"]


def convert_names(store: WeightStore, model: nn.Module) -> tuple[WeightStore, list[str]]:
    """The tensors of a checkpoint under the names of a model's parameters and buffers. No tensor is read.

    Names may lack the prefix of the base model or have it where the model does not, and may be older spellings. Of two
    tensors that claim one name, the first in natural order has it. Source: `convert_and_load_state_dict_in_model` of
    transformers.

    Args:
        store: of a checkpoint; left as it is.
        model: of transformers, on meta.

    Returns:
        The tensors that the model has a place for, and the stored names of those that go nowhere.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    renamings = [item for item in transforms if not isinstance(item, WeightConverter)]
    prefix, wanted = getattr(model, "base_model_prefix", None), model.state_dict(keep_vars=True)
    found, unused = WeightStore(), []
    groups: dict[str, dict[str, list[str]]] = {}
    for name in sorted(store.names(), key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if new not in wanted and name in wanted:  # a name that is right already, but looks like an older one
            new, pattern = rename_source_key(name, [], [], prefix, wanted)
        if new not in wanted or new in found:
            unused.append(name)
        elif pattern is not None:
            groups.setdefault(new, {}).setdefault(pattern, []).append(name)
        else:
            found.alias(new, name, store)
    for target, sources in groups.items():
        pattern = next(iter(sources))
        converter = next(item for item in converters if pattern in item.source_patterns)
        conversion = _Conversion(converter, model, target, sources)
        if not conversion.define(store, found):
            unused += conversion.names
    return found, unused


@dataclass(frozen=True)
class ExpertPart:
    """A matrix of a checkpoint that transformers merges with others into the experts of a mixture.

    Attributes:
        name: in the checkpoint.
        first, rows: where its rows begin in the matrix of its expert, and how many they are, as shares of all.
    """

    name: str
    first: Fraction
    rows: Fraction


@dataclass(frozen=True)
class SourceNames:
    """What checkpoints call the tensors of a model.

    Attributes:
        renamed: by the model's name, of tensors that checkpoints have as they are.
        experts: by the name of a stack of experts ``[E, out, in]``, for each expert its parts ``[rows, in]`` in order.
    """

    renamed: Mapping[str, str]
    experts: Mapping[str, Sequence[Sequence[ExpertPart]]]


_ROWS, _COLUMNS = 12, 2  # of experts on trial


def source_names(model: nn.Module, stacks: Mapping[str, int]) -> SourceNames:
    """What checkpoints call the tensors of a model that merges its experts, as transformers itself saves it.

    Which rows of a stack go where is found on small stacks whose numbers are all different.

    Args:
        model: of transformers, on meta.
        stacks: by name, the experts of parameters ``[E, out, in]``.

    Returns:
        The names; a stack that checkpoints do not have expert by expert, row by row, is not among them. Source:
        `revert_weight_conversion` of transformers.
    """
    from transformers.core_model_loading import revert_weight_conversion

    plain = {name: torch.empty(value.shape, device="meta") for name, value in model.state_dict().items()}
    probes: dict[str, Tensor] = {}
    for name, count in stacks.items():
        start = sum(probe.numel() for probe in probes.values())
        shape = (count, _ROWS, _COLUMNS)
        probes[name] = torch.arange(start, start + count * _ROWS * _COLUMNS, dtype=torch.float64).reshape(shape)
    try:
        found = revert_weight_conversion(model, {**plain, **probes})
    except Exception:  # operations that want shapes of their own
        return SourceNames({}, {})
    names = {id(tensor): name for name, tensor in plain.items() if name not in probes}
    renamed = {names[id(tensor)]: name for name, tensor in found.items() if id(tensor) in names}
    numbers = {name: tensor for name, tensor in found.items() if tensor.dtype == torch.float64}
    experts = {name: _expert_parts(probe, numbers) for name, probe in probes.items()}
    return SourceNames(renamed, {name: parts for name, parts in experts.items() if parts})


def _expert_parts(probe: Tensor, found: Mapping[str, Tensor]) -> list[list[ExpertPart]]:
    """For each expert of a stack, the tensors that are some of its rows; none where those are not all rows of all."""
    parts: list[list[ExpertPart]] = [[] for _ in probe]
    for name, tensor in found.items():
        place = (probe == tensor.flatten()[0]).nonzero() if tensor.dim() == 2 and tensor.numel() else probe[:0]
        if len(place) != 1:
            continue
        expert, first, _ = place[0].tolist()
        if torch.equal(probe[expert, first : first + len(tensor)], tensor):
            parts[expert].append(ExpertPart(name, Fraction(first, _ROWS), Fraction(len(tensor), _ROWS)))
    ordered = [sorted(items, key=lambda item: item.first) for items in parts]
    ends = [[item.first + item.rows for item in items] for items in ordered]
    starts = [[item.first for item in items] for items in ordered]
    is_whole = all([0, *end] == [*start, 1] for start, end in zip(starts, ends, strict=True))
    return ordered if is_whole else []


class _Conversion:
    """What transformers makes of some tensors of a checkpoint.

    Args:
        converter: of transformers.
        model: on meta.
        target: the name of the result, or the first of them.
        sources: for each pattern of the converter, the names of the tensors that match it, in order.
    """

    def __init__(self, converter: Any, model: Any, target: str, sources: dict[str, list[str]]) -> None:
        self._converter, self._model, self._target, self._sources = converter, model, target, sources

    def define(self, store: WeightStore, found: WeightStore) -> bool:
        """Puts what is made of tensors of ``store`` into ``found``, computed when it is read; False if it cannot be."""
        infos = [store.info(name) for name in self.names]
        dtype = infos[0].dtype
        like = [torch.empty(info.shape, dtype=getattr(torch, info.dtype, None), device="meta") for info in infos]
        try:
            results = self._run(like)
        except Exception:  # these operations meet tensors they were not made for: what is missing is reported by name
            return False
        if len(results) == 1 and self._are_slices():
            self._define_slices(store, found, dtype)
            return True
        for name, result in results.items():

            def one(*tensors: Tensor, name: str = name) -> Tensor:
                return self._run(tensors)[name]

            shape = tuple(result.shape)
            found.derive(name, self.names, one, dtype=dtype, shape=shape, rearranges=True, store=store)
        return True

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tensors it is made of."""
        return tuple(name for names in self._sources.values() for name in names)

    def _run(self, tensors: Sequence[Tensor], counts: Sequence[int] | None = None) -> dict[str, Tensor]:
        """The results by name; ``counts`` says how many tensors there are of each pattern."""
        given: dict[str, Any] = {}
        tensors = list(tensors)
        for position, (pattern, names) in enumerate(self._sources.items()):
            count = len(names) if counts is None else counts[position]
            given[pattern], tensors = tensors[:count], tensors[count:]
        for operation in self._converter.operations:
            given = operation.convert(
                given,
                source_patterns=self._converter.source_patterns,
                target_patterns=self._converter.target_patterns,
                full_layer_name=self._target,
                model=self._model,
                config=self._model.config,
                missing_keys=None,
            )
        known = next((pattern for pattern in given if pattern in self._target), None)
        before, _, behind = self._target.partition(known or self._target)
        results = {(before + key + behind if known else key): value for key, value in given.items()}
        return {name: value[0] if isinstance(value, list) else value for name, value in results.items()}

    def _are_slices(self) -> bool:
        """Whether slice ``i`` of the result depends on the ``i``-th tensor of each pattern alone; tried on numbers."""
        counts = {len(names) for names in self._sources.values()}
        if len(counts) != 1 or counts == {1}:
            return False
        (count,), patterns = counts, len(self._sources)
        probe = torch.arange(patterns * count * 6.0).reshape(patterns, count, 2, 3)
        try:
            (whole,) = self._run(list(probe.flatten(0, 1))).values()
            parts = [next(iter(self._run(list(probe[:, i]), [1] * patterns).values())) for i in range(count)]
        except Exception:  # an operation that wants shapes of its own
            return False
        return whole.shape[0] == count and torch.equal(whole, torch.cat(parts))

    def _define_slices(self, store: WeightStore, found: WeightStore, dtype: str) -> None:
        """As a stack of parts that can be read one by one."""
        lists = list(self._sources.values())
        parts: list[str] = []

        def part(*tensors: Tensor) -> Tensor:
            (result,) = self._run(tensors, [1] * len(lists)).values()
            return result[0]

        for names in zip(*lists, strict=True):
            like = [torch.empty(store.info(name).shape, device="meta") for name in names]
            parts.append(f"{self._target}~{len(parts)}")
            shape = tuple(part(*like).shape)
            found.derive(parts[-1], names, part, dtype=dtype, shape=shape, rearranges=True, store=store)
        shape = (len(parts), *found.info(parts[0]).shape)
        found.derive(self._target, tuple(parts), stack, dtype=dtype, shape=shape, rearranges=True)
        for name in parts:
            found.remove(name)
