"""Facts about the paper's tables computed again: its numbers, decisions and contradictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from replaying import SHIPPED, copied, edit, listed, put, rows
from scipy import stats

from modelkin.errors import ConfigError
from modelkin.replay import Paper, read_paper
from modelkin.replay.arithmetic import average_of, averages, gain_of
from modelkin.replay.community import misspelt, same_model
from modelkin.replay.correlations import (
    difference_by_scores,
    gain_correlations,
    merges_by_p,
    samples,
    task_correlations,
)
from modelkin.replay.lineage import decisions, generations
from modelkin.replay.paths import paths
from modelkin.replay.restated import leads


@pytest.fixture(scope="module")
def paper() -> Paper:
    """The package's own data."""
    return read_paper()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the package's data."""
    return copied(tmp_path)


# The data.


def test_the_shipped_data_are_those_of_the_other_tests() -> None:
    """The main experiment is kept twice, for the package and for the tests; both are the same."""
    other = Path(__file__).parent / "data" / "paper" / "main_experiment.csv"
    assert (SHIPPED / "main_experiment.csv").read_bytes() == other.read_bytes()


def test_everything_is_read(paper: Paper) -> None:
    """All rows of all tables are there."""
    assert len(paper.models) == 26
    assert [len(paper.path(number)) for number in (1, 2)] == [14, 12]
    assert len(paper.merges) == 37
    assert len(paper.pairs) == 26
    assert len(paper.figure_7) == 30
    tables = {"Table 1": 8, "Table 10": 24, "Table 11": 25, "Table 12": 15}
    assert {table: len(paper.table(table)) for table in tables} == tables


def test_numbers_keep_their_printed_digits(paper: Paper) -> None:
    """A printed 68.60 is not 68.6: how far a number is known is part of it."""
    assert str(paper.models["model-1-1"].gain) == "-0.6"
    assert str(paper.models["model-3-3"].scores["gsm8k"]) == "70.00"


def test_averages_and_gains_are_those_worked_out_before(paper: Paper) -> None:
    """Our averages, gains and differences equal those that came with the data."""
    for row in rows(SHIPPED / "main_experiment.csv"):
        model = paper.models[row["model"]]
        assert float(average_of(model)) == pytest.approx(float(row["average_computed"]), abs=6e-5)
        if row["gain_computed"]:
            gain = float(gain_of(paper, model))
            assert gain == pytest.approx(float(row["gain_computed"]), abs=6e-5)
    found = {(a.table, a.name): float(a.found) for a in averages(paper)}
    for file, table, name in (
        ("baselines.csv", "Table 1", "method"),
        ("random_merge.csv", "Table 12", "model"),
    ):
        for row in rows(SHIPPED / file):
            computed = float(row["average_computed"])
            assert found[table, row[name]] == pytest.approx(computed, abs=6e-5)
    pairs = {pair.row: pair for pair in paper.pairs}
    scores = paper.table("Table 11")
    for row in rows(SHIPPED / "llama_runs.csv"):
        computed = float(row["value"])
        if row["metric"] == "average_computed":
            assert found[f"Table {row['table']}", row["model"]] == pytest.approx(computed, abs=6e-5)
        elif row["metric"] == "atpd_computed_from_table_11":
            difference = difference_by_scores(pairs[int(row["row"])], scores)
            assert difference == pytest.approx(computed, abs=6e-5)


# Correlations.


@pytest.mark.parametrize(
    ("metric", "signed", "r", "p", "printed"),
    [
        ("pcc", True, "-0.51", 0.062, "-0.50"), ("pcc", False, "-0.60", 0.024, "-0.59"),
        ("cs", True, "-0.45", 0.106, "-0.45"), ("cs", False, "-0.67", 0.009, "-0.66"),
        ("ed", True, "0.47", 0.091, "0.46"), ("ed", False, "0.68", 0.008, "0.67"),
    ],
)  # fmt: skip
def test_table_2_is_path_1(
    paper: Paper, metric: str, signed: bool, r: str, p: float, printed: str
) -> None:
    """The six correlations of Table 2 come out of path 1, within 0.01 of print."""
    (row,) = (
        row
        for row in gain_correlations(paper)
        if (row.sample, row.metric, row.signed) == ("path 1", metric, signed)
    )
    assert f"{row.found.r:.2f}" == r
    assert round(row.found.p, 3) == p
    assert row.found.n == 14
    assert row.found.low < row.found.r < row.found.high
    assert str(row.printed[0]) == printed
    assert row.equal
    assert row.why.startswith(("as printed", "rounding of the printed kinship"))


