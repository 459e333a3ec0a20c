"""The command: reads options, runs the parts, and writes one JSON file, one table and one log."""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

from .packages import CARRIED, THERE, download, install, missing
from .parts import Part, full_plan, small_plan
from .report import Report
from .runner import ROOT, Outcome, Runner
from .sheet import write_text

LOG_CHARACTERS = 60_000
"""Of the end of each part's log, in the log of the check."""


def main(arguments: list[str]) -> int:
    """Run the command; 0 if every part and every test is as it should be."""
    options = _parser().parse_args(arguments)
    if options.make_wheels:
        print(f"{download(options.make_wheels):.1f} MB of wheels: {', '.join(CARRIED.values())}")
        return 0
    plan = [
        part for part in (small_plan() if options.self_test else full_plan()) if options.only in part.name
    ]
    if options.list:
        print("\n".join(f"{part.name}: at most {part.limit_s:.0f} s" for part in plan))
        return 0
    # Triton is for a GPU: the self-test goes without it.
    needed = tuple(name for name in THERE if name != "triton" or not options.self_test)
    if lacking := missing(needed):
        print(f"this Python has no {', '.join(lacking)}: install it, or give another PYTHON", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _stop)
    with tempfile.TemporaryDirectory() as site:
        try:
            if options.wheels:
                print(
                    f"installed from {options.wheels}: {', '.join(install(options.wheels, Path(site))) or 'nothing'}"
                )
            elif lacking := missing(CARRIED):
                raise ValueError(
                    f"this Python has no {', '.join(lacking)}: give --wheels FOLDER (see docs/gpu.md)"
                )
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        return check(plan, options, site)


def check(plan: list[Part], options: argparse.Namespace, site: str) -> int:
    """Run the parts of a plan with the command's options."""
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(plan, self_test=options.self_test)
    with tempfile.TemporaryDirectory() as folder:
        parts = Path(folder)

        def tell(outcome: Outcome) -> None:
            memory = outcome.found.get("machine", {}).get("memory_gb")
            if memory:
                runner.gigabytes = 0.85 * memory
            report.add(outcome, time.monotonic() - began)
            report.write(options.out)
            print(f"[{time.monotonic() - began:4.0f} s] {report.line(outcome)}", flush=True)

        deadline = began + options.limit - 3
        runner = Runner(parts, options.workers, deadline, tell, _environment(site, options.workers))
        try:
            runner.run(plan)
        except KeyboardInterrupt:
            print("stopped; what was found until now is written", flush=True)
        write_text(options.out / "gpu-check.log", _logs(parts))
    report.write(options.out, ended=True)
    print(report.markdown())
    print(f"written: {', '.join(str(options.out / name) for name in report.FILES)}")
    return 0 if report.good else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    cores = os.cpu_count() or 1
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder for the results")
    parser.add_argument("--limit", type=float, default=540, help="seconds for everything (default 540)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what this Python lacks")
    parser.add_argument(
        "--make-wheels", type=Path, help="fill that folder, on a machine with a network, and end"
    )
    parser.add_argument("--only", default="", help="only the parts whose name has this in it")
    parser.add_argument("--list", action="store_true", help="name the parts and end")
    parser.add_argument("--self-test", action="store_true", help="the same parts, tiny, on the CPU")
    parser.add_argument("--workers", type=int, default=max(1, min(7, cores // 2)), help="parts side by side")
    return parser


def _environment(site: str, workers: int) -> dict[str, str]:
    """Environment of the parts: our code first, no network, and not more threads than there are cores."""
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    before = os.environ.get("PYTHONPATH", "")
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), before, site])),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": threads,
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
