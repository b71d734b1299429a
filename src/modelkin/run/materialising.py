"""A member's weights, made again from its recipe, into any folder."""

import json
import shutil
import tempfile
from pathlib import Path

from rich.progress import Progress

from modelkin.checkpoint import fingerprint, open_checkpoint, whole_folder
from modelkin.errors import CheckpointError, ConfigError, LedgerError
from modelkin.measuring.archive import read_statistics
from modelkin.merging import EitherEngine, Merger, fill, resolve_models
from modelkin.progress import Bars
from modelkin.run.flat import flat_recipe_of, measure_foundations
from modelkin.run.folder import STATISTICS_FILE, Run, lineage_of, read_run, read_settings
from modelkin.run.planning import begun_with, open_models
from modelkin.state import Member


def materialise(folder: Path, name: str, out: Path, *, progress: Progress | None = None) -> None:
    """Make a child of a run in the folder `out`, bit for bit as it was.

    Args:
        folder: the run folder.
        name: the child's name or id.
        out: a folder that does not exist; it appears whole.
        progress: where to show bars.

    Raises:
        ConfigError: there is no such child, or `out` exists.
        CheckpointError: a foundation model is not where the run found it.
        LedgerError: `folder` is no run folder, or the weights are not those that it recorded.
        MergeError: it cannot be made.
        DiskFullError: the disk filled up.
    """
    run = read_run(folder.resolve())
    member = run.member(name)
    if member.recipe is None:
        raise ConfigError(
            f"{name}: expected a child, found a foundation model, which is in {member.source}"
        )
    if out.exists():
        raise ConfigError(f"{out}: expected a folder that does not exist yet")
    _Making(run, progress).make(member, out)


class _Making:
    """Makes members of one run."""

    def __init__(self, run: Run, progress: Progress | None) -> None:
        self._run = run
        config = read_settings(run.folder)
        self._config = config
        try:
            self._base, foundations = open_models(config, begun_with(run.folder))
        except CheckpointError as error:
            raise type(error)(
                f"{error}; if the models have moved, ask with a run file that says where they are"
            ) from error
        by_name = {model.name: model for model in foundations}
        by_id = {
            member.id: by_name[member.name]
            for member in run.state.members.values()
            if not member.parents
        }
        self._folders = {name: model.folder for name, model in by_id.items()}
        self._lineage = lineage_of(run.state, read_statistics(run.folder / STATISTICS_FILE))
        if self._lineage is None and run.state.predictions:
            # Lost, but the foundations are there.
            stats = measure_foundations(
                config.merge.config(), self._base, by_id, flat=True, progress=progress
            )
            self._lineage = lineage_of(run.state, stats)
        self._merger: Merger = EitherEngine(
            config.merge.options,
            trust_remote_code=config.trust_remote_code,
            progress=progress,
            on_progress=Bars(progress).inner("merging"),
        )

    def make(self, member: Member, out: Path) -> None:
        assert member.recipe is not None
        if present := self._present(member):
            self._copy(present, out)
        elif self._lineage:
            recipe = flat_recipe_of(
                self._lineage, self._run.state, member, self._folders, self._base.folder
            )
            self._merger.merge(recipe, out, seed=member.recipe.seed)
        else:
            self._make_of_parents(member, out)
        found = fingerprint(open_checkpoint(out))
        if member.fingerprint not in (None, found):
            shutil.rmtree(out)
            raise LedgerError(
                f"{self._run.folder}: {member.name}: expected the fingerprint "
                f"{member.fingerprint}, found {found}; the foundation models or the merging "
                "software have changed"
            )

    def _present(self, member: Member) -> Path | None:
        """Where a child's weights are, unless they were given up or are not what they were."""
        place = self._run.weights(member)
        try:
            found = fingerprint(open_checkpoint(place))
        except CheckpointError:
            return None
        return place if member.fingerprint in (None, found) else None

    def _copy(self, present: Path, out: Path) -> None:
        record = json.loads((present / "modelkin.json").read_text(encoding="utf-8"))
        with whole_folder(out, record=record) as partial:
            shutil.copytree(present, partial, dirs_exist_ok=True)

    def _make_of_parents(self, member: Member, out: Path) -> None:
        """A child whose recipe needs its parents' weights, which may need theirs."""
        assert member.recipe is not None
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".parents.", dir=out.parent) as scratch:
            places = {"base": str(self._base.folder)}
            for number, parent in enumerate(self._run.state.parents_of(member), start=1):
                place = self._folders.get(parent.id) or self._present(parent)
                if place is None:
                    place = Path(scratch) / parent.id
                    self.make(parent, place)
                places[f"parent_{number}"] = str(place)
            recipe = resolve_models(fill(member.recipe.config, places), self._config.folder)
            self._merger.merge(recipe, out, seed=member.recipe.seed)
