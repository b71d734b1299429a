"""Reports: what they say is what the run found, whatever the run has and lacks."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console
from synthetic import events_of, run_of

pytest.importorskip("plotly")
pytest.importorskip("scipy")

from modelkin.analyse import gains, paired_difference
from modelkin.cli import app
from modelkin.errors import MissingExtraError
from modelkin.evolution import Rules, Stop, propose
from modelkin.ledger import open_ledger
from modelkin.records import (
    Event,
    Failed,
    Founded,
    Proposal,
    Proposed,
    Recipe,
    Similarity,
    Started,
)
from modelkin.report import (
    Family,
    Source,
    check_report,
    lead_sentence,
    report_page,
    rows,
    terminal_table,
    write_report,
)
from modelkin.state import Cost, fold

SECTIONS = [
    "Overview",
    "Family tree",
    "Best so far",
    "Kinship",
    "Gain against kinship",
    "Gains",
    "Scores by task",
    "Task differences against kinship",
    "Kinship layer by layer",
    "Where exploration and greed part",
    "Convergence",
    "Stopping early",
    "Predicted and measured kinship",
    "All models",
    "How to reproduce",
]


@pytest.fixture(scope="module")
def source() -> Source:
    """A run with exploration, predictions and a failure."""
    return run_of(14, failing=True)


@pytest.fixture(scope="module")
def html(source: Source) -> str:
    """Its report."""
    return report_page([source])


def parts(html: str) -> dict[str, str]:
    """The sections of a page by their titles."""
    found = re.findall(r"<section[^>]*><h2>(.*?)</h2>(.*?)</section>", html, re.DOTALL)
    return {unescape(title): body for title, body in found}


def text(html: str) -> str:
    """What is read, without the figures' data."""
    shown = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", shown)).split())


def figure(html: str) -> dict[str, Any]:
    """The first figure of a part."""
    found = re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)
    assert found
    spec: dict[str, Any] = json.loads(found.group(1))
    return spec


def table(html: str, name: str) -> list[dict[str, str]]:
    """The rows of a table: head to number, or else text."""
    found = re.search(rf'data-name="{name}".*?</table>', html, re.DOTALL)
    assert found
    heads = re.findall(r"<button[^>]*>(.*?)</button>", found.group())
    lines = re.findall(r"<tr[^>]*>((?:<td.*?)+)</tr>", found.group())
    return [
        dict(
            zip(
                map(unescape, heads),
                [
                    value or unescape(shown)
                    for value, shown in re.findall(
                        r'<td[^>]*?(?: data-value="([^"]*)")?>(.*?)</td>', line
                    )
                ],
                strict=True,
            )
        )
        for line in lines
    ]


# The whole page


def test_the_page_has_all_its_parts(html: str) -> None:
    """From the overview to how to reproduce, in this order."""
    assert list(parts(html)) == SECTIONS


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"samples": False}, []),
        ({"predicted": False}, ["Predicted and measured kinship"]),
        ({"strategy": "greedy"}, ["Where exploration and greed part"]),
    ],
)
def test_the_page_does_with_less(changes: dict[str, Any], missing: list[str]) -> None:
    """Without samples, predictions or exploration the rest is still told."""
    found = list(parts(report_page([run_of(14, **changes)])))
    assert found == [section for section in SECTIONS if section not in missing]


def begun(*events: Event) -> Source:
    """A run of two foundation models, and what happened since."""
    settings = {"strategy": "kinship", "k": 3, "metric": "pcc", "seed": 0}
    first: list[Event] = [
        Started(settings, {}, "evaluations"),
        Founded("base", "base", "base", "b", None, "f"),
        Founded("a", "a", "foundation", "a", None, "fa"),
        Founded("b", "b", "foundation", "b", None, "fb"),
    ]
    return Source("begun", fold([*first, *events]), lambda _: {}, lambda: None, "")


