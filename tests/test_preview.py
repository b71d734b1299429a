"""Predicted children against children that were really made, and what is said of them."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import Array, delta_matrix, llama_like, perturbed, write_checkpoint
from click.testing import CliRunner, Result
from rich.console import Console

import modelkin as mk
from modelkin.blend import Blend, child_statistics, coefficients, compile_recipe
from modelkin.checkpoint import as_float64, open_checkpoint
from modelkin.cli import app
from modelkin.errors import CheckpointError, ConfigError
from modelkin.gram import GramStats
from modelkin.merging import Native, fill
from modelkin.outlook import print_preview
from modelkin.previewing import RECIPES, ChildRow, Crossing, Preview, preview
from modelkin.records import METRICS, Metric
from modelkin.similarity import kinship_from

MODELS = ("a", "b", "c")
PAIRS = [("a", "b"), ("a", "c"), ("b", "c")]
# A gradient over layers, a filter, and the base as one of the inputs.
GRADED: Mapping[str, Any] = {
    "merge_method": "task_arithmetic",
    "base_model": "{base}",
    "models": [
        {
            "model": "{parent_1}",
            "parameters": {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.7}]},
        },
        {"model": "{parent_2}", "parameters": {"weight": 0.4}},
    ],
    "parameters": {"lambda": 0.8},
    "dtype": "float32",
}
ALL_RECIPES: Mapping[str, Mapping[str, Any]] = {**RECIPES, "graded": GRADED}


def weights(folder: Path) -> dict[str, Array]:
    """A model's weights in float64, by tensor."""
    tensors = open_checkpoint(folder).tensors
    return {
        name: as_float64(tensor.read(0, tensor.count), tensor.format)
        for name, tensor in tensors.items()
    }


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a base and three fine-tunes of it in float32."""
    rng = np.random.default_rng(0)
    base = llama_like(rng, layers=3)
    common = perturbed(base, rng, scale=0.005)
    write_checkpoint(tmp_path / "base", base)
    for name, spread in zip(MODELS, (0.01, 0.02, 0.007), strict=True):
        write_checkpoint(tmp_path / name, perturbed(common, rng, scale=spread))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELKIN_CACHE", str(tmp_path / "cache"))
    return tmp_path


def really_made(recipe: Mapping[str, Any], one: str, other: str) -> Path:
    """The child in float32, in a folder named after its parents."""
    folder = Path(f"{one}{other}").resolve()
    here = {"parent_1": one, "parent_2": other, "base": "base"}
    config = fill(recipe, {name: str(Path(model).resolve()) for name, model in here.items()})
    Native(threads=1).merge({**config, "dtype": "float32"}, folder)
    return folder


def random_stats(models: int, *, tensors: int = 4, seed: int = 0) -> GramStats:
    """Statistics of random weights of some layers."""
    rng = np.random.default_rng(seed)
    base_TB = rng.standard_normal((tensors, 50))
    delta_TNB = 0.1 * (
        rng.standard_normal((tensors, models, 50)) + rng.standard_normal((tensors, 1, 50))
    )
    return GramStats(
        models=tuple(f"m{n}" for n in range(models)),
        tensors=tuple(f"model.layers.{t}.mlp.up_proj.weight" for t in range(tensors)),
        count_T=np.full(tensors, 50),
        base_T=(base_TB**2).sum(axis=1),
        base_sum_T=base_TB.sum(axis=1),
        sum_TN=delta_TNB.sum(axis=2),
        cross_TN=(base_TB[:, None] * delta_TNB).sum(axis=2),
        gram_TNN=delta_TNB @ delta_TNB.swapaxes(1, 2),
        distance_TNN=((delta_TNB[:, :, None] - delta_TNB[:, None]) ** 2).sum(axis=3),
    )


def call(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


# What is predicted


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("named", ALL_RECIPES)
def test_children_are_measured_as_predicted(named: str) -> None:
    """By every recipe, each child that is made in float32 is as kin to all as was said, to 1e-6."""
    recipe = ALL_RECIPES[named]
    found = preview("base", MODELS, recipe=recipe)
    assert [child.parents for child in found.children] == PAIRS
    for child in found.children:
        made = really_made(recipe, *child.parents)
        measured = mk.kinship("base", [*MODELS, made], cache=False, threads=1)
        for name in MODELS:
            expected = measured.similarity(made.name, name)
            assert child.kinship[name] == pytest.approx(expected, rel=0, abs=1e-6)


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("named", ALL_RECIPES)
def test_change_is_the_length_of_the_delta(named: str) -> None:
    """`change` is the Euclidean norm of the child's weights minus the base's."""
    recipe = ALL_RECIPES[named]
    first = preview("base", MODELS[:2], recipe=recipe).children[0]
    base = weights(Path("base"))
    (delta_B,) = delta_matrix(base, [weights(really_made(recipe, "a", "b"))], list(base))
    assert first.change == pytest.approx(np.linalg.norm(delta_B), rel=1e-6)


@pytest.mark.usefixtures("family")
def test_parents_are_as_kin_as_kinship_says() -> None:
    """What is said of the parents is what `kinship` measures."""
    found = preview("base", MODELS)
    measured = mk.kinship("base", MODELS)
    assert found.parents.as_dict() == measured.as_dict()
    for child in found.children:
        expected = measured.similarity(*child.parents)
        assert child.of_parents == pytest.approx(expected, rel=1e-12)


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("method", set(RECIPES) - {"paper"})
def test_equal_parts_know_no_order(method: str) -> None:
    """All methods take equal parts of both: A x B is the child that B x A is."""
    one = preview("base", ["a", "b", "c"], method=method).children
    other = preview("base", ["c", "b", "a"], method=method).children
    for child in one:
        (same,) = (found for found in other if set(found.parents) == set(child.parents))
        assert same.parents == child.parents[::-1]
        assert same.change == pytest.approx(child.change, rel=1e-9)
        for name in MODELS:
            assert same.kinship[name] == pytest.approx(child.kinship[name], rel=1e-7, abs=1e-9)


@pytest.mark.usefixtures("family")
def test_the_first_named_is_the_first_parent() -> None:
    """With t = 0 the child is the one that was named first."""
    recipe = {**RECIPES["slerp"], "parameters": {"t": 0}}
    for models in (["a", "b"], ["b", "a"]):
        (child,) = preview("base", models, recipe=recipe).children
        assert child.parents == tuple(models)
        assert child.kinship[models[0]].pcc == pytest.approx(1)
        assert child.kinship[models[0]].ed == pytest.approx(0, abs=1e-6)
        assert child.kinship[models[1]] == pytest.approx(child.of_parents, rel=1e-6)


@pytest.mark.parametrize("models", [2, 3, 17, 40])
def test_a_childs_kinship_is_that_of_all_models_with_it(models: int) -> None:
    """The child's own row is the one that it has in the whole matrix, with it as one model more."""
    stats = random_stats(models)
    child = Crossing(RECIPES["paper"], stats).child("m1", "m0")
    recipe = fill(RECIPES["paper"], {"parent_1": "m1", "parent_2": "m0"})
    plan = compile_recipe(recipe, tensors=stats.tensors)
    assert isinstance(plan, Blend)
    c = coefficients(plan, stats, {"m0": "m0", "m1": "m1"})
    all_of_it = kinship_from(
        child_statistics(stats, c).joined(stats, "child"), base="base", total_parameters=200
    )
    assert list(child.kinship) == list(stats.models)
    for name in stats.models:
        assert child.kinship[name] == pytest.approx(all_of_it.similarity("child", name), abs=1e-12)


