"""A run: the only place where things happen in time.

`evolution` decides, workers do, the ledger remembers; here they are joined. The state is always
the fold of the ledger, so resuming is not a special path: the same call goes on where it was.

`planning` looks ahead, `breeding` is the loop, `folder` reads what is there.
"""

import os
from pathlib import Path

from rich.progress import Progress

from modelkin.checkpoint import fingerprint, open_checkpoint
from modelkin.config import RunConfig, load_config
from modelkin.errors import ConfigError
from modelkin.evaluating import Cached, Evaluator, make_evaluator
from modelkin.ledger import LEDGER_FILE, open_ledger, read_events
from modelkin.merging import Mergekit, Merger
from modelkin.progress import Bars
from modelkin.records import Evaluation, Founded, Subject
from modelkin.run.breeding import Breeding
from modelkin.run.folder import Run, read_run
from modelkin.run.planning import Plan, open_models, plan
from modelkin.workers import InProcess, Workers

__all__ = ["Plan", "Run", "default_folder", "evaluate", "evolve", "plan", "read_run"]


def default_folder(run_file: Path) -> Path:
    """Where a run goes that was not told where: `runs/<name of the run file>` beside it."""
    return run_file.parent / "runs" / run_file.stem


def evaluate(
    model: str,
    config: RunConfig,
    *,
    cache: Path,
    progress: Progress | None = None,
) -> Evaluation:
    """Score one model as a run with these settings would.

    Args:
        model: a folder or Hub id, relative to the working directory.
        config: the settings.
        cache: where evaluations are kept, unless the settings say where.
        progress: where to show a bar.

    Raises:
        CheckpointError: `model` is no readable model.
        EvaluationError: it gave no scores.
    """
    checkpoint = open_checkpoint(model)
    evaluator = _evaluator(config, cache, Bars(progress))
    return evaluator.evaluate(
        Subject(checkpoint.name, checkpoint.name, str(checkpoint.folder), fingerprint(checkpoint))
    )


def evolve(
    config: RunConfig | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    merger: Merger | None = None,
    evaluator: Evaluator | None = None,
    workers: Workers | None = None,
    progress: Progress | None = None,
) -> Run:
    """Breed models: top-k greedy merging, with kinship-guided exploration by default.

    Implements Algorithm 1 of arXiv 2410.12613. Everything that happens is recorded in
    `out/ledger.db`; a run that was interrupted, however rudely, goes on when this is called again.

    Args:
        config: a run file, or settings (then `out` must be given).
        out: the run folder; default: `runs/<name>` beside the run file.
        merger, evaluator, workers: replace those that the settings describe.
        progress: where to show bars.

    Returns:
        The run as it ended.

    Raises:
        ConfigError: a setting is wrong; nothing was done.
        CheckpointError: a foundation model is not readable; nothing was done.
        LedgerError: the run folder belongs to other settings or models, or is in use.
        DiskFullError: the run can be resumed when there is room.
    """
    if not isinstance(config, RunConfig):
        out = out or default_folder(Path(config))
        config = load_config(Path(config))
    if out is None:
        raise ConfigError("evolve: expected 'out', the run folder, as no run file was given")
    folder = Path(out).resolve()
    bars = Bars(progress)
    # A model on the Hub may have moved on since the run began; the run has not.
    pinned: dict[tuple[str, str], str | None] = {
        (event.role, event.name): event.revision for event in _founded(folder)
    }
    base, foundations = open_models(config, pinned)
    fresh = not pinned
    cached = _evaluator(config, folder / "evaluations", bars, evaluator, load=fresh)
    if merger is None:
        merger = Mergekit(
            config.merge.options,
            trust_remote_code=config.trust_remote_code,
            on_progress=bars.inner("merging"),
        )
        merger.check(config.merge.config())
    with open_ledger(folder) as ledger:
        breeding = Breeding(
            config, folder, ledger, base, merger, cached, workers or InProcess(), bars
        )
        breeding.begin(foundations, cache_folder(config, folder / "evaluations"))
        breeding.breed()
        return Run(folder, breeding.state)


def _evaluator(
    config: RunConfig,
    cache: Path,
    bars: Bars,
    given: Evaluator | None = None,
    *,
    load: bool = False,
) -> Cached:
    evaluator = given or make_evaluator(
        config.evaluation,
        folder=config.folder,
        trust_remote_code=config.trust_remote_code,
        on_progress=bars.inner("prompts"),
        load=load,
    )
    return Cached(evaluator, cache_folder(config, cache))


def cache_folder(config: RunConfig, default: Path) -> Path:
    """Where evaluations are kept: where the settings say, or in `default`."""
    given = config.evaluation.cache
    return (config.folder / given if given else default).resolve()


def _founded(folder: Path) -> list[Founded]:
    """What a run began from, if it did."""
    if not (folder / LEDGER_FILE).exists():
        return []
    return [event for event in read_events(folder) if isinstance(event, Founded)]
