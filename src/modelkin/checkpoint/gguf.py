"""GGUF files as models: Hugging Face's names and shapes, weights dequantised slice by slice.

Knows what llama.cpp changes when it converts a model, for the architectures in `SUPPORTED`, each
checked against transformers' own reading of such files. The quantised formats themselves are the
package gguf's, imported only when it is needed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelkin.checkpoint.gguf_header import GgufEntry, GgufHeader, read_gguf_header
from modelkin.checkpoint.model import HEAD
from modelkin.checkpoint.reading import opened
from modelkin.checkpoint.tensors import DTYPES, WeightFile, refuse_overlaps, within
from modelkin.errors import CheckpointError, MissingExtraError, one_line

# GGUF's name -> the class of transformers. Mistral's files say llama.
SUPPORTED: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_MODULES = ("model.embed_tokens", "model.norm", "lm_head")
_LAYER_MODULES = (
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
    *("input_layernorm", "post_attention_layernorm"),
)
# Follows from the config, and is no weight.
_LEFT_OUT = ("rope_freqs.weight",)
# Quantised elements handled at once.
_TILE = 1 << 18


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a GGUF file, whose elements come in blocks.

    Attributes:
        weights: the file.
        dtype: GGML's name of its format.
        kind: GGML's number of it.
        shape: in Hugging Face's order.
        offset: where it begins in the file.
        block: elements of a block; 1 if it is not quantised.
        block_bytes: bytes of a block.
        heads: where not 0, each head's rows are interleaved, as llama.cpp stores them for its
            rotary embedding, and are put back in order when they are read.
    """

    weights: WeightFile
    dtype: str
    kind: int = field(repr=False)
    shape: tuple[int, ...]
    offset: int
    block: int
    block_bytes: int
    heads: int = 0

    @property
    def file(self) -> Path:
        """The file it lies in."""
        return self.weights.path

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Number of stored bytes."""
        return self.count // self.block * self.block_bytes

    @property
    def format(self) -> str:
        """The stored format, float32 if it is quantised."""
        return self.dtype if self.dtype in DTYPES else "F32"

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The flat elements [start, stop); a view of the file if they are stored as they are."""
        start, stop = within(start, stop, self.count)
        if self.dtype in DTYPES and not self.heads:
            return self._stored(start, stop).view(DTYPES[self.format])
        values_B = np.empty(stop - start, DTYPES[self.format])
        for at in range(start, stop, _TILE):
            end = min(at + _TILE, stop)
            part_B = self._in_order(at, end) if self.heads else self._in_blocks(at, end)
            values_B[at - start : end - start] = part_B
        return values_B

    def _in_blocks(self, start: int, stop: int) -> NDArray[Any]:
        """The elements of a slice, by way of the blocks that they are in."""
        first = start // self.block * self.block
        whole_B = self._widened(self._stored(first, -(-stop // self.block) * self.block))
        return whole_B[start - first : stop - first]

    def _in_order(self, start: int, stop: int) -> NDArray[Any]:
        """The elements of a slice, by way of the rows that they are in, put back in order."""
        row = self.count // self.shape[0]
        first, last = start // row, -(-stop // row)
        half = self.shape[0] // self.heads // 2
        # Of a head's rows, llama.cpp stores the two halves in turn.
        head_R, within_R = np.divmod(np.arange(first, last), 2 * half)
        part_R, row_R = np.divmod(within_R, half)
        stored_R = head_R * 2 * half + 2 * row_R + part_R
        rows_RB = self._stored(0, self.count).reshape(self.shape[0], -1)[stored_R]
        return self._widened(rows_RB.reshape(-1))[start - first * row : stop - first * row]

    def _stored(self, start: int, stop: int) -> NDArray[Any]:
        """The bytes of whole blocks."""
        begin, end = (at // self.block * self.block_bytes for at in (start, stop))
        return self.weights.view(self.offset + begin, "u1", end - begin)

    def _widened(self, stored_B: NDArray[Any]) -> NDArray[Any]:
        if self.dtype in DTYPES:
            return stored_B.view(DTYPES[self.format])
        import gguf

        # One row, however long: the package takes rows in small groups.
        with np.errstate(over="ignore", invalid="ignore"):
            values_B = gguf.dequantize(
                stored_B.reshape(1, -1), gguf.GGMLQuantizationType(self.kind)
            )
        return np.ascontiguousarray(values_B.reshape(-1), DTYPES[self.format])


@dataclass(frozen=True)
class GgufModel:
    """The tensors of a file by Hugging Face's names, and what stands for `config.json`."""

    tensors: dict[str, GgufTensor]
    config: dict[str, Any]


def open_gguf(file: Path) -> GgufModel:
    """The model in a GGUF file; reads its header.

    Raises:
        CheckpointError: it is broken, split, or of an architecture that is not supported.
        MissingExtraError: the package gguf is not installed.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("gguf", "gguf") from error
    with opened(file) as stream:
        weights = WeightFile(file, stream.seek(0, 2))
    header = read_gguf_header(weights)
    config = _config(file, header)
    names = _names(file, header)
    tensors: dict[str, GgufTensor] = {}
    for stored, entry in header.tensors.items():
        if stored in _LEFT_OUT:
            continue
        module, _, kind = stored.rpartition(".")
        if module not in names or kind not in ("weight", "bias"):
            raise CheckpointError(
                f"{file}: tensor {stored!r}: expected a tensor of a {_architecture(file, header)} "
                "model, found one that is not known there"
            )
        tensors[f"{names[module]}.{kind}"] = _tensor(weights, stored, entry, _heads(config, stored))
    refuse_overlaps(
        file, ((one.offset, one.offset + one.bytes, name) for name, one in tensors.items())
    )
    config["tie_word_embeddings"] = HEAD not in tensors
    return GgufModel(tensors, config)


def _architecture(file: Path, header: GgufHeader) -> str:
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in SUPPORTED:
        raise CheckpointError(
            f"{file}: general.architecture: expected one of {', '.join(SUPPORTED)}, "
            f"found {repr(name)[:100]}"
        )
    return name


def _config(file: Path, header: GgufHeader) -> dict[str, Any]:
    """What is needed of a `config.json`; models are compared by `architectures`."""
    name = _architecture(file, header)
    metadata = header.metadata

    def number(key: str, least: int, default: int | None = None) -> int:
        value = metadata.get(key, default)
        if type(value) is not int or value < least:
            raise CheckpointError(
                f"{file}: {key}: expected a whole number of at least {least}, found {value!r:.100}"
            )
        return value

    if number("split.count", 0, 0) > 1:
        raise CheckpointError(
            f"{file}: is one of {metadata['split.count']} parts: join them first, with llama.cpp's "
            "gguf-split --merge"
        )
    if number(f"{name}.expert_count", 0, 0) > 0:
        raise CheckpointError(f"{file}: holds a mixture of experts, which is not supported in GGUF")
    heads = number(f"{name}.attention.head_count", 1)
    return {
        "architectures": [SUPPORTED[name]],
        "model_type": name,
        "hidden_size": number(f"{name}.embedding_length", 1),
        "num_hidden_layers": number(f"{name}.block_count", 1),
        "num_attention_heads": heads,
        "num_key_value_heads": number(f"{name}.attention.head_count_kv", 1, heads),
    }


def _names(file: Path, header: GgufHeader) -> dict[str, str]:
    """GGUF's names of modules -> Hugging Face's."""
    import gguf

    name = _architecture(file, header)
    layers = header.metadata[f"{name}.block_count"]
    # The package's table of names grows with it, to gigabytes for a number that is none.
    if layers > len(header.tensors):
        raise CheckpointError(
            f"{file}: {name}.block_count: expected at most {len(header.tensors)}, the number of "
            f"tensors, found {layers}"
        )
    number = next(one for one, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    found = gguf.get_tensor_name_map(number, layers)
    modules = [*_MODULES]
    for layer in range(layers):
        modules += (f"model.layers.{layer}.{module}" for module in _LAYER_MODULES)
    named = ((found.get_name(module), module) for module in modules)
    return {stored: module for stored, module in named if stored is not None}


def _heads(config: Mapping[str, Any], stored: str) -> int:
    """How many heads' rows are interleaved in a tensor: llama's queries and keys."""
    if config["model_type"] != "llama":
        return 0
    if ".attn_q." in stored:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if ".attn_k." in stored else 0


def _tensor(weights: WeightFile, name: str, entry: GgufEntry, heads: int) -> GgufTensor:
    import gguf

    file = weights.path
    try:
        kind = gguf.GGMLQuantizationType(entry.kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if kind.name not in DTYPES:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"{file}: tensor {name!r}: expected a type of weights that the package gguf can read, "
            f"found {entry.kind} ({one_line(error)[:100]})"
        ) from error
    shape = entry.shape[::-1]
    if not shape or entry.shape[0] % block:
        raise CheckpointError(
            f"{file}: tensor {name!r}: expected rows of a multiple of {block} elements for "
            f"{kind.name}, found the shape {list(shape)}"
        )
    end = entry.offset + entry.count // block * block_bytes
    if end > weights.size:
        raise CheckpointError(
            f"{file}: is truncated: tensor {name!r} ends at byte {end}, the file has {weights.size}"
        )
    if heads and shape[0] % (2 * heads):
        raise CheckpointError(
            f"{file}: tensor {name!r}: expected rows for {heads} heads, found {shape[0]} rows"
        )
    return GgufTensor(
        weights, kind.name, entry.kind, shape, entry.offset, block, block_bytes, heads
    )
