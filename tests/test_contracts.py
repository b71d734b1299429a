"""The real parts and their fakes keep the contracts of `contracts.py`, and facts of their own."""

import json
import shutil
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import llama_like, write_checkpoint
from contracts import EvaluatorContract, MergerContract, WorkersContract
from numpy.typing import NDArray
from pico import TASKS, items, tokenizer, write_model, write_tasks

from modelkin.checkpoint import as_float64, fingerprint, open_checkpoint
from modelkin.errors import ConfigError, EvaluationError, MergeError
from modelkin.evaluating import Cached, Command, Evaluator, Harness, Table
from modelkin.evaluating.cache import evaluation_id, read_evaluation
from modelkin.evaluating.command import CommandSettings
from modelkin.evaluating.harness import HarnessSettings, TaskSettings
from modelkin.evaluating.table import TableSettings
from modelkin.merging import Mergekit, Merger, Native
from modelkin.records import Subject, pedigree
from modelkin.testing import FunctionEvaluator, FunctionMerger, ShuffledWorkers
from modelkin.workers import InProcess, Workers

SUBJECT = Subject("a", "a", "/models/a", "fingerprint-of-a")
STRANGER = Subject("stranger", "stranger", "/models/stranger", "fingerprint-of-a-stranger")


# Mergers.


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, Path]]:
    """Two perturbed copies of one random model, with tokenizers and without."""
    folder = tmp_path_factory.mktemp("parents")
    base = write_model(folder / "base")

    def both(kind: str) -> tuple[Path, Path]:
        one, two = (
            write_model(
                folder / kind / name, like=base, seed=seed, with_tokenizer=kind == "tokenizer"
            )
            for seed, name in enumerate("ab", start=1)
        )
        return one, two

    return {kind: both(kind) for kind in ("tokenizer", "bare")}


def slerp(one: Path, two: Path, **changes: Any) -> dict[str, Any]:
    """mergekit's recipe for the mean of two models along the arc between them."""
    return {
        "merge_method": "slerp",
        "base_model": str(one),
        "models": [{"model": str(one)}, {"model": str(two)}],
        "dtype": "bfloat16",
        "parameters": {"t": 0.5},
        **changes,
    }


class TestMergekit(MergerContract):
    """The real mergekit, on models of a few thousand weights."""

    @pytest.fixture
    def merger(self) -> Merger:
        return Mergekit()

    @pytest.fixture(params=["tokenizer", "bare"])
    def good(
        self, request: pytest.FixtureRequest, parents: Mapping[str, tuple[Path, Path]]
    ) -> Mapping[str, Any]:
        return slerp(*parents[request.param])

    @pytest.fixture(params=["method", "model", "parameter"])
    def bad(
        self, request: pytest.FixtureRequest, parents: Mapping[str, tuple[Path, Path]]
    ) -> Mapping[str, Any]:
        one, two = parents["bare"]
        return {
            "method": slerp(one, two, merge_method="alchemy"),
            "model": slerp(one, one.parent / "nowhere"),
            "parameter": slerp(one, two, parameters={}),
        }[request.param]

    def test_the_child_is_a_language_model(
        self, merger: Merger, good: Mapping[str, Any], tmp_path: Path
    ) -> None:
        """The child loads with transformers, in its dtype, and gives finite logits."""
        import torch
        from transformers import AutoModelForCausalLM

        merger.merge(good, tmp_path / "child")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "child")
        assert model.dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.isfinite(model(torch.tensor([[1, 4, 5]])).logits).all()

    def test_the_tokenizer_comes_along(
        self, merger: Merger, parents: Mapping[str, tuple[Path, Path]], tmp_path: Path
    ) -> None:
        """A child has a tokenizer, that of its parents, exactly where they have one."""
        from transformers import AutoTokenizer

        for kind in ("tokenizer", "bare"):
            merger.merge(slerp(*parents[kind]), tmp_path / kind)
        assert not list((tmp_path / "bare").glob("tokenizer*"))
        found = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        assert found("abcx")["input_ids"] == tokenizer()("abcx")["input_ids"]

    def test_slerp_agrees_with_its_formula(
        self, merger: Merger, parents: Mapping[str, tuple[Path, Path]], tmp_path: Path
    ) -> None:
        """At least 99.9 % of the weights are within a bfloat16 unit of SLERP in float64."""
        one, two = parents["bare"]
        merger.merge(slerp(one, two), tmp_path / "child")
        found, near, count = (
            open_checkpoint(folder).tensors for folder in (tmp_path / "child", one, two)
        )
        good = total = 0
        for name, tensor in found.items():
            a_B, b_B = (
                as_float64(side[name].read(0, side[name].count), side[name].format)
                for side in (near, count)
            )
            expected_B = spherical_mean(a_B, b_B)
            unit_B = 2.0 ** (np.floor(np.log2(np.abs(expected_B) + 1e-38)) - 7)
            child_B = as_float64(tensor.read(0, tensor.count), tensor.format)
            good += int((np.abs(child_B - expected_B) <= unit_B).sum())
            total += expected_B.size
        assert good >= 0.999 * total

    def test_options_are_checked(self) -> None:
        """An option that mergekit does not have is named at once."""
        with pytest.raises(ConfigError, match=r"merge\.options\.cuba: mergekit has no such option"):
            Mergekit({"cuba": True})


