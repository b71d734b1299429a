"""Facts about tables of merges that others made."""

import json
from io import StringIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from modelkin.cli import app
from modelkin.community import (
    Findings,
    MergeTable,
    analyse_merges,
    print_findings,
    read_merges,
)
from modelkin.errors import ConfigError

# The paper's first generations: three foundation models and what was bred from them.
FAMILY = """\
model,parent_1,parent_2,truthfulqa,winogrande,gsm8k,gain,kinship
metamath,,,44.89,75.77,70.51,,
instruct,,,68.26,77.19,40.03,,
openchat,,,52.15,80.74,65.96,,
1-1,metamath,instruct,52.51,76.16,57.85,-0.6,0.01
1-2,instruct,openchat,58.04,76.32,57.72,-0.03,-0.02
1-3,metamath,openchat,48.96,78.69,72.86,1.84,0.05
2-1,1-3,openchat,50.94,80.11,75.13,2.16,0.93
2-2,1-3,1-2,49.78,78.93,55.72,-3.96,0.57
"""
# The heads of the leaderboard's own tables, of version 1 and 2, and how they write a model.
V1 = "T,Model,Average ⬆️,ARC,HellaSwag,MMLU,TruthfulQA,Winogrande,GSM8K,#Params (B),Hub ❤️,Precision"
V2 = (
    "eval_name,Precision,Type,Model,fullname,Average ⬆️,Hub ❤️,#Params (B),CO₂ cost (kg),"
    "IFEval Raw,IFEval,BBH Raw,BBH,MATH Lvl 5 Raw,MATH Lvl 5,GPQA Raw,GPQA,MUSR Raw,MUSR,"
    "MMLU-PRO Raw,MMLU-PRO,Upload To Hub Date,Generation,Base Model"
)
LINK = '<a target=""_blank"" href=""https://huggingface.co/{0}"">{0}</a> <a href=""#"">📑</a>'


def read(folder: Path, text: str) -> MergeTable:
    """A table of this text."""
    path = folder / "merges.csv"
    path.write_text(text, encoding="utf-8")
    return read_merges(path)


def analysed(folder: Path, text: str) -> Findings:
    """What a table of this text says."""
    return analyse_merges(read(folder, text))


def refused(folder: Path, text: str) -> str:
    """The error that a table of this text gives, on one line."""
    with pytest.raises(ConfigError) as error:
        read(folder, text)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{folder / 'merges.csv'}: ")


