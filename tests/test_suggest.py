"""Which merges are suggested, in which order, and what is said for and against them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import llama_like, perturbed, write_checkpoint
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from test_preview import random_stats

from modelkin import evolve
from modelkin.blend import Coefficients, child_statistics
from modelkin.cli import app
from modelkin.config import parse_config
from modelkin.errors import ConfigError
from modelkin.gram import GramStats
from modelkin.merging import Native
from modelkin.outlook import print_suggestions
from modelkin.previewing import RECIPES, Crossing
from modelkin.records import (
    Event,
    Failed,
    Founded,
    Measured,
    Proposal,
    Proposed,
    Recipe,
    Score,
    Scorecard,
    Scored,
    Similarity,
    Started,
)
from modelkin.run import Run
from modelkin.state import RunState, fold
from modelkin.suggesting import (
    NEAR_DUPLICATE,
    Evidence,
    Suggestions,
    from_run,
    from_tables,
    suggest,
)
from modelkin.testing import FunctionEvaluator

SCORES: Mapping[str, Mapping[str, float]] = {
    "math": {"gsm8k": 0.6, "arc": 0.3, "code": 0.2, "qa": 0.1},
    "coder": {"gsm8k": 0.2, "arc": 0.3, "code": 0.9, "qa": 0.1},
    "weak": {"gsm8k": 0.1, "arc": 0.2, "code": 0.1, "qa": 0.0},
}
KINSHIP = {("math", "coder"): 0.25, ("math", "weak"): 0.5, ("coder", "weak"): -0.125}


def kin(values: Mapping[tuple[str, str], float]) -> dict[frozenset[str], float]:
    return {frozenset(pair): value for pair, value in values.items()}


def evidence(**changes: Any) -> Evidence:
    given = {"models": tuple(SCORES), "scores": SCORES, "kinship": kin(KINSHIP)}
    return Evidence(**(given | changes))


def pairs(found: Suggestions) -> list[tuple[str, str]]:
    return [one.parents for one in found.suggestions]


# The order


def test_the_mean_of_the_parents_decides() -> None:
    """First comes the pair whose averages are highest in the mean."""
    found = suggest(evidence())
    assert pairs(found) == [("coder", "math"), ("coder", "weak"), ("math", "weak")]
    first = found.suggestions[0]
    assert first.averages == pytest.approx((0.375, 0.3))
    assert first.mean == pytest.approx(0.3375)
    assert first.promise == pytest.approx((0.6 + 0.3 + 0.9 + 0.1) / 4)
    assert first.complement == pytest.approx(0.1)
    assert found.suggestions[1].complement == 0


def test_the_mean_foretells_more_than_the_promise() -> None:
    """Over the paper's merges the ranks of the children follow the one at 0.76, the other at 0.25.

    It is why the rule is what it is.
    """
    paper = Path(__file__).parent / "data" / "paper" / "main_experiment.csv"
    rows = list(csv.DictReader(paper.read_text(encoding="utf-8").splitlines()))
    tasks = ("truthfulqa", "winogrande", "gsm8k")
    by_model = {row["model"]: row for row in rows if all(row[task] for task in tasks)}
    scores = {name: {task: float(row[task]) for task in tasks} for name, row in by_model.items()}
    found: dict[str, list[float]] = {"mean": [], "promise": [], "child": []}
    for name, row in by_model.items():
        parents = (row["parent_1"], row["parent_2"])
        if set(parents) <= set(scores):
            (pair,) = suggest(Evidence(parents, scores)).suggestions
            found["mean"].append(pair.mean or 0)
            found["promise"].append(pair.promise or 0)
            found["child"].append(float(np.mean(list(scores[name].values()))))
    assert len(found["child"]) == 23
    assert ranks_agree(found["mean"], found["child"]) == pytest.approx(0.76, abs=0.005)
    assert ranks_agree(found["promise"], found["child"]) == pytest.approx(0.25, abs=0.005)


def ranks_agree(x: list[float], y: list[float]) -> float:
    """Spearman's correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic)


