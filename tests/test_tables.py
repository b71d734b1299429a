"""Kinship on a terminal: fits any width, and says what it leaves out."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from rich.console import Console

from modelkin.gram import GramStats
from modelkin.similarity import Kinship, kinship_from
from modelkin.tables import print_kinship, shortened

TENSORS = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight")


def _kinship(models: int, name: str = "m{}", undefined: tuple[int, ...] = ()) -> Kinship:
    rng = np.random.default_rng(models)
    delta_TNB = rng.standard_normal((len(TENSORS), models, 40)) + rng.standard_normal((3, 1, 40))
    delta_TNB[:, list(undefined)] = 0.0
    stats = GramStats(
        models=tuple(name.format(n) for n in range(models)),
        tensors=TENSORS,
        count_T=np.full(3, 40),
        base_T=np.full(3, 1e6),  # far larger than the deltas, as a base is
        base_sum_T=np.ones(3),
        sum_TN=delta_TNB.sum(axis=2),
        cross_TN=delta_TNB.sum(axis=2),
        gram_TNN=delta_TNB @ delta_TNB.swapaxes(1, 2),
        distance_TNN=((delta_TNB[:, :, None] - delta_TNB[:, None]) ** 2).sum(axis=3),
    )
    return kinship_from(
        stats,
        base="base",
        total_parameters=125,
        left_out=tuple(f"extra.{n}" for n in range(14)),
    )


def _shown(found: Kinship, width: int = 100, *, terminal: bool = False, **how: object) -> str:
    file = io.StringIO()
    console = Console(
        file=file,
        width=width,
        markup=False,
        force_terminal=terminal,
        color_system="truecolor" if terminal else None,
    )
    print_kinship(found, console, **how)  # type: ignore[arg-type]
    return file.getvalue()


def test_coverage_and_warnings_come_first() -> None:
    """What was compared, what was not and what is undefined stand above the tables."""
    lines = _shown(_kinship(3, undefined=(1,))).splitlines()
    assert lines[0] == "compared 120 of 125 parameters (96.0%) with the base base"
    assert lines[1].startswith("left out: extra.0, extra.1, ")
    assert lines[1].endswith("extra.9 and 4 more")
    assert lines[2] == "m1 equals the base: its kinship is undefined"
    assert lines[4].startswith("pcc, mean undefined")


@pytest.mark.parametrize("models", [2, 5, 13, 20])
@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("name", ["m{}", "org-of-some-length/model-{}-instruct-v0.2"])
def test_matrices_fit_and_are_whole(models: int, width: int, name: str) -> None:
    """On any terminal no line is too long and no number is broken: every value is there."""
    found = _kinship(models, name)
    shown = _shown(found, width, metric="pcc").split("pcc, mean", 1)[1]
    matrix, _, legend = shown.partition("\n\n1 = ")
    assert all(len(line) <= width for line in matrix.splitlines())
    values = [float(text) for text in re.findall(r"(?<= )-?\d\.\d\d+(?=\s)", matrix + "\n")]
    mean, *cells = values
    assert mean == pytest.approx(found.mean("pcc"), abs=1e-4)
    assert sorted(cells) == pytest.approx(sorted(found.pcc_NN.ravel()), abs=0.005001)
    # A name is whole in the matrix or in the legend.
    assert all(model in matrix or f"= {model}\n" in f"= {legend}" for model in found.models)


def test_all_metrics_are_shown_unless_one_is_asked_for() -> None:
    """Three matrices, or the one."""
    found = _kinship(3)
    assert [f"\n{metric}, mean" in _shown(found) for metric in ("pcc", "cs", "ed")] == [True] * 3
    only = _shown(found, metric="ed")
    assert "ed, mean" in only
    assert "pcc" not in only


def test_colours_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours on a terminal, none in a pipe, none where NO_COLOR says so; same text in all."""
    found = _kinship(3)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = _shown(found, terminal=True)
    assert "\x1b[" not in _shown(found)
    assert ";48;2;" in coloured  # always with a foreground: readable on dark and on light
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == _shown(found)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "48;2;" not in _shown(found, terminal=True)


