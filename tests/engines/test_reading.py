"""Engines that are not ours read what we write, and a damaged checkpoint fails with each of them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompiler as qc
from qcompiler.errors import VerificationError
from tests.engines import made

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

Damage = Callable[[Path], None]
TOKENS = torch.randint(4096, (1, 24), generator=torch.Generator().manual_seed(0))
NO_KERNEL = ("cpu_gemm_wna16",)  # weights of 4 bits, where the processor has no AVX-512

CASES: list[tuple[str, str, str, list[Damage]]] = [
    ("vllm", "compressed-tensors", "fp8-dynamic", [made.flip_codes]),
    ("vllm", "compressed-tensors", "w8a8-dynamic", [made.flip_codes]),
    ("vllm", "compressed-tensors", "w4a16-g32", [made.flip_codes]),
    ("vllm", "gptq", "w4a16-g32", [made.flip_codes]),
    ("vllm", "awq", "w4a16-g32-asym", [made.move_zero_points]),
    ("gptqmodel", "gptq", "w4a16-g32", [made.flip_codes, made.double_scales]),
    ("gptqmodel", "gptq", "w8a16-g32", [made.flip_codes]),
    ("gptqmodel", "awq", "w4a16-g32-asym", [made.flip_codes, made.move_zero_points]),
    ("llama.cpp", "gguf", "w8a16-g32", [made.flip_blocks]),
    ("llama.cpp", "gguf", "w4a16-g32", [made.flip_blocks]),
    ("llama.cpp", "gguf", "w4a16-g32-asym", [made.flip_blocks]),
]


def read(engine: str, checkpoint: Path, native: Path) -> dict[str, Any]:
    python = made.ENVIRONMENTS / engine / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{engine} is not there: `make test-engines` makes its environment")
    return qc.verify(checkpoint, engine, native=native, python=python, tokens=TOKENS, timeout=1500)


@pytest.mark.parametrize(("engine", "layout", "scheme", "damages"), CASES, ids=lambda value: str(value)[:20])
def test_engines_compute_what_was_compiled(
    engine: str,
    layout: str,
    scheme: str,
    damages: list[Damage],
    written: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    if engine == "vllm" and scheme == "w8a8-dynamic" and not torch.cpu._is_vnni_supported():
        pytest.skip("vLLM's products of int8 saturate on processors without VNNI")
    directory = written(layout, scheme)
    try:
        found = read(engine, directory / "checkpoint", directory / "native")
    except VerificationError as error:
        if engine == "vllm" and any(word in (error.got or "") for word in NO_KERNEL):
            pytest.skip(f"vLLM on this processor: {error.got}")
        raise
    assert found["mean_difference"] <= found["mean_tolerance"] < 0.25
    assert found["tokens"] == 24 + 64
    for how in damages:
        damaged = tmp_path / how.__name__
        shutil.copytree(directory / "checkpoint", damaged)
        how(damaged)
        with pytest.raises(VerificationError, match="does not compute what the native artifact computes"):
            read(engine, damaged, directory / "native")
