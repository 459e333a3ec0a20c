"""``longthink demo``: one long problem, several caches side by side."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from longthink.cli.models import load_model
from longthink.cli.options import BudgetOptions, ModelOptions, ProblemOptions, SizeName, Switch, policy_list
from longthink.cli.progress import progress
from longthink.cli.prompts import encode_prompt
from longthink.cli.terminal import (
    err_console,
    is_terminal,
    note,
    out_console,
    size_text,
    visible,
    write_json,
    write_table,
)
from longthink.config import check_int
from longthink.environment import cores, versions

if TYPE_CHECKING:
    from rich.table import Table

    from longthink.lab.cli.lanes import Course, Helper
    from longthink.lab.cli.race import Outcome, Runner
    from longthink.models import Loaded
    from longthink.reasoner import Problem

# The showcase: a chain of thought almost four times as long as the decode budget. With this seed RaaS as published
# goes wrong and milestone does not; the README says how they do on many problems.
POLICIES = "dense,raas,milestone,streaming_llm"
DECODE_BUDGET = 768


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DemoOptions(ProblemOptions, BudgetOptions):
    """Options of ``longthink demo``."""

    size: SizeName = "xl"
    """Length of the chain of thought."""

    seed: int = 1
    """Seed of the problem."""

    policies: str = POLICIES
    """Policies to compare, separated by commas; options after colons, such as dense,raas:r=0.25."""

    png: Path = Path("longthink-demo.png")
    """Where to save the picture."""

    workers: int | None = None
    """Policies that run at the same time, each in a process with a model of its own [default: as many as there are
    cores]. With 1 nothing disturbs the times of the tokens."""

    json: Switch = False
    """Print one JSON document instead of the tables."""


_DEFAULTS = DemoOptions()


@dataclass
class Watch:
    """How long the parts of the demo took.

    Attributes
    ----------
    seconds
        Seconds of each part that has ended, by name.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    _clock: float = field(default_factory=time.perf_counter)

    def ends(self, part: str) -> None:
        """Say that ``part`` has ended; the next one begins."""
        now = time.perf_counter()
        self.seconds[part], self._clock = now - self._clock, now


def demo(*, options: DemoOptions = _DEFAULTS) -> int:
    """Let the built-in model solve one problem under several cache policies, and show what each one kept.

    A table compares answers, speed and memory; a picture, in the terminal and as a PNG file, shows which tokens
    stayed alive. Nothing is downloaded. Without a budget bounded caches keep 768 tokens on top of the prompt.
    """
    watch = Watch()
    if not options.png.absolute().parent.is_dir():
        raise ValueError(
            f"png={str(options.png)!r}: there is no folder {str(options.png.absolute().parent)!r}"
        )
    if options.workers is not None:
        check_int("workers", options.workers, 1)
    chosen = policy_list(options.policies)
    budget = _budget(options)
    workers = min(options.workers or cores(), len(chosen))
    from longthink.lab.cli.lanes import Course, helpers
    from longthink.lab.cli.race import Runner, outcome
    from longthink.lab.cli.residents import ResidentLog
    from longthink.reasoner import make_problem

    problem = make_problem(seed=options.seed, profile=options.profile, size=options.size)
    with helpers(workers - 1) as helping:
        loaded = load_model(ModelOptions())
        prompt = encode_prompt(loaded.tokenizer, problem.prompt, raw=True)["input_ids"].shape[1]
        solution = loaded.tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
        runners = [Runner(policy=policy, log=ResidentLog(prompt=prompt)) for policy in chosen]
        headline = _headline(options, budget, prompt, len(solution))
        watch.ends("load")
        if not options.json:
            out_console().print(headline, markup=False)
        # A lost model may go on for ever; a tenth more than the worked solution shows that it is lost.
        limit = len(solution) + len(solution) // 10 + 2
        workers = _race(runners, loaded, Course(prompt=problem.prompt, budget=budget, limit=limit), helping)
    outcomes = [outcome(runner, problem, solution) for runner in runners]
    watch.ends("decode")
    picture = _save_picture(runners, outcomes, options.png, headline)
    watch.ends("draw")
    if options.json:
        write_json(_record(options, budget, problem, runners, outcomes, picture, workers, watch))
    else:
        _print_results(problem, runners, outcomes, picture, workers)
        _print_times(watch, len(runners), workers)
    return 0


def _budget(options: DemoOptions) -> dict[str, int]:
    from longthink import Budget

    chosen = options.given_budget or {"decode_budget": DECODE_BUDGET}
    Budget(**chosen)
    return chosen


def _headline(options: DemoOptions, budget: dict[str, int], prompt: int, solution: int) -> str:
    (name, tokens), *_ = budget.items()
    kept = f"{tokens} tokens" if name == "budget" else f"the prompt and {tokens} tokens"
    return (
        f"One {options.profile} problem (size {options.size}, seed {options.seed}): prompt of {prompt} tokens, "
        f"chain of thought of {solution}; bounded caches keep {kept}"
    )


def _race(runners: list[Runner], loaded: Loaded, course: Course, helping: list[Helper]) -> int:
    """Run all policies, with a live table on a terminal and plain lines elsewhere; return how many ran at a time."""
    from longthink.lab.cli.lanes import race

    if not is_terminal(sys.stderr):
        return race(runners, loaded, course, helping, lambda runner: _lines(runner, course.limit))
    from rich.live import Live

    with Live(get_renderable=lambda: _live_table(runners), console=err_console(), transient=True):
        return race(runners, loaded, course, helping, lambda runner: nullcontext(lambda: None))


