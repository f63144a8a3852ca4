"""A driver of the kernels' benchmark whose processes run a few lines made up by a test."""

import sys
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.kernels.driver import Driver


def made_up_driver(tmp_path: Path, body: str, **options: Any) -> Driver:
    """A driver whose processes run ``body``, which knows ``first`` and can ``say`` events."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, sys, time, os
            arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
            first, section, seconds = int(arguments["--first"]), arguments["--section"], float(arguments["--seconds"])
            def say(**event): print(json.dumps(event), flush=True)
            def held(name, passed=True):
                fields = {"section": section, "name": name, "passed": passed, "detail": ""}
                say(record={"kind": "Verdict", **fields})
            """
        )
        + textwrap.dedent(body)
    )
    return Driver([sys.executable, str(script)], **{"seconds": 60.0, "grace": 0.5, **options})
