"""Facts about the places where the paper disagrees with itself, and about those made here."""

from __future__ import annotations

from pathlib import Path

import pytest
from replaying import copied, edit, listed, put

from modelkin.replay import Paper, read_paper
from modelkin.replay.disagreements import disagreements


@pytest.fixture(scope="module")
def paper() -> Paper:
    """The package's own data."""
    return read_paper()


def about(paper: Paper, kind: str) -> set[str]:
    """Where disagreements of a kind are."""
    return {found.where for found in disagreements(paper) if found.kind == kind}


def test_averages(paper: Paper) -> None:
    """Exactly these averages do not follow from their task scores."""
    assert about(paper, "average") == {
        "Table 9, model-5-1",
        "Table 9, model-5-2",
        "Table 9, model-3-3",
        "Table 12, child2-1",
        "Table 11, child-4-2-greedy",
        "Table 11, child-6-exp",
        "leaderboard of the slides, openagi-project/OpenAGI-7B-v0.1",
        "all tables with averages",
    }


def test_gains(paper: Paper) -> None:
    """Exactly these gains do not follow from the task scores."""
    wrong = ("3-3", "4-6", "4-exp", "5-1", "5-2", "5-3", "5-exp")
    assert about(paper, "gain") == {
        *(f"Tables 3, 9, model-{name}" for name in wrong),
        "Table 3, kinship column, model-3-2",
    }


def test_decisions(paper: Paper) -> None:
    """One merge and two endings depart from Algorithm 1."""
    assert about(paper, "decision") == {
        "kinship run, generation 4",
        "greedy run, after generation 4",
        "kinship run, after generation 5",
    }