def test_correlations_equal_scipys(paper: Paper) -> None:
    """Each correlation and its p value is that of an independent implementation."""
    for row in gain_correlations(paper):
        steps = samples(paper)[row.sample]
        gain = np.array([float(step.gain) for step in steps])
        expected = stats.pearsonr(
            [float(step.kinship[row.metric]) for step in steps], gain if row.signed else abs(gain)
        )
        assert row.found.r == pytest.approx(expected.statistic)
        assert row.found.p == pytest.approx(expected.pvalue)


def test_one_merge_carries_path_2(paper: Paper) -> None:
    """Path 2's and both paths' correlation is that of CatPPT-base, and is left without it."""
    found = {(row.sample, row.metric, row.signed): row for row in gain_correlations(paper)}
    assert f"{found['path 2', 'pcc', True].found.r:.2f}" == "-0.97"
    assert f"{found['both paths', 'pcc', False].found.r:.2f}" == "-0.91"
    assert {row.decisive for (sample, *_), row in found.items() if sample == "path 2"} == {
        "CatPPT-base"
    }
    without = found["both without CatPPT-base", "pcc", True]
    assert without.found.n == 22
    assert f"{without.found.r:.2f}" == "-0.50"
    assert without.decisive == ""


def test_the_printed_p_values_are_of_14_merges(paper: Paper) -> None:
    """No other number of merges than path 1's gives the printed r their printed p."""
    assert merges_by_p(paper) == [14]


@pytest.mark.parametrize(
    ("metric", "r", "ranks", "rescored", "printed"),
    [
        ("pcc", "-0.74", "-0.82", "-0.73", "-0.74"),
        ("cs", "-0.77", "-0.87", "-0.74", "-0.77"),
        ("ed", "0.81", "0.88", "0.83", "0.80"),
    ],
)
def test_kinship_goes_with_task_difference(
    paper: Paper, metric: str, r: str, ranks: str, rescored: str, printed: str
) -> None:
    """Related Llama models do their tasks alike: the correlations of Table 14, from Table 15."""
    (row,) = (row for row in task_correlations(paper) if row.metric == metric)
    assert row.found.n == 26
    assert (f"{row.found.r:.2f}", f"{row.ranks.r:.2f}") == (r, ranks)
    assert f"{row.rescored.r:.2f}" == rescored
    assert str(row.printed) == printed


# Decisions.

PARENTS = {
    1: {
        ("metamath-mistral-7b", "mistral-7b-instruct-v0.2"),
        ("mistral-7b-instruct-v0.2", "openchat-3.5-1210"),
        ("metamath-mistral-7b", "openchat-3.5-1210"),
    },
    2: {
        ("model-1-3", "openchat-3.5-1210"),
        ("model-1-2", "model-1-3"),
        ("model-1-2", "openchat-3.5-1210"),
    },
}


@pytest.mark.parametrize(
    ("run", "generation", "parents"),
    [
        *((run, g, pairs) for run in ("greedy", "kinship") for g, pairs in PARENTS.items()),
        ("greedy", 3, {("model-2-1", "openchat-3.5-1210"), ("model-1-3", "model-2-1")}),
        (
            "kinship",
            3,
            {
                ("model-1-3", "model-2-1"),
                ("model-2-1", "model-2-exp"),
                ("model-1-3", "model-2-exp"),
            },
        ),
    ],
)
def test_parents_of_generations_1_to_3(
    paper: Paper, run: str, generation: int, parents: set[tuple[str, str]]
) -> None:
    """Algorithm 1 merges what the paper merged, and nothing else."""
    found = [d for d in decisions(paper) if (d.run, d.generation) == (run, generation)]
    assert all(decision.as_published for decision in found)
    pairs = {tuple(sorted(decision.parents)) for decision in found if not decision.exploration}
    assert pairs == parents


@pytest.mark.parametrize(
    ("generation", "parents"),
    [
        (2, ("model-1-3", "mistral-7b-instruct-v0.2")),
        (3, ("model-2-1", "model-1-1")),
        (4, ("model-3-3", "model-2-3")),
        (5, ("model-3-3", "model-3-2")),
    ],
)
def test_exploration_is_the_published_one(
    paper: Paper, generation: int, parents: tuple[str, str]
) -> None:
    """The least related partner of the generation before the newest is the published one."""
    (found,) = (d for d in decisions(paper) if d.exploration and d.generation == generation)
    assert found.parents == parents
    assert found.child == f"model-{generation}-exp"
    assert found.as_published


def test_one_merge_differs(paper: Paper) -> None:
    """Of all merges of both runs one departs from Algorithm 1, and the log says why."""
    log = decisions(paper)
    ours, theirs = (decision for decision in log if not decision.as_published)
    assert (ours.run, ours.generation, ours.decided) == ("kinship", 4, True)
    assert ours.parents == ("model-3-3", "model-3-4")
    assert ours.why.endswith("the paper merged model-3-3 x model-3-1 instead")
    assert (theirs.child, theirs.decided) == ("model-4-6", False)
    assert theirs.why == (
        "model-3-1 (68.59) is not among the 3 best, the last of which is model-3-4 (68.61); "
        "it is a model of the greedy run"
    )
    assert sum(decision.as_published for decision in log) == 29


