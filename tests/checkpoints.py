"""Tiny checkpoints on disk, for tests. Writes the safetensors bytes by hand; needs no torch.

    base = llama_like(rng)
    write_checkpoint(tmp_path / "base", base, dtype="BF16")
    write_checkpoint(tmp_path / "a", perturbed(base, rng), dtype="BF16", shards=3)

A folder written with its default config loads in transformers as a LlamaForCausalLM (it has no
tokenizer). What a test should expect to find on disk is `stored(values, dtype)`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Dtype = Literal["F32", "BF16", "F16", "F64", "F8_E4M3", "F8_E5M2"]
DTYPES: tuple[Dtype, ...] = ("F32", "BF16", "F16", "F64")
ALL_DTYPES: tuple[Dtype, ...] = (*DTYPES, "F8_E4M3", "F8_E5M2")
Array = NDArray[np.float64]

MINIMAL_CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_DIM = 4


def llama_like(
    rng: np.random.Generator,
    *,
    layers: int = 2,
    hidden: int = 8,
    intermediate: int = 16,
    vocab: int = 16,
    tied: bool = False,
    scale: float = 0.02,
) -> dict[str, Array]:
    """Random weights with the names and shapes of a Hugging Face Llama, normal of width `scale`.

    `hidden` is a multiple of 8. With `tied` there is no `lm_head.weight`.
    """
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, hidden)}
    kv = hidden // 2
    for layer in range(layers):
        here = f"model.layers.{layer}"
        shapes |= {
            f"{here}.input_layernorm.weight": (hidden,),
            f"{here}.self_attn.q_proj.weight": (hidden, hidden),
            f"{here}.self_attn.k_proj.weight": (kv, hidden),
            f"{here}.self_attn.v_proj.weight": (kv, hidden),
            f"{here}.self_attn.o_proj.weight": (hidden, hidden),
            f"{here}.post_attention_layernorm.weight": (hidden,),
            f"{here}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{here}.mlp.up_proj.weight": (intermediate, hidden),
            f"{here}.mlp.down_proj.weight": (hidden, intermediate),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes[HEAD] = (vocab, hidden)
    return {
        name: (1.0 if "norm" in name else 0.0) + scale * rng.standard_normal(shape)
        for name, shape in shapes.items()
    }


def llama_config(tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The `config.json` that fits the tensors of `llama_like`; tied where they have no head."""
    vocab, hidden = tensors[EMBEDDING].shape
    return {
        **MINIMAL_CONFIG,
        "hidden_size": hidden,
        "intermediate_size": tensors["model.layers.0.mlp.up_proj.weight"].shape[0],
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in tensors),
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM // 2,
        "head_dim": HEAD_DIM,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": HEAD not in tensors,
    }


def perturbed(
    tensors: Mapping[str, Array], rng: np.random.Generator, *, scale: float = 0.01
) -> dict[str, Array]:
    """The same tensors with normal noise of width `scale` added: a "fine-tune" of them."""
    return {
        name: values + scale * rng.standard_normal(values.shape) for name, values in tensors.items()
    }


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, NDArray[Any]],
    *,
    dtype: Dtype | Mapping[str, Dtype] = "F32",
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write `config.json` and safetensors files into a new folder, and return it.

    Args:
        folder: the folder to make, with its parents.
        tensors: name to values, rounded to nearest even.
        dtype: one for all tensors, or one for each name.
        shards: with 1, `model.safetensors`; with more, that many files and an index.
        config: default: `llama_config` of the tensors where they have an embedding, else
            `MINIMAL_CONFIG`.
    """
    folder.mkdir(parents=True)
    if config is None:
        config = llama_config(tensors) if EMBEDDING in tensors else MINIMAL_CONFIG
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        # Dealt out in turn, so that every shard holds tensors from all over the model.
        dealt = {name: tensors[name] for name in list(tensors)[number::shards]}
        total += write_safetensors(folder / file, dealt, dtype)
        weight_map |= dict.fromkeys(dealt, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_safetensors(
    file: Path, tensors: Mapping[str, NDArray[Any]], dtype: Dtype | Mapping[str, Dtype] = "F32"
) -> int:
    """Write one safetensors file; returns the number of bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[bytes] = []
    end = 0
    for name, values in tensors.items():
        kind = dtype if isinstance(dtype, str) else dtype[name]
        parts.append(encoded(values, kind))
        begin, end = end, end + len(parts[-1])
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [begin, end]}
    file.write_bytes(with_header(json.dumps(header).encode(), b"".join(parts)))
    return end


