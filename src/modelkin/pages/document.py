"""A whole page: Plotly's script, the theme, and a policy that lets nothing in from elsewhere."""

import base64
import hashlib
import os
from functools import cache
from html import escape
from importlib.resources import files
from importlib.util import find_spec

from modelkin.errors import MissingExtraError
from modelkin.files import whole_file


def check_pages() -> None:
    """See, before the work, that pages can be made.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    if find_spec("plotly") is None:
        raise MissingExtraError("plotly", "plot")


def page(title: str, *sections: str, script: str = "", style: str = "", live: str = "") -> str:
    """A whole document, which loads nothing: scripts, styles and data are in it.

    Scripts run only if their hash is in the page's policy, so that no name, however it got past
    the escaping, becomes one.

    Args:
        title: plain text.
        sections: HTML, from this package's functions.
        script: JavaScript of this page, which runs after that of all pages.
        style: CSS of this page.
        live: the version of what is shown; the page asks `version` of the server it came from,
            every other second, and loads itself again when that is another one.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    scripts = [_plotly(), _file("page.js"), *([script] if script else [])]
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src {' '.join(_hash(text) for text in scripts)}",
            "style-src 'unsafe-inline'",
            "img-src data: blob:",
            f"connect-src {chr(39)}{'self' if live else 'none'}{chr(39)}",
        )
    )
    shown = f' data-live="{escape(live)}"' if live else ""
    tags = "".join(f"<script>{text}</script>" for text in scripts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_file('page.css')}{style}</style></head>"
        f"<body{shown}><header><h1>{escape(title)}</h1>"
        '<button type="button" id="theme">Dark</button></header>'
        f"<main>{''.join(sections)}</main>{tags}</body></html>\n"
    )


def write_page(path: str | os.PathLike[str], html: str) -> None:
    """Write a page; an older one is replaced in one step.

    Raises:
        DiskFullError: the older page, if any, is untouched.
    """
    with whole_file(path) as partial:
        partial.write_text(html, encoding="utf-8")


@cache
def _plotly() -> str:
    check_pages()
    from plotly.offline import get_plotlyjs

    # An HTML parser ends the element here, wherever it stands in the script.
    script: str = get_plotlyjs().replace("</script", "<\\/script")
    return script


@cache
def _file(name: str) -> str:
    return (files("modelkin.pages") / name).read_text(encoding="utf-8")


@cache
def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
