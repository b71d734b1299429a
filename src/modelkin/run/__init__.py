"""A run: the only place where things happen in time.

`evolution` decides, workers do, the ledger remembers; here they are joined. The state is always
the fold of the ledger, so resuming is not a special path: the same call goes on where it was.

`planning` looks ahead, `family` begins, decides and remembers, `breeding` is the loop that has the
work done, `by_hand` is for people who do it themselves, `materialising` makes children again, and
`folder` reads what is there.
"""

import os
from pathlib import Path

from rich.progress import Progress

from modelkin.checkpoint import fingerprint, open_checkpoint
from modelkin.config import RunConfig, load_config
from modelkin.errors import ConfigError
from modelkin.evaluating import Cached, Evaluator, ToldSettings, make_evaluator
from modelkin.ledger import open_ledger
from modelkin.merging import EitherEngine, Merger
from modelkin.progress import Bars
from modelkin.records import Evaluation, Subject
from modelkin.report import check_report
from modelkin.run.breeding import Breeding
from modelkin.run.by_hand import Asked, ask, read_scores, tell
from modelkin.run.family import Family
from modelkin.run.folder import Run, read_run
from modelkin.run.materialising import materialise
from modelkin.run.planning import (
    Plan,
    begun_with,
    cache_folder,
    evaluations_folder,
    open_models,
    plan,
)
from modelkin.workers import InProcess, Workers

__all__ = [
    "Asked",
    "Plan",
    "Run",
    "ask",
    "default_folder",
    "evaluate",
    "evolve",
    "materialise",
    "plan",
    "read_run",
    "read_scores",
    "tell",
]


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
        MissingExtraError: what the settings need is not installed; nothing was done.
        CheckpointError: a foundation model is not readable; nothing was done.
        LedgerError: the run folder belongs to other settings or models, or is in use.
        DiskFullError: the run can be resumed when there is room.
    """
    check_report()
    if not isinstance(config, RunConfig):
        out = out or default_folder(Path(config))
        config = load_config(Path(config))
    if out is None:
        raise ConfigError("evolve: expected 'out', the run folder, as no run file was given")
    folder = Path(out).resolve()
    bars = Bars(progress)
    pinned = begun_with(folder)
    base, foundations = open_models(config, pinned)
    fresh = not pinned
    cached = _evaluator(config, folder / "evaluations", bars, evaluator, load=fresh)
    if merger is None:
        merger = EitherEngine(
            config.merge.options,
            trust_remote_code=config.trust_remote_code,
            progress=progress,
            on_progress=bars.inner("merging"),
        )
        merger.check(config.merge.config())
    told = evaluator is None and isinstance(config.evaluation, ToldSettings)
    with open_ledger(folder) as ledger:
        family = Family(config, folder, ledger, base, foundations, bars)
        family.begin(cached.protocol, evaluations_folder(config, folder))
        Breeding(family, merger, None if told else cached, workers or InProcess(), bars).breed()
        return Run(folder, family.state)


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
