"""Which engine carries out a recipe, and why."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from modelkin.blend import NotLinear, compile_recipe
from modelkin.errors import ConfigError
from modelkin.merging.mergekit import Mergekit
from modelkin.merging.native import Native, obstacle
from modelkin.progress import OnProgress

if TYPE_CHECKING:
    from rich.progress import Progress

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


class EitherEngine:
    """Merges natively where the recipe allows it, and with mergekit where not.

    mergekit is not needed before a recipe needs it, or options of its own are given.
    """

    def __init__(
        self,
        options: Mapping[str, bool | int | str] | None = None,
        *,
        trust_remote_code: bool = False,
        progress: "Progress | None" = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """`options` are mergekit's own; `progress` shows native merges, `on_progress` mergekit's.

        Raises:
            ConfigError: mergekit does not accept the options.
            MissingExtraError: options are given, and mergekit is not installed.
        """
        self._settings: dict[str, Any] = {
            "trust_remote_code": trust_remote_code,
            "on_progress": on_progress,
        }
        self._options = options
        self._progress = progress
        if options:
            self._mergekit()

    def check(self, template: Mapping[str, Any]) -> None:
        """See whether a template can be carried out, before anything is merged by it.

        Raises:
            ConfigError: it cannot.
            MissingExtraError: it needs mergekit, which is not installed.
        """
        try:
            plan = compile_recipe(template, tensors=())
        except ConfigError as error:
            raise ConfigError(f"merge: {error}") from error
        if isinstance(plan, NotLinear):
            self._mergekit().check(template)

    def merge(self, config: Mapping[str, Any], out: Path, *, seed: int = 0) -> None:
        """See `Merger.merge`."""
        if choose_engine(config, "auto").engine == "native":
            Native(progress=self._progress).merge(config, out, seed=seed)
        else:
            self._mergekit().merge(config, out, seed=seed)

    def _mergekit(self) -> Mergekit:
        return Mergekit(self._options, **self._settings)
