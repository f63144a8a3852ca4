"""Engines that read checkpoints, each in a process of its own, to hold what they compute against the native artifact.

A script ``run_<engine>.py`` needs nothing of qcompiler: it runs under the Python of the engine's environment, which is
often not this one. It is given a request, a JSON file:

| field | what |
|---|---|
| ``engine``, ``directory`` | who reads which checkpoint |
| ``rows`` | token ids, rows of one length |
| ``first`` | how many of each row are given at once, ahead of others that are decoded one by one |
| ``vocab`` | how many ids there are |

and writes an ``.npz``:

| array | what |
|---|---|
| ``whole`` | float32 ``[rows, length, vocab]``: log-probabilities behind each token |
| ``decoded`` | float32 ``[rows, length - first + 1, vocab]``: the same from the ``first`` on, through the cache |
| ``dtype``, ``version`` | what the engine computes in, and its version |
"""

from qcompiler.lowering.checkpoint.readers.comparing import compare
from qcompiler.lowering.checkpoint.readers.engines import ENGINES, Engine, Reading, read

__all__ = ["ENGINES", "Engine", "Reading", "compare", "read"]
