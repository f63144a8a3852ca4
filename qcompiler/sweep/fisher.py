"""The diagonal of the empirical Fisher information, by a forward and a backward sweep over the segments of a graph.

Forward, one segment after another computes the values at its end for every sequence, and all of them are put away.
Backward, from the last segment to the first, each is run once more, now recording what autograd needs, and takes the
gradient at its end to the one at its start. So what is in memory is

    one segment's weights, their gradients and sums of squares + what one sequence computes inside it
    + the values at the cuts, up to the budget; beyond it they lie in files

The diagonal of the empirical Fisher information of a weight is the sum over sequences of the squared derivative of the
sequence's loss: as a stand-in for the Hessian it says how much an error of each weight costs (arXiv 2306.07629,
section 4.1). The square is of a sequence's gradient, not of a batch's, so sequences go one at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from qcompiler.errors import CalibrationError, ResourceError
from qcompiler.ir import Graph, Segment, SegmentedGraph, Site, Stretch, Trimmer, feed, segment_graph
from qcompiler.storage import WeightStore
from qcompiler.sweep.value_store import ValueHandle, ValueStore

__all__ = ["measure_fisher"]

Progress = Callable[[int, int, str], None]


def measure_fisher(
    graph: Graph,
    batches: Sequence[Mapping[fx.Node, Tensor]],
    wanted: Callable[[Site], bool],
    *,
    device: torch.device,
    work_dir: Path,
    value_budget: int,
    progress: Progress | None = None,
) -> WeightStore:
    """Measures the diagonal of the empirical Fisher information of linear layers' weights.

    The loss of a sequence is the mean cross entropy of its next tokens.

    Args:
        graph: a language model whose weights are float.
        batches: calibration inputs; their token ids are read, row by row.
        wanted: which sites to measure.
        device: where to compute.
        work_dir: made if missing; the results lie in files there, and so do values beyond the budget while it runs.
        value_budget: bytes of values at the cuts held in memory.
        progress: called before every segment, twice.

    Returns:
        float32 ``[out, in]`` by site name, on disk; not divided by the number of sequences.

    Raises:
        CalibrationError: if the graph predicts no tokens, if sequences are too short to have a next token, or if a
            gradient is not finite.
        ResourceError: if the directory cannot be written, or the disk is full.
    """
    index = graph.signature.index_of_output("logits")
    if graph.signature.input("ids") is None or index is None:
        raise CalibrationError(
            "the Fisher information is that of a language model's next tokens",
            got=", ".join(port.name for port in graph.signature.outputs),
            expected="a model that takes token ids and gives logits",
            remedy="choose a recipe that does not need it, such as SqueezeLLM(sensitivity='gram')",
        )
    place = next(n for n, port in zip(graph.inputs, graph.signature.inputs, strict=True) if port.role == "ids")
    ids = [batch[place] for batch in batches]
    if any(rows.shape[1] < 2 for rows in ids):
        raise CalibrationError("calibration sequences have no next token", got="1 token", expected="2 or more")
    sequences = [row.to(device) for rows in ids for row in rows.split(1)]
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        store = ValueStore(value_budget, work_dir)
    except OSError as error:
        raise ResourceError("the work directory cannot be written", where=work_dir, got=error) from error
    try:
        sweep = _BackwardSweep(graph, sequences, device, store, graph.outputs[index])
        return sweep.run(wanted, work_dir, progress)
    finally:
        store.close()


class _BackwardSweep:
    def __init__(
        self, graph: Graph, sequences: Sequence[Tensor], device: torch.device, store: ValueStore, logits: fx.Node
    ) -> None:
        self._graph, self._sequences, self._device = graph, sequences, device
        self._store, self._logits, self._memory = store, logits, Trimmer()
        self._cut: SegmentedGraph = segment_graph(graph)
        self._outside: dict[int, dict[fx.Node, Any]] = {}

    def run(self, wanted: Callable[[Site], bool], work_dir: Path, progress: Progress | None) -> WeightStore:
        segments, found = self._cut.segments, WeightStore()
        steps = 2 * len(segments)

        def tell(done: int, segment: Segment, direction: str) -> None:
            if progress is not None:
                progress(done, steps, f"{direction} {', '.join(site.name for site in segment.sites)}")

        cuts = [[self._store.put({}) for _ in self._sequences]]
        for segment in segments[:-1]:
            tell(segment.index, segment, "forward")
            cuts.append(self._forward(segment, cuts[-1]))
        gradients: list[ValueHandle] | None = None
        for segment in reversed(segments):
            tell(steps - 1 - segment.index, segment, "backward")
            sites = [site for site in segment.sites if wanted(site)]
            gradients = self._backward(segment, cuts.pop(), gradients, sites, found)
            found.spill(work_dir, f"fisher-{segment.index:05d}")
            self._memory.trim()
        return found

    def _forward(self, segment: Segment, before: Sequence[ValueHandle]) -> list[ValueHandle]:
        stretch = Stretch(segment.nodes(), segment.outputs)
        loaded = stretch.load(self._graph.weights.read, self._device)
        after = []
        for ids, handle in zip(self._sequences, before, strict=True):
            values = {**self._outside_values(ids), **self._store.get(handle)}
            after.append(self._store.put(stretch.run(values, loaded, self._device)))
        return after

    def _backward(
        self,
        segment: Segment,
        before: Sequence[ValueHandle],
        gradients: Sequence[ValueHandle] | None,
        sites: Sequence[Site],
        found: WeightStore,
    ) -> list[ValueHandle]:
        """Adds up squared gradients of a segment's weights; gives the gradients of the values at its start.

        Args:
            segment: run once more.
            before: the values at its start, by sequence; taken away.
            gradients: of the values at its end, by sequence, taken away; None behind the last segment.
            sites: whose weights to differentiate by.
            found: where the sums go.
        """
        stretch = Stretch(segment.nodes(), [self._logits] if gradients is None else segment.outputs)
        loaded = stretch.load(self._graph.weights.read, self._device)
        leaves = {site.name: _weight_nodes(site, loaded) for site in sites}
        for node in (node for nodes in leaves.values() for node in nodes):
            loaded[node] = loaded[node].detach().requires_grad_()
        sums = {site.name: torch.zeros(site.out_features, site.in_features, device=self._device) for site in sites}
        handed_on: list[ValueHandle] = []
        for index, ids in enumerate(self._sequences):
            held = self._store.get(before[index])
            starts = {node: value.detach().requires_grad_() for node, value in held.items() if _is_float(value)}
            outside = self._outside_values(ids)
            ends = stretch.run({**outside, **held, **starts}, loaded, self._device, grad=True)
            if gradients is None:
                logits = ends[self._logits]
                outputs = [F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])]
                directions: list[Tensor | None] = [None]
            else:
                given = self._store.get(gradients[index])
                outputs, directions = [ends[node] for node in given], [*given.values()]
                self._store.drop(gradients[index])
            inputs = {node: loaded[node] for nodes in leaves.values() for node in nodes} | starts
            derived = _gradients(outputs, directions, inputs)
            del ends, outputs
            for name, nodes in leaves.items():
                parts = [derived[node] for node in nodes if node in derived]
                if parts:
                    whole = sum(parts[1:], parts[0])
                    sums[name].addcmul_(whole, whole)
            handed_on.append(self._store.put({node: derived[node] for node in starts if node in derived}))
            self._store.drop(before[index])
        for name, total in sums.items():
            if not bool(total.isfinite().all()):
                raise CalibrationError(
                    "calibration statistics are not finite",
                    where=name,
                    got="NaN or infinity in the gradient of the loss",
                    remedy="look for NaN, infinity or overflow in the weights and activations of the model",
                )
            found.set(name, total)
        return handed_on

    def _outside_values(self, ids: Tensor) -> dict[fx.Node, Any]:
        """Graph inputs, and what does not depend on the tokens: the same for all sequences of one length."""
        batch = feed(self._graph, ids)
        length = ids.shape[1]
        if length not in self._outside:
            prologue = Stretch(list(self._graph.fx.nodes), [*self._cut.prologue])
            loaded = prologue.load(self._graph.weights.read, self._device)
            self._outside[length] = prologue.run(batch, loaded, self._device)
        return {**batch, **self._outside[length]}


def _gradients(
    outputs: Sequence[Tensor], directions: Sequence[Tensor | None], inputs: Mapping[fx.Node, Tensor]
) -> dict[fx.Node, Tensor]:
    """The gradients of the outputs, times the directions, by the inputs they depend on."""
    pairs = [(o, d) for o, d in zip(outputs, directions, strict=True) if o.requires_grad]
    if not pairs or not inputs:
        return {}
    ends, weights = zip(*pairs, strict=True)
    found: Sequence[Tensor | None] = torch.autograd.grad(ends, [*inputs.values()], weights, allow_unused=True)
    return {node: part for node, part in zip(inputs, found, strict=True) if part is not None}


def _weight_nodes(site: Site, loaded: dict[fx.Node, Any]) -> list[fx.Node]:
    """The nodes a site's weight enters by: several where a module is called more than once."""
    return list(dict.fromkeys(node.args[1] for node in site.nodes if node.args[1] in loaded))  # type: ignore[misc]


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