def printed(found: Findings, width: int = 200) -> str:
    """What a terminal shows."""
    console = Console(file=StringIO(), width=width)
    print_findings(found, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_averages_and_gains_are_computed(tmp_path: Path) -> None:
    """An average is the mean of the tasks, a gain the child's minus the parents' mean."""
    found = analysed(tmp_path, FAMILY)
    assert found.models == 8
    assert found.tasks == ("TruthfulQA", "Winogrande", "GSM8K")
    merges = {merge.name: merge for merge in found.merges}
    assert list(merges) == ["1-1", "1-2", "1-3", "2-1", "2-2"]
    assert merges["2-1"].average == pytest.approx((50.94 + 80.11 + 75.13) / 3)
    # As the paper's data have them, computed from the scores.
    expected = {"1-1": -0.6017, "1-2": -0.0283, "1-3": 1.8333, "2-1": 2.1667, "2-2": -3.9550}
    for name, gain in expected.items():
        assert merges[name].gain == pytest.approx(gain, abs=1e-4)
        assert merges[name].computed


def test_shared_ancestors_and_kinship_by_descent(tmp_path: Path) -> None:
    """2-1 is the merge of openchat with its own child; half of each parent of 2-2 is openchat."""
    merges = {merge.name: merge for merge in analysed(tmp_path, FAMILY).merges}
    assert merges["1-1"].shared_ancestors == ()
    assert merges["2-1"].shared_ancestors == ("openchat",)
    assert merges["2-2"].shared_ancestors == ("openchat",)
    by_descent = {name: merge.similarities["by descent"] for name, merge in merges.items()}
    # (1, 0, 1) / 2 and (0, 0, 1); (1, 0, 1) / 2 and (0, 1, 1) / 2.
    assert by_descent == pytest.approx({"1-1": 0, "1-2": 0, "1-3": 0, "2-1": 0.5**0.5, "2-2": 0.5})


def test_parents_differ_by_task(tmp_path: Path) -> None:
    """MetaMath and Instruct differ by 18.42 a task; without the scores of a parent none is said."""
    found = analysed(tmp_path, FAMILY + "3-1,2-1,stranger,50,80,75,,0.9\n")
    merges = {merge.name: merge for merge in found.merges}
    assert merges["1-1"].task_difference == pytest.approx((23.37 + 1.42 + 30.48) / 3)
    assert merges["3-1"].task_difference is None
    (one,) = [
        one
        for one in found.kinship
        if one.of == "task difference" and one.similarity == "kinship"
        if one.correlation.kind == "pearson"
    ]
    assert one.correlation.n == 5


def test_correlations_name_the_merge_that_carries_them(tmp_path: Path) -> None:
    """Of five merges along no line and one far away, the one far away makes the correlation."""
    rows = ["a,p,q,0.9,0.1", "b,p,q,0.8,0.1", "c,p,q,0.8,0.2", "d,p,q,0.9,0.2", "far,p,q,0.0,3"]
    found = analysed(tmp_path, "\n".join(["child,parent_1,parent_2,pcc,gain", *rows]))
    (one,) = [
        one
        for one in found.kinship
        if (one.similarity, one.of, one.correlation.kind) == ("pcc", "gain", "pearson")
    ]
    assert one.correlation.r < -0.9
    assert one.carried_by == "far"
    assert "pcc: one merge, far, carries" in printed(found)


def test_a_gain_that_does_not_follow_is_told(tmp_path: Path) -> None:
    """Gains are computed where they can be; one given otherwise is named with both numbers."""
    found = analysed(tmp_path, FAMILY.replace("2.16,0.93", "3.16,0.93"))
    assert found.notices == (
        "gains in the table that do not follow from its averages, and are not used: "
        "2-1 (+3.16, by the averages +2.17)",
    )


def test_given_gains_serve_where_parents_have_no_row(tmp_path: Path) -> None:
    """As in the paper's table of sample merges: parents and gain, and nothing else."""
    found = analysed(tmp_path, "model_1,model_2,child,gain\na,b,,-0.85\nc,d,e,+1.91\n")
    assert [merge.name for merge in found.merges] == ["a + b (line 2)", "e"]
    assert [merge.gain for merge in found.merges] == [-0.85, 1.91]
    assert not any(merge.computed for merge in found.merges)


def test_version_1_of_the_leaderboard(tmp_path: Path) -> None:
    """Its heads are known, a model is taken out of its link, likes and sizes are no scores."""
    rows = [
        f'🔶,"{LINK.format("org/A")}",70,60,70,70,70,70,80,7.2,12,bfloat16,',
        f'🔶,"{LINK.format("org/B")}",60,60,60,60,60,60,60,7.2,0,float16,',
        f'🤝,"{LINK.format("me/C")}",72,72,72,72,72,72,72,7.2,3,bfloat16,org/A; org/B',
    ]
    found = analysed(tmp_path, "\n".join([f"{V1},parents", *rows]))
    assert found.tasks == ("ARC", "HellaSwag", "MMLU", "TruthfulQA", "Winogrande", "GSM8K")
    (merge,) = found.merges
    assert (merge.name, merge.parents) == ("me/C", ("org/A", "org/B"))
    assert merge.gain == pytest.approx(72 - (70 + 60) / 2)


def test_version_2_of_the_leaderboard(tmp_path: Path) -> None:
    """Tasks are the scaled ones, names the full ones, and a base of two models is two parents."""

    def row(name: str, score: int, day: int, base: str) -> str:
        tasks = ",".join(f"0.{score},{score}" for _ in range(6))
        link = LINK.format(name)
        return (
            f'{name}_bfloat16,bfloat16,merge,"{link}",{name},{score},5,8.0,1.5,{tasks},'
            f'2024-09-{day:02},1,"{base}"'
        )

    rows = [
        row("me/D", 36, 9, "me/C,org/A"),
        row("me/C", 33, 8, "org/A,org/B"),
        row("org/A", 30, 1, "org/base"),
        row("org/B", 32, 2, "org/base (Merge)"),
    ]
    table = read(tmp_path, "\n".join([V2, *rows]))
    assert table.tasks == ("IFEval", "BBH", "MATH Lvl 5", "GPQA", "MUSR", "MMLU-PRO")
    # In the order of their dates.
    assert [one.name for one in table.rows] == ["org/A", "org/B", "me/C", "me/D"]
    merges = analyse_merges(table).merges
    assert [(one.name, one.gain) for one in merges] == [("me/C", 2.0), ("me/D", 4.5)]


@pytest.mark.parametrize(
    "cell", ["a; b", "a|b", "a + b", "a × b", '"a, b"', "\"['a', 'b']\"", '"[""a"", ""b""]"']
)
def test_parents_in_one_column(tmp_path: Path, cell: str) -> None:
    """Between the parents may stand what people write there."""
    (merge,) = analysed(tmp_path, f"child,parents,gain\nc,{cell},1\n").merges
    assert merge.parents == ("a", "b")


def test_parents_are_found_by_other_spellings(tmp_path: Path) -> None:
    """Another case and a missing organisation do not matter, another organisation does."""
    text = (
        "child,parent_1,parent_2,score\norg/Model-A,,,1\norg/B,,,2\n"
        "c,model-a,ORG/b,3\nd,other/B,B,3\n"
    )
    c, d = analysed(tmp_path, text).merges
    assert c.parents == ("org/Model-A", "org/B")
    assert c.gain == 1.5
    assert d.parents == ("other/B", "org/B")
    assert d.gain is None


def test_a_model_with_one_parent_is_no_merge(tmp_path: Path) -> None:
    """A further tuning belongs to the family, and half of it is its own."""
    text = "child,parent_1,parent_2,score\na,,,1\nb,,,1\ntuned,a,,2\nc,tuned,a,3\n"
    (merge,) = analysed(tmp_path, text).merges
    assert merge.name == "c"
    assert merge.shared_ancestors == ("a",)
    assert merge.similarities["by descent"] == pytest.approx(0.5**0.5)


def test_an_unknown_parent_leaves_the_gain_as_given(tmp_path: Path) -> None:
    """With a parent printed as ... the gain cannot be computed, whatever the other scored."""
    text = "child,parent_1,parent_2,parent_3,score,gain\na,,,,1,\nb,,,,1,\nc,a,b,...,3,0.4\n"
    (merge,) = analysed(tmp_path, text).merges
    assert (merge.gain, merge.computed) == (0.4, False)
    assert "by descent" not in merge.similarities


def test_paths_have_stages_and_stops(tmp_path: Path) -> None:
    """Each path is taken in its own order, wherever its rows are; a shared merge counts once."""
    rows = [
        "2,3,z,c,d,74,0.97", "1,1,x1,a,b,70,0.5", "1,2,x2,x1,b,72,0.6", "1,3,x3,x2,b,74,0.7",
        "1,5,z,x3,b,74,0.97", "1,4,x4,x3,a,74,0.95", "2,1,y1,c,d,70,0.5", "2,2,y2,y1,c,72,0.5",
    ]  # fmt: skip
    found = analysed(tmp_path, "\n".join(["path,step,child,parent_1,parent_2,average,pcc", *rows]))
    assert found.models == 7
    paths = {path.name: path for path in found.paths}
    assert paths["1"].merges == ("x1", "x2", "x3", "x4", "z")
    assert paths["1"].stages.saturation == 2
    assert paths["2"].merges == ("y1", "y2", "z")
    assert paths["2"].stages.saturation is None
    stop = {(one.threshold, one.patience): one for one in paths["1"].stops["pcc"]}
    assert stop[0.9, 1].stops_after == 3
    assert stop[0.9, 1].lost == 0
    assert stop[0.9, 3].stops_after is None


def test_a_model_that_comes_twice_is_taken_once(tmp_path: Path) -> None:
    """As the leaderboard has models in two precisions: the first counts, and that is said."""
    table = read(tmp_path, "child,parents,score\na,,1\nb,,2\nc,a;b,3\nc,a;b,4\n")
    assert [row.average for row in table.rows] == [1, 2, 3]
    assert table.notices == (
        "rows left out because their model comes earlier in the table: c (line 5)",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a head and rows, found an empty file"),
        ("child,parents,score\n", "expected rows below the head, found none"),
        ("child,score\na,1\n",
         "expected columns of parents, such as parent_1 and parent_2, or parents; "
         "found child, score"),
        ("child,parents,note\na,b;c,good\n",
         "expected at least one column of scores, an average or a gain; "
         "found child, parents, note"),
        ("child,parents,mmlu\na,,60\nb,,7o.1\n",
         "line 3, column mmlu: expected a number, found '7o.1'"),
        ("child,parents,my task\na,,60\nb,,61\nc,,62\nd,,6l\n",
         "line 5, column my task: expected a number, found '6l'"),
        ("child,parents,score,pcc\na,b;c,1,high\n",
         "line 2, column pcc: expected a number, found 'high'"),
        ("child,parents,score\na,b;c,inf\n",
         "line 2, column score: expected a number, found 'inf'"),
        ("child,parents,score\na,,1\n,a,2\n",
         "line 3: expected the name of a model in the column child, found nothing"),
        ("child,parents,score\na,,1,2\n", "line 2: expected 3 cells as in the head, found 4"),
        ("child,score,score,parents\na,1,1,\n",
         "expected each column once, found 'score' again"),
        ("child,parents,score\na,b;c,1\nb,,1\nc,a;b,2\n",
         "line 2: expected a family, found a to be its own ancestor: a -> c -> a"),
        ("child,parents,score\na,b;c,1\na,b;d,1\n",
         "line 3: expected a once, found it on line 2 too, with other parents"),
    ],
)  # fmt: skip
def test_errors_name_the_place(tmp_path: Path, text: str, message: str) -> None:
    """One line says which row and column, what was expected and what was found."""
    assert refused(tmp_path, text) == message


