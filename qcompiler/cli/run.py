"""The boundary of the program: exit statuses, the one JSON object, and how errors are told."""

import contextlib
import json
import logging
import sys
import traceback
from typing import Any

import typer

from qcompiler.cli.checking import check
from qcompiler.cli.commands import app
from qcompiler.cli.output import Kept
from qcompiler.cli.recommending import hardware, recommend
from qcompiler.cli.signals import Interruptions
from qcompiler.cli.verifying import verify
from qcompiler.errors import InputError, QCompilerError, VerificationError

__all__ = ["main"]

SCHEMA = 1
_EXIT_BUG, _EXIT_ERROR, _EXIT_VERIFICATION, _EXIT_INTERRUPTED = 1, 2, 3, 130
# Typer raises click's usage errors or, in later versions, those of a copy of click it brings along: in either, the base
# of the one it exports.
_UsageError: Any = typer.BadParameter.__bases__[0]
app.command()(check)
app.command()(verify)
app.command()(recommend)
app.command()(hardware)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status.

    0: done. 1: a fault of ours. 2: an error of the `QCompilerError` family, or of usage. 3: a verification failed, or
    ``check`` found what does not build. 130: interrupted. With ``--json``, exactly one object goes to stdout in each
    case.
    """
    with Interruptions(for_good=arguments is None) as interruptions:
        return _run(sys.argv[1:] if arguments is None else arguments, interruptions)


def _run(arguments: list[str], interruptions: Interruptions) -> int:
    as_json = "--json" in arguments
    command = next((item for item in arguments if not item.startswith("-")), "")
    is_verbose = not {"--verbose", "-v"}.isdisjoint(arguments)
    form = "%(asctime)s %(levelname)s: %(message)s" if is_verbose else "%(levelname)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, datefmt="%H:%M:%S", stream=sys.stderr, force=True)
    logging.getLogger("qcompiler").setLevel(logging.INFO if is_verbose else logging.NOTSET)
    kept = Kept()

    def fail(fields: dict[str, Any], message: str | None, status: int) -> int:
        interruptions.finish()
        if as_json:
            empty = dict.fromkeys(("type", "what", "where", "got", "expected", "remedy"))
            standing = {"artifacts": kept.artifacts or None, "next_command": kept.next_command()}
            _emit({"schema": SCHEMA, "command": command, "ok": False, "error": {**empty, **fields, **standing}})
        if message is not None:
            print(message, file=sys.stderr)
        for name, path in kept.artifacts.items():
            print(f"finished and kept: {name}: {path}", file=sys.stderr)
        if (remedy := kept.next_command()) is not None:
            print(f"for what is missing: {remedy}", file=sys.stderr)
        return status

    try:
        # Nothing that a recipe's own code prints may stand beside the one object.
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            result = app(arguments, standalone_mode=False, obj=kept)
        if result == _EXIT_INTERRUPTED:  # Typer's answer to a KeyboardInterrupt
            raise KeyboardInterrupt
        interruptions.finish()
        if as_json and isinstance(result, dict):
            _emit({"schema": SCHEMA, "command": command, "ok": True, "result": result})
        return result if isinstance(result, int) else kept.status
    except (KeyboardInterrupt, typer.Abort):
        return fail({"type": "Interrupted", "what": "interrupted"}, "interrupted", _EXIT_INTERRUPTED)
    except QCompilerError as error:
        status = _EXIT_VERIFICATION if isinstance(error, VerificationError) else _EXIT_ERROR
        return fail(error.to_dict(), f"error: {error}", status)
    except _UsageError as error:
        error.show()
        return fail({"type": "Usage", "what": error.format_message()}, None, _EXIT_ERROR)
    except BrokenPipeError:
        return _EXIT_BUG
    except Exception as error:  # the boundary of the program: a fault of ours is reported as one
        if isinstance(error, OSError) and error.filename is not None:  # not ours to read, too long
            refused = InputError("a file or directory cannot be used", where=error.filename, got=error.strerror)
            return fail(refused.to_dict(), f"error: {refused}", _EXIT_ERROR)
        traceback.print_exc(file=sys.stderr)
        fields = {"type": type(error).__name__, "what": str(error)}
        return fail(fields, "this is a fault of qcompiler; please report it", _EXIT_BUG)


def _emit(content: dict[str, Any]) -> None:
    print(json.dumps(content, allow_nan=False, default=str), flush=True)
