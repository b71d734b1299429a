"""Facts about the change vectors of two branches."""

import numpy as np
import pytest

from modelkin.analyse import bifurcation
from modelkin.gram import GramStats

TENSORS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
)
SIZES = (40, 30, 50, 60)
GROUPS = {"embeddings": [0], "0": [1, 2], "1": [3]}
MODELS = ("before", "ancestor", "explored", "greedy")


def weights(seed: int = 0) -> dict[str, list[np.ndarray]]:
    """Deltas of each model, a vector for each tensor."""
    random = np.random.default_rng(seed)
    return {name: [random.normal(size=size) for size in SIZES] for name in MODELS}


def statistics(deltas: dict[str, list[np.ndarray]]) -> GramStats:
    """What a pass over these weights keeps, for a base of zeros."""
    delta_TN = [[deltas[name][t] for name in MODELS] for t in range(len(TENSORS))]
    zeros = np.zeros(len(TENSORS))
    return GramStats(
        models=MODELS,
        tensors=TENSORS,
        count_T=np.array(SIZES),
        base_T=zeros,
        base_sum_T=zeros,
        sum_TN=np.array([[delta.sum() for delta in row] for row in delta_TN]),
        cross_TN=np.zeros((len(TENSORS), len(MODELS))),
        gram_TNN=np.array([np.stack(row) @ np.stack(row).T for row in delta_TN]),
        distance_TNN=np.array(
            [[[float((x - y) @ (x - y)) for y in row] for x in row] for row in delta_TN]
        ),
    )


def change(deltas: dict[str, list[np.ndarray]], one: str, other: str, group: str) -> np.ndarray:
    """The weights of a group as one vector, of one model minus the other."""
    return np.concatenate([deltas[one][t] - deltas[other][t] for t in GROUPS[group]])


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Written down plainly."""
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_norms_and_cosines_are_those_of_the_weights() -> None:
    """From statistics alone come the numbers that the change vectors themselves give."""
    deltas = weights()
    found = bifurcation(statistics(deltas), "ancestor", "explored", "greedy", "before")
    assert found.groups == tuple(GROUPS)
    assert list(found.parameters_L) == [40, 80, 60]
    assert found.before_norm_L is not None
    assert found.explored_before_cosine_L is not None
    assert found.greedy_before_cosine_L is not None
    for place, group in enumerate(GROUPS):
        explored = change(deltas, "explored", "ancestor", group)
        greedy = change(deltas, "greedy", "ancestor", group)
        before = change(deltas, "ancestor", "before", group)
        assert found.explored_norm_L[place] == pytest.approx(np.linalg.norm(explored))
        assert found.greedy_norm_L[place] == pytest.approx(np.linalg.norm(greedy))
        assert found.before_norm_L[place] == pytest.approx(np.linalg.norm(before))
        assert found.cosine_L[place] == pytest.approx(cosine(explored, greedy))
        assert found.explored_before_cosine_L[place] == pytest.approx(cosine(explored, before))
        assert found.greedy_before_cosine_L[place] == pytest.approx(cosine(greedy, before))


def test_without_a_model_before_nothing_is_said_of_it() -> None:
    """The change that led to the ancestor is known only where its parent is given."""
    found = bifurcation(statistics(weights()), "ancestor", "explored", "greedy")
    assert found.before_norm_L is None
    assert found.explored_before_cosine_L is None
    assert found.greedy_before_cosine_L is None


def test_going_back_has_cosine_minus_one() -> None:
    """A branch that undoes what led to the ancestor runs against it; the other goes on."""
    deltas = weights()
    deltas["explored"] = [
        a - 0.5 * (a - b) for a, b in zip(deltas["ancestor"], deltas["before"], strict=True)
    ]
    deltas["greedy"] = [
        a + 0.1 * (a - b) for a, b in zip(deltas["ancestor"], deltas["before"], strict=True)
    ]
    found = bifurcation(statistics(deltas), "ancestor", "explored", "greedy", "before")
    np.testing.assert_allclose(found.cosine_L, -1)
    assert found.explored_before_cosine_L is not None
    assert found.greedy_before_cosine_L is not None
    np.testing.assert_allclose(found.explored_before_cosine_L, -1)
    np.testing.assert_allclose(found.greedy_before_cosine_L, 1)


def test_a_layer_that_did_not_change_has_no_direction() -> None:
    """The cosine is NaN in the layer that a branch left as it was, and only there."""
    deltas = weights()
    deltas["greedy"][3] = deltas["ancestor"][3]
    found = bifurcation(statistics(deltas), "ancestor", "explored", "greedy")
    assert found.greedy_norm_L[2] == 0
    assert list(np.isnan(found.cosine_L)) == [False, False, True]


def test_tiny_changes_of_large_deltas_keep_their_direction() -> None:
    """Branches within a millionth of their ancestor are compared by their changes."""
    deltas = weights()
    for name in ("explored", "greedy"):
        deltas[name] = [
            a + 1e-6 * own for a, own in zip(deltas["ancestor"], deltas[name], strict=True)
        ]
    found = bifurcation(statistics(deltas), "ancestor", "explored", "greedy")
    for place, group in enumerate(GROUPS):
        expected = cosine(
            change(deltas, "explored", "ancestor", group),
            change(deltas, "greedy", "ancestor", group),
        )
        assert found.cosine_L[place] == pytest.approx(expected, abs=1e-8)


def test_models_have_to_be_in_the_statistics() -> None:
    """The error names what is missing and what there is."""
    with pytest.raises(ValueError, match=r"expected one of before, .* found 'stranger'"):
        bifurcation(statistics(weights()), "ancestor", "stranger", "greedy")
