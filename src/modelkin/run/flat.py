"""Children made from the foundations: what must be measured for that, and each child's recipe.

Knows nothing of the ledger, and of when a child is made.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from modelkin.blend import Lineage, flat_recipe
from modelkin.checkpoint import Checkpoint
from modelkin.gram import GramStats
from modelkin.measuring import measure
from modelkin.run.folder import by_id
from modelkin.state import Member, RunState

DTYPE_KEYS = ("dtype", "out_dtype")


def measure_foundations(
    template: Mapping[str, Any],
    base: Checkpoint,
    foundations: Mapping[str, Checkpoint],
    *,
    flat: bool,
    progress: Progress | None,
) -> GramStats:
    """The foundations' statistics by their ids, to the digits that children show.

    Args:
        template: the run's, which may say how children are stored.
        base: of the run.
        foundations: id -> model.
        flat: whether children are made from these statistics.
        progress: where to show a bar.
    """
    asked = template.get("out_dtype") or template.get("dtype")
    formats = {
        one.format for model in (base, *foundations.values()) for one in model.tensors.values()
    }
    in_32_bits = (
        str(asked).removeprefix("torch.") in ("float32", "float64")
        if asked
        else not formats.isdisjoint({"F32", "F64"})
    )
    # Children in 32 bits show more digits than single precision leaves.
    double = flat and in_32_bits
    return measure(
        base,
        [replace(model, name=name) for name, model in foundations.items()],
        double=double,
        cache=not double,
        progress=progress,
    )


def flat_recipe_of(
    lineage: Lineage,
    state: RunState,
    member: Member,
    folders: Mapping[str, Path],
    base: Path,
) -> dict[str, Any]:
    """The recipe that makes a child from the foundations in one pass.

    Args:
        lineage: of all members.
        state: of the run.
        member: the child.
        folders: foundation's id -> its folder.
        base: the base's folder.

    Raises:
        MergeError: the child's own method has no answer for its parents' weights.
    """
    assert member.recipe is not None
    assert state.base is not None
    if member.id not in lineage.whole.models:
        # Says why.
        lineage.add(member.id, by_id(member.recipe), base=state.base.model)
    # Its config and tokenizer are those of the first model of its recipe, and so on.
    donor = member.id
    while (ancestor := state.members.get(donor)) and ancestor.recipe:
        config = by_id(ancestor.recipe)
        donor = config.get("base_model") or config["models"][0]["model"]
    return flat_recipe(
        lineage.flat(member.id),
        {name: str(folder) for name, folder in folders.items()},
        base=str(base),
        donor=None if donor == state.base.model else donor,
        dtypes={
            key: member.recipe.config[key] for key in DTYPE_KEYS if key in member.recipe.config
        },
    )
