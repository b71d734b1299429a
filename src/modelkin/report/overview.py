"""The beginning and the end of the page: what happened in plain words, and how to do it again."""

from collections import Counter

from modelkin.pages import folded, listing, paragraph, preformatted, table
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
    return "".join(
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
    ) + failures(family)


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
        f"{cost.merging / 60:.1f} minutes of merging, {cost.evaluating / 60:.1f} of evaluating "
        f"and {cost.measuring / 60:.1f} of measuring kinship; {cost.written / 1e9:.2f} GB of "
        "weights were written."
    )


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
