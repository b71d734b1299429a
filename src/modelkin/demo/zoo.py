"""A zoo to breed from: one base, four experts and their tasks, made in about a minute and a half.

Trains small language models on the skills and writes them down as ordinary Hugging Face folders,
with lm-eval tasks beside them. Knows nothing about merging, kinship or evolution.

    <folder>/zoo.json                    the seed and the recipe that made it
    <folder>/models/base, rev, ...       a model and its tokenizer each
    <folder>/tasks/dev, test             a YAML and a JSON-lines file for each skill
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modelkin.checkpoint import whole_folder
from modelkin.demo.skills import LETTERS, SKILLS, Item, split
from modelkin.errors import ConfigError
from modelkin.progress import Bars

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


_POSITIONS = 64
_MAKER = {"made by": "modelkin demo"}


@dataclass(frozen=True)
class Zoo:
    """Where a zoo lies on disk; every folder named here is whole."""

    base: Path
    experts: Mapping[str, Path]
    dev_tasks: Path
    test_tasks: Path
    dev_task_names: tuple[str, ...]
    test_task_names: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    """One training run; `mixture` gives each skill's weight in a batch, by the skill's name."""

    steps: int
    batch: int
    learning_rate: float
    warmup: int
    mixture: Mapping[str, float]


@dataclass(frozen=True)
class ZooRecipe:
    """Everything besides the seed that decides what the models become."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    base: Stage
    experts: Mapping[str, Stage]


def _expert(steps: int, **mixture: float) -> Stage:
    return Stage(steps=steps, batch=64, learning_rate=1e-3, warmup=10, mixture=mixture)


# What makes merges gain here. The base's learning rate does not decay: with decay the gains shrink
# to a third. Every expert goes on seeing the others' skills: without, it leaves the common basin
# and merging loses. The shift expert is a trap set on purpose: strong in a skill that the others
# have little of, but weakest on average and least akin to them, so that a search which crosses
# only the best three drops it after the first generation. A uniform average of all four avoids
# the trap too.
ZOO_RECIPE = ZooRecipe(
    hidden=128,
    layers=3,
    heads=4,
    intermediate=256,
    base=Stage(
        steps=320,
        batch=128,
        learning_rate=2e-3,
        warmup=30,
        mixture={"rev": 1, "inter": 1, "dedup": 1, "shift": 0.15},
    ),
    experts={
        "rev": _expert(120, rev=4, inter=1, dedup=1, shift=0.05),
        "inter": _expert(120, rev=1, inter=4, dedup=1, shift=0.05),
        "dedup": _expert(120, rev=1, inter=1, dedup=4, shift=0.05),
        "shift": _expert(160, rev=1, inter=1, dedup=1, shift=64),
    },
)


def build_zoo(
    folder: Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    recipe: ZooRecipe = ZOO_RECIPE,
) -> Zoo:
    """Make whatever is not yet in `folder`, and say where everything is.

    A model or a folder of tasks appears under its name only when it is whole, so a build that was
    killed is resumed by building again, with the same result. Torch's global random state and
    number of threads are left as they were.

    Raises ConfigError if `folder` holds a zoo of another seed or recipe.
    """
    _claim(folder, seed, recipe)
    splits = {skill.name: split(skill, seed) for skill in SKILLS}
    dev = {f"{name}_dev": items.dev for name, items in splits.items()}
    test = {f"{name}_test": items.test for name, items in splits.items()}
    zoo = Zoo(
        base=folder / "models" / "base",
        experts={name: folder / "models" / name for name in recipe.experts},
        dev_tasks=folder / "tasks" / "dev",
        test_tasks=folder / "tasks" / "test",
        dev_task_names=tuple(dev),
        test_task_names=tuple(test),
    )
    for path, tasks in ((zoo.dev_tasks, dev), (zoo.test_tasks, test)):
        if not path.exists():
            _write_tasks(path, tasks)
    stages = {zoo.base: recipe.base} | {zoo.experts[n]: s for n, s in recipe.experts.items()}
    train = {name: items.train for name, items in splits.items()}
    for path, stage in stages.items():
        if not path.exists():
            # An expert starts from the base as saved, rounded to bfloat16: whether the base was
            # made in this build or an earlier one then makes no difference.
            model = _new_model(recipe, seed) if path == zoo.base else _load(zoo.base)
            bar = Bars(progress).steps(f"training {path.name}", stage.steps)
            with bar as advance, _one_thread():
                _train(model, stage, train, random.Random(f"{path.name}/{seed}"), advance)
            _save(model, path)
    return zoo


