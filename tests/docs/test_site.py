"""The documentation site: it builds strictly, no link is dead, and it can be read in a browser, also on a phone."""

import json
import os
import re
import runpy
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

import longthink
from longthink.policies import Policy
from tests.report.browser import BROWSER, started

pytest.importorskip("mkdocs", reason="needs the extra docs")
pytest.importorskip("mkdocstrings", reason="needs the extra docs")
ROOT = Path(__file__).parents[2]
site = SimpleNamespace(**runpy.run_path(str(ROOT / "scripts" / "site.py")))
HELD = {
    "index.md",
    "overview.md",
    "fidelity.md",
    "policies/raas.md",
    "benchmarks/2026.md",
    "examples/chat.md",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of the site, built from this checkout."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


class Targets(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("href", "src") and value]


def dead_links(folder):
    dead = []
    for page in folder.rglob("*.html"):
        parser = Targets()
        parser.feed(page.read_text())
        for target in parser.found:
            place = urlsplit(target)
            is_local = not place.scheme and place.path and page.name != "404.html"
            if is_local and not (page.parent / unquote(place.path)).exists():
                dead.append(f"{page.relative_to(folder)}: {target}")
    return dead


@pytest.mark.slow
def test_no_link_is_dead_and_every_page_is_there(built):
    assert dead_links(built) == []
    pages = {str(path.relative_to(built)) for path in built.rglob("*.html")}
    for path in (ROOT / "docs").rglob("*.md"):
        assert site.place(str(path.relative_to(ROOT))).removesuffix(".md") + ".html" in pages
    (built / "broken.html").write_text('<a href="gone.html">x</a>')
    assert dead_links(built) == ["broken.html: gone.html"]
    (built / "broken.html").unlink()


@pytest.mark.slow
def test_the_search_finds_text_of_the_pages_and_of_docstrings(built):
    index = json.loads((built / "search" / "search_index.json").read_text())["docs"]
    texts = {entry["location"]: entry["text"] for entry in index}
    assert any("teacher forcing" in text for place, text in texts.items() if place.startswith("fidelity"))
    generate = " ".join(text for place, text in texts.items() if place.startswith("api/generate"))
    assert "decode_budget" in generate and "BudgetError" in generate


def test_every_public_name_has_a_place():
    """On a page of the API, or as a policy, which has a page of its own."""
    assert {*site.public_names()} == {*longthink.__all__}
    named = {name for names in site.API.values() for name in names}
    for name in longthink.__all__:
        thing = getattr(longthink, name)
        is_policy = isinstance(thing, type) and issubclass(thing, Policy)
        is_error = isinstance(thing, type) and issubclass(thing, Exception)
        assert name in named or is_policy or is_error or name == "__version__", name


@pytest.mark.parametrize(
    ("path", "text", "repo_url", "wanted"),
    [
        ("docs/fidelity.md", "[a](policies/raas.md#rule)", None, "[a](policies/raas.md#rule)"),
        ("docs/fidelity.md", "[a](../benchmarks/2026.md)", None, "[a](benchmarks/2026.md)"),
        ("docs/policies/raas.md", "[a](../index.md)", None, "[a](../overview.md)"),
        ("benchmarks/2026.md", "[a](../docs/fidelity.md#x)", None, "[a](../fidelity.md#x)"),
        ("README.md", "[`a b`](docs/fidelity.md) and `c`", None, "[`a b`](fidelity.md) and `c`"),
        ("docs/fidelity.md", "[a](../examples/chat.py)", None, "[a](examples/chat.md)"),
        ("docs/fidelity.md", "[a](../src/x.py)", None, "a"),
        (
            "docs/fidelity.md",
            "[a](../src/x.py)",
            "https://x.org/y/",
            "[a](https://x.org/y/blob/main/src/x.py)",
        ),
        ("docs/fidelity.md", "[a](https://x.org) [b](#c)", None, "[a](https://x.org) [b](#c)"),
        ("docs/fidelity.md", "```python\nf[0](x.md)\n```\n    g[0](x.md)", None, None),
    ],
)
def test_links_lead_to_where_pages_stand(path, text, repo_url, wanted):
    assert site.relinked(text, path, HELD, repo_url) == (text if wanted is None else wanted)


@pytest.fixture
def served(built):
    """Address of the site; a search needs a server."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(built))
    handler.log_message = lambda *words: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light")], ids=["desktop", "dark", "phone"]
)
def test_it_can_be_read(served, width, scheme):
    """Nothing wider than the screen, nothing asked of another host, no error, and the search finds a page."""
    asked, faults = [], []
    with started() as browser:
        page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        for name in ("index.html", "fidelity.html", "api/generate.html", "policies/recall.html"):
            page.goto(f"{served}/{name}")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] < 128")
        assert dark == (scheme == "dark")
        page.locator("label[for=__search]:visible, input.md-search__input:visible").first.click()
        page.keyboard.type("teacher forcing")
        page.wait_for_selector(".md-search-result__item a[href*=fidelity]", timeout=60_000)
    assert faults == []
    assert [url for url in asked if not re.match(re.escape(served) + "/|data:|blob:", url)] == []
