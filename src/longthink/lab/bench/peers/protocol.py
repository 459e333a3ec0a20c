"""How a process that measures is talked to: an object of JSON on a line, and one back.

Runs in the environments of peers too, so it needs the standard library alone. Questions are ``{"ask": "versions"}``,
``{"ask": "open", "id": 0, "point": {...}}``, ``{"ask": "decode", "id": 0, "steps": 32}`` (answered with milliseconds)
and ``{"ask": "close", "id": 0}`` (answered with what `Subject.facts` says). An answer that has ``error`` says what
went wrong. Standard input closed means the end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol, TextIO

THREADS = "1"
QUIET = {
    "OMP_NUM_THREADS": THREADS,
    "MKL_NUM_THREADS": THREADS,
    "OPENBLAS_NUM_THREADS": THREADS,
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # The processor says what it can do; the compiler's trial of that takes each process ten seconds.
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
}
"""Environment variables of every worker: one thread, which sleeps while it waits, and no word with a hub."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One system at one place.

    Attributes
    ----------
    system
        A peer, a policy's text or `FLOOR` (see `longthink.lab.bench.peers.plan`).
    way
        How a policy is run, such as ``generate``; "" calls the model in a bare loop.
    folder
        Folder of the model: config.json and safetensors.
    context
        Tokens in front of the steps that are timed.
    rows
        Rows decoded side by side.
    budget
        Tokens that a bounded cache keeps.
    prompt
        Tokens of the prompt, where the rest of the context is made up.
    steps
        Steps that will be decoded at most.
    """

    system: str
    way: str = ""
    folder: str
    context: int
    rows: int = 1
    budget: int
    prompt: int
    steps: int


class Subject(Protocol):
    """One system, at its point, that can go on decoding."""

    def decode(self, steps: int) -> None:
        """Decode that many tokens of each row."""

    def facts(self) -> dict[str, Any]:
        """Return ``kv_bytes``, ``metadata_bytes`` (None: not known) and ``fast_forwarded``."""
        ...


class Host(Protocol):
    """What a worker's module offers."""

    packages: tuple[str, ...]
    """Distributions whose versions are reported."""

    def open(self, point: Point) -> Subject:
        """Bring a system to a point, with everything compiled that will be."""
        ...


def serve(host: Host) -> None:
    """Answer the questions of standard input until it ends.

    Times are CPU time of this process. What a library prints goes to standard error, so that it cannot be taken
    for an answer.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), 1)
    subjects: dict[str, Subject] = {}
    for line in sys.stdin:
        try:
            _say(answers, _answer(host, subjects, json.loads(line)))
        except Exception as error:
            text = str(error).strip() or "no message"
            _say(answers, {"error": f"{type(error).__name__}: {text.splitlines()[0]}"})


def _answer(host: Host, subjects: dict[str, Subject], question: dict[str, Any]) -> dict[str, Any]:
    match question["ask"]:
        case "versions":
            return {name: version(name) for name in host.packages}
        case "open":
            started = time.process_time()
            subjects[question["id"]] = host.open(Point(**question["point"]))
            return {"seconds": time.process_time() - started}
        case "decode":
            started = time.process_time()
            subjects[question["id"]].decode(question["steps"])
            return {"ms": (time.process_time() - started) * 1000}
        case "close":
            return subjects.pop(question["id"]).facts()
        case other:
            raise ValueError(f"ask={other!r} must be versions, open, decode or close")


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