def test_of_equals_the_more_complementary_come_first() -> None:
    """Of pairs of the same mean, the one that could have more together is before the other."""
    scores = {"a": {"x": 0.5, "y": 0.5}, "b": {"x": 1.0, "y": 0.0}, "c": {"x": 0.0, "y": 1.0}}
    values = {("a", "b"): 0.1, ("a", "c"): 0.2, ("b", "c"): 0.3}
    found = suggest(Evidence(tuple(scores), scores, kin(values)))
    assert pairs(found) == [("b", "c"), ("a", "b"), ("a", "c")]
    assert [one.mean for one in found.suggestions] == [0.5, 0.5, 0.5]
    assert [one.promise for one in found.suggestions] == [1.0, 0.75, 0.75]


def test_of_equals_the_least_kin_come_first() -> None:
    """Pairs of the same scores are in the order of their kinship, unknown ones last."""
    scores = {name: {"t": 0.5} for name in "abc"}
    values = {("a", "b"): 0.5, ("a", "c"): -0.5}
    found = suggest(evidence(models=("a", "b", "c"), scores=scores, kinship=kin(values)))
    assert pairs(found) == [("a", "c"), ("a", "b"), ("b", "c")]


@given(
    st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=2, max_size=6),
    st.randoms(use_true_random=False),
)
def test_the_rule_holds(scores: list[list[float]], random: Any) -> None:
    """No suggestion has better parents than one before it, and each pair is there once."""
    by_model = {f"m{n}": dict(zip("xyz", row, strict=True)) for n, row in enumerate(scores)}
    values = {pair: random.uniform(-1, 0.9) for pair in combinations(by_model, 2)}
    found = suggest(Evidence(tuple(by_model), by_model, kin(values)), top=100)
    assert {frozenset(pair) for pair in pairs(found)} == set(kin(values))
    assert found.pairs == len(found.suggestions) == len(values)
    means = [one.mean for one in found.suggestions]
    assert means == sorted(means, key=lambda value: -(value or 0))
    for one in found.suggestions:
        assert one.averages is not None
        assert one.complement is not None
        assert one.averages[0] >= one.averages[1]
        assert one.complement >= -1e-15
        assert one.promise == pytest.approx(
            np.mean([max(by_model[name][t] for name in one.parents) for t in "xyz"])
        )


def test_merged_pairs_are_not_suggested() -> None:
    """A pair that was merged before is left out, whichever way round."""
    found = suggest(evidence(merged=frozenset([frozenset(("math", "coder"))])))
    assert pairs(found) == [("coder", "weak"), ("math", "weak")]
    assert found.pairs == 2


def test_top_cuts_the_list() -> None:
    """At most `top` are given, the best; how many there were is said."""
    found = suggest(evidence(), top=1)
    assert pairs(found) == [("coder", "math")]
    assert found.pairs == 3


def test_without_scores_the_least_kin_come_first() -> None:
    """Kinship alone ranks, and that scores are missing is said."""
    found = suggest(evidence(scores={}))
    assert pairs(found) == [("coder", "weak"), ("math", "coder"), ("math", "weak")]
    assert found.rule.startswith("Ranked by the kinship of the parents, the least kin first.")
    assert found.notes == (
        "no scores are known: whether parents complement each other cannot be told",
    )
    assert all(one.promise is None and one.complement is None for one in found.suggestions)


def test_without_kinship_scores_rank() -> None:
    """Scores alone rank, and that near-duplicates cannot be told is said."""
    found = suggest(evidence(kinship={}))
    assert pairs(found) == [("coder", "math"), ("coder", "weak"), ("math", "weak")]
    assert found.notes == ("no kinship is known: near-duplicates cannot be told",)
    assert "Near-duplicates" not in found.rule
    assert found.suggestions[0].reasons[0] == "kinship of the parents unknown or undefined"


def test_models_without_scores_come_after_those_with() -> None:
    """A pair without scores is behind all that have scores, however little kin."""
    values = {**KINSHIP, ("math", "new"): -0.9, ("coder", "new"): -0.8, ("weak", "new"): -0.7}
    found = suggest(evidence(models=(*SCORES, "new"), kinship=kin(values)))
    assert pairs(found)[3:] == [("math", "new"), ("coder", "new"), ("weak", "new")]
    assert found.notes == ("no scores of new: pairs with them come after the others",)


