"""Step 4 of 4, `KernelModel`: the module that was built, with caches that grow, as an artifact; `lower` does it all."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qcompiler.errors import InputError, TargetError
from qcompiler.frontend import declared_positions
from qcompiler.ir import SEQUENCE, Graph
from qcompiler.lowering.kernels.module.build import BuiltModule, Slot, build_module
from qcompiler.lowering.kernels.module.captured_step import CapturedStep, CapturingModel
from qcompiler.lowering.kernels.module.cpu_calls import call_directly
from qcompiler.lowering.kernels.target import ON_A_CPU
from qcompiler.protocol import Artifact

__all__ = ["KernelCache", "KernelModel", "choose_dtype", "lower"]

_SMALLEST_CAPACITY = 256
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class KernelCache:
    """Keys and values so far.

    Attributes:
        tensors: in the order of the model's ``slots``; buffers have room for ``capacity`` tokens.
        start: int32 ``[1]`` on the device, ``length`` again, where kernels read it.
        length: tokens in the cache.
        capacity: tokens that buffers have room for.
    """

    tensors: list[Tensor]
    start: Tensor
    length: int
    capacity: int


class KernelModel(nn.Module):
    """Runs a graph with fused low-bit operators; an `qcompiler.protocol.artifact.Artifact`.

    `torch.compile` takes it, or ``module`` alone. Caches lie in buffers that tokens are written into; a buffer that is
    full is replaced by one of twice its size, of 256 tokens at least.

    Args:
        graph: a causal language model.
        device: where it runs.
        dtype: of activations.

    Attributes:
        module: the `torch.fx.GraphModule`: ``(ids, start, past, *caches)`` to ``(logits, *longer caches)``.
        slots: the caches that it takes.
        report: ``device``, ``dtype``, ``sites`` (how each linear layer is computed, and why not better), ``caches``,
            ``fused_norms``, ``neighbours``, ``notes``, and ``tuned`` where configurations were searched for.
        rounded: names of the graph's nodes whose values are rounded to ``dtype``; see `qcompiler.artifacts.with_noise`.

    Raises:
        InputError: if the graph takes no token ids, or returns no logits.
    """

    def __init__(self, graph: Graph, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        index = graph.signature.index_of_output("logits")
        if index is None or graph.signature.input("ids") is None:
            raise InputError(
                "this model does not predict next tokens",
                got=f"outputs {', '.join(port.name for port in graph.signature.outputs)}",
                expected="token ids and logits",
            )
        built = self._build(graph, device, dtype)
        self.module = built.module
        self.slots: tuple[Slot, ...] = built.slots
        self.device, self.dtype = device, dtype
        self.report: dict[str, Any] = {
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "sites": built.sites,
            "caches": built.caches,
            "fused_norms": built.fused_norms,
            "neighbours": built.neighbours,
            "notes": [],
        }
        companions = graph.provenance.get("companions")
        self.path: Path | None = Path(companions) if companions else None
        self.provenance: Mapping[str, object] = graph.provenance
        self.vocab_size = int(graph.signature.outputs[index].shape[-1])
        self.max_positions: int | None = declared_positions(graph.provenance.get("config"))
        self.has_cache = graph.signature.has_cache
        self.has_quantized_cache = graph.signature.has_quantized_cache
        per_token = (slot.heads * slot.width * slot.dtype.itemsize for slot in self.slots)
        self.cache_bytes_per_token: int | None = sum(per_token) if self.has_cache else None
        self.rounded: frozenset[str] = built.rounded
        self._limit: int | None = graph.provenance.get("limits", {}).get(SEQUENCE)
        self._stored_bytes = graph.weights.stored_bytes(graph.weight_names())

    def _build(self, graph: Graph, device: torch.device, dtype: torch.dtype) -> BuiltModule:
        return build_module(graph, device, dtype)

    def new_cache(self, batch: int, capacity: int = 0) -> KernelCache:
        """An empty cache with room for ``capacity`` tokens of ``batch`` sequences."""
        tensors = [
            torch.zeros(
                batch,
                slot.heads,
                capacity if slot.is_buffer else 0,
                slot.width,
                dtype=slot.dtype,
                device=self.device,
            )
            for slot in self.slots
        ]
        return KernelCache(tensors, torch.zeros(1, dtype=torch.int32, device=self.device), 0, capacity)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 logits ``[batch, length, vocab]`` of int64 ``[batch, length]``, without a cache."""
        return self._extend(ids, self.new_cache(ids.shape[0], ids.shape[1]))

    def prefill(self, ids: Tensor) -> tuple[Tensor, object]:
        """Logits of ``ids``, and the cache that holds them."""
        return self.step(ids, self.new_cache(ids.shape[0], max(_SMALLEST_CAPACITY, ids.shape[1])))

    def step(self, ids: Tensor, cache: object) -> tuple[Tensor, object]:
        """Logits of ``ids`` appended to the cache, which is changed in place."""
        assert isinstance(cache, KernelCache)
        self.make_room(cache, ids.shape[1])
        return self._extend(ids, cache), cache

    def make_room(self, cache: KernelCache, new: int) -> None:
        """Replaces the buffers of a cache if ``new`` tokens do not fit behind those it holds."""
        if cache.length + new > cache.capacity:
            self._grow(cache, cache.length + new)

    def capture_step(self, cache: object) -> CapturedStep:
        """Appends tokens to a cache by replaying a CUDA graph; not run on a GPU yet.

        Raises:
            TargetError: on another device, or if a step of this model asks something of the host.
        """
        assert isinstance(cache, KernelCache)
        return CapturedStep(self, cache)

    def generate(self, prompt: str, *, cuda_graph: bool = False, **options: Any) -> Any:
        """Continues a prompt, see `qcompiler.artifacts.generation.generate`.

        Args:
            prompt: text.
            cuda_graph: replay steps as CUDA graphs, see `capture_step`.
            options: of `qcompiler.artifacts.generation.generate`.

        Raises:
            InputError: if the model has no tokenizer beside it.
            TargetError: if steps cannot be captured.
        """
        from qcompiler.artifacts import generate, load_tokenizer

        if self.path is None:
            raise InputError(
                "this model has no tokenizer beside it", remedy="save it, and copy the tokenizer's files beside it"
            )
        artifact = cast(Artifact, CapturingModel(self)) if cuda_graph else self
        return generate(artifact, load_tokenizer(self.path), prompt, **options)

    def stored_bytes(self) -> int:
        """Bytes of all weight tensors of the graph as stored, tied ones once."""
        return self._stored_bytes

    def bits_per_weight(self) -> float:
        """Stored bits divided by the number of parameters of the original model."""
        parameters = self.provenance["parameters"]
        assert isinstance(parameters, int)
        return 8 * self._stored_bytes / parameters

    def _check(self, ids: Tensor) -> None:
        if self._limit is not None and ids.shape[1] > self._limit:
            raise InputError(
                "the text is longer than the model allows",
                got=f"{ids.shape[1]} tokens",
                expected=f"at most {self._limit}",
            )

    def _run(self, ids: Tensor, start: Tensor, past: int, *caches: Tensor) -> Sequence[Tensor]:
        found: Sequence[Tensor] = self.module(ids, start, past, *caches)
        return found

    def _extend(self, ids: Tensor, cache: KernelCache) -> Tensor:
        self._check(ids)
        with torch.no_grad():
            logits, *longer = self._run(ids.to(self.device), cache.start, cache.length, *cache.tensors)
            cache.start += ids.shape[1]
        rest = iter(longer)
        cache.tensors = [
            tensor if slot.is_buffer else next(rest) for slot, tensor in zip(self.slots, cache.tensors, strict=True)
        ]
        cache.length += ids.shape[1]
        return logits

    def _grow(self, cache: KernelCache, needed: int) -> None:
        capacity = max(_SMALLEST_CAPACITY, cache.capacity)
        while capacity < needed:
            capacity *= 2
        larger = self.new_cache(cache.tensors[0].shape[0] if cache.tensors else 1, capacity)
        for i, slot in enumerate(self.slots):
            if slot.is_buffer:
                larger.tensors[i][:, :, : cache.length] = cache.tensors[i][:, :, : cache.length]
                cache.tensors[i] = larger.tensors[i]
        cache.capacity = capacity