@pytest.mark.parametrize(
    "line",
    [
        "average | Table 9, model-5-1 | 69.13 | 69.1767 from",
        "average | Table 9, model-5-2 | 68.98 | 69.0133 from",
        "average | Table 12, child2-1 | 56.40 | 56.4933 from",
        "average | Table 11, child-6-exp | 53.4 | 53.3333 from the task scores | the scores' own",
        "average | Table 9, model-3-3 | 69.06, which the gains of model-4-4, model-5-2 fit | the "
        "gains of model-3-3, model-4-6, model-5-1, model-5-exp fit 69.16 | two averages were in "
        "use; by the higher one model-3-3 is better than model-5-1 (69.13)",
        "gain | Tables 3, 9, model-3-3 | +0.74 | +0.648 from the task scores | it fits an average "
        "of 69.16 for model-3-3",
        "gain | Tables 3, 9, model-4-6 | +0.15 | +0.205 from",
        "gain | Tables 3, 9, model-5-1 | +0.04 | +0.127 from",
        "gain | Tables 3, 9, model-5-2 | +0.07 | +0.105 from the task scores | it was worked out "
        "from printed averages",
        "gain | Tables 3, 9, model-5-3 | -0.37 | -0.262 from the task scores | not explained: no "
        "pair of older models has this gain; model-4-6 x model-5-2 would",
        "gain | Tables 3, 9, model-4-exp | +3.42 | +3.303 from the task scores | not explained: no "
        "pair of older models",
        "gain | Table 3, kinship column, model-3-2 | 1.09 | -0.04 in Table 9 | it is the gain of "
        "model-3-1",
        "delta to top | Table 3 | differences to the best model, for 19 models | not to the best "
        "of the generations before: model-2-2 to model-2-1, model-2-3 to model-2-1, model-4-1 to "
        "model-3-1, model-4-3 to model-3-1, model-4-5 to model-4-4, model-4-6 to model-3-4, "
        "model-5-1 to model-4-6, model-5-2 to model-5-1, model-5-3 to model-5-1 | ",
        "kinship | version 1, model-5-exp | 0.53 | 0.59 in Table 9",
        "lead | Llama-2, child-6-exp over child-2-1-greedy | +0.2 | +0.07 from",
        "generation | Table 10, greedy run, generation 2 | 4 children | k = 3",
        "correlation | section 4, Figure 2 | the correlations are of 37 merges | the p values of "
        "Table 2 are of 14 merges, and path 1 has 14",
        "correlation | Table 14, ED | 0.80 | 0.81 from Table 15, 0.83 by Table 11's scores | cut",
        "community merge | Table 8, rows 22 and 34: mistral-ft-optimized-1218 x NeuralHerems-"
        "Mistral-2.5-7B | gain -0.85 | the same pair again, gain -0.85 | one row twice, with a "
        "name misspelt",
        "community merge | Table 8, rows 16 and 17: distilabeled-Marcoro14-7B-slerp x "
        "UNA-TheBeagle-7b-v1 | gain +1.01 | the same pair again, gain +0.89",
        "community merge | Table 8, row 35: MarcDareBeagle-7B x MarcBeagle-7B | gain -0.07 | gain "
        "+0.11 in path 2, step 8",
        "community merge | Figure 2 | the axis of merge gain begins at 0 | Table 8 has 14 negative "
        "gains, down to -5.96",
        "evolution path | Tables 6, 7 | two evolution paths | steps 12, 13, 14 of path 1 are steps "
        "10, 11, 12 of path 2",
        "evolution path | path 1, step 3 | step 2 made Beagle14-7B | step 3 merges NeuralBeagle14",
        "evolution path | path 2, step 5 | step 4 made Daredevil-7B | step 5 merges NeuralBeagle14",
        "evolution path | path 1, step 11 | its gain implies 76.47 for Experiment28 | step 14 of "
        "path 1 implies 76.62",
        "evolution path | Table 6, step 3 | NeuralBeagle14-7B x Turdus made StrangeMerges_9",
        "evolution path | section 5.2, path 1 | average gain 0.57 of 5 saturated merges | their "
        "mean gain is 0.06 | it is the total rise from step 8 to step 14",
        "evolution path | section 5.2, path 2 | average gain 0.36 of 3 saturated merges | their "
        "mean gain is 0.07 | it is the total rise from step 9 to step 12",
        "evolution path | section 5.2, path 1 | 5 saturated merges | 9 merges are at 75 or more",
        "kinship | Tables 6, 7 | Pearson and cosine of the same weights | differ by more than 0.01 "
        "in 11 of 26 rows, from -0.04 to +0.09",
        "kinship | Table 15 | Pearson and cosine of the same weights | differ by more than 0.01 in "
        "18 of 26 rows, from -0.12 to +0.19",
        "kinship | Table 12, child2-2 | 0.41 (cosine) | 0.57 (Pearson) in Table 9 for model-2-2",
        "kinship | Table 12, child2-3 | 0.01 (cosine) | -0.02 (Pearson) in Table 9 for "
        "model-2-exp, the same merge | the official code's cosine has no sign",
        "kinship | Figure 7, Mistral-Ins and Open-chat | 0.02 | -0.02 in Table 9",
        "task difference | Table 15, columns | labelled winogrande, truthfulqa, gsm8k | by Table "
        "11 they hold truthfulqa, winogrande, gsm8k: 13 of 26 rows fit so, and 0 as labelled",
        "task difference | Table 11, child-2-1-greedy | truthfulqa 44.5, winogrande 78.5, gsm8k "
        "36.8 | rows 3, 5, 10, 11, 12, 13, 17 of Table 15 fit truthfulqa 44.4, winogrande 78.4, "
        "gsm8k 36.6",
        "task difference | Table 15, row 1: child-4-1-greedy and child-5-3-greedy | differences "
        "0.1, 0.0, 0.2 | 0.1, 0.2, 0.0 by Table 11 | the differences of winogrande and gsm8k seem",
        "task difference | Table 15, row 4: child-4-exp and child-2-1-greedy | differences 1.1, "
        "0.9, 0.1 | 1.2, 2.4, 4.2 by Table 11 | no pair of models has these differences",
        "task difference | Table 15, row 19: child-2-1-greedy and child1-3-greedy | differences "
        "7.8, 3.1, 2.9 | 1.6, 1.4, 34.9 by Table 11 | they are those of child1-2-greedy and "
        "child-2-3-greedy",
        "task difference | Table 15, rows 4 and 11 | child-4-exp and child-2-1-greedy: 0.70",
        "exploration partner | version 3, Algorithm 1 line 11, and section 5.1 | the model of "
        "lowest kinship to the best one; the most distinct | version 1 and slides",
        "Llama model | Appendix B.2.2 | LLaMA-2-8B | ",
    ],
)
def test_what_the_paper_disagrees_in(paper: Paper, line: str) -> None:
    """Each place is found once, with what is printed, what contradicts it, and why."""
    assert sum(found.startswith(line) for found in listed(paper)) == 1