RECIPE = Recipe(("a", "b"), "base", {"merge_method": "linear"}, 0)
PROPOSED = Proposed(1, (Proposal(RECIPE.id, "1-1", RECIPE),))


@pytest.mark.parametrize("events", [(), (PROPOSED,), (PROPOSED, Failed(RECIPE.id, "merge", "no"))])
def test_a_run_that_has_hardly_begun_has_a_page(events: tuple[Event, ...]) -> None:
    """Before any scores there is an overview, a tree and a table."""
    found = parts(report_page([begun(*events)]))
    assert list(found) == ["Overview", "Family tree", "Kinship", "All models", "How to reproduce"]
    assert "No child has scores yet." in text(found["Overview"])
    Console(width=100).print(terminal_table(begun(*events).state, lambda _: {}, width=100))


def test_several_runs_are_compared_and_then_told_each(source: Source) -> None:
    """The first section overlays them; each run's own sections bear its name."""
    other = run_of(10, strategy="greedy", name="other")
    found = list(parts(report_page([source, other])))
    assert found[0] == "Best so far, side by side"
    assert found[1 : 1 + len(SECTIONS)] == [f"synthetic: {section}" for section in SECTIONS]
    assert found[1 + len(SECTIONS)] == "other: Overview"


def test_several_runs_are_a_table_of_what_each_found(source: Source) -> None:
    """Best child, its lead with an interval, and after how many evaluations it was found."""
    other = run_of(10, strategy="greedy", name="other")
    lines = table(report_page([source, other]), "runs")
    assert [line["run"] for line in lines] == ["synthetic", "other"]
    for line, one in zip(lines, (source, other), strict=True):
        family = Family(one.state, one.samples_of)
        best, scored = family.best_child, [m for m in one.state.members.values() if m.scorecard]
        assert best is not None
        assert line["best child"] == best.name
        assert float(line["average"]) == family.average(best)
        assert int(line["evaluations"]) == len(scored)
        assert scored[int(line["found at evaluation"]) - 1] is best
        over = family.gains[best.id].over_best
        assert over is not None
        assert (float(line["low"]), float(line["high"])) == (over.low, over.high)
    assert lines[0]["verdict"]


@pytest.mark.parametrize("several", [False, True])
def test_links_lead_to_sections(source: Source, several: bool) -> None:
    """Each link of the contents is the id of one section."""
    other = run_of(10, strategy="greedy", name="<b> & é")
    html = report_page([source, other] if several else [source])
    ids = [unescape(one) for one in re.findall(r'<section id="(.*?)"', html)]
    links = [unquote(unescape(one)) for one in re.findall(r'<a href="#(.*?)"', html)]
    assert len(links) == (3 if several else len(SECTIONS))
    assert len(set(ids)) == len(ids)
    assert set(links) <= set(ids)


@pytest.mark.parametrize("package", ["plotly", "scipy"])
def test_what_a_report_needs_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without plotly or SciPy there is one clear error, before any work."""
    check_report()
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "modelkin.report.writing.find_spec", lambda name: None if name == package else real(name)
    )
    with pytest.raises(MissingExtraError, match=package):
        check_report()


def test_a_report_of_200_models_is_small(tmp_path: Path) -> None:
    """Under 8 MB, Plotly's own script included."""
    names = [f"organisation__fine-tune-{n}-7b-instruct" for n in range(12)]
    source = run_of(200, names=names, k=6, items=200)
    assert len(source.state.members) == 200
    write_report(tmp_path / "report.html", [source])
    assert (tmp_path / "report.html").stat().st_size < 8e6


# What is said


