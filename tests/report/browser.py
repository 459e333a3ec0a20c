"""A headless Chromium for tests that look at pages."""

import shutil
from contextlib import contextmanager

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@contextmanager
def started():
    """Chromium, for the time of the ``with`` block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, headless=True, args=FLAGS)
        yield browser
        browser.close()


def open_page(browser, path, **options):
    """Open a page offline; what goes wrong and what it asks for is kept in ``page.faults`` and ``page.asked``."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | options)
    context.set_default_timeout(120_000)  # for machines that do other things at the same time
    page = context.new_page()
    page.faults, page.asked = [], []
    page.on("console", lambda message: page.faults.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: page.faults.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (page.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    address = path.as_uri()

    def answer(route):
        if route.request.url == address:
            route.continue_()
        else:
            page.asked.append(route.request.url)
            route.abort()

    context.route("**/*", answer)
    page.goto(address)
    page.wait_for_selector("html[data-drawn]")
    return page
