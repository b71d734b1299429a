"""Scores from lm-evaluation-harness: any of its tasks, and local task YAML.

The harness's own response cache is keyed by prompt and not by model; it is never used here.
"""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from modelkin.errors import (
    ConfigError,
    DiskFullError,
    EvaluationError,
    MissingExtraError,
    is_disk_full,
    one_line,
)
from modelkin.progress import OnProgress, tqdm_reports_to
from modelkin.records import Evaluation, Score, Scorecard, Subject, content_id

# The seed with which the harness draws few-shot examples by default.
FEWSHOT_SEED = 1234


class TaskSettings(BaseModel):
    """One task with settings of its own.

    Attributes:
        task: the name of a task or group.
        metric: which of its metrics is the score, as `acc_norm` or, where the task has several
            answer filters, `exact_match,strict-match`; default: the first one it reports.
        num_fewshot: number of examples in the prompt; default: the task's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    metric: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None


class HarnessSettings(BaseModel):
    """What lm-evaluation-harness is asked.

    Attributes:
        tasks: names of tasks or groups, or `TaskSettings`.
        include_path: folder of task YAML files of one's own; a relative path to local data in
            them is taken from the YAML file's folder.
        num_fewshot: for tasks that have none of their own and do not forbid it.
        limit: number of items a task, from the first; default: all.
        batch_size: number of prompts at once, or `auto`.
        device: such as `cpu` or `cuda:0`; `auto` takes a GPU where there is one.
        dtype: of the weights in memory; `auto` is the checkpoint's own.
        cache: folder for evaluations, shared between runs; default: in the run folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    evaluator: Literal["lm-eval"] = "lm-eval"
    tasks: Annotated[list[str | TaskSettings], Field(min_length=1)]
    include_path: Path | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    cache: Path | None = None

    def each_task(self) -> list[TaskSettings]:
        """The tasks, all in the long form."""
        return [TaskSettings(task=t) if isinstance(t, str) else t for t in self.tasks]


