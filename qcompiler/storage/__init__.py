"""Tensors on disk and files that appear whole.

In: safetensors files. Out: `WeightStore`, which reads a tensor when it is wanted and keeps what was rewritten beside
it; `staging` writes aside and renames.
"""

from qcompiler.storage import onnx_file
from qcompiler.storage.checkpoint import no_directory
from qcompiler.storage.companions import SOURCE_ONLY, companion_files, left_behind, read_companions
from qcompiler.storage.gguf_file import GGUFFile, GGUFTensor
from qcompiler.storage.raw_file import RawTensor, open_raw
from qcompiler.storage.reading import read_named
from qcompiler.storage.rearrangement import rearrangement
from qcompiler.storage.staging import (
    StagedFiles,
    filled_directory,
    made_directory,
    output_path,
    remove_tree,
    undisturbed,
    write_errors,
)
from qcompiler.storage.stored_tensor import stack
from qcompiler.storage.weights import WeightStore

__all__ = [
    "SOURCE_ONLY",
    "GGUFFile",
    "GGUFTensor",
    "RawTensor",
    "StagedFiles",
    "WeightStore",
    "companion_files",
    "filled_directory",
    "left_behind",
    "made_directory",
    "no_directory",
    "onnx_file",
    "open_raw",
    "output_path",
    "read_companions",
    "read_named",
    "rearrangement",
    "remove_tree",
    "stack",
    "undisturbed",
    "write_errors",
]