# The reasons


def test_reasons_name_models_tasks_and_figures() -> None:
    """In words: kinship, who is stronger at what and by how much, and the promise."""
    first = suggest(evidence()).suggestions[0]
    assert first.reasons == (
        "kinship of the parents 0.25",
        "averages 0.375 and 0.3, in the mean 0.3375",
        "coder is stronger at code (+0.7); math is stronger at gsm8k (+0.4)",
        "as good as the better of them at each task, a child would average 0.475, 0.1 above coder",
    )
    assert first.warnings == ()


def test_a_parent_that_adds_nothing_is_said() -> None:
    """Of a parent that is better at no task it is said, and the promise is the other's average."""
    scores = {"good": {"x": 0.5, "y": 0.75}, "bad": {"x": 0.5, "y": 0.25}}
    (one,) = suggest(Evidence(("bad", "good"), scores)).suggestions
    assert one.reasons[2:] == (
        "good is stronger at y (+0.5); bad at no task",
        "as good as the better of them at each task, a child would average 0.625, 0 above good",
    )


def test_equal_scores_are_said() -> None:
    """Where nobody is stronger, that is the reason."""
    scores = {name: {"t": 0.5} for name in "ab"}
    (one,) = suggest(Evidence(("a", "b"), scores)).suggestions
    assert one.reasons[2] == "equal scores at every task"


def test_many_tasks_are_counted() -> None:
    """The three largest leads are named, the others counted."""
    tasks = {f"t{n}": n / 10 for n in range(1, 6)}
    scores = {"a": tasks, "b": dict.fromkeys(tasks, 0.0)}
    (one,) = suggest(Evidence(("a", "b"), scores)).suggestions
    assert one.reasons[2] == (
        "a is stronger at t5 (+0.5), t4 (+0.4), t3 (+0.3) and 2 more; b at no task"
    )


# Near-duplicates


@pytest.mark.parametrize(("value", "warned"), [(0.95, False), (0.951, True), (1.0, True)])
def test_near_duplicate_parents_are_warned_of(value: float, warned: bool) -> None:
    """Above 0.95, and not at it, a pair is warned of and comes last, however good."""
    found = suggest(evidence(kinship=kin({**KINSHIP, ("math", "coder"): value})))
    assert pairs(found).index(("coder", "math")) == (2 if warned else 0)
    (one,) = (one for one in found.suggestions if one.parents == ("coder", "math"))
    assert one.warnings == (
        (
            f"the parents are near-duplicates (kinship {value:.3f}, above 0.95): merging them "
            "changes next to nothing",
        )
        if warned
        else ()
    )


def with_twin() -> GramStats:
    """Statistics of three models, and of the linear merge of the first two, called twin."""
    stats = random_stats(3)
    half_T = np.full(len(stats.tensors), 0.5)
    mean = Coefficients(("m0", "m1"), stats.tensors, 0 * half_T, np.stack([half_T] * 2, axis=1))
    return child_statistics(stats, mean).joined(stats, "twin")


def test_a_child_that_exists_already_is_warned_of() -> None:
    """A child that is predicted to be as one of the models comes last, and that one is named."""
    crossing = Crossing(RECIPES["linear"], with_twin())
    scores = {"m0": {"t": 0.9}, "m1": {"t": 0.8}, "m2": {"t": 0.1}, "twin": {"t": 0.2}}
    found = suggest(Evidence(tuple(scores), scores, crossing=crossing))
    last = found.suggestions[-1]
    assert last.parents == ("m0", "m1")
    assert last.warnings == (
        "the child would be a near-duplicate of twin (predicted kinship 1.000, above 0.95)",
    )
    assert last.nearest is not None
    assert last.nearest.model == "twin"
    assert last.nearest.ed == pytest.approx(0, abs=1e-6)
    assert all(not one.warnings for one in found.suggestions[:-1])
    assert (
        pairs(suggest(Evidence(tuple(scores), scores, crossing=crossing), top=2))
        == pairs(found)[:2]
    )


