"""The report of one run or several as one page."""

from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from modelkin.errors import MissingExtraError
from modelkin.pages import contents, page, paragraph, section, write_page
from modelkin.report.against import difference_against_kinship, gain_against_kinship
from modelkin.report.course import best_so_far, converging, stopping_early
from modelkin.report.family import Family, Source
from modelkin.report.kin import kinship_map, predicted_and_measured
from modelkin.report.layers import branching, layered_kinship
from modelkin.report.overview import overview, reproduction, side_by_side
from modelkin.report.scores import all_models, by_task, gains_table
from modelkin.report.tree import family_tree


def check_report() -> None:
    """See, before the work, that reports can be written.

    Raises:
        MissingExtraError: plotly or SciPy is not installed.
    """
    for package in ("plotly", "scipy"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "plot")


def write_report(path: Path, sources: Sequence[Source]) -> None:
    """Write the page; an older one is replaced in one step.

    Args:
        path: of the file.
        sources: one run or more; several are compared before each of them is shown.

    Raises:
        DiskFullError: the older page, if any, is untouched.
        MissingExtraError: plotly or SciPy is not installed.
    """
    write_page(path, report_page(sources))


def report_page(sources: Sequence[Source], *, live: str = "") -> str:
    """The whole page as HTML; `live` as in `pages.page`."""
    families = [(source, Family(source.state, source.samples_of)) for source in sources]
    if len(sources) == 1:
        title = f"A family of models: {sources[0].name}"
        parts = _parts(*families[0])
        linked = [heading for heading, _ in parts]
    else:
        title = f"{len(sources)} families of models"
        named = [(source.name, family) for source, family in families]
        together = "Best so far, side by side"
        said = "The best average score against the number of evaluations, all runs overlaid."
        parts = [(together, paragraph(said) + side_by_side(named) + best_so_far(named))]
        linked = [together]
        for source, family in families:
            own = _parts(source, family, prefix=f"{source.name}: ")
            linked.append(own[0][0])
            parts += own
    sections = [section(heading, html) for heading, html in parts]
    return page(title, contents(linked), *sections, script=_script(), live=live)


def _parts(source: Source, family: Family, *, prefix: str = "") -> list[tuple[str, str]]:
    """Titles and their HTML, in the order of the page."""
    stats = source.statistics() if family.children else None
    explored = any(member.exploration for member in family.children)
    # What needs scores or kinship is left out while there are none.
    parts: dict[str, Callable[[], str]] = {"Overview": lambda: overview(source, family)}
    parts["Family tree"] = lambda: family_tree(family)
    if family.path:
        parts["Best so far"] = lambda: best_so_far([(source.name, family)])
    parts["Kinship"] = lambda: kinship_map(family)
    if family.path:
        parts["Gain against kinship"] = lambda: gain_against_kinship(family)
        parts["Gains"] = lambda: gains_table(family)
        parts["Scores by task"] = lambda: by_task(family)
        parts["Task differences against kinship"] = lambda: difference_against_kinship(family)
        parts["Kinship layer by layer"] = lambda: layered_kinship(family, stats)
        if explored:
            parts["Where exploration and greed part"] = lambda: branching(family, stats)
        parts["Convergence"] = lambda: converging(family)
        parts["Stopping early"] = lambda: stopping_early(family)
    if family.state.predictions:
        parts["Predicted and measured kinship"] = lambda: predicted_and_measured(family)
    parts["All models"] = lambda: all_models(family)
    parts["How to reproduce"] = lambda: reproduction(source, family)
    return [(prefix + title, make()) for title, make in parts.items()]


@cache
def _script() -> str:
    return (files("modelkin.report") / "report.js").read_text(encoding="utf-8")
