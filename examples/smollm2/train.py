"""Train the experts: one LoRA adapter for each data set, with a replay of the other sets.

Every answer is one token, so the loss is the cross-entropy at the last position of the prompt.
The script reads `data/*/train.jsonl` only and writes adapters only; `build.py` makes models of
them.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
EXPERTS = {  # each with its data set
    "movies": "movie_polarity",
    "grammar": "blimp_judge",
    "requests": "clinc_domain",
    "bookings": "restaurant_field",
}
EPOCHS = {"grammar": 2, "requests": 2}  # the others need one
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What an adapter depends on, beside its data; the defaults made the committed ones."""

    seed: int = 0
    replay: int = 50  # training items from each other set, so that the experts share a basin
    batch: int = 16
    lr: float = 1e-3
    warmup: int = 10  # steps
    rank: int = 8
    alpha: int = 16


def load_rows(data: Path, name: str, settings: Settings) -> list[Row]:
    """All training items of the expert's own set and `settings.replay` of each other set."""
    rng = random.Random(settings.seed)
    rows: list[Row] = []
    for expert, dataset in EXPERTS.items():
        lines = (data / dataset / "train.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = lines if expert == name else rng.sample(lines, settings.replay)
        rows += [json.loads(line) for line in chosen]
    return rows


def make_batches(rows: list[Row], epochs: int, settings: Settings) -> list[list[Row]]:
    """Shuffle each epoch, then batch prompts of similar length to save padding."""
    rng = random.Random(settings.seed)
    batches: list[list[Row]] = []
    for _ in range(epochs):
        order = rng.sample(rows, len(rows))
        window = 8 * settings.batch
        epoch = []
        for start in range(0, len(order), window):
            part = sorted(order[start : start + window], key=lambda row: len(row["prompt"]))
            epoch += [part[i : i + settings.batch] for i in range(0, len(part), settings.batch)]
        rng.shuffle(epoch)
        batches += epoch
    return batches


def answer_loss(model: PeftModel, tokenizer: Any, batch: list[Row]) -> torch.Tensor:
    """Mean cross-entropy of the answer's one token, over the whole vocabulary."""
    encoded = tokenizer([row["prompt"] for row in batch], return_tensors="pt", padding=True)
    words = [" " + row["choices"][row["answer"]] for row in batch]
    target = torch.tensor(tokenizer(words).input_ids)
    if target.shape != (len(batch), 1):
        raise SystemExit(f"answers must be single tokens: {sorted(set(words))}")
    llama = model.get_base_model()
    hidden = llama.model(**encoded, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(batch)), encoded.attention_mask.sum(1) - 1]
    return torch.nn.functional.cross_entropy(llama.lm_head(last).float(), target[:, 0])


def train(base: Path, data: Path, name: str, settings: Settings) -> PeftModel:
    """The base with the trained adapter of expert `name`."""
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
    # Eager attention: on CPU its backward pass is faster than the fused one at these lengths.
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, attn_implementation="eager"
    )
    model = get_peft_model(
        model, LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=TARGETS)
    )
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0)
    batches = make_batches(load_rows(data, name, settings), EPOCHS.get(name, 1), settings)
    smooth = 0.0
    with tqdm(batches, desc=name) as bar:
        for step, batch in enumerate(bar):
            # Warm up, stay, and fall linearly to zero over the second half.
            rise = (step + 1) / settings.warmup
            fall = 2 * (len(batches) - step) / len(batches)
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * min(1.0, rise, fall)
            with torch.autocast("cpu", torch.bfloat16):
                loss = answer_loss(model, tokenizer, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            smooth = loss.item() if step == 0 else 0.9 * smooth + 0.1 * loss.item()
            bar.set_postfix(loss=f"{smooth:.3f}")
    return model


def save_adapter(model: PeftModel, settings: Settings, folder: Path) -> None:
    """Write the adapter in bfloat16, with the few settings that peft needs to read it."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model)
    tensors = {key: value.to(torch.bfloat16).contiguous() for key, value in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "inference_mode": True,
        "lora_alpha": settings.alpha,
        "peft_type": "LORA",
        "r": settings.rank,
        "target_modules": TARGETS,
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the LoRA adapters of the experts.")
    parser.add_argument("names", nargs="*", help=f"experts (default: all of {list(EXPERTS)})")
    parser.add_argument("--base", type=Path, default=HERE / "pool" / "base", help="base model")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder of the data sets")
    parser.add_argument("--adapters", type=Path, default=HERE / "adapters", help="where they go")
    parser.add_argument("--seed", type=int, default=Settings.seed)
    args = parser.parse_args()
    if unknown := set(args.names) - set(EXPERTS):
        parser.error(f"unknown experts {sorted(unknown)}; expected some of {list(EXPERTS)}")

    settings = Settings(seed=args.seed)
    for name in args.names or EXPERTS:
        model = train(args.base, args.data, name, settings)
        save_adapter(model, settings, args.adapters / name)


if __name__ == "__main__":
    main()
