"""The command line: runs the parts, and writes one JSON file, one page of tables and one log."""

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from .packages import REQUIRED, WHEELS, download, has_gpu, install, missing
from .parts import Part, full_plan, small_plan
from .report import Report
from .runner import ROOT, Outcome, Runner
from .sheet import write_text
from .tables import page

LOG_CHARACTERS = 60_000
"""Characters from the end of each part's log that go into the log of the check."""
WRITING_S = 3.0
"""Seconds reserved for writing the results."""


def main(arguments: list[str]) -> int:
    """Exit code: 0 if every part completed and every test passed, 1 if not, 2 if the check could not start."""
    options = _parser().parse_args(arguments)
    if options.make_wheels:
        print(f"{download(options.make_wheels):.1f} MB of wheels: {', '.join(WHEELS.values())}")
        return 0
    plan = small_plan() if options.self_test else full_plan()
    plan = [part for part in plan if re.search(options.only, part.name)]
    if options.list:
        print("\n".join(f"{part.name}: at most {part.limit_s:.0f} s" for part in plan))
        return 0
    with tempfile.TemporaryDirectory() as site:
        try:
            if not plan:
                raise ValueError(f"no part has {options.only!r} in its name: --list names them")
            _prepare(options, Path(site))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        return check(plan, options, site)


def check(plan: list[Part], options: argparse.Namespace, site: str) -> int:
    """Run the parts of a plan; rewrite the results whenever one ends."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, _stop)
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(plan, self_test=options.self_test)
    with tempfile.TemporaryDirectory() as folder:
        deadline = began + options.limit - WRITING_S
        runner = Runner(Path(folder), options.workers, deadline, _environment(site, options.workers))

        def record(outcome: Outcome) -> None:
            memory = outcome.found.get("machine", {}).get("memory_gb")
            if memory:
                runner.gigabytes = 0.85 * memory
            report.add(outcome, time.monotonic() - began)
            report.write(options.out)
            print(f"[{time.monotonic() - began:4.0f} s] {report.line(outcome)}", flush=True)

        try:
            summary = f"{len(plan)} parts, {options.workers} in parallel, {options.limit:.0f} s at most"
            print(summary, flush=True)
            runner.run(plan, record)
        except KeyboardInterrupt:
            print("stopped; what was found until now is written", flush=True)
        write_text(options.out / report.FILES[2], _logs(Path(folder)))
    report.write(options.out, ended=True)
    print(page(report.content()))
    print(f"written to {options.out}: {', '.join(report.FILES)}")
    return 0 if report.good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_check", description="Tests and times longthink on a GPU.")
    workers = max(1, min(7, (os.cpu_count() or 1) // 2))
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/gpu-check"), help="folder for the results")
    add("--limit", type=float, default=540, help="time limit of the whole check, in seconds (%(default)s)")
    add("--wheels", type=Path, help="folder of wheels for packages that this Python lacks")
    add("--make-wheels", type=Path, help="download those wheels, on a machine with a network, and exit")
    add("--only", default="", help="run only parts whose name matches this regular expression")
    add("--list", action="store_true", help="list the parts and exit")
    add("--self-test", action="store_true", help="run the same parts on the CPU, with tiny models")
    add("--workers", type=int, default=workers, help="parts to run in parallel (%(default)s)")
    return parser


def _prepare(options: argparse.Namespace, site: Path) -> None:
    """Install missing packages from wheels; raise ValueError if a package or the GPU is missing."""
    # The self-test does not need Triton.
    needed = tuple(name for name in REQUIRED if name != "triton" or not options.self_test)
    if lacking := missing(needed):
        raise ValueError(f"this Python lacks {', '.join(lacking)}: install it, or set PYTHON to another")
    if not options.self_test and not has_gpu():
        raise ValueError(
            "torch finds no CUDA GPU: --self-test runs the same parts on the CPU, with tiny models"
        )
    if options.wheels:
        installed = install(options.wheels, site)
        print(f"installed from {options.wheels}: {', '.join(installed) or 'nothing, no package is missing'}")
    elif lacking := missing(WHEELS):
        raise ValueError(f"this Python lacks {', '.join(lacking)}: give --wheels FOLDER (docs/gpu.md)")


def _environment(site: str, workers: int) -> dict[str, str]:
    """Environment of the parts: this checkout first on the path, no network, few threads."""
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    before = os.environ.get("PYTHONPATH", "")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), before, site])),
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _logs(folder: Path) -> str:
    texts = []
    for path in sorted(folder.glob("*.log")):
        texts.append(f"==== {path.stem}\n{path.read_text(errors='replace')[-LOG_CHARACTERS:]}\n")
    return "".join(texts)


def _stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
