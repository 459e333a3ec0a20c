"""Life stories against slow lists, and classes of maps whose truth is known because they were made that way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longthink.lab.analyze.lives import Lives, MapClass, PageClass, map_classes, read_lives
from longthink.lab.analyze.rules import Rules
from longthink.lab.analyze.shares import share_table, telling_texts
from tests.analyze.making import dense, recorded, written

RULES = Rules(use=0.4, local=4, gap=12, sink=0.5)
PROMPT, STEPS = 10, 90


def slow_story(reads, birth, page, rules):
    """Life of one page from the list of its masses, step by step."""
    used = [now for now, mass in reads if mass > rules.use]
    stops = [birth - 1, *used]
    total, so_far = sum(mass for _, mass in reads), 0.0
    half = 0
    for now, mass in reads:
        so_far += mass
        if mass and so_far >= total / 2:
            half = now - birth
            break
    return {
        "uses": len(used),
        "first": used[0] if used else -1,
        "last": used[-1] if used else -1,
        "far_last": max((now for now in used if now - page > rules.local), default=-1),
        "gap": max((b - a - 1 for a, b in zip(stops, used, strict=False)), default=0),
        "half": half,
    }


def test_stories_are_those_of_a_slow_reading(tmp_path):
    (trace,) = recorded(tmp_path / "t", new=40).traces()
    rules = Rules(use=0.15, local=3, gap=5)
    lives, attention_MTN = read_lives(trace, rules), dense(trace)
    header = trace.header
    for head in range(8):
        for page in range(header.pages):
            reads = [
                (header.prompt_tokens + t, attention_MTN[head, t, page]) for t in range(len(header.steps))
            ]
            story = slow_story(reads, max(page, header.prompt_tokens), page, rules)
            assert {name: getattr(lives, f"{name}_MP")[head, page] for name in story} == story, (head, page)
    np.testing.assert_allclose(lives.mass_MP, attention_MTN.sum(1), rtol=1e-5)


@st.composite
def maps(draw):
    """A map in which every page has a class that it was given; one row sums to at most one."""
    attention = np.zeros((STEPS, PROMPT + STEPS))
    truth = np.full(PROMPT + STEPS, int(PageClass.LAZY))
    free = np.ones(STEPS, dtype=bool)
    with_sink = draw(st.booleans())
    if with_sink:
        # Read in every second step: no other page is used in these.
        attention[::2, 0], truth[0], free[::2] = 0.9, PageClass.SINK, False
    pages = draw(st.lists(st.integers(1, PROMPT + STEPS - 1), unique=True, max_size=12))
    for page in pages:
        kind = draw(st.sampled_from([PageClass.LOCAL, PageClass.PHOENIX, PageClass.MILESTONE]))
        birth = max(page, PROMPT)
        steps = wanted_steps(draw, kind, page, birth)
        rows = [step - PROMPT for step in steps if step - PROMPT < STEPS]
        if rows and len(rows) == len(steps) and free[rows].all():
            attention[rows, page], truth[page] = 0.9, kind
            free[rows] = False
    return attention, truth


def wanted_steps(draw, kind, page, birth):
    """Steps in which a page is read so that it becomes what it shall be."""
    if kind == PageClass.LOCAL:
        return [draw(st.integers(birth, page + RULES.local))] if birth <= page + RULES.local else []
    if kind == PageClass.MILESTONE:
        steps = [draw(st.integers(max(birth, page + RULES.local + 1), birth + RULES.gap))]
        for _ in range(draw(st.integers(0, 3))):
            steps.append(steps[-1] + draw(st.integers(1, RULES.gap + 1)))
        return steps
    return [birth + RULES.gap + 1 + draw(st.integers(0, 9))]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(maps())
def test_pages_have_the_class_that_they_were_given(tmp_path_factory, made):
    attention, truth = made
    trace = written(tmp_path_factory.mktemp("m") / "m.parquet", attention[None, None], PROMPT)
    lives = read_lives(trace, RULES)
    assert lives.classes_MP[0].tolist() == truth.tolist()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(MapClass), st.integers(0, 10**6))
def test_maps_have_the_class_that_they_were_given(tmp_path_factory, which, seed):
    rng = np.random.default_rng(seed)
    attention = np.full((STEPS, PROMPT + STEPS), 1e-3)
    for t in range(STEPS):
        now = PROMPT + t
        near = max(0, now - rng.integers(0, RULES.local))
        # Each block of 20 steps reads one token that was written in the block before it.
        waterfall = max(0, PROMPT + t // 20 * 20 - 5)
        late = rng.integers(0, PROMPT) if t > 2 * RULES.gap else near
        if which == MapClass.MIXED:
            continue
        page = {MapClass.SINK_LIKE: near, MapClass.MILESTONE: waterfall, MapClass.PHOENIX: late}[which]
        attention[t, page] = 0.8
    if which == MapClass.PHOENIX:
        attention[: 2 * RULES.gap + 1, PROMPT:] = 1e-3
    trace = written(tmp_path_factory.mktemp("m") / "m.parquet", attention[None, None], PROMPT)
    assert MapClass(map_classes(read_lives(trace, RULES))[0]) == which


@pytest.mark.parametrize(
    "near, milestone, phoenix, which",
    [
        (90, 10, 0, MapClass.SINK_LIKE),
        (89, 6, 5, MapClass.MIXED),
        (89, 11, 0, MapClass.MILESTONE),
        (0, 68, 32, MapClass.MILESTONE),
        (0, 67, 33, MapClass.MIXED),
        (0, 33, 67, MapClass.MIXED),
        (0, 32, 68, MapClass.PHOENIX),
        (0, 0, 0, MapClass.MIXED),
    ],
)
def test_where_one_class_of_maps_ends_and_another_begins(near, milestone, phoenix, which):
    """Three pages: one read while near, a milestone, a phoenix; what counts is how much goes to each."""
    one, read = np.ones((1, 3), dtype=np.int64), np.array([[near, milestone, phoenix]], dtype=float)
    lives = Lives(
        header=None, rules=Rules(), birth_P=np.zeros(3, dtype=np.int64), uses_MP=one, first_MP=one, last_MP=one,
        far_last_MP=np.array([[-1, 1, 1]]), gap_MP=np.array([[0, 128, 129]]), mass_MP=read, read_MP=read,
        near_MP=read * [1, 0, 0], half_MP=one, end=500,
    )  # fmt: skip
    assert MapClass(map_classes(lives)[0]) == which


def test_shares_and_their_intervals(tmp_path):
    """Two problems: in one all decode pages are lazy, in the other half of the maps read one milestone."""
    attention = np.zeros((1, 2, 30, 40))
    lazy = written(tmp_path / "a.parquet", attention + 1e-3, 10)
    attention[0, 0, 5 + 12, 15] = 0.9
    busy = written(tmp_path / "b.parquet", attention, 10)
    table = share_table([read_lives(lazy, RULES), read_lives(busy, Rules(use=0.4, local=4, gap=20))])
    found = {(one.scope, one.part, one.name): one for one in table}
    milestones = found["model", "decode", "milestone"]
    assert milestones.share == pytest.approx((0 + 1 / 60) / 2)
    assert milestones.problems == 2 and milestones.low < milestones.share < milestones.high
    assert found["layer 0 head 0", "decode", "milestone"].share == pytest.approx(1 / 60)
    assert found["layer 0 head 1", "decode", "milestone"].share == 0
    assert found["model", "maps", "milestone"].share == pytest.approx(1 / 4)
    for part in ("all", "prompt", "decode"):
        assert sum(found["made", part, one.name.lower()].share for one in PageClass) == pytest.approx(1)


def test_texts_that_milestones_have(tmp_path):
    attention = np.zeros((1, 1, 30, 40))
    for t, page in ((17, 15), (18, 16), (25, 20)):
        attention[0, 0, t, page] = 0.9
    texts = ["p"] * 10 + ["x", "y", "z", "w", "v"] * 6 + ["end"]
    trace = written(tmp_path / "a.parquet", attention, 10, texts=texts)
    (first, second) = telling_texts([read_lives(trace, Rules(use=0.4, local=4, gap=20))])
    assert (first.text, first.count, first.lift) == ("x", 2, pytest.approx(2 / 3 / 0.2))
    assert (second.text, second.count) == ("y", 1)


@pytest.mark.parametrize(
    "field, value", [("use", 1.5), ("local", -1), ("gap", 0), ("sink", -0.1), ("majority", 2)]
)
def test_rules_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        Rules(**{field: value})
