"""``longthink eval``: accuracy of policies on problem sets. Annotations are objects: see `longthink.cli.options`."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

from longthink.cli.options import Switch
from longthink.cli.terminal import note, write_json
from longthink.config import check_int
from longthink.environment import hardware, versions
from longthink.lab.cli.analyze_options import Files
from longthink.lab.cli.eval_view import print_summaries, watching
from longthink.lab.cli.work import carry_out, note_outcome

if TYPE_CHECKING:
    from longthink.lab.evaluate.sweep import Sweep

DEFAULT_OUT = "results"  # default folder of the store


@Parameter(name="*", group=Group("Problems", sort_key=0))
@dataclass(frozen=True, kw_only=True)
class ProblemFlags:
    """In all groups None means "not given": then the config file counts, and then the default."""

    tasks: str | None = None
    """gsm8k, math500, aime24, aime25, aime, reasoner/SIZE/PROFILE, fact/DISTANCE, or the stem of a --data file."""
    data: Files = None
    """Problem file (.jsonl, .parquet); repeatable."""
    count: Annotated[int | None, Parameter(name=("--count", "-n"))] = None
    """Problems per task [default: all]."""
    seed: int | None = None
    """First seed of built-in problems [default: 0]."""


@Parameter(name="*", group=Group("Policies", sort_key=1))
@dataclass(frozen=True, kw_only=True)
class PolicyFlags:
    policies: str | None = None
    """Such as dense,raas:r=0.25 [default: dense]."""
    budgets: str | None = None
    """Tokens kept per layer, such as 256,512."""
    decode_budgets: str | None = None
    """The same on top of the prompt."""
    kv_dtype: str | None = None
    """Format to store keys and values in: bfloat16, float16 or float32 [default: the model's own]."""
    kv_bits: str | None = None
    """Bits of pages that have left the recent window: 8, 4, 3, 2, or keys/values such as 4/2 (docs/precision.md)."""


@Parameter(name="*", group=Group("Model", sort_key=2))
@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    model: str | None = None
    """Hub id or local folder [default: reasoner, the built-in one]."""
    device: str | None = None
    """Such as cpu or cuda:1 [default: auto, the first accelerator]."""
    dtype: str | None = None
    """float32, bfloat16 or float16 [default: the checkpoint's own]."""


@Parameter(name="*", group=Group("Decoding", sort_key=3))
@dataclass(frozen=True, kw_only=True)
class DecodingFlags:
    temperature: float | None = None
    """Softmax temperature [default: 0, greedy]."""
    samples: int | None = None
    """Samples per problem; more than 1 need a temperature [default: 1]."""
    max_new_tokens: int | None = None
    """Token limit of an answer [default: each task's own]."""
    rows: int | None = None
    """Batch size [default: 32 for the built-in model, else 8]."""


@Parameter(name="*", group=Group("Run", sort_key=4))
@dataclass(frozen=True, kw_only=True)
class RunFlags:
    config: Path | None = None
    """YAML or TOML file with any of these settings and the less common ones (docs/evaluation.md); flags take
    precedence."""
    workers: int | None = None
    """Processes with a model each [default: 1]; with --ray, tasks at a time [default: all of the cluster]."""
    ray: str | None = None
    """Ray cluster to run on: its address, auto, or local."""
    out: str | None = None
    """Result store, a folder or s3://bucket/results; stored samples are not repeated [default: results]."""
    json: Switch = False
    """Print one JSON document instead of the table."""


_PROBLEMS, _POLICIES, _MODEL, _DECODING, _RUN = (
    ProblemFlags(), PolicyFlags(), ModelFlags(), DecodingFlags(), RunFlags(),
)  # fmt: skip


def given(*groups: Any) -> dict[str, Any]:
    values = {field.name: getattr(group, field.name) for group in groups for field in fields(group)}
    values = {
        name: values[name] for name in values if values[name] is not None and name not in ("config", "json")
    }
    if "data" in values:
        values["data"] = [str(path) for path in values["data"]]
    return values


def evaluate(
    *, problems: ProblemFlags = _PROBLEMS, policies: PolicyFlags = _POLICIES, model: ModelFlags = _MODEL,
    decoding: DecodingFlags = _DECODING, run: RunFlags = _RUN,
) -> int:  # fmt: skip
    """Measure the accuracy of policies at budgets on problem sets.

    Every sample is stored as soon as it is complete; after an interruption the same command makes what is missing.
    """
    from longthink.lab.evaluate.settings import make_plan, read_settings
    from longthink.lab.evaluate.sweep import Sweep
    from longthink.lab.results.object_store import open_store

    from_file = {} if run.config is None else read_settings(run.config.expanduser())
    plan, settings = make_plan(from_file | given(problems, policies, model, decoding, run))
    if (workers := settings.get("workers")) is not None:
        check_int("workers", workers, 1)
    # Problem sets first: if they cannot be read, no empty store must stay.
    tasks = plan.load_tasks()
    sweep = Sweep(plan, tasks, open_store(settings.get("out", DEFAULT_OUT)), say=note)
    code = carry_out(sweep, watching(sweep), workers=workers, ray=settings.get("ray"))
    if sweep.identity is not None:
        _show(sweep, run.json)
    note_outcome(sweep)
    return code


def _show(sweep: "Sweep", as_json: bool) -> None:
    from longthink.lab.evaluate.summary import summarize

    rows = summarize(sweep.store, sweep.configs)
    if not as_json:
        print_summaries(rows)
        return
    total = sweep.total
    outcome = {"stored": total.stored, "made": total.made, "lost_workers": sweep.lost_workers}
    document = {"plan": asdict(sweep.plan), "store": sweep.store.place, "complete": sweep.is_complete}
    document |= {"outcome": outcome, "rows": [asdict(row) for row in rows]}
    write_json(document | {"versions": versions(), "hardware": hardware()})
