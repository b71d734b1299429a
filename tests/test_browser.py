"""What a person sees in a browser: reports open from disk, without a network, and answer."""

from __future__ import annotations

import csv
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import chromium, missing, open_page, resize, wait_until
from synthetic import events_of, run_of

from modelkin.ledger import open_ledger
from modelkin.records import Proposed
from modelkin.report import Source, write_report
from modelkin.serving import ReportServer

pytest.importorskip("plotly")
pytest.importorskip("scipy")
pytest.importorskip("selenium")
pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

EVIL = "<img src=x onerror=alert(1)>"
NAMES = (EVIL, "code", "law", "$prose$")


@pytest.fixture(scope="module")
def source() -> Source:
    """A run with a model whose name is markup, one that is a formula, and a failure."""
    return run_of(14, names=NAMES, failing=True, name="a <b>run</b>")


@pytest.fixture(scope="module")
def report(source: Source, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of that run's report on disk."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_report(file, [source])
    return file.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One browser for all tests."""
    with chromium(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture
def page(browser: Any, report: str) -> Any:
    """The browser with the report just opened at desktop size, and nothing wrong with it."""
    resize(browser, 1280, 900)
    open_page(browser, report)
    return browser


def complaints(driver: Any) -> list[str]:
    """What the console says: errors, refused requests, breaches of the page's policy."""
    return [str(line["message"]) for line in driver.get_log("browser")]


def texts(driver: Any, selector: str) -> list[str]:
    """The texts of all elements that a selector finds, hidden ones too."""
    found: list[str] = driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector
    )
    return found


def hover(driver: Any, element: Any) -> str:
    """What appears when the pointer is moved over something in a figure."""
    from selenium.webdriver.common.action_chains import ActionChains

    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    ActionChains(driver).move_to_element(element).perform()
    return "\n".join(wait_until(driver, SHOWN))


SHOWN = """
const lines = [...document.querySelectorAll('.hoverlayer .hovertext')]
  .flatMap((e) => [...e.querySelectorAll('text')].map((t) => t.textContent));
return lines.length ? lines : null;
"""


def test_the_report_opens_from_disk_without_a_network(page: Any) -> None:
    """Every figure is drawn and the console is silent, with no network to ask."""
    assert complaints(page) == []
    figures = texts(page, ".figure .plot")
    assert len(figures) >= 8
    assert all(figures), "a figure is empty"
    assert page.find_elements("css selector", "#tree .scatterlayer .point")
    assert page.find_elements("css selector", "#map .heatmaplayer image")
    assert page.find_elements("css selector", '[data-name="models"] tbody tr')


def test_names_are_text_wherever_they_stand(page: Any) -> None:
    """A model called like an image with a script is that text in tree, map, hover and table."""
    assert page.find_elements("css selector", "img[src=x]") == []
    assert EVIL in texts(page, '[data-name="models"] td')
    assert any("<img src" in text for text in texts(page, "#tree .textpoint"))
    assert any("<img src" in text for text in texts(page, "#map .xtick"))
    assert "<b>run</b>" in page.title
    assert page.find_elements("css selector", "h1 b, h2 b") == []
    point = page.find_elements("css selector", "#tree .points path")[0]
    assert EVIL in hover(page, point)
    assert complaints(page) == []
    with pytest.raises(Exception, match="no such alert"):
        page.switch_to.alert.dismiss()


def test_hovering_over_a_child_shows_its_recipe(page: Any, source: Source) -> None:
    """A child's hover has its recipe, parents, kinship, scores and gain."""
    stars = page.find_elements("css selector", "#tree .scatterlayer .trace:last-child .points path")
    best = next(member for member in source.state.ranked() if member.parents)
    said = hover(page, stars[-1])
    assert best.name in said
    assert "recipe: slerp" in said
    parents = " × ".join(parent.name for parent in source.state.parents_of(best))
    assert f"parents: {parents}" in said.replace("\n", "")
    for word in ("kinship of the parents", "near:", "far:", "average:", "gain:"):
        assert word in said


def test_hovering_over_the_map_says_measured_or_predicted(page: Any) -> None:
    """A cell of the map names both models and says how its kinship is known."""
    said = hover(page, page.find_element("css selector", "#map .draglayer .nsewdrag"))
    assert any(word in said for word in ("measured", "itself"))


def test_the_slider_goes_back_through_the_generations(page: Any) -> None:
    """At generation 0 the map has the foundation models, at the end all that have kinship."""
    count = "return document.querySelector('#map .plot').data[0].z.length"
    assert page.execute_script(count) == 14
    page.execute_script(
        "const s = document.querySelector('#map input'); s.value = 0;"
        "s.dispatchEvent(new Event('input'))"
    )
    assert wait_until(page, f"{count} === 4")
    assert "0 (4 models)" in texts(page, "#map label")[0]


def test_a_choice_shows_its_own_traces(page: Any) -> None:
    """Choosing another pair changes which curves of a figure are seen."""
    shown = (
        "const box = document.querySelector('[aria-label^=\"Kinship of chosen\"]');"
        "return box.data.map((trace) => trace.visible !== false)"
    )
    before = page.execute_script(shown)
    page.execute_script(
        "const s = document.querySelector('[aria-label^=\"Kinship of chosen\"]')"
        ".closest('.figure').querySelector('select'); s.value = 1;"
        "s.dispatchEvent(new Event('change'))"
    )
    after = wait_until(page, shown)
    assert (before[:4], after[:4]) == ([True, True, False, False], [False, False, True, True])


