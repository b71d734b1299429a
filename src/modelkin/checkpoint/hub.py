"""Where a model is: a folder, a GGUF file, or a repository of the Hub, which is downloaded.

Knows which files of a repository are needed; does not look into them. `HF_HOME`, `HF_TOKEN` and
`HF_HUB_OFFLINE` are honoured by the Hub's own library.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from modelkin.checkpoint.folders import TEMPLATE_FOLDER, TOKENIZER_FILES
from modelkin.checkpoint.reading import check_path, is_file, printable, readable
from modelkin.checkpoint.safetensors import holds_safetensors
from modelkin.errors import CheckpointError, DiskFullError, is_disk_full, one_line

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
# Not `*.safetensors`: some repositories hold the weights a second time, under another name.
_NEEDED = (
    *("model*.safetensors", ADAPTER_WEIGHTS, "*.json", *TOKENIZER_FILES, "*.py"),
    f"{TEMPLATE_FOLDER}/*",
)
# Whatever lies in any other folder. There is no pattern for "not this name", but there is one for
# each character that can differ from it, and for each beginning of it.
_IGNORED = (
    *(f"{TEMPLATE_FOLDER[:n]}[!{letter}]*/*" for n, letter in enumerate(f"{TEMPLATE_FOLDER}/")),
    *(f"{TEMPLATE_FOLDER[:n]}/*" for n in range(1, len(TEMPLATE_FOLDER))),
)


def locate(source: str, revision: str | None, *, allow_pickle: bool) -> tuple[Path, str | None]:
    """The folder or GGUF file that `source` means, and its commit if it came from the Hub.

    Raises:
        CheckpointError: it is none, or the Hub did not give it.
    """
    told = printable(source)[:200]
    try:
        path = Path(source).expanduser()
    # A `~user` that does not exist, or that is no name.
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{told}: no such folder: {one_line(error)}") from error
    with readable(path):
        if path.is_dir():
            return _resolved(path), None
        if path.is_file():
            if path.suffix.lower() == ".gguf":
                return _resolved(path), None
            raise CheckpointError(
                f"{told}: expected a model folder or a .gguf file, found another file"
            )
        if path.exists():
            raise CheckpointError(f"{told}: expected a model folder or a .gguf file")
    if source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{told}: no such folder, and not a Hub id of the form org/name[@revision]"
        )
    return _download(source, revision, allow_pickle=allow_pickle)


def _resolved(path: Path) -> Path:
    found = path.resolve()
    check_path(found)
    return found


def _download(source: str, revision: str | None, *, allow_pickle: bool) -> tuple[Path, str]:
    repository, _, asked = source.partition("@")
    folder = _snapshot(source, repository, revision or asked or None, _NEEDED)
    commit = folder.name  # the cache names a snapshot's folder after its commit
    if allow_pickle and not holds_safetensors(folder):
        if is_file(folder / ADAPTER_CONFIG):
            if not is_file(folder / ADAPTER_WEIGHTS):
                folder = _snapshot(source, repository, commit, (ADAPTER_PICKLE,))
        else:
            folder = _snapshot(source, repository, commit, ("pytorch_model*.bin",))
    return folder, commit


def _snapshot(source: str, repository: str, revision: str | None, needed: Sequence[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=list(needed),
                ignore_patterns=list(_IGNORED),
            )
        )
    # Whatever the library and the HTTP client below it raise.
    except Exception as error:
        if is_disk_full(error):
            raise DiskFullError(f"{source}: the disk filled up while downloading") from error
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            why = (
                "offline mode is on (HF_HUB_OFFLINE)"
                if constants.HF_HUB_OFFLINE
                else "the Hub cannot be reached"
            )
            raise CheckpointError(
                f"{source}: no such folder here, it is not in the local cache, and {why}"
            ) from error
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{source}: no such folder here, and the Hub did not give it: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
