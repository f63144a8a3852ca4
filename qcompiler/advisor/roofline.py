"""Bounds of time: what must be read over the bandwidth, what must be multiplied over the rate; the larger one holds.

Source: Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009. Bounds are lower ones: no engine is faster, and
none reaches them; communication between GPUs is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

from qcompiler.advisor.hardware import Hardware
from qcompiler.advisor.shapes import ModelShape
from qcompiler.numerics import Scheme

__all__ = ["Step", "decode_step", "operand_type", "prefill_seconds", "read_seconds", "stops_paying", "touched"]

_LARGEST_BATCH = 1 << 16


@dataclass(frozen=True)
class Step:
    """The bound of one step.

    Attributes:
        seconds: the larger of the two.
        reading: seconds for the bytes.
        computing: seconds for the products; None: the rate is unknown.
    """

    reading: float
    computing: float | None

    @property
    def seconds(self) -> float:
        """The bound."""
        return max(self.reading, self.computing or 0.0)

    @property
    def is_compute_bound(self) -> bool:
        """Whether products take longer than reading."""
        return self.computing is not None and self.computing > self.reading


def read_seconds(size: float, bandwidth: float) -> float:
    """Seconds to read so many bytes at bytes per second."""
    return size / bandwidth


def operand_type(scheme: Scheme, hardware: Hardware) -> str:
    """What layers of a scheme are multiplied in: weights alone are dequantized, and multiplied as floats."""
    weight, activation = scheme.weight, scheme.activation
    if weight is None or activation is None:
        return hardware.float_type
    if weight.is_fp4 and activation.is_fp4:
        return "float4"
    if activation.is_float:
        return "float8"
    return f"int{max(weight.bits, activation.bits)}" if max(weight.bits, activation.bits) in (4, 8) else "int8"


def touched(shape: ModelShape, batch: int) -> float:
    """The share of experts that a step reads: each of ``batch`` tokens goes to ``active`` of them, chosen evenly."""
    return 1 - (1 - shape.active / shape.experts) ** batch


def decode_step(
    shape: ModelShape,
    hardware: Hardware,
    operands: str,
    *,
    weights: float,
    experts: float,
    table: float,
    cache: float,
    context: int,
    batch: int,
    gpus: int = 1,
) -> Step:
    """The bound of one new token for each of ``batch`` sequences.

    Args:
        shape: of the model.
        hardware: of each GPU.
        operands: that layers are multiplied in.
        weights: bytes that one GPU holds.
        experts: bytes of experts among these.
        table: bytes of the embedding among these, of which a step reads single rows; 0 where it is the head as well.
        cache: bytes that one GPU holds, all of which are read.
        context: tokens of each sequence.
        batch: sequences.
        gpus: that share the work.
    """
    read = weights - table - experts * (1 - touched(shape, batch)) + cache
    products = _product_seconds(shape, hardware, operands, batch, gpus)
    attention = _attention_seconds(shape, hardware, batch * context, gpus)
    computing = None if products is None or attention is None else products + attention
    return Step(read_seconds(read, hardware.bandwidth), computing)


def prefill_seconds(
    shape: ModelShape, hardware: Hardware, operands: str, *, tokens: int, batch: int, gpus: int = 1
) -> float | None:
    """The bound of ``batch`` prompts of so many tokens, each of which attends to half of its prompt on average; None
    where a rate is unknown.
    """
    products = _product_seconds(shape, hardware, operands, batch * tokens, gpus)
    attention = _attention_seconds(shape, hardware, batch * tokens * (tokens + 1) / 2, gpus)
    return None if products is None or attention is None else products + attention


def _product_seconds(shape: ModelShape, hardware: Hardware, operands: str, rows: int, gpus: int) -> float | None:
    """Two operations for each weight and row; the head is multiplied in floats."""
    rate, float_rate = hardware.rate(operands), hardware.rate(hardware.float_type)
    if rate is None or float_rate is None:
        return None
    head = shape.vocab * shape.hidden
    return 2 * rows * ((shape.multiplied - head) / rate + head / float_rate) / gpus


def _attention_seconds(shape: ModelShape, hardware: Hardware, pairs: float, gpus: int) -> float | None:
    """Two products of queries, keys and values, two operations each, for each pair of tokens, in floats."""
    rate = hardware.rate(hardware.float_type)
    layers = shape.cached_layers + shape.windowed_layers
    return None if rate is None else 4 * pairs * shape.heads * shape.head_dim * layers / rate / gpus


def stops_paying(narrow: Callable[[int], float], wide: Callable[[int], float]) -> int | None:
    """The smallest batch at which a narrow format is no longer faster than a wide one that is multiplied faster.

    Args:
        narrow, wide: seconds of a step by the batch; once the narrow one is slower, it stays so.

    Returns:
        None where it is faster at every batch up to 65536.
    """
    if narrow(_LARGEST_BATCH) < wide(_LARGEST_BATCH):
        return None
    below, above = 0, _LARGEST_BATCH
    while above - below > 1:
        middle = (below + above) // 2
        if narrow(middle) < wide(middle):
            below = middle
        else:
            above = middle
    return above
