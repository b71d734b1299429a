"""The documents say what the code does. `python tests/test_docs.py` rewrites docs/cli.md."""

import re
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from modelkin.cli import app
from modelkin.config import load_config

ROOT = Path(__file__).parent.parent
CLI_PAGE = ROOT / "docs" / "cli.md"
COMMANDS = ["", *sorted(app.commands)]


def _help(command: str) -> str:
    arguments = [*([command] if command else []), "--help"]
    result = CliRunner().invoke(
        app,
        arguments,
        prog_name="modelkin",
        terminal_width=90,
    )
    assert result.exit_code == 0
    return "\n".join(line.rstrip() for line in result.output.strip("\n").splitlines())


def _section(command: str) -> str:
    shown = f"modelkin {command}".strip()
    return f"## {shown}\n\n```\n$ {shown} --help\n{_help(command)}\n```\n"


def _page() -> str:
    head = "# The command line\n\nEvery error is one line on stderr, with exit status 2.\n"
    return "\n".join([head, *map(_section, COMMANDS)])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_in_the_docs(command: str) -> None:
    """The page of the command line quotes each command's help as it is."""
    assert _section(command) in CLI_PAGE.read_text(encoding="utf-8")


def test_architecture_lists_every_module() -> None:
    """The architecture page has one row a module, and no row without one."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    modules = {
        path.stem if path.is_file() else path.name
        for path in (ROOT / "src" / "modelkin").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rows == modules - {"__init__"}


def test_architecture_shows_the_enforced_layers() -> None:
    """The layers that the page draws are those that the linter enforces."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    drawn = "\n".join(layer.replace("modelkin.", "") for layer in layers)
    assert f"```\n{drawn}\n```" in page


@pytest.mark.parametrize(
    "run_file",
    [
        path.relative_to(ROOT)
        for path in sorted((ROOT / "examples").rglob("*.yaml"))
        if "tasks" not in path.parts
    ],
    ids=str,
)
def test_example_run_files_are_valid(run_file: Path) -> None:
    """Every run file among the examples is one that modelkin accepts."""
    assert load_config(ROOT / run_file).models


if __name__ == "__main__":
    CLI_PAGE.write_text(_page(), encoding="utf-8")