def test_the_nearest_model_is_the_predicted_one() -> None:
    """Whom a child will resemble is what a preview of the pair says, parents aside."""
    stats = random_stats(5)
    crossing = Crossing(RECIPES["slerp"], stats)
    found = suggest(Evidence(stats.models, crossing=crossing))
    for one in found.suggestions:
        child = crossing.child(*one.parents)
        name, value = child.others("pcc")[0]
        assert one.nearest is not None
        assert (one.nearest.model, one.nearest.kinship) == (name, value)
        assert one.reasons[-1] == (
            f"besides its parents the child would be most kin to {name}: predicted {value:.2f}, "
            f"at a distance of {child.kinship[name].ed:.3g}"
        )


def test_a_child_without_answer_is_said() -> None:
    """Where the method has no answer for a pair, the pair is suggested and the reason given."""
    stats = random_stats(2)
    recipe = {
        **RECIPES["linear"],
        "models": [
            {"model": "{parent_1}", "parameters": {"weight": 1}},
            {"model": "{parent_2}", "parameters": {"weight": -1}},
        ],
    }
    (one,) = suggest(Evidence(stats.models, crossing=Crossing(recipe, stats))).suggestions
    assert one.reasons[-1].startswith("the child cannot be predicted: linear: ")
    assert "expected weights whose sum is not 0" in one.reasons[-1]


# A run


def card(*values: float) -> Scorecard:
    return Scorecard({f"t{n}": Score(value) for n, value in enumerate(values, 1)}, "protocol")


def history(metric: str = "pcc", merge: Mapping[str, Any] | None = None) -> RunState:
    """Three scored models and one that failed; a and b were merged; one child waits."""
    names = {"id0": "m0", "id1": "m1", "id2": "m2", "id3": "m3"}
    settings = {"metric": metric, "merge": merge or {"preset": "slerp"}}
    events: list[Event] = [Started(settings, {}, "evaluations")]
    events += [
        Founded(key, name, "foundation", f"/{name}", None, key) for key, name in names.items()
    ]
    for n, key in enumerate(names):
        close = {f"id{m}": Similarity(0.1 * (n + m), 0.2 * (n + m), 5.0) for m in range(n)}
        events.append(Measured(key, close, 0.0))
    events += [
        Scored("id0", card(0.1, 0.9), "e0", 0.0),
        Scored("id1", card(0.6, 0.5), "e1", 0.0),
        Scored("id2", card(0.8, 0.1), "e2", 0.0),
        Failed("id3", "evaluate", "it answered nothing"),
        Proposed(1, (Proposal("id01", "1-1", Recipe(("id1", "id0"), "base", {}, 0)),)),
    ]
    return fold(events)


def by_id(stats: GramStats) -> GramStats:
    """The same with ids for names, as a run has them."""
    return replace(stats, models=tuple(f"id{n}" for n in range(len(stats.models))))


@pytest.mark.parametrize(("metric", "factor"), [("pcc", 0.1), ("cs", 0.2), ("ed", 0.1)])
def test_a_run_knows_scores_kinship_and_what_was_merged(metric: str, factor: float) -> None:
    """Failed and waiting models and merged pairs are left out, the former by name."""
    state = history(metric)
    found = from_run(state, None)
    assert found.models == ("m0", "m1", "m2")
    assert found.scores["m1"] == {"t1": 0.6, "t2": 0.5}
    assert found.metric == ("cs" if metric == "cs" else "pcc")
    assert found.kinship[frozenset(("m1", "m2"))] == pytest.approx(3 * factor)
    assert found.merged == {frozenset(("m0", "m1"))}
    assert found.notes == (
        "left out, as they failed: m3",
        "left out, as they have no scores yet: 1-1",
        "no child is predicted: the run has kept no statistics of the weights",
    )
    assert pairs(suggest(found)) == [("m1", "m2"), ("m0", "m2")]