@pytest.mark.usefixtures("family")
def test_a_model_may_be_called_as_the_base() -> None:
    """Names are names: a fine-tune in another folder of the base's name is told from it."""
    Path("other").mkdir()
    Path("a").rename("other/base")
    named = preview("base", ["other/base", "b"], recipe=GRADED).children[0]
    assert named.parents == ("base", "b")
    Path("other/base").rename("a")
    assert preview("base", ["a", "b"], recipe=GRADED).children[0].change == named.change


def test_a_model_equal_to_the_base_is_undefined(family: Path) -> None:
    """No kinship is defined with a model that did not change; its children have theirs."""
    found = preview("base", ["a", "base"], method="linear")
    (child,) = found.children
    assert (child.of_parents.pcc, child.of_parents.cs) == (None, None)
    assert child.kinship["base"].pcc is None
    assert child.kinship["a"].cs == pytest.approx(1)
    assert child.others("pcc") == []
    assert found.ranked()[-1] is child
    assert "base equals the base: its kinship is undefined" in _shown(found)
    assert family.exists()


# In which order


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("metric", METRICS)
def test_children_of_the_least_kin_come_first(metric: Metric) -> None:
    """Similarities ascend and distances descend; rows and JSON have the same order."""
    found = preview("base", [*MODELS, "base"], method="linear")
    ranked = found.ranked(metric)
    values = [getattr(child.of_parents, metric) for child in ranked]
    known = [value for value in values if value is not None]
    assert known == sorted(known, reverse=metric == "ed")
    assert values[len(known) :] == [None] * (6 - len(known))
    assert len(known) == (6 if metric == "ed" else 3)
    order = [list(child.parents) for child in ranked]
    assert [one["parents"] for one in found.as_dict(metric)["children"]] == order
    first_rows = list(found.rows(metric))[:: len(found.parents.models)]
    assert [[row.parent_1, row.parent_2] for row in first_rows] == order


