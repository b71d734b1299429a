"""Reads the paper's tables from CSV files: the package's own, or a folder in the same form.

Checks every field and says where one is wrong. Knows nothing of what the numbers mean.
"""

import csv
from collections.abc import Callable, Collection, Iterable, Mapping
from decimal import Decimal, InvalidOperation
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import TypeVar

from modelkin.errors import ConfigError
from modelkin.replay.records import (
    Claim,
    CommunityMerge,
    Listed,
    Matched,
    Model,
    Pair,
    Paper,
    PublishedCorrelation,
    Reprint,
    Scores,
    Statement,
    Step,
)

MAIN_TASKS = ("truthfulqa", "winogrande", "gsm8k")
LEADERBOARD_TASKS = ("arc", "hellaswag", "mmlu", "truthfulqa", "winogrande", "gsm8k")
METRICS = ("pcc", "cs", "ed")
COLUMNS = ("foundation", "both", "greedy", "kinship")
# Table 15's columns in print; `disagreements` tells what they hold.
DIFFERENCES = {
    "winogrande": "winogrande_diff_as_labelled",
    "truthfulqa": "truthfulqa_diff_as_labelled",
    "gsm8k": "gsm8k_diff",
}

T = TypeVar("T")


class _Row:
    """One line of a file, whose fields are asked for by column."""

    def __init__(self, file: Path, line: int, fields: Mapping[str, str | None]) -> None:
        self._file, self._line, self._fields = file, line, fields

    def text(self, column: str) -> str:
        """A field, which may be empty."""
        value = self._fields.get(column)
        if value is None:
            raise self.wrong(column, "a field", "none")
        return value.strip()

    def name(self, column: str, known: Collection[str] | None = None) -> str:
        """A field that is not empty, and one of `known` if given."""
        value = self.text(column)
        if not value:
            raise self.wrong(column, "a name", "an empty field")
        if known is not None and value not in known:
            raise self.wrong(column, _one_of(known), repr(value))
        return value

    def number(self, column: str) -> Decimal:
        """A finite number."""
        text = self.text(column)
        try:
            value = Decimal(text)
        except InvalidOperation:
            value = Decimal("NaN")
        if not value.is_finite():
            raise self.wrong(column, "a number", repr(text))
        return value

    def maybe(self, column: str) -> Decimal | None:
        """A finite number, or None where the field is empty."""
        return self.number(column) if self.text(column) else None

    def whole(self, column: str) -> int:
        """A whole number."""
        value = self.number(column)
        if value != int(value):
            raise self.wrong(column, "a whole number", repr(self.text(column)))
        return int(value)

    def numbers(self, columns: Iterable[str]) -> Scores:
        """Several numbers, by column."""
        return {column: self.number(column) for column in columns}

    def names(self, *columns: str) -> tuple[str, ...]:
        """Those of several fields that are not empty."""
        return tuple(name for name in map(self.text, columns) if name)

    def wrong(self, column: str, expected: str, found: str) -> ConfigError:
        """What is wrong with a field."""
        return ConfigError(
            f"{self._file}: line {self._line}, column {column}: expected {expected}, found {found}"
        )


def read_paper(folder: Path | None = None) -> Paper:
    """The paper's tables, of the package's own data or of `folder`.

    Raises:
        ConfigError: a file or column is missing, or a field is not as expected.
    """
    if folder is not None:
        return _read(folder, str(folder))
    with as_file(files("modelkin.replay") / "data") as shipped:
        return _read(shipped, "the data that modelkin ships")