def test_a_run_with_statistics_predicts_by_its_own_recipe() -> None:
    """The run's recipe makes the children, the better parent first as in the run."""
    stats = random_stats(4)
    state = history(merge={"preset": "paper"})
    found = suggest(from_run(state, by_id(stats)))
    expected = Crossing(RECIPES["paper"], stats.select(["m0", "m1", "m2"]))
    for one in found.suggestions:
        assert one.nearest is not None
        name, value = expected.child(*one.parents).others("pcc")[0]
        assert one.nearest.model == name
        assert one.nearest.kinship == pytest.approx(value, abs=1e-12)
    assert not any("predicted" in note for note in found.notes)


def test_a_run_of_other_merges_predicts_nothing() -> None:
    """Where the run's recipe is no weighted sum, the reason is said and the rest is there."""
    template = {
        "merge_method": "ties",
        "base_model": "{base}",
        "models": [{"model": "{parent_1}"}, {"model": "{parent_2}"}],
    }
    state = history(merge={"template": template})
    found = suggest(from_run(state, by_id(random_stats(4))))
    assert found.notes[-1].startswith(
        "no child is predicted: recipe: the children cannot be predicted: merge_method ties is none"
    )
    assert pairs(found) == [("m1", "m2"), ("m0", "m2")]


def test_models_without_statistics_are_said() -> None:
    """Of pairs with a model whose weights were not measured nothing is predicted, which is said."""
    state = history()
    found = suggest(from_run(state, by_id(random_stats(4)).select(["id0", "id2"])))
    assert found.notes[-1] == "no statistics of m1: no child of it is predicted"
    assert pairs(found) == [("m1", "m2"), ("m0", "m2")]


# Tables


