"""Tables of the attention page: shares of classes, and uses compared with what the built-in task needs."""

from collections.abc import Sequence

from longthink.cli.table import Table
from longthink.lab.analyze.lives import Lives
from longthink.lab.analyze.shares import Share
from longthink.lab.analyze.truth import Agreement, agreement, total
from longthink.lab.report.attention_view import CLASS_NAMES, MAP_NAMES
from longthink.lab.results.statistics import wilson


def shares_table(shares: Sequence[Share]) -> Table:
    rows = [[one.scope, one.part, one.name, one.share, one.low, one.high, one.problems] for one in shares]
    columns = dict.fromkeys(("of", "part", "class"), "text") | dict.fromkeys(
        ("share", "low", "high"), "percent"
    )
    return Table(name="classes", title="Classes", columns=columns | {"problems": "count"}, rows=rows)


def class_tables(shares: Sequence[Share]) -> list[Table]:
    """Return a table of pages and one of heads, with a column for each class. The page's grid has single heads."""
    tables = []
    for name, title, classes, of_maps in (
        ("page-classes", "Pages", CLASS_NAMES, False),
        ("head-classes", "Heads", MAP_NAMES, True),
    ):
        found: dict[tuple[str, str], dict[str, str]] = {}
        for one in shares:
            if (one.part == "maps") == of_maps and "head" not in one.scope:
                found.setdefault((one.scope, one.part), {})[one.name] = _share_text(one)
        # The model, then its tasks, then its layers.
        order = sorted(found, key=lambda key: (key[0] != "model") + key[0].startswith("layer "))
        rows = [[*key[: 1 if of_maps else 2], *map(found[key].get, classes)] for key in order]
        columns = {"of": "text"} | ({} if of_maps else {"part": "text"}) | dict.fromkeys(classes, "formatted")
        tables.append(Table(name=name, title=title, columns=columns, rows=rows))
    return tables


def _share_text(one: Share) -> str:
    if one.low is None or one.high is None:
        return f"{one.share:.2%}"
    return f"{one.share:.2%} ({100 * one.low:.2f} to {100 * one.high:.2f})"


_TRUTH = (
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
    by_head = [
        [found[1] for lives, _ in known if (found := agreement(lives, head)) is not None]
        for head in range(header.layers * header.heads)
    ]
    best = max(range(len(by_head)), key=lambda head: sum(one.both for one in by_head[head]))
    best_name = f"layer {best // header.heads} head {best % header.heads}"
    rows = []
    for task in dict.fromkeys(lives.header.task for lives, _ in known):
        mine = [i for i, (lives, _) in enumerate(known) if lives.header.task == task]
        prompt, decode = (total([known[i][1][part] for i in mine]) for part in (0, 1))
        lookups = total([by_head[best][i] for i in mine])
        for heads, one in (("any", prompt), ("any", decode), (best_name, lookups)):
            rows.append([task, one.part, heads, len(mine), one.found, one.needed, one.both, *_shares(one)])
    columns = dict.fromkeys(("task", "part", "heads"), "text")
    columns |= dict.fromkeys(("problems", "found", "needed", "both"), "count")
    columns |= dict.fromkeys(("precision", "recall", "last read"), "formatted")
    return Table(name="truth", title="Against the task", note=_TRUTH, columns=columns, rows=rows)


def _shares(one: Agreement) -> list[str]:
    texts = []
    for part, whole in ((one.both, one.found), (one.both, one.needed), (one.ends, one.both)):
        low, high = wilson(part, whole) if whole else (0.0, 0.0)
        texts.append(f"{part / whole:.1%} ({100 * low:.1f} to {100 * high:.1f})" if whole else "")
    return texts
