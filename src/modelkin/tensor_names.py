"""What the names of tensors say: the layer, the kind of module, and which ones a pattern means.

Pure; knows the names that Hugging Face architectures give to their tensors, and nothing else.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from modelkin.errors import ConfigError

Level = Literal["model", "layer", "module", "tensor"]
LEVELS: tuple[Level, ...] = ("model", "layer", "module", "tensor")

# Kinds of module, in the order in which a model uses them.
KINDS = (
    "embeddings",
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "mlp",
    "norm",
    "head",
    "other",
)
# What belongs to no layer: this comes before the layers, the rest behind them.
_FIRST = ("embeddings",)
_LAST = ("norm", "head", "other")

# The outermost list of layers: model.layers.3, transformer.h.3, encoder.block.3.layer.0
_LAYER = re.compile(
    r"(?:^|(?P<stack>.*?)\.)(?:layers?|h|blocks?|resblocks)\.(?P<number>\d+)(?:\.|$)"
)
_NORM = re.compile(r"norm|^ln$|^ln_\w+$|^ln\d$", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|moe|expert|router|dense_?relu_?dense|^intermediate", re.IGNORECASE
)
_EMBEDDINGS = re.compile(r"embed|^wte$|^wpe$|^shared$", re.IGNORECASE)
_HEADS = {
    "lm_head",
    "embed_out",
    "output_projection",
    "score",
    "classifier",
    "cls",
    "qa_outputs",
    "pre_classifier",
    "v_head",
}
_PROJECTIONS: Mapping[str, str] = {
    **dict.fromkeys(("q_proj", "q", "query", "wq", "q_lin", "to_q"), "q_proj"),
    **dict.fromkeys(("q_a_proj", "q_b_proj"), "q_proj"),
    **dict.fromkeys(("k_proj", "k", "key", "wk", "k_lin", "to_k"), "k_proj"),
    **dict.fromkeys(("v_proj", "v", "value", "wv", "v_lin", "to_v"), "v_proj"),
    # Query, key and value in one tensor, or any two of them.
    **dict.fromkeys(("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv"), "qkv_proj"),
    **dict.fromkeys(("in_proj", "in_proj_weight", "in_proj_bias", "qkv_bias"), "qkv_proj"),
    **dict.fromkeys(("kv_a_proj_with_mqa", "kv_b_proj", "kv_proj"), "qkv_proj"),
    **dict.fromkeys(("o_proj", "out_proj", "o", "wo", "o_lin", "out_lin", "dense"), "o_proj"),
    **dict.fromkeys(("c_proj", "proj", "to_out", "output"), "o_proj"),
}
# Parts of an MLP that stand in a layer without a module of that name around them.
_MLP_PARTS = {
    *("fc1", "fc2", "fc_in", "fc_out", "c_fc", "lin1", "lin2", "linear1", "linear2"),
    *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "dense_h_to_4h", "dense_4h_to_h"),
}


def kind(name: str) -> str:
    """The kind of module that a tensor belongs to, one of `KINDS`.

    Experts and routers count as "mlp", query, key and value in one tensor as "qkv_proj", and
    what is none of a transformer's usual parts as "other".

    >>> kind("model.layers.0.self_attn.q_proj.weight")
    'q_proj'
    >>> kind("transformer.h.11.mlp.c_proj.bias")
    'mlp'
    """
    parts = name.split(".")
    leaf = parts[-1]
    # The module that the tensor is a parameter of; a bare parameter has a telling name itself.
    owner = parts[-2] if len(parts) > 1 and leaf in ("weight", "bias") else leaf
    in_layer = _LAYER.match(name) is not None
    if _NORM.search(owner):
        return "norm"
    if any(_ATTENTION.search(part) for part in parts):
        # From the inside out: `attention.output.dense`, `self_attn.q_proj.base_layer`.
        for part in reversed(parts):
            if part in _PROJECTIONS:
                return _PROJECTIONS[part]
        return "other"
    if any(_MLP.search(part) for part in parts) or not _MLP_PARTS.isdisjoint(parts):
        return "mlp"
    if in_layer:
        # The second half of BERT's MLP: `encoder.layer.0.output.dense`.
        return "mlp" if parts[-3:-1] == ["output", "dense"] else "other"
    # `output` alone is the head of checkpoints in the original Llama format.
    if not _HEADS.isdisjoint(parts) or owner == "output":
        return "head"
    if any(_EMBEDDINGS.search(part) for part in parts):
        return "embeddings"
    return "other"


def group(names: Sequence[str], level: Level) -> dict[str, list[int]]:
    """Positions of tensors by group, groups in the order in which a model uses them.

    Layers are named by their number, and by their stack too where a model has more than one:
    "encoder.0", "decoder.0". What is in no layer forms groups "embeddings", "norm", "head" and
    "other", so that every tensor is in exactly one group of each level.

    Args:
        names: T distinct names of tensors.
        level: "model" is one group of all, "tensor" a group for each.

    >>> group(["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"], "layer")
    {'embeddings': [0], '0': [1]}
    """
    if level == "model":
        return {"model": list(range(len(names)))} if names else {}
    kinds = [kind(name) for name in names]
    # What a layer's list does not hold is outside of all layers, whatever kind it looks like.
    outside = [found if found in (*_FIRST, *_LAST) else "other" for found in kinds]
    layers = _layers(names)
    labels = _layer_labels(layers)
    stacks = list(dict.fromkeys(stack for stack, _ in layers.values()))

    def order(position: int) -> tuple[int, int, int, int]:
        own_kind = KINDS.index(kinds[position])
        if names[position] in layers:
            stack, number = layers[names[position]]
            return (1, stacks.index(stack), number, own_kind)
        name = outside[position]
        return (0 if name in _FIRST else 2, KINDS.index(name), 0, own_kind)

    groups: dict[str, list[int]] = {}
    for position in sorted(range(len(names)), key=order):
        name = names[position]
        if level == "layer":
            name = labels.get(name, outside[position])
        elif level == "module":
            name = kinds[position]
        groups.setdefault(name, []).append(position)
    if level == "module":
        return {name: groups[name] for name in KINDS if name in groups}
    return groups


def _layers(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """The stack of layers and the number in it, of each name that is in a layer."""
    found = ((name, _LAYER.match(name)) for name in names)
    return {name: (hit["stack"] or "", int(hit["number"])) for name, hit in found if hit}


def _layer_labels(layer_of: Mapping[str, tuple[str, int]]) -> dict[str, str]:
    stacks = {tuple(stack.split(".")) for stack, _ in layer_of.values()}
    # What all stacks begin with tells none of them from another.
    shared = 0
    for parts in zip(*stacks, strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    labels: dict[str, str] = {}
    for name, (stack, number) in layer_of.items():
        own = stack.split(".")[shared:]
        labels[name] = ".".join([*filter(None, own), str(number)])
    return labels


def select(
    names: Iterable[str], include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[str, ...]:
    """The names that at least one pattern of `include`, if any, and none of `exclude` matches.

    A pattern with `*`, `?` or `[` is matched with the whole name, as in a shell. One without
    stands for whole parts between dots: `q_proj` for every query projection, `layers.1` for
    layer 1 and not for layer 10, a full name for one tensor. Case matters.

    >>> select(["layers.1.mlp.weight", "layers.10.mlp.weight"], include=["layers.1"])
    ('layers.1.mlp.weight',)

    Raises:
        ConfigError: a pattern matches none of `names`, or nothing is left.
    """
    names = tuple(names)
    # One pattern given bare is meant as one, and not as its letters.
    wanted = (include,) if isinstance(include, str) else include
    unwanted = (exclude,) if isinstance(exclude, str) else exclude
    for option, patterns in (("include", wanted), ("exclude", unwanted)):
        for pattern in patterns:
            if not any(_matches(name, pattern) for name in names):
                example = f", such as {names[0]}" if names else ""
                raise ConfigError(
                    f"{option}: expected a pattern that matches a tensor, found {pattern!r}, "
                    f"which matches none of {len(names)}{example}"
                )
    left = tuple(
        name
        for name in names
        if (not wanted or any(_matches(name, pattern) for pattern in wanted))
        and not any(_matches(name, pattern) for pattern in unwanted)
    )
    if not left:
        raise ConfigError(
            f"include, exclude: expected at least one tensor to be left, found none of {len(names)}"
        )
    return left


def _matches(name: str, pattern: str) -> bool:
    if any(wildcard in pattern for wildcard in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."