def test_a_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    """What is not UTF-8 is said so, and not shown as rubbish."""
    path = tmp_path / "merges.csv"
    path.write_bytes("child,parents,score\né,a;b,1\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="expected a CSV file in UTF-8"):
        read_merges(path)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters(tmp_path: Path, delimiter: str) -> None:
    """Spreadsheets write semicolons or tabs, a mark at the beginning, and empty lines."""
    text = "\ufeff" + FAMILY.replace(",", delimiter).replace("\n", "\r\n") + "\r\n"
    assert len(analysed(tmp_path, text).merges) == 5


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_unicode_text_of_spreadsheets(tmp_path: Path, encoding: str) -> None:
    """Excel's "Unicode text" is UTF-16 with a mark at the beginning, and tabs."""
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path = tmp_path / "merges.csv"
    path.write_bytes((mark + FAMILY.replace(",", "\t").replace("\n", "\r\n")).encode(encoding))
    assert len(analyse_merges(read_merges(path)).merges) == 5
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConfigError, match="expected a CSV file in UTF-8"):
        read_merges(path)


def test_an_average_over_fewer_tasks_is_none(tmp_path: Path) -> None:
    """Where a task is missing the average is the given one, or unknown, and never of the rest."""
    text = "child,parents,Average ⬆️,ARC,MMLU\na,,50,40,60\nb,,55,40,\nc,a;b,,90,\nd,a;b,1,50,70\n"
    table = read(tmp_path, text)
    assert [row.average for row in table.rows] == [50, 55, None, 60]
    c, d = analyse_merges(table).merges
    assert c.gain is None
    assert d.gain == pytest.approx(60 - 52.5)


