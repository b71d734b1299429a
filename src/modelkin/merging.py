"""Recipes to children: the seam to mergekit, and the templates that recipes are made from.

Knows mergekit's YAML, and nothing of families, scores or why these parents were chosen.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, model_validator

from modelkin.checkpoint import open_checkpoint, whole_folder
from modelkin.errors import (
    ConfigError,
    DiskFullError,
    MergeError,
    MissingExtraError,
    is_disk_full,
    one_line,
)
from modelkin.progress import OnProgress, tqdm_reports_to
from modelkin.records import canonical_json

_PARENTS: Mapping[str, Any] = {
    "base_model": "{parent_1}",
    "models": [{"model": "{parent_1}"}, {"model": "{parent_2}"}],
    "dtype": "bfloat16",
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The mean of both parents along the arc between them.
    "slerp": {"merge_method": "slerp", **_PARENTS, "parameters": {"t": 0.5}},
    # The paper's recipe, from the model cards of its authors: the share of the second parent
    # changes with depth, in opposite directions for attention and MLP.
    "paper": {
        "merge_method": "slerp",
        **_PARENTS,
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
    },
}
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class MergeSettings(BaseModel):
    """How children are made.

    Attributes:
        preset: a named template: `slerp` (t = 0.5) or `paper` (t by layer and module).
        template: a mergekit configuration of one's own, with `{parent_1}`, `{parent_2}` and
            `{base}` where the models go.
        tokenizer_source: mergekit's key of that name (`union` or `base`), for models whose
            vocabularies differ.
        options: mergekit's own options, such as `cuda` or `allow_crimes`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Literal["slerp", "paper"] | None = None
    template: dict[str, Any] | None = None
    tokenizer_source: str | None = None
    options: dict[str, bool | int | str] = {}

    @model_validator(mode="after")
    def _one_of_both(self) -> "MergeSettings":
        if (self.preset is None) == (self.template is None):
            raise ValueError("expected either 'preset' or 'template'")
        text = str(self.template)
        if self.template is not None:
            try:
                canonical_json(self.template)
            except (TypeError, ValueError) as error:
                raise ValueError(f"template: expected what JSON can hold: {error}") from error
            if "merge_method" not in self.template:
                raise ValueError("template: expected mergekit's key 'merge_method'")
            missing = [name for name in ("{parent_1}", "{parent_2}") if name not in text]
            if missing:
                raise ValueError(f"template: expected the placeholder {missing[0]}")
            unknown = set(_PLACEHOLDER.findall(text)) - {"parent_1", "parent_2", "base"}
            if unknown:
                raise ValueError(
                    "template: expected the placeholders {parent_1}, {parent_2} and {base}, "
                    f"found {{{min(unknown)}}}"
                )
        return self

    def config(self) -> dict[str, Any]:
        """The mergekit configuration with its placeholders."""
        config = copy.deepcopy(self.template or dict(PRESETS[self.preset or "slerp"]))
        if self.tokenizer_source:
            config["tokenizer_source"] = self.tokenizer_source
        return config


def fill(config: Any, models: Mapping[str, str]) -> Any:
    """A copy of `config` with the placeholders replaced.

    >>> fill({"models": [{"model": "{parent_1}"}]}, {"parent_1": "/m/a"})
    {'models': [{'model': '/m/a'}]}
    """
    if isinstance(config, str):
        return _PLACEHOLDER.sub(lambda match: models.get(match[1], match[0]), config)
    if isinstance(config, Mapping):
        return {key: fill(value, models) for key, value in config.items()}
    if isinstance(config, Sequence):
        return [fill(value, models) for value in config]
    return config


def resolve_models(config: Any, folder: Path) -> Any:
    """A copy of a mergekit configuration whose local models are absolute paths.

    Relative paths are taken from `folder`. A name that is no folder there is left to be a Hub id:
    mergekit takes any name that is not absolute for one.
    """

    def absolute(name: Any) -> Any:
        if isinstance(name, str) and (folder / Path(name).expanduser()).is_dir():
            return str((folder / Path(name).expanduser()).resolve())
        return name

    if isinstance(config, Mapping):
        return {
            key: absolute(value)
            if key in ("model", "base_model", "tokenizer_source", "source")
            else resolve_models(value, folder)
            for key, value in config.items()
        }
    if isinstance(config, list):
        return [resolve_models(value, folder) for value in config]
    return config