def test_a_choice_of_one_known_partner_says_so(paper: Paper) -> None:
    """Where kinship is printed of one possible partner only, the log names those it is not of."""
    (found,) = (d for d in decisions(paper) if d.child == "model-5-exp")
    assert found.why.endswith("is printed: model-3-2 0.59; not printed: model-3-4, model-3-exp")


def test_neither_run_ends_where_its_rule_ends(paper: Paper) -> None:
    """The three best still changed in both runs' last generation."""
    for row in generations(paper):
        assert row.changed
        assert row.next.startswith("goes on")
    last = {row.run: (row.number, row.best) for row in generations(paper) if row.last}
    assert last == {
        "greedy": (4, ("model-2-1", "model-3-1", "model-4-3")),
        "kinship": (5, ("model-5-1", "model-3-3", "model-4-6")),
    }


def test_the_best_of_the_greedy_run_converge(paper: Paper) -> None:
    """The kinship of the three best passes 0.9 in generation 2, after which nothing is gained."""
    greedy = [row for row in generations(paper) if row.run == "greedy"]
    assert [row.kinship and round(row.kinship, 2) for row in greedy] == [
        0.01,
        0.69,
        0.94,
        0.97,
        None,
    ]
    assert greedy[2].average == greedy[4].average


# Paths.


def test_stages_are_the_published_ones(paper: Paper) -> None:
    """Our rule finds as many saturated merges as the paper counts on each path."""
    found = {path.name: path for path in paths(paper)}
    for name, count in (("path 1", 5), ("path 2", 3)):
        claim = found[name].saturated
        assert claim is not None
        assert found[name].found_saturated == count == claim.value


def test_early_stopping_on_path_1(paper: Paper) -> None:
    """Two merges above 0.9 in a row stop path 1 after its tenth merge, 0.19 below its best."""
    (path,) = (path for path in paths(paper) if path.name == "path 1")
    (stop,) = (stop for stop in path.stops if (stop.threshold, stop.patience) == (0.9, 2))
    assert stop.stops_after == 9
    assert path.models[9] == "StrangeMerges_31-7B-slerp"
    assert stop.saved == 4
    assert stop.lost == pytest.approx(76.86 - 76.67)


def test_leads(paper: Paper) -> None:
    """What the kinship runs are ahead by, as printed and from the task scores."""
    assert [(str(lead.printed), f"{lead.found:.2f}") for lead in leads(paper)] == [
        ("0.41", "0.45"), ("1.13", "1.12"), ("0.2", "0.07")
    ]  # fmt: skip


# Names.


def test_names_of_one_model() -> None:
    """A name may go on where another ends, or have its letters in another order."""
    assert same_model("MBX-7B", "MBX-7B-v3")
    assert not same_model("StrangeMerges_9-7B", "StrangeMerges_90-7B")
    assert misspelt("NeuralHerems-Mistral-2.5-7B", "NeuralHermes-2.5-Mistral-7B")
    assert not misspelt("StrangeMerges_21-7B", "StrangeMerges_12-7B")


# Bad data.


@pytest.mark.parametrize(
    "file",
    ["main_experiment", "community_paths", "community_merges", "llama_runs", "correlations",
     "leaderboard", "baselines", "random_merge"],
)  # fmt: skip
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    """Each of the eight tables is needed."""
    path = folder / f"{file}.csv"
    path.unlink()
    with pytest.raises(ConfigError, match=r"expected a CSV file, found none") as error:
        read_paper(folder)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.csv")), ids=lambda path: path.stem)
