"""What every Merger, Evaluator and Workers promises, written once as tests.

`test_contracts.py` subclasses each suite for the real parts and for the fakes of
`modelkin.testing`; whoever writes another part may do the same.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from modelkin.checkpoint import fingerprint, open_checkpoint
from modelkin.errors import ConfigError, EvaluationError, MergeError
from modelkin.evaluating import Evaluator
from modelkin.merging import Merger
from modelkin.records import Subject
from modelkin.workers import Workers


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every weight file in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


class MergerContract:
    """A merger makes a whole model, or nothing."""

    @pytest.fixture
    def merger(self) -> Merger:
        """The merger to test."""
        raise NotImplementedError

    @pytest.fixture
    def good(self) -> Mapping[str, Any]:
        """A configuration that it can carry out."""
        raise NotImplementedError

    @pytest.fixture
    def bad(self) -> Mapping[str, Any]:
        """A configuration that it cannot carry out."""
        raise NotImplementedError

    def test_out_is_whole(self, merger: Merger, good: Mapping[str, Any], tmp_path: Path) -> None:
        """The folder is a readable model with the recipe in it, and nothing is left beside it."""
        out = tmp_path / "children" / "child"
        merger.merge(good, out, seed=3)
        assert open_checkpoint(out).tensors
        record = json.loads((out / "modelkin.json").read_text(encoding="utf-8"))
        assert record == {"recipe": dict(good), "seed": 3}
        assert [path.name for path in out.parent.iterdir()] == ["child"]

    def test_a_bad_recipe_leaves_nothing(
        self, merger: Merger, bad: Mapping[str, Any], tmp_path: Path
    ) -> None:
        """A recipe that gives no model raises MergeError in one line, and no file is left."""
        out = tmp_path / "children" / "child"
        with pytest.raises(MergeError) as caught:
            merger.merge(bad, out)
        assert str(caught.value)
        assert "\n" not in str(caught.value)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    def test_after_a_bad_recipe_comes_a_good_one(
        self, merger: Merger, good: Mapping[str, Any], bad: Mapping[str, Any], tmp_path: Path
    ) -> None:
        """A failed merge does not stand in the way of the next one into the same folder."""
        out = tmp_path / "child"
        with pytest.raises(MergeError):
            merger.merge(bad, out)
        merger.merge(good, out)
        assert open_checkpoint(out).tensors

    def test_remains_of_a_killed_merge_go_away(
        self, merger: Merger, good: Mapping[str, Any], tmp_path: Path
    ) -> None:
        """What a killed process left of the same child, and of no other, goes at the next merge."""
        remains = tmp_path / ".child.abcd1234.partial" / "child"
        others = tmp_path / ".child.v2.abcd1234.partial" / "child.v2"
        for folder in (remains, others):
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_bytes(b"half")
        merger.merge(good, tmp_path / "child")
        assert {path.name for path in tmp_path.iterdir()} == {"child", others.parent.name}

    def test_an_existing_folder_is_not_touched(
        self, merger: Merger, good: Mapping[str, Any], tmp_path: Path
    ) -> None:
        """Merging into a folder that exists raises ConfigError and changes nothing in it."""
        (tmp_path / "note").write_text("mine")
        with pytest.raises(ConfigError, match="does not exist yet"):
            merger.merge(good, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["note"]

    def test_equal_inputs_give_equal_weights(
        self, merger: Merger, good: Mapping[str, Any], tmp_path: Path
    ) -> None:
        """The same recipe and seed give the same bytes and the same fingerprint."""
        for name in ("one", "two"):
            merger.merge(good, tmp_path / name / "child", seed=1)
        one, two = tmp_path / "one" / "child", tmp_path / "two" / "child"
        assert weights(one) == weights(two)
        assert fingerprint(open_checkpoint(one)) == fingerprint(open_checkpoint(two))


class EvaluatorContract:
    """An evaluator gives finite, repeatable scores for the tasks of its protocol, or raises."""

    tasks: tuple[str, ...]

    @pytest.fixture
    def evaluator(self) -> Evaluator:
        """The evaluator to test, with `tasks`."""
        raise NotImplementedError

    @pytest.fixture
    def subject(self) -> Subject:
        """A model that it can score."""
        raise NotImplementedError

    @pytest.fixture
    def failing(self) -> Subject:
        """A model that it cannot score."""
        raise NotImplementedError

    def test_scores_cover_the_tasks(self, evaluator: Evaluator, subject: Subject) -> None:
        """Every task of the protocol has a finite score, in order, and so has the average."""
        card = evaluator.evaluate(subject).scorecard
        assert tuple(card.scores) == self.tasks
        assert all(math.isfinite(score.value) for score in card.scores.values())
        assert card.average == pytest.approx(
            math.fsum(score.value for score in card.scores.values()) / len(self.tasks)
        )

    def test_the_scorecard_names_the_protocol(self, evaluator: Evaluator, subject: Subject) -> None:
        """A scorecard carries the fingerprint of what was asked."""
        assert evaluator.evaluate(subject).scorecard.protocol == evaluator.protocol

    def test_equal_subjects_score_equally(self, evaluator: Evaluator, subject: Subject) -> None:
        """Asking the same of the same model twice gives equal scores and outcomes."""
        assert evaluator.evaluate(subject) == evaluator.evaluate(subject)

    def test_outcomes_average_to_the_score(self, evaluator: Evaluator, subject: Subject) -> None:
        """Where outcomes of single items are kept, their mean is the score and n their number."""
        evaluation = evaluator.evaluate(subject)
        for task, items in evaluation.samples.items():
            score = evaluation.scorecard.scores[task]
            assert score.n == len(items)
            assert score.value == pytest.approx(math.fsum(items.values()) / len(items))

    def test_a_failure_names_what_failed(self, evaluator: Evaluator, failing: Subject) -> None:
        """A model that cannot be scored raises EvaluationError: one line that says what failed."""
        with pytest.raises(EvaluationError, match=self.blame(failing)) as caught:
            evaluator.evaluate(failing)
        assert "\n" not in str(caught.value)

    def blame(self, failing: Subject) -> str:
        """What the message must name, as a regular expression."""
        return failing.name


class WorkersContract:
    """Workers do every job exactly once."""

    def workers(self) -> Workers:
        """The workers to test."""
        raise NotImplementedError

    @pytest.mark.parametrize("count", [0, 1, 2, 7])
    def test_every_job_is_done_once(self, count: int) -> None:
        """Each job is carried out once and comes back once, with its own result."""
        done: list[int] = []

        def square(job: int) -> int:
            done.append(job)
            return job * job

        found = list(self.workers().perform(square, range(count)))
        assert sorted(done) == list(range(count))
        assert sorted(found) == [(job, job * job) for job in range(count)]

    def test_equal_jobs_are_all_done(self) -> None:
        """Jobs that are equal are still separate jobs."""
        assert list(self.workers().perform(str, [5, 5, 5])) == [(5, "5")] * 3

    def test_jobs_may_come_from_an_iterator(self) -> None:
        """Jobs are read from any iterable, once."""

        def jobs() -> Iterator[str]:
            yield from "abc"

        assert sorted(self.workers().perform(str.upper, jobs())) == [
            ("a", "A"), ("b", "B"), ("c", "C")
        ]  # fmt: skip

    def test_exceptions_reach_the_caller(self) -> None:
        """What a task raises is raised to the caller, unchanged."""
        error = EvaluationError("it broke")

        def task(job: int) -> int:
            if job == 2:
                raise error
            return job

        with pytest.raises(EvaluationError) as caught:
            list(self.workers().perform(task, range(4)))
        assert caught.value is error

    def test_workers_can_be_used_again(self) -> None:
        """After one batch, even one that failed, workers take the next."""
        workers = self.workers()
        with pytest.raises(ZeroDivisionError):
            list(workers.perform(lambda job: 1 // job, [0, 1]))
        assert sorted(workers.perform(abs, [-1, -2])) == [(-2, 2), (-1, 1)]
