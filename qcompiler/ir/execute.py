"""Runs stretches of a graph: nodes in order, weights fetched by name, values freed after their last use."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Stretch", "makes_a_tensor"]

Fetch = Callable[[str], Tensor]


class Stretch:
    """Nodes in graph order, ready to be executed for one batch after another.

    Args:
        nodes: in graph order; only calls and stored tensors are executed.
        keep: the nodes whose values are wanted afterwards. Nodes that none of them needs are not run.

    Attributes:
        inputs: the values it reads from outside, which must be given to `run`.
        nodes: what is executed for each batch.
    """

    def __init__(self, nodes: Iterable[fx.Node], keep: Collection[fx.Node]) -> None:
        candidates = [node for node in nodes if node.op in ("call_function", "get_attr")]
        inside = set(candidates)
        needed: set[fx.Node] = set()
        stack = [node for node in keep if node in inside]
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend(s for s in node.all_input_nodes if s in inside or s.op == "get_attr")
        stored = [node for node in needed if node.op == "get_attr" and node not in inside]  # may stand anywhere before
        ordered = [*sorted(stored, key=lambda node: node.name), *(node for node in candidates if node in needed)]
        self._constant: list[fx.Node] = []  # stored tensors, and what is computed from them alone
        constant: set[fx.Node] = set()
        for node in ordered:
            if node.op == "get_attr" or (node.all_input_nodes and constant.issuperset(node.all_input_nodes)):
                constant.add(node)
                self._constant.append(node)
        self.nodes = [node for node in ordered if node not in constant]
        self._keep = list(dict.fromkeys(keep))
        self.inputs = list(
            dict.fromkeys(source for node in self.nodes for source in node.all_input_nodes if source not in needed)
        )
        self._frees = self._last_uses(self.nodes, {*self._keep, *constant})
        self._constant_frees = self._last_uses(
            self._constant, {*self._keep, *(s for node in self.nodes for s in node.all_input_nodes)}
        )

    @staticmethod
    def _last_uses(nodes: Sequence[fx.Node], kept: Collection[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        last: dict[fx.Node, fx.Node] = {}
        for node in nodes:
            last[node] = node
            for source in node.all_input_nodes:
                last[source] = node
        frees: dict[fx.Node, list[fx.Node]] = {}
        for source, user in last.items():
            if source not in kept:
                frees.setdefault(user, []).append(source)
        return frees

    def load(self, fetch: Fetch, device: torch.device) -> dict[fx.Node, Any]:
        """Reads the stored tensors and computes what depends on them alone (dequantized weights).

        Args:
            fetch: gives a tensor by name; floating point is computed with in float32.
            device: where they are put.
        """
        env: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in self._constant:
                if node.op == "get_attr":
                    tensor = fetch(str(node.target))
                    env[node] = tensor.to(device, torch.float32 if tensor.is_floating_point() else tensor.dtype)
                else:
                    env[node] = _call(node, env, device)
                for dead in self._constant_frees.get(node, ()):
                    env.pop(dead, None)
        return env

    def run(
        self,
        values: Mapping[fx.Node, Any],
        loaded: Mapping[fx.Node, Any],
        device: torch.device,
        passed_through: Collection[fx.Node] = (),
        fixed: Mapping[fx.Node, Any] | None = None,
        *,
        grad: bool = False,
    ) -> dict[fx.Node, Any]:
        """Executes the nodes for one batch.

        Args:
            values: the values of `inputs` (others are passed over); not modified.
            loaded: what `load` returned.
            device: where tensors that the graph itself creates are put.
            passed_through: nodes that give their first argument instead of being called.
            fixed: values that nodes give instead of being called.
            grad: record what autograd needs to differentiate by the given and loaded values that ask for it.

        Returns:
            The values of the kept nodes, those that came from outside included.
        """
        env: dict[fx.Node, Any] = {**loaded, **{node: values[node] for node in self.inputs}}
        with torch.set_grad_enabled(grad):
            for node in self.nodes:
                if fixed and node in fixed:
                    env[node] = fixed[node]
                elif node in passed_through:
                    env[node] = env[node.all_input_nodes[0]]
                else:
                    env[node] = _call(node, env, device)
                for dead in self._frees.get(node, ()):
                    del env[dead]
        return {node: env[node] if node in env else values[node] for node in self._keep}


def _call(node: fx.Node, env: Mapping[fx.Node, Any], device: torch.device) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    if makes_a_tensor(node):
        kwargs = {**kwargs, "device": device}
    return node.target(*args, **kwargs)  # type: ignore[operator]


def makes_a_tensor(node: fx.Node) -> bool:
    """Whether a call makes a tensor out of numbers alone, and so must be told where."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    return any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)
