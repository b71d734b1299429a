"""The report of the demo's own run, told by the command, opened in a browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import chromium, missing, open_page, resize
from click.testing import CliRunner
from test_browser import click_head, column, complaints, hover, texts

from modelkin import read_run
from modelkin.cli import app
from modelkin.run import Run

DATA = Path(__file__).parent / "data" / "demo-run"

in_a_browser = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The demo's kinship run, without its weights."""
    folder = tmp_path_factory.mktemp("demo") / "kinship"
    shutil.copytree(DATA, folder)
    return read_run(folder)


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Its report, opened from disk without a network."""
    file = run.folder.parent / "report.html"
    done = CliRunner().invoke(app, ["report", str(run.folder), "-o", str(file)])
    assert done.exit_code == 0, done.output
    with chromium(tmp_path_factory.mktemp("browser")) as driver:
        resize(driver, 1280, 900)
        open_page(driver, file.as_uri())
        yield driver


def test_status_says_what_the_data_support(run: Run) -> None:
    """The table has every model, verdicts of both kinds, and what predictions were worth."""
    done = CliRunner().invoke(app, ["status", str(run.folder)], env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    said = done.output
    for member in run.state.members.values():
        assert f" {member.name} " in said
    assert " better " in said
    assert " cannot tell " in said
    assert "With measured kinship every generation would have been chosen the same." in said
    assert f"Best child: {run.best.name} " in said


def test_statistics_of_the_run_are_predictions(run: Run) -> None:
    """Without any weights, per-tensor statistics of all 39 models follow from the foundations'."""
    stats = run.statistics()
    assert stats is not None
    assert stats.models == tuple(run.state.members)
    assert len(stats.models) == 39


@in_a_browser
def test_the_page_is_whole(page: Any, run: Run) -> None:
    """Tree, map and table show every model, and the console has nothing to say."""
    assert complaints(page) == []
    members = len(run.state.members)
    assert len(page.find_elements("css selector", "#tree .scatterlayer .point")) >= members
    assert page.find_elements("css selector", "#map .heatmaplayer image")
    assert len(page.find_elements("css selector", '[data-name="models"] tbody tr')) == members
    headings = texts(page, "h2")
    for part in ("Family tree", "Kinship", "Gain against kinship", "Stopping early", "All models"):
        assert any(part in heading for heading in headings), headings
    assert "every generation would have been chosen the same" in texts(page, "body")[0]


@in_a_browser
def test_hovering_and_sorting_work(page: Any, run: Run) -> None:
    """A child's recipe appears under the pointer; the best comes first when sorted by average."""
    points = page.find_elements(
        "css selector", "#tree .scatterlayer .trace:last-child .points path"
    )
    assert "recipe: slerp" in hover(page, points[-1])
    click_head(page, "average")
    click_head(page, "average")
    averages = [float(text) for text in column(page, "average") if text]
    assert averages == sorted(averages, reverse=True)
    assert averages[0] == pytest.approx(100 * (run.best.average or 0), abs=0.01)


@in_a_browser
def test_a_phone_scrolls_one_way_only(page: Any) -> None:
    """At the width of a phone nothing sticks out of the page."""
    resize(page, 390, 844)
    open_page(page, page.current_url)
    width = page.execute_script("return document.documentElement.scrollWidth")
    assert width <= 390
