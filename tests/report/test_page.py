"""The page in a real browser: drawn, silent, alone, and harmless whatever a model wrote."""

import pytest

from longthink.lab.report import build
from longthink.lab.results.store import ResultStore
from tests.report.browser import BROWSER
from tests.report.stores import fill, measure
from tests.results.making import make_measurement, make_sample

EVIL = (
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=2>",
    "</script><script>window.pwned=3</script>",
    "\"'><svg onload=window.pwned=4>",
    "<a href='https://example.com/'>link</a> &lt;b&gt; %{x} $x$",
    "]]><!--<![CDATA[",
)
EVIL_TEXT = " ".join(EVIL)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason="no Chromium is installed: the page is not looked at in a browser"
    ),
]


@pytest.fixture(scope="module", autouse=True)
def no_figure_files():
    """Figures as files take longest and are not what is looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longthink.lab.report.page.save_figures", lambda figures, folder: None)
        yield


@pytest.fixture(scope="module")
def report(tmp_path_factory, no_figure_files):
    """A report of all kinds of figures, compared with a store in which raas was far worse."""
    folder = tmp_path_factory.mktemp("report")
    measure(fill(folder / "store"))
    fill(folder / "other", right={"raas": 0})
    return build(folder / "store", folder / "out", against=folder / "other", title="Spring & <summer>")


def panel_of(page, figure, number):
    """What is drawn of each line of a panel, by its policy or label: its points on the screen."""
    found = page.evaluate(
        """id => {
            const plot = document.getElementById(id), bars = [...plot.querySelectorAll('.LineCollection')];
            const hover = JSON.parse(document.getElementById('hover').textContent);
            return Object.fromEntries([...plot.querySelectorAll('g[id*="-line-"]')].map(line => {
                const marks = [...line.querySelectorAll('use')].filter(one => one.getBoundingClientRect().width > 2);
                const paths = [...line.querySelectorAll(':scope > path')];
                const mine = marks.length && bars.length ? bars.shift().querySelectorAll('path') : [];
                const name = hover[line.id][0].split('\\n')[0];
                return [name, [marks.length, mine.length, paths.some(path => path.getTotalLength() > 20)]];
            }));
        }""",
        f"{figure}-{number}",
    )
    if figure in ("jct", "memory", "step-time"):
        return found
    return {name.rpartition(", ")[0]: drawn for name, drawn in found.items()}


def bands(page, figure, number):
    """Heights, in pixels, of the intervals of horizontal lines."""
    return page.evaluate(
        """id => [...document.querySelectorAll(`#${id} g.axes > g.patch path`)].filter(p => p.style.fill !== 'none')
            .map(p => p.getBoundingClientRect()).filter(box => box.width > 100).map(box => box.height)""",
        f"{figure}-{number}",
    )


def test_figures_are_drawn_with_all_their_points(report, visit):
    page = visit(report)
    curve = [3, 3, True]
    for number in range(4):
        (height,) = bands(page, "accuracy-decode-budget-1", number)
        assert height > 20
        assert panel_of(page, "accuracy-decode-budget-1", number) == {
            "dense": [0, 0, True],
            "raas": curve,
            "raas:r=0.25": curve,
            "recency": curve,
        }
        assert panel_of(page, "accuracy-budget-1", number)["raas"] == [2, 2, True]
    assert panel_of(page, "jct-samples-1", 0) == {"dense": [30, 0, False], "raas": [30, 0, False]}
    assert bands(page, "jct-samples-1", 0) == []
    for figure, bars in (("jct", 0), ("memory", 0), ("step-time", 4)):
        expected = {"hf dynamic", "raas, decode budget 128", "raas, decode budget 512"}
        assert panel_of(page, figure, 0) == {name: [4, bars, True] for name in expected}
    ticks = page.locator("#accuracy-decode-budget-1-0 .xtick text").all_text_contents()
    assert ticks == ["32", "64", "128"]
    assert "100%" in page.locator("#accuracy-decode-budget-1-0 .ytick text").all_text_contents()
    assert "decode budget (tokens)" in page.locator("#accuracy-decode-budget-1-0 svg").text_content()
    assert page.locator(".plot").count() == page.locator(".plot svg").count() == 37
    ids = page.evaluate("[...document.querySelectorAll('.plot svg [id]')].map(element => element.id)")
    assert len(ids) == len(set(ids)) > 37, "no figure refers to the markers of another"
    assert page.locator("h1").inner_text() == "Spring & <summer>"
    assert (page.faults, page.asked) == ([], [])


def test_legends_and_tables_say_what_is_there(report, visit):
    page = visit(report)
    legend = page.locator("figure:has(#accuracy-decode-budget-1-0) .legend li").all_text_contents()
    assert [text.strip() for text in legend] == ["dense", "raas", "raas:r=0.25", "recency"]
    assert page.locator("#results tbody tr").count() == 36 + 12
    # Dense is on both sides of nothing: 11 other configurations on three tasks and the pooled family.
    assert page.locator("#differences tbody tr").count() == 11 * 4
    text = page.locator("section").first.inner_text()
    assert "36 setups are in both this store and" in text
    assert "Changed significantly" not in text
    assert "Nothing changed significantly" in text


@pytest.mark.parametrize(("scheme", "width"), [("light", 340), ("dark", 1200)])
def test_colours_follow_the_reader_and_narrow_windows_do_not_scroll_sideways(report, visit, scheme, width):
    page = visit(report, color_scheme=scheme, viewport={"width": width, "height": 800})
    back, text, plot_text = page.evaluate(
        """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
                  getComputedStyle(document.querySelector('#accuracy-decode-budget-1-0 .xtick text')).fill]"""
    )
    brightness = [sum(map(int, colour[4:-1].split(","))) / 3 for colour in (back, text, plot_text)]
    assert brightness[0] > 240 if scheme == "light" else brightness[0] < 40
    assert abs(brightness[0] - brightness[1]) > 150
    assert brightness[2] == pytest.approx(brightness[1], abs=1)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # The colours change while the page is open, too.
    page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    tick = "document.querySelector('#accuracy-decode-budget-1-0 .xtick text')"
    page.wait_for_function(f"before => getComputedStyle({tick}).fill != before", arg=plot_text)
    assert (page.faults, page.asked) == ([], [])


@pytest.fixture(scope="module")
def evil_report(tmp_path_factory, no_figure_files):
    folder = tmp_path_factory.mktemp("evil")
    store = ResultStore(folder / "store")
    for i, evil in enumerate((*EVIL, EVIL_TEXT)):
        store.add(
            make_sample(
                policy=evil,
                switches=evil,
                model=EVIL_TEXT,
                revision=EVIL_TEXT,
                task=EVIL_TEXT,
                budget=64,
                problem=EVIL_TEXT,
                text=EVIL_TEXT,
                answer=EVIL_TEXT,
                gold=EVIL_TEXT,
                correct=i % 2 == 0,
                versions=EVIL_TEXT,
                hardware=EVIL_TEXT,
            ),
            # Each point has a place of its own, so that each can be pointed at.
            make_measurement(
                run=f"{EVIL_TEXT}{i}",
                system=evil,
                model=EVIL_TEXT,
                hardware=EVIL_TEXT,
                decode_tokens=200 * (i + 1),
                kv_bytes=2**20 * (i + 1),
            ),
        )
    store.add(make_sample(model=EVIL_TEXT, revision=EVIL_TEXT, task=EVIL_TEXT, problem=EVIL_TEXT))
    return build(
        folder / "store", folder / "out", against=folder / "store", title=EVIL_TEXT, command=EVIL_TEXT
    )


@pytest.mark.parametrize("policy_on", [True, False])
def test_what_a_model_writes_does_nothing(evil_report, visit, tmp_path, policy_on):
    """Also without the page's own security policy: the escapes hold alone."""
    path = evil_report
    if not policy_on:
        html = path.read_text()
        assert html.count("Content-Security-Policy") == 1
        path = tmp_path / "open.html"
        path.write_text(html.replace("Content-Security-Policy", "X-Nothing"))
    page = visit(path)
    page.evaluate("document.querySelectorAll('details').forEach(block => { block.open = true; })")
    for plot in ("#memory-0", "#accuracy-budget-1-0"):
        page.locator(plot).hover()
        page.locator(f"{plot} g[id] use").first.hover(force=True)
        assert page.locator("#tip").is_visible()
    assert page.evaluate("window.pwned") is None
    assert page.locator("main img, main script, header img, main a[href^=http]").count() == 0
    assert page.locator("[onload], [onerror]").count() == 0
    assert page.locator("h1").inner_text() == EVIL_TEXT
    texts = page.locator("pre").all_text_contents()
    assert texts.count(EVIL_TEXT) == 7
    shown = page.locator("main").inner_text()
    for evil in EVIL:
        assert shown.count(evil) > 20
    codes = page.locator("details code").all_text_contents()
    assert codes.count(EVIL_TEXT) >= 3 * 7
    assert (page.faults, page.asked) == ([], [])


def test_hover_shows_texts_as_they_are(evil_report, visit):
    page = visit(evil_report)
    plot = page.locator("#memory-0")
    plot.scroll_into_view_if_needed()
    seen = set()
    for point in plot.locator("g[id*=-line-] use").all():
        box = point.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        assert page.locator("#tip").is_visible()
        seen.add(page.locator("#tip").text_content())
        assert page.locator("#tip *").count() == 0
    page.mouse.move(0, 0)
    assert not page.locator("#tip").is_visible()
    for evil in (*EVIL, EVIL_TEXT):
        assert [text for text in seen if text.startswith(f"{evil}, decode budget 128")] != [], evil
    assert (page.evaluate("window.pwned"), page.faults, page.asked) == (None, [], [])
