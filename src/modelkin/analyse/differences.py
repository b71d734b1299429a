"""How differently two models do their tasks. Knows scores only."""

from collections.abc import Mapping


def task_difference(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Average task performance difference: the mean over tasks of |score - score| (paper App. E).

    Unlike the difference of the averages it is large for two models of equal average that are good
    at different things. In the units of the scores.

    Raises:
        ValueError: there are no tasks, or the two have other ones.

    >>> task_difference({"arc": 60.0, "mmlu": 50.0}, {"arc": 50.0, "mmlu": 60.0})
    10.0
    """
    if not one or set(one) != set(other):
        raise ValueError(
            "task difference: expected scores of two models on the same tasks, found "
            f"{sorted(one)} and {sorted(other)}"
        )
    return sum(abs(score - other[task]) for task, score in one.items()) / len(one)
