"""Foreign text stays text in every format."""

import csv
import html
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.cbook import is_math_text

from longthink.lab.report.escape import (
    for_html,
    for_markdown,
    for_matplotlib,
    for_plotly,
    for_script,
    visible,
)
from longthink.lab.report.tables import Table

characters = st.characters(exclude_categories=["Cs"])
foreign = st.lists(
    st.sampled_from(["<", ">", "&", '"', "'", "</script>", "$", "|", "\n", "\x1b"]) | characters
).map("".join)


@given(foreign)
def test_html_shows_the_text_and_has_no_markup(text):
    made = for_html(text)
    assert not set("<>\"'") & set(made)
    assert html.unescape(made) == visible(text)


@given(foreign)
def test_plotly_has_no_tags_but_line_ends(text):
    made = for_plotly(text)
    assert "<" not in made.replace("<br>", "")
    assert html.unescape(made.replace("<br>", "\n")) == visible(text)


@pytest.mark.slow
@given(st.recursive(foreign | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(foreign, inner)))
def test_data_in_a_page_cannot_end_its_script(document):
    made = for_script(document)
    assert not set("<>&") & set(made)
    assert made.isascii()
    assert json.loads(made) == document


def test_data_that_no_browser_reads_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        for_script([float("nan")])


def test_controls_and_directions_are_seen():
    assert visible("a\x1b[31mb\u202ec\x9b\td\n") == "a␛[31mb\\u202ec\ufffd\td\n"


@given(foreign)
def test_matplotlib_sees_no_formula(text):
    assert not is_math_text(for_matplotlib(text))


@given(st.lists(foreign, min_size=1, max_size=3))
def test_tables_keep_their_columns(values):
    columns = {f"column {i}": "text" for i in range(len(values))}
    table = Table(name="t", title="T", note="n", columns=columns, rows=[values])
    lines = table.markdown().splitlines()
    assert len(lines) == 7
    assert lines[6].replace("\\|", "").count("|") == lines[4].count("|")
    assert all("<" not in for_markdown(value) for value in values)
    assert next(csv.reader(io.StringIO(table.csv().partition("\n")[2], newline=""))) == values
    assert table.html().count("<td") == len(values)
