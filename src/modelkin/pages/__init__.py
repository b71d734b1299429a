"""Self-contained HTML pages that open offline: figures, sortable tables, text, two themes.

Knows HTML and Plotly's figures; not what is shown. Whatever comes in is text and is escaped;
only what functions of this module return is HTML. Plotly itself renders some markup in its texts:
names go through `plain` there.
"""

from modelkin.pages.document import check_pages, page, write_page
from modelkin.pages.parts import (
    Cell,
    contents,
    facts,
    figure,
    folded,
    listing,
    paragraph,
    plain,
    preformatted,
    section,
    table,
)

__all__ = [
    "Cell",
    "check_pages",
    "contents",
    "facts",
    "figure",
    "folded",
    "listing",
    "page",
    "paragraph",
    "plain",
    "preformatted",
    "section",
    "table",
    "write_page",
]
