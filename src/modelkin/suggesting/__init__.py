"""Which merges are worth making next, each with its reason in words.

    evidence = from_run(run.state, run.statistics())  # or from_tables("kinship.csv", "scores.csv")
    for suggestion in suggest(evidence).suggestions:
        print(suggestion.parents, *suggestion.reasons)

`sources` gathers what is known, `ranking` orders the pairs and says why. Advice for people: what a
run itself does next is for `evolution`. Reads no weights and changes nothing.
"""

from modelkin.suggesting.ranking import (
    NEAR_DUPLICATE,
    Evidence,
    Suggestion,
    Suggestions,
    suggest,
)
from modelkin.suggesting.sources import from_run, from_tables

__all__ = [
    "NEAR_DUPLICATE",
    "Evidence",
    "Suggestion",
    "Suggestions",
    "from_run",
    "from_tables",
    "suggest",
]
