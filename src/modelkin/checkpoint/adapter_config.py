"""The settings of a LoRA adapter that decide its weight change, read strictly.

PEFT writes them as `adapter_config.json`. What is not understood here is refused by name: a
setting that is passed over would give another model without anybody noticing. Knows no tensors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelkin.checkpoint.patterns import ModulePattern, Steps
from modelkin.checkpoint.reading import read_json, shown
from modelkin.errors import CheckpointError

# Say nothing about the weight change: training, placement, where it was made, or which modules
# were chosen, which the tensors' names say again.
_WITHOUT_EFFECT = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
        *("peft_version", "target_modules", "exclude_modules", "layers_to_transform"),
        *("layers_pattern", "modules_to_save", "lora_dropout", "bias", "megatron_core"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size"),
        *("runtime_config", "unsloth_fixed"),
    }
)
_UNDERSTOOD = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("fan_in_fan_out", "init_lora_weights", "ensure_weight_tying"),
    }
)
# These change the base's weights before the training: the adapter belongs to what was left.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KNOWN_STARTS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class AdapterSettings:
    """How an adapter's two factors become a weight change.

    Attributes:
        rank: of modules that no pattern names.
        alpha: of modules that no pattern names.
        ranks: patterns of module names, in order, and their ranks.
        alphas: patterns of module names, in order, and their alphas.
        rank_stabilised: the scale is alpha / sqrt(rank), not alpha / rank.
        transposed: the base's weights are stored (in, out), where that cannot be seen.
        tied: the head goes on being the embedding, however it is changed.
    """

    rank: int
    alpha: float
    ranks: tuple[tuple[ModulePattern, int], ...] = ()
    alphas: tuple[tuple[ModulePattern, float], ...] = ()
    rank_stabilised: bool = False
    transposed: bool = False
    tied: bool = False

    def rank_of(self, module: str) -> int:
        """The rank of a module, by the first pattern that matches the end of its name."""
        return next((rank for pattern, rank in self.ranks if pattern.match(module)), self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of a module's factors is multiplied by."""
        rank = self.rank_of(module)
        alpha = next((alpha for found, alpha in self.alphas if found.match(module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_settings(file: Path) -> AdapterSettings:
    """The settings in an `adapter_config.json`.

    Raises:
        CheckpointError: it is no LoRA adapter, or one of a kind that is not understood here.
    """
    config = read_json(file)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type: expected 'LORA', found {shown(kind)}")
    for key, value in config.items():
        # What is off needs no understanding: older and newer versions name more.
        off = value is None or value is False or value in ({}, [], "")
        if key not in _WITHOUT_EFFECT | _UNDERSTOOD and not off:
            raise CheckpointError(
                f"{file}: {shown(key)[1:-1]}: adapters with this setting are not supported, "
                f"found {shown(value)}"
            )
    _check_start(file, config.get("init_lora_weights", True))
    steps = Steps()
    return AdapterSettings(
        rank=_rank(file, "r", config.get("r", 8)),
        alpha=_alpha(file, "lora_alpha", config.get("lora_alpha", 8)),
        ranks=tuple(
            (pattern, _rank(file, key, value))
            for key, pattern, value in _patterns(file, "rank_pattern", config, steps)
        ),
        alphas=tuple(
            (pattern, _alpha(file, key, value))
            for key, pattern, value in _patterns(file, "alpha_pattern", config, steps)
        ),
        rank_stabilised=_flag(file, "use_rslora", config),
        transposed=_flag(file, "fan_in_fan_out", config),
        tied=_flag(file, "ensure_weight_tying", config),
    )


def _check_start(file: Path, value: Any) -> None:
    """How the factors were initialised must not matter any more."""
    if value is None or isinstance(value, bool) or value in _KNOWN_STARTS:
        return
    if isinstance(value, str) and value.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights: expected a plain LoRA, found {shown(value)}, which "
            "changes the base's weights before the training: save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    raise CheckpointError(
        f"{file}: init_lora_weights: expected true, false or one of {', '.join(_KNOWN_STARTS)}, "
        f"found {shown(value)}"
    )


def _patterns(
    file: Path, key: str, config: Mapping[str, Any], steps: Steps
) -> list[tuple[str, ModulePattern, Any]]:
    patterns = config.get(key)
    if patterns is None:
        return []
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{file}: {key}: expected an object, found {shown(patterns)}")
    return [
        (f"{key}.{shown(text)[1:-1]}", ModulePattern(text, f"{file}: {key}", steps), value)
        for text, value in patterns.items()
    ]


def _rank(file: Path, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise CheckpointError(
            f"{file}: {key}: expected a whole number above 0, found {shown(value)}"
        )
    return value


def _alpha(file: Path, key: str, value: Any) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise CheckpointError(
            f"{file}: {key}: expected a number of at least 0, found {shown(value)}"
        )
    return number


def _flag(file: Path, key: str, config: Mapping[str, Any]) -> bool:
    value = config.get(key)
    if value is not None and type(value) is not bool:
        raise CheckpointError(f"{file}: {key}: expected true or false, found {shown(value)}")
    return bool(value)
