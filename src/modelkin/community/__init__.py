"""Merges that others made, from a table: no weights needed, and none known of here."""

from modelkin.community.findings import Findings, MergeFinding, PathFinding, analyse_merges
from modelkin.community.printing import print_findings
from modelkin.community.reading import MergeRow, MergeTable, read_merges

__all__ = [
    "Findings",
    "MergeFinding",
    "MergeRow",
    "MergeTable",
    "PathFinding",
    "analyse_merges",
    "print_findings",
    "read_merges",
]
