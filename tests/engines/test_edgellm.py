"""TensorRT-Edge-LLM's exporter takes weights for what they are, and a damaged checkpoint gives others."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import qcompiler as qc
from tests.engines import made

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

CASES: list[tuple[str, str, Callable[[Path], None]]] = [
    ("gptq", "w4a16-g32", made.flip_codes),
    ("gptq", "w4a16-g32", made.double_scales),
    ("awq", "w4a16-g32", made.move_zero_points),
    ("modelopt", "fp8-tensor", made.double_scales),
]


def largest_difference(checkpoint: Path, native: Path, scratch: Path) -> float:
    """Between the exporter's weights and ours, of all layers, relative to the largest weight of a layer."""
    python = made.ENVIRONMENTS / "edgellm" / "bin" / "python"
    if not python.exists():
        pytest.skip("tensorrt-edgellm is not there: `make test-engines` makes its environment")
    out = scratch / "weights.npz"
    command = [str(python), str(Path(__file__).with_name("read_edgellm.py")), str(checkpoint), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found, graph = np.load(out), qc.load(native).graph
    expected = {site.name: graph.read_weight(site).numpy() for site in graph.sites() if site.name in graph.schemes}
    expected = {name: weight for name, weight in expected.items() if graph.schemes[name].weight is not None}
    assert len(expected) == 14
    assert set(found.files) == set(expected)
    return max(float(np.abs(found[name] - weight).max() / np.abs(weight).max()) for name, weight in expected.items())


@pytest.mark.parametrize(("layout", "scheme", "how"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_weights_are_those_that_were_compiled(
    layout: str,
    scheme: str,
    how: Callable[[Path], None],
    written: Callable[[str, str], Path],
    tmp_path: Path,
) -> None:
    directory = written(layout, scheme)
    assert largest_difference(directory / "checkpoint", directory / "native", tmp_path) < 2**-10  # float16 scales
    shutil.copytree(directory / "checkpoint", tmp_path / "damaged")
    how(tmp_path / "damaged")
    assert largest_difference(tmp_path / "damaged", directory / "native", tmp_path) > 0.05
