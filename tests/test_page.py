"""The page in a real browser: it loads offline, without errors, whole, on a desk and on a telephone."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from findings_cases import digits_case

from brittle.report import render
from brittle.report.view import SECTIONS

pytestmark = pytest.mark.browser
NAMES = ("chromium", "chromium-browser", "google-chrome")
LONG = "a-class-name-that-nobody-ever-broke-into-words-" * 2


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        message = f"no browser was found among {', '.join(NAMES)}; install Debian's chromium to run the page's test"
        if os.environ.get("BRITTLE_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = digits_case()
    flip = case.findings.prediction.flips[0].model_copy(update={"before_class": LONG, "after_class": LONG})
    prediction = case.findings.prediction.model_copy(update={"flips": [flip, *case.findings.prediction.flips[1:]]})
    path = tmp_path_factory.mktemp("page") / "report.html"
    page = render(case.findings.model_copy(update={"prediction": prediction}), case.arrays, case.pictures)
    path.write_text(page, encoding="utf-8")
    return path


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_loads_offline_whole_and_without_errors(browser: Any, report: Path, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.route("**/*", lambda route: route.continue_() if route.request.url == report.as_uri() else route.abort())
    page.goto(report.as_uri(), wait_until="load")

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    images = page.evaluate("[...document.images].map(i => [i.complete && i.naturalWidth > 0, i.alt])")
    assert len(images) > 150
    assert [alt for loaded, alt in images if not loaded] == []
    assert all(alt for _, alt in images)
    assert page.evaluate("[...document.querySelectorAll('main > section')].map(s => s.id)") == [a for a, _ in SECTIONS]
    assert [url for url in asked if not url.startswith(("data:", report.as_uri()))] == []
    assert wrong == []
    page.close()


def test_the_contents_lead_to_every_section(browser: Any, report: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(report.as_uri())
    for anchor, title in SECTIONS:
        page.click(f"nav a[href='#{anchor}']")
        assert page.evaluate("location.hash") == f"#{anchor}"
        assert page.locator(f"#{anchor} > h2").inner_text() == title
    assert page.locator("nav").bounding_box()["y"] >= 0  # still in sight at the page's end
    page.close()