class TestNative(TestMergekit):
    """Our own pass keeps the facts of mergekit, but for its options."""

    @pytest.fixture
    def merger(self) -> Merger:
        return Native()

    def test_options_are_checked(self) -> None:
        """It has none of mergekit's."""


def spherical_mean(a_B: NDArray[np.float64], b_B: NDArray[np.float64]) -> NDArray[np.float64]:
    """SLERP with t = 0.5 over one flattened tensor; straight where the angle is tiny."""
    cosine = a_B @ b_B / np.sqrt((a_B @ a_B) * (b_B @ b_B))
    if abs(cosine) > 0.9995:
        return (a_B + b_B) / 2
    angle = np.arccos(cosine)
    return (a_B + b_B) * np.sin(angle / 2) / np.sin(angle)


def copy_first(config: Mapping[str, Any], folder: Path) -> None:
    """A merge by copying the first model; fails where it is missing."""
    shutil.copytree(config["models"][0]["model"], folder, dirs_exist_ok=True)


class TestFunctionMerger(MergerContract):
    """The fake, around a function that copies."""

    @pytest.fixture
    def merger(self) -> Merger:
        return FunctionMerger(copy_first)

    @pytest.fixture
    def good(self, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
        folder = tmp_path_factory.mktemp("models") / "a"
        write_checkpoint(folder, llama_like(np.random.default_rng(0)))
        return {"merge_method": "copy", "models": [{"model": str(folder)}]}

    @pytest.fixture(params=["missing", "no model"])
    def bad(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> Mapping[str, Any]:
        folder = tmp_path_factory.mktemp("models") / "a"
        if request.param == "no model":
            write_checkpoint(folder, llama_like(np.random.default_rng(0)))
            (folder / "config.json").unlink()
        return {"merge_method": "copy", "models": [{"model": str(folder)}]}

    def test_a_multi_line_complaint_becomes_one_line(self, tmp_path: Path) -> None:
        """Whatever the function raises is told in one line, with the merge method's name."""

        def complain(config: Mapping[str, Any], folder: Path) -> None:
            raise RuntimeError("first\n  second")

        with pytest.raises(MergeError, match=r"^odd: RuntimeError: first second$"):
            FunctionMerger(complain).merge({"merge_method": "odd"}, tmp_path / "child")


# Evaluators.


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two lm-eval tasks with local data."""
    return write_tasks(tmp_path_factory.mktemp("lm-eval") / "tasks")


def asking(folder: Path, **changes: Any) -> HarnessSettings:
    """Settings of the harness for the local tasks."""
    given: dict[str, Any] = {
        "tasks": list(TASKS),
        "include_path": folder,
        "batch_size": 4,
        "device": "cpu",
        "dtype": "float32",
    }
    return HarnessSettings(**{**given, **changes})


def subject_of(folder: Path) -> Subject:
    """A subject as a run would make it."""
    return Subject(folder.name, folder.name, str(folder), fingerprint(open_checkpoint(folder)))


@pytest.fixture(scope="module")
def harness(tasks: Path) -> Evaluator:
    """One harness for all tests: it keeps the tasks' data."""
    return Harness(asking(tasks), folder=tasks.parent)


class TestHarness(EvaluatorContract):
    """The real lm-evaluation-harness, on a real model."""

    tasks = TASKS

    @pytest.fixture
    def evaluator(
        self, harness: Evaluator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> Evaluator:
        # The data lie beside the YAML, wherever the process was started.
        monkeypatch.chdir(tmp_path)
        return harness

    @pytest.fixture
    def subject(self, parents: Mapping[str, tuple[Path, Path]]) -> Subject:
        return subject_of(parents["tokenizer"][0])

    @pytest.fixture
    def failing(self, parents: Mapping[str, tuple[Path, Path]]) -> Subject:
        return subject_of(parents["bare"][0])

    def blame(self, failing: Subject) -> str:
        return r"lm-eval: .*okenizer"

    def test_accuracy_equals_a_plain_computation(
        self, evaluator: Evaluator, subject: Subject
    ) -> None:
        """The scores are those of a loop over the items with nothing but torch."""
        scores = evaluator.evaluate(subject).scorecard.scores
        assert scores["pick"].value == pytest.approx(float(np.mean(picked(subject.folder))))
        assert scores["say"].value == pytest.approx(float(np.mean(said(subject.folder))))
        assert 0 < scores["pick"].value < 1

    def test_outcomes_are_of_the_items(self, evaluator: Evaluator, subject: Subject) -> None:
        """Item by item the outcomes are those of the plain computation."""
        samples = evaluator.evaluate(subject).samples
        expected = {str(item): float(right) for item, right in enumerate(picked(subject.folder))}
        assert samples["pick"] == expected

    def test_the_limit_takes_the_first_items(self, tasks: Path, subject: Subject) -> None:
        """With a limit the first items are asked, and n says how many."""
        evaluation = Harness(asking(tasks, limit=7), folder=tasks).evaluate(subject)
        assert evaluation.scorecard.scores["pick"].n == 7
        assert evaluation.samples["pick"] == {
            str(item): float(right) for item, right in enumerate(picked(subject.folder)[:7])
        }

    @pytest.mark.parametrize(
        "change",
        [
            {"tasks": ["pick"]},
            {"tasks": ["say", "pick"]},
            {"tasks": ["pick", TaskSettings(task="say", metric="acc")]},
            {"tasks": ["pick", TaskSettings(task="say", num_fewshot=1)]},
            {"limit": 7},
            {"num_fewshot": 2},
            {"dtype": "bfloat16"},
        ],
        ids=str,
    )
    def test_a_setting_that_matters_is_another_protocol(
        self, harness: Evaluator, tasks: Path, change: dict[str, Any]
    ) -> None:
        """Tasks, examples, limit and dtype are part of what is asked."""
        assert Harness(asking(tasks, **change), folder=tasks).protocol != harness.protocol

    @pytest.mark.parametrize(
        "change", [{"batch_size": 8}, {"device": "cuda:3"}, {"cache": Path("here")}], ids=str
    )
    def test_a_setting_that_does_not_matter_is_the_same_protocol(
        self, harness: Evaluator, tasks: Path, change: dict[str, Any]
    ) -> None:
        """Where and in what batches models run is not part of what is asked."""
        assert Harness(asking(tasks, **change), folder=tasks).protocol == harness.protocol

    @pytest.mark.parametrize("file", ["pick.yaml", "data/say.jsonl"])
    def test_the_tasks_files_are_part_of_the_protocol(
        self, harness: Evaluator, tasks: Path, tmp_path: Path, file: str
    ) -> None:
        """A changed task or data file asks something else; a folder that was moved does not."""
        moved = shutil.copytree(tasks, tmp_path / "moved")
        assert Harness(asking(moved), folder=tmp_path).protocol == harness.protocol
        assert Harness(asking(Path("moved")), folder=tmp_path).protocol == harness.protocol
        (moved / file).write_text((moved / file).read_text(encoding="utf-8") + "\n")
        assert Harness(asking(moved), folder=tmp_path).protocol != harness.protocol

    def test_an_unknown_metric_is_named(self, tasks: Path) -> None:
        """A metric that the task does not report is named with those that it does."""
        wanted = TaskSettings(task="pick", metric="charm")
        evaluator = Harness(asking(tasks, tasks=[wanted]), folder=tasks)
        with pytest.raises(ConfigError, match="expected the metric charm, found acc"):
            evaluator.load_tasks()

    def test_a_group_without_an_aggregate_is_the_mean_of_its_items(
        self, tasks: Path, subject: Subject
    ) -> None:
        """The score of a group that declares none is the mean over its tasks' items."""
        (tasks / "both.yaml").write_text(f"group: both\ntask: [{', '.join(TASKS)}]\n")
        found = Harness(asking(tasks, tasks=["both"]), folder=tasks).evaluate(subject)
        alone = Harness(asking(tasks), folder=tasks).evaluate(subject)
        items = [value for task in TASKS for value in alone.samples[task].values()]
        assert sorted(found.samples["both"].values()) == sorted(items)
        assert found.scorecard.average == pytest.approx(sum(items) / len(items))

    def test_a_metric_of_which_less_is_better_is_refused(self, tasks: Path) -> None:
        """Breeding takes the highest score, so a metric like perplexity is not taken for one."""
        path = tasks / f"{TASKS[0]}.yaml"
        path.write_text(
            path.read_text().replace("higher_is_better: true", "higher_is_better: false")
        )
        with pytest.raises(ConfigError, match="expected a metric of which more is better"):
            Harness(asking(tasks, tasks=[TASKS[0]]), folder=tasks).load_tasks()

    def test_a_tag_is_refused_before_any_work(self, tasks: Path) -> None:
        """A tag stands for several tasks and has no score; the error names them."""
        path = tasks / f"{TASKS[0]}.yaml"
        path.write_text(path.read_text() + "tag: mine\n")
        with pytest.raises(ConfigError, match=f"'mine' is a tag .* name its tasks: {TASKS[0]}"):
            Harness(asking(tasks, tasks=["mine"]), folder=tasks).load_tasks()


def log_probabilities(folder: str, prompt: str, answer: str) -> tuple[float, bool]:
    """Log-probability of an answer after a prompt, and whether greedy decoding gives it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = _MODELS.get(folder)
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        _MODELS[folder] = model
    tokens = tokenizer()(prompt + answer, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = torch.log_softmax(model(tokens).logits[0, :-1].double(), dim=-1)
    start, target = -len(answer), tokens[0, 1:]
    value = found[range(len(target)), target][start:].sum()
    return float(value), bool((found[start:].argmax(-1) == target[start:]).all())


_MODELS: dict[str, Any] = {}


def picked(folder: str) -> list[bool]:
    """For each item of `pick`, whether the likeliest choice is the right one."""
    return [
        int(np.argmax([log_probabilities(folder, item["question"], c)[0] for c in item["choices"]]))
        == item["gold"]
        for item in items("pick")
    ]


def said(folder: str) -> list[bool]:
    """For each item of `say`, whether the model says the answer."""
    return [log_probabilities(folder, item["question"], item["answer"])[1] for item in items("say")]


SCRIPT = """\
import json, pathlib, sys
name = pathlib.Path(sys.argv[1]).name
print("thinking about", name)
if name == "stranger":
    print("a warning", file=sys.stderr)
    sys.exit("stranger: I do not talk to strangers")
print(json.dumps({"maths": len(name) / 8, "extra": 5, "qa": 1}))
"""


def running(script: Path, *, tasks: list[str] | None = None) -> Command:
    """The evaluator that runs a script of its folder."""
    settings = CommandSettings(
        evaluator="command",
        command=[sys.executable, script.name, "{model}"],
        tasks=tasks or ["qa", "maths"],
    )
    return Command(settings, folder=script.parent)


def script(folder: Path, text: str) -> Path:
    """A Python script to run."""
    path = folder / "score.py"
    path.write_text(text, encoding="utf-8")
    return path


class TestCommand(EvaluatorContract):
    """A real program."""

    tasks = ("qa", "maths")

    @pytest.fixture
    def evaluator(self, tmp_path: Path) -> Evaluator:
        return running(script(tmp_path, SCRIPT))

    @pytest.fixture
    def subject(self) -> Subject:
        return SUBJECT

    @pytest.fixture
    def failing(self) -> Subject:
        return STRANGER

    def blame(self, failing: Subject) -> str:
        return rf"exit status 1: {failing.name}: I do not talk to strangers"

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", r"expected \{\"task\": score\} as JSON, found ''"),
            ("print('hello')", r"as JSON, found 'hello'"),
            ("print('[1, 2]')", r"as JSON, found '\[1, 2\]'"),
            ("print('{\"qa\": 1}')", r"task 'maths': expected a number, found None"),
            ('print(\'{"qa": NaN, "maths": 1}\')', r"task 'qa': expected a finite number"),
            ('print(\'{"qa": 1, "maths": 1e999}\')', r"task 'maths': expected a finite number"),
            ('print(\'{"qa": true, "maths": 1}\')', r"task 'qa': expected a number, found True"),
            ('print(\'{"qa": "1", "maths": 1}\')', r"task 'qa': expected a number, found '1'"),
            ("import sys; sys.exit(1)", r"exit status 1: it printed no error"),
            ("import os; os.kill(os.getpid(), 9)", r"exit status -9"),
            ("import sys; sys.stdout.buffer.write(b'\\xff')", r"as JSON, found"),
            ("import sys; sys.stderr.buffer.write(b'\\xff'); sys.exit(1)", r"exit status 1"),
        ],
    )
    def test_output_that_is_no_score_is_named(
        self, tmp_path: Path, text: str, complaint: str
    ) -> None:
        """A program that fails, or prints no JSON, no number or NaN, is told what was found."""
        with pytest.raises(EvaluationError, match=complaint):
            running(script(tmp_path, text)).evaluate(SUBJECT)

    def test_a_program_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        """A command that cannot be run is named."""
        settings = CommandSettings(
            evaluator="command", command=["./juggle", "{model}"], tasks=["qa"]
        )
        with pytest.raises(EvaluationError, match=r"\./juggle: cannot be run"):
            Command(settings, folder=tmp_path).evaluate(SUBJECT)

    def test_a_program_may_be_given_as_text(self, tmp_path: Path) -> None:
        """Words of any length are arguments, not files."""
        text = f"# {'x' * 5000}\nprint('{{\"qa\": 0.5}}')"
        settings = CommandSettings(
            evaluator="command", command=[sys.executable, "-c", text, "{model}"], tasks=["qa"]
        )
        card = Command(settings, folder=tmp_path).evaluate(SUBJECT).scorecard
        assert card.average == 0.5

    def test_the_protocol_is_the_command_its_files_and_the_tasks(self, tmp_path: Path) -> None:
        """A changed script or task list is another protocol; the same ones are the same."""
        path = script(tmp_path, SCRIPT)
        before = running(path).protocol
        assert running(path).protocol == before
        assert running(path, tasks=["qa"]).protocol != before
        script(tmp_path, SCRIPT + "# changed\n")
        assert running(path).protocol != before


TABLE = """\
model,parent_1,parent_2,qa,maths,note
a,,,0.5,7,"first, and foremost"
b,,,0.25,8,
ab,a,b,0.75,9,
blank,,,,1,
nan,,,nan,1,
short,,
"""


def looking_up(folder: Path, text: str = TABLE, tasks: tuple[str, ...] = ("qa", "maths")) -> Table:
    """A table of recorded scores."""
    (folder / "scores.csv").write_text(text, encoding="utf-8")
    settings = TableSettings(evaluator="table", path=Path("scores.csv"), tasks=list(tasks))
    return Table(settings, folder=folder)


class TestTable(EvaluatorContract):
    """A real CSV file."""

    tasks = ("qa", "maths")

    @pytest.fixture
    def evaluator(self, tmp_path: Path) -> Evaluator:
        return looking_up(tmp_path)

    @pytest.fixture(params=["a", pedigree("b", "a")], ids=["foundation", "child"])
    def subject(self, request: pytest.FixtureRequest) -> Subject:
        return replace(SUBJECT, pedigree=request.param)

    @pytest.fixture(params=["stranger", "(a+stranger)", "ab", "(b+a)"])
    def failing(self, request: pytest.FixtureRequest) -> Subject:
        return replace(STRANGER, pedigree=request.param)

    def blame(self, failing: Subject) -> str:
        return r"has no row for "

    @pytest.mark.parametrize("name", ["blank", "nan", "short"])
    def test_a_cell_without_number_is_named(self, tmp_path: Path, name: str) -> None:
        """A cell that is empty, NaN or missing is named by row and column."""
        with pytest.raises(EvaluationError, match=rf"{name}, column qa: expected a number"):
            looking_up(tmp_path).evaluate(replace(SUBJECT, pedigree=name))

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("", "expected a column 'model'"),
            ("model,qa\na,1\n", "expected a column 'maths'"),
            ("model,qa,maths,parent_1,parent_2\nx,1,1,x,x\n", "'x' is its own ancestor"),
            ("model,qa,maths,parent_1,parent_2\nx,1,1,y,z\n", "its parent 'y' has no row"),
        ],
    )
    def test_a_table_that_is_none_is_refused(
        self, tmp_path: Path, text: str, complaint: str
    ) -> None:
        """A table without the columns, or with an impossible family, is the settings' fault."""
        with pytest.raises(ConfigError, match=complaint):
            looking_up(tmp_path, text)

    def test_the_protocol_is_the_content_and_the_tasks(self, tmp_path: Path) -> None:
        """Changed numbers or tasks are another protocol; another place is not."""
        before = looking_up(tmp_path).protocol
        (tmp_path / "elsewhere").mkdir()
        assert looking_up(tmp_path / "elsewhere").protocol == before
        assert looking_up(tmp_path, tasks=("qa",)).protocol != before
        assert looking_up(tmp_path, TABLE.replace("0.75", "0.76")).protocol != before


def outcomes(subject: Subject) -> Mapping[str, float | Mapping[str, float]]:
    """Made-up scores of any model but the stranger."""
    if subject.name == "stranger":
        return {"qa": float("nan")}
    return {"qa": {"0": 1.0, "1": 0.0, "2": 1.0}, "maths": 0.1 * len(subject.name)}


class TestFunctionEvaluator(EvaluatorContract):
    """The fake."""

    tasks = ("qa", "maths")

    @pytest.fixture
    def evaluator(self) -> Evaluator:
        return FunctionEvaluator(outcomes)

    @pytest.fixture
    def subject(self) -> Subject:
        return SUBJECT

    @pytest.fixture
    def failing(self) -> Subject:
        return STRANGER


class TestCached(TestFunctionEvaluator):
    """The cache keeps the contract of what it wraps."""

    @pytest.fixture
    def evaluator(self, tmp_path: Path) -> Evaluator:
        return Cached(FunctionEvaluator(outcomes), tmp_path / "evaluations")

    @pytest.fixture
    def counted(self) -> tuple[list[str], Callable[..., FunctionEvaluator]]:
        """The names of models that were really evaluated, and an evaluator that notes them."""
        called: list[str] = []

        def note(subject: Subject) -> Mapping[str, float | Mapping[str, float]]:
            called.append(subject.name)
            return outcomes(subject)

        return called, lambda protocol="p": FunctionEvaluator(note, protocol=protocol)

    def test_equal_weights_are_evaluated_once(
        self, counted: tuple[list[str], Callable[..., FunctionEvaluator]], tmp_path: Path
    ) -> None:
        """Weights are scored once a protocol, whatever the model's name, folder or process."""
        called, evaluator = counted
        first = Cached(evaluator(), tmp_path).evaluate(SUBJECT)
        renamed = replace(SUBJECT, name="b", pedigree="b", folder="/elsewhere")
        assert Cached(evaluator(), tmp_path).evaluate(renamed) == first
        assert called == ["a"]

    def test_another_protocol_or_model_is_evaluated(
        self, counted: tuple[list[str], Callable[..., FunctionEvaluator]], tmp_path: Path
    ) -> None:
        """Another protocol asks again, and so do other weights of the same name."""
        called, evaluator = counted
        for protocol in ("p", "q"):
            card = Cached(evaluator(protocol), tmp_path).evaluate(SUBJECT).scorecard
            assert card.protocol == protocol
        Cached(evaluator(), tmp_path).evaluate(replace(SUBJECT, fingerprint="other"))
        assert len(called) == 3
        assert len(list(tmp_path.iterdir())) == 3

    def test_a_failure_is_not_kept(
        self, counted: tuple[list[str], Callable[..., FunctionEvaluator]], tmp_path: Path
    ) -> None:
        """A model that failed is asked again, and leaves no file."""
        called, evaluator = counted
        for _ in range(2):
            with pytest.raises(EvaluationError):
                Cached(evaluator(), tmp_path).evaluate(STRANGER)
        assert called == ["stranger", "stranger"]
        assert list(tmp_path.iterdir()) == []

    def test_a_file_reads_back_as_the_evaluation(self, tmp_path: Path) -> None:
        """The file named by weights and protocol holds the evaluation, and equal ones are equal."""
        for folder in (tmp_path / "one", tmp_path / "two"):
            evaluation = Cached(FunctionEvaluator(outcomes), folder).evaluate(SUBJECT)
            file = f"{evaluation_id(SUBJECT.fingerprint, 'function')}.jsonl.gz"
            assert read_evaluation(folder / file) == evaluation
            assert [path.name for path in folder.iterdir()] == [file]
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()

    @pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "other"])
    def test_a_damaged_file_is_named_and_replaced(self, tmp_path: Path, damage: str) -> None:
        """A file that is not readable is named when read, and is as good as none to the cache."""
        import gzip

        cached = Cached(FunctionEvaluator(outcomes), tmp_path)
        cached.evaluate(SUBJECT)
        (path,) = tmp_path.iterdir()
        content = path.read_bytes()
        middle = len(content) // 2
        damaged = {
            "cut": content[:middle],
            "flipped": content[:middle] + b"\xff\xff\xff\xff" + content[middle + 4 :],
            "empty": b"",
            "text": b"scores: all good",
            "other": gzip.compress(json.dumps({"scores": [1], "protocol": "p"}).encode()),
        }[damage]
        path.write_bytes(damaged)
        with pytest.raises(EvaluationError, match=rf"{path.name}: is no readable evaluation"):
            read_evaluation(path)
        cached.evaluate(SUBJECT)
        assert path.read_bytes() == content

    def test_files_can_be_shared(self, tmp_path: Path) -> None:
        """A stored evaluation may be read by whoever may read the run's other files."""
        Cached(FunctionEvaluator(outcomes), tmp_path).evaluate(SUBJECT)
        (path,) = tmp_path.iterdir()
        (tmp_path / "plain").touch()
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(
            (tmp_path / "plain").stat().st_mode
        )


# Workers.


class TestInProcess(WorkersContract):
    """One after the other."""

    def workers(self) -> Workers:
        return InProcess()

    def test_results_come_in_order_as_they_are_done(self) -> None:
        """A job is done when its result is asked for, not before."""
        done: list[int] = []
        results = InProcess().perform(done.append, [1, 2, 3])
        assert next(results) == (1, None)
        assert done == [1]


class TestShuffledWorkers(WorkersContract):
    """The fake."""

    def workers(self) -> Workers:
        return ShuffledWorkers(seed=5)

    @pytest.mark.parametrize("seed", range(5))
    def test_neither_work_nor_results_are_in_order(self, seed: int) -> None:
        """Jobs are done in another order than given, and come back in another, too."""
        done: list[int] = []
        found = [job for job, _ in ShuffledWorkers(seed).perform(done.append, range(4))]
        assert done != [0, 1, 2, 3] != found
        assert sorted(done) == sorted(found) == [0, 1, 2, 3]
