"""What the data support: gains and their uncertainty, correlations, paths, change vectors.

Pure functions over numbers: knows no files, no runs and no pages.
"""

from modelkin.analyse.bifurcation import Bifurcation, bifurcation
from modelkin.analyse.correlation import Correlation, Fit, correlate, fit_line
from modelkin.analyse.differences import task_difference
from modelkin.analyse.gains import Difference, Gain, Samples, gains, holm, paired_difference
from modelkin.analyse.paths import (
    EarlyStop,
    Stages,
    convergence,
    early_stopping,
    stages,
)

__all__ = [
    "Bifurcation",
    "Correlation",
    "Difference",
    "EarlyStop",
    "Fit",
    "Gain",
    "Samples",
    "Stages",
    "bifurcation",
    "convergence",
    "correlate",
    "early_stopping",
    "fit_line",
    "gains",
    "holm",
    "paired_difference",
    "stages",
    "task_difference",
]