def _read(folder: Path, source: str) -> Paper:
    models = _by_name(
        folder / "main_experiment.csv",
        _rows(
            folder / "main_experiment.csv",
            ("model", "strategy", "generation", "parent_1", "parent_2", *MAIN_TASKS,
             "average_published", "gain_published", "kinship_published", "evidence"),
            _model,
        ),
    )  # fmt: skip
    _check_runs(folder / "main_experiment.csv", models)
    long_models, pairs = _long_form(folder / "llama_runs.csv")
    correlations = _rows(
        folder / "correlations.csv",
        ("metric", "signed_r", "signed_p", "absolute_r", "absolute_p"),
        lambda row: PublishedCorrelation(
            row.name("metric", [metric.upper() for metric in METRICS]).lower(),
            row.number("signed_r"), row.number("signed_p"),
            row.number("absolute_r"), row.number("absolute_p"),
        ),
    )  # fmt: skip
    return Paper(
        source=source,
        models=models,
        steps=_rows(
            folder / "community_paths.csv",
            ("path", "step", "model_1", "model_2", "model_merged", "atp", "gain", *METRICS),
            lambda row: Step(
                row.whole("path"), row.whole("step"), row.names("model_1", "model_2"),
                row.name("model_merged"), row.number("atp"), row.number("gain"),
                row.numbers(METRICS),
            ),
        ),
        merges=_rows(
            folder / "community_merges.csv",
            ("row", "model_1", "model_2", "child", "gain"),
            lambda row: CommunityMerge(
                row.whole("row"), (row.name("model_1"), row.name("model_2")), row.text("child"),
                row.number("gain"),
            ),
        ),
        correlations={row.metric: row for row in correlations},
        listed=(*_listed(folder), *long_models),
        pairs=pairs,
        figure_7=_rows(
            folder / "figure_7.csv",
            ("stage", "model_1", "model_2", "kinship", "parents_of"),
            lambda row: Matched(
                row.name("stage"), (row.name("model_1"), row.name("model_2")),
                row.number("kinship"), row.text("parents_of"),
            ),
            needed=False,
        ),
        claims=dict(
            _rows(
                folder / "claims.csv",
                ("claim", "value", "source", "text"),
                lambda row: (
                    row.name("claim"),
                    Claim(row.number("value"), row.text("source"), row.text("text")),
                ),
                needed=False,
            )
        ),
        reprints=_rows(
            folder / "reprints.csv",
            ("subject", "quantity", "value", "source"),
            lambda row: Reprint(
                row.name("subject"), row.name("quantity"), row.number("value"), row.text("source")
            ),
            needed=False,
        ),
        statements=_rows(
            folder / "statements.csv",
            ("topic", "one_source", "one_says", "other_source", "other_says", "settled"),
            lambda row: Statement(
                row.name("topic"), row.name("one_source"), row.name("one_says"),
                row.name("other_source"), row.name("other_says"), row.text("settled"),
            ),
            needed=False,
        ),
    )  # fmt: skip


def _rows(
    file: Path, columns: Iterable[str], make: Callable[[_Row], T], *, needed: bool = True
) -> list[T]:
    if not needed and not file.exists():
        return []
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            found = list(reader.fieldnames or ())
            for column in columns:
                if column not in found:
                    raise ConfigError(
                        f"{file}: expected a column {column!r}, found {', '.join(found) or 'none'}"
                    )
            rows = [make(_Row(file, reader.line_num, fields)) for fields in reader]
    except FileNotFoundError as error:
        raise ConfigError(f"{file}: expected a CSV file, found none") from error
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{file}: expected a CSV file: {error}") from error
    if not rows:
        raise ConfigError(f"{file}: expected rows below the columns, found none")
    return rows


def _model(row: _Row) -> Model:
    column = row.name("strategy", COLUMNS)
    parents = row.names("parent_1", "parent_2")
    generation = row.whole("generation")
    if (generation == 0) != (column == "foundation") or generation < 0:
        raise row.wrong("generation", "0 for a foundation, 1 or more for others", str(generation))
    if len(parents) != (0 if column == "foundation" else 2):
        raise row.wrong("parent_1", "two parents, or none for a foundation", str(len(parents)))
    return Model(
        row.name("model"), column, generation, parents, row.numbers(MAIN_TASKS),
        row.number("average_published"), row.maybe("gain_published"),
        row.maybe("kinship_published"), row.text("evidence"),
    )  # fmt: skip


