"""The command line: opens, calls the library, prints. Knows no more than that."""

import gc
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import modelkin
from modelkin.errors import ConfigError, ModelkinError
from modelkin.files import check_target, write_csv, write_json
from modelkin.records import METRICS, Metric
from modelkin.tensor_names import LEVELS, Level

# The rest is imported by the commands that need it: starting takes longer than many a command.
if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from modelkin.merging import Engine
    from modelkin.run import Asked, Plan, Run


class _Group(click.Group):
    """Turns every error that modelkin raises on purpose into one line and exit status 2."""

    def invoke(self, ctx: click.Context) -> Any:
        # Importing makes many objects and no garbage: looking for it is a twentieth of a start.
        gc.set_threshold(50_000, 20, 20)
        try:
            return super().invoke(ctx)
        except ModelkinError as error:
            print(f"error: {error}", file=sys.stderr)
        except OSError as error:
            reason = error.strerror or " ".join(str(error).split())
            named = f"{error.filename}: " if error.filename else ""
            print(f"error: {named}{reason}", file=sys.stderr)
        ctx.exit(2)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        # In the order of this file, which is that of use.
        return list(self.commands)


# Existence is for the library to check, which names what it expected.
PATH = click.Path(path_type=Path)
json_option = click.option(
    "--json", "json_file", metavar="FILE", help="Write JSON to FILE; - is the terminal."
)
allow_pickle_option = click.option(
    "--allow-pickle", is_flag=True, help="Read PyTorch files too, of authors that you trust."
)
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="By default as many as there are cores."
)
no_cache_option = click.option(
    "--no-cache", is_flag=True, help="Read all weights; use and keep no statistics."
)


def _console() -> "Console":
    from rich.console import Console

    # What is printed holds names and paths, in which brackets and colons are just that.
    return Console(markup=False, emoji=False)


def _progress(*, unit: str = "steps") -> "AbstractContextManager[Progress | None]":
    """Bars on a terminal, in `unit` "steps" or "bytes"; elsewhere none."""
    # To stderr, so that what a command prints can be piped.
    if not sys.stderr.isatty():
        return nullcontext()
    from rich import progress
    from rich.console import Console

    in_bytes = (progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn())
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        *(in_bytes if unit == "bytes" else ()),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["--help"], "show_default": True},
)
@click.version_option(modelkin.__version__, prog_name="modelkin", message="%(prog)s %(version)s")
def app() -> None:
    """Breed better language models out of existing ones, guided by their kinship."""


@app.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--base", required=True, help="Folder or Hub id of the models' common base.")
@click.option(
    "--per",
    type=click.Choice(LEVELS),
    default="model",
    help="Kinship of the whole models, or within each of their parts.",
)
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Only tensors like this, such as q_proj, layers.3 or '*norm*'. Can be repeated.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="No tensors like this. Can be repeated.",
)
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    help="Show this one only. A plot shows pcc unless told otherwise.",
)
@json_option
@click.option(
    "--csv",
    "csv_file",
    metavar="FILE",
    help="Write a CSV table, one line a pair, to FILE; - is the terminal.",
)
@click.option("--plot", metavar="FILE", help="Draw a clustered heatmap to FILE, a .html or a .png.")
@threads_option
@click.option(
    "--min-coverage",
    type=click.FloatRange(0, 1),
    help="Refuse models that share less than this of the base. By default 0.9.",
)
@no_cache_option
@allow_pickle_option
def kinship(
    models: tuple[str, ...],
    base: str,
    per: Level,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    metric: Metric | None,
    json_file: str | None,
    csv_file: str | None,
    plot: str | None,
    threads: int | None,
    min_coverage: float | None,
    no_cache: bool,
    allow_pickle: bool,
) -> None:
    """Measure how closely models are related.

    Kinship is the similarity of the models' weight changes from a common base. MODELS are folders
    or Hub ids of two or more.
    """
    from modelkin.measuring import kinship as measure
    from modelkin.similarity import PairRow

    _check_outputs(json_file, csv_file, plot)
    given: dict[str, Any] = {
        "include": include,
        "exclude": exclude,
        "threads": threads,
        "min_coverage": min_coverage,
        "cache": False if no_cache else None,
        "allow_pickle": allow_pickle or None,
    }
    # The defaults are the library's.
    options = {name: value for name, value in given.items() if value not in (None, ())}
    with _progress(unit="bytes") as progress:
        found = measure(base, models, progress=progress, **options)
    if json_file:
        write_json(found.as_dict(per), json_file)
    if csv_file:
        write_csv(PairRow._fields, found.rows(per), csv_file)
    if plot:
        from modelkin.heatmap import write_heatmap

        write_heatmap(found, plot, metric or "pcc", level=per)
    if not (json_file or csv_file):
        from modelkin.tables import print_kinship

        print_kinship(found, _console(), level=per, metric=metric)


