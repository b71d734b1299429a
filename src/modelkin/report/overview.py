"""The beginning and the end of the page: what happened in plain words, and how to do it again."""

from collections import Counter
from collections.abc import Sequence

from modelkin.pages import Cell, facts, folded, listing, paragraph, preformatted, table
from modelkin.report.family import Family, Source
from modelkin.report.terminal import failure_lines, lead_sentence

_STRATEGIES = {
    "kinship": "greedily, with exploration guided by kinship",
    "greedy": "greedily, without exploration",
    "random": "at random, as a control",
}
# So many names of foundation models are told.
_NAMES = 8


def overview(source: Source, family: Family) -> str:
    """What was bred from what, the best child and how sure that is, why it stopped, the cost."""
    state = family.state
    stopped = (
        f"The run stopped: {state.stopped}."
        if state.stopped
        else "The run has not finished: it is still going on, or was interrupted."
    )
    return (
        _headline(family)
        + "".join(
            paragraph(text)
            for text in (
                _origin(family),
                lead_sentence(state, source.samples_of),
                _sureness(family),
                "The best child is chosen by the same scores that are shown here, so its own are "
                "optimistic: score it on items that were not used here before you believe them.",
                f"{stopped} {_cost(family)}",
            )
            if text
        )
        + failures(family)
    )


def _headline(family: Family) -> str:
    """The few numbers that are looked for first; nothing before a child has scores."""
    best, foundation = family.best_child, family.best_foundation
    average = family.average(best) if best else None
    other = family.average(foundation) if foundation else None
    if best is None or foundation is None or average is None or other is None:
        return ""
    gain = family.gains.get(best.id)
    over = gain.over_best if gain else None
    return facts(
        {
            "best child": best.name,
            "its average": f"{average:.2f}",
            f"over {foundation.name}, the best foundation model": f"{average - other:+.2f}",
            "by a paired bootstrap": over.verdict if over else "not known: no samples",
            "evaluations": str(sum(m.scorecard is not None for m in family.state.members.values())),
        }
    )


def side_by_side(families: Sequence[tuple[str, Family]]) -> str:
    """What each of several runs found, and how soon."""
    lines: list[list[Cell]] = []
    for name, family in families:
        scored = [member for member in family.state.members.values() if member.scorecard]
        best = family.best_child
        gain = family.gains.get(best.id) if best else None
        over = gain.over_best if gain else None
        lines.append(
            [
                name,
                str(family.setting("strategy", "")),
                len(scored),
                *(
                    (best.name, family.average(best), scored.index(best) + 1)
                    if best
                    else ("", None, None)
                ),
                *((over.value, over.low, over.high, over.verdict) if over else (None,) * 3 + ("",)),
                family.state.stopped or "not finished",
            ]
        )
    heads = ["run", "strategy", "evaluations", "best child", "average", "found at evaluation"]
    heads += ["over best foundation", "low", "high", "verdict", "why it stopped"]
    return table(heads, lines, name="runs") + paragraph(
        "Low and high are the ends of the 95 % interval of a paired bootstrap over the evaluation "
        "items. It is the uncertainty of the items alone: how another seed would have done, only "
        "more runs tell."
    )


def _origin(family: Family) -> str:
    names = [member.name for member in family.foundations]
    told = ", ".join(names[:_NAMES]) + (
        f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    )
    base = family.state.base
    strategy = _STRATEGIES.get(family.setting("strategy"), "")
    explored = sum(member.exploration for member in family.children)
    exploration = f" ({_count(explored, 'such merge')})" if explored else ""
    return (
        f"{_count(len(family.children), 'child', 'children')} in "
        f"{_count(family.state.generation, 'generation')} "
        f"{'was' if len(family.children) == 1 else 'were'} bred from "
        f"{_count(len(names), 'foundation model')} ({told})"
        f"{f', all fine-tunes of {base.name}' if base else ''}, {strategy or 'by merging'}"
        f"{exploration}."
    )


def _sureness(family: Family) -> str:
    verdicts = Counter(gain.verdict for gain in family.gains.values())
    if not verdicts:
        return ""
    return (
        f"Of {_count(sum(verdicts.values()), 'merge')} with samples, {verdicts['better']} gave a "
        f"child better than the mean of its parents and {verdicts['worse']} a worse one; for "
        f"{verdicts['cannot tell']} the data cannot tell (paired bootstrap over the evaluation "
        "items, Holm's correction over all merges, 5 %)."
    )


def _cost(family: Family) -> str:
    cost = family.state.cost
    scored = sum(member.scorecard is not None for member in family.state.members.values())
    return (
        f"It cost {_count(len(family.children), 'merge')} and {_count(scored, 'evaluation')}: "
        f"{_time(cost.merging)} of merging, {_time(cost.evaluating)} of evaluating and "
        f"{_time(cost.measuring)} of measuring kinship; {_size(cost.written)} of weights were "
        "written."
    )


def _time(seconds: float) -> str:
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} seconds"


def _size(written: int) -> str:
    return f"{written / 1e9:,.1f} GB" if written >= 1e9 else f"{written / 1e6:,.1f} MB"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def failures(family: Family) -> str:
    """What failed, where and why."""
    lines = failure_lines(family.state)
    return paragraph(f"{_count(len(lines), 'model')} failed:") + listing(lines) if lines else ""


def reproduction(source: Source, family: Family) -> str:
    """The run file, versions, seeds, hardware, and which models it began with."""
    state = family.state
    protocols = {m.scorecard.protocol for m in state.members.values() if m.scorecard}
    environment = dict(state.started.environment) if state.started else {}
    facts = {
        "seed": str(family.setting("seed", "")),
        "evaluation protocol": ", ".join(sorted(protocols)),
        **environment,
    }
    base = state.base
    models = [(base.name, "base", base.source, base.revision or "")] if base else []
    models += [(m.name, "foundation", m.source or "", m.revision or "") for m in family.foundations]
    return "".join(
        (
            paragraph(
                "modelkin evolve with this run file does it again. Merging and choosing are "
                "deterministic; scores are as far as the evaluator is."
            ),
            preformatted(source.run_file) if source.run_file else "",
            table(["what", "found"], list(facts.items()), name="environment"),
            folded(
                "The models it began with",
                table(["model", "role", "source", "revision"], models, name="models-given"),
            ),
        )
    )