def test_others_are_those_that_are_no_parents() -> None:
    """The other models stand from the nearest to the furthest, by any metric."""
    child = Crossing(RECIPES["linear"], random_stats(6)).child("m1", "m4")
    for metric in METRICS:
        others = child.others(metric)
        assert sorted(name for name, _ in others) == ["m0", "m2", "m3", "m5"]
        values = [value for _, value in others]
        assert values == sorted(values, reverse=metric != "ed")


# What is wrong


@pytest.mark.usefixtures("family")
@pytest.mark.parametrize("method", ["ties", "dare_ties", "sce", "breadcrumbs", "nonsense"])
def test_a_method_that_is_no_weighted_sum_is_refused(method: str) -> None:
    """The reason is the one that `merge` gives, and no weight is read for it."""
    with pytest.raises(ConfigError, match=f"^method: .* predicted: merge_method {method} is none"):
        preview("nowhere", MODELS, method=method)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"merge_method": "ties"}, "recipe: the children cannot be predicted: merge_method ties"),
        ({"tokenizer_source": "union"}, "predicted: tokenizer_source: may move rows"),
        (
            {"merge_method": "linear", "base_model": "some/model"},
            "expected no models but .* found some/model",
        ),
        ({"models": [{"model": "{parent_1}"}]}, "expected the placeholder {parent_2}"),
        ({"base_model": "{father}"}, "found {father}"),
        ({"merge_method": None}, "merge_method: expected a name, found none"),
        ({"parameters": {"t": "x"}}, "parameters.t: expected a number, found x"),
    ],
    ids=str,
)
def test_a_recipe_that_is_none_is_an_error(
    changed: dict[str, Any], message: str, family: Path
) -> None:
    """One line says what of the recipe was expected and what was found."""
    with pytest.raises(ConfigError, match=message) as raised:
        preview(family / "base", MODELS, recipe={**RECIPES["slerp"], **changed})
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("family")
def test_models_that_are_none_are_errors() -> None:
    """What `kinship` refuses is refused here."""
    with pytest.raises(ConfigError, match="2 models"):
        preview("base", ["a"])
    with pytest.raises(CheckpointError, match="nowhere"):
        preview("base", ["a", "nowhere"])


@pytest.mark.usefixtures("family")
def test_a_pair_that_has_no_child_is_said() -> None:
    """A method without answer for two models' weights has one for the others."""
    recipe = {**RECIPES["multislerp"], "parameters": {"weight": 0.5, "eps": 0}}
    found = preview("base", ["a", "b", "base"], recipe=recipe)
    assert [child.parents for child in found.children] == [("a", "b")]
    assert set(found.impossible) == {("a", "base"), ("b", "base")}
    assert "expected eps above 0 for a tensor of zeros" in found.impossible["a", "base"]
    assert "a × base: no child: multislerp: " in _shown(found)
    assert [one["parents"] for one in found.as_dict()["impossible"]] == [
        ["a", "base"],
        ["b", "base"],
    ]


# The command line


def _shown(found: Preview, width: int = 100, metric: Metric = "pcc") -> str:
    file = io.StringIO()
    print_preview(found, Console(file=file, width=width, markup=False), metric=metric)
    return file.getvalue()


