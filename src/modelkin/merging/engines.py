"""Which engine carries out a recipe, and why."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from modelkin.merging.native import obstacle

Engine = Literal["auto", "native", "mergekit"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


class Choice(NamedTuple):
    """An engine, and in words why it is this one."""

    engine: Literal["native", "mergekit"]
    reason: str


def choose_engine(config: Mapping[str, Any], asked: Engine) -> Choice:
    """The engine for a recipe with real paths; `auto` is native wherever that can carry it out.

    Raises:
        MergeError: nobody could carry it out.
    """
    if asked != "auto":
        return Choice(asked, "as asked")
    reason = obstacle(config)
    if reason is not None:
        return Choice("mergekit", reason)
    return Choice("native", f"this {config['merge_method']} is a weighted sum of each tensor")
