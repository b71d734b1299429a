"""The loop, for one call of `evolve`: has done what the state says is next, and records it."""

import shutil
import time
from collections.abc import Iterable, Sequence

from modelkin.checkpoint import Checkpoint, delete_folder, fingerprint, open_checkpoint
from modelkin.errors import CheckpointError, LedgerError, MergeError
from modelkin.evaluating import Evaluator
from modelkin.evolution import top_k
from modelkin.measuring import measure
from modelkin.merging import Merger
from modelkin.progress import Bars
from modelkin.records import Failed, Measured
from modelkin.run.family import Family
from modelkin.similarity import kinship_from
from modelkin.state import Member, RunState
from modelkin.trial import Trial, conduct
from modelkin.workers import Workers


class Breeding:
    """Makes, measures and scores a family's members, generation after generation."""

    def __init__(
        self,
        family: Family,
        merger: Merger,
        evaluator: Evaluator | None,
        workers: Workers,
        bars: Bars,
    ) -> None:
        """Without an evaluator children are made and then wait for scores that are told."""
        self._family = family
        self._merger, self._evaluator = merger, evaluator
        self._workers, self._bars = workers, bars

    def breed(self) -> None:
        """Do what is left to do, until a rule says stop, or scores have to be told."""
        self._give_up_weights()
        if not self._family.state.generation:
            # Later ones are measured when all are settled: who is kept before that is chance.
            self._measure()
        while True:
            self._settle()
            self._measure()
            waiting = not all(member.settled for member in self._family.state.members.values())
            stop = waiting or self._family.advance() is not None
            self._family.report()
            if stop:
                return

    def _settle(self) -> None:
        """Merge and evaluate every member that is neither scored nor failed."""
        state = self._family.state
        unsettled = [member for member in state.members.values() if not member.settled]
        trials = []
        for member in unsettled:
            try:
                if self._family.not_flat:
                    self._remake(state, state.parents_of(member))
                trials.append(self._trial(member))
            except MergeError as error:
                self._family.record(Failed(member.id, "merge", str(error)))
        label = f"generation {state.generation}: " + (
            "merging and evaluating" if state.generation else "evaluating the foundations"
        )
        with self._bars.steps(label, len(trials)) as step:
            for _, events in self._workers.perform(
                lambda trial: conduct(trial, self._merger, self._evaluator), trials
            ):
                self._family.record(*events)
                self._give_up_weights()
                step()

    def _trial(self, member: Member) -> Trial:
        return Trial(
            model=member.id,
            name=member.name,
            pedigree=member.pedigree,
            folder=self._family.weights(member),
            fingerprint=member.fingerprint,
            config=self._family.recipe(member) if member.recipe else None,
            seed=member.recipe.seed if member.recipe else 0,
        )

    def _kept(self, state: RunState) -> list[Member]:
        """The members that were made and whose weights stay, failures left out."""
        keep = self._family.config.storage.keep
        present = [m for m in state.members.values() if m.fingerprint and not m.failure]
        if keep == "all":
            return present
        best = top_k(state, self._family.config.k) if keep == "top-k" else []
        stay = {member.id for member in best}
        return [member for member in present if member.id in stay or not member.parents]

    def _give_up_weights(self) -> None:
        """Delete the weights of settled children that are not to be kept."""
        if self._family.config.storage.keep == "all":
            return
        state = self._family.state
        stay = {member.id for member in self._kept(state)}
        for member in state.members.values():
            if member.parents and member.settled and member.id not in stay:
                delete_folder(self._family.weights(member))

    def _remake(self, state: RunState, members: Iterable[Member]) -> None:
        """Make children again whose weights are gone, from their recipes."""
        for member in members:
            folder = self._family.weights(member)
            if member.recipe is None or folder.exists():
                continue
            if self._family.not_flat:
                self._remake(state, state.parents_of(member))
            trial = self._trial(member)
            self._merger.merge(trial.config or {}, folder, seed=trial.seed)
            found = fingerprint(open_checkpoint(folder))
            # Scores may have been told of a child that was never made.
            if member.fingerprint not in (None, found):
                shutil.rmtree(folder)
                raise LedgerError(
                    f"{folder}: was deleted, and its recipe now gives other weights: expected "
                    f"the fingerprint {member.fingerprint}, found {found}"
                )

    def _measure(self) -> None:
        """Measure, in one pass, the kinship of every member kept that was not measured yet."""
        family = self._family
        state = family.state
        measured = {event.model for event in family.events if isinstance(event, Measured)}
        kept = self._kept(state)
        new = [member for member in kept if member.id not in measured]
        if not new:
            return
        self._remake(state, kept)
        began = time.monotonic()
        old = [member for member in kept if member.id in measured]
        known = family.measured
        names = [member.id for member in kept]
        if known is not None:
            known = known.select([name for name in known.models if name in names])
        try:
            stats = measure(
                family.base,
                [self._open(member) for member in (*old, *new)],
                known=known,
                cache=True,
                progress=self._bars.progress,
            )
        except CheckpointError:
            # One of them is at fault: without it the others can be measured.
            if not self._fail_unmeasurable(new):
                raise
            return self._measure()
        family.keep(stats)
        kinship = kinship_from(
            stats, base=family.base.name, total_parameters=family.base.parameters
        )
        seconds = (time.monotonic() - began) / len(new)
        family.record(
            *(
                Measured(
                    member.id,
                    {
                        other: kinship.similarity(member.id, other)
                        for other in stats.models[: len(old) + position]
                    },
                    seconds,
                )
                for position, member in enumerate(new)
            )
        )

    def _fail_unmeasurable(self, members: Sequence[Member]) -> bool:
        """Record a failure for each member that cannot be measured; whether there was one."""
        failures: list[Failed] = []
        for member in members:
            try:
                measure(self._family.base, [self._open(member)])
            except CheckpointError as error:
                if not member.parents:
                    raise
                failures.append(Failed(member.id, "measure", str(error)))
        self._family.record(*failures)
        return bool(failures)

    def _open(self, member: Member) -> Checkpoint:
        # The id as its name: those of the family may repeat a folder's.
        return open_checkpoint(self._family.weights(member), name=member.id)