def test_a_missing_column_is_named(folder: Path, path: Path) -> None:
    """Whatever file lacks its first column, the error names both."""
    file = folder / path.name
    head, rest = file.read_text(encoding="utf-8").split("\n", 1)
    column = head.split(",")[0]
    file.write_text(head.replace(column, "other", 1) + "\n" + rest, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_paper(folder)
    assert str(error.value).startswith(f"{file}: expected a column {column!r}, found other, ")


@pytest.mark.parametrize(
    ("file", "where", "column", "value", "message"),
    [
        ("main_experiment", {"model": "model-3-3"}, "gsm8k", "high",
         "line 14, column gsm8k: expected a number, found 'high'"),
        ("main_experiment", {"model": "model-3-3"}, "gsm8k", "nan",
         "line 14, column gsm8k: expected a number, found 'nan'"),
        ("main_experiment", {"model": "model-3-3"}, "average_published", "",
         "line 14, column average_published: expected a number, found ''"),
        ("main_experiment", {"model": "model-3-3"}, "strategy", "best",
         "column strategy: expected one of both, foundation, greedy, kinship, found 'best'"),
        ("main_experiment", {"model": "model-3-3"}, "generation", "2.5",
         "line 14, column generation: expected a whole number, found '2.5'"),
        ("main_experiment", {"model": "model-3-3"}, "generation", "0",
         "column generation: expected 0 for a foundation, 1 or more for others, found 0"),
        ("main_experiment", {"model": "model-3-3"}, "parent_2", "",
         "column parent_1: expected two parents, or none for a foundation, found 1"),
        ("main_experiment", {"model": "model-3-3"}, "parent_2", "nobody",
         "row model-3-3: expected parents among the models of older generations, found 'nobody'"),
        ("main_experiment", {"model": "model-3-3"}, "parent_2", "model-4-1",
         "expected parents among the models of older generations, found 'model-4-1'"),
        ("main_experiment", {"model": "model-3-3"}, "model", "model-3-4",
         "column model: expected each model once, found 'model-3-4' twice"),
        ("community_paths", {"path": "1", "step": "3"}, "ed", "far",
         "line 4, column ed: expected a number, found 'far'"),
        ("community_paths", {"path": "1", "step": "3"}, "model_merged", "",
         "line 4, column model_merged: expected a name, found an empty field"),
        ("correlations", {"metric": "ED"}, "metric", "L1",
         "line 4, column metric: expected one of CS, ED, PCC, found 'L1'"),
        ("llama_runs", {"table": "15", "row": "26", "metric": "kinship_cs"}, "metric", "cosine",
         "table 15, row 26: expected a line of metric kinship_cs, found"),
        ("llama_runs", {"table": "15", "row": "26", "metric": "winogrande_diff_as_labelled"},
         "model_2", "Truth", "column model_2: expected one of GSM8K, TruthfulQA, child"),
        ("claims", {"claim": "k"}, "value", "three",
         "column value: expected a number, found 'three'"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named(
    folder: Path, file: str, where: dict[str, str], column: str, value: str, message: str
) -> None:
    """A wrong field is one error with file, row, column, what was expected and what was found."""
    edit(folder / f"{file}.csv", put(column, value), **where)
    with pytest.raises(ConfigError) as error:
        read_paper(folder)
    assert str(error.value).startswith(f"{folder / file}.csv: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_csv_is_an_error(folder: Path) -> None:
    """Bytes that are no text, empty files and files without rows are told from tables."""
    file = folder / "baselines.csv"
    head = file.read_text(encoding="utf-8").split("\n")[0]
    for content, message in (
        (b"\xff\xfe\x00", "expected a CSV file: "),
        (b"", "expected a column 'method', found none"),
        (head.encode(), "expected rows below the columns, found none"),
        (head.encode() + b"\nTIES,one-shot\n", "column truthfulqa: expected a field, found none"),
    ):
        file.write_bytes(content)
        with pytest.raises(ConfigError) as error:
            read_paper(folder)
        assert message in str(error.value)


def test_a_path_too_short_to_correlate_is_an_error(folder: Path) -> None:
    """With two merges on a path there is no correlation, and the error says so."""
    file = folder / "community_paths.csv"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join([*lines[:3], *lines[15:]]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"path 1, pcc: expected at least 3 rows"):
        gain_correlations(read_paper(folder))


def test_a_consistent_average_is_no_disagreement(folder: Path) -> None:
    """Whatever is put right in the data is no longer listed."""
    before = listed(read_paper(folder))
    edit(folder / "main_experiment.csv", put("average_published", "69.18"), model="model-5-1")
    after = listed(read_paper(folder))
    assert any(line.startswith("average | Table 9, model-5-1 |") for line in before)
    assert not any(line.startswith("average | Table 9, model-5-1 |") for line in after)


def test_a_run_without_models_is_an_error(folder: Path) -> None:
    """Both runs have to be there, or there is nothing to decide."""
    file = folder / "main_experiment.csv"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(lines[:4]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"expected models of the greedy run, found none"):
        read_paper(folder)


def test_the_order_of_rows_does_not_matter(folder: Path, paper: Paper) -> None:
    """Models come after their parents and steps in order, however the files are sorted."""
    for name in ("main_experiment", "community_paths", "llama_runs"):
        file = folder / f"{name}.csv"
        head, *lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join([head, *reversed(lines)]), encoding="utf-8")
    turned = read_paper(folder)
    assert turned.path(1) == paper.path(1)
    assert [row.found.r for row in task_correlations(turned)] == pytest.approx(
        [row.found.r for row in task_correlations(paper)]
    )
    assert {(d.run, frozenset(d.parents), d.as_published) for d in decisions(turned)} == {
        (d.run, frozenset(d.parents), d.as_published) for d in decisions(paper)
    }
