"""The demo: tiny models trained and bred on this machine, to see the whole loop in minutes.

Four experts of one base are bred greedily, with kinship-guided exploration and at random, and
held against the plainest baseline there is: the uniform average of all of them. Models are chosen
by `dev` items and reported on `test` items, which nothing was chosen by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from modelkin.analyse import Difference, Samples, paired_difference
from modelkin.checkpoint import fingerprint, open_checkpoint
from modelkin.config import RunConfig, parse_config
from modelkin.demo.zoo import Zoo, build_zoo
from modelkin.evaluating import Cached, Harness
from modelkin.evaluating.harness import HarnessSettings
from modelkin.merging import Mergekit
from modelkin.progress import Bars
from modelkin.records import Evaluation, Subject
from modelkin.report import Row, rows, write_report
from modelkin.run import Run, evolve
from modelkin.state import Member

STRATEGIES = ("greedy", "kinship", "random")
UNIFORM = "uniform average"


@dataclass(frozen=True)
class Finalist:
    """A model that is reported on held-out items.

    Attributes:
        how: the strategy that found it, `foundation`, or the uniform average.
        name: in its family.
        parents: names.
        merges: how many merges were made in all by what found it.
        dev: its average on the items it was chosen by, in points.
        test: its average on held-out items, in points.
        samples: its outcomes on the held-out items.
    """

    how: str
    name: str
    parents: tuple[str, ...]
    merges: int
    dev: float
    test: float
    samples: Samples


@dataclass(frozen=True)
class DemoResult:
    """What the demo found: one run for each strategy, and the finalists."""

    folder: Path
    runs: Mapping[str, Run]
    finalists: tuple[Finalist, ...]

    @property
    def foundation(self) -> Finalist:
        """The best foundation model by the held-out items themselves, which is in its favour."""
        foundations = [one for one in self.finalists if one.how == "foundation"]
        return max(foundations, key=lambda one: one.test)

    @property
    def best(self) -> Finalist:
        """The best child that evolution found, by the items it was chosen by."""
        bred = [one for one in self.finalists if one.how in STRATEGIES]
        return max(bred, key=lambda one: one.dev)

    def lead(self, one: Finalist) -> Difference:
        """How far a finalist is ahead of the best foundation model, on held-out items."""
        found = paired_difference(one.samples, [self.foundation.samples])
        assert found is not None  # the harness keeps samples of all, on the same items
        return Difference(100 * found.value, 100 * found.low, 100 * found.high, found.p)

    def conclusion(self) -> str:
        """The last line: the best child, its parents, and what it gained on held-out items."""
        best, lead = self.best, self.lead(self.best)
        outcome = {
            "better": "it is better",
            "worse": "it is WORSE",
            "cannot tell": "the data cannot tell whether it is better",
        }[lead.verdict]
        return (
            f"Best child: {best.name} of the {best.how} run ({' × '.join(best.parents)}), "
            f"{best.test:.1f} on held-out items, {lead.value:+.1f} over the best foundation model, "
            f"{self.foundation.name} (95 % interval {lead.low:+.1f} to {lead.high:+.1f}): "
            f"{outcome}."
        )

    def print(self, console: Console) -> None:
        """The tables and the conclusion."""
        # Narrower than this the three strategies do not stand side by side.
        console.width = max(console.width, 130)
        console.print(family_table(self.runs))
        console.print(self._finalists_table())
        uniform = next(one for one in self.finalists if one.how == UNIFORM)
        against = paired_difference(self.best.samples, [uniform.samples])
        assert against is not None
        console.print(
            f"Against the uniform average of all experts, a single merge, the best child is at "
            f"{100 * against.value:+.1f} (95 % interval {100 * against.low:+.1f} to "
            f"{100 * against.high:+.1f}): {against.verdict}.",
            highlight=False,
            soft_wrap=True,
        )
        console.print(
            f"Report: {self.folder / 'report.html'}, and of each strategy in its own folder",
            highlight=False,
            soft_wrap=True,
        )
        console.print(self.conclusion(), highlight=False, style="bold", soft_wrap=True)

    def _finalists_table(self) -> Table:
        table = Table(title="Held-out items", title_justify="left")
        for column, right in (
            ("found by", False),
            ("model", False),
            ("parents", False),
            ("merges", True),
            ("dev", True),
            ("test", True),
            ("test, over the best foundation", True),
        ):
            table.add_column(column, justify="right" if right else "left")
        for one in self.finalists:
            lead = self.lead(one)
            table.add_row(
                one.how,
                one.name,
                " × ".join(one.parents),
                str(one.merges) if one.merges else "",
                f"{one.dev:.1f}",
                f"{one.test:.1f}",
                f"{lead.value:+.1f} ({lead.low:+.1f} to {lead.high:+.1f})",
                style="bold green" if one == self.best else None,
            )
        return table


def family_table(runs: Mapping[str, Run]) -> Table:
    """The families side by side, after the paper's Table 3; a row a model of a generation."""
    table = Table(
        title="Families, scored on the dev items",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("gen", justify="right", no_wrap=True)
    for strategy in runs:
        table.add_column(f"{strategy}\nmodel = parents", no_wrap=True)
        table.add_column("\navg", justify="right", no_wrap=True)
        table.add_column("\ngain", justify="right", no_wrap=True)
        table.add_column("\nkin", justify="right", no_wrap=True)
    families = {strategy: rows(run.state, run.samples) for strategy, run in runs.items()}
    last = max(row.generation for family in families.values() for row in family)
    for generation in range(last + 1):
        columns = [
            [row for row in family if row.generation == generation] for family in families.values()
        ]
        for line in range(max(len(column) for column in columns)):
            cells = [
                cell
                for column in columns
                for cell in _cells(column[line] if line < len(column) else None)
            ]
            ends = line == max(len(column) for column in columns) - 1
            table.add_row(str(generation) if line == 0 else "", *cells, end_section=ends)
    return table


def _cells(row: Row | None) -> tuple[str, str, str, str]:
    if row is None:
        return ("", "", "", "")
    name = f"{row.name} = {'×'.join(row.parents)}" if row.parents else row.name
    if row.failed:
        return (name, "failed", "", "")
    gain = "" if row.gain is None else f"{row.gain:+.1f}"
    return (name, "" if row.average is None else f"{row.average:.1f}", gain, row.kinship)


def run_demo(folder: Path, *, seed: int = 0, progress: Progress | None = None) -> DemoResult:
    """Train the zoo, breed it by every strategy, and score the finalists on held-out items.

    Run again after an interruption it goes on where it was.

    Args:
        folder: where everything goes.
        seed: for training and for the random strategy.
        progress: where to show bars.
    """
    zoo = build_zoo(folder / "zoo", seed=seed, progress=progress)
    runs: dict[str, Run] = {}
    for strategy in STRATEGIES:
        # The control may evaluate as many models as the run that it is a control of.
        most = len(runs["kinship"].state.members) if strategy == "random" else None
        config = _config(zoo, strategy, folder, seed, most)
        runs[strategy] = evolve(config, out=folder / strategy, progress=progress)
    uniform = folder / "uniform"
    if not uniform.exists():
        Mergekit().merge(_uniform_recipe(list(zoo.experts.values())), uniform)
    scorer = _Scorer(zoo, folder / "evaluations", Bars(progress))
    write_report(folder / "report.html", [run.source() for run in runs.values()])
    finalists = [
        scorer.finalist("foundation", member, runs["greedy"])
        for member in runs["greedy"].state.members.values()
        if member.generation == 0
    ]
    for strategy in STRATEGIES:
        best = next(m for m in runs[strategy].state.ranked() if m.parents)
        finalists.append(scorer.finalist(strategy, best, runs[strategy]))
    dev, test = (scorer.score(UNIFORM, uniform, split) for split in ("dev", "test"))
    finalists.append(
        Finalist(
            how=UNIFORM,
            name="",
            parents=("all experts",),
            merges=1,
            dev=100 * dev.scorecard.average,
            test=100 * test.scorecard.average,
            samples=test.samples,
        )
    )
    return DemoResult(folder, runs, tuple(finalists))


def _harness_settings(tasks: Sequence[str], include_path: Path, cache: Path) -> dict[str, Any]:
    return {
        "tasks": list(tasks),
        "include_path": str(include_path),
        "batch_size": 64,
        "device": "cpu",
        "dtype": "float32",
        "cache": str(cache),
    }


def _config(zoo: Zoo, strategy: str, folder: Path, seed: int, evaluations: int | None) -> RunConfig:
    return parse_config(
        {
            "base": str(zoo.base),
            "models": {name: str(path) for name, path in zoo.experts.items()},
            "strategy": strategy,
            "seed": seed,
            "merge": {"preset": "slerp"},
            "evaluation": _harness_settings(
                zoo.dev_task_names, zoo.dev_tasks, folder / "evaluations"
            ),
            "limits": {"evaluations": evaluations},
        },
        folder=folder,
        origin="demo",
    )


def _uniform_recipe(models: Sequence[Path]) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(path), "parameters": {"weight": 1.0}} for path in models],
        "dtype": "bfloat16",
    }