def test_the_overview_says_what_happened(html: str, source: Source) -> None:
    """What was bred from what, the best, how sure, why it stopped, what it cost, what failed."""
    said = text(parts(html)["Overview"])
    children = sum(bool(member.parents) for member in source.state.members.values())
    assert f"{children} children in {source.state.generation} generations" in said
    assert "4 foundation models (arith, code, law, prose), all fine-tunes of base" in said
    assert lead_sentence(source.state, source.samples_of) in said
    assert "optimistic" in said
    assert "The run stopped: reached the limit of 14 evaluations" in said
    state = replace(
        source.state,
        cost=Cost(merging=40.0, evaluating=7200.0, measuring=150.0, written=30_000_000),
    )
    cost = text(parts(report_page([replace(source, state=state)]))["Overview"])
    assert "40.0 seconds of merging, 2.0 hours of evaluating and 2.5 minutes of measuring" in cost
    assert "30.0 MB of weights" in cost
    assert "failed to merge: the oven <b>is</b> cold" in said


def test_the_table_has_the_state(html: str, source: Source) -> None:
    """Scores, gains and kinship of every model are in the full table, with all digits."""
    lines = table(html, "models")
    assert [line["model"] for line in lines] == [m.name for m in source.state.members.values()]
    for line, member in zip(lines, source.state.members.values(), strict=True):
        assert line["generation"] == str(member.generation)
        if member.average is None:
            assert line["failure"].startswith("merge: ")
            continue
        assert float(line["average"]) == 100 * member.average
        measured = source.state.kinship.get(frozenset(member.parents))
        if measured:
            gain = source.state.gain(member)
            assert gain is not None
            assert float(line["gain"]) == 100 * gain
            assert [float(line[metric]) for metric in ("pcc", "cs", "ed")] == list(measured)


def test_gains_are_those_of_the_analysis(html: str, source: Source) -> None:
    """Verdicts are by Holm over all merges of the run; differences are in points."""
    state = source.state
    scored = state.ranked()
    found = gains(
        {m.id: m.parents for m in state.members.values() if m.parents and m.scorecard},
        {m.id: source.samples_of(m) for m in scored},
        next(m.id for m in scored if not m.parents),
    )
    lines = table(html, "gains")
    assert len(lines) == len(found)
    for line, gain in zip(lines, found.values(), strict=True):
        assert line["verdict"] == gain.verdict
        assert float(line["gain"]) == pytest.approx(100 * gain.over_mean.value)
        assert float(line["low"]) == pytest.approx(100 * gain.over_mean.low)
        assert float(line["p, by Holm"]) == gain.adjusted_p
        assert float(line["over parent 2"]) == pytest.approx(100 * gain.over_parents[1].value)
    assert {line["verdict"] for line in lines} == {"better", "cannot tell"}


def test_the_tree_has_every_model_and_every_parent(html: str, source: Source) -> None:
    """A mark a model, a line a parent; later generations are further right."""
    traces = figure(parts(html)["Family tree"])["data"]
    marks = [trace for trace in traces if trace["mode"] == "markers+text"]
    members = source.state.members.values()
    assert sum(len(trace["x"]) for trace in marks) == len(members)
    across = sorted(x for trace in marks for x in trace["x"])
    assert across == sorted(member.generation for member in members)
    lines = {trace["name"]: trace["x"].count(None) for trace in traces if trace not in marks}
    assert lines["exploration merge"] == 2 * sum(member.exploration for member in members)
    assert lines[""] == 2 * sum(bool(m.parents) and not m.exploration for m in members)
    places = [(x, y) for trace in marks for x, y in zip(trace["x"], trace["y"], strict=True)]
    assert len(set(places)) == len(places)


def test_the_tree_names_every_generation(source: Source) -> None:
    """However many there are: a long tree scrolls, and its head would be out of sight."""
    long = run_of(60)
    for one in (source, long):
        axis = figure(parts(report_page([one]))["Family tree"])["layout"]["xaxis"]
        assert axis["tickvals"] == list(range(one.state.generation + 1))
        assert axis["ticktext"][-1] == f"generation {one.state.generation}"
    assert long.state.generation > 9


