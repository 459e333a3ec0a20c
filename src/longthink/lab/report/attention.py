"""The attention page: what became of every token, what every head does, and what a policy would have kept."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from math import floor
from pathlib import Path
from typing import Any

from longthink._version import __version__
from longthink.errors import needs_extra
from longthink.lab.analyze.lives import Lives, PageClass, read_lives
from longthink.lab.analyze.replays import BELADY, OPTIMUM, Replay, load_replays
from longthink.lab.analyze.rules import Rules
from longthink.lab.analyze.shares import Share, mean_with_interval, share_table, telling_texts
from longthink.lab.analyze.store import TraceStore
from longthink.lab.report.attention_figures import save_attention_figures
from longthink.lab.report.attention_truth import truth_table
from longthink.lab.report.attention_view import CLASS_NAMES, MAP_NAMES, view_of
from longthink.lab.report.escape import for_html
from longthink.lab.report.figures import Figure, Line, Panel
from longthink.lab.report.page import Page, paragraph
from longthink.lab.report.plots import save_figures
from longthink.lab.report.style import Style, make_styles
from longthink.lab.report.tables import Table

ATTENTION_PAGE = "attention.html"
"""Name of the page in the report's folder."""
SHOWN_TRACES = 4
"""Traces that the page shows one by one; all count in tables and curves."""
_NAMES = {BELADY: "belady (knows the future)", OPTIMUM: "optimum (clairvoyant)"}


def build_attention(
    trace_folder: Path | str, out_folder: Path | str, *, title: str | None = None, command: str | None = None
) -> Path:
    """Write the attention page of a trace store, its figures (PNG, PDF) and tables (CSV, Markdown).

    Replays that ``longthink what-if`` left beside the traces are shown, and the uses are counted by their rules.

    Parameters
    ----------
    trace_folder
        A trace store.
    out_folder
        Made if it is not there; a page that is there is written over.
    title
        Heading of the page; None names the model.
    command
        The command that made the page.

    Returns
    -------
    pathlib.Path
        The page.

    Raises
    ------
    TraceError
        If there is no trace, or one is damaged.
    MissingExtraError
        If plotly, matplotlib or pyarrow is not installed.
    """
    with needs_extra("analyze"):
        import matplotlib  # noqa: F401
        import plotly.offline  # noqa: F401
    store = TraceStore(trace_folder)
    traces = store.traces()
    replays, rules = load_replays(store)
    all_lives = [read_lives(trace, rules) for trace in traces]
    page = _page(title or f"Attention of {store.settings['model']}", len(traces), all_lives)
    shown = _one_of_each_task(list(range(len(traces))), [trace.header.task for trace in traces])
    views = [
        view_of(traces[i], all_lives[i], [one for one in replays if one.key[:2] == _key(all_lives[i])])
        for i in shown
    ]
    page.data["attention"] = {"traces": views, "rules": {"local": rules.local, "use": rules.use}}
    page.add("Page lives", (files("longthink.lab.report") / "attention.html").read_text(encoding="utf-8"))
    table = share_table(all_lives)
    figures = recall_figures(replays)
    for figure in figures:
        page.add_figure(figure)
    if not replays:
        page.add("Policies", paragraph("No policy was replayed on these traces: see longthink what-if."))
    truth = truth_table(all_lives)
    tables = [*read_tables(table), *([truth] if truth else [])]
    page.add("Classes", paragraph(_definitions(rules), quiet=True))
    for one in tables:
        page.add("Classes", f"<h3>{for_html(one.title)}</h3>{one.html()}")
    page.add("Classes", _texts(all_lives))
    if command:
        page.add("Origin", f"<p>This page: <code>{for_html(command)}</code></p>")
    out = Path(out_folder)
    out.mkdir(parents=True, exist_ok=True)
    save_figures(figures, out / "figures")
    save_attention_figures([(traces[i], all_lives[i]) for i in shown], all_lives, replays, out / "figures")
    for one in (*tables, shares_table(table)):
        one.save(out / "tables")
    page.save(out / ATTENTION_PAGE)
    return out / ATTENTION_PAGE


def _page(title: str, count: int, all_lives: Sequence[Lives]) -> Page:
    header = all_lives[0].header
    tokens = sum(len(lives.header.token_ids) for lives in all_lives)
    summary = (
        f"{count} {'trace' if count == 1 else 'traces'}, {tokens:,} tokens, {header.layers} layers of {header.heads} "
        f"query heads, pages of {header.page_size}. Made by longthink {__version__}."
    )
    return Page(title=title, summary=summary, parts=("attention",))


def _key(lives: Lives) -> tuple[str, str]:
    return (lives.header.task, lives.header.problem)


def _one_of_each_task(numbers: list[int], tasks: Sequence[str]) -> list[int]:
    """The first trace of every task, then the others, as many as are shown."""
    firsts = [i for i in numbers if tasks.index(tasks[i]) == i]
    return [*firsts, *(i for i in numbers if i not in firsts)][:SHOWN_TRACES]


def _definitions(rules: Rules) -> str:
    return (
        f"A page is used when a head gives it more than {rules.use:g} of its attention; near means at most "
        f"{rules.local} tokens behind. Sink: used in at least {rules.sink:g} of all steps. Local: only while near. "
        f"Phoenix: used after more than {rules.gap} steps without use. Milestone: used beyond its neighbourhood, "
        f"without such a rest. Lazy: never used. A head is sink-like when at most {rules.far:g} of what it reads is "
        "milestones and phoenixes. Shares are means over problems, with a 95 % bootstrap interval."
    )