def choose_dtype(graph: Graph, device: torch.device, name: str | None) -> torch.dtype:
    """The dtype of activations.

    By default bfloat16 on a CPU, whose low-bit operators take no other; elsewhere bfloat16 where the source has it, and
    float16 otherwise.

    Raises:
        TargetError: for another than float32, float16 and bfloat16, or float16 on a CPU.
    """
    if name is not None:
        if name not in _DTYPES or (name == "float16" and device.type == "cpu"):
            expected = "bfloat16 or float32" if device.type == "cpu" else ", ".join(_DTYPES)
            raise TargetError("no dtype that kernels compute in", where="kernels", got=name, expected=expected)
        return _DTYPES[name]
    if device.type == "cpu":
        return torch.bfloat16
    stored = {graph.source_dtype(name) for name in graph.weight_names()}
    return torch.bfloat16 if "bfloat16" in stored else torch.float16


def lower(graph: Graph, *, device: torch.device, dtype: str | None = None, tune: bool = False) -> KernelModel:
    """Makes a model of a graph, which is not changed.

    Args:
        graph: quantized or not; a causal language model.
        device: where it will run.
        dtype: of activations: ``float32``, ``float16`` or ``bfloat16``; see `choose_dtype`.
        tune: search for the fastest launch configurations on this device, and keep them.

    Raises:
        InputError: if the graph takes no token ids, or returns no logits.
        TargetError: for a dtype or device that there are no kernels for.
    """
    model = KernelModel(graph, device, choose_dtype(graph, device, dtype))
    if device.type == "cpu":
        call_directly(model.module)
        model.report["notes"].append(ON_A_CPU)
    if tune and device.type == "cuda":
        from qcompiler.lowering.kernels.module import search

        model.report["tuned"] = {key: asdict(config) for key, config in search.tune(model).items()}
    elif tune:
        model.report["notes"].append("nothing to tune: operators have launch configurations on CUDA alone")
    return model
