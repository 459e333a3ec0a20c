"""Results of replays, their means over problems, and the Parquet file with the traces that stores them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from numpy.typing import NDArray

from longthink.errors import TraceError, needs_extra
from longthink.files import replacing
from longthink.lab.analyze.rules import Rules
from longthink.lab.analyze.store import TraceStore

with needs_extra("analyze"):
    import pyarrow as pa
    from pyarrow import parquet

BELADY, OPTIMUM = CLAIRVOYANT = ("belady", "optimum")  # they know the future
FOLDER, FILE = "what-if", "replays.parquet"
_ARRAYS = {"curve_T": np.float32, "maps_M": np.float32, "gone_LKN": np.int32}


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What one policy at one budget would have kept of one trace; NaN, 0 or empty if `note` says why not."""

    task: str
    problem: str
    policy: str
    budget: int | None
    decode_budget: int | None
    recall: float = float("nan")  # share of the dense attention on what is read
    worst: float = float("nan")  # recall of the map that keeps least
    lookups: float = float("nan")  # recall over steps in which a map uses a page that is not near
    evictions: int = 0  # pages of the trace, summed over layers and KV heads
    regrets: int = 0  # those of them used afterwards
    page_size: int = 1  # of the policy
    note: str = ""
    curve_T: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    maps_M: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    # Step in which each page of the trace was evicted, -1 for never; K is 1 where one table serves a layer.
    gone_LKN: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 0, 0), np.int32))

    @property
    def key(self) -> tuple[str, str, str, int | None, int | None]:
        return (self.task, self.problem, self.policy, self.budget, self.decode_budget)


def save_replays(store: TraceStore, replays: Sequence[Replay], rules: Rules) -> None:
    """Store replays; those with the same key are replaced, those made with other rules dropped."""
    before, old_rules = load_replays(store)
    kept = {one.key: one for one in before} if old_rules == rules else {}
    kept |= {one.key: one for one in replays}
    columns = {
        pa.string(): ("task", "problem", "policy", "note"),
        pa.int64(): ("budget", "decode_budget", "evictions", "regrets", "page_size"),
        pa.float64(): ("recall", "worst", "lookups"),
        pa.list_(pa.float32()): ("curve_T", "maps_M"),
        pa.list_(pa.list_(pa.list_(pa.int32()))): ("gone_LKN",),
    }
    fields = [(name, kind) for kind, names in columns.items() for name in names]
    schema = pa.schema(fields, metadata={"rules": json.dumps(asdict(rules))})
    rows = [vars(one) | {name: getattr(one, name).tolist() for name in _ARRAYS} for one in kept.values()]
    (store.folder / FOLDER).mkdir(exist_ok=True)
    with replacing(store.folder / FOLDER / FILE) as temporary:
        parquet.write_table(pa.Table.from_pylist(rows, schema), temporary, compression="zstd")


def load_replays(store: TraceStore) -> tuple[list[Replay], Rules]:
    """Return all stored replays and their rules; none, and the defaults, if there is no file."""
    path = store.folder / FOLDER / FILE
    if not path.exists():
        return [], Rules()
    try:
        table = parquet.read_table(path)
        rules = Rules(**json.loads((table.schema.metadata or {})[b"rules"]))
        rows = table.to_pylist()
        for row in rows:
            row |= {name: np.array(row[name], kind) for name, kind in _ARRAYS.items()}
        return [Replay(**row) for row in rows], rules
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path} is damaged or outdated; delete it and replay again: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Mean:
    """What one policy at one budget kept: means over `problems`, None where a value has no meaning."""

    policy: str
    budget: int | None
    decode_budget: int | None
    page_size: int
    problems: int
    no_room: int  # problems whose prompts do not fit; they are in no mean
    recall: float | None
    worst: float | None
    lookups: float | None
    evictions: float | None
    regrets: float | None


def means(replays: Sequence[Replay]) -> list[Mean]:
    groups: dict[tuple[str, int | None, int | None], list[Replay]] = {}
    for one in replays:
        groups.setdefault((one.policy, one.budget, one.decode_budget), []).append(one)
    rows = []
    for (policy, budget, decode_budget), group in groups.items():
        ran = [one for one in group if not one.note]
        values: dict[str, float | None] = {}
        for name in ("recall", "worst", "lookups", "evictions", "regrets"):
            # The optimum is found per KV head, and serves no step in particular.
            known = ran and (policy != OPTIMUM or name in ("recall", "evictions"))
            values[name] = sum(getattr(one, name) for one in ran) / len(ran) if known else None
        rows.append(
            Mean(policy=policy, budget=budget, decode_budget=decode_budget, page_size=group[0].page_size,
                 problems=len(ran), no_room=len(group) - len(ran), **values)
        )  # fmt: skip
    return rows
