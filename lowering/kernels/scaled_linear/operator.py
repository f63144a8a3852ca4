"""Linear layers of 8-bit activations: INT8 and FP8 weights, and INT4 weights in groups.

    y[m, n] = scale[m] * (Σ_g w_scale[n, g] * Σ_k∈g (codes[m, k] - zero[m]) * weight[n, k]) + bias[n]

Products and their sums are exact integers (INT8) or float32 (FP8); a zero point is taken off behind the product, by the
sums of the weight's rows, ``weight_sums[n] = Σ_k w_scale * weight``, computed once.

`scaled_linear_layout` says how weights are stored.

On the CPU, int8 weights are packed for ``onednn.qlinear_pointwise`` where the processor has VNNI: measured, it is the
fastest at any number of rows, and exact. Without VNNI its sums of 16
bits may saturate, and ``torch._int_mm`` takes its place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompiler import numerics
from qcompiler.errors import InputError, TargetError
from qcompiler.ir import Affine
from qcompiler.lowering.kernels.launch import library
from qcompiler.lowering.kernels.launch.device import Choice, Device
from qcompiler.lowering.kernels.scaled_linear.layout import (
    BLOCK,
    FLOAT8,
    GROUPS,
    check,
    outputs_of,
    pack_int4,
    weight_of,
)
from qcompiler.numerics import QuantSpec

__all__ = [
    "ScaledLinear",
    "choose",
    "scaled_linear_reference",
]


def scaled_linear_reference(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor | None,
    bias: Tensor | None,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """``linear(dequantize(codes), dequantize(weight), bias)`` in float32, rounded to ``dtype``.

    Args:
        codes: int8, uint8 or float8 ``[..., K]``.
        scale: float32 ``[..., 1]``, or of one element.
        zero_point: like ``scale``, integer; None where there is none.
        weight: as `scaled_linear_layout` says.
        weight_scale: as `scaled_linear_layout` says.
        weight_sums: float32 ``[N]``; not looked at.
        bias: ``[N]``.
        group: as `scaled_linear_layout` says.
        dtype: of the result.

    Returns:
        ``[..., N]``.
    """
    x = codes.float()
    if zero_point is not None:
        x = x - zero_point.float()
    wide = weight_of(weight, weight_scale, group, codes.shape[-1])
    return F.linear(x * scale, wide, None if bias is None else bias.float()).to(dtype)


def _cpu(*arguments: Any) -> Tensor:
    codes, scale, zero_point, weight, weight_scale, weight_sums, bias, group, dtype = arguments
    check(*arguments)
    rows = codes.reshape(-1, codes.shape[-1])
    outputs = outputs_of(weight)
    if len(rows) == 0:
        return torch.empty((*codes.shape[:-1], outputs), dtype=dtype)
    if group or weight.dtype != torch.int8:
        return scaled_linear_reference(*arguments)
    zero = None if zero_point is None else zero_point.reshape(-1, 1).float()
    if weight.is_mkldnn:  # takes unsigned codes; 128 more, and so has their zero point
        unsigned = rows if codes.dtype == torch.uint8 else rows.view(torch.uint8) ^ 0x80
        none = torch.zeros(outputs, dtype=torch.int32)
        y = torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, 128, weight, weight_scale, none, None, 1.0, 0, torch.float32, "none", [], ""
        )
    else:
        signed = (rows ^ 0x80).view(torch.int8) if codes.dtype == torch.uint8 else rows
        y = torch._int_mm(signed, weight.t()).float().mul_(weight_scale)
    if zero is not None:
        assert weight_sums is not None
        y.addcmul_(zero - 128 if codes.dtype == torch.uint8 else zero, weight_sums, value=-1)
    y.mul_(scale.reshape(-1, 1))
    if bias is not None:
        y.add_(bias)
    result: Tensor = y.to(dtype).view(*codes.shape[:-1], outputs)
    return result


def _cuda(*arguments: Any) -> Tensor:
    from qcompiler.lowering.kernels.scaled_linear.triton_launch import launch

    check(*arguments)
    with torch.cuda.device(arguments[0].device):  # Triton launches on the current device
        return launch(*arguments)


def _fake(*arguments: Any) -> Tensor:
    codes, weight, sums, dtype = arguments[0], arguments[3], arguments[5], arguments[8]
    outputs = outputs_of(weight) if sums is None else sums.shape[0]  # a traced weight does not say it is oneDNN's
    result: Tensor = codes.new_empty((*codes.shape[:-1], outputs), dtype=dtype)
    return result


library.define(
    "scaled_linear(Tensor codes, Tensor scale, Tensor? zero_point, Tensor weight, Tensor weight_scale, "
    "Tensor? weight_sums, Tensor? bias, int group, ScalarType dtype) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)
_ONEDNN = torch.library.Library("qcompiler_kernels", "IMPL")
_ONEDNN.impl("scaled_linear", _cpu, "MkldnnCPU")


def choose(
    weight: QuantSpec,
    activation: QuantSpec,
    out_features: int,
    in_features: int,
    device: Device,
    dtype: torch.dtype,
) -> Choice:
    """The implementation for a layer, or the reference and why.

    Args:
        weight: its number format.
        activation: that of its input.
        out_features, in_features: the shape of the weight.
        device: it runs on.
        dtype: of the result.
    """
    reason = _unknown_format(weight, activation)
    if reason:
        return Choice("reference", reason)
    if device.kind == "cpu":
        if weight.is_float:
            name = str(_cpu_float(dtype)).removeprefix("torch.")
            return Choice("reference", f"a CPU has no product of 8-bit floats: weights are dequantized to {name} once")
        if weight.dtype == "int8" and weight.granularity != "per_group":
            return Choice("cpu")
        return Choice("reference", f"PyTorch has no CPU operator for {weight} weights and 8-bit activations")
    if device.kind != "cuda":
        return Choice("reference", f"no kernels for {device.kind}")
    if not device.has_triton:
        return Choice("reference", "Triton is not installed")
    if device.capability < 80:
        return Choice("reference", f"compute capability {device.capability / 10} is below 8.0")
    if dtype not in (torch.float16, torch.bfloat16):
        return Choice("reference", f"the result is {str(dtype).removeprefix('torch.')}, not float16 or bfloat16")
    return Choice("triton")


def _unknown_format(weight: QuantSpec, activation: QuantSpec) -> str:
    """Why no operator here computes with these formats; empty if one does."""
    if weight.is_fp4 or activation.is_fp4:
        return "no kernel multiplies 4-bit floats"
    if weight.codebook:
        return "no kernel multiplies codebooks with 8-bit activations"
    if activation.granularity == "per_group":
        return f"no kernel multiplies inputs in groups of {activation.group_size}"
    if weight.is_float != activation.is_float:
        return f"no kernel multiplies {activation.dtype} with {weight.dtype}"
    if weight.is_float:
        if weight.dtype != activation.dtype:
            return f"no kernel multiplies {activation.dtype} with {weight.dtype}"
        if weight.granularity == "per_group":
            return "no kernel for 8-bit floats in groups of a row"
        if weight.granularity == "per_block" and weight.group_size != BLOCK:
            return f"blocks of {weight.group_size}: kernels know {BLOCK}"
        return ""
    if weight.bits not in (4, 8):
        return f"no kernel multiplies {weight.dtype} with 8-bit activations"
    if not weight.symmetric:
        return "weights with a zero point"
    if weight.granularity == "per_group" and weight.group_size not in GROUPS:
        return f"groups of {weight.group_size}: kernels know {', '.join(map(str, GROUPS))}"
    return ""


def _cpu_float(dtype: torch.dtype) -> torch.dtype:
    """What a CPU multiplies 8-bit floats in."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


