"""What replays found, kept beside the traces: one Parquet file, a row for each trace, policy and budget."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from longthink.analyze.lives import Rules
from longthink.analyze.store import TraceStore
from longthink.analyze.whatif import Outcome

FOLDER, FILE = "what-if", "replays.parquet"
NEVER = -1


@dataclass(frozen=True, kw_only=True)
class Replay:
    """An `Outcome` as it is stored: evictions are told for all tables of a token together.

    Attributes
    ----------
    curve, maps
        Recall of each step, and of each map.
    first_gone, last_gone
        Step in which the first table, and the last, sent each page of the trace away; -1 where one still holds it.
    """

    task: str
    problem: str
    policy: str
    budget: int | None
    decode_budget: int | None
    recall: float
    worst: float
    lookups: float
    evictions: int
    regrets: int
    page_size: int
    note: str
    curve: tuple[float, ...]
    maps: tuple[float, ...]
    first_gone: tuple[int, ...]
    last_gone: tuple[int, ...]

    @property
    def key(self) -> tuple[str, str, str, int | None, int | None]:
        """What tells replays apart."""
        return (self.task, self.problem, self.policy, self.budget, self.decode_budget)

    @classmethod
    def of(cls, outcome: Outcome) -> Replay:
        """Put an outcome into the form that is stored."""
        gone = outcome.gone_LKN.reshape(-1, outcome.gone_LKN.shape[-1]).astype(np.int64)
        tables = len(gone)
        held = (gone < 0).sum(0)
        late = np.where(gone < 0, np.iinfo(np.int64).max, gone)
        known = {f.name: getattr(outcome, f.name) for f in fields(cls) if hasattr(outcome, f.name)}
        return cls(
            **known,
            curve=tuple(outcome.curve_T.tolist()),
            maps=tuple(outcome.maps_M.tolist()),
            first_gone=tuple(np.where(held < tables, late.min(0), NEVER).tolist()) if tables else (),
            last_gone=tuple(np.where(held > 0, NEVER, gone.max(0)).tolist()) if tables else (),
        )


def save_replays(store: TraceStore, outcomes: Sequence[Outcome], rules: Rules) -> None:
    """Add outcomes; those of the same trace, policy and budget are replaced, those of other rules dropped."""
    import pyarrow as pa
    from pyarrow import parquet

    before, old_rules = load_replays(store)
    kept = {one.key: one for one in before} if old_rules == rules else {}
    kept |= {one.key: one for one in map(Replay.of, outcomes)}
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("task", "problem", "policy", "note")),
            *(
                (name, pa.int64())
                for name in ("budget", "decode_budget", "evictions", "regrets", "page_size")
            ),
            *((name, pa.float64()) for name in ("recall", "worst", "lookups")),
            *((name, pa.list_(pa.float32())) for name in ("curve", "maps")),
            *((name, pa.list_(pa.int32())) for name in ("first_gone", "last_gone")),
        ],
        metadata={"rules": json.dumps(asdict(rules))},
    )
    folder = store.folder / FOLDER
    folder.mkdir(exist_ok=True)
    temporary = folder / f".{FILE}-{os.getpid()}.tmp"
    rows = [asdict(one) for one in kept.values()]
    parquet.write_table(pa.Table.from_pylist(rows, schema), temporary, compression="zstd")
    os.replace(temporary, folder / FILE)


def load_replays(store: TraceStore) -> tuple[list[Replay], Rules]:
    """Return all stored replays and the rules they were made by; none and the default rules where there are none."""
    from pyarrow import parquet

    path = store.folder / FOLDER / FILE
    if not path.exists():
        return [], Rules()
    table = parquet.read_table(path)
    rules = Rules(**json.loads(table.schema.metadata[b"rules"]))
    lists = ("curve", "maps", "first_gone", "last_gone")
    rows = [row | {name: tuple(row[name]) for name in lists} for row in table.to_pylist()]
    return [Replay(**row) for row in rows], rules