@pytest.mark.usefixtures("family")
def test_the_table_shows_each_child() -> None:
    """A line a child: its parents, their kinship, its own with each and with others, its change."""
    shown = call("preview", *MODELS, "--base", "base", "--method", "paper")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.startswith("compared 2,040 of 2,040 parameters (100.0%) with the base base")
    assert "none of them made: their kinship is predicted" in shown.stdout
    for child in preview("base", MODELS, method="paper").children:
        (line,) = (one for one in shown.stdout.splitlines() if " × ".join(child.parents) in one)
        for value in (child.of_parents.pcc, *(child.kinship[name].pcc for name in MODELS)):
            assert f"{value:.3f}" in line
        assert line.rstrip().endswith(f"{child.change:.3g}")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_fits(width: int) -> None:
    """On any terminal no line of the table is wider than that, and every name is whole."""
    stats = random_stats(12)
    crossing = Crossing(RECIPES["slerp"], stats)
    kin = kinship_from(stats, base="base", total_parameters=200)
    pairs = [(one, other) for one in stats.models for other in stats.models if one < other]
    found = Preview(RECIPES["slerp"], kin, tuple(crossing.child(*pair) for pair in pairs))
    table = _shown(found, width).split("pcc, the least", 1)[1].split("\nand ", 1)
    assert all(len(line) <= width for line in table[0].splitlines())
    assert table[1].startswith("36 more: --csv writes all of them")


@pytest.mark.usefixtures("family")
def test_json_is_one_object() -> None:
    """`--json` writes what `as_dict` gives, without NaN, sorted by the metric asked for."""
    words = ["preview", "a", "b", "base", "--base", "base", "--method", "linear", "--json", "-"]
    said = call(*words, "--metric", "ed")
    assert said.stdout.count("\n") == 1
    assert "NaN" not in said.stdout
    assert json.loads(said.stdout) == preview("base", ["a", "b", "base"], method="linear").as_dict(
        "ed"
    )


@pytest.mark.usefixtures("family")
def test_csv_has_a_line_for_each_child_and_model() -> None:
    """`--csv` writes every child's kinship with every model, exactly."""
    assert call("preview", *MODELS, "--base", "base", "--csv", "out.csv").stdout == ""
    head, *rows = csv.reader(Path("out.csv").read_text(encoding="utf-8").splitlines())
    assert head == list(ChildRow._fields)
    expected = list(preview("base", MODELS).rows())
    assert len(rows) == len(expected) == 9
    for row, want in zip(rows, expected, strict=True):
        assert [row[0], row[1], row[6]] == [want.parent_1, want.parent_2, want.model]
        numbers = [float(cell) for cell in (*row[2:6], *row[7:])]
        assert numbers == [*want[2:6], *want[7:]]


@pytest.mark.usefixtures("family")
def test_a_recipe_from_a_file() -> None:
    """`--recipe` reads YAML with placeholders; it stands for no method beside it."""
    text = (
        "merge_method: slerp\nbase_model: '{parent_1}'\nparameters: {t: 0.5}\n"
        "models: [{model: '{parent_1}'}, {model: '{parent_2}'}]\n"
    )
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    words = ["preview", *MODELS, "--base", "base"]
    by_file = json.loads(call(*words, "--recipe", "recipe.yaml", "--json", "-").stdout)
    by_name = json.loads(call(*words, "--json", "-").stdout)
    assert by_file["children"] == by_name["children"]
    both = call(*words, "--recipe", "recipe.yaml", "--method", "slerp")
    assert both.exit_code == 2
    assert both.stderr == (
        "error: --method, --recipe: expected one of them, found slerp and recipe.yaml\n"
    )
    Path("recipe.yaml").write_text("- slerp\n", encoding="utf-8")
    wrong = call(*words, "--recipe", "recipe.yaml")
    assert wrong.stderr == "error: recipe.yaml: expected keys and values, found list\n"


@pytest.mark.usefixtures("family")
def test_errors_are_one_line() -> None:
    """A method that is no weighted sum ends with status 2 and its reason."""
    done = call("preview", *MODELS, "--base", "base", "--method", "ties")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(
        "error: method: the children cannot be predicted: merge_method ties is none of linear, "
    )
    assert done.stderr.count("\n") == 1


def test_every_method_is_in_the_help() -> None:
    """What `--method` may be is in its help text, which imports none of it."""
    text = " ".join(call("preview", "--help").stdout.split())
    assert all(name in text for name in RECIPES)


def test_previewing_is_light(family: Path) -> None:
    """A whole preview loads no package that merges, evaluates or draws."""
    heavy = ("torch", "transformers", "mergekit", "lm_eval", "scipy", "plotly")
    code = f"""
import sys
from modelkin.cli import app
try:
    app(["preview", "a", "b", "--base", "base"])
except SystemExit as done:
    print(done.code, [name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=family, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("0 []\n")
