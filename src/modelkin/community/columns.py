"""What the columns of a table of merges mean, by their heads. Knows no rows."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# The tasks of the Open LLM Leaderboard, version 1 and version 2, as its heads spell them.
LEADERBOARD = (
    ("ARC", "HellaSwag", "MMLU", "TruthfulQA", "Winogrande", "GSM8K"),
    ("IFEval", "BBH", "MATH Lvl 5", "GPQA", "MUSR", "MMLU-PRO"),
)


def key(head: str) -> str:
    """A head without case, spaces, signs and pictures.

    >>> key("Average ⬆️"), key("#Params (B)"), key("parent_1")
    ('average', 'paramsb', 'parent1')
    """
    return re.sub(r"[^a-z0-9]", "", head.lower())


_TASKS = {key(task): task for version in LEADERBOARD for task in version}
# The leaderboard's other numbers: its v2 has each task unscaled too.
_RAW = {f"{task}raw" for task in _TASKS}
# In the order in which they are preferred: the leaderboard's `Model` is a link, in HTML.
_NAMES = (
    *("child", "childname", "modelmerged", "mergedmodel", "fullname", "model", "modelname"),
    *("name", "modelid", "evalname"),
)
_PARENTS = ("parents", "parentmodels", "mergedfrom")
_BASES = ("basemodel", "base")
_AVERAGES = ("average", "avg", "atp", "score", "childscore", "averagescore", "mean")
_GAINS = ("gain", "mergegain")
_PATHS = ("path", "run")
# In the order in which they are preferred.
_ORDERS = ("step", "order", "date", "uploadtohubdate", "submissiondate", "generation")
_DISTANCES = {"ed", "euclidean", "l2", "distance"}
_SIMILARITIES = {
    *("pcc", "pearson", "cs", "cos", "cosine", "kinship", "similarity", "correlation"),
    *_DISTANCES,
}
# Numbers that score nothing.
_OTHER = {
    *("row", "rank", "id", "index", "no", "line", "seed", "year", "k", "n", "size", "table"),
    *("params", "paramsb", "parameters", "hub", "hublikes", "likes", "downloads", "co2costkg"),
    *("cocostkg", "moe", "merged", "flagged", "availableonthehub", "chattemplate", "t", "type"),
    *("precision", "weighttype", "architecture", "hublicense", "modelsha", "officialproviders"),
    *("stage", "note", "notes", "strategy", "evidence", "unnamed0", ""),
}


@dataclass(frozen=True)
class Columns:
    """Which column holds what.

    Attributes:
        name: of the model of the row; `None` where rows are named by their parents.
        parents: one for each parent, or one that holds all.
        base: the model that the row's one was made from, by the leaderboard.
        average: of the scores.
        gain: as somebody else computed it.
        path: which evolution path the row belongs to.
        order: what merges are ordered by; `None` for the order of rows.
        scores: task to column.
        similarities: of the parents, by name.
        other: may be scores: it takes the numbers to tell.
    """

    name: str | None
    parents: tuple[str, ...]
    base: str | None
    average: str | None
    gain: str | None
    path: str | None
    order: str | None
    scores: Mapping[str, str]
    similarities: tuple[str, ...]
    other: tuple[str, ...] = field(default=())


def is_distance(column: str) -> bool:
    """Whether a similarity is one that is small for kin.

    >>> is_distance("kinship_ed"), is_distance("pcc")
    (True, False)
    """
    return not _DISTANCES.isdisjoint(_words(column))


def recognise(heads: Sequence[str]) -> Columns:
    """Sort columns by what their heads say, in any case and spelling of the known words."""
    by_key: dict[str, str] = {}
    for head in heads:
        by_key.setdefault(key(head), head)

    def first(keys: Sequence[str]) -> str | None:
        return next((by_key[one] for one in keys if one in by_key), None)

    numbered = [head for head in heads if re.fullmatch(r"(parent|model)\d+", key(head))]
    of_parents = [head for head in numbered if key(head).startswith("parent")]
    one_for_all = first(_PARENTS)
    parents = tuple(of_parents) or ((one_for_all,) if one_for_all else tuple(numbered))
    average = first(_AVERAGES) or _by_first_word(heads, ("average", "avg"))
    gain = first(_GAINS) or _by_first_word(heads, _GAINS)
    known = {*_NAMES, *_PARENTS, *_BASES, *_AVERAGES, *_GAINS, *_PATHS, *_ORDERS, *_OTHER, *_RAW}
    similarities, scores, other = [], {}, []
    for head in heads:
        words, own = _words(head), key(head)
        if own in _TASKS:
            scores[_TASKS[own]] = head
        elif not _SIMILARITIES.isdisjoint(words):
            similarities.append(head)
        elif not (own in known or head in numbered or words[0] in ("average", "avg", *_GAINS)):
            other.append(head)
    return Columns(
        name=first(_NAMES),
        parents=parents,
        base=first(_BASES),
        average=average,
        gain=gain,
        path=first(_PATHS),
        order=first(_ORDERS),
        scores=scores,
        similarities=tuple(similarities),
        other=tuple(other),
    )


def _words(head: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", head.lower()) or [""]


def _by_first_word(heads: Sequence[str], words: Sequence[str]) -> str | None:
    """Such as `average_published`."""
    return next((head for head in heads if _words(head)[0] in words), None)
