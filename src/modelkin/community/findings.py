"""What a table of merges says: gains, correlations, stages, early stopping, inbreeding.

Pure; knows rows and neither files nor how findings are shown.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from graphlib import TopologicalSorter
from itertools import combinations
from math import sqrt
from typing import Any, Literal

from modelkin.analyse import (
    Correlation,
    EarlyStop,
    Stages,
    correlate,
    early_stopping,
    stages,
    task_difference,
)
from modelkin.community.columns import is_distance
from modelkin.community.reading import MergeRow, MergeTable

# What the paper suggests, and one on each side of it.
THRESHOLDS = (0.8, 0.9, 0.95)
PATIENCES = (1, 2, 3)
# The name of the kinship that follows from the family tree alone.
DESCENT = "by descent"
# Averages and gains in tables have two decimals.
ROUNDING = 0.02


@dataclass(frozen=True)
class MergeFinding:
    """One merge.

    Attributes:
        name: the child's.
        line: in the table.
        parents: as far as they are known.
        average: of the child's scores.
        gain: `average` minus the mean of the parents' averages (paper eq. 6) where these are in
            the table, else as the table gives it.
        computed: whether it is the former.
        given: the gain that the table gives, if it does.
        similarities: of the parents by the table, and `by descent` where all parents are known:
            the cosine of their shares of the founders. It is the kinship that there would be if
            every merge were a plain mean and founders were unrelated and equally far from the base.
        task_difference: of the parents, the mean over their pairs (paper App. E), where all their
            scores are in the table.
        shared_ancestors: those that all parents have in common, the parents themselves included.
    """

    name: str
    line: int
    parents: tuple[str, ...]
    average: float | None
    gain: float | None
    computed: bool
    given: float | None
    similarities: Mapping[str, float | None]
    task_difference: float | None
    shared_ancestors: tuple[str, ...]


@dataclass(frozen=True)
class KinshipFinding:
    """How one similarity of parents goes with something else of a merge.

    Attributes:
        similarity: its name.
        of: "gain", "size of gain" for its absolute value, or "task difference" of the parents.
        correlation: over the merges that have both.
        carried_by: name of the merge without which little is left, see `Correlation.decisive`.
    """

    similarity: str
    of: str
    correlation: Correlation
    carried_by: str | None


@dataclass(frozen=True)
class PathFinding:
    """One evolution path.

    Attributes:
        name: as in the table, "" where it has but one.
        merges: names, in order; those without an average are left out.
        stages: index into `merges`.
        stops: for each similarity that is not a distance, what early stopping would have done.
    """

    name: str
    merges: tuple[str, ...]
    stages: Stages
    stops: Mapping[str, tuple[EarlyStop, ...]]


@dataclass(frozen=True)
class Findings:
    """All that a table says.

    Attributes:
        models: number of rows, each model counted once.
        tasks: that the averages are the mean of; none where only averages are given.
        merges: each once, in the order of the table.
        kinship: correlations of the parents' similarity with the gain, and more.
        paths: evolution paths.
        notices: what to know of the table.
    """

    models: int
    tasks: tuple[str, ...]
    merges: tuple[MergeFinding, ...]
    kinship: tuple[KinshipFinding, ...]
    paths: tuple[PathFinding, ...]
    notices: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """What `modelkin analyse --json` writes."""
        return asdict(self)


def analyse_merges(table: MergeTable) -> Findings:
    """Everything that the table has the columns for."""
    rows = _distinct(table.rows)
    merges = [
        finding
        for row, finding in zip(rows, _merges(rows, table.rows), strict=True)
        if row.complete or finding.gain is not None
    ]
    differing = [
        merge
        for merge in merges
        if merge.computed
        and merge.given is not None
        and merge.gain is not None
        and abs(merge.given - merge.gain) > ROUNDING
    ]
    notices = list(table.notices)
    if differing:
        names = ", ".join(
            f"{merge.name} ({merge.given:+.2f}, by the averages {merge.gain:+.2f})"
            for merge in differing[:3]
        )
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        notices.append(
            f"gains in the table that do not follow from its averages, and are not used: "
            f"{names}{more}"
        )
    return Findings(
        models=len(rows),
        tasks=table.tasks,
        merges=tuple(merges),
        kinship=tuple(_kinship(merges)),
        paths=tuple(_paths(table, {merge.name: merge for merge in merges})),
        notices=tuple(notices),
    )


def _distinct(rows: Iterable[MergeRow]) -> list[MergeRow]:
    """Each model once: paths may have merges in common."""
    found: dict[str, MergeRow] = {}
    for row in rows:
        found.setdefault(row.name, row)
    return list(found.values())


def _merges(rows: Sequence[MergeRow], all_rows: Sequence[MergeRow]) -> Iterable[MergeFinding]:
    averages = {row.name: row.average for row in rows}
    scores = {row.name: _all_scores(row) for row in rows}
    parents = _parents(all_rows)
    ancestors = _ancestors(parents)
    shares = _shares(parents)
    for row in rows:
        of_parents = [averages.get(parent) for parent in row.parents]
        known = [average for average in of_parents if average is not None]
        gain, computed = row.gain, False
        if row.complete and row.average is not None and len(known) == len(row.parents):
            gain, computed = row.average - sum(known) / len(known), True
        similarities = dict(row.similarities)
        shared: tuple[str, ...] = ()
        if row.complete:
            similarities[DESCENT] = _mean_cosine([shares[parent] for parent in row.parents])
            families = [ancestors[parent] | {parent} for parent in row.parents]
            shared = tuple(sorted(set.intersection(*families)))
        yield MergeFinding(
            name=row.name,
            line=row.line,
            parents=row.parents,
            average=row.average,
            gain=gain,
            computed=computed,
            given=row.gain,
            similarities=similarities,
            task_difference=_between([scores.get(parent) for parent in row.parents]),
            shared_ancestors=shared,
        )


def _all_scores(row: MergeRow) -> dict[str, float] | None:
    scores = {task: score for task, score in row.scores.items() if score is not None}
    return scores if scores and len(scores) == len(row.scores) else None


def _between(scores: Sequence[Mapping[str, float] | None]) -> float | None:
    known = [one for one in scores if one is not None]
    if len(known) < 2 or len(known) < len(scores):
        return None
    values = [task_difference(one, other) for one, other in combinations(known, 2)]
    return sum(values) / len(values)


def _parents(rows: Iterable[MergeRow]) -> dict[str, tuple[str, ...]]:
    """Model to parents; where paths know different ones of the same model, all of them."""
    parents: dict[str, tuple[str, ...]] = {}
    for row in rows:
        parents[row.name] = tuple(dict.fromkeys((*parents.get(row.name, ()), *row.parents)))
    return parents


def _ancestors(parents: Mapping[str, Sequence[str]]) -> dict[str, set[str]]:
    ancestors: dict[str, set[str]] = {}
    for name in TopologicalSorter(parents).static_order():
        own = parents.get(name, ())
        ancestors[name] = set(own).union(*(ancestors[parent] for parent in own))
    return ancestors


def _shares(parents: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
    """Of each model, founder to its share if every merge were a plain mean.

    With one known parent, a model was tuned further or merged with a stranger: half of it is its
    own, which makes it a founder too.
    """
    shares: dict[str, dict[str, float]] = {}
    for name in TopologicalSorter(parents).static_order():
        own = parents.get(name, ())
        parts = [*(shares[parent] for parent in own), *([{name: 1.0}] if len(own) < 2 else [])]
        share: dict[str, float] = {}
        for founder, part in (pair for one in parts for pair in one.items()):
            share[founder] = share.get(founder, 0.0) + part / len(parts)
        shares[name] = share
    return shares


def _mean_cosine(shares: Sequence[Mapping[str, float]]) -> float:
    """The mean over pairs, as kinship of more than two models is (paper eq. 4)."""
    values = [
        sum(part * other.get(founder, 0.0) for founder, part in one.items())
        / sqrt(sum(part**2 for part in one.values()) * sum(part**2 for part in other.values()))
        for one, other in combinations(shares, 2)
    ]
    return sum(values) / len(values)


def _kinship(merges: Sequence[MergeFinding]) -> Iterable[KinshipFinding]:
    names = dict.fromkeys(name for merge in merges for name in merge.similarities)
    measures: list[tuple[str, list[float | None]]] = [
        ("gain", [merge.gain for merge in merges]),
        ("size of gain", [merge.gain and abs(merge.gain) for merge in merges]),
        ("task difference", [merge.task_difference for merge in merges]),
    ]
    kinds: tuple[Literal["pearson", "spearman"], ...] = ("pearson", "spearman")
    for name in names:
        for of, values in measures:
            points = [
                (merge.name, similarity, value)
                for merge, value in zip(merges, values, strict=True)
                if (similarity := merge.similarities.get(name)) is not None and value is not None
            ]
            for kind in kinds:
                found = correlate([one for _, one, _ in points], [one for *_, one in points], kind)
                if found is not None:
                    carried_by = None if found.decisive is None else points[found.decisive][0]
                    yield KinshipFinding(name, of, found, carried_by)


def _paths(table: MergeTable, merges: Mapping[str, MergeFinding]) -> Iterable[PathFinding]:
    for path in dict.fromkeys(row.path for row in table.rows):
        rows = [
            row
            for row in table.rows
            if row.path == path and row.name in merges and row.average is not None
        ]
        scores = [row.average for row in rows if row.average is not None]
        if len(scores) < 3:
            continue
        stops = {
            name: tuple(
                early_stopping(
                    [row.similarities[name] for row in rows], scores, THRESHOLDS, PATIENCES
                )
            )
            for name in table.columns.similarities
            if not is_distance(name)
        }
        yield PathFinding(path, tuple(row.name for row in rows), stages(scores), stops)
