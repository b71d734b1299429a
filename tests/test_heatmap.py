"""Heatmaps: what is drawn is what was found, kin beside kin, and names are text."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("plotly")
pytest.importorskip("matplotlib")

from modelkin import heatmap
from modelkin.errors import ConfigError, MissingExtraError
from modelkin.gram import GramStats
from modelkin.heatmap import check_plot, cluster, page_figure, picture_figure, write_heatmap
from modelkin.records import METRICS, Metric
from modelkin.similarity import Kinship, kinship_from

Array = np.ndarray
EVIL = "<img src=x onerror=alert(1)>"
LAYERS = tuple(f"model.layers.{n}.mlp.up_proj.weight" for n in range(3))


def _kinship(deltas_TNB: Array, names: tuple[str, ...] | None = None) -> Kinship:
    """A kinship by its definition, of a few tensors."""
    tensors, models, size = deltas_TNB.shape
    difference = deltas_TNB[:, :, None] - deltas_TNB[:, None]
    stats = GramStats(
        models=names or tuple(f"m{n}" for n in range(models)),
        tensors=LAYERS[:tensors],
        count_T=np.full(tensors, size),
        base_T=np.ones(tensors),
        base_sum_T=np.ones(tensors),
        sum_TN=deltas_TNB.sum(axis=2),
        cross_TN=deltas_TNB.sum(axis=2),
        gram_TNN=deltas_TNB @ deltas_TNB.swapaxes(1, 2),
        distance_TNN=(difference**2).sum(axis=3),
    )
    return kinship_from(stats, base="base", total_parameters=tensors * size)


def _families(models: int, families: int = 2, undefined: tuple[int, ...] = ()) -> Kinship:
    """Models that belong to families in turn: 0, 1, 0, 1, ..."""
    rng = np.random.default_rng(models)
    centres = rng.standard_normal((3, families, 50))
    deltas = np.stack([centres[:, n % families] for n in range(models)], axis=1)
    deltas = deltas + 0.5 * rng.standard_normal(deltas.shape)
    deltas[:, list(undefined)] = 0.0
    return _kinship(deltas)


def _map(found: Kinship, metric: Metric = "pcc", **how: Any) -> Any:
    return page_figure(found, metric, **how).data[1]


# The order


@pytest.mark.parametrize("metric", METRICS)
def test_families_are_put_together(metric: Metric) -> None:
    """Models of two mixed families are drawn family by family."""
    found = _families(9)
    order = cluster(found.matrix(metric), metric).order_N
    family = [int(n) % 2 for n in order]
    assert sorted(order) == list(range(9))
    assert sum(one != other for one, other in pairwise(family)) == 1


def test_heights_are_average_distances() -> None:
    """The last link joins the two families at the mean distance of their pairs."""
    found = _families(6)
    tree = cluster(found.pcc_NN, "pcc")
    assert len(tree.links) == 5
    top = max(height for link in tree.links for _, height in link)
    between = found.pcc_NN[::2, 1::2]
    assert top == pytest.approx(1 - between.mean())
    ends = {along for link in tree.links for along, height in link if height == 0}
    assert ends == set(range(6))


@pytest.mark.parametrize("undefined", [(2,), (0, 4), (0, 1, 2, 3), (0, 1, 2, 3, 4)])
def test_undefined_models_come_last(undefined: tuple[int, ...]) -> None:
    """Models without a kinship are behind the others, in no link, and grey."""
    found = _families(5, undefined=undefined)
    tree = cluster(found.pcc_NN, "pcc")
    known = 5 - len(undefined)
    assert set(tree.order_N[known:]) == set(undefined)
    assert len(tree.links) == max(known - 1, 0)
    drawn = _map(found)
    assert list(drawn.z[-1]) == [None] * 5
    assert drawn.text[-1][0] == "undefined"


# The values


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("models", [2, 3, 12])
def test_the_page_shows_the_matrix(metric: Metric, models: int) -> None:
    """Each cell of the page's map has the value of the two models that hovering names."""
    found = _families(models)
    drawn = _map(found, metric)
    for row, (values, pairs) in enumerate(zip(drawn.z, drawn.customdata, strict=True)):
        for column, (value, (one, other)) in enumerate(zip(values, pairs, strict=True)):
            i, j = found.models.index(one), found.models.index(other)
            assert value == found.matrix(metric)[i, j]
            assert drawn.text[row][column].startswith(f"{value:.4g}"[:4])
    limits = (drawn.zmin, drawn.zmax)
    assert limits == ((0.0, found.ed_NN.max()) if metric == "ed" else (-1.0, 1.0))


@pytest.mark.parametrize("metric", METRICS)
def test_the_picture_shows_the_matrix(metric: Metric) -> None:
    """The picture's map is the matrix in the clustered order."""
    found = _families(7)
    order = cluster(found.matrix(metric), metric).order_N
    _, heat, _ = picture_figure(found, metric).axes
    (image,) = heat.images
    np.testing.assert_array_equal(image.get_array(), found.matrix(metric)[np.ix_(order, order)])
    names = [label.get_text() for label in heat.get_yticklabels()]
    assert names == [found.models[n] for n in order]


