"""From an exception to one line on standard error and an exit code, without a traceback."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from cyclopts import CycloptsError

from longthink.cli.terminal import note
from longthink.errors import LongthinkError

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # what a shell reports for SIGINT ...
EXIT_CLOSED_PIPE = 141  # ... and for SIGPIPE


def check_surroundings(words: Sequence[str]) -> None:
    """Raise `ValueError` if standard output is closed or an argument is not UTF-8: commands would fail later."""
    if sys.stdout is None:
        raise ValueError("standard output is closed: send it to a file, or to /dev/null")
    for number, word in enumerate(words, 1):
        # Python's stand-ins for bytes that it could not decode.
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            readable = os.fsencode(word).decode("utf-8", "backslashreplace")
            raise ValueError(f"argument {number} is not UTF-8 text: {readable}")


def guarded(action: Callable[[], int], *, debug: bool) -> int:
    """Run ``action`` and return its exit code; exceptions become a line, with `debug` a traceback too, and a code."""
    try:
        code = action()
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        note("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return EXIT_CLOSED_PIPE
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = _explain(error)
        note(f"longthink: {message}")
    return code


def _explain(error: Exception) -> tuple[str, int]:
    # Out-of-memory errors have no common base class outside torch, which may not have been imported.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({error}); a smaller model, dtype or budget may fit", EXIT_FAILED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: free some space and run the same command again", EXIT_FAILED
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"no such file or folder: {error.filename}", EXIT_BAD_INPUT
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}", EXIT_BAD_INPUT
    if isinstance(error, (CycloptsError, LongthinkError, ValueError, OSError)):
        return str(error), EXIT_BAD_INPUT
    if isinstance(error, ModuleNotFoundError):
        return f"this command needs the package {error.name!r}, which is not installed", EXIT_FAILED
    return (
        f"unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)",
        EXIT_FAILED,
    )


def _forget_stdout() -> None:
    """Redirect standard output to nothing, or the flush at interpreter exit would hit the closed pipe again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        # Standard output is not a real file (replaced by a test).
        return
