"""Score the finalists on the test items, which nothing was chosen by, and print a Markdown table.

Finalists are the base, the foundation models, the best child of each run by its dev scores, and the
uniform average of the four experts. Intervals are 95 % of a paired bootstrap over the items.
"""

from collections.abc import Iterator
from pathlib import Path

from modelkin import read_run
from modelkin.analyse import Samples, paired_difference
from modelkin.config import load_config
from modelkin.merging import Mergekit
from modelkin.run import evaluate

HERE = Path(__file__).resolve().parent
EXPERTS = ("movies", "grammar", "requests", "bookings")
STRATEGIES = ("greedy", "kinship")


def finalists() -> Iterator[tuple[str, Path]]:
    """What to call each finalist, and where it is."""
    for name in ("base", *EXPERTS):
        yield name, HERE / "pool" / name
    uniform = HERE / "runs" / "uniform"
    if not uniform.exists():
        models = [{"model": str(HERE / "pool" / name)} for name in EXPERTS]
        recipe = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
        Mergekit().merge({**recipe, "parameters": {"weight": 1.0}}, uniform)
    yield "uniform average", uniform
    for strategy in STRATEGIES:
        run = read_run(HERE / "runs" / strategy)
        best = next(member for member in run.state.ranked() if member.parents)
        parents = " × ".join(parent.name for parent in run.state.parents_of(best))
        yield f"{strategy}: {best.name} ({parents})", run.weights(best)


def main() -> None:
    """Evaluate, then print."""
    config = load_config(HERE / "test.yaml")
    averages: dict[str, float] = {}
    scores: dict[str, list[float]] = {}
    samples: dict[str, Samples] = {}
    for name, folder in finalists():
        found = evaluate(str(folder), config, cache=HERE / "runs" / "evaluations")
        scores[name] = [100 * score.value for score in found.scorecard.scores.values()]
        averages[name], samples[name] = 100 * found.scorecard.average, found.samples
    foundation = max(EXPERTS, key=lambda name: averages[name])
    tasks = list(found.scorecard.scores)
    print(f"| model | {' | '.join(tasks)} | average | over {foundation}, 95 % interval |")
    print("|---" * (len(tasks) + 3) + "|")
    for name in averages:
        lead = paired_difference(samples[name], [samples[foundation]])
        assert lead is not None  # all were scored on the same items
        interval = f"{100 * lead.value:+.1f} ({100 * lead.low:+.1f} to {100 * lead.high:+.1f})"
        cells = [f"{value:.1f}" for value in (*scores[name], averages[name])]
        print(f"| {name} | {' | '.join(cells)} | {interval} |")


if __name__ == "__main__":
    main()