def _by_name(file: Path, models: Iterable[Model]) -> dict[str, Model]:
    found: dict[str, Model] = {}
    # By generation, so that parents come first whatever the order of the rows.
    for model in sorted(models, key=lambda model: model.generation):
        if model.name in found:
            raise ConfigError(
                f"{file}: column model: expected each model once, found {model.name!r} twice"
            )
        found[model.name] = model
    return found


def _check_runs(file: Path, models: Mapping[str, Model]) -> None:
    for run in ("greedy", "kinship"):
        if not any(model.column in ("both", run) for model in models.values()):
            raise ConfigError(
                f"{file}: column strategy: expected models of the {run} run, found none"
            )
    for model in models.values():
        for parent in model.parents:
            if parent not in models or models[parent].generation >= model.generation:
                raise ConfigError(
                    f"{file}: row {model.name}: expected parents among the models of older "
                    f"generations, found {parent!r}"
                )


def _listed(folder: Path) -> list[Listed]:
    return [
        *_rows(
            folder / "baselines.csv",
            ("method", "family", *MAIN_TASKS, "average_published"),
            lambda row: Listed(
                "Table 1", row.name("method"), row.text("family"), 0,
                row.numbers(MAIN_TASKS), row.number("average_published"),
            ),
        ),
        *_rows(
            folder / "random_merge.csv",
            ("model", "generation", *MAIN_TASKS, "average_published", "kinship_cs_published",
             "same_scores_as"),
            lambda row: Listed(
                "Table 12", row.name("model"), "random", row.whole("generation"),
                row.numbers(MAIN_TASKS), row.number("average_published"),
                row.maybe("kinship_cs_published"), row.text("same_scores_as"),
            ),
        ),
        *_rows(
            folder / "leaderboard.csv",
            ("model", "average", *LEADERBOARD_TASKS),
            lambda row: Listed(
                "leaderboard of the slides", row.name("model"), "", 0,
                row.numbers(LEADERBOARD_TASKS), row.number("average"),
            ),
        ),
    ]  # fmt: skip


def _long_form(file: Path) -> tuple[list[Listed], list[Pair]]:
    """Tables 10, 11 and 15, of which each line of the file holds one number."""
    fields: dict[tuple[str, int], dict[str, Decimal]] = {}
    heads: dict[tuple[str, int], _Row] = {}

    def take(row: _Row) -> None:
        key = (row.name("table", ("10", "11", "15")), row.whole("row"))
        heads.setdefault(key, row)
        fields.setdefault(key, {})[row.name("metric")] = row.number("value")

    columns = ("table", "model", "model_2", "strategy", "generation", "row", "metric", "value")
    _rows(file, columns, take)
    models: list[Listed] = []
    pairs: list[Pair] = []
    # Table 15 last: its pairs are of Table 11's models.
    for table, number in sorted(heads):
        row, found = heads[table, number], fields[table, number]
        get = partial(_metric, f"{file}: table {table}, row {number}", found)
        if table == "15":
            known = {model.name for model in models if model.table == "Table 11"}
            pairs.append(
                Pair(
                    number,
                    (row.name("model", known), row.name("model_2", known)),
                    {task: get(column) for task, column in DIFFERENCES.items()},
                    get("atpd_published"),
                    {metric: get(f"kinship_{metric}") for metric in METRICS},
                )
            )
        else:
            tasks = ("truthfulqa", "gsm8k", "humaneval") if table == "10" else MAIN_TASKS
            models.append(
                Listed(
                    f"Table {table}", row.name("model"), row.text("strategy"),
                    row.whole("generation"), {task: get(task) for task in tasks},
                    get("average_published"), found.get("kinship_published"),
                )
            )  # fmt: skip
    return models, pairs


def _metric(where: str, found: Mapping[str, Decimal], metric: str) -> Decimal:
    if metric not in found:
        raise ConfigError(f"{where}: expected a line of metric {metric}, found {', '.join(found)}")
    return found[metric]


def _one_of(names: Collection[str]) -> str:
    return f"one of {', '.join(sorted(names))}"
