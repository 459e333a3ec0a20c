"""What replays found, kept beside the traces: one Parquet file, a row for each trace, policy and budget."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from longthink.errors import TraceError
from longthink.lab.analyze.rules import Rules
from longthink.lab.analyze.store import TraceStore
from longthink.lab.analyze.whatif import Outcome

_NUMBERS = ("budget", "decode_budget", "evictions", "regrets", "page_size", "tables")
FOLDER, FILE = "what-if", "replays.parquet"


@dataclass(frozen=True, kw_only=True)
class Replay:
    """An `Outcome` as it is stored.

    Attributes
    ----------
    curve, maps
        Recall of each step, and of each map.
    tables
        Page tables, over all layers.
    gone
        Step in which each table, one after the other, sent each page of the trace away; -1 for never.
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
    tables: int
    gone: tuple[int, ...]

    @property
    def key(self) -> tuple[str, str, str, int | None, int | None]:
        """What tells replays apart."""
        return (self.task, self.problem, self.policy, self.budget, self.decode_budget)

    @classmethod
    def of(cls, outcome: Outcome) -> Replay:
        """Put an outcome into the form that is stored."""
        known = {f.name: getattr(outcome, f.name) for f in fields(cls) if hasattr(outcome, f.name)}
        return cls(
            **known,
            curve=tuple(outcome.curve_T.tolist()),
            maps=tuple(outcome.maps_M.tolist()),
            tables=outcome.gone_LKN.shape[0] * outcome.gone_LKN.shape[1],
            gone=tuple(outcome.gone_LKN.ravel().tolist()),
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
            *((name, pa.int64()) for name in _NUMBERS),
            *((name, pa.float64()) for name in ("recall", "worst", "lookups")),
            *((name, pa.list_(pa.float32())) for name in ("curve", "maps")),
            ("gone", pa.list_(pa.int32())),
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
    """Return all stored replays and the rules they were made by; none and the default rules where there are none.

    Raises
    ------
    TraceError
        If their file is damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    path = store.folder / FOLDER / FILE
    if not path.exists():
        return [], Rules()
    lists = ("curve", "maps", "gone")
    try:
        table = parquet.read_table(path)
        rules = Rules(**json.loads((table.schema.metadata or {})[b"rules"]))
        rows = [row | {name: tuple(row[name]) for name in lists} for row in table.to_pylist()]
        return [Replay(**row) for row in rows], rules
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path} is damaged; delete it and replay again: {error}") from error