def test_lines_of_the_tree_pass_beside_models(html: str) -> None:
    """A line from a parent to a child generations later is on no model between them."""
    traces = figure(parts(html)["Family tree"])["data"]
    places = {
        place for trace in traces if trace["mode"] == "markers+text"
        for place in zip(trace["x"], trace["y"], strict=True)
    }  # fmt: skip
    long = []
    for trace in traces:
        if trace["mode"] != "lines":
            continue
        points = list(zip(trace["x"], trace["y"], strict=True))
        ends = [n for n, (x, _) in enumerate(points) if x is None]
        for start, end in zip([0, *(n + 1 for n in ends)], ends, strict=False):
            line = points[start:end]
            assert {line[0], line[-1]} <= places
            long += [line] if line[-1][0] - line[0][0] > 1 else []
    assert long
    assert all(place not in places for line in long for place in line[1:-1])


def test_task_differences_are_of_the_parents(html: str, source: Source) -> None:
    """Each merge is at its parents' kinship and the mean difference of their scores by task."""
    family = Family(source.state, source.samples_of)
    traces = figure(parts(html)["Task differences against kinship"])["data"][:4]
    shown = {
        name: (x, y)
        for trace in traces if trace["mode"] == "markers"
        for name, x, y in zip(trace["hovertext"], trace["x"], trace["y"], strict=True)
    }  # fmt: skip
    assert shown.keys() == {member.name for member in family.path}
    for member in family.path:
        one, other = (family.scores(parent) for parent in source.state.parents_of(member))
        apart = np.abs(np.array(one, dtype=float) - np.array(other, dtype=float)).mean()
        assert shown[member.name] == pytest.approx((family.kinship(member), apart))
    assert {line["with"] for line in table(html, "task-differences")} == {"task difference"}


def test_the_headline_is_the_lead(html: str, source: Source) -> None:
    """The best child, its lead over the best foundation model and whether that is sure."""
    family = Family(source.state, source.samples_of)
    best = family.best_child
    assert best is not None
    over = family.gains[best.id].over_best
    assert over is not None
    found = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    assert found["best child"] == best.name
    assert f"{over.value:+.2f}" in found.values()
    assert found["by a paired bootstrap"] == over.verdict


def test_the_lineage_ends_in_the_best_child(source: Source) -> None:
    """It holds the best child, and with each model its parents."""
    family = Family(source.state, source.samples_of)
    best = family.best_child
    assert best is not None
    assert best.id in family.lineage
    for member in family.lineage:
        assert set(source.state.members[member].parents) <= family.lineage


def test_the_map_has_every_known_pair_once(html: str, source: Source) -> None:
    """Each cell is the measured value, or the predicted one and marked so; it is symmetric."""
    spec = figure(parts(html)["Kinship"])
    names, kinds, z = spec["map"]["names"], spec["map"]["kinds"], np.array(spec["data"][0]["z"])
    ids = {member.name: member.id for member in source.state.members.values()}
    np.testing.assert_array_equal(z, z.T)
    for n, one in enumerate(names):
        for m, other in enumerate(names):
            pair = frozenset((ids[one], ids[other]))
            assert kinds[n][m] == ("i" if n == m else "m")
            if n != m:
                assert z[n, m] == float(f"{source.state.kinship[pair].pcc:.4g}")


def test_pairs_that_were_not_measured_are_predicted_and_said_so(source: Source) -> None:
    """Where no weights were read the map and the table have the prediction, marked."""
    state = source.state
    children = {m.id for m in state.members.values() if m.parents}
    kept = {pair: found for pair, found in state.kinship.items() if not pair & children}
    unread = replace(source, state=replace(state, kinship=kept))
    spec = figure(parts(report_page([unread]))["Kinship"])
    letters = "".join(spec["map"]["kinds"])
    assert letters.count("m") == 2 * len(kept)
    assert letters.count("p") == 2 * len(state.predictions)
    assert "u" not in letters
    (first, *_) = [row for row in rows(unread.state, source.samples_of) if row.generation == 2]
    assert re.fullmatch(r"~0\.\d\d", first.kinship)


