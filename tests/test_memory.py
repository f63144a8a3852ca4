"""`trim` gives back what glibc holds on to."""

import subprocess
import sys

import pytest

_SCRIPT = """
import os, resource, torch
from qcompiler.memory import trim

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

torch.ones(4 << 20)  # once freed, blocks up to this size come from the heap
keep, drop = [], []
for _ in range(64):
    drop.append(torch.ones(1 << 19))
    keep.append(torch.ones(1 << 14))
drop.clear()  # the small blocks in between pin the heap's end
before = resident()
trim()
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_trim_returns_the_holes_between_live_blocks() -> None:
    output = subprocess.run([sys.executable, "-c", _SCRIPT], stdout=subprocess.PIPE, check=True, text=True).stdout
    assert int(output) > 16 << 20  # of 128 MiB freed; how much lies in holes varies