def shares_table(shares: Sequence[Share]) -> Table:
    """All shares, one in a row: of the model and its tasks, layers and heads."""
    rows = [[one.scope, one.part, one.name, one.share, one.low, one.high, one.problems] for one in shares]
    kinds = dict.fromkeys(("of", "part", "class"), "text") | dict.fromkeys(
        ("share", "low", "high"), "percent"
    )
    return Table(name="classes", title="Classes", note="", columns=kinds | {"problems": "count"}, rows=rows)


def read_tables(shares: Sequence[Share]) -> list[Table]:
    """Shares as people read them, a column for each class: of pages, and of heads. Single heads are in the grid."""
    tables = []
    for name, title, names, whole in (
        ("page-classes", "Pages", CLASS_NAMES, False),
        ("head-classes", "Heads", MAP_NAMES, True),
    ):
        rows: dict[tuple[str, str], dict[str, str]] = {}
        for one in shares:
            if (one.part == "maps") == whole and "head" not in one.scope:
                rows.setdefault((one.scope, one.part), {})[one.name] = _share_text(one)
        columns = {"of": "text"} | ({} if whole else {"part": "text"}) | dict.fromkeys(names, "share")
        # The model, then its tasks, then its layers.
        order = sorted(rows, key=lambda key: (key[0] != "model") + key[0].startswith("layer "))
        cells = [[*(key[:1] if whole else key), *(rows[key][one] for one in names)] for key in order]
        tables.append(Table(name=name, title=title, note="", columns=columns, rows=cells))
    return tables


def _share_text(one: Share) -> str:
    if one.low is None or one.high is None:
        return f"{one.share:.2%}"
    return f"{one.share:.2%} ({100 * one.low:.2f} to {100 * one.high:.2f})"


def _texts(all_lives: Sequence[Lives]) -> str:
    blocks = []
    for which, part in (
        (PageClass.MILESTONE, "decode"),
        (PageClass.PHOENIX, "decode"),
        (PageClass.PHOENIX, "prompt"),
    ):
        found = telling_texts(all_lives, which, part=part)
        chips = "".join(
            f'<li><code>{for_html(one.text)}</code> {one.count}<span class="quiet"> ×{one.lift:.1f}</span></li>'
            for one in found
        )
        if not found:
            continue
        heading = f"Texts of {which.name.lower()} pages, {part}"
        note = "Pages of the class in at least one head; × how much more frequent than among all pages."
        blocks.append(
            f'<h3>{for_html(heading)}</h3><p class="quiet">{note}</p><ul class="chips">{chips}</ul>'
        )
    return "".join(blocks)


_MEASURES = (
    (
        "recall",
        "Attention recall",
        "Share of the dense attention on kept tokens: mean over heads, steps, problems.",
    ),
    (
        "lookups",
        "Look-ups",
        "The same in the steps that read something far away, which is where answers are made.",
    ),
)


def recall_figures(replays: Sequence[Replay]) -> list[Figure]:
    """Recall and look-ups against budget, the clairvoyant lines among the policies."""
    styles = make_styles({one.policy for one in replays})
    figures = []
    for name, title, caption in _MEASURES:
        for kind in ("budget", "decode_budget"):
            mine = [one for one in replays if not one.note and getattr(one, kind) is not None]
            lines = [
                _line(policy, [one for one in mine if one.policy == policy], name, kind, styles[policy])
                for policy in dict.fromkeys(one.policy for one in mine)
                if name == "recall" or policy != OPTIMUM  # it serves no look-up in particular
            ]
            if lines:
                words = kind.replace("_", " ")
                ticks = sorted({getattr(one, kind) for one in mine})
                problems = len({one.key[:2] for one in mine})
                counted = f"{problems} problems, 95 % intervals" if problems > 1 else "1 problem"
                panel = Panel(title=counted, lines=lines, x_ticks=ticks)
                look: dict[str, Any] = {
                    "x_label": f"{words} (tokens)",
                    "y_label": "share kept",
                    "percent": True,
                    # Policies lie close together at the top.
                    "floor": min(0.9, floor(10 * min(min(line.low or line.y) for line in lines)) / 10),
                }
                figures.append(
                    Figure(name=f"{name}-{words.replace(' ', '-')}", section="Policies",
                           title=f"{title} against {words}",
                           caption=caption, panels=[panel], **look)
                )  # fmt: skip
    return figures


def _line(policy: str, replays: Sequence[Replay], name: str, kind: str, style: Style) -> Line:
    """Means over problems of one policy at each budget."""
    values: dict[int, list[float]] = {}
    for one in replays:
        values.setdefault(getattr(one, kind), []).append(getattr(one, name))
    means = {budget: mean_with_interval(values[budget]) for budget in sorted(values)}
    label = _NAMES.get(policy, policy)
    several = all(low is not None for _, low, _ in means.values())
    return Line(
        label=label,
        style=style,
        kind="curve",
        x=[float(budget) for budget in means],
        y=[mean for mean, _, _ in means.values()],
        low=[low for _, low, _ in means.values() if low is not None and several],
        high=[high for _, _, high in means.values() if high is not None and several],
        hover=[f"{label}, {budget}: {mean:.1%}" for budget, (mean, _, _) in means.items()],
    )
