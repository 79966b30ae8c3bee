"""The page of `pipeline report` in headless Chromium: it fits the window, and the console has no message."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli import main as pipeline
from tests.support.browser import Browser, open_browser
from tests.support.run_folders import write_run

WIDTHS = (400, 1280, 2000)  # phone, laptop, wide screen
# Names of elements that are wider than the window, and not in a box that scrolls.
TOO_WIDE = """[...document.body.querySelectorAll('*')].filter(
    found => found.getBoundingClientRect().right > innerWidth + 1 && !found.closest('.scroll'))
    .map(found => found.tagName + '.' + found.className)"""
# Height in CSS pixels of each text of the charts that are shown.
TEXT_HEIGHTS = """[...document.querySelectorAll('.charts text')].map(text => text.getBoundingClientRect().height)
    .filter(height => height > 0)"""
# Mean of red, green and blue of the page's text, 0 to 1.
BRIGHTNESS = """getComputedStyle(document.body).color.match(/\\d+/g)
    .reduce((sum, part) => sum + Number(part), 0) / 765"""
LEGIBLE = 9.0
PAPER = 703  # width of A4 without margins in CSS pixels


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports")
    runs = {
        "ten classes": write_run(folder / ("long name " * 15), ema=True, crash=(60, 40), evaluated=360),
        "thirty classes": write_run(folder / "thirty", classes=30, evaluated=900),
        "1000 classes": write_run(folder / "many", steps=2000, log_every=1, classes=1000, evaluated=9000),
        "no validation": write_run(folder / "none", epochs=1, evaluations=False, status="running"),
    }
    pages = {}
    for name, given in {**{name: [run] for name, run in runs.items()}, "compared": list(runs.values())}.items():
        pages[name] = folder / f"{name}.html"
        assert pipeline(["report", *map(str, given), "--out", str(pages[name])]) == 0
    return pages


@pytest.mark.parametrize("dark", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_page_fits_the_window(browser: Browser, pages: dict[str, Path], width: int, dark: bool) -> None:
    for name, page in pages.items():
        browser.open(page, width=width, dark=dark)
        assert browser.messages() == [], name
        assert browser.run("document.documentElement.scrollWidth") <= width, name
        assert browser.run(TOO_WIDE) == [], name
        heights = browser.run(TEXT_HEIGHTS)
        assert len(heights) > 20, name
        assert min(heights) >= LEGIBLE, name


def test_theme_follows_the_browser(browser: Browser, pages: dict[str, Path]) -> None:
    found = {}
    for dark in (False, True):
        browser.open(pages["ten classes"], width=1280, dark=dark)
        color = "getComputedStyle(document.querySelector('{}')).{}"
        found[dark] = [
            browser.run(color.format("body", "backgroundColor")),
            browser.run(color.format("body", "color")),
            browser.run(color.format(".charts text", "fill")),
        ]
    assert not set(found[False]) & set(found[True])
    assert found[True][1] == found[True][2]  # texts of charts have the color of the page's text


def test_printed_page_is_light_and_complete(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["thirty classes"], width=PAPER, dark=True, media="print")
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run(BRIGHTNESS) < 0.3
    cut = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth + 1).length"
    assert browser.run(cut) == 0
    assert browser.run("document.querySelector('nav').offsetHeight") == 0


def test_curves_are_shown_over_the_chosen_axis(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["ten classes"], width=1280)
    shown = "['steps', 'epochs', 'time'].filter(name => document.querySelector('.charts .' + name).offsetHeight)"
    for axis in ("time", "epochs", "steps"):
        browser.run(f"document.querySelector('label[for=x-{axis}]').click()")
        assert browser.run(shown) == [axis]


def test_network_and_scripts_are_blocked(browser: Browser, pages: dict[str, Path], tmp_path: Path) -> None:
    """Even if a text of a run were to become an element of the page, it could load nothing."""
    page = tmp_path / "page.html"
    injected = '<script>document.title = "changed"</script><img src="http://127.0.0.1:9/x.png">'
    page.write_text(pages["no validation"].read_text().replace("<main>", f"<main>{injected}"))
    browser.open(page, width=1280)
    messages = browser.messages()
    assert len(messages) == 2
    assert all("Content Security Policy" in message for message in messages), messages
    assert "changed" not in browser.run("document.title")