def write(file: str, text: str) -> str:
    Path(file).write_text(text, encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELKIN_CACHE", str(tmp_path / "cache"))


PAIRS = "model_1,model_2,pcc\nmath,coder,0.25\nmath,weak,0.5\ncoder,weak,-0.125\n"
TABLE = (
    "model,gsm8k,arc,code,qa\nmath,0.6,0.3,0.2,0.1\ncoder,0.2,0.3,0.9,0.1\nweak,0.1,0.2,0.1,0.0\n"
)


def test_tables_say_what_a_run_would() -> None:
    """A table of pairs and one of scores give the same evidence, and so the same suggestions."""
    assert from_tables(write("pairs.csv", PAIRS), write("scores.csv", TABLE)) == evidence()
    assert from_tables("pairs.csv") == evidence(scores={})
    assert from_tables("scores.csv") == evidence(kinship={})


def test_spreadsheets_are_read() -> None:
    """A byte order mark, spaces, empty lines and ends of lines of another system do no harm."""
    spoilt = "\ufeff" + PAIRS.replace(",", " , ").replace("\n", "\r\n") + "\r\n,,\r\n"
    Path("pairs.csv").write_bytes(spoilt.encode())
    assert from_tables("pairs.csv") == evidence(scores={})


def test_a_table_of_scores_may_say_who_was_merged() -> None:
    """The columns parent_1 and parent_2 name merged pairs; average is no task."""
    found = from_tables(
        write(
            "scores.csv",
            "model,parent_1,parent_2,t,average\na,,,0.5,0.5\nb,,,0.25,0.25\nab,a,b,0.75,0.75\n",
        )
    )
    assert found.merged == {frozenset("ab")}
    assert found.scores == {"a": {"t": 0.5}, "b": {"t": 0.25}, "ab": {"t": 0.75}}
    assert pairs(suggest(found)) == [("ab", "a"), ("ab", "b")]


def test_undefined_kinship_is_unknown() -> None:
    """An empty pcc, as `kinship` writes for a model equal to the base, is no kinship."""
    found = from_tables(write("pairs.csv", "model_1,model_2,pcc\na,b,\na,c,0.5\n"))
    assert found.models == ("a", "b", "c")
    assert found.kinship == {frozenset("ac"): 0.5}


@pytest.mark.parametrize(
    ("pairs_text", "scores_text", "message"),
    [
        ("a,b\n1,2\n", None, "pairs.csv: expected the columns model_1, .* found a, b"),
        ("model_1,pcc\na,0.5\n", None, "pairs.csv: expected the column model_2, found model_1"),
        (PAIRS + "a,b,x\n", None, "pairs.csv, row 5, column pcc: expected a number, found 'x'"),
        (PAIRS + "a,b,nan\n", None, "row 5, column pcc: expected a number, found 'nan'"),
        (PAIRS + "a,b,1.5\n", None, "row 5, column pcc: expected a number from -1 to 1"),
        (PAIRS + "a,,1\n", None, "row 5, column model_2: expected the name .* found nothing"),
        (PAIRS + "a,a,1\n", None, "row 5, column model_2: expected another model than a, found"),
        (PAIRS + "coder,math,1\n", None, "row 5, column model_2: expected each pair once"),
        (PAIRS + "a,b\n", None, "pairs.csv, row 5: expected 3 columns, found 2"),
        ("model_1,model_2,pcc\n", None, "pairs.csv: expected a table with rows, found none"),
        ("", None, "pairs.csv: expected a table with rows, found none"),
        ("model_1,pcc,pcc\na,1,1\n", None, "expected distinct columns, found 'pcc' twice"),
        (
            "level,model_1,model_2,pcc\nlayer,a,b,1\n",
            None,
            "column level: expected rows of the level model, found layer",
        ),
        (PAIRS, PAIRS, "scores.csv: expected the column model, found model_1"),
        (TABLE, TABLE, "pairs.csv: expected a table of pairs beside --scores, .* of scores"),
        (PAIRS, "model,average\na,1\n", "scores.csv: expected a column for each task, found model"),
        (PAIRS, TABLE + "math,1,1,1,1\n", "row 5, column model: expected each model once"),
        (PAIRS, TABLE + "new,1,,1,1\n", "row 5, column arc: expected a number, found nothing"),
        (
            PAIRS,
            "model,t\nother,1\n",
            "scores.csv, column model: expected models of pairs.csv, such as math, found other",
        ),
        (
            PAIRS,
            "model,t,parent_1,parent_2\nmath,1,,\nx,1,math,y\n",
            "row 3, column parent_2: expected a model of this table, found 'y'",
        ),
    ],
)
def test_a_wrong_table_is_one_line(pairs_text: str, scores_text: str | None, message: str) -> None:
    """The line names the file, the row and the column, what was expected and what was found."""
    table = write("pairs.csv", pairs_text)
    scores = None if scores_text is None else write("scores.csv", scores_text)
    with pytest.raises(ConfigError, match=message) as raised:
        from_tables(table, scores)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_no_table_is_an_error() -> None:
    """What is missing, or no text, is named."""
    with pytest.raises(ConfigError, match=r"nowhere\.csv: cannot be read: No such file"):
        from_tables("nowhere.csv")
    Path("bytes.csv").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(ConfigError, match=r"bytes\.csv: is no CSV table: "):
        from_tables("bytes.csv")


# The command line


def call(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def test_suggestions_are_printed_with_their_rule() -> None:
    """The rule stands above the pairs, each with its reasons."""
    write("pairs.csv", PAIRS)
    write("scores.csv", TABLE)
    shown = call("suggest", "pairs.csv", "--scores", "scores.csv", "--top", "2")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.startswith("Ranked by the mean of the parents' average scores, the highest")
    assert "2 of 3 pairs that were not merged before:" in shown.stdout
    assert "1. coder × math\n   kinship of the parents 0.25\n" in shown.stdout
    assert "2. coder × weak\n" in shown.stdout
    assert "3. " not in shown.stdout


def test_warnings_stand_before_reasons() -> None:
    """What is to beware of is the first line below the pair."""
    file = io.StringIO()
    found = suggest(evidence(kinship=kin({("math", "coder"): 0.99})), top=3)
    print_suggestions(found, Console(file=file, width=60, markup=False))
    assert (
        "3. coder × math\n   beware: the parents are near-duplicates (kinship 0.990, above 0.95): "
        "merging them changes next to nothing\n   kinship of the parents 0.99\n"
    ) in file.getvalue()
    assert str(NEAR_DUPLICATE) in found.rule


def test_json_holds_figures_and_words() -> None:
    """`--json` writes the rule, the notes and each pair with all that was said of it."""
    write("scores.csv", TABLE)
    assert call("suggest", "scores.csv", "--json", "out.json").stdout == ""
    said = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert said == suggest(from_tables("scores.csv")).as_dict()
    assert list(said) == ["rule", "pairs", "notes", "suggestions"]
    first = said["suggestions"][0]
    assert first["parents"] == ["coder", "math"]
    assert first["kinship"] is None
    assert first["nearest"] is None
    assert first["stronger"]["math"] == pytest.approx({"gsm8k": 0.4})


def test_errors_are_one_line() -> None:
    """A wrong table ends with status 2; so does a folder that is no run, or that has scores."""
    write("pairs.csv", PAIRS + "a,b,x\n")
    done = call("suggest", "pairs.csv")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == ("error: pairs.csv, row 5, column pcc: expected a number, found 'x'\n")
    Path("folder").mkdir()
    done = call("suggest", "folder")
    assert done.exit_code == 2
    assert "folder" in done.stderr
    done = call("suggest", "folder", "--scores", "pairs.csv")
    assert done.stderr == (
        "error: --scores: expected beside a table of pairs only, found a run folder\n"
    )


# Real models


def zoo() -> None:
    """A base and three fine-tunes, two of which are all but the same."""
    rng = np.random.default_rng(0)
    base = llama_like(rng, layers=2)
    first = perturbed(base, rng)
    write_checkpoint(Path("base"), base)
    write_checkpoint(Path("a"), first)
    write_checkpoint(Path("b"), perturbed(first, rng, scale=0.001))
    write_checkpoint(Path("c"), perturbed(base, rng))


def test_the_table_of_kinship_is_a_table_of_pairs() -> None:
    """What `modelkin kinship --csv` writes, `suggest` reads, and warns of near-duplicates."""
    zoo()
    assert call("kinship", "a", "b", "c", "--base", "base", "--csv", "pairs.csv").exit_code == 0
    said = json.loads(call("suggest", "pairs.csv", "--json", "-").stdout)
    rows = list(csv.DictReader(Path("pairs.csv").read_text(encoding="utf-8").splitlines()))
    by_pair = {(row["model_1"], row["model_2"]): float(row["pcc"]) for row in rows}
    for one in said["suggestions"]:
        assert one["kinship"] == by_pair[tuple(one["parents"])]
    assert said["suggestions"][-1]["parents"] == ["a", "b"]
    assert "the parents are near-duplicates" in said["suggestions"][-1]["warnings"][0]


def real_run() -> Run:
    """One generation of real merges, with scores that are numbers of the models' names."""
    zoo()
    config = parse_config(
        {
            "base": "base",
            "models": ["a", "b", "c"],
            "strategy": "greedy",
            "limits": {"generations": 1, "evaluations": 5},
            "merge": {"preset": "slerp"},
            "evaluation": {"evaluator": "command", "command": ["no", "{model}"], "tasks": ["t"]},
        },
        folder=Path.cwd(),
    )
    scores = {"a": (0.8, 0.1), "b": (0.2, 0.6), "c": (0.5, 0.5)}
    evaluator = FunctionEvaluator(
        lambda subject: dict(zip(("x", "y"), scores.get(subject.name, (0.5, 0.4)), strict=True))
    )
    return evolve(config, out=Path("run"), merger=Native(threads=1), evaluator=evaluator)


def test_a_real_run_suggests_what_it_has_not_merged() -> None:
    """No pair of a run's own is suggested, and what is predicted is of the run's own models."""
    run = real_run()
    names = {member.id: member.name for member in run.state.members.values()}
    merged = {frozenset(names[one] for one in pair) for pair in run.state.merged_pairs()}
    assert merged
    said = json.loads(call("suggest", "run", "--json", "-", "--top", "100").stdout)
    scored = [member.name for member in run.state.members.values() if member.scorecard]
    suggested = [frozenset(one["parents"]) for one in said["suggestions"]]
    assert set(suggested) == {frozenset(pair) for pair in combinations(scored, 2)} - merged
    assert said["pairs"] == len(suggested) == len(set(suggested))
    assert any(one["nearest"] for one in said["suggestions"])
    shown = call("suggest", "run")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert "besides its parents the child would be most kin to " in shown.stdout