def test_the_largest_difference_of_predictions_is_named(html: str, source: Source) -> None:
    """The pair whose prediction was furthest off, and by how much."""
    state = source.state
    off = {
        pair: abs((found.pcc or 0) - (state.kinship[pair].pcc or 0))
        for pair, found in state.predictions.items()
        if pair in state.kinship
    }
    worst = max(off, key=lambda pair: off[pair])
    said = text(parts(html)["Predicted and measured kinship"])
    assert f"measured, {len(off):,} of {len(state.predictions):,} pairs differ" in said
    assert f"by {off[worst]:.2g} at most" in said
    for member in worst:
        assert state.members[member].name in said


def test_choices_that_would_have_differed_are_told(source: Source) -> None:
    """A partner that measured kinship would not have chosen is named, with its generation."""
    state = source.state
    decision = propose(state.until(1), Rules())
    assert not isinstance(decision, Stop)
    best, partner = next(pairing.parents for pairing in decision if pairing.exploration)
    kinship = {**state.kinship, frozenset((best, partner)): Similarity(1.0, 1.0, 0.0)}
    told = report_page([replace(source, state=replace(state, kinship=kinship))])
    pair = f"{state.members[best].name} × {state.members[partner].name}"
    said = text(parts(told)["Predicted and measured kinship"])
    assert re.search(
        rf"Generation 2: with measured kinship .* chosen instead of {re.escape(pair)}\.", said
    )


def test_layers_are_those_of_the_statistics(html: str) -> None:
    """Each chosen pair has a curve over the layers and a line for the whole models."""
    spec = figure(parts(html)["Kinship layer by layer"])
    curve, whole = (spec["data"][position] for position in spec["choices"][0])
    assert curve["x"] == ["0", "1", "2", "3"]
    assert min(curve["y"]) <= whole["y"][0] <= max(curve["y"])
    assert len(spec["choices"]) >= 3
    assert "before their weights are rounded" in text(parts(html)["Kinship layer by layer"])


def test_branches_part_from_their_shared_parent(html: str, source: Source) -> None:
    """The lengths are the distances of both children from the better parent of both."""
    spec = figure(parts(html)["Where exploration and greed part"])
    explored = [m for m in source.state.members.values() if m.exploration]
    assert 1 <= len(spec["choices"]) <= len(explored)
    stats = source.statistics()
    assert stats is not None
    one = stats.models.index(explored[-1].id)
    other = stats.models.index(explored[-1].parents[0])
    last = spec["data"][spec["choices"][-1][0]]
    np.testing.assert_allclose(last["y"], np.sqrt(stats.distance_TNN[:, one, other]))


def test_early_stopping_replays_the_path(html: str) -> None:
    """Every threshold and patience has a row; more patience never saves more."""
    lines = table(html, "early-stopping")
    assert len(lines) == 15
    for earlier, later in pairwise(lines):
        if earlier["threshold"] == later["threshold"]:
            assert int(later["merges saved"]) <= int(earlier["merges saved"])


def test_how_to_reproduce_has_what_it_takes(html: str, source: Source) -> None:
    """The run file, the seed, the protocol, versions, hardware and the models' revisions."""
    said = text(parts(html)["How to reproduce"])
    assert " ".join(source.run_file.split()) in said
    for word in ("seed 0", "evaluation protocol synthetic", "python 3.11.2", "cpus 2", "abc123"):
        assert word in said


# The terminal


def shown(source: Source, width: int) -> list[str]:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(terminal_table(source.state, source.samples_of, width=width))
    return captured.get().splitlines()