class Merger(Protocol):
    """Makes models out of models."""

    def merge(self, config: Mapping[str, Any], out: Path, *, seed: int = 0) -> None:
        """Make the folder `out` from a mergekit configuration with real paths.

        `out` appears whole, loadable and with `modelkin.json` in it, or not at all.

        Raises:
            MergeError: the merge did not give a model.
            ConfigError: `out` exists.
            DiskFullError: the disk filled up.
        """
        ...


class Mergekit:
    """Merges with mergekit, as a library, by any of its methods."""

    def __init__(
        self,
        options: Mapping[str, bool | int | str] | None = None,
        *,
        trust_remote_code: bool = False,
        on_progress: OnProgress | None = None,
    ) -> None:
        """`options` are mergekit's own; raises ConfigError where it does not accept them.

        `on_progress` is called with the number of tensor operations done and their total.
        """
        try:
            from mergekit.options import MergeOptions
        except ImportError as error:
            raise MissingExtraError("mergekit", "evolve") from error
        for key, value in (options or {}).items():
            if key not in MergeOptions.model_fields:
                raise ConfigError(f"merge.options.{key}: mergekit has no such option")
            try:
                MergeOptions(**{key: value})
            except Exception as error:
                raise ConfigError(f"merge.options.{key}: {one_line(error)}") from error
        self._on_progress = on_progress
        self._options = {
            "quiet": True,
            "trust_remote_code": trust_remote_code,
            **(options or {}),
        }

    def check(self, template: Mapping[str, Any]) -> None:
        """See whether mergekit would accept a template, before anything is merged by it.

        Raises:
            ConfigError: it would not.
        """
        from mergekit import merge_methods
        from mergekit.config import MergeConfiguration

        paths = {name: f"/{name}" for name in ("parent_1", "parent_2", "base")}
        try:
            merge_methods.get(MergeConfiguration.model_validate(fill(template, paths)).merge_method)
        except Exception as error:  # mergekit raises RuntimeError from inside its validators
            raise ConfigError(f"merge: mergekit does not accept it: {one_line(error)}") from error

    def merge(self, config: Mapping[str, Any], out: Path, *, seed: int = 0) -> None:
        """See `Merger.merge`."""
        import mergekit.graph
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        try:
            parsed = MergeConfiguration.model_validate(dict(config))
            referenced = [str(model.model.path) for model in parsed.referenced_models()]
        except Exception as error:  # mergekit raises RuntimeError from inside its validators
            raise MergeError(f"mergekit does not accept this recipe: {one_line(error)}") from error
        if not referenced:
            raise MergeError("mergekit does not accept this recipe: it names no model")

        def run(folder: Path) -> None:
            donor = Path(str(parsed.base_model.model.path) if parsed.base_model else referenced[0])
            # Without a tokenizer mergekit would look for one on the Hub.
            tokenizer = not donor.is_dir() or any(donor.glob("tokenizer*"))
            given = {"copy_tokenizer": tokenizer, "random_seed": seed, **self._options}
            options = MergeOptions(**given)
            with tqdm_reports_to(self._on_progress, mergekit.graph):
                run_merge(parsed, str(folder), options)

        write_child(run, config, out, seed=seed)


def write_child(
    run: Callable[[Path], None], config: Mapping[str, Any], out: Path, *, seed: int
) -> None:
    """Let `run` fill a folder that becomes `out` if it is then a readable model.

    Raises:
        MergeError: `run` raised, or left something that is no model.
    """
    record = {"recipe": dict(config), "seed": seed}
    with whole_folder(out, record=record) as folder:
        try:
            run(folder)
            open_checkpoint(folder)
        except Exception as error:
            if is_disk_full(error):
                raise DiskFullError(f"{out}: the disk filled up while merging") from error
            raise MergeError(f"{config.get('merge_method', 'merge')}: {one_line(error)}") from error
