"""Pages: self-contained, and whatever comes in is text."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("plotly")

from modelkin.errors import MissingExtraError
from modelkin.pages import (
    check_pages,
    figure,
    folded,
    listing,
    page,
    paragraph,
    plain,
    preformatted,
    section,
    table,
    write_page,
)

EVIL = "</script><img src=x onerror=alert(1)>"


class Tags(HTMLParser):
    """The elements of a document, their attributes and texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def spec(html: str) -> dict[str, list[dict[str, list[float | None]]]]:
    """The figure that a page holds as JSON."""
    found = re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    assert found
    figure: dict[str, list[dict[str, list[float | None]]]] = json.loads(found.group(1))
    return figure


@given(st.text())
def test_text_is_never_markup(text: str) -> None:
    """Whatever text a part is given, it makes the same elements as an empty one."""
    text += EVIL

    def parts(given: str) -> str:
        return "".join(
            (
                section(given, paragraph(given), listing([given]), preformatted(given)),
                folded(given, table([given], [[given], [1.0]], name=given, marks={0: given})),
                figure([{"name": given}], {}, label=given, name=given, choices={given: (0,)}),
            )
        )

    tags = [tag for tag, _ in Tags(parts(text)).tags]
    assert tags == [tag for tag, _ in Tags(parts("")).tags]
    assert "img" not in tags


@given(st.text())
def test_plain_text_has_no_markup_for_plotly(text: str) -> None:
    """What Plotly would take for a tag is an entity, and reads as it was."""
    escaped = plain(text + "<b>")
    assert "<" not in escaped
    assert "".join(Tags(f"<p>{escaped}</p>").texts).endswith("<b>")


def test_numbers_that_json_does_not_know_are_gaps() -> None:
    """NaN and infinity become null, arrays become lists, and the rest stays as it is."""
    values = np.array([1.5, np.nan, np.inf])
    found = spec(figure([{"y": values, "z": [[np.float64(2)], [float("nan")]]}], {}, label="x"))
    assert found["data"] == [{"y": [1.5, None, None], "z": [[2.0], [None]]}]


def cells(html: str) -> list[str]:
    return re.findall(r"<td[^>]*>(.*?)</td>", html)


@pytest.mark.parametrize(
    ("column", "shown"),
    [
        ([0.12345, 0.5, None], ["0.1235", "0.5000", ""]),
        ([51.234, -3.0], ["51.23", "-3.00"]),
        ([0.8, 0.95], ["0.80", "0.95"]),
        ([40.0, 12345.0], ["40", "12345"]),
        ([3, 14], ["3", "14"]),
        ([0.9, 3e-9], ["0.9", "3e-09"]),
        ([0.0, float("nan")], ["0", ""]),
    ],
)
def test_numbers_of_a_column_have_the_same_decimals(
    column: list[float | None], shown: list[str]
) -> None:
    """As many as the largest needs for four digits, none of them idle; small is not nothing."""
    assert cells(table(["x"], [[value] for value in column], name="t")) == shown


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_cells_keep_all_digits(values: list[float]) -> None:
    """What is sorted by and saved is the number itself."""
    html = table(["x"], [[value] for value in values], name="t")
    assert [float(text) for text in re.findall(r'data-value="([^"]*)"', html)] == values


def test_a_table_may_be_empty() -> None:
    """Heads without rows are a table."""
    assert Tags(table(["a", "b"], [], name="t")).tags.count(("th", {"scope": "col"})) == 2


def test_a_page_loads_nothing() -> None:
    """No element points elsewhere, and the policy allows the page's own scripts and no others."""
    html = page("A & B", paragraph("x"), script="const own = 1;", style="p { color: red }")
    tags = Tags(html).tags
    for tag, attributes in tags:
        assert tag not in ("iframe", "img", "object", "embed"), tag
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:,").startswith("data:"), (tag, attributes)
    (policy,) = (a["content"] for t, a in tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 3
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in scripts
    ]
    assert f"script-src {' '.join(hashes)};" in policy
    assert policy.startswith("default-src 'none'")
    assert "connect-src 'none'" in policy
    assert "<title>A &amp; B</title>" in html


def test_only_a_live_page_asks_its_server() -> None:
    """A page with a version says so and may ask where it came from."""
    html = page("t", live='1"2')
    assert "connect-src 'self'" in html
    ((_, attributes),) = (entry for entry in Tags(html).tags if entry[0] == "body")
    assert attributes == {"data-live": '1"2'}
    assert ("body", {}) in Tags(page("t")).tags


def test_a_page_replaces_an_older_one(tmp_path: Path) -> None:
    """The file is the page, whatever was there, and nothing else is left beside it."""
    file = tmp_path / "page.html"
    file.write_text("old")
    write_page(file, "näw")
    assert file.read_text(encoding="utf-8") == "näw"
    assert list(tmp_path.iterdir()) == [file]


def test_pages_need_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without plotly there is one clear error."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "modelkin.pages.document.find_spec",
        lambda name: None if name == "plotly" else real(name),
    )
    with pytest.raises(MissingExtraError, match="plotly"):
        check_pages()