def test_the_page_can_show_each_group() -> None:
    """With a level a menu swaps the values for those of a group, in the same order."""
    found = _families(4)
    figure = page_figure(found, "cs", "layer")
    order = cluster(found.cs_NN, "cs").order_N
    (menu,) = figure.layout.updatemenus
    assert [button.label for button in menu.buttons] == ["whole model", "0", "1", "2"]
    for button, one in zip(menu.buttons[1:], found.per("layer").values(), strict=True):
        change, traces = button.args
        assert list(traces) == [1]
        np.testing.assert_array_equal(change["z"][0], one.cs_NN[np.ix_(order, order)])
    assert not page_figure(found, "cs").layout.updatemenus


# Files


def test_a_page_is_self_contained(tmp_path: Path) -> None:
    """The page holds plotly itself and loads nothing from elsewhere."""
    file = tmp_path / "kin.html"
    write_heatmap(_families(3), file)
    page = file.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert len(page) > 1_000_000
    assert "<script src=" not in page
    assert "<link" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["kin.html"]


@pytest.mark.parametrize("models", [2, 12, 200])
def test_a_picture_is_a_picture(models: int, tmp_path: Path) -> None:
    """A PNG file of some size, for few models and for many."""
    file = tmp_path / "kin.PNG"
    write_heatmap(_families(models, undefined=(1,)), file, "ed")
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) > 5_000


def test_many_names_are_left_to_hovering() -> None:
    """Where names would be too small to read they are not drawn; hovering still tells them."""
    few, many = page_figure(_families(20), "pcc"), page_figure(_families(200), "pcc")
    assert few.layout.xaxis2.showticklabels
    assert not many.layout.xaxis2.showticklabels
    assert {one for one, _ in many.data[1].customdata[0]} != set()
    assert {other for _, other in many.data[1].customdata[0]} == {f"m{n}" for n in range(200)}


@pytest.mark.parametrize("name", [EVIL, "</script><script>alert(1)", "<b>a</b>", "a&lt;b", "$a$"])
def test_names_are_text(name: str, tmp_path: Path) -> None:
    """A name is never markup: not in the page, not in what plotly makes of it."""
    rng = np.random.default_rng(0)
    found = _kinship(rng.standard_normal((1, 2, 9)), (name, "other"))
    file = tmp_path / "kin.html"
    write_heatmap(found, file)
    page = file.read_text(encoding="utf-8")
    if "<" in name:
        assert name not in page
    figure = page_figure(found, "pcc")
    shown = [*figure.layout.xaxis2.ticktext, *figure.layout.yaxis2.ticktext]
    shown += [text for row in figure.data[1].customdata for pair in row for text in pair]
    # plotly takes what stands between < and > for markup, and reads entities as characters.
    assert all("<" not in text for text in shown)
    plain = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert plain in shown
    write_heatmap(found, tmp_path / "kin.png")


def test_long_names_are_cut_beside_the_map_only() -> None:
    """A long name is shortened in the middle beside the map, and whole when hovering."""
    rng = np.random.default_rng(0)
    long = "a" * 60 + "z"
    figure = page_figure(_kinship(rng.standard_normal((1, 2, 9)), (long, "b")), "pcc")
    assert long not in figure.layout.xaxis2.ticktext
    assert max(map(len, figure.layout.xaxis2.ticktext)) == 40
    assert any(long in pair for row in figure.data[1].customdata for pair in row)


@pytest.mark.parametrize("name", ["kin", "kin.svg", "kin.html.gz", "-"])
def test_other_endings_are_refused(name: str) -> None:
    """Only .html and .png can be drawn."""
    with pytest.raises(ConfigError, match=r"\.html or \.png"):
        check_plot(name)


@pytest.mark.parametrize(
    ("file", "missing"),
    [("a.html", "plotly"), ("a.png", "matplotlib"), ("a.html", "scipy"), ("a.png", "scipy")],
)
def test_a_missing_package_is_named(
    file: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what draws it, the error says what to install."""

    def find(name: str) -> Any:
        return None if name == missing else importlib.util.find_spec(name)

    monkeypatch.setattr(heatmap, "find_spec", find)
    with pytest.raises(MissingExtraError, match=rf"{missing}.*modelkin\[plot\]"):
        check_plot(file)


def test_an_older_file_outlives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot that cannot be drawn leaves the older one as it was, and nothing else."""
    file = tmp_path / "kin.png"
    file.write_bytes(b"older")

    def fail(*_: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(heatmap, "_draw", fail)
    with pytest.raises(OSError, match="no"):
        write_heatmap(_families(2), file)
    assert file.read_bytes() == b"older"
    assert [path.name for path in tmp_path.iterdir()] == ["kin.png"]
