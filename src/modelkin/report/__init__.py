"""What runs found, for people: a table for a terminal, and one self-contained page.

Knows states, samples and statistics; decides nothing. What the numbers mean is `analyse`'s, how
they are put on a page `pages`'s. `family` is a run with all that follows from it; the other
modules are a part of the page each, and `writing` puts them together.
"""

from modelkin.report.family import Family, SamplesOf, Source
from modelkin.report.predictions import prediction_lines
from modelkin.report.terminal import (
    Row,
    failure_lines,
    gain_text,
    lead_sentence,
    rows,
    terminal_table,
)
from modelkin.report.writing import check_report, report_page, write_report

__all__ = [
    "Family",
    "Row",
    "SamplesOf",
    "Source",
    "check_report",
    "failure_lines",
    "gain_text",
    "lead_sentence",
    "prediction_lines",
    "report_page",
    "rows",
    "terminal_table",
    "write_report",
]
