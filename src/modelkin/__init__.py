"""modelkin breeds better language models out of existing ones, guided by their kinship.

    import modelkin as mk

    mk.kinship("base", ["model-a", "model-b"]).pcc_NN
    mk.preview("base", ["model-a", "model-b"]).children
    mk.evolve("run.yaml").best

Importing this loads next to nothing: each name is imported when it is first used, so that
measuring kinship does not wait for what only breeding needs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelkin.errors import ModelkinError
    from modelkin.measuring import kinship
    from modelkin.previewing import Preview, preview
    from modelkin.run import Run, evolve, read_run
    from modelkin.similarity import Kinship

__version__ = "0.1.0"

__all__ = [
    "Kinship",
    "ModelkinError",
    "Preview",
    "Run",
    "__version__",
    "evolve",
    "kinship",
    "preview",
    "read_run",
]

_MODULES = {
    "Kinship": "modelkin.similarity",
    "ModelkinError": "modelkin.errors",
    "Preview": "modelkin.previewing",
    "Run": "modelkin.run",
    "evolve": "modelkin.run",
    "kinship": "modelkin.measuring",
    "preview": "modelkin.previewing",
    "read_run": "modelkin.run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
