"""The exception tree: every error that modelkin raises on purpose.

    ModelkinError
    ├── ConfigError          a run file, recipe or option is wrong
    ├── CheckpointError      a folder or file is no readable model
    │   └── IncomparableError    models that share too few tensors to be compared
    ├── MergeError           a merge did not give a model
    ├── EvaluationError      an evaluation did not give scores
    ├── LedgerError          a run folder cannot be opened, written or resumed
    ├── DiskFullError        no room; the run stops and can be resumed
    └── MissingExtraError    an optional dependency is not installed

Each message is one line and names the thing, what was expected and what was found. The command
line prints it and exits with status 2.
"""

import errno


class ModelkinError(Exception):
    """Base of all errors that modelkin raises on purpose."""


class ConfigError(ModelkinError):
    """A run file, recipe or option is wrong."""


class CheckpointError(ModelkinError):
    """A folder or file is no readable model."""


class IncomparableError(CheckpointError):
    """Models that share too few tensors to be compared."""


class MergeError(ModelkinError):
    """A merge did not give a model."""


class EvaluationError(ModelkinError):
    """An evaluation did not give scores."""


class LedgerError(ModelkinError):
    """A run folder cannot be opened, written or resumed."""


class DiskFullError(ModelkinError):
    """There is no room left; the run stops and can be resumed when there is."""


class MissingExtraError(ModelkinError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"this needs the package {package}, which is not installed: "
            f"pip install 'modelkin[{extra}]'"
        )


def one_line(error: BaseException) -> str:
    """A library's error, of whatever length, as part of one of our messages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, says that the disk is full.

    Writers in Rust and SQLite lose the errno and keep only the words.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(seen) or "disk is full" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