def test_the_terminal_has_verdicts_and_predictions(source: Source) -> None:
    """On a wide terminal each merge has its verdict, and both kinds of kinship."""
    lines = shown(source, 160)
    assert all(word in lines[1] for word in ("near", "verdict", "kinship", "predicted"))
    family = Family(source.state, source.samples_of)
    for row in rows(source.state, source.samples_of):
        (line,) = (text for text in lines if re.match(rf"│ {row.name} +│", text))
        assert row.verdict in line
        if row.gains:
            assert row.gains.verdict == row.verdict
    child = family.path[-1]
    predicted, measured = family.predicted(child), family.measured(child)
    assert measured is not None
    (row,) = (row for row in rows(source.state, source.samples_of) if row.name == child.name)
    assert row.kinship == f"{measured.pcc:.2f}"
    assert row.predicted == (f"{predicted.pcc:.2f}" if predicted else "")


@pytest.mark.parametrize("width", [80, 100, 120])
def test_narrow_terminals_keep_the_verdict(source: Source, width: int) -> None:
    """What does not fit is left out, tasks first; no line is wider than the terminal."""
    lines = shown(source, width)
    assert "verdict" in lines[1]
    assert all(len(line) <= width for line in lines)
    assert any("cannot tell" in line for line in lines)


def test_the_lead_is_that_over_the_best_foundation(source: Source) -> None:
    """The sentence's interval is that of the child against the best foundation model."""
    family = Family(source.state, source.samples_of)
    child, foundation = family.best_child, family.best_foundation
    assert child
    assert foundation
    found = paired_difference(source.samples_of(child), [source.samples_of(foundation)])
    assert found
    said = lead_sentence(source.state, source.samples_of)
    assert f"interval {100 * found.low:+.2f} to {100 * found.high:+.2f}: {found.verdict}" in said


def test_scores_that_are_no_shares_are_shown_as_they_are() -> None:
    """A score above 1 means that the scale is the tasks' own."""
    source = run_of(8)
    state = source.state
    raised = {
        name: replace(
            member,
            scorecard=member.scorecard
            and replace(
                member.scorecard,
                scores={
                    task: replace(score, value=50 * score.value)
                    for task, score in member.scorecard.scores.items()
                },
            ),
        )
        for name, member in state.members.items()
    }
    family = Family(replace(state, members=raised), source.samples_of)
    assert family.factor == 1
    assert Family(state, source.samples_of).factor == 100


# The command


def recorded(folder: Path) -> Path:
    """A run folder on disk, with nothing but its ledger."""
    folder.mkdir(parents=True)
    with open_ledger(folder) as ledger:
        ledger.append(*events_of(8))
    return folder


def test_the_command_writes_the_report(tmp_path: Path) -> None:
    """Of one run beside its ledger, of several where it is told to, side by side."""
    one, two = recorded(tmp_path / "one"), recorded(tmp_path / "two")
    done = CliRunner().invoke(app, ["report", str(one)])
    assert (done.exit_code, done.output) == (0, f"Report: {one / 'report.html'}\n")
    assert "Overview" in parts((one / "report.html").read_text(encoding="utf-8"))
    out = tmp_path / "both.html"
    assert CliRunner().invoke(app, ["report", str(one), str(two), "-o", str(out)]).exit_code == 0
    titles = list(parts(out.read_text(encoding="utf-8")))
    assert {"one: Overview", "two: Overview", "Best so far, side by side"} <= set(titles)
    other = recorded(tmp_path / "elsewhere" / "one")
    CliRunner().invoke(app, ["report", str(one), str(other), "-o", str(out)])
    titles = list(parts(out.read_text(encoding="utf-8")))
    assert {f"{one}: Overview", f"{other}: Overview"} <= set(titles)


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["none"], "is no run folder"), (["one", "-o", "none/r.html"], "No such file or directory")],
)
def test_the_command_names_what_is_wrong(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is no run, or none to write to, is one line and exit status 2."""
    recorded(tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", *words])
    assert done.exit_code == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