def with_header(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file of any header: its length, itself padded to 8 bytes, and the data."""
    padded = header + b" " * (-len(header) % 8)
    return len(padded).to_bytes(8, "little") + padded + data


def encoded(values: NDArray[Any], dtype: Dtype) -> bytes:
    """The bytes of `values` as stored, little-endian, rounded to nearest even."""
    if dtype == "BF16":
        return _bfloat16_bits(values).astype("<u2").tobytes()
    if dtype in FLOAT8:
        return _float8_bits(values, FLOAT8[dtype]).tobytes()
    kinds: Mapping[str, str] = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
    return values.astype(kinds[dtype]).tobytes()


def stored(values: NDArray[Any], dtype: Dtype) -> Array:
    """The values that are left after rounding to `dtype`, in the same shape."""
    if dtype == "BF16":
        bits = _bfloat16_bits(values).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64)
    if dtype in FLOAT8:
        return np.array(FLOAT8[dtype])[_float8_bits(values, FLOAT8[dtype])]
    kinds = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
    return values.astype(kinds[dtype]).astype(np.float64)


def _float8_values(exponent_bits: int, *, infinities: bool) -> list[float]:
    """What each byte means: sign, exponent, mantissa.

    With `infinities` the highest exponent is kept for them and for NaN, as in IEEE 754; without,
    only its highest mantissa is NaN.
    """
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    found: list[float] = []
    for byte in range(256):
        digits = f"{byte:08b}"
        exponent = int(digits[1 : 1 + exponent_bits], 2)
        fraction = int(digits[1 + exponent_bits :], 2) / 2**mantissa_bits
        highest = exponent == 2**exponent_bits - 1
        if highest and infinities:
            size = float("nan") if fraction else float("inf")
        elif highest and "0" not in digits[1:]:
            size = float("nan")
        elif exponent:
            size = (1 + fraction) * 2.0 ** (exponent - bias)
        else:
            size = fraction * 2.0 ** (1 - bias)
        found.append(-size if digits[0] == "1" else size)
    return found


# dtype -> the number that each byte stands for
FLOAT8: Mapping[str, list[float]] = {
    "F8_E4M3": _float8_values(4, infinities=False),
    "F8_E5M2": _float8_values(5, infinities=True),
}


def _float8_bits(values: NDArray[Any], table: Sequence[float]) -> NDArray[np.uint8]:
    """The byte of the nearest finite number; of two as near, the even one."""
    finite = [byte for byte in range(256) if np.isfinite(table[byte])]
    # Sorted so that the first of the nearest is the even byte; that of 0 is 0 and not 128.
    order = np.array(sorted(finite, key=lambda byte: (byte % 2, byte)), np.uint8)
    numbers = np.array(table)[order]
    nearest = np.abs(np.asarray(values, np.float64)[..., None] - numbers).argmin(axis=-1)
    found: NDArray[np.uint8] = order[nearest]
    return found


def _bfloat16_bits(values: NDArray[Any]) -> NDArray[np.uint32]:
    """The upper half of each float32, rounded to nearest even; NaN stays NaN."""
    single = np.ascontiguousarray(values, np.float32).reshape(values.shape)
    bits = single.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(single), 0x7FC0, rounded).astype(np.uint32)


def delta_matrix(
    base: Mapping[str, Array], models: Sequence[Mapping[str, Array]], names: Sequence[str]
) -> Array:
    """The oracle's deltas: one row a model, the tensors of `names` one after the other."""
    return np.stack(
        [np.concatenate([(model[name] - base[name]).ravel() for name in names]) for model in models]
    )