@contextmanager
def _lines(runner: Runner, limit: int) -> Iterator[Callable[[], None]]:
    with progress(runner.name, total=limit, unit="tokens") as task:
        yield lambda: task.advance_to(runner.tokens)


def _live_table(runners: list[Runner]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(expand=True)
    for heading in ("policy", "tokens", "ms/token", "KV cache"):
        table.add_column(heading, justify="left" if heading == "policy" else "right", no_wrap=True)
    table.add_column("text", ratio=1, no_wrap=True)
    for runner in runners:
        if not runner.tokens:
            table.add_row(Text(runner.name), "", "", "", Text("waiting", style="dim"))
            continue
        tail = Text(visible(" ".join(runner.tail.split())[-60:]), style="dim" if runner.decoded else "")
        held = size_text(runner.held["kv_bytes"]) if runner.held else ""
        table.add_row(Text(runner.name), str(runner.tokens), f"{runner.ms:.1f}", held, tail)
    return table


def _print_results(
    problem: Problem, runners: list[Runner], outcomes: list[Outcome], picture: Path | None, workers: int
) -> None:
    from longthink.lab.cli.picture import render
    from longthink.lab.cli.race import ENDS

    console = out_console()
    console.print()
    console.print(f"The right answer is {problem.answer}.", markup=False)
    write_table(_result_table(runners, outcomes))
    console.print(
        f"ms/token: mean of the first → of the last {ENDS} tokens{_company(workers)}; in a model this small most of "
        "it is the loop around the model, not attention. resident: tokens held at the end, mean over layers and KV "
        "heads.",
        style="dim",
        markup=False,
    )
    console.print()
    for line in render(_panels(runners, outcomes), console):
        console.print(line, soft_wrap=True)
    console.print()
    for runner, result in zip(runners, outcomes, strict=True):
        console.print(_sentence(runner, result, problem), markup=False)
    if picture is not None:
        console.print(f"picture: {visible(str(picture))}", markup=False, soft_wrap=True)


def _company(workers: int) -> str:
    return f", with {workers} policies running side by side" if workers > 1 else ""


def _print_times(watch: Watch, policies: int, workers: int) -> None:
    at_a_time = f", {workers} at a time" if workers > 1 else ""
    load, decode, draw = (f"{watch.seconds[part]:.0f} s" for part in ("load", "decode", "draw"))
    out_console().print(
        f"took {sum(watch.seconds.values()):.0f} s: {load} to load, {decode} to decode with {policies} "
        f"{'caches' if policies > 1 else 'cache'}{at_a_time}, {draw} to draw",
        style="dim",
        markup=False,
    )


def _result_table(runners: list[Runner], outcomes: list[Outcome]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("policy", overflow="fold", min_width=13)
    for heading in ("answer", "tokens", "ms/token", "KV cache", "evicted", "resident"):
        table.add_column(heading, justify="right", no_wrap=True)
    for runner, result in zip(runners, outcomes, strict=True):
        verdict = f"{visible(result.answer or 'none')} {_verdict(result)}"
        table.add_row(
            Text(runner.name),
            Text(verdict, style="bold" if result.right else "bold red"),
            str(runner.tokens),
            f"{result.early_ms:.1f} → {result.late_ms:.1f}",
            size_text(runner.held["kv_bytes"]),
            f"{runner.held['num_evicted']:,}",
            f"{result.residents:,.0f}",
        )
    return table


def _verdict(result: Outcome) -> str:
    return "right" if result.right else "wrong"


def _sentence(runner: Runner, result: Outcome, problem: Problem) -> str:
    """Say plainly how one policy did."""
    held, dense = runner.held["kv_bytes"], runner.held["dense_kv_bytes"]
    kept = (
        "everything" if not runner.held["num_evicted"] else f"{held / dense:.0%} of what a dense cache holds"
    )
    if result.right:
        return f"{runner.name} held {kept} and got the right answer."
    said = f"answered {visible(result.answer)}" if result.answer else "gave no answer"
    return (
        f"{runner.name} held {kept} and {said} instead of {problem.answer}; its first wrong token is number "
        f"{result.right_tokens + 1}."
    )


def _panels(runners: list[Runner], outcomes: list[Outcome]) -> list[Any]:
    from longthink.lab.cli.picture import Panel

    return [
        Panel(
            name=runner.name,
            verdict=f"{_verdict(result)}, {size_text(runner.held['kv_bytes'])}",
            log=runner.log,
        )
        for runner, result in zip(runners, outcomes, strict=True)
    ]


def _save_picture(runners: list[Runner], outcomes: list[Outcome], path: Path, headline: str) -> Path | None:
    """Save the PNG; without matplotlib say what is missing and go on."""
    from longthink.lab.cli.picture import save_png

    try:
        save_png(_panels(runners, outcomes), path, title=headline)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        note("no PNG: it needs matplotlib (pip install 'longthink[plot]')")
        return None
    return path


def _record(
    options: DemoOptions,
    budget: dict[str, int],
    problem: Problem,
    runners: list[Runner],
    outcomes: list[Outcome],
    picture: Path | None,
    workers: int,
    watch: Watch,
) -> dict[str, Any]:
    """Return the whole demo, ready for JSON."""
    return {
        "problem": {
            "profile": options.profile,
            "size": options.size,
            "seed": options.seed,
            "prompt": problem.prompt,
            "solution": problem.solution,
            "answer": problem.answer,
        },
        **{name: budget.get(name) for name in ("budget", "decode_budget")},
        "runs": [
            {**runner.held, "tokens": runner.tokens, **asdict(result)}
            for runner, result in zip(runners, outcomes, strict=True)
        ],
        "picture": None if picture is None else str(picture),
        "workers": workers,
        "seconds": watch.seconds,
        "versions": versions(),
    }
