"""Linear layers with low-bit weights and floating point activations: the operator, its choice, and the layer.

``weight_only_linear`` computes ``x @ W.T + bias`` with ``W = (codes - zero_point) * scale``, scale and zero point being
shared by ``group`` input channels of an output channel. It takes weights in one of these layouts:

| layout | device | weight | scale |
|---|---|---|---|
| ``tiles`` | CUDA: fused; CPU: dequantized | uint8, `weight_only_layout.Layout` | ``[groups, out]``, any float dtype |
| ``int4pack``, ``int8pack`` | CPU | those of PyTorch's operators, `weight_only_cpu` | bfloat16 |
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler import numerics
from qcompiler.errors import InputError, TargetError
from qcompiler.ir import Affine
from qcompiler.lowering.kernels.launch import library
from qcompiler.lowering.kernels.launch.device import Choice, Device
from qcompiler.lowering.kernels.weight_only import cpu as weight_only_cpu
from qcompiler.lowering.kernels.weight_only.layout import Layout
from qcompiler.numerics import QuantSpec

__all__ = ["WeightOnlyLinear", "choose", "weight_only_linear_reference"]

_SLICE_ELEMENTS = 1 << 22  # of a weight that are dequantized at once where no kernel is fused
_SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def choose(spec: QuantSpec, out_features: int, in_features: int, device: Device, dtype: torch.dtype) -> Choice:
    """The implementation for a weight ``[out_features, in_features]`` of a format, and activations of ``dtype``."""
    if spec.is_float or spec.codebook:
        return Choice("reference", f"no kernel for {spec} weights and {_name(dtype)} activations")
    group = spec.group_of(in_features)
    if device.kind == "cpu":
        obstacle = weight_only_cpu.obstacle(spec.bits, spec.symmetric, group, out_features, in_features, dtype)
        note = f"{spec.bits}-bit codes held in 4 bits: PyTorch has no narrower operator" if spec.bits < 4 else ""
        return Choice("reference", obstacle) if obstacle else Choice("cpu", note)
    if device.kind != "cuda":
        return Choice("reference", f"no kernel for devices of kind {device.kind}")
    if not device.has_triton:
        return Choice("reference", "Triton is not installed")
    if device.capability < 80:
        return Choice("reference", f"compute capability {device.capability / 10}; the kernels need 8.0")
    if dtype not in (torch.float16, torch.bfloat16):
        return Choice("reference", f"{_name(dtype)} activations; the kernels take float16 and bfloat16")
    if not Layout.fits(group, in_features):
        return Choice("reference", f"groups of {group}; the kernels take multiples of 32")
    return Choice("triton")


def weight_only_linear_reference(
    x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int, group: int
) -> Tensor:
    """The operator in float32, for weights in tiles; the result in the dtype of ``x``.

    Args:
        x: float ``[rows, in]``.
        packed: uint8 ``[tiles, out, bytes]``.
        scale: float ``[groups, out]``.
        zero_point: uint8, the shape of ``scale``, in units of stored codes; None: ``2^(bits - 1)``.
        bias: ``[out]`` or None.
        bits: of one code.
        group: input channels that share a scale; at least ``in``: all.

    Returns:
        ``[rows, out]``.
    """
    width = x.shape[1]
    layout = Layout.of(bits, group, width)
    result = x.new_empty(x.shape[0], packed.shape[1])
    step = max(1, _SLICE_ELEMENTS // width)
    for start in range(0, packed.shape[1], step):
        part = slice(start, start + step)
        zero = 1 << (bits - 1) if zero_point is None else _columns(zero_point[:, part], width, group)
        weight = (layout.unpack(packed[:, part], width).float() - zero) * _columns(scale[:, part], width, group)
        result[:, part] = F.linear(x.float(), weight, None if bias is None else bias[part].float()).to(x.dtype)
    return result


def _columns(qparams: Tensor, width: int, group: int) -> Tensor:
    """``[groups, out]`` → float32 ``[out, width]``."""
    return numerics.expand_groups(qparams.float().T, width, group)


class WeightOnlyLinear(nn.Module):
    """``x @ W.T + bias`` with low-bit ``W``.

    Attributes:
        choice: the implementation that runs.
        layout: of the weight: one of the table above, or ``rows``, codes that are dequantized.
        group: input channels that share a scale.
        weight, scale, zero_point, bias: buffers, in the layout of that implementation.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        choice: Choice,
        spec: QuantSpec,
        in_features: int,
        out_features: int,
        layout: str,
        group: int,
        buffers: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    ) -> None:
        super().__init__()
        self.choice = choice
        self.spec = spec
        self.in_features = in_features
        self.out_features = out_features
        self.layout = layout
        self.group = group
        for name, buffer in zip(("weight", "scale", "zero_point", "bias"), buffers, strict=True):
            self.register_buffer(name, buffer)

    @classmethod
    def from_weight(
        cls, weight: Affine, bias: Tensor | None, *, device: torch.device, dtype: torch.dtype
    ) -> "WeightOnlyLinear":
        """A layer on ``device`` for activations of ``dtype``; whatever is not fused is dequantized as it runs.

        Args:
            weight: ``[out, in]``.
            bias: ``[out]`` or None.
            device: where the layer will run.
            dtype: of activations, result and bias.
        """
        spec = weight.spec
        out_features, in_features = weight.codes.shape
        choice = choose(spec, out_features, in_features, Device.of(device), dtype)
        group = spec.group_of(in_features)
        if choice.implementation == "triton":
            layout = "tiles"
            packed, scale, zero_point = pack_tiles(weight)
        elif choice.implementation == "cpu":
            layout, group, packed, scale = weight_only_cpu.pack(weight)
            zero_point = None
        else:
            layout = "rows"
            is_narrow = spec.bits < 8 and not spec.is_float
            packed = numerics.pack_bits(weight.codes, spec.bits) if is_narrow else weight.codes
            scale, zero_point = weight.scale, weight.zero_point
        buffers = (packed, scale, zero_point, None if bias is None else bias.to(dtype))
        moved = tuple(None if buffer is None else buffer.to(device).contiguous() for buffer in buffers)
        return cls(
            choice,
            spec,
            in_features,
            out_features,
            layout,
            group,
            cast(tuple[Tensor, Tensor, Tensor | None, Tensor | None], moved),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Activations ``[..., in]`` → ``[..., out]`` of the same dtype."""
        rows = x.reshape(-1, self.in_features)
        if self.layout == "rows":
            result = self._dequantized(rows)
        else:
            result = torch.ops.qcompiler_kernels.weight_only_linear(
                rows.contiguous(),
                self.weight,
                self.scale,
                self.zero_point,
                self.bias,
                self.spec.bits,
                self.group,
                self.layout,
            )
        return result.reshape(*x.shape[:-1], self.out_features)

    def _dequantized(self, x: Tensor) -> Tensor:
        """A slice of output channels after another: dequantized in float32, multiplied in the dtype of ``x``."""
        spec, width = self.spec, self.in_features
        result = x.new_empty(x.shape[0], self.out_features)
        step = max(1, _SLICE_ELEMENTS // width)
        for start in range(0, self.out_features, step):
            part = slice(start, start + step)
            codes = self.weight[part]
            if codes.shape[1] != width or (spec.bits < 8 and not spec.is_float):
                codes = numerics.unpack_bits(codes, spec.bits, width, signed=spec.symmetric)
            scale, zero = (t if t is None or len(t) == 1 else t[part] for t in (self.scale, self.zero_point))
            values = numerics.dequantize(codes, cast(Tensor, scale), zero, spec).to(x.dtype)
            result[:, part] = F.linear(x, values, None if self.bias is None else self.bias[part])
        return result

    def extra_repr(self) -> str:
        """Shape, format and implementation, as printed with a module."""
        return f"{self.in_features}, {self.out_features}, {self.spec}, {self.choice.implementation}"


def pack_tiles(weight: Affine) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight as fused kernels read it: packed codes, scale ``[groups, out]`` as stored, uint8 zero points or None."""
    spec = weight.spec
    out_features, in_features = weight.codes.shape
    layout = Layout.of(spec.bits, spec.group_of(in_features), in_features)
    codes = weight.codes
    if spec.symmetric:
        codes = (codes.view(torch.uint8) + (1 << (spec.bits - 1))) & ((1 << spec.bits) - 1)
    scale = weight.scale.to(weight.scale_dtype).expand(out_features, -1).T.contiguous()
    if weight.zero_point is None:
        return layout.pack(codes), scale, None
    return layout.pack(codes), scale, weight.zero_point.expand(out_features, -1).T.contiguous()


def _out_features(packed: Tensor, layout: str) -> int:
    return packed.shape[1 if layout == "tiles" else 0]


def _check(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    layout: str,
) -> None:
    """Refuses what no implementation can read.

    Raises:
        InputError: saying which tensor, what it is and what it should be.
    """
    if x.dim() != 2 or x.dtype not in _SCALE_DTYPES:
        raise _error("activations", x, "[rows, in] of float16, bfloat16 or float32")
    if bits not in (2, 3, 4, 8) or group < 1:
        raise InputError("weight_only_linear: no such format", got=f"{bits} bits, groups of {group}")
    width, out = x.shape[1], _out_features(packed, layout)
    if layout == "tiles":
        if not Layout.fits(group, width):
            raise InputError(
                "weight_only_linear: groups do not fit the layout", got=group, expected="a multiple of 32, or one group"
            )
        order = Layout.of(bits, group, width)
        shape = (order.tiles(width), out, order.tile_bytes)
        groups = -(-width // group)
        if packed.dtype != torch.uint8 or packed.shape != shape:
            raise _error("packed weights", packed, f"uint8 {list(shape)}")
        if scale.dtype not in _SCALE_DTYPES or scale.shape != (groups, out):
            raise _error("scales", scale, f"float {[groups, out]}")
        if zero_point is not None and (zero_point.dtype != torch.uint8 or zero_point.shape != scale.shape):
            raise _error("zero points", zero_point, f"uint8 {list(scale.shape)}")
    else:
        weight_only_cpu.check(x, packed, scale, zero_point, group, layout)
    if bias is not None and (bias.shape != (out,) or bias.dtype != x.dtype):
        raise _error("bias", bias, f"{_name(x.dtype)} [{out}]")
    for name, tensor in (
        ("activations", x),
        ("packed weights", packed),
        ("scales", scale),
        ("zero points", zero_point),
        ("bias", bias),
    ):
        if tensor is not None and tensor is not bias and not tensor.is_contiguous():
            raise InputError(
                "weight_only_linear: a tensor is not contiguous", where=name, got=f"strides {list(tensor.stride())}"
            )
        if tensor is not None and tensor.device != x.device:
            raise InputError("weight_only_linear: tensors on two devices", where=name, got=tensor.device)


def _error(name: str, tensor: Tensor, expected: str) -> InputError:
    got = f"{_name(tensor.dtype)} {list(tensor.shape)}"
    return InputError(
        "weight_only_linear: a tensor of the wrong shape or dtype", where=name, got=got, expected=expected
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fake(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    layout: str,
) -> Tensor:
    return x.new_empty(x.shape[0], _out_features(packed, layout))


def _cpu(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    layout: str,
) -> Tensor:
    _check(x, packed, scale, zero_point, bias, bits, group, layout)
    if layout == "tiles":
        return weight_only_linear_reference(x, packed, scale, zero_point, bias, bits, group)
    return weight_only_cpu.launch(x, packed, scale, bias, group, layout)


def _cuda(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    layout: str,
) -> Tensor:
    _check(x, packed, scale, zero_point, bias, bits, group, layout)
    if layout != "tiles":
        raise TargetError("weight_only_linear: a layout for the CPU", got=layout, expected="tiles")
    device = Device.of(x.device)
    if device.capability < 80:
        raise TargetError("weight_only_linear: the device is too old", got=device.name, expected="capability 8.0")
    if x.dtype == torch.float32:
        return weight_only_linear_reference(x, packed, scale, zero_point, bias, bits, group)
    from qcompiler.lowering.kernels.weight_only import triton_launch as weight_only_triton

    with torch.cuda.device(x.device):  # Triton launches on the current device
        return weight_only_triton.launch(x, packed, scale, zero_point, bias, bits, group)


library.define(
    "weight_only_linear(Tensor x, Tensor packed, Tensor scale, Tensor? zero_point, Tensor? bias, int bits, int group, "
    "str layout) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)