class _Scorer:
    """Scores models on the dev or test items, each once."""

    def __init__(self, zoo: Zoo, cache: Path, bars: Bars) -> None:
        splits = {
            "dev": (zoo.dev_task_names, zoo.dev_tasks),
            "test": (zoo.test_task_names, zoo.test_tasks),
        }
        self._harness = {
            split: Cached(
                Harness(
                    HarnessSettings(**_harness_settings(tasks, include_path, cache)),
                    folder=cache,
                    on_progress=bars.inner("prompts"),
                ),
                cache,
            )
            for split, (tasks, include_path) in splits.items()
        }

    def score(self, name: str, folder: Path, split: str) -> Evaluation:
        weights = fingerprint(open_checkpoint(folder))
        return self._harness[split].evaluate(Subject(name, name, str(folder), weights))

    def finalist(self, how: str, member: Member, run: Run) -> Finalist:
        test = self.score(member.name, run.weights(member), "test")
        assert member.average is not None  # only scored members are ranked
        return Finalist(
            how=how,
            name=member.name,
            parents=tuple(parent.name for parent in run.state.parents_of(member)),
            merges=sum(bool(m.parents) for m in run.state.members.values())
            if how in STRATEGIES
            else 0,
            dev=100 * member.average,
            test=100 * test.scorecard.average,
            samples=test.samples,
        )
