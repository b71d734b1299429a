"""The run file: YAML to validated settings. Knows each component's settings, owns none of them.

Every mistake is one line that names the key, what was expected and what was found.
"""

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from modelkin.errors import ConfigError
from modelkin.evaluating import EvaluationSettings
from modelkin.evolution import EarlyStop, Explore, Limits, Rules, Strategy
from modelkin.merging import MergeSettings
from modelkin.records import Metric

# Names that children get; a foundation model called so could not be told from them.
_CHILD_NAME = re.compile(r"\d+-(\d+|exp)")


class Storage(BaseModel):
    """What of the children's weights stays on disk.

    Attributes:
        keep: `all`; `top-k`, the k best and those that are being made or scored; or `none` but the
            latter. What is given up can be made again from its recipe, if that is linear in each
            tensor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: Literal["all", "top-k", "none"] = "all"


class RunConfig(BaseModel):
    """A run: which models are bred, how they are chosen, merged and evaluated.

    Attributes:
        base: the common base, a folder or Hub id.
        models: name to folder or Hub id of at least two foundation models; a list of folders or
            ids names each by its last part.
        strategy, k, metric, seed, explore, limits, stop: see `evolution.Rules`.
        merge: see `merging.MergeSettings`.
        evaluation: see `evaluating`.
        storage: see `Storage`.
        trust_remote_code: whether models may bring Python code that is run.
        folder: from which relative paths are taken: the run file's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str
    models: dict[str, str]
    strategy: Strategy = "kinship"
    k: int = Field(default=3, ge=2)
    metric: Metric = "pcc"
    seed: int = Field(default=0, ge=0)
    explore: Explore = Explore()
    limits: Limits = Limits()
    stop: EarlyStop = EarlyStop()
    merge: MergeSettings
    evaluation: EvaluationSettings
    storage: Storage = Storage()
    trust_remote_code: bool = False
    folder: Path = Field(default=Path(), exclude=True)

    @field_validator("models", mode="before")
    @classmethod
    def _name_models(cls, models: Any) -> Any:
        if not isinstance(models, list):
            return models
        named: dict[str, Any] = {}
        for source in models:
            name = str(source).partition("@")[0].rstrip("/").rpartition("/")[2]
            if name in named:
                raise ValueError(
                    f"expected distinct names, found {name!r} twice "
                    f"({named[name]} and {source}); name them as a mapping"
                )
            named[name] = source
        return named

    @field_validator("models")
    @classmethod
    def _check_models(cls, models: dict[str, str]) -> dict[str, str]:
        if len(models) < 2:
            raise ValueError(f"expected at least 2 models, found {len(models)}")
        for name in models:
            if _CHILD_NAME.fullmatch(name):
                raise ValueError(
                    f"expected a name that no child will get (like 2-1 or 2-exp), found {name!r}"
                )
            if not name.strip() or not name.isprintable():
                raise ValueError(f"expected printable names, found {name!r}")
        return models

    @field_validator("evaluation", mode="before")
    @classmethod
    def _check_evaluation(cls, evaluation: Any) -> Any:
        # What is neither has no evaluator to choose its settings by.
        if not isinstance(evaluation, dict | BaseModel):
            raise ValueError(f"expected keys and values, found {type(evaluation).__name__}")
        return evaluation

    @model_validator(mode="after")
    def _check_room(self) -> "RunConfig":
        most = self.limits.evaluations
        if most is not None and most <= len(self.models):
            raise ValueError(
                f"limits.evaluations: expected more than the {len(self.models)} foundation "
                f"models, which are evaluated too, found {most}"
            )
        return self

    @property
    def rules(self) -> Rules:
        """The part that `evolution` decides by."""
        return Rules(
            strategy=self.strategy,
            k=self.k,
            metric=self.metric,
            seed=self.seed,
            explore=self.explore,
            limits=self.limits,
            stop=self.stop,
        )

    def source(self, given: str) -> str:
        """A folder as an absolute path, where `given` is one; a Hub id unchanged."""
        folder = self.folder / Path(given).expanduser()
        if folder.exists() or given.startswith((".", "/", "~")):
            return str(folder.resolve())
        return given


def load_config(path: Path) -> RunConfig:
    """Read a run file.

    Raises:
        ConfigError: in one line, the first key that is wrong.
    """
    return parse_config(load_yaml(path), folder=path.parent.resolve(), origin=str(path))


def parse_config(content: Any, *, folder: Path, origin: str = "config") -> RunConfig:
    """Validate settings; relative paths in them are taken from `folder`."""
    if not isinstance(content, dict):
        raise ConfigError(f"{origin}: expected keys and values, found {type(content).__name__}")
    if "folder" in content:
        raise ConfigError(f"{origin}: folder: unknown key; expected {_known_keys()}")
    try:
        return RunConfig.model_validate({**content, "folder": folder})
    except ValidationError as error:
        raise ConfigError(f"{origin}: {_first_problem(error)}") from error


def load_yaml(path: Path) -> Any:
    """Read YAML in which no key stands twice.

    Raises:
        ConfigError: the file cannot be read or is no YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML's own loader keeps the last of two equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<`: what it brings may be overridden
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"expected distinct keys, found {key!r} twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _known_keys() -> str:
    return ", ".join(name for name in RunConfig.model_fields if name != "folder")


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    location = list(problem["loc"])
    # Which kind of a union was tried is part of the location, and no key of the file.
    if location[:1] == ["evaluation"]:
        location[1:2] = ["evaluator"] if problem["type"] == "union_tag_invalid" else []
    where = ".".join(str(part) for part in location if part not in ("TaskSettings", "str"))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = f"; expected {_known_keys()}" if "." not in where else ""
        return f"{where}: unknown key{known}"
    if problem["type"] == "missing":
        return f"{where}: expected this key, found none"
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        return f"{where}: expected one of {context['expected_tags']}, found {context['tag']!r:.100}"
    if problem["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]}, found {problem['input']!r:.100}"