class Harness:
    """Evaluates with lm-evaluation-harness, as a library."""

    def __init__(
        self,
        settings: HarnessSettings,
        *,
        folder: Path,
        trust_remote_code: bool = False,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Check the settings; the tasks' data are loaded with the first model.

        Args:
            settings: what to ask.
            folder: from which relative paths are taken.
            trust_remote_code: whether models may bring code that is run.
            on_progress: called with the number of prompts answered and their total.
        """
        try:
            from importlib.metadata import version

            harness_version = version("lm_eval")
        except ImportError as error:
            raise MissingExtraError("lm-eval", "evolve") from error
        self._on_progress = on_progress
        self._settings = settings
        self._trust_remote_code = trust_remote_code
        self._include = (
            (folder / settings.include_path).resolve() if settings.include_path else None
        )
        if self._include and not self._include.is_dir():
            raise ConfigError(f"evaluation.include_path: no such folder: {self._include}")
        names = [task.task for task in settings.each_task()]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"evaluation.tasks: {name!r} is named twice")
        self._tasks: Mapping[str, Any] | None = None
        # Where and in what batches it runs is not part of what is asked.
        asked = settings.model_dump(mode="json", exclude={"batch_size", "device", "cache"})
        asked["include_path"] = _digest_folder(self._include) if self._include else None
        self._protocol = content_id({**asked, "lm_eval": harness_version})

    @property
    def protocol(self) -> str:
        """Fingerprint of the settings, the harness's version and all files of `include_path`."""
        return self._protocol

    def evaluate(self, subject: Subject) -> Evaluation:
        """Load the model and score it on every task."""
        import lm_eval.api.model
        import lm_eval.api.task
        import lm_eval.models.huggingface
        from lm_eval.evaluator import evaluate

        self.load_tasks()
        assert self._tasks is not None
        try:
            model = self._load_model(subject.folder)
            # Prompts are answered in one of these modules and prepared in the others.
            quiet = tqdm_reports_to(None, lm_eval.api.model, lm_eval.api.task)
            with quiet, tqdm_reports_to(self._on_progress, lm_eval.models.huggingface):
                results = evaluate(
                    lm=model,
                    task_dict=dict(self._tasks),
                    limit=self._settings.limit,
                    bootstrap_iters=0,
                    log_samples=True,
                )
        except ConfigError:
            raise
        except Exception as error:
            if is_disk_full(error):
                raise DiskFullError(f"lm-eval: the disk is full: {error}") from error
            # Whatever a model does to the libraries below is that model's failure.
            raise EvaluationError(f"lm-eval: {one_line(error)}") from error
        scores: dict[str, Score] = {}
        samples: dict[str, dict[str, float]] = {}
        for task in self._settings.each_task():
            scores[task.task], samples[task.task] = _read(task, results)
        return Evaluation(Scorecard(scores, self._protocol), samples)

    def load_tasks(self) -> None:
        """Load the tasks and their data now, and not with the first model.

        Raises:
            ConfigError: a task is unknown or its data cannot be loaded.
        """
        if self._tasks is None:
            self._tasks = self._load_tasks()

    def _load_model(self, folder: str) -> Any:
        import torch
        from lm_eval.models.huggingface import HFLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # one for each file would break up ours
        device = self._settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device.startswith("cuda") and not torch.cuda.is_available():
            # The harness would take the CPU without a word.
            raise ConfigError(f"evaluation.device: {device}: torch finds no such device here")
        return HFLM(
            pretrained=folder,
            dtype=self._settings.dtype,
            device=device,
            batch_size=self._settings.batch_size,
            trust_remote_code=self._trust_remote_code,
        )

    def _load_tasks(self) -> Mapping[str, Any]:
        """The harness's own task objects, with their data. Slow, so done once."""
        from datasets import disable_progress_bars
        from lm_eval.tasks import TaskManager

        disable_progress_bars()
        names = [task.task for task in self._settings.each_task()]
        include = str(self._include) if self._include else None
        manager = TaskManager(include_path=include, include_defaults=False) if include else None
        if manager is None or any(name not in manager.task_index for name in names):
            # Scanning all tasks that come with the harness takes many seconds.
            manager = TaskManager(include_path=include)
        for name in names:
            if name not in manager.task_index:
                raise ConfigError(
                    f"evaluation.tasks: {name!r} is no task of lm-eval"
                    + (f" nor of {self._include}" if self._include else "")
                )
            if manager.task_index[name].kind.name == "TAG":
                members = ", ".join(sorted(manager.task_index[name].tags))
                raise ConfigError(
                    f"evaluation.tasks: {name!r} is a tag and no task; name its tasks: {members}"
                )
        try:
            _make_data_absolute(manager.task_index)
            loaded: Mapping[str, Any] = manager.load(names)
        except Exception as error:
            raise ConfigError(
                f"evaluation.tasks: lm-eval cannot load them: {one_line(error)}"
            ) from error
        own: dict[str, int | None] = {}
        for asked in self._settings.each_task():
            for leaf in _leaves(asked.task, loaded.get("group_map", {})):
                _check_metric(asked, loaded["tasks"][leaf].higher_is_better())
                own[leaf] = asked.num_fewshot
        for name, task in loaded["tasks"].items():
            default = task.get_config("num_fewshot")
            # As in the harness: a task that says 0 is not to be given examples, unless the run
            # file says so of this very task.
            fewshot = own.get(name)
            if fewshot is None:
                fewshot = default if default == 0 else self._settings.num_fewshot or default or 0
            task.set_config(key="num_fewshot", value=fewshot)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        return loaded


def _check_metric(task: TaskSettings, higher_is_better: Mapping[str, bool]) -> None:
    """Refuse a metric that the task does not have, or of which less is better.

    Raises:
        ConfigError: breeding takes the highest score, so neither can be the score.
    """
    if not higher_is_better:
        return  # a task written in Python need not say
    metric = (task.metric or next(iter(higher_is_better))).partition(",")[0]
    if metric not in higher_is_better:
        raise ConfigError(
            f"evaluation.tasks: {task.task}: expected the metric {metric}, "
            f"found {', '.join(higher_is_better)}"
        )
    if higher_is_better[metric] is False:
        raise ConfigError(
            f"evaluation.tasks: {task.task}: expected a metric of which more is better, "
            f"found {metric}; name another with 'metric'"
        )


def _make_data_absolute(index: Mapping[str, Any]) -> None:
    """Give the local tasks of a task manager's index absolute paths to their data.

    The harness takes relative ones from the working directory, which would make a task folder
    depend on where the command was started.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    for entry in index.values():
        kwargs = (entry.cfg or {}).get("dataset_kwargs") or {}
        if entry.yaml_path is not None and "data_files" in kwargs:
            files = _absolute(kwargs["data_files"], Path(entry.yaml_path).parent)
            entry.cfg = load_yaml(entry.yaml_path, resolve_func=True) | {
                "dataset_kwargs": {**kwargs, "data_files": files}
            }
            entry.yaml_path = None  # or the file would be read again


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _absolute(value, folder) for split, value in files.items()}
    if isinstance(files, list):
        return [_absolute(value, folder) for value in files]
    return str(files) if "://" in str(files) else str((folder / files).resolve())


def _read(task: TaskSettings, results: Mapping[str, Any]) -> tuple[Score, dict[str, float]]:
    """One task's or group's score and per-sample outcomes out of the harness's results."""
    leaves = _leaves(task.task, results.get("group_subtasks", {}))
    metrics = [
        key
        for key, value in results["results"].get(leaves[0], {}).items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    ]
    chosen = [key for key in metrics if task.metric in (None, key, key.partition(",")[0])]
    if not chosen:
        raise ConfigError(
            f"evaluation.tasks: {task.task}: expected the metric {task.metric}, "
            f"found {', '.join(metrics) or 'none'}"
        )
    metric, _, answer_filter = chosen[0].partition(",")
    # The first one reported need not be the first one declared.
    reported_metric = TaskSettings(task=task.task, metric=metric)
    _check_metric(reported_metric, results["higher_is_better"].get(leaves[0], {}))
    outcomes = {
        (str(sample["doc_id"]) if len(leaves) == 1 else f"{leaf}/{sample['doc_id']}"): sample
        for leaf in leaves
        for sample in results["samples"][leaf]
        if sample["filter"] == answer_filter
    }
    if all(isinstance(sample.get(metric), int | float) for sample in outcomes.values()):
        samples = {item: float(sample[metric]) for item, sample in outcomes.items()}
    else:
        samples = {}  # not a mean over items
    n = len(outcomes)
    reported = results["results"] if task.task in leaves else results.get("groups", {})
    own = reported.get(task.task, {})
    # A group that says no mean of its own is the mean over all its items.
    value = float(own[chosen[0]] if chosen[0] in own else _mean(samples, task.task))
    if not math.isfinite(value):
        raise EvaluationError(f"lm-eval: task {task.task}: {chosen[0]} is {value}")
    variance = _variance(list(samples.values()))
    stderr = math.sqrt(variance / n) if variance is not None else None
    return Score(value, stderr, n), samples


def _mean(samples: Mapping[str, float], task: str) -> float:
    if not samples:
        raise ConfigError(f"evaluation.tasks: {task}: the group has no score; name its tasks")
    return sum(samples.values()) / len(samples)


def _leaves(name: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    if not subtasks.get(name):
        return [name]
    return [leaf for child in subtasks[name] for leaf in _leaves(child, subtasks)]


def _variance(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


class _TaskLoader(yaml.SafeLoader):
    """Reads task YAML without running the functions that it may name."""


_TaskLoader.add_multi_constructor("!", lambda *_: None)


def _local_data(task: Path) -> list[Path]:
    """The local data files that a task file names."""
    try:
        config = yaml.load(task.read_text(encoding="utf-8"), _TaskLoader)
    except (yaml.YAMLError, ValueError):
        return []  # no task: the harness passes it over, too
    kwargs = config.get("dataset_kwargs") if isinstance(config, dict) else None
    named = _absolute((kwargs or {}).get("data_files", []), task.parent)
    lists = named.values() if isinstance(named, dict) else [named]
    return [
        Path(file) for files in lists for file in ([files] if isinstance(files, str) else files)
    ]


def _digest_folder(folder: Path) -> dict[str, str]:
    """Content hashes of all files in the folder and of the local data that its tasks name."""
    files = {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
    for path in sorted(files):
        if path.suffix in (".yaml", ".yml"):
            files.update(_local_data(path))
    digests: dict[str, str] = {}
    for path in sorted(file for file in files if file.is_file()):
        with path.open("rb") as stream:
            # Relative, so that a folder that was moved asks the same.
            name = os.path.relpath(path, folder)
            digests[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests
