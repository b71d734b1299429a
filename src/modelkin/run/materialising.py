"""A member's weights, made again from its recipe, into any folder."""

import shutil
import tempfile
from pathlib import Path

from rich.progress import Progress

from modelkin.checkpoint import fingerprint, open_checkpoint, whole_folder
from modelkin.config import load_config
from modelkin.errors import ConfigError, LedgerError
from modelkin.measuring.archive import read_statistics
from modelkin.merging import EitherEngine, Merger, fill, resolve_models
from modelkin.progress import Bars
from modelkin.run.family import flat_recipe_of
from modelkin.run.folder import RUN_FILE, STATISTICS_FILE, Run, lineage_of, read_run
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
        config = load_config(run.folder / RUN_FILE)
        self._config = config
        self._base, foundations = open_models(config, begun_with(run.folder))
        by_name = {model.name: model.folder for model in foundations}
        self._folders = {
            member.id: by_name[member.name]
            for member in run.state.members.values()
            if not member.parents
        }
        self._lineage = lineage_of(run.state, read_statistics(run.folder / STATISTICS_FILE))
        self._merger: Merger = EitherEngine(
            config.merge.options,
            trust_remote_code=config.trust_remote_code,
            progress=progress,
            on_progress=Bars(progress).inner("merging"),
        )

    def make(self, member: Member, out: Path) -> None:
        assert member.recipe is not None
        present = self._run.weights(member)
        if present.is_dir():
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

    def _copy(self, present: Path, out: Path) -> None:
        import json

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
                place = self._folders.get(parent.id) or self._run.weights(parent)
                if not place.is_dir():
                    place = Path(scratch) / parent.id
                    self.make(parent, place)
                places[f"parent_{number}"] = str(place)
            recipe = resolve_models(fill(member.recipe.config, places), self._config.folder)
            self._merger.merge(recipe, out, seed=member.recipe.seed)
