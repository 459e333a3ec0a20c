"""Foreign text stays text in every format."""

import csv
import html
import io
import json
import re
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longthink.cli.table import Table
from longthink.cli.text import for_markdown, visible
from longthink.lab.report.comparison import StoreComparison
from longthink.lab.report.figures import Figure, Line, Panel
from longthink.lab.report.page import Page, environment
from longthink.lab.report.plots import save_figures
from longthink.lab.report.style import make_styles

SAFE_JSON = environment().filters["tojson"]
characters = st.characters(exclude_categories=["Cs"])
foreign = st.lists(
    st.sampled_from(["<", ">", "&", '"', "'", "</script>", "$", "|", "\n", "\x1b", "\u2028", "{{", "%}"])
    | characters
).map("".join)


def rendered(block, *content):
    """What a block of a page becomes."""
    return str(getattr(environment().get_template("parts.html").module, block)(*content))


def text_of(element, made):
    """The texts of all such elements, as a browser shows them."""
    found = re.findall(rf"<{element}[^>]*>([^<>]*)</{element}>", made)
    return [html.unescape(text) for text in found]


@given(foreign)
def test_html_shows_the_text_and_has_no_markup(text):
    made = rendered("text", text)
    assert len(re.findall("[<>]", made)) == 4
    assert text_of("p", made) == [visible(text)]
    for block in ("items", "incomplete"):
        assert text_of("li", rendered(block, [text, text])) == [visible(text)] * 2


@given(foreign.map("x".__add__))
def test_every_field_of_origin_and_comparison_is_text(text):
    record = {"count": 1} | dict.fromkeys(("first", "last", "versions", "hardware"), text)
    made = rendered("origin", [record], [], text)
    shown = visible(text)
    assert text_of("li", made) == [f"1 records from {shown} to {shown}: {shown}; {shown}"]
    assert text_of("code", made) == [shown]
    found = StoreComparison(comparisons=[], only_here=[text], only_there=[text])
    made = rendered("comparison", found, Table(columns={}, rows=[]), text)
    assert text_of("li", made) == [shown, shown]
    assert text_of("p", made) == [f"0 setups are in both this store and {shown}."]
    assert text_of("h3", made) == ["Only in this store", f"Only in {shown}"]


@given(foreign.map("x".__add__))
def test_every_text_of_a_trace_is_text(text):
    made = rendered("telling_texts", "milestone", "decode", [SimpleNamespace(text=text, count=2, lift=1.5)])
    assert text_of("code", made) == [visible(text)]
    made = rendered(
        "titled_table", Table(title=text, note=f"{text}.", columns={"a": "text"}, rows=[[text]], marked={0})
    )
    assert text_of("h3", made) == text_of("td", made) == [visible(text)]
    assert text_of("p", made) == [f"{visible(text)}."]


@given(foreign)
def test_every_field_of_an_answer_is_text(text):
    row = dict.fromkeys(("problem", "answer", "gold", "finish", "text"), text)
    row |= {"sample": 0, "correct": False, "generated_tokens": 1}
    made = rendered("answers", [(text, [row])])
    assert text_of("summary", made) == text_of("pre", made) == [visible(text)]
    assert text_of("code", made) == [visible(text)] * 3
    assert len(re.findall("<[^>]*>", made)) == 18


def figure(text, *, name="f"):
    line = Line(
        label=text, style=make_styles([text])[text], kind="curve", x=[1, 2], y=[1, 2], hover=[text] * 2
    )
    panel = Panel(title=text, lines=[line])
    return Figure(
        name=name,
        section="s",
        title=text,
        subtitle=text,
        caption=text,
        x_label="x",
        y_label="y",
        panels=[panel],
    )


@pytest.mark.parametrize(
    "text", ["<script>1</script>", "\"'><img src=x onerror=y>", "$\\frac{$ &lt;", "a\x1bb\u202e"]
)
def test_every_field_of_a_figure_is_text(text):
    made = rendered("figure", figure(text))
    assert "<script" not in made and "<img" not in made
    for element in ("h3", "h4", "span"):
        assert text_of(element, made) == [visible(text)]
    assert text_of("p", made) == [visible(text)] * 2
    (label,) = re.findall('aria-label="([^"]*)"', made)
    assert html.unescape(label) == f"{visible(text)}: {visible(text)}"


@pytest.mark.slow
def test_matplotlib_sees_no_formula(tmp_path):
    for text in ("$x$", "$\\frac{", "\\$ $y$"):
        save_figures([figure(text)], tmp_path)
    from matplotlib.testing.compare import compare_images

    save_figures([figure("$x$", name="formula"), figure("x", name="plain")], tmp_path)
    found = compare_images(str(tmp_path / "formula.png"), str(tmp_path / "plain.png"), tol=0.1)
    assert found is not None, "the dollars are drawn"


@pytest.mark.slow
@given(st.recursive(foreign | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(foreign, inner)))
def test_data_in_a_page_cannot_end_its_script(document):
    made = environment().from_string("{{ document | tojson }}").render(document=document)
    assert not set("<>&") & set(made)
    assert made.isascii()
    assert json.loads(made) == document


def test_data_that_no_browser_reads_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        environment().from_string("{{ document | tojson }}").render(document=[float("nan")])


def test_a_whole_page_of_foreign_text():
    evil = "</script></style><script>pwned()</script>\u2028"
    page = Page(title=evil, summary=evil)
    page.add(evil, "table", Table(name="t", columns={evil: "text"}, rows=[[evil], ["b"]], note=evil))
    page.add(evil, "figure", figure(evil))
    page.add(evil, "origin", [], [], evil)
    page.data["more"] = {evil: evil}
    made = page.html()
    assert "<script>pwned" not in made and "\u2028" not in made
    assert made.count("</style>") == made.count("<style") == 1
    assert made.count("</script>") == made.count("<script") == 3


def test_controls_and_directions_are_seen():
    assert visible("a\x1b[31mb\u202ec\x9b\td\n") == "a␛[31mb\\u202ec\\x9b\td\n"


@given(st.lists(foreign, min_size=1, max_size=3))
def test_tables_keep_their_columns(values):
    columns = {f"column {i}": "text" for i in range(len(values))}
    table = Table(name="t", title="T", note="n", columns=columns, rows=[values])
    lines = table.markdown().splitlines()
    assert len(lines) == 7
    assert lines[6].replace("\\|", "").count("|") == lines[4].count("|")
    assert all("<" not in for_markdown(value) for value in values)
    assert next(csv.reader(io.StringIO(table.csv().partition("\n")[2], newline=""))) == values
    assert text_of("td", rendered("table", table)) == [visible(value) for value in values]
