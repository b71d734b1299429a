"""LoRA adapters as models: which tensors of the base an adapter changes, and how.

Knows the files that PEFT writes and the names in them, and the base only through its tensors.
How a change is computed is in `lora`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modelkin.checkpoint.adapter_config import AdapterSettings, read_settings
from modelkin.checkpoint.hub import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS
from modelkin.checkpoint.lora import TILE, AdaptedTensor, FactorCache, Pair
from modelkin.checkpoint.model import HEAD, Checkpoint
from modelkin.checkpoint.pickled import read_pickle
from modelkin.checkpoint.reading import is_file, listing, shown
from modelkin.checkpoint.safetensors import read_header
from modelkin.checkpoint.tensors import (
    Releasable,
    Tensor,
    as_float64,
)
from modelkin.errors import CheckpointError

PREFIX = "base_model.model."
# Transformers' modules that store weights as (in, out) are those of these families.
_CONV1D_FAMILIES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")

_PARTS: Mapping[str, tuple[str, str]] = {
    # the end of a tensor's name -> (kind of factors, which one)
    ".lora_A.weight": ("linear", "A"),
    ".lora_B.weight": ("linear", "B"),
    ".lora_embedding_A": ("embedding", "A"),
    ".lora_embedding_B": ("embedding", "B"),
}


def open_adapter(
    folder: Path, base: Checkpoint, *, name: str, revision: str | None, allow_pickle: bool
) -> Checkpoint:
    """The model that a LoRA adapter makes of its base.

    Raises:
        CheckpointError: a kind of adapter that is not supported, or one that does not fit.
    """
    settings = read_settings(folder / ADAPTER_CONFIG)
    file = folder / ADAPTER_WEIGHTS
    stored: Mapping[str, Tensor]
    held: list[Releasable] = []
    if is_file(file):
        stored = found = read_header(file)
        held += {id(one.weights): one.weights for one in found.values()}.values()
    elif is_file(folder / ADAPTER_PICKLE) and allow_pickle:
        file = folder / ADAPTER_PICKLE
        stored = read_pickle(file)
    else:
        hint = f"; {ADAPTER_PICKLE} is read with --allow-pickle only"
        raise CheckpointError(
            f"{folder}: expected {ADAPTER_WEIGHTS}, found {listing(folder)}"
            f"{hint if is_file(folder / ADAPTER_PICKLE) else ''}"
        )
    cache = FactorCache()
    adapter = _Adapter(file, settings, base, cache)
    tensors, untied = adapter.applied(stored)
    return Checkpoint(
        name=name,
        folder=folder,
        tensors=dict(sorted(tensors.items())),
        config={**base.config, "tie_word_embeddings": False} if untied else base.config,
        revision=revision,
        files=tuple(sorted({folder / ADAPTER_CONFIG, file, *base.files})),
        base=base,
        held=(*held, cache, *base.held),
    )


@dataclass(frozen=True)
class _Adapter:
    """One adapter's tensors, on their way to the names and shapes of the base."""

    file: Path
    settings: AdapterSettings
    base: Checkpoint
    cache: FactorCache

    def applied(self, stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """The model's tensors, and whether its head is no longer the embedding."""
        if not stored:
            raise CheckpointError(f"{self.file}: expected the tensors of an adapter, found none")
        replaced, factors = self._sorted(stored)
        tensors = dict(self.base.tensors)
        untied = self._tied_pair(tensors, replaced, factors)
        for name, (original, tensor) in replaced.items():
            if tensor.shape != tensors[name].shape:
                raise CheckpointError(
                    f"{self.file}: tensor {original!r}: expected the base's shape "
                    f"{list(tensors[name].shape)}, found {list(tensor.shape)}"
                )
            tensors[name] = tensor
        seen_plain = any(
            _fitting(found, tensors[name].shape) == {False}
            for name, found in factors.items()
            if found.kind == "linear" and set(found.parts) == {"A", "B"}
        )
        for name, found in factors.items():
            tensors[name] = self._adapted(tensors[name], found, seen_plain)
        return tensors, untied

    def _sorted(
        self, stored: Mapping[str, Tensor]
    ) -> tuple[dict[str, tuple[str, Tensor]], dict[str, "_Found"]]:
        """By the base's names: full replacements, and pairs of factors."""
        replaced: dict[str, tuple[str, Tensor]] = {}
        factors: dict[str, _Found] = {}
        for original, tensor in stored.items():
            name = original.removeprefix(PREFIX)
            ending = next((part for part in _PARTS if name.endswith(part)), None)
            if ending is not None:
                kind, which = _PARTS[ending]
                module = name.removesuffix(ending)
                target = self._name(original, f"{module}.weight")
                found = factors.setdefault(target, _Found(module, kind))
                if found.module != module or found.kind != kind or which in found.parts:
                    raise CheckpointError(
                        f"{self.file}: tensor {original!r}: expected one pair of factors for "
                        f"{target}, found another"
                    )
                found.parts[which] = (original, tensor)
            elif ".lora_" in name:
                raise CheckpointError(
                    f"{self.file}: tensor {original!r}: expected lora_A and lora_B, found a part "
                    "of another kind of adapter, which is not supported"
                )
            else:
                # A weight of a module that is saved whole, a bias, or an adapted embedding's own.
                target = self._name(original, name.replace(".base_layer.", "."))
                if target in replaced:
                    raise CheckpointError(
                        f"{self.file}: tensor {original!r}: expected one tensor for {target}, "
                        f"found {replaced[target][0]!r} too"
                    )
                replaced[target] = (original, tensor)
        return replaced, factors

    def _name(self, original: str, name: str) -> str:
        """The base's name of a tensor; some bases lack the first part, the class's name."""
        for candidate in (name, name.partition(".")[2]):
            if candidate in self.base.tensors or (candidate == HEAD and self._embedding()):
                return candidate
        raise CheckpointError(
            f"{self.file}: tensor {original!r}: expected a tensor of the base {self.base.name}, "
            f"which has no {name}"
        )

    def _embedding(self) -> str | None:
        """The base's embedding, where the head is tied to it."""
        # Some families tie by default and do not say so; encoders have no head.
        has_head = self.base.config.get("tie_word_embeddings") or "LM" in self.base.architecture
        if HEAD in self.base.tensors or not has_head:
            return None
        ends = tuple(f".{module}.weight" for module in _EMBEDDINGS)
        return next((name for name in self.base.tensors if f".{name}".endswith(ends)), None)

    def _tied_pair(
        self,
        tensors: dict[str, Tensor],
        replaced: dict[str, tuple[str, Tensor]],
        factors: dict[str, "_Found"],
    ) -> bool:
        """Settle what becomes of a head that is tied in the base; whether it is so no longer.

        A change of one of the two unties them: the head gets a tensor of its own.
        """
        embedding = self._embedding()
        if embedding is None:
            return False
        if self.settings.tied:
            if HEAD in factors and embedding not in factors:
                raise CheckpointError(
                    f"{self.file}: expected factors of {embedding}, which the head is tied to, "
                    "found those of the head alone"
                )
            # The head's entries repeat the embedding's.
            replaced.pop(HEAD, None)
            factors.pop(HEAD, None)
            return False
        for name in (HEAD, embedding):
            if name in factors:
                raise CheckpointError(
                    f"{self.file}: changes {name} by a LoRA, while the base's head is tied to its "
                    "embedding: run as an adapter it changes one of them, merged it changes both, "
                    "so it is not clear which model is meant"
                )
        if HEAD not in replaced and embedding not in replaced:
            return False
        head = replaced.get(HEAD, ("", tensors[embedding]))[1]
        body = replaced.get(embedding, ("", tensors[embedding]))[1]
        if head.shape == body.shape and _equal(head, body):
            replaced.pop(HEAD, None)
            return False
        tensors[HEAD] = tensors[embedding]
        return True

    def _adapted(self, base: Tensor, found: "_Found", seen_plain: bool) -> AdaptedTensor:
        for which in "AB":
            if which not in found.parts:
                original = next(iter(found.parts.values()))[0]
                raise CheckpointError(
                    f"{self.file}: tensor {original!r}: expected the factors A and B of "
                    f"{found.module}, found no {which}"
                )
        (name_a, a), (name_b, b) = found.parts["A"], found.parts["B"]
        rank = self.settings.rank_of(found.module)
        for name, tensor, axis in ((name_a, a, 0), (name_b, b, 1)):
            if len(tensor.shape) != 2 or tensor.shape[axis] != rank:
                expected = "(rank, in)" if axis == 0 else "(out, rank)"
                raise CheckpointError(
                    f"{self.file}: tensor {name!r}: expected a shape {expected} of rank "
                    f"{shown(rank)}, found {list(tensor.shape)}"
                )
        fits = _fitting(found, base.shape)
        if not fits:
            raise CheckpointError(
                f"{self.file}: tensor {name_b!r}: expected factors of a weight of shape "
                f"{list(base.shape)}, found {list(b.shape)} and, as {name_a}, {list(a.shape)}"
            )
        turned = fits == {True} or (len(fits) == 2 and self._turned(seen_plain))
        pair = Pair(a, b, transposed=True) if turned else Pair(b, a, transposed=False)
        return AdaptedTensor(base, pair, self.settings.scale_of(found.module), self.cache)

    def _turned(self, seen_plain: bool) -> bool:
        """Whether square weights are stored as (in, out), which their shape does not show.

        PEFT goes by the class of the module and corrects the setting: where other weights of the
        adapter are seen to be (out, in), the setting is wrong.
        """
        if self.base.config.get("model_type") in _CONV1D_FAMILIES:
            return True
        return self.settings.transposed and not seen_plain


@dataclass
class _Found:
    """The factors of one module that were found so far, each with its name in the file."""

    module: str
    kind: str
    parts: dict[str, tuple[str, Tensor]] = field(default_factory=dict)


def _fitting(found: _Found, shape: tuple[int, ...]) -> set[bool]:
    """Which of B @ A (False) and its transpose (True) have the shape of the base's weight."""
    (_, a), (_, b) = found.parts["A"], found.parts["B"]
    if len(a.shape) != 2 or len(b.shape) != 2:
        return set()
    product = (b.shape[0], a.shape[1])
    fits = {turned for turned in (False, True) if shape == product[:: -1 if turned else 1]}
    return fits & {True} if found.kind == "embedding" else fits


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers."""
    return all(
        np.array_equal(
            as_float64(one.read(start, start + TILE), one.format),
            as_float64(other.read(start, start + TILE), other.format),
        )
        for start in range(0, one.count, TILE)
    )
