"""Mixtures of experts, which checkpoints have matrix by matrix, and models of transformers in stacks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from qcompiler.errors import TargetError
from qcompiler.frontend import SourceNames, source_names
from qcompiler.ir import Graph, is_expert
from qcompiler.lowering.checkpoint.layers import Layer, common_parent

__all__ = ["check_experts", "find_sources", "in_source", "mixtures", "place_in_stack"]


def find_sources(graph: Graph, model: nn.Module) -> SourceNames:
    """What checkpoints call the tensors of a model with experts; of one without, nothing: the names are the model's."""
    counts = {name: len(value) for name, value in model.named_parameters() if value.dim() == 3}
    stacks = {place_in_stack(site.name)[0] for site in graph.sites() if is_expert(site)}
    found = {name: count for name, count in counts.items() if name in stacks}
    return source_names(model, found) if found else SourceNames({}, {})


def place_in_stack(layer: str) -> tuple[str, int]:
    """The stack that an expert's layer is part of, and its number there; for another layer, no stack's name."""
    stack, _, number = layer.rpartition(".")
    return (stack, int(number)) if number.isdecimal() else ("", 0)


def in_source(layers: Sequence[Layer], sources: SourceNames) -> list[Layer]:
    """The same layers as checkpoints have them: under their names, and of an expert one for each of its matrices."""
    found, mixture_of = [], mixtures(sources)
    for layer in layers:
        stack, number = place_in_stack(layer.name)
        if stack not in sources.experts:
            weight = f"{layer.name}.weight"
            found.append(replace(layer, name=sources.renamed.get(weight, weight).removesuffix(".weight")))
            continue
        for part in sources.experts[stack][number]:
            first = None if part.rows == 1 else int(part.first * layer.rows)
            name, rows = part.name.removesuffix(".weight"), int(part.rows * layer.rows)
            found.append(replace(layer, name=name, rows=rows, first_row=first, mixture=mixture_of[name]))
    return found


def mixtures(sources: SourceNames) -> dict[str, str]:
    """By the path of each matrix of an expert in checkpoints, the module that all experts of its mixture are in."""
    found = {}
    for experts in sources.experts.values():
        names = [part.name.removesuffix(".weight") for parts in experts for part in parts]
        together = common_parent(names)
        found.update(dict.fromkeys(names, together))
    return found


def check_experts(graph: Graph, layers: Mapping[str, Layer], sources: SourceNames, layout: str) -> None:
    """Refuses mixtures of experts that a layout does not hold, or that engines do not take.

    Raises:
        TargetError: for experts in GGUF, experts that no checkpoint has one by one, different formats in one mixture,
            and blocks that reach from one matrix of an expert into the next.
    """
    formats: dict[str, tuple[str, str]] = {}
    for site in graph.sites():
        if not is_expert(site):
            continue
        stack, number = place_in_stack(site.name)
        if layout == "gguf" or stack not in sources.experts:
            raise TargetError(
                "mixtures of experts are not written into such checkpoints",
                where=f"checkpoint: {site.name}",
                got=f"format={layout}" if stack in sources.experts else "experts that checkpoints have in one tensor",
                expected="another layout than gguf, and experts that checkpoints have matrix by matrix",
                remedy="write format=compressed-tensors" if stack in sources.experts else "lower to another target",
            )
        layer = layers.get(site.name)
        mixture, kind = stack.rpartition(".")[0], "float" if layer is None else str(layer)
        first, other = formats.setdefault(mixture, (site.name, kind))
        if other != kind:
            raise TargetError(
                "experts of one mixture have different formats, and engines run them as one",
                where=f"checkpoint: {first}, {site.name}",
                got=f"{other}; {kind}",
                expected="one format for all experts of a mixture",
                remedy="let the overrides name all of them, or none",
            )
        side = None if layer is None or layer.weight.granularity != "per_block" else layer.weight.group_size
        for part in sources.experts[stack][number]:
            if side is not None and int(part.first * site.out_features) % side:
                raise TargetError(
                    "a block of weights reaches from one matrix of an expert into the next",
                    where=f"checkpoint: {site.name}",
                    got=f"{part.name} from row {int(part.first * site.out_features)}, blocks of {side}",
                    remedy="choose a scheme without -block",
                )
