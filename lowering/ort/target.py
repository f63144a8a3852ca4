"""What ONNX Runtime's own operators make of a quantized model, said before anything is calibrated."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from typing_extensions import Doc

from qcompiler.errors import InputError
from qcompiler.frontend import import_with_onnx
from qcompiler.ir import CacheFormat, Graph
from qcompiler.lowering.onnx import OnnxTarget, check_onnxruntime, readers_of
from qcompiler.lowering.ort.support import support_of, support_of_cache, support_of_table
from qcompiler.numerics import QuantSpec, Scheme
from qcompiler.protocol import Artifact, Lowered, Support, Target, Within, choose_device

__all__ = ["OrtTarget"]

_WRITER = "qcompiler.lowering.ort.writer"


@dataclass(frozen=True)
class OrtTarget(Target):
    """ONNX Runtime's own operators: the fastest on its CPU, and the folder that onnxruntime-genai runs.

    ``fused``: MatMulNBits for weights, GroupQueryAttention for attention and caches, GatherBlockQuantized for tables.
    What those do not hold is written as by the target ``onnx``. Facts are those of ONNX Runtime 1.32 on a CPU.

    Raises:
        TargetError: for an option it does not take.
    """

    accuracy_level: Annotated[
        Literal["auto", 0, 1, 2, 3, 4],
        Doc(
            "What weight products round activations to: 4 is int8, fastest; 0 leaves them as they are. auto takes 4 "
            "where the divergence it makes on held-out text is below 0.005 nats per token, else 0."
        ),
    ] = "auto"
    float_dtype: Annotated[Literal["float32", "float16"], Doc("Of weights and activations; float16 is for CUDA.")] = (
        "float32"
    )
    length: Annotated[
        int | None, Within(1), Doc("Tokens that a sequence may have; by default as many as the model has positions.")
    ] = None

    name: ClassVar[str] = "ort"
    main_file: ClassVar[str | None] = "ort.json"
    packages: ClassVar[Mapping[str, str]] = OnnxTarget.packages

    def supports(self, scheme: Scheme, width: int) -> Support:
        """What becomes of a linear layer of ``width`` input channels under ``scheme``."""
        return support_of(scheme, width, self.float_dtype)

    def supports_cache(self, spec: CacheFormat) -> Support:
        """What becomes of a key-value cache: kept by the attention itself, or dequantized in every step."""
        return support_of_cache(spec, self.float_dtype)

    def supports_table(self, spec: QuantSpec, width: int) -> Support:
        """What becomes of an embedding table: rows are dequantized as they are chosen."""
        return support_of_table(spec, width)

    def check_graph(self, graph: Graph) -> None:
        """Refuses operators without a form, options that do not hold, and an ONNX Runtime that is too old.

        Raises:
            TargetError: that names them.
            MissingDependencyError: without the packages that write ONNX, and run it to compare.
        """
        check_onnxruntime()
        import_with_onnx(_WRITER).check(graph, self)

    def lower(self, graph: Graph, directory: Path | None) -> Lowered:
        """Writes a folder for ONNX Runtime and onnxruntime-genai."""
        assert directory is not None
        writer = import_with_onnx(_WRITER)
        report = writer.write(graph, directory, self)
        readers = readers_of(directory, self.float_dtype, _in_float16, whole=_exactly)
        finish = partial(writer.finish, directory, report, self.accuracy_level)
        return Lowered(report, readers=readers, finish=finish)

    @classmethod
    def open(cls, directory: Path, *, exact: bool, device: str) -> Artifact:
        """ONNX Runtime on a CPU; not ``exact``: at the accuracy level that was chosen when it was written."""
        if choose_device(device).type != "cpu":
            raise InputError("ONNX models run on the CPU", where=directory, got=device, expected="cpu")
        return _exactly(directory) if exact else _as_written(directory)

    @classmethod
    def wrote(cls, directory: Path) -> bool:
        """By the producer of the ONNX, beside what is chosen for it."""
        return (directory / "ort.json").is_file() and OnnxTarget.wrote(directory)


def _exactly(directory: Path) -> Artifact:
    from qcompiler.lowering.ort.reader import OrtArtifact

    return OrtArtifact(directory, accuracy_level=0)


def _as_written(directory: Path) -> Artifact:
    from qcompiler.lowering.ort.reader import OrtArtifact

    return OrtArtifact(directory)


def _in_float16(directory: Path) -> Artifact:
    from qcompiler.lowering.onnx.reference import Float16Artifact
    from qcompiler.lowering.ort.reference import OPERATORS

    return Float16Artifact(directory, operators=OPERATORS)
