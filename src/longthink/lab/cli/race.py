"""How one policy runs in the demo, which tokens its cache held over time, and how well it did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from longthink.cli.decode import Decoded, decode

if TYPE_CHECKING:
    from longthink.hf import PagedCache
    from longthink.models import Loaded
    from longthink.policies import Policy
    from longthink.reasoner import Problem

Grid = NDArray[np.float64]
SAMPLES = 150  # of the resident tokens, over the whole text
ENDS = 100  # tokens that count as "early" (after the first) and as "late"


@dataclass
class ResidentLog:
    """Samples of what a cache holds: ``steps`` are their decode steps, ``prompt`` is the prompt's length."""

    prompt: int
    steps: list[int] = field(default_factory=list)
    _samples: list[Grid] = field(default_factory=list)

    def sample(self, cache: PagedCache, step: int) -> None:
        held = [head for layer in cache.paged for head in cache.resident_positions(layer.index)[0]]
        positions = np.concatenate([np.asarray(head, dtype=np.int64) for head in held])
        self.steps.append(step)
        self._samples.append(np.bincount(positions, minlength=cache.get_seq_length()) / len(held))

    def share_YX(self) -> Grid:
        """Return the share of page tables (layer and KV head) that hold a position; NaN before it is written."""
        grid = np.full((max(map(len, self._samples), default=0), len(self._samples)), np.nan)
        for x, sample in enumerate(self._samples):
            grid[: len(sample), x] = sample
        return grid


def pooled(log: ResidentLog, *, rows: int, columns: int, positions: int, steps: int) -> Grid:
    """Return a log as ``rows`` x ``columns`` cells that span ``positions`` tokens and ``steps`` decode steps.

    A cell is the mean over its positions at its last sample, NaN before they are written and after the text's end.
    """
    share_YX = log.share_YX()
    start_X = np.arange(columns) * steps / columns
    sample_X = np.searchsorted(log.steps, start_X + steps / columns, side="right") - 1
    shown_X = (sample_X >= 0) & (start_X < log.steps[-1])
    picked_YX = np.full((positions, columns), np.nan)
    picked_YX[: len(share_YX), shown_X] = share_YX[:, sample_X[shown_X]]
    member_RY = (np.arange(positions) * rows // positions == np.arange(rows)[:, None]).astype(float)
    with np.errstate(invalid="ignore"):
        return (member_RY @ np.nan_to_num(picked_YX)) / (member_RY @ ~np.isnan(picked_YX))


@dataclass
class Runner:
    """The run of one policy: tokens, end of the text, milliseconds per token and ``PagedCache.summary`` so far."""

    policy: Policy
    log: ResidentLog
    decoded: Decoded | None = None
    tokens: int = 0
    tail: str = ""
    ms: float = 0.0
    held: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        from longthink.policies import policy_spec

        return policy_spec(self.policy)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    answer: str | None  # last value for the queried name
    right: bool
    right_tokens: int  # before the first that differs from the worked solution
    early_ms: float  # per token
    late_ms: float
    residents: float  # tokens held at the end, mean over layers and KV heads

    @property
    def verdict(self) -> str:
        return "right" if self.right else "wrong"


def run_policy(
    runner: Runner, loaded: Loaded, inputs: dict[str, Any], budget: dict[str, Any], *, limit: int,
    on_change: Callable[[], None],
) -> None:  # fmt: skip
    """Decode at most ``limit`` tokens greedily; update ``runner`` after each, then call ``on_change``."""
    from longthink import make_cache
    from longthink.policies import needs_budget

    every = max(1, limit // SAMPLES)
    kept = budget if needs_budget(runner.policy) else {}
    clock = time.perf_counter()
    with make_cache(loaded.model, policy=runner.policy, **kept) as cache:

        def sample() -> None:
            runner.held = cache.summary()
            runner.log.sample(cache, runner.tokens)

        def on_text(text: str) -> None:
            runner.tail = (runner.tail + text)[-200:]

        def on_step(count: int) -> None:
            nonlocal clock
            runner.tokens = count
            if count % every == 0:
                runner.ms = 1000 * (time.perf_counter() - clock) / every
                sample()
                clock = time.perf_counter()
            on_change()

        runner.decoded = decode(
            loaded.model, loaded.tokenizer, inputs, cache, on_text=on_text, on_step=on_step,
            max_new_tokens=limit, do_sample=False, num_beams=1,
        )  # fmt: skip
        sample()


def outcome(runner: Runner, problem: Problem, solution: list[int]) -> Outcome:
    from longthink.reasoner import grade

    decoded = runner.decoded
    assert decoded is not None
    shared = min(len(decoded.tokens), len(solution))
    stated = [value for name, value in pairwise(decoded.text.split()) if name == f"{problem.query}:"]
    return Outcome(
        answer=stated[-1] if stated else None,
        right=grade(problem, decoded.text),
        right_tokens=next((i for i in range(shared) if decoded.tokens[i] != solution[i]), shared),
        early_ms=decoded.ms_per_token(slice(None, ENDS)),
        late_ms=decoded.ms_per_token(slice(-ENDS, None)),
        residents=float(runner.log.share_YX()[:, -1].sum()),
    )
