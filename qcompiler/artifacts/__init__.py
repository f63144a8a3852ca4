"""Models that run, and what is done with them.

In: a directory, or a graph. Out: an `Artifact`, its perplexity, its text. `native` is the form that is always
written, `hf` runs originals by transformers; `evaluation`, `generation` and `parity` know the protocol alone;
`calibration` makes tokens. `inputs` does for models without token ids what the others do with tokens.
"""

from qcompiler.artifacts.calibration import Calibration, CalibrationTokens
from qcompiler.artifacts.corpus import read_corpus
from qcompiler.artifacts.evaluation import (
    WINDOW,
    Evaluation,
    Scores,
    evaluate,
)
from qcompiler.artifacts.generation import Generation, generate
from qcompiler.artifacts.hf import (
    HFArtifact,
    companion_losses,
    has_tokenizer,
    load_tokenizer,
    read_limits,
)
from qcompiler.artifacts.inputs import GivenInputs, InputEvaluation, check_by_inputs, evaluate_inputs
from qcompiler.artifacts.native import (
    MANIFEST,
    NativeArtifact,
    add_target,
    load_held_out,
)
from qcompiler.artifacts.noise import noisy_samples, with_block_noise, with_noise
from qcompiler.artifacts.parity import check_parity
from qcompiler.artifacts.result import CompileResult, load, native_directory
from qcompiler.artifacts.streamed import StreamedArtifact
from qcompiler.artifacts.tokenizing import TokenStream

__all__ = [
    "MANIFEST",
    "WINDOW",
    "Calibration",
    "CalibrationTokens",
    "CompileResult",
    "Evaluation",
    "Generation",
    "GivenInputs",
    "HFArtifact",
    "InputEvaluation",
    "NativeArtifact",
    "Scores",
    "StreamedArtifact",
    "TokenStream",
    "add_target",
    "check_by_inputs",
    "check_parity",
    "companion_losses",
    "evaluate",
    "evaluate_inputs",
    "generate",
    "has_tokenizer",
    "load",
    "load_held_out",
    "load_tokenizer",
    "native_directory",
    "noisy_samples",
    "read_corpus",
    "read_limits",
    "with_block_noise",
    "with_noise",
]
