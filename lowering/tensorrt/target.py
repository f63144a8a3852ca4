"""What TensorRT makes of a quantized linear layer or cache, said before anything is calibrated."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from typing_extensions import Doc

from qcompiler.errors import TargetError
from qcompiler.frontend import import_with_onnx
from qcompiler.ir import CacheFormat, Graph
from qcompiler.lowering.onnx import OnnxTarget, check_onnxruntime, readers_of
from qcompiler.lowering.tensorrt.support import (
    check_float8_attention,
    check_float8_caches,
    support_of,
    support_of_cache,
    support_of_table,
)
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol import Artifact, Lowered, Progress, Support, Target

__all__ = ["TensorRTTarget"]

_WRITER = "qcompiler.lowering.tensorrt.writer"


@dataclass(frozen=True)
class TensorRTTarget(Target):
    """Engines by TensorRT's own builder, and the ONNX in forms that it fuses.

    Written with TensorRT for RTX 1.7, which builds for GPUs that need not be there. ``fused``: a kernel that multiplies
    codes, or dequantizes them as it multiplies; ``runs``: dequantized to ``float_dtype`` by a kernel of its own.

    Raises:
        TargetError: for compute capabilities that are no numbers, or have no attention in FP8 where that is asked for.
    """

    sm: Annotated[str, Doc("Compute capabilities to build for, such as 89, or several: 80+89.")] = "89"
    float_dtype: Annotated[
        Literal["float16", "bfloat16", "float32"],
        Doc("Of weights and activations; attention is fused in 16 bits alone."),
    ] = "float16"
    attention: Annotated[
        Literal["float", "fp8"], Doc("fp8: queries and the softmax are rounded, too, beside a kv-fp8-static cache.")
    ] = "float"
    length: Annotated[int | None, Doc("Tokens of a sequence; by default the model's, and at most 4096.")] = None
    batch: Annotated[int, Doc("Sequences at once.")] = 1
    profiles: Annotated[str | None, Doc("Sizes of inputs in words of their own, instead of those two.")] = None
    weight_streaming: Annotated[bool, Doc("Keep weights in host memory, for GPUs that they do not fit.")] = False
    strict: Annotated[bool, Doc("Fail if the builder fuses a quantized layer or an attention nowhere.")] = False

    name: ClassVar[str] = "tensorrt"
    main_file: ClassVar[str | None] = "layers.json"
    packages: ClassVar[Mapping[str, str]] = {
        "ml_dtypes": "ml_dtypes",
        "onnx": "onnx",
        "onnx_ir": "onnx-ir",
        "onnxruntime": "onnxruntime",
        "tensorrt_rtx": "tensorrt-rtx",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = self.sm.split("+")
        if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
            raise TargetError(
                "compute capabilities are numbers, each at most once",
                where="TensorRTTarget.sm",
                got=repr(self.sm),
                expected="such as 89, or 80+89",
            )
        if self.attention == "fp8":
            check_float8_attention(self.float_dtype, min(self.capabilities))

    @property
    def capabilities(self) -> tuple[int, ...]:
        """Compute capabilities to build for."""
        return tuple(int(part) for part in self.sm.split("+"))

    def supports(self, scheme: Scheme, width: int) -> Support:
        """What becomes of a linear layer of ``width`` input channels under ``scheme``, on the least of the GPUs."""
        return support_of(scheme, width, min(self.capabilities), self.float_dtype)

    def supports_cache(self, spec: CacheFormat) -> Support:
        """What becomes of a key-value cache: an input and an output of codes, dequantized ahead of attention."""
        return support_of_cache(spec, min(self.capabilities))

    def supports_table(self, spec: QuantSpec, width: int) -> Support:
        """What becomes of an embedding table: codes in the plan, dequantized as rows of them are read."""
        return support_of_table(spec, width, min(self.capabilities))

    def check_cached(self, formats: Mapping[str, CacheFormat | None]) -> None:
        """Refuses attention in FP8 on caches that are not FP8 codes with one calibrated scale.

        Raises:
            TargetError: that names the first.
        """
        if self.attention == "fp8":
            check_float8_caches(formats)

    def check_graph(self, graph: Graph) -> None:
        """Refuses operators without an ONNX form, GPUs that the builder does not know, and profiles that do not hold.

        Where attention is to be in FP8, also models none of whose attentions have a kernel for that.

        Raises:
            TargetError: that names them.
            MissingDependencyError: without the packages that write ONNX and run it to compare. TensorRT itself may be
                missing: the ONNX is written all the same.
        """
        check_onnxruntime()
        import_with_onnx(_WRITER).check(graph, self)

    def lower(self, graph: Graph, directory: Path | None) -> Lowered:
        """Writes the ONNX, builds an engine for each compute capability, and says which layer everything went to."""
        assert directory is not None
        return self.lower_showing(graph, directory, lambda done, total, what: None)

    def lower_showing(self, graph: Graph, directory: Path, progress: Progress) -> Lowered:
        """`lower`, saying how far the builder is."""
        writer = import_with_onnx(_WRITER)
        report = writer.write(graph, directory, self, progress)
        readers = readers_of(directory, self.float_dtype, _evaluated, has_kernels=report["runs_in_onnxruntime"])
        rounded = writer.rounded_by_attention(graph, self)
        if rounded:
            readers = [replace(reader, dtype=torch.float8_e4m3fn, rounded=rounded) for reader in readers]
        elif self.float_dtype == "bfloat16":
            computed = [node.name for node in graph.fx.nodes if node.op == "call_function"]
            readers = [replace(reader, dtype=torch.bfloat16, rounded=computed) for reader in readers]
        return Lowered(report, readers=readers)

    @classmethod
    def open(cls, directory: Path, *, exact: bool, device: str) -> Artifact:
        """The ONNX that engines are built of, by ONNX Runtime on a CPU."""
        return OnnxTarget.open(directory, exact=exact, device=device)

    @classmethod
    def wrote(cls, directory: Path) -> bool:
        """By the producer of the ONNX, beside a list of layers."""
        return (directory / "layers.json").is_file() and OnnxTarget.wrote(directory)


def _evaluated(directory: Path) -> Artifact:
    from qcompiler.lowering.onnx.reference import Float16Artifact
    from qcompiler.lowering.tensorrt.reference import OPERATORS

    return Float16Artifact(directory, operators=OPERATORS)