def test_close_kin_is_red_and_distant_blue() -> None:
    """The scale runs from blue over white, at zero, to red; for distances the closest is bright."""
    one = np.array([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]])
    shown = _shown(Kinship("b", ("x", "y", "z"), 1, 1, one, one, one), terminal=True, metric="pcc")
    assert re.search(r"38;2;255;255;255;48;2;178;24;43m +1\.0000", shown)
    assert re.search(r"38;2;0;0;0;48;2;247;247;247m +0\.0000", shown)
    assert re.search(r"38;2;255;255;255;48;2;33;102;172m +-1\.0000", shown)
    near = np.array([[0.0, 5.0], [5.0, 0.0]])
    shown = _shown(Kinship("b", ("x", "y"), 1, 1, near, near, near), terminal=True, metric="ed")
    assert re.search(r"38;2;0;0;0;48;2;253;231;37m +0", shown)
    assert re.search(r"38;2;255;255;255;48;2;68;1;84m +5", shown)


def test_many_models_are_told_by_their_pairs() -> None:
    """Above twenty models the closest and the most distant pairs stand for the matrix."""
    found = _kinship(21, undefined=(3,))
    shown = _shown(found, 80)
    assert "21 models are too many" in shown
    assert "--csv" in shown
    assert "--plot" in shown
    rows = re.findall(r"│ (m\d+) +│ (m\d+) +│ +(\S+) ", shown)
    assert len(rows) == 20
    kept = [n for n in range(21) if n != 3]
    pairs = sorted(found.pcc_NN[i, j] for i in kept for j in kept if i < j)
    expected = [*pairs[::-1][:10], *pairs[:10]]
    assert [float(value) for *_, value in rows] == pytest.approx(expected, abs=1e-4)
    by_distance = _shown(found, 80, metric="ed")
    assert "closest by ed" in by_distance


@pytest.mark.parametrize("models", [2, 4])
@pytest.mark.parametrize("width", [60, 80])
def test_groups_are_rows(models: int, width: int) -> None:
    """With a level each group is a row: its parameters, and its mean or only pair."""
    found = _kinship(models)
    shown = _shown(found, width, level="layer", terminal=False)
    assert all(len(line) <= max(width, 65) for line in shown.splitlines()[2:])
    rows = re.findall(r"│ (\S[^│]*?) +│ +(\S+) │ +(\S+) │ +(\S+) │ +(\S+) │", shown)
    groups = {**found.per("layer"), "whole model": found}
    assert [row[0] for row in rows] == list(groups)
    for (_, count, *values), one in zip(rows, groups.values(), strict=True):
        assert int(count) == one.compared_parameters
        means = [one.mean(metric) for metric in ("pcc", "cs", "ed")]
        assert [float(value) for value in values] == pytest.approx(means, rel=1e-3, abs=1e-4)
    assert ("mean pcc" in shown) == (models > 2)


def test_brackets_in_names_are_brackets() -> None:
    """A name is no markup, wherever it stands."""
    name = "[bold]{}:smile:"
    assert _shown(_kinship(2, name)).count("[bold]0:smile:") == 6
    assert "[bold]" in _shown(_kinship(25, name))


@pytest.mark.parametrize("width", [50, 80])
def test_names_in_lists_are_whole(width: int) -> None:
    """Pairs and groups tell long names in full, on several lines if need be."""
    name = "an-organisation-of-some-length/model-{}-instruct-v0.2"
    shown = _shown(_kinship(21, name), width, metric="ed").splitlines()[5:]
    assert all(len(line) <= width for line in shown)
    first = [line.split("│")[1].strip() for line in shown if line.startswith("│")]
    assert "".join(first).count("an-organisation-of-some-length/model-") == 20


@pytest.mark.parametrize("width", [0, 1, 2, 3, 7, 8, 99])
def test_shortened_is_as_short_as_asked(width: int) -> None:
    """A shortened name has the width, its own beginning and its own end."""
    found = shortened("abcdefgh", width)
    assert len(found) <= max(width, 1)
    assert (found == "abcdefgh") == (width >= 8)
    if 3 <= width < 8:
        assert found[0] == "a"
        assert found[-1] == "h"
