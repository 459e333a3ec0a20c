"""The process of one part: ``python -m scripts.gpu_check.worker FILE CALL SETTINGS``."""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from .sheet import Sheet


def main(file: str, call: str, settings: str) -> int:
    """Call the function. An error goes into the part's file, with its traceback in the log."""
    # Redirect prints to the log: stdout is the pipe to the runner.
    say = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sheet = Sheet(Path(file), json.loads(settings), say, sys.stdin)
    module, _, function = call.partition(":")
    try:
        return getattr(importlib.import_module(module), function)(sheet) or 0
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        where = [line.strip() for line in traceback.format_tb(error.__traceback__)[-3:]]
        sheet.put(error=f"{type(error).__name__}: {lines[0][:300]}", where=where)
        return 1


if __name__ == "__main__":
    status = main(*sys.argv[1:4])
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written. A regular exit would wait for the compiler's processes, for minutes at worst.
    os._exit(status)
