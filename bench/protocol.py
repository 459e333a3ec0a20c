"""The protocol of a worker process: one JSON object per line on standard input, one answer per line.

    {"command": "versions"}
    {"command": "open", "id": 0, "job": {...}}
    {"command": "decode", "id": 0, "steps": 32}     answers the time: {"ms": 12.3}
    {"command": "close", "id": 0}                   answers `Decoder.facts`

A failure is answered by {"error": "..."}. The worker ends when standard input is closed.
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
ENVIRONMENT = {
    "OMP_NUM_THREADS": THREADS,
    "MKL_NUM_THREADS": THREADS,
    "OPENBLAS_NUM_THREADS": THREADS,
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Trust the CPU flags: the compiler's own probe takes ten seconds in each process.
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
}
"""Environment variables of every worker: one thread, no spinning, no network."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One system, and the state in which it is timed."""

    system: str  # a peer, a policy spec or the byte floor: see `bench.peers.plan`
    mode: str = ""  # a variant such as "generate"; "" is a bare loop around the model
    folder: str  # the model: config.json and safetensors
    context: int  # tokens before the timed steps
    rows: int = 1  # batch size
    budget: int  # tokens that a bounded cache keeps
    prompt: int  # tokens of the prompt, where the rest of the context is filled with random data
    steps: int  # upper bound of the steps to decode


class Decoder(Protocol):
    """A system ready to decode."""

    def decode(self, steps: int) -> None:
        """Decode `steps` tokens of each row."""

    def facts(self) -> dict[str, Any]:
        """Return what the system reports at the end, such as ``kv_bytes``."""
        ...


class Host(Protocol):
    """The part of a worker that knows its library."""

    packages: tuple[str, ...]
    """Distributions whose versions are reported."""

    def open(self, job: Job) -> Decoder:
        """Prepare a system, compilation included."""
        ...


def serve(host: Host) -> None:
    """Answer the commands on standard input until it is closed.

    Times are CPU time of this process. Whatever a library prints goes to standard error, away from the answers.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), 1)
    decoders: dict[str, Decoder] = {}
    for line in sys.stdin:
        try:
            _write(answers, _answer(host, decoders, **json.loads(line)))
        except Exception as error:
            text = str(error).strip() or "no message"
            _write(answers, {"error": f"{type(error).__name__}: {text.splitlines()[0]}"})


def _answer(
    host: Host, decoders: dict[str, Decoder], command: str, id: str = "", **values: Any
) -> dict[str, Any]:
    started = time.process_time()
    match command:
        case "versions":
            return {name: version(name) for name in host.packages}
        case "open":
            decoders[id] = host.open(Job(**values["job"]))
            return {"seconds": time.process_time() - started}
        case "decode":
            decoders[id].decode(values["steps"])
            return {"ms": (time.process_time() - started) * 1000}
        case "close":
            return decoders.pop(id).facts()
        case other:
            raise ValueError(f"command={other!r} must be versions, open, decode or close")


def _write(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()