def test_nothing_is_listed_twice(paper: Paper) -> None:
    """Every line of the list is another one."""
    assert len(listed(paper)) == len(disagreements(paper))


@pytest.mark.parametrize(
    ("file", "where", "column", "value", "line"),
    [
        ("main_experiment", {"model": "model-3-4"}, "average_published", "68.70",
         "average | Table 9, model-3-4 | 68.70 | 68.6133"),
        ("main_experiment", {"model": "model-3-4"}, "gain_published", "+1.33",
         "gain | Tables 3, 9, model-3-4 | +1.33 | +1.140"),
        ("main_experiment", {"model": "model-3-1"}, "parent_2", "metamath-mistral-7b",
         "decision | greedy run, generation 3 | model-3-1 = model-2-1 x metamath-mistral-7b | "),
        ("main_experiment", {"model": "model-1-1"}, "kinship_published", "0.11",
         "kinship | Figure 7, MetaMath and Mistral-Ins | 0.02 | 0.11 in Table 9"),
        ("baselines", {"method": "TIES"}, "gsm8k", "18.79", "average | Table 1, TIES | 50.37 | "),
        ("random_merge", {"model": "child1-1"}, "kinship_cs_published", "0.31",
         "kinship | Table 12, child1-1 | 0.31 (cosine) | 0.01 (Pearson)"),
        ("correlations", {"metric": "PCC"}, "absolute_r", "-0.70",
         "correlation | Table 2, PCC, absolute | -0.70 | -0.60 from path 1"),
        ("community_paths", {"path": "1", "step": "6"}, "gain", "0.5",
         "community merge | Table 8, row 11: "),
        ("community_paths", {"path": "1", "step": "7"}, "model_1", "Other",
         "evolution path | path 1, step 7 | step 6 made StrangeMerges_11"),
        ("community_merges", {"row": "28"}, "model_2", "Experiment26",
         "community merge | Table 8, rows 1 and 28: "),
        ("llama_runs", {"table": "15", "row": "26", "metric": "atpd_published"}, "value", "17.90",
         "task difference | Table 15, row 26 | mean difference 17.90 | 16.90 from"),
        ("llama_runs", {"table": "15", "row": "26", "metric": "gsm8k_diff"}, "value", "26.50",
         "task difference | Table 15, row 26: GSM8K and TruthfulQA | differences 17.7, 4.5, 26.5"),
        ("claims", {"claim": "k"}, "value", "2", "generation | Table 11, greedy run, generation 2"),
        ("claims", {"claim": "best_second_kinship"}, "value", "49.47",
         "lead | second task set, child3-3 over child3-1-greedy | +2.13 | +1.12"),
        ("claims", {"claim": "task_difference_cs"}, "value", "-0.70", "correlation | Table 14, CS"),
        ("claims", {"claim": "saturated_gain_1"}, "value", "0.99",
         "evolution path | section 5.2, path 1 | average gain 0.99 of 5 saturated merges | their "
         "mean gain is 0.06 | not explained"),
        ("figure_7", {"model_1": "MetaMath", "model_2": "Open-chat"}, "kinship", "0.50",
         "kinship | Figure 7, MetaMath and Open-chat | 0.50 | 0.05 in Table 9"),
        ("reprints", {"subject": "model-3-2", "quantity": "delta to top"}, "value", "-0.30",
         "delta to top | Table 3 | differences to the best model, for 19 models | not to the best "
         "of the generations before: model-2-2 to model-2-1, model-2-3 to model-2-1, model-3-2"),
        ("statements", {"topic": "Llama model"}, "one_says", "LLaMA-2-9B",
         "Llama model | Appendix B.2.2 | LLaMA-2-9B"),
    ],
)  # fmt: skip
def test_a_changed_number_is_found(
    tmp_path: Path, file: str, where: dict[str, str], column: str, value: str, line: str
) -> None:
    """Whatever number is made to contradict another, a line appears that was not there before."""
    folder = copied(tmp_path)
    before = listed(read_paper(folder))
    edit(folder / f"{file}.csv", put(column, value), **where)
    after = listed(read_paper(folder))
    assert sum(found.startswith(line) for found in after - before) == 1
