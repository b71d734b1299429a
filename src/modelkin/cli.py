"""The command line: opens, calls the library, prints. Knows no more than that."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from typer.core import TyperGroup

import modelkin
from modelkin.config import load_config, load_yaml
from modelkin.errors import ConfigError, ModelkinError
from modelkin.measuring import kinship as measure_kinship
from modelkin.progress import Bars
from modelkin.records import METRICS
from modelkin.report import failure_lines, lead_sentence, terminal_table
from modelkin.run import Plan, Run, default_folder, plan, read_run
from modelkin.run import evaluate as evaluate_model
from modelkin.run import evolve as evolve_models
from modelkin.similarity import Kinship


class _Group(TyperGroup):
    """Turns every error that modelkin raises on purpose into one line and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModelkinError as error:
            print(f"error: {error}", file=sys.stderr)
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            named = f"{error.filename}: " if error.filename else ""
            print(f"error: {named}{reason}", file=sys.stderr)
        raise typer.Exit(2)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Breed better language models out of existing ones, guided by their kinship.",
)
# What is printed holds names and paths, in which brackets and colons are just that.
console = Console(markup=False, emoji=False)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.YAML", help="The run file.")]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write JSON to FILE; - is the terminal."),
]


def _progress() -> Progress:
    # To stderr, so that what a command prints can be piped.
    stderr = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        # Elsewhere than on a terminal it would leave an empty line.
        disable=not stderr.is_terminal,
    )


def _version(wanted: bool) -> None:
    if wanted:
        print(f"modelkin {modelkin.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Breed better language models out of existing ones, guided by their kinship."""


@app.command()
def kinship(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids of two or more models.")],
    base: Annotated[str, typer.Option(help="Folder or Hub id of their common base.")],
    json_file: Json = None,
) -> None:
    """How related are models? Similarity of their weight changes from a common base."""
    with _progress() as progress:
        found = measure_kinship(base, models, progress=progress)
    if json_file:
        _write_json(found.as_dict(), json_file)
    else:
        _print_kinship(found)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of the model.")],
    config: Annotated[Path, typer.Option(help="The run file that says how.")],
    json_file: Json = None,
) -> None:
    """Score one model as a run would."""
    cache = default_folder(config) / "evaluations"
    with _progress() as progress:
        card = evaluate_model(model, load_config(config), cache=cache, progress=progress).scorecard
    if json_file:
        scores = {task: score.value for task, score in card.scores.items()}
        _write_json({**scores, "average": card.average}, json_file)
        return
    for task, score in card.scores.items():
        stderr = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        console.print(f"{task:30} {score.value:.4f}{stderr}", highlight=False)
    console.print(f"{'average':30} {card.average:.4f}", highlight=False)


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.YAML", help="mergekit's YAML.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
) -> None:
    """Merge models by a mergekit recipe; OUT appears whole or not at all."""
    from modelkin.merging import Mergekit, resolve_models

    config = load_yaml(recipe)
    if not isinstance(config, dict):
        raise ConfigError(f"{recipe}: expected keys and values, found {type(config).__name__}")
    with _progress() as progress:
        merger = Mergekit(on_progress=Bars(progress).inner("merging"))
        merger.merge(resolve_models(config, recipe.parent), out.resolve())
    console.print(f"made {out}", highlight=False)


@app.command()
def evolve(
    run_file: RunFile,
    out: Annotated[Path | None, typer.Option(help="The run folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
) -> None:
    """Breed models. Run it again to resume."""
    folder = out or default_folder(run_file)
    if dry_run:
        _print_plan(plan(load_config(run_file), folder.resolve()), folder)
        return
    with _progress() as progress:
        run = evolve_models(run_file, out=folder, progress=progress)
    _print_run(run)


@app.command()
def status(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")]) -> None:
    """Family, scores, gains and kinship of a run, and why it stopped."""
    _print_run(read_run(folder))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to put everything.")] = Path("demo-run"),
    seed: Annotated[int, typer.Option(help="For training and breeding.")] = 0,
) -> None:
    """Train tiny models on this machine and breed them: greedy, kinship, random, uniform."""
    from modelkin.demo import run_demo

    with _progress() as progress:
        result = run_demo(out.resolve(), seed=seed, progress=progress)
    result.print(console)


def _write_json(value: object, file: str) -> None:
    text = json.dumps(value, allow_nan=False)
    if file == "-":
        print(text)
    else:
        Path(file).write_text(text + "\n", encoding="utf-8")


def _print_kinship(found: Kinship) -> None:
    console.print(
        f"compared {found.compared_parameters:,} of {found.total_parameters:,} parameters "
        f"({found.coverage:.1%}) with the base {found.base}",
        highlight=False,
    )
    if found.left_out:
        console.print(f"left out: {', '.join(found.left_out)}", highlight=False)
    for metric in METRICS:
        mean = found.mean(metric)
        table = Table(
            title=f"{metric}, mean {'undefined' if mean is None else f'{mean:.4f}'}",
            title_justify="left",
        )
        for head in ("", *found.models):
            table.add_column(head, justify="right")
        for name, row in zip(found.models, found.matrix(metric), strict=True):
            table.add_row(name, *(f"{v:.4f}" if v == v else "undefined" for v in row))
        console.print(table)
    for name in found.undefined:
        console.print(f"{name} equals the base: its kinship is undefined", style="yellow")


def _print_plan(found: Plan, folder: Path) -> None:
    for model in found.models:
        console.print(
            f"{model.name:20} {model.architecture}, {model.parameters:,} parameters, "
            f"{model.folder}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"at most {found.merges} merges and {found.evaluations} evaluations\n"
        f"at most {found.bytes / 1e9:.2f} GB to be written to {folder}, "
        f"{found.free / 1e9:.2f} GB free: {'fits' if found.fits else 'DOES NOT FIT'}",
        highlight=False,
        soft_wrap=True,
    )


def _print_run(run: Run) -> None:
    console.print(terminal_table(run.state, run.samples, width=console.width))
    for line in failure_lines(run.state):
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"Stopped: {run.state.stopped}."
        if run.state.stopped
        else "Not finished: still going on, or interrupted.",
        highlight=False,
    )
    console.print(lead_sentence(run.state, run.samples), highlight=False, soft_wrap=True)
    console.print(f"Report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
