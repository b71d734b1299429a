"""The seam to mergekit, which merges by any of its methods; the only module that imports it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelkin.errors import ConfigError, MergeError, MissingExtraError, one_line
from modelkin.merging.recipes import fill
from modelkin.merging.writing import write_child
from modelkin.progress import OnProgress, tqdm_reports_to


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
