"""Evolution paths over again: stages and early stopping, beside what the paper says of them.

Knows the numbers, and not how they are shown.
"""

from dataclasses import dataclass

from modelkin.analyse import EarlyStop, Stages, early_stopping, stages
from modelkin.replay.lineage import RUNS
from modelkin.replay.records import Claim, Paper

THRESHOLDS = (0.8, 0.85, 0.9, 0.95, 0.97)
PATIENCES = (1, 2, 3)


@dataclass(frozen=True)
class Path:
    """Merges in the order in which they were made.

    Attributes:
        name: "path 1", "path 2", or a run of the main experiment.
        models: what each merge made.
        scores: their averages.
        kinship: Pearson correlation of each merge's parents, where it is printed.
        stages: by our rule.
        stops: early stopping by every threshold and patience.
        saturated: how many merges the paper counts as saturated, where it does.
    """

    name: str
    models: tuple[str, ...]
    scores: tuple[float, ...]
    kinship: tuple[float | None, ...]
    stages: Stages
    stops: tuple[EarlyStop, ...]
    saturated: Claim | None

    @property
    def found_saturated(self) -> int:
        """How many merges are saturated by our rule."""
        first = self.stages.saturation
        return 0 if first is None else len(self.scores) - first


def paths(paper: Paper) -> list[Path]:
    """The two evolution paths and the two runs, each run's merges by generation."""
    found = [
        _path(
            paper,
            f"path {number}",
            [
                (step.model, float(step.score), float(step.kinship["pcc"]))
                for step in paper.path(number)
            ],
            f"saturated_{number}",
        )
        for number in sorted({step.path for step in paper.steps})
    ]
    for run in RUNS:
        merges = [
            (
                model.name,
                float(sum(model.scores.values())) / len(model.scores),
                None if model.kinship is None else float(model.kinship),
            )
            for model in paper.models.values()
            if model.column in ("both", run)
        ]
        found.append(_path(paper, f"{run} run", merges, ""))
    return found


def _path(
    paper: Paper, name: str, merges: list[tuple[str, float, float | None]], claim: str
) -> Path:
    models, scores, kinship = (tuple(column) for column in zip(*merges, strict=True))
    return Path(
        name=name,
        models=models,
        scores=scores,
        kinship=kinship,
        stages=stages(scores),
        stops=tuple(early_stopping(kinship, scores, THRESHOLDS, PATIENCES)),
        saturated=paper.claims.get(claim),
    )
