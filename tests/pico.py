"""Real models of a few thousand weights, with a tokenizer, and lm-eval tasks for them.

base = write_model(tmp_path / "base")
write_model(tmp_path / "a", like=base, seed=1)
write_tasks(tmp_path / "tasks")
"""

import json
import random
from pathlib import Path
from typing import Any

LETTERS = "abcdefgh"
TASKS = ("pick", "say")

_PICK = """\
task: pick
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/pick.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
_SAY = """\
task: say
dataset_path: json
dataset_kwargs:
  data_files:
    test: data/say.jsonl
test_split: test
output_type: loglikelihood
doc_to_text: question
doc_to_target: answer
target_delimiter: ""
num_fewshot: 0
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def tokenizer() -> Any:
    """One token a letter, and `<bos>` in front."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        token: number for number, token in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *LETTERS])
    }
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = Split(Regex("."), "isolated")
    inner.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=64,
    )


def write_model(
    folder: Path,
    *,
    seed: int = 0,
    like: Path | None = None,
    change: float = 0.1,
    with_tokenizer: bool = True,
) -> Path:
    """Write a bfloat16 Llama of two layers; `like` another one, it is that one, perturbed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if like is None:
            config = LlamaConfig(
                vocab_size=4 + len(LETTERS),
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
                initializer_range=0.2,
                tie_word_embeddings=False,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
            model = LlamaForCausalLM(config)
        else:
            model = LlamaForCausalLM.from_pretrained(like, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(change * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder


def items(task: str, count: int = 30) -> list[dict[str, Any]]:
    """The questions of a task."""
    draw = random.Random(task)

    def word(length: int) -> str:
        return "".join(draw.choices(LETTERS, k=length))

    if task == "say":
        return [{"question": word(3), "answer": word(1)} for _ in range(count)]
    return [
        {"question": word(3), "choices": [word(2) for _ in range(3)], "gold": draw.randrange(3)}
        for _ in range(count)
    ]


def write_tasks(folder: Path) -> Path:
    """Write the tasks `pick` and `say`, whose data are named relative to their YAML files."""
    (folder / "data").mkdir(parents=True)
    for name, text in (("pick", _PICK), ("say", _SAY)):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        lines = "".join(json.dumps(item) + "\n" for item in items(name))
        (folder / "data" / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder
