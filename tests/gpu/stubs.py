"""Parts of a check that do what parts may do, without a model: for `test_check`."""

import os
import signal
import time
from pathlib import Path

from scripts.gpu_check.sheet import RESTART, Sheet


def finds(sheet: Sheet) -> None:
    sheet.put(machine={"device": "a stub", "memory_gb": 100.0, "cores": 2}, copy_gb_per_s=1000.0)


def raises(sheet: Sheet) -> None:
    sheet.add({"found": "before it broke"})
    raise ValueError("it broke\nin two lines")


def dies(sheet: Sheet) -> None:
    sheet.add({"found": "before it died"})
    os.kill(os.getpid(), signal.SIGSEGV)


def sleeps(sheet: Sheet) -> None:
    sheet.add({"found": "before it slept"})
    time.sleep(60)


def goes_on_in_a_new_process(sheet: Sheet) -> int:
    print("this goes to the log")
    sheet.add({"process": os.getpid()})
    return RESTART if len(sheet.found["rows"]) < 3 else 0


def times(sheet: Sheet) -> None:
    """Note when it had the machine to itself, twice."""
    for _ in range(2):
        with sheet.quiet():
            began = time.monotonic()
            time.sleep(0.3)
            sheet.add({"began": began, "ended": time.monotonic()})


def counts_time(sheet: Sheet) -> None:
    """Note every moment in which it runs, until a file says that it is enough."""
    sheet.put(moments=[])
    stop, moments = Path(sheet.settings["stop"]), []
    while not stop.exists():
        moments.append(time.monotonic())
        time.sleep(0.01)
    sheet.put(moments=moments)


def ends(sheet: Sheet) -> None:
    Path(sheet.settings["stop"]).touch()


def measures(sheet: Sheet) -> None:
    asked = sheet.settings
    sheet.add(asked | {"outside_ms": 0.1, "host_ms": 0.5, "gb_per_s": 500.0, "kv_bytes": 1_000_000})