def test_placeholders_are_nothing(tmp_path: Path) -> None:
    """A dash, n/a and None are missing scores; a plus, a typographic minus, a percent are read."""
    text = "child,parents,mmlu,gain\na,,-,\nb,n/a,None,\nc,a;b,+60.5%,\N{MINUS SIGN}0.5\n"
    table = read(tmp_path, text)
    assert [row.average for row in table.rows] == [None, None, 60.5]
    assert table.rows[2].gain == -0.5


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """What looks like markup in a name or a head is text."""
    text = "child,parents,pcc [bold]x,gain\n[red]c[/red],a[/];b,0.5,1\n[b]d,a;b,0.6,2\ne,a;b,1,4\n"
    shown = printed(analysed(tmp_path, text))
    for name in ("[red]c[/red]", "a[/] × b", "[b]d", "pcc [bold]x"):
        assert name in shown


def test_many_merges_are_shown_by_their_ends(tmp_path: Path) -> None:
    """Of a hundred merges the ten largest and the ten smallest gains are printed."""
    rows = "\n".join(f"m{n:03},a;b,{n / 10}" for n in range(100))
    shown = printed(analysed(tmp_path, f"child,parents,gain\n{rows}\n"))
    assert [f"m{n:03}" in shown for n in (0, 9, 10, 50, 89, 90, 99)] == [
        True, True, False, False, False, True, True,
    ]  # fmt: skip


def test_the_command_prints_and_writes_json(tmp_path: Path) -> None:
    """`modelkin analyse` shows tables; with --json the same is written as numbers."""
    path = tmp_path / "merges.csv"
    path.write_text(FAMILY, encoding="utf-8")
    result = CliRunner().invoke(app, ["analyse", str(path)])
    assert result.exit_code == 0, result.output
    for said in ("8 models, 5 of them merges", "kinship of the parents", "by descent"):
        assert said in result.output
    result = CliRunner().invoke(app, ["analyse", str(path), "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    assert result.output == ""
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written["models"] == 8
    assert [merge["name"] for merge in written["merges"]] == ["1-1", "1-2", "1-3", "2-1", "2-2"]
    assert written["kinship"][0]["correlation"]["n"] == 5


def test_the_command_tells_a_mistake_in_one_line(tmp_path: Path) -> None:
    """A wrong table, or none, is one line and exit status 2."""
    path = tmp_path / "merges.csv"
    for text in ("child,score\na,1\n", None):
        if text is None:
            path.unlink()
        else:
            path.write_text(text, encoding="utf-8")
        result = CliRunner().invoke(app, ["analyse", str(path)])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert str(path) in result.stderr
        assert result.stderr.count("\n") == 1
