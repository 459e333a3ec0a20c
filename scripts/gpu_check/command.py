"""The command: reads options, runs the parts, and writes one JSON file, one page of tables and one log."""

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from .packages import CARRIED, THERE, download, has_gpu, install, missing
from .parts import Part, full_plan, small_plan
from .report import Report
from .runner import ROOT, Outcome, Runner
from .sheet import write_text
from .tables import page

LOG_CHARACTERS = 60_000
"""Of the end of each part's log, in the log of the check."""
WRITING_S = 3.0
"""Time that is left for the last of the results."""


def main(arguments: list[str]) -> int:
    """Run the command; 0 if every part and every test is as it should be, 2 if nothing could be run."""
    options = _parser().parse_args(arguments)
    if options.make_wheels:
        print(f"{download(options.make_wheels):.1f} MB of wheels: {', '.join(CARRIED.values())}")
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
    """Run the parts of a plan, and write the results anew whenever one has ended."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, _stop)
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(plan, self_test=options.self_test)
    with tempfile.TemporaryDirectory() as folder:
        deadline = began + options.limit - WRITING_S
        runner = Runner(Path(folder), options.workers, deadline, _environment(site, options.workers))

        def tell(outcome: Outcome) -> None:
            memory = outcome.found.get("machine", {}).get("memory_gb")
            if memory:
                runner.gigabytes = 0.85 * memory
            report.add(outcome, time.monotonic() - began)
            report.write(options.out)
            print(f"[{time.monotonic() - began:4.0f} s] {report.line(outcome)}", flush=True)

        try:
            told = f"{len(plan)} parts, {options.workers} side by side, {options.limit:.0f} s at most"
            print(told, flush=True)
            runner.run(plan, tell)
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
    add("--limit", type=float, default=540, help="seconds for everything (%(default)s)")
    add("--wheels", type=Path, help="folder of wheels for what this Python lacks")
    add("--make-wheels", type=Path, help="fill that folder, on a machine with a network, and end")
    add("--only", default="", help="only parts whose name this regular expression finds")
    add("--list", action="store_true", help="name the parts and end")
    add("--self-test", action="store_true", help="the same parts, tiny, on the CPU")
    add("--workers", type=int, default=workers, help="parts side by side (%(default)s)")
    return parser


def _prepare(options: argparse.Namespace, site: Path) -> None:
    """See to it that all is there that a part imports.

    Raises
    ------
    ValueError
        If something is not there.
    """
    # Triton is for a GPU: the self-test goes without it.
    needed = tuple(name for name in THERE if name != "triton" or not options.self_test)
    if lacking := missing(needed):
        raise ValueError(f"this Python has no {', '.join(lacking)}: install it, or give another PYTHON")
    if not options.self_test and not has_gpu():
        raise ValueError("torch sees no CUDA GPU here: --self-test runs the same parts, tiny, on the CPU")
    if options.wheels:
        installed = install(options.wheels, site)
        print(f"installed from {options.wheels}: {', '.join(installed) or 'nothing, all is there'}")
    elif lacking := missing(CARRIED):
        raise ValueError(f"this Python has no {', '.join(lacking)}: give --wheels FOLDER (docs/gpu.md)")


def _environment(site: str, workers: int) -> dict[str, str]:
    """Environment of the parts: our code first, no network, and few threads, for many parts run at once."""
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
