"""The attention page: the life of every token, the class of every head, and what a policy would have kept."""

from collections.abc import Sequence
from math import floor
from pathlib import Path

from longthink._version import __version__
from longthink.errors import needs_extra
from longthink.lab.analyze.lives import Lives, PageClass, read_lives
from longthink.lab.analyze.replays import BELADY, OPTIMUM, Replay, load_replays
from longthink.lab.analyze.shares import mean_with_interval, share_table, telling_texts
from longthink.lab.analyze.store import TraceStore
from longthink.lab.report.attention_tables import class_tables, shares_table, truth_table
from longthink.lab.report.attention_view import view_of
from longthink.lab.report.figures import Figure, Line, Panel
from longthink.lab.report.page import Page
from longthink.lab.report.style import Style, make_styles

ATTENTION_PAGE = "attention.html"
SHOWN_TRACES = 4  # traces that the page shows one by one; all count in tables and curves
_TELLING = ((PageClass.MILESTONE, "decode"), (PageClass.PHOENIX, "decode"), (PageClass.PHOENIX, "prompt"))


def build_attention(
    trace_folder: Path | str, out_folder: Path | str, *, title: str | None = None, command: str | None = None
) -> Path:
    """Write the attention page of a trace store, its figures (PNG, PDF) and tables (CSV, Markdown); return its path.

    Replays that ``longthink what-if`` left beside the traces are shown, and uses are counted by their rules. An
    existing page is overwritten; `title` None names the model; `command` is shown as the page's origin.
    """
    with needs_extra("analyze"):
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    store = TraceStore(trace_folder)
    traces = store.traces()
    replays, rules = load_replays(store)
    all_lives = [read_lives(trace, rules) for trace in traces]
    page = Page(
        title=title or f"Attention of {store.settings['model']}",
        summary=_summary(all_lives),
        parts=("page", "attention"),
    )
    views = []
    for i in _shown([trace.header.task for trace in traces]):
        header = traces[i].header
        mine = [one for one in replays if one.key[:2] == (header.task, header.problem)]
        views.append(view_of(traces[i], all_lives[i], mine))
    page.data["attention"] = {"traces": views, "rules": {"local": rules.local, "use": rules.use}}
    page.add("Page lives", "lives")
    for figure in recall_figures(replays):
        page.add(figure.section, "figure", figure)
    if not replays:
        page.add("Policies", "text", "No policy was replayed on these traces: see longthink what-if.")
    shares = share_table(all_lives)
    page.add("Classes", "classes", rules)
    for table in class_tables(shares):
        page.add("Classes", "titled_table", table)
    if truth := truth_table(all_lives):
        page.add("Classes", "titled_table", truth)
    for kind, part in _TELLING:
        if texts := telling_texts(all_lives, kind, part=part):
            page.add("Classes", "telling_texts", kind.name.lower(), part, texts)
    if command:
        page.add("Origin", "origin", [], [], command)
    out = Path(out_folder)
    shares_table(shares).save(out / "tables")
    return page.save(out / ATTENTION_PAGE)


def _summary(all_lives: Sequence[Lives]) -> str:
    header = all_lives[0].header
    tokens = sum(len(lives.header.token_ids) for lives in all_lives)
    count = f"{len(all_lives)} {'trace' if len(all_lives) == 1 else 'traces'}"
    return (
        f"{count}, {tokens:,} tokens, {header.layers} layers of {header.heads} query heads, pages of "
        f"{header.page_size}. Made by longthink {__version__}."
    )


def _shown(tasks: Sequence[str]) -> list[int]:
    """Return the traces to show: the first of every task, then others."""
    return sorted(range(len(tasks)), key=lambda i: tasks.index(tasks[i]) != i)[:SHOWN_TRACES]


_MEASURES = {
    "recall": (
        "Attention recall",
        "Share of the dense attention on kept tokens: mean over heads, steps, problems.",
    ),
    "lookups": (
        "Look-ups",
        "The same in the steps that read something far away, which is where answers are made.",
    ),
}
_LABELS = {BELADY: "belady (knows the future)", OPTIMUM: "optimum (clairvoyant)"}


def recall_figures(replays: Sequence[Replay]) -> list[Figure]:
    styles = make_styles({one.policy for one in replays})
    figures = []
    for measure, (title, caption) in _MEASURES.items():
        for kind in ("budget", "decode_budget"):
            mine = [one for one in replays if not one.note and getattr(one, kind) is not None]
            lines = [
                _line([one for one in mine if one.policy == policy], measure, kind, styles[policy])
                for policy in dict.fromkeys(one.policy for one in mine)
                if measure == "recall" or policy != OPTIMUM  # it serves no look-up in particular
            ]
            if not lines:
                continue
            words = kind.replace("_", " ")
            problems = len({one.key[:2] for one in mine})
            counted = f"{problems} problems, 95 % intervals" if problems > 1 else "1 problem"
            ticks = sorted({getattr(one, kind) for one in mine})
            # Policies lie close together at the top.
            lowest = floor(10 * min(min(line.low or line.y) for line in lines)) / 10
            figures.append(Figure(
                name=f"{measure}-{kind.replace('_', '-')}", section="Policies", title=f"{title} against {words}",
                caption=caption, x_label=f"{words} (tokens)", y_label="share kept", percent=True,
                floor=min(0.9, lowest), panels=[Panel(title=counted, lines=lines, x_ticks=ticks)],
            ))  # fmt: skip
    return figures


def _line(replays: Sequence[Replay], measure: str, kind: str, style: Style) -> Line:
    values: dict[int, list[float]] = {}
    for one in replays:
        values.setdefault(getattr(one, kind), []).append(getattr(one, measure))
    means = {budget: mean_with_interval(values[budget]) for budget in sorted(values)}
    label = _LABELS.get(replays[0].policy, replays[0].policy)
    lows, highs = ([mean[end] for mean in means.values()] for end in (1, 2))
    several = None not in lows
    return Line(
        label=label, style=style, kind="curve", x=[float(budget) for budget in means],
        y=[mean for mean, _, _ in means.values()], low=[low for low in lows if low is not None and several],
        high=[high for high in highs if high is not None and several],
        hover=[f"{label}, {budget}: {mean:.1%}" for budget, (mean, _, _) in means.items()],
    )  # fmt: skip
