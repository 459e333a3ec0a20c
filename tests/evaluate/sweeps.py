"""Short sweeps of the built-in model, and ways to look into their stores."""

from collections import Counter

import pyarrow.parquet as pq

from longthink.lab.evaluate.settings import make_plan
from longthink.lab.evaluate.sweep import Sweep
from longthink.lab.results.store import ResultStore

SHORT = dict(tasks="reasoner/s/chain", policies="recency", budgets="96", count=10, rows=2, max_new_tokens=80)


def short_sweep(folder, *, said=None, **more):
    plan, _ = make_plan(SHORT | more)
    return Sweep(plan, plan.load_tasks(), ResultStore(folder), say=(said if said is not None else []).append)


def raw_keys(folder):
    """How often each sample lies in the files, whatever the store makes of it."""
    keys = Counter()
    for path in (folder / "samples").glob("*.parquet"):
        rows = pq.read_table(path, columns=["config", "problem", "sample"]).to_pylist()
        keys.update((row["config"], row["problem"], row["sample"]) for row in rows)
    return keys


def made(folder, problems=10):
    """What does not depend on time, of every sample of the first problems."""
    rows = ResultStore(folder, create=False).query(
        "SELECT config, problem, sample, text, answer, correct, finish, prompt_tokens, generated_tokens, evicted, "
        "dense_kv_bytes FROM samples ORDER BY ALL"
    )
    rows = [row for row in rows if int(row["problem"]) < problems]
    assert rows
    return rows
