"""What commands share that carry out the work of a driver."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from longthink.cli.errors import EXIT_INTERRUPTED
from longthink.cli.terminal import note

if TYPE_CHECKING:
    from longthink.lab.work.driver import Driver


def carry_out(
    driver: Driver, display: AbstractContextManager[Any], *, workers: int | None, ray: str | None
) -> int:
    """Do what is missing while `display` shows the progress; Ctrl-C ends it early. Returns the exit code."""
    from longthink.lab.work.workers import run_work

    try:
        with display:
            run_work(driver, workers=workers, ray=ray)
    except KeyboardInterrupt:
        made = f"{driver.total.made} {driver.noun} were made and are stored"
        note(f"interrupted: {made}; the same command goes on from there")
        return EXIT_INTERRUPTED
    return 0


def note_outcome(driver: Driver) -> None:
    died = f"; {driver.lost_workers} workers died on the way" if driver.lost_workers else ""
    total = driver.total
    note(f"{total.made} {driver.noun} made, {total.stored} were there, all in {driver.store.place}{died}")
