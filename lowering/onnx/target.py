"""What ONNX Runtime makes of a quantized linear layer, said before anything is calibrated."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from typing_extensions import Doc

from qcompiler.errors import InputError, MissingDependencyError, TargetError
from qcompiler.frontend import import_with_onnx
from qcompiler.ir import CacheFormat, Graph
from qcompiler.lowering.onnx.reader import OnnxArtifact, OnnxModule
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol import Artifact, Lowered, Reader, RunsInputs, Support, Target, choose_device

__all__ = ["OPSETS", "OnnxTarget", "by_onnxruntime", "check_onnxruntime", "readers_of"]

_WRITER = "qcompiler.lowering.onnx.writer"

OPSETS = {21: 10, 22: 10, 23: 11, 24: 12, 25: 13}
"""Operator sets that can be written, and the IR version each goes with."""

_SMALLEST_FUSED_BLOCK = 16
_FLOAT16_TOKENS = 16  # evaluated operator by operator, which is slow


@dataclass(frozen=True)
class OnnxTarget(Target):
    """ONNX with standard QuantizeLinear and DequantizeLinear, run by ONNX Runtime.

    Runtime facts are those of ONNX Runtime 1.32 on a CPU, seen in the graphs it makes:

    * weights alone: ``DequantizeLinear → MatMul`` becomes one ``MatMulNBits`` where the block is a power of two of at
      least 16, or a scale serves a whole channel or tensor;
    * int8 weights, one scale per channel or tensor, and int8 activations, one scale per tensor:
      ``MatMulIntegerToFloat``, or ``DynamicQuantizeMatMul`` where the range is dynamic and has a zero point; in
      float32, for inputs of more than two dimensions (others with a bias become a float Gemm);
    * everything else that rounds activations: computed in float from dequantized values, exactly.

    Raises:
        TargetError: for an operator set that cannot be written.
    """

    opset: Annotated[int, Doc("The ONNX operator set, 21 to 25; from 25 on, 2-bit codes take 2 bits.")] = 21
    float_dtype: Annotated[
        Literal["float32", "float16"], Doc("Of weights and activations; logits are float32 in either.")
    ] = "float32"

    int8_weights: Annotated[
        Literal["uint8", "int8"],
        Doc(
            "What 8-bit weights that meet 8-bit activations are stored as: the same numbers, but integer products of "
            "int8 are wrong on x86 processors without VNNI, where they saturate. Elsewhere int8 may be faster."
        ),
    ] = "uint8"

    name: ClassVar[str] = "onnx"
    main_file: ClassVar[str | None] = "model.onnx"
    packages: ClassVar[Mapping[str, str]] = {
        "ml_dtypes": "ml_dtypes",
        "onnx": "onnx",
        "onnx_ir": "onnx-ir",
        "onnxruntime": "onnxruntime",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opset not in OPSETS:
            raise TargetError(
                "this operator set cannot be written",
                got=self.opset,
                expected=f"{min(OPSETS)} (the first with blocked int4 weights) to {max(OPSETS)} (the last of TensorRT)",
            )

    @property
    def ir_version(self) -> int:
        """The ONNX IR version written."""
        return OPSETS[self.opset]

    def supports(self, scheme: Scheme, width: int) -> Support:
        """What becomes of a linear layer of ``width`` input channels under ``scheme``."""
        if any(spec is not None and spec.is_fp4 for spec in (scheme.weight, scheme.activation)):
            return Support(
                "refused",
                "4-bit floats: ONNX Runtime has no kernel for them on a CPU",
                "choose 4-bit integers (w4a16, w4a8)",
            )
        if scheme.activation is not None:
            return self._supports_both(scheme.weight, scheme.activation, width)
        return Support("fused") if scheme.weight is None else self._supports_weight(scheme.weight, width)

    def supports_cache(self, spec: CacheFormat) -> Support:
        """What becomes of a key-value cache: right in every format, dequantized as a whole in every step."""
        reason = f"cache of {spec}: dequantized ahead of attention"
        if spec.is_float:
            reason += ", and turned to float and back where it grows: there is no Concat of float8"
        elif spec.is_packed:
            reason += ", its bytes taken apart by bit operations"
        return Support("runs", reason)

    def check_graph(self, graph: Graph) -> None:
        """Refuses what has no ONNX form, by emitting all but the weights.

        Raises:
            TargetError: for operators, dtypes or sizes.
            InputError: if a file that goes beside the model cannot be read.
            MissingDependencyError: without the packages that write ONNX, and run it to compare.
        """
        check = import_with_onnx(_WRITER).check
        check_onnxruntime()
        check(graph, self)

    def lower(self, graph: Graph, directory: Path | None) -> Lowered:
        """Writes an ONNX folder, see `qcompiler.lowering.onnx.lower`."""
        assert directory is not None
        report = import_with_onnx(_WRITER).write(graph, directory, self)
        return Lowered(report, readers=readers_of(directory, self.float_dtype, _in_float16))

    @classmethod
    def open(cls, directory: Path, *, exact: bool, device: str) -> Artifact:
        """ONNX Runtime on a CPU; not ``exact``: it rounds activations to int8 where that is faster."""
        if choose_device(device).type != "cpu":
            raise InputError("ONNX models run on the CPU", where=directory, got=device, expected="cpu")
        return OnnxArtifact(directory, accuracy_level=1 if exact else 4)

    @classmethod
    def wrote(cls, directory: Path) -> bool:
        """By the producer, which comes first in the file."""
        try:
            with open(directory / "model.onnx", "rb") as file:
                return b"qcompiler" in file.read(64)
        except OSError:
            return False

    def _supports_weight(self, spec: QuantSpec, width: int) -> Support:
        if spec.group_size == 1 < width:
            return Support(
                "refused", "one scale per weight takes more room than the weight", "choose groups of 16 or more"
            )
        widened = self._widened(spec)
        if spec.codebook:
            reason = "a codebook: stored as it is, made a float weight when the model is loaded"
            return Support("runs", f"{reason}; {widened}" if widened else reason)
        if spec.is_float:
            return Support("runs", f"{spec.dtype} weights: dequantized anew in every run, multiplied in float")
        if spec.group_size is None or spec.group_size >= width:
            return Support("fused", widened)
        group = spec.group_size
        if group & (group - 1) or group < _SMALLEST_FUSED_BLOCK:
            reason = (
                f"groups of {group}: ONNX Runtime fuses powers of two from {_SMALLEST_FUSED_BLOCK} on; "
                "others are dequantized anew in every run"
            )
            return Support("runs", f"{reason}; {widened}" if widened else reason)
        return Support("fused", widened)

    def _supports_both(self, weight: QuantSpec | None, activation: QuantSpec, width: int) -> Support:
        if weight is None:
            return Support("runs", "float weights: the product of rounded activations is computed in float")
        if weight.group_size == 1 < width:
            return self._supports_weight(weight, width)
        if (activation.is_float or weight.is_float) and activation.granularity != "per_group":
            kinds = " and ".join(dict.fromkeys((weight.dtype, activation.dtype)))
            return Support("runs", f"{kinds}: no such product on a CPU; dequantized, multiplied in float")
        if activation.granularity == "per_group":
            if width % activation.group_of(width):
                return Support(
                    "refused",
                    f"inputs in groups of {activation.group_size}, which do not divide {width} channels",
                    "choose ranges per token (-dynamic)",
                )
            return Support("runs", "one scale per token and group: dequantized, multiplied in float")
        if activation.granularity == "per_token" and not activation.symmetric and weight.bits == 8:
            return Support(
                "refused",
                "zero points per token with int8 weights: ONNX Runtime makes an integer product that takes one per "
                "tensor",
                "choose symmetric codes per token (-actsym), or one range per tensor (-dyntensor)",
            )
        if activation.granularity == "per_token":
            return Support("runs", "one scale per token: dequantized, multiplied in float; one per tensor is fused")
        is_grouped = weight.group_size is not None and weight.group_size < width
        if weight.bits == 8 and is_grouped:
            return Support(
                "refused",
                "int8 weights in groups with int8 activations: ONNX Runtime makes an integer product that takes one "
                "scale per channel",
                "choose scales per channel (-channel), or dynamic ranges per token (-dynamic)",
            )
        if weight.bits < 8:
            reason = f"int{weight.bits} weights with int8 activations: dequantized, multiplied in float"
            widened = self._widened(weight)
            return Support("runs", f"{reason}; {widened}" if widened else reason)
        if self.float_dtype != "float32":
            return Support("runs", "integer products give float32 only: in float16 dequantized, multiplied in float")
        return Support("fused")

    def _widened(self, spec: QuantSpec) -> str:
        if spec.bits == 3 or (spec.bits == 2 and self.opset < 25):
            return f"{spec.bits}-bit codes are stored in 4 bits: exact, but larger than they need be"
        return ""


def readers_of(
    directory: Path,
    float_dtype: str,
    in_float16: Callable[[Path], Artifact],
    *,
    has_kernels: bool = True,
    whole: Callable[[Path], Artifact] = OnnxArtifact,
    module: Callable[[Path], RunsInputs] = OnnxModule,
) -> list[Reader]:
    """What a folder is compared by: ONNX Runtime, and where there is float16, which that does not compute in on a CPU,
    or it has no kernels for what is in it, an evaluation operator by operator on a few tokens. ``whole`` is what runs
    a folder that is not run in pieces, ``module`` what runs one that takes no token ids.
    """
    is_half = float_dtype == "float16"
    tolerance, dtype = (2e-2, torch.float16) if is_half else (1e-3, torch.float32)
    readers = []
    if has_kernels:
        readers.append(
            Reader(
                lambda: by_onnxruntime(directory, whole),
                tolerance=tolerance,
                dtype=dtype,
                open_for_inputs=lambda: module(directory),
            )
        )
    if is_half or not has_kernels:
        readers.append(
            Reader(
                lambda: in_float16(directory),
                "float16_parity" if has_kernels else "parity",
                tolerance=tolerance,
                dtype=dtype,
                tokens=(1, _FLOAT16_TOKENS),
                held_out_tokens=_FLOAT16_TOKENS,
            )
        )
    return readers


def by_onnxruntime(directory: Path, whole: Callable[[Path], Artifact] = OnnxArtifact) -> Artifact:
    """What runs a folder to compare it: as a ``whole``, or in pieces where it is large."""
    from qcompiler.lowering.onnx.streamed import PIECE_BYTES, StreamedOnnxArtifact

    size = sum(file.stat().st_size for file in directory.glob("model.onnx*"))
    return whole(directory) if size <= PIECE_BYTES else StreamedOnnxArtifact(directory)


def _in_float16(directory: Path) -> Artifact:
    from qcompiler.lowering.onnx.reference import Float16Artifact

    return Float16Artifact(directory)


def check_onnxruntime() -> None:
    """Refuses to write what cannot be run to compare it.

    Raises:
        MissingDependencyError: without ONNX Runtime.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingDependencyError(
            "what is written as ONNX is run to compare it, and ONNX Runtime is not installed",
            remedy="pip install onnxruntime",
        )