@app.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--base", help="What to hold them against. By default the first of them.")
@json_option
@allow_pickle_option
def inspect(
    models: tuple[str, ...], base: str | None, json_file: str | None, allow_pickle: bool
) -> None:
    """Show what models are and what they share, without reading their weights.

    MODELS are folders or Hub ids.
    """
    from modelkin.inspection import inspect_models

    _check_outputs(json_file, None, None)
    found = inspect_models(models, base=base, allow_pickle=allow_pickle)
    if json_file:
        write_json(found.as_dict(), json_file)
        return
    from modelkin.tables import print_inspection

    print_inspection(found, _console())


@app.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--base", required=True, help="Folder or Hub id of the models' common base.")
@click.option(
    "--method",
    help="slerp, linear, task_arithmetic, nuslerp, multislerp, karcher or model_stock, with equal "
    "parts of both parents; or the preset paper. By default slerp.",
)
@click.option(
    "--recipe",
    type=PATH,
    metavar="RECIPE.YAML",
    help="Instead, a mergekit recipe with {parent_1}, {parent_2} and {base} for its models.",
)
@click.option(
    "--metric", type=click.Choice(METRICS), default="pcc", help="The one to show and to sort by."
)
@json_option
@click.option(
    "--csv",
    "csv_file",
    metavar="FILE",
    help="Write a CSV table, one line a child and model, to FILE; - is the terminal.",
)
@threads_option
@no_cache_option
@allow_pickle_option
def preview(
    models: tuple[str, ...],
    base: str,
    method: str | None,
    recipe: Path | None,
    metric: Metric,
    json_file: str | None,
    csv_file: str | None,
    threads: int | None,
    no_cache: bool,
    allow_pickle: bool,
) -> None:
    """Predict the kinship of every pair's child with every model, without making any.

    MODELS are folders or Hub ids of two or more; of each pair the one named earlier is
    {parent_1}. The children of the least kin parents come first.
    """
    from modelkin.previewing import ChildRow, load_recipe
    from modelkin.previewing import preview as preview_children

    _check_outputs(json_file, csv_file, None)
    template = load_recipe(method, recipe)
    with _progress(unit="bytes") as progress:
        found = preview_children(
            base,
            models,
            recipe=template,
            threads=threads,
            cache=not no_cache,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    if json_file:
        write_json(found.as_dict(metric), json_file)
    if csv_file:
        write_csv(ChildRow._fields, found.rows(metric), csv_file)
    if not (json_file or csv_file):
        from modelkin.outlook import print_preview

        print_preview(found, _console(), metric=metric)


@app.command()
@click.argument("source", type=PATH, metavar="RUN_OR_TABLE")
@click.option(
    "--scores",
    type=PATH,
    metavar="SCORES.CSV",
    help="Beside a table of pairs: a column model, and one for each task.",
)
@click.option("--top", type=click.IntRange(min=1), default=10, help="How many merges to suggest.")
@json_option
def suggest(source: Path, scores: Path | None, top: int, json_file: str | None) -> None:
    """Say which merges are worth making next, and why.

    RUN_OR_TABLE is a run folder; or a CSV table of pairs, as kinship writes it; or one of scores.
    """
    from modelkin.suggesting import from_run, from_tables
    from modelkin.suggesting import suggest as suggest_merges

    _check_outputs(json_file, None, None)
    if source.is_dir():
        from modelkin.run import read_run

        if scores:
            raise ConfigError("--scores: expected beside a table of pairs only, found a run folder")
        run = read_run(source)
        evidence = from_run(run.state, run.statistics())
    else:
        evidence = from_tables(source, scores)
    found = suggest_merges(evidence, top=top)
    if json_file:
        write_json(found.as_dict(), json_file)
        return
    from modelkin.outlook import print_suggestions

    print_suggestions(found, _console())


@app.command()
@click.argument("model")
@click.option("--config", type=PATH, required=True, help="The run file that says how.")
@json_option
def evaluate(model: str, config: Path, json_file: str | None) -> None:
    """Score one model as a run would.

    MODEL is a folder or a Hub id.
    """
    from modelkin.config import load_config
    from modelkin.run import default_folder
    from modelkin.run import evaluate as evaluate_model

    _check_outputs(json_file, None, None)
    cache = default_folder(config) / "evaluations"
    with _progress() as progress:
        card = evaluate_model(model, load_config(config), cache=cache, progress=progress).scorecard
    if json_file:
        scores = {task: score.value for task, score in card.scores.items()}
        write_json({**scores, "average": card.average}, json_file)
        return
    console = _console()
    for task, score in card.scores.items():
        stderr = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        console.print(f"{task:30} {score.value:.4f}{stderr}", highlight=False)
    console.print(f"{'average':30} {card.average:.4f}", highlight=False)


@app.command()
@click.argument("recipe", type=PATH, metavar="RECIPE.YAML")
@click.argument("out", type=PATH)
@click.option(
    "--engine",
    # As in `merging.ENGINES`, which is not imported to print a help text.
    type=click.Choice(["auto", "native", "mergekit"]),
    default="auto",
    help="Native is the fast one, for recipes of weighted sums; auto takes it where it can.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Of native. By default as many as cores."
)
def merge(recipe: Path, out: Path, engine: "Engine", threads: int | None) -> None:
    """Merge models by a mergekit recipe.

    The folder OUT appears whole or not at all.
    """
    from modelkin.config import load_yaml
    from modelkin.merging import Mergekit, Merger, Native, choose_engine, resolve_models
    from modelkin.progress import Bars

    config = load_yaml(recipe)
    if not isinstance(config, dict):
        raise ConfigError(f"{recipe}: expected keys and values, found {type(config).__name__}")
    config = resolve_models(config, recipe.parent)
    chosen, reason = choose_engine(config, engine)
    _console().print(f"engine {chosen}: {reason}", highlight=False, soft_wrap=True)
    with _progress(unit="bytes" if chosen == "native" else "steps") as progress:
        merger: Merger
        if chosen == "native":
            merger = Native(threads=threads, progress=progress)
        else:
            merger = Mergekit(on_progress=Bars(progress).inner("merging"))
        merger.merge(config, out.resolve())
    _console().print(f"made {out}", highlight=False)


@app.command()
@click.argument("run_file", type=PATH, metavar="RUN.YAML")
@click.option("--out", type=PATH, help="The run folder. By default runs/RUN beside the run file.")
@click.option("--dry-run", is_flag=True, help="Print the plan only.")
def evolve(run_file: Path, out: Path | None, dry_run: bool) -> None:
    """Breed models. Run it again to resume."""
    from modelkin.config import load_config
    from modelkin.run import default_folder, plan
    from modelkin.run import evolve as evolve_models

    folder = out or default_folder(run_file)
    if dry_run:
        _print_plan(plan(load_config(run_file), folder.resolve()), folder)
        return
    with _progress() as progress:
        run = evolve_models(run_file, out=folder, progress=progress)
    _print_run(run)


@app.command()
@click.argument("folder", type=PATH, metavar="DIR")
@click.option("--config", type=PATH, help="The run file to begin with, or with other limits.")
@click.option("--out", type=PATH, help="Write NAME.yaml for each child to this folder instead.")
def ask(folder: Path, config: Path | None, out: Path | None) -> None:
    """Print what to merge next, as mergekit recipes, for people who evaluate elsewhere.

    DIR is a run folder. Record the scores with tell; evolve goes on with the same run.
    """
    from modelkin.config import load_config
    from modelkin.progress import Bars
    from modelkin.run import ask as ask_run

    with _progress() as progress:
        asked = ask_run(folder, load_config(config) if config else None, bars=Bars(progress))
    _print_asked(asked, out)


@app.command()
@click.argument("folder", type=PATH, metavar="DIR")
@click.argument("model")
@click.argument("scores", type=PATH, metavar="SCORES.JSON")
def tell(folder: Path, model: str, scores: Path) -> None:
    """Record the scores of a model that was evaluated elsewhere.

    DIR is a run folder, MODEL a name in it; SCORES.JSON has each task with its score.
    """
    from modelkin.run import read_scores
    from modelkin.run import tell as tell_run

    run = tell_run(folder, model, read_scores(scores))
    _print_run(run)


@app.command()
@click.argument("folder", type=PATH, metavar="DIR")
@click.argument("name")
@click.argument("out", type=PATH)
def materialise(folder: Path, name: str, out: Path) -> None:
    """Make a child of a run again, bit for bit as it was.

    DIR is a run folder, NAME the child's. The folder OUT appears whole or not at all.
    """
    from modelkin.run import materialise as materialise_child

    with _progress(unit="bytes") as progress:
        materialise_child(folder, name, out.resolve(), progress=progress)
    _console().print(f"made {out}", highlight=False)


@app.command()
@click.argument("folder", type=PATH, metavar="DIR")
def status(folder: Path) -> None:
    """Family, scores, gains and kinship of a run, and why it stopped.

    DIR is a run folder.
    """
    from modelkin.run import read_run

    _print_run(read_run(folder))


@app.command()
@click.argument("folders", nargs=-1, required=True, type=PATH, metavar="DIR...")
@click.option("-o", "--out", type=PATH, help="The page. By default report.html in the only DIR.")
def report(folders: tuple[Path, ...], out: Path | None) -> None:
    """Write a page about a run, or about several side by side.

    It opens offline. DIR is a run folder.
    """
    from dataclasses import replace

    from modelkin.report import write_report
    from modelkin.run import read_run

    out = out or (folders[0] if len(folders) == 1 else Path()) / "report.html"
    sources = [read_run(folder.resolve()).source() for folder in folders]
    check_target(out)
    if len({source.name for source in sources}) < len(sources):
        named = zip(sources, folders, strict=True)
        sources = [replace(source, name=str(folder)) for source, folder in named]
    write_report(out, sources)
    _console().print(f"Report: {out}", highlight=False, soft_wrap=True)


@app.command()
@click.argument("folder", type=PATH, metavar="DIR")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, help="0 takes a free one.")
def serve(folder: Path, port: int) -> None:
    """Show a run's report in the browser, and keep it up to date while the run goes on.

    DIR is a run folder. Only this machine can see it.
    """
    from modelkin.serving import ReportServer

    with ReportServer(folder, port) as server:
        print(f"http://127.0.0.1:{server.server_port}/ shows {folder}; Ctrl-C stops it", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


@app.command()
@click.argument("table", type=PATH, metavar="MERGES.CSV")
@json_option
def analyse(table: Path, json_file: str | None) -> None:
    """Analyse a table of merges that others made, without weights.

    Columns are known by their heads: child, parent_1 and parent_2 (or parents, with ; between
    them), scores, and similarities of the parents such as pcc; also those of the Open LLM
    Leaderboard.
    """
    from modelkin.community import analyse_merges, print_findings, read_merges

    _check_outputs(json_file, None, None)
    found = analyse_merges(read_merges(table))
    if json_file:
        write_json(found.as_dict(), json_file)
    else:
        print_findings(found, _console())


@app.command()
@click.option("--data", type=PATH, metavar="FOLDER", help="Read these CSV files instead.")
@click.option("-o", "out", type=PATH, metavar="FILE", help="Draw a page to FILE, a .html.")
def replay(data: Path | None, out: Path | None) -> None:
    """Compute the paper's tables again from its own numbers.

    Shows where they come out otherwise, and every place where the paper disagrees with itself.
    """
    from modelkin.pages import check_pages, write_page
    from modelkin.replay import parts, print_parts, read_paper, replay_page

    if out:
        check_target(out)
        check_pages()
    paper = read_paper(data)
    found = parts(paper)
    print_parts(found, _console())
    if out:
        write_page(out, replay_page(paper, found))


@app.command()
@click.option("--out", type=PATH, default="demo-run", help="Where to put everything.")
@click.option("--seed", type=int, default=0, help="For training and breeding.")
def demo(out: Path, seed: int) -> None:
    """Train tiny models on this machine and breed them.

    By the strategies greedy, kinship and random, and by a uniform average of all.
    """
    from modelkin.demo import run_demo

    with _progress() as progress:
        result = run_demo(out.resolve(), seed=seed, progress=progress)
    result.print(_console())


def _check_outputs(json_file: str | None, csv_file: str | None, plot: str | None) -> None:
    """See that everything can be written before anything is computed."""
    if json_file == csv_file == "-":
        raise ConfigError("--json, --csv: expected at most one of them to be -, found both")
    for file in (json_file, csv_file, plot):
        if file and file != "-":
            check_target(file)
    if plot:
        from modelkin.heatmap import check_plot

        check_plot(plot)


def _print_plan(found: "Plan", folder: Path) -> None:
    console = _console()
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


def _print_asked(asked: "Asked", out: Path | None) -> None:
    """Recipes to the terminal or to files; what there is to say about them to stderr."""
    import yaml

    if asked.waiting:
        names = ", ".join(member.name for member in asked.waiting)
        print(f"Waiting for the scores of {names}.", file=sys.stderr)
    else:
        print(f"Stopped: {asked.stopped}.", file=sys.stderr)
    for name, folder in asked.absent.items():
        print(f"Needs {name}, expected in {folder}: materialise makes it there.", file=sys.stderr)
    if out:
        out.mkdir(parents=True, exist_ok=True)
    for position, (name, recipe) in enumerate(asked.recipes.items()):
        text = f"# {name}\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}"
        if out:
            (out / f"{name}.yaml").write_text(text, encoding="utf-8")
        else:
            print(("---\n" if position else "") + text, end="")


def _print_run(run: "Run") -> None:
    from modelkin.report import failure_lines, lead_sentence, prediction_lines, terminal_table

    console = _console()
    console.print(terminal_table(run.state, run.samples, width=console.width))
    for line in failure_lines(run.state):
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    unscored = ", ".join(m.name for m in run.state.members.values() if not m.settled)
    going_on = f"no scores yet of {unscored}" if unscored else "still going on, or interrupted"
    stopped = run.state.stopped
    console.print(
        f"Stopped: {stopped}." if stopped else f"Not finished: {going_on}.",
        highlight=False,
        soft_wrap=True,
    )
    for line in (*prediction_lines(run.state), lead_sentence(run.state, run.samples)):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"Report: {run.folder / 'report.html'}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