def _claim(folder: Path, seed: int, recipe: ZooRecipe) -> None:
    """Write down what `folder` is made from; raise ConfigError if that is something else."""
    path = folder / "zoo.json"
    plan = json.dumps({"seed": seed, "recipe": asdict(recipe)}, indent=2) + "\n"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(".zoo.json.partial")
        partial.write_text(plan)
        partial.replace(path)
    elif path.read_text() != plan:
        raise ConfigError(
            f"{folder} holds a demo zoo of another seed or recipe than the one asked for "
            f"(see {path.name} there): name another folder, or delete this one"
        )


_TASK_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {task}.jsonl
test_split: test
output_type: loglikelihood
# Column names, not templates: lm-eval then scores a model in less than half the time.
doc_to_text: prompt
doc_to_target: answer
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def _write_tasks(path: Path, tasks: Mapping[str, Sequence[Item]]) -> None:
    with whole_folder(path, record=_MAKER) as partial:
        for task, items in tasks.items():
            (partial / f"{task}.yaml").write_text(_TASK_YAML.format(task=task))
            lines = (json.dumps(asdict(item)) + "\n" for item in items)
            (partial / f"{task}.jsonl").write_text("".join(lines))


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character, and `<bos>` once in front."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split as SplitAt
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    characters = [*LETTERS, *(skill.mark for skill in SKILLS), ",", "=", "."]
    tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *characters]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = SplitAt(Regex("."), "isolated")
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=_POSITIONS,
    )


def _new_model(recipe: ZooRecipe, seed: int) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.intermediate,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator only
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _load(path: Path) -> LlamaForCausalLM:
    import torch
    from transformers import LlamaForCausalLM

    with _quiet_transformers():
        return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)


def _save(model: LlamaForCausalLM, path: Path) -> None:
    import torch

    with whole_folder(path, record=_MAKER) as partial, _quiet_transformers():
        model.to(torch.bfloat16).save_pretrained(partial)
        _tokenizer().save_pretrained(partial)


def _train(
    model: LlamaForCausalLM,
    stage: Stage,
    items: Mapping[str, Sequence[Item]],
    rng: random.Random,
    advance: Callable[[], None],
) -> None:
    """Run a stage on items, given by the skill's name; `advance` is called after every step."""
    import torch

    tokenizer = _tokenizer()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    warm_up = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / stage.warmup)
    )
    names, weights = list(stage.mixture), list(stage.mixture.values())
    model.train()
    for _ in range(stage.steps):
        skills = rng.choices(names, weights, k=stage.batch)
        tokens, labels = _encode(tokenizer, [rng.choice(items[skill]) for skill in skills])
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        advance()


def _encode(
    tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of items, both of shape (items, longest item).

    The loss is on the answers only, since nothing could foretell a prompt; other labels are -100.
    Padding comes last, so that causal attention needs no mask for it.
    """
    import torch

    rows = tokenizer([item.prompt + item.answer for item in items])["input_ids"]
    tokens = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(tokens, -100)
    for i, (row, item) in enumerate(zip(rows, items, strict=True)):
        answer = slice(len(row) - len(item.answer), len(row))
        tokens[i, : len(row)] = torch.tensor(row)
        labels[i, answer] = tokens[i, answer]
    return tokens, labels


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one core: sums then have one order, and models this small gain little from two."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars, one for each file, out of ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
