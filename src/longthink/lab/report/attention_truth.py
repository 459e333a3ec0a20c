"""Table of the attention page: what heads read again, against what the built-in task needs read again."""

from __future__ import annotations

from collections.abc import Sequence

from longthink.lab.analyze.lives import Lives
from longthink.lab.analyze.truth import Agreement, agreement, total
from longthink.lab.report.tables import Table
from longthink.lab.results.statistics import wilson

_NOTE = (
    "Found: tokens that a head uses beyond their neighbourhood. Needed: tokens that the worked solution reads beyond "
    "theirs. Precision: found tokens that are needed; recall: needed tokens that are found; with Wilson's "
    "95 % interval. Last read: of those in both, used for the last time in exactly the step that needs them last."
)


def truth_table(all_lives: Sequence[Lives]) -> Table | None:
    """Compare traces of built-in problems with their worked solutions; None where there is no such trace.

    Decode pages are compared for all heads together, and for the one head that finds most.
    """
    known = [(lives, both) for lives in all_lives if (both := agreement(lives)) is not None]
    if not known:
        return None
    header = known[0][0].header
    by_head = [[_decode(lives, head) for lives, _ in known] for head in range(header.layers * header.heads)]
    best = max(range(len(by_head)), key=lambda head: sum(one.both for one in by_head[head]))
    name = f"layer {best // header.heads} head {best % header.heads}"
    rows = []
    for task in dict.fromkeys(lives.header.task for lives, _ in known):
        mine = [i for i, (lives, _) in enumerate(known) if lives.header.task == task]
        prompt, decode = (total([known[i][1][part] for i in mine]) for part in (0, 1))
        lookups = total([by_head[best][i] for i in mine])
        for heads, one in (("any", prompt), ("any", decode), (name, lookups)):
            counts = [one.found, one.needed, one.both]
            rows.append([task, one.part, heads, len(mine), *counts, *_shares(one)])
    columns = dict.fromkeys(("task", "part", "heads"), "text")
    columns |= dict.fromkeys(("problems", "found", "needed", "both"), "count")
    columns |= dict.fromkeys(("precision", "recall", "last read"), "share")
    return Table(name="truth", title="Against the task", note=_NOTE, columns=columns, rows=rows)


def _decode(lives: Lives, head: int) -> Agreement:
    found = agreement(lives, head)
    assert found is not None
    return found[1]


def _shares(one: Agreement) -> list[str]:
    texts = []
    for part, whole in ((one.both, one.found), (one.both, one.needed), (one.ends, one.both)):
        if whole:
            low, high = wilson(part, whole)
            texts.append(f"{part / whole:.1%} ({100 * low:.1f} to {100 * high:.1f})")
        else:
            texts.append("")
    return texts
