"""Fenced blocks of the pages, and how they are run: as a reader would paste them."""

import re
import shlex
import subprocess
import sys
from typing import Any

from tests.tiny_checkpoint import command


def blocks(text: str, *languages: str) -> list[tuple[str, str]]:
    """Language and content of the fenced blocks in these languages, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(language, content) for language, content in found if language in languages]


def run_here(language: str, content: str, names: dict[str, Any]) -> list[str]:
    """Runs a block in this process, but for what is no command of ours.

    Returns:
        The commands of ``qcompiler`` that ran.
    """
    if language == "python":
        exec(compile(content, "page", "exec"), names)
        return []
    ran, rest = [], content.replace("\\\n", " ")
    while rest:
        line, _, rest = rest.partition("\n")
        if "<<'END'" in line:
            document, _, rest = rest.partition("\nEND\n")
            subprocess.run(["bash", "-c", f"{line}\n{document}\nEND\n"], check=True)
            continue
        program, *arguments = shlex.split(line)
        if program == "qcompiler":
            outcome = command(*arguments)
            assert outcome.status == 0, (line, outcome.errors)
            assert outcome.output.strip()
            ran.append(arguments[0])
        else:
            program = sys.executable if program == "python" else program
            run = subprocess.run([program, *arguments], check=True, capture_output=True, text=True)
            assert program != sys.executable or run.stdout.strip()
    return ran
