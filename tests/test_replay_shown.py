"""Facts about how a replay is shown: on terminals of any width, as a page, on the command line."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from replaying import copied, edit, put
from rich.cells import cell_len
from rich.console import Console

from modelkin.cli import app
from modelkin.pages import plain
from modelkin.replay import Part, parts, print_parts, read_paper, replay_page

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def found() -> list[Part]:
    """The parts of the package's own data."""
    return parts(read_paper())


def printed(found: list[Part], width: int) -> list[str]:
    """The lines on a terminal of a width."""
    stream = StringIO()
    print_parts(found, Console(file=stream, width=width, markup=False, emoji=False))
    return stream.getvalue().splitlines()


def words(text: str) -> str:
    """A text with each run of white space as one space."""
    return " ".join(text.split())


@pytest.mark.parametrize("width", [30, 60, 80, 100, 120, 160, 240])
def test_nothing_is_wider_than_the_terminal(found: list[Part], width: int) -> None:
    """Tables that do not fit are printed as lines."""
    assert max(map(cell_len, printed(found, width))) <= width


@pytest.mark.parametrize("width", [40, 80, 200])
def test_nothing_is_left_out_on_a_narrow_terminal(found: list[Part], width: int) -> None:
    """Every word of every cell is there, whatever the width."""
    shown = "".join("".join(printed(found, width)).split())
    for part in found:
        assert "".join(part.title.split()) in shown
        for table in part.tables:
            for row in table.rows:
                for cell in row:
                    if isinstance(cell, str):
                        assert all(word in shown for word in cell.split() if len(word) < 12)


def test_both_numbers_are_shown(found: list[Part]) -> None:
    """Ours stands beside the printed one, with the reason of the difference."""
    lines = [words(line) for line in printed(found, 200)]
    assert (
        "pcc signed -0.51 -0.50 0.062 0.063 rounding of the printed kinship and gains moves r by "
        "0.01" in lines
    )
    assert "ed absolute 0.68 0.67 0.008 0.007 as printed, which is cut off" in lines
    assert "path 1 14 5 5 as published" in lines
    assert any(
        line.startswith("kinship 4 model-3-3 x model-3-4 (not made) differs numbers 1 and 3")
        for line in lines
    )
    assert any(
        line.startswith("kinship 4 model-3-3 x model-3-1 model-4-6 differs model-3-1 (68.59) is")
        for line in lines
    )


def test_the_matrices_of_figure_7(found: list[Part]) -> None:
    """The mean kinship of five models rises from stage to stage."""
    (part,) = (part for part in found if part.key == "matrices")
    assert [row[2] for row in part.tables[0].rows] == pytest.approx([0.078, 0.809, 0.903])


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    """Without the facts from text and figures the tables are replayed, and what lacks is named."""
    folder = copied(tmp_path)
    for name in ("claims", "reprints", "statements", "figure_7"):
        (folder / f"{name}.csv").unlink()
    few = parts(read_paper(folder))
    assert few[0].texts[-1] == (
        "Not there, and left out with what is compared with them: "
        "claims.csv, reprints.csv, statements.csv, figure_7.csv."
    )
    assert "matrices" not in {part.key for part in few}
    assert 30 < len(few[-1].tables[0].rows) < len(parts(read_paper())[-1].tables[0].rows)
    assert replay_page(read_paper(folder), few).startswith("<!doctype html>")


# The page.


def test_the_page_needs_nothing_from_elsewhere(found: list[Part]) -> None:
    """No script, style, picture or font of the page has an address."""
    page = replay_page(read_paper(), found)
    tags = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href|url|action)\s*[=(]\s*["']?\s*(https?:)?//""", tags)
    assert "default-src 'none'" in page
    assert re.search(r'<script[^>]*\ssrc="', page.split("<header>")[0]) is None


def test_the_page_has_every_part(found: list[Part]) -> None:
    """All parts, tables and figures of the replay are on the page."""
    page = replay_page(read_paper(), found)
    for part in found:
        assert f"<h2>{html.escape(part.title)}</h2>" in page
        assert all(f'data-name="{table.name}"' in page for table in part.tables)
    assert page.count('<div class="plot"') == 4
    assert page.count('"text":"saturation"') == 2


def test_names_are_text_on_the_page(tmp_path: Path) -> None:
    """A model may be called anything."""
    folder = copied(tmp_path)
    edit(folder / "community_paths.csv", put("model_merged", HOSTILE), path="1", step="1")
    edit(folder / "main_experiment.csv", put("model", HOSTILE), model="model-5-1")
    edit(folder / "statements.csv", put("one_says", HOSTILE), topic="Llama model")
    paper = read_paper(folder)
    page = replay_page(paper, parts(paper))
    assert HOSTILE not in page
    assert page.count(html.escape(HOSTILE)) > 3
    # Plotly takes markup in its texts.
    assert plain(HOSTILE).replace("<", "\\u003c") in page


# The command line.


def call(*arguments: str) -> Result:
    """`modelkin replay` in this process."""
    return CliRunner().invoke(app, ["replay", *arguments])


def test_replay_prints_and_draws(tmp_path: Path) -> None:
    """The command prints everything and writes the page."""
    result = call("-o", str(tmp_path / "page.html"))
    assert result.exit_code == 0, result.output
    assert "Where the paper disagrees with itself" in result.output
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_another_folder_can_be_named(tmp_path: Path) -> None:
    """What is printed is of the folder that was named."""
    folder = copied(tmp_path)
    edit(folder / "main_experiment.csv", put("average_published", "99.99"), model="model-2-1")
    result = call("--data", str(folder))
    assert result.exit_code == 0, result.output
    assert "99.99" in result.output
    assert "99.99" not in call().output


def test_bad_data_are_one_line(tmp_path: Path) -> None:
    """A mistake in the data is one line on stderr and exit status 2."""
    folder = copied(tmp_path)
    edit(folder / "main_experiment.csv", put("gsm8k", "high"), model="model-2-1")
    result = call("--data", str(folder))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert re.fullmatch(r"error: .*column gsm8k: expected a number, found 'high'\n", result.stderr)


def test_a_page_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    """Nothing is printed before a page that has no folder to be in."""
    result = call("-o", str(tmp_path / "none" / "page.html"))
    assert result.exit_code == 2
    assert result.stdout == ""


def test_printing_needs_no_plotly() -> None:
    """Who wants no page waits for no plotting library."""
    code = (
        "import sys; from click.testing import CliRunner; from modelkin.cli import app; "
        "assert CliRunner().invoke(app, ['replay']).exit_code == 0; "
        "assert not {'plotly', 'torch', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