def column(driver: Any, head: str) -> list[str]:
    """The cells of the table of all models below a head."""
    heads = texts(driver, '[data-name="models"] th')
    number = heads.index(head) + 1
    return texts(driver, f'[data-name="models"] tbody td:nth-child({number})')


def click_head(driver: Any, head: str) -> None:
    number = texts(driver, '[data-name="models"] th').index(head) + 1
    button = driver.find_element(
        "css selector", f'[data-name="models"] th:nth-child({number}) button'
    )
    driver.execute_script("arguments[0].click()", button)


def test_tables_are_sorted_by_their_heads(page: Any) -> None:
    """A click sorts numbers as numbers, a second one the other way; nothing is always last."""
    before = column(page, "average")
    numbers = sorted(float(text) for text in before if text)
    click_head(page, "average")
    assert [float(text) for text in column(page, "average") if text] == numbers
    assert column(page, "average")[-1] == ""
    click_head(page, "average")
    assert [float(text) for text in column(page, "average") if text] == numbers[::-1]
    assert column(page, "average")[-1] == ""
    assert column(page, "average") != before


def test_tables_are_saved_as_csv(
    page: Any, source: Source, browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The saved file has every row in the order shown, and numbers with all their digits."""
    folder = tmp_path_factory.mktemp("saved")
    page.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)}
    )
    button = page.find_element("css selector", '[data-name="models"] .csv')
    page.execute_script("arguments[0].click()", button)
    file = folder / "models.csv"
    end = time.monotonic() + 30
    while not (file.exists() and file.stat().st_size) and time.monotonic() < end:
        time.sleep(0.05)
    with file.open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    members = list(source.state.members.values())
    assert [line["model"] for line in lines] == [member.name for member in members]
    for line, member in zip(lines, members, strict=True):
        if member.average is None:
            assert line["average"] == ""
        else:
            assert float(line["average"]) == 100 * member.average


def background(driver: Any) -> str:
    color: str = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    return color


def test_dark_and_light(page: Any) -> None:
    """The theme is that of the system until the button changes it, and figures take part."""
    font = "return document.querySelector('#tree .plot')._fullLayout.font.color"
    try:
        seen = {}
        for scheme in ("light", "dark"):
            page.execute_cdp_cmd(
                "Emulation.setEmulatedMedia",
                {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
            )
            assert wait_until(page, f"return document.documentElement.dataset.theme === '{scheme}'")
            seen[scheme] = (background(page), page.execute_script(font))
        assert seen["light"][0] == "rgb(255, 255, 255)"
        assert seen["dark"][0] != seen["light"][0]
        assert seen["dark"][1] != seen["light"][1]
        page.find_element("id", "theme").click()
        assert (background(page), page.execute_script(font)) == seen["light"]
        assert complaints(page) == []
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_phone_scrolls_one_way_only(browser: Any, report: str) -> None:
    """At the width of a phone nothing is wider than the page; wide things scroll in their box."""
    resize(browser, 390, 844)
    open_page(browser, report)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    box = browser.execute_script(
        "const b = document.querySelector('[data-name=\"models\"] .scroll');"
        "return [b.scrollWidth > b.clientWidth, b.getBoundingClientRect().right <= 390]"
    )
    assert box == [True, True]
    assert complaints(browser) == []


def test_several_runs_are_drawn_over_each_other(
    browser: Any, source: Source, tmp_path: Path
) -> None:
    """A report of two runs has a curve of the best so far for each."""
    write_report(tmp_path / "two.html", [source, run_of(10, strategy="greedy", name="greedy")])
    resize(browser, 1280, 900)
    open_page(browser, (tmp_path / "two.html").as_uri())
    names = browser.execute_script(
        "return document.querySelector('.plot').data.map((trace) => trace.name)"
    )
    assert names == ["a &lt;b&gt;run&lt;/b&gt; (kinship)", "greedy"]
    assert complaints(browser) == []


def test_a_served_report_shows_what_happened_since(browser: Any, tmp_path: Path) -> None:
    """The page in the browser is replaced, and stays where it was, when the run has gone on."""
    events = events_of(10)
    first = next(n for n, event in enumerate(events) if isinstance(event, Proposed))
    with open_ledger(tmp_path) as ledger:
        ledger.append(*events[:first])
    resize(browser, 1280, 900)
    with ReportServer(tmp_path, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        open_page(browser, f"http://127.0.0.1:{server.server_port}/")
        assert len(texts(browser, '[data-name="models"] tbody tr')) == 4
        browser.find_element("id", "theme").click()
        theme = browser.execute_script("return document.documentElement.dataset.theme")
        browser.execute_script("scrollTo(0, 500)")
        with open_ledger(tmp_path) as ledger:
            ledger.append(*events[first:])
        rows = "document.querySelectorAll('[data-name=\"models\"] tbody tr').length"
        ready = "document.documentElement.dataset.ready === 'true'"
        assert wait_until(browser, f"return {ready} && {rows} === 10")
        assert browser.execute_script("return scrollY") == 500
        assert browser.execute_script("return document.documentElement.dataset.theme") == theme
        assert complaints(browser) == []
        browser.get("about:blank")
        server.shutdown()
