"""A model that was opened: its tensors, its config, and the files that it came from.

Knows no format and reads nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modelkin.checkpoint.reading import printable, shown
from modelkin.checkpoint.tensors import Releasable, Tensor

# The output head. Where it is tied to the embedding, a model stores it once, as the embedding.
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A readable model.

    Attributes:
        name: what to call it in messages and tables.
        folder: where it is; the file itself for a GGUF file.
        tensors: tensor name to tensor; a tied output head that is stored twice is listed once.
        config: the content of `config.json`, or what stands for it.
        revision: the Hub commit it was downloaded from, if it was.
        files: all files that decide the weights, those of an adapter's base included.
        base: for an adapter, the model that it changes.
        held: what holds memory for the tensors.
    """

    name: str
    folder: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    revision: str | None = None
    files: tuple[Path, ...] = ()
    base: "Checkpoint | None" = field(default=None, repr=False)
    held: tuple[Releasable, ...] = field(default=(), repr=False, compare=False)

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.count for tensor in self.tensors.values())

    @property
    def architecture(self) -> str:
        """The architecture's name in `config.json`, `unknown` where it names none."""
        names = self.config.get("architectures")
        first = names[0] if isinstance(names, list) and names else self.config.get("model_type")
        if not isinstance(first or "", str):
            return shown(first)
        return printable(first or "unknown")[:100]

    def release(self) -> None:
        """Drop what was read of its files from memory; the next read gets it again.

        What `read` handed out stays valid. Does nothing for pickled weights, which torch holds.
        """
        for held in self.held:
            held.release()
