"""The demo's race: how one policy runs, and what it did."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from longthink.cli.decode import Decoded, decode
from longthink.lab.cli.residents import ResidentLog

if TYPE_CHECKING:
    from longthink.hf import PagedCache
    from longthink.models import Loaded
    from longthink.policies import Policy
    from longthink.reasoner import Problem

SAMPLES = 150
"""Moments at which the residents are looked at, over the whole text."""
ENDS = 100
"""Tokens that count as "early" (after the first) and as "late"."""


@dataclass
class Runner:
    """One policy in the race: what it has done so far.

    Attributes
    ----------
    policy
        What it keeps.
    decoded
        Its text and times; None before the start and while running.
    tokens, tail, ms
        Live figures: tokens so far, end of the text so far, milliseconds for each of the latest tokens.
    held
        What its cache holds (``PagedCache.summary``).
    log
        Which tokens were resident when.
    """

    policy: Policy
    log: ResidentLog
    decoded: Decoded | None = None
    tokens: int = 0
    tail: str = ""
    ms: float = 0.0
    held: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The policy as a person writes it."""
        from longthink.policies import policy_spec

        return policy_spec(self.policy)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a policy did.

    Attributes
    ----------
    answer
        Last value it stated for the name in question, None if it stated none.
    right
        Whether the text ends with the right answer.
    right_tokens
        Tokens up to the first that differs from the worked solution.
    early_ms, late_ms
        Milliseconds for each of the first and of the last :data:`ENDS` tokens.
    residents
        Tokens held at the end, mean over layers and KV heads.
    """

    answer: str | None
    right: bool
    right_tokens: int
    early_ms: float
    late_ms: float
    residents: float


def run_policy(
    runner: Runner,
    loaded: Loaded,
    inputs: dict[str, Any],
    budget: dict[str, Any],
    *,
    limit: int,
    on_change: Callable[[], None],
) -> None:
    """Let one policy solve the problem, greedily, filling ``runner`` as it goes.

    Parameters
    ----------
    inputs
        The encoded prompt.
    budget
        Budget arguments of ``make_cache``, left out where the policy needs none.
    limit
        Tokens after which it is stopped.
    on_change
        Called after every token.
    """
    from longthink import make_cache
    from longthink.policies import needs_budget

    every = max(1, limit // SAMPLES)
    clock = time.perf_counter()
    with make_cache(
        loaded.model, policy=runner.policy, **(budget if needs_budget(runner.policy) else {})
    ) as cache:

        def on_text(text: str) -> None:
            runner.tail = (runner.tail + text)[-200:]

        def on_step(count: int) -> None:
            nonlocal clock
            runner.tokens = count
            if count % every == 0:
                runner.ms = 1000 * (time.perf_counter() - clock) / every
                _look(runner, cache)
                clock = time.perf_counter()
            on_change()

        runner.decoded = decode(
            loaded.model,
            loaded.tokenizer,
            inputs,
            cache,
            on_text=on_text,
            on_step=on_step,
            max_new_tokens=limit,
            do_sample=False,
            num_beams=1,
        )
        _look(runner, cache)


def _look(runner: Runner, cache: PagedCache) -> None:
    runner.held = cache.summary()
    runner.log.sample(cache, runner.tokens)


def outcome(runner: Runner, problem: Problem, solution: list[int]) -> Outcome:
    """Judge a finished runner against the problem and the token ids of its worked solution."""
    from longthink.reasoner import grade

    decoded = runner.decoded
    assert decoded is not None
    pairs = zip(decoded.tokens, solution, strict=False)
    final_YX = runner.log.share_YX()
    return Outcome(
        answer=_stated(problem, decoded.text),
        right=grade(problem, decoded.text),
        right_tokens=next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(len(decoded.tokens), len(solution))
        ),
        early_ms=decoded.ms_per_token(slice(None, ENDS)),
        late_ms=decoded.ms_per_token(slice(-ENDS, None)),
        residents=float(final_YX[:, -1].sum()),
    )


def _stated(problem: Problem, text: str) -> str | None:
    """Return the word after the last ``query:`` of a text."""
    words = text.split()
    values = [value for name, value in pairwise(words) if name == f"{problem.query}:"]
    return values[-1] if values else None
