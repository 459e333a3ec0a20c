"""Pages opened in a real browser."""

import pytest

from tests.report.browser import open_page, started


@pytest.fixture(scope="module")
def browser():
    with started() as chromium:
        yield chromium


@pytest.fixture
def visit(browser):
    """Open a page offline; see `open_page`."""
    pages = []

    def go(path, **options):
        pages.append(open_page(browser, path, **options))
        return pages[-1]

    yield go
    for page in pages:
        page.context.close()
