"""In words: how far predicted kinship was from measured, and whether that changed a choice."""

from statistics import mean

from modelkin.evolution import Rules, divergences
from modelkin.records import Metric
from modelkin.state import RunState


def prediction_lines(state: RunState) -> list[str]:
    """What there is to say of a run's predictions, a sentence each; none where it made none."""
    if not state.predictions or state.started is None:
        return []
    settings = state.started.settings
    metric: Metric = settings["metric"]
    apart = {
        pair: abs(one - other)
        for pair, predicted in state.predictions.items()
        if pair in state.kinship
        and (one := getattr(predicted, metric)) is not None
        and (other := getattr(state.kinship[pair], metric)) is not None
    }
    if not apart:
        return ["Kinship is as predicted from the recipes: no child was measured."]
    furthest = max(apart, key=lambda pair: apart[pair])
    names = " × ".join(sorted(state.members[member].name for member in furthest))
    lines = [
        f"Kinship is as predicted from the recipes; measured, {len(apart):,} of "
        f"{len(state.predictions):,} pairs differ by {mean(apart.values()):.2g} in the mean "
        f"({metric}), and by {apart[furthest]:.2g} at most ({names})."
    ]
    deciding = ("strategy", "k", "metric", "seed", "explore")
    found = divergences(state, Rules(**{name: settings[name] for name in deciding}))
    if not found and state.generation > 1:
        lines.append("With measured kinship every generation would have been chosen the same.")
    for one in found:
        predicted, measured = (
            ", ".join(_pair(state, pair) for pair in pairs if pair not in others) or "a stop"
            for pairs, others in (
                (one.predicted, one.measured),
                (one.measured, one.predicted),
            )
        )
        lines.append(
            f"Generation {one.generation}: with measured kinship {measured} would have been "
            f"chosen instead of {predicted}."
        )
    return lines


def _pair(state: RunState, pair: tuple[str, str]) -> str:
    return " × ".join(state.members[member].name for member in pair)