class ScaledLinear(nn.Module):
    """A linear layer that takes codes of activations.

    Attributes:
        choice: the implementation, and why not a better one.
    """

    choice: Choice
    weight: Tensor | None
    weight_scale: Tensor
    weight_sums: Tensor | None
    weight_zero: Tensor | None
    bias: Tensor | None

    def __init__(self, choice: Choice, spec: QuantSpec, activation: QuantSpec, dtype: torch.dtype, width: int) -> None:
        super().__init__()
        self.choice, self.spec, self.activation, self.dtype, self.in_features = choice, spec, activation, dtype, width
        self.group = 0
        self._packed: Tensor | None = None  # of oneDNN, which can be neither copied nor saved

    @classmethod
    def from_weight(
        cls, weight: Affine, bias: Tensor | None, *, activation: QuantSpec, device: torch.device, dtype: torch.dtype
    ) -> "ScaledLinear":
        """Lays a weight out for the implementation that `choose` names.

        Args:
            weight: codes and scales.
            bias: ``[out]``.
            activation: the number format of what `forward` takes.
            device: to run on.
            dtype: of the result.

        Raises:
            TargetError: for activations in 4-bit floats, whose scales are not a number per token.
        """
        if activation.is_fp4:
            raise TargetError("activations are not one code and a scale per token", got=activation, expected="8 bits")
        outputs, width = weight.codes.shape
        choice = choose(weight.spec, activation, outputs, width, Device.of(device), dtype)
        layer = cls(choice, weight.spec, activation, dtype, width)
        layer.register_buffer("bias", None if bias is None else bias.to(device, dtype))
        if choice.implementation == "reference":
            layer._keep(weight, device)
        else:
            layer._lay_out(weight, device)
        return layer

    def _keep(self, weight: Affine, device: torch.device) -> None:
        spec = weight.spec
        zero = None if weight.zero_point is None else weight.zero_point.to(device)
        self.register_buffer("weight_zero", zero)
        self.register_buffer("weight_sums", None)
        if spec.is_float and not spec.is_fp4 and device.type == "cpu":
            wide = _cpu_float(self.dtype)
            per_row = spec.granularity != "per_block" and weight.scale.shape[1] == 1
            scale = weight.scale.expand(len(weight.codes), -1) if per_row else torch.ones(len(weight.codes), 1)
            self.register_buffer("weight_scale", scale[:, 0].contiguous())
            self.register_buffer("weight", weight.codes.to(wide) if per_row else weight.dequantize().to(wide))
            return
        codes = weight.codes if spec.bits == 8 else numerics.pack_bits(weight.codes, spec.bits)
        self.register_buffer("weight_scale", weight.scale.to(device))
        self.register_buffer("weight", codes.to(device))

    def _lay_out(self, weight: Affine, device: torch.device) -> None:
        spec, outputs = weight.spec, len(weight.codes)
        self.register_buffer("weight_zero", None)
        scale = weight.scale.float().expand(outputs, -1)
        if spec.granularity == "per_block":
            self.group, scale = BLOCK, scale[::BLOCK]
        elif spec.granularity == "per_group" and scale.shape[1] > 1:
            assert spec.group_size is not None
            self.group, scale = spec.group_size, scale.t()
        else:
            scale = scale[:, 0]
        self.register_buffer("weight_scale", scale.contiguous().to(device))
        sums = None if spec.is_float else weight.dequantize().sum(-1).to(device)
        self.register_buffer("weight_sums", sums)
        codes = pack_int4(weight.codes, self.group) if spec.bits == 4 else weight.codes.contiguous()
        if self.choice.implementation == "cpu" and _has_vnni():
            self.register_buffer("weight", None)
            self._packed = _prepack(codes)
        else:
            self.register_buffer("weight", codes.to(device))

    def forward(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        """The layer's output.

        Args:
            codes: ``[..., in]``: int8; uint8, with a zero point; or float8. int8 codes may have a zero point, too:
                uint8 ones less 128 are taken faster.
            scale: float32 ``[..., 1]``, or of one element where the range is static.
            zero_point: like ``scale``, of the dtype of the codes.

        Returns:
            ``[..., out]`` of the layer's dtype.

        Raises:
            InputError: for codes or scales of another shape or dtype.
        """
        if self.choice.implementation == "reference":
            return self._forward_reference(codes, scale, zero_point)
        result: Tensor = torch.ops.qcompiler_kernels.scaled_linear(
            codes,
            scale,
            zero_point,
            self.weight if self._packed is None else self._packed,
            self.weight_scale,
            self.weight_sums,
            self.bias,
            self.group,
            self.dtype,
        )
        return result

    def _forward_reference(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        assert self.weight is not None
        if codes.dim() == 0 or codes.shape[-1] != self.in_features:
            raise InputError(
                "activations and weight do not fit", got=list(codes.shape), expected=f"[..., {self.in_features}]"
            )
        if self.weight.is_floating_point() and self.weight.dtype not in FLOAT8:
            y = F.linear(codes.to(self.weight.dtype), self.weight).float() * self.weight_scale * scale
            return (y if self.bias is None else y + self.bias).to(self.dtype)
        x = codes.float() if zero_point is None else codes.float() - zero_point.float()
        spec, weight = self.spec, self.weight
        if spec.bits < 8:
            weight = numerics.unpack_bits(
                weight, spec.bits, self.in_features, signed=spec.symmetric and not spec.is_fp4
            )
        wide = numerics.dequantize(weight, self.weight_scale, self.weight_zero, spec)
        return F.linear(x * scale, wide, None if self.bias is None else self.bias.float()).to(self.dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is not None:
            destination[f"{prefix}weight"] = self._packed.to_dense().t().contiguous()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        if self._packed is not None:
            name, state_dict = f"{prefix}weight", dict(state_dict)
            if name in state_dict:
                self._packed = _prepack(state_dict.pop(name))
            elif strict:
                missing_keys.append(name)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._packed is not None:
            state["_packed"] = self._packed.to_dense().t().contiguous()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._packed is not None:
            self._packed = _prepack(self._packed)

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"in={self.in_features}, weight {self.spec}, activation {self.activation}, {self.choice.implementation}"


def _has_vnni() -> bool:
    return torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def _prepack(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
    return packed
