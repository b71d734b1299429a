"""The paper's tables, computed again from its own numbers (arXiv 2410.12613).

The numbers are the package's own data, or a folder in the same form. Where a result differs from
what is printed, both are shown, and why. Knows nothing of runs of our own.
"""

from modelkin.replay.contents import parts
from modelkin.replay.page import replay_page
from modelkin.replay.reading import read_paper
from modelkin.replay.records import Disagreement, Paper
from modelkin.replay.shown import Part
from modelkin.replay.terminal import print_parts

__all__ = ["Disagreement", "Paper", "Part", "parts", "print_parts", "read_paper", "replay_page"]
