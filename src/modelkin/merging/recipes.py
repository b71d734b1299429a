"""The templates that recipes are made from, and the names of models in them.

Knows mergekit's YAML as a mapping, and merges nothing.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

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
