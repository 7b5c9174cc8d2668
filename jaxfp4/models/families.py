"""What the supported model families have in common with Llama, and where they differ; the rules are transformers'."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping


class AttentionBias(enum.Enum):
    """Which attention projections have a bias."""

    NEVER = "none"
    SETTING = "all four if `attention_bias` is true"
    QKV = "always queries, keys and values, never the output"


class Window(enum.Enum):
    """How a ``config.json`` asks for a sliding window."""

    NEVER = "not at all"
    ALL_LAYERS = "`sliding_window`, for all layers"
    SWITCH = "`sliding_window` with `use_sliding_window`, for all layers"
    BY_LAYER = "the same with `layer_types`, or else for the layers from `max_window_layers` on"


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type`. The last fields are what a key that is missing in the ``config.json`` stands for."""

    architecture: str
    attention_bias: AttentionBias = AttentionBias.NEVER
    #: Whether there is a setting `mlp_bias`.
    mlp_bias: bool = False
    qk_norm: bool = False
    window: Window = Window.NEVER
    experts: bool = False
    #: Name of the MLP in the checkpoint, and of its experts' matrices.
    mlp_module: str = "mlp"
    expert_matrices: tuple[tuple[str, str], ...] = ()

    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    #: None: as many as query heads.
    num_key_value_heads: int | None = None
    #: None: `hidden_size` split over the query heads.
    head_dim: int | None = None
    sliding_window: int | None = 4096


FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", AttentionBias.SETTING, mlp_bias=True),
    "mistral": Family("MistralForCausalLM", window=Window.ALL_LAYERS, num_key_value_heads=8),
    "qwen2": Family("Qwen2ForCausalLM", AttentionBias.QKV, window=Window.BY_LAYER, num_key_value_heads=32),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        AttentionBias.SETTING,
        qk_norm=True,
        window=Window.BY_LAYER,
        num_key_value_heads=32,
        head_dim=128,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        window=Window.ALL_LAYERS,
        experts=True,
        mlp_module="block_sparse_moe",
        expert_matrices=(("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")),
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        num_key_value_heads=8,
        sliding_window=None,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        AttentionBias.SETTING,
        qk_norm=True,
        window=Window.SWITCH,
        experts=True,
        num_key_value_heads=4,
    ),
}
