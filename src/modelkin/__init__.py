"""modelkin breeds better language models out of existing ones, guided by their kinship.

    import modelkin as mk

    mk.kinship("base", ["model-a", "model-b"]).pcc_NN
    mk.evolve("run.yaml").best

Importing this loads no torch, transformers, mergekit or lm-eval.
"""

__version__ = "0.1.0"

from modelkin.errors import ModelkinError
from modelkin.measuring import kinship
from modelkin.run import Run, evolve, read_run
from modelkin.similarity import Kinship

__all__ = ["Kinship", "ModelkinError", "Run", "__version__", "evolve", "kinship", "read_run"]
