"""The shape of a decoder, read from and written to a Hugging Face ``config.json``.

Only what changes the numbers is kept. A setting that this package does not compute (a rotary scaling rule, biases, a
sliding window) is refused by name and value: a model that loads runs as its authors meant it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

SUPPORTED_MODEL_TYPES = ("llama", "qwen3_moe")
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
_POSITIVE_INTEGERS: tuple[str, ...] = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a `Decoder`. Hashable, so that it can key a cache or be a static argument of `jax.jit`.

    `num_experts` is 0 for a model without experts; otherwise layer ``i`` is a mixture of experts exactly when
    `is_moe_layer(i)` says so and an ordinary gated MLP of width `intermediate_size` when not.

    Raises:
        ValueError: a size is not a positive integer, the query heads do not split over the key/value heads, the head
            size is odd (rotary attention pairs its halves), or the expert counts contradict each other.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    #: Width of the dense MLP (of the layers that have one).
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    #: RMSNorm over each head of the queries and keys, before the rotation.
    qk_norm: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    #: Width of one expert.
    moe_intermediate_size: int = 0
    #: Whether the kept routing probabilities are rescaled to sum to one.
    norm_topk_prob: bool = False
    #: Layer i may hold experts only when i + 1 is a multiple of this.
    decoder_sparse_step: int = 1
    #: Layers that are dense whatever `decoder_sparse_step` says.
    mlp_only_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.model_type not in SUPPORTED_MODEL_TYPES:
            raise ValueError(_unsupported("model_type", self.model_type, " or ".join(SUPPORTED_MODEL_TYPES)))
        names = _POSITIVE_INTEGERS
        if self.num_experts:
            names += ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
        for name in names:
            _check_positive_integer(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model config: num_attention_heads is {self.num_attention_heads}, wanted a multiple of "
                f"num_key_value_heads, which is {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model config: head_dim is {self.head_dim}, wanted an even number")
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"model config: num_experts_per_tok is {self.num_experts_per_tok}, wanted at most num_experts, "
                f"which is {self.num_experts}"
            )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) holds experts."""
        if not self.num_experts or layer in self.mlp_only_layers:
            return False
        return (layer + 1) % self.decoder_sparse_step == 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """The decoder that a parsed ``config.json`` describes.

        Both spellings of the rotary base are read: `rope_parameters` (transformers 5) and `rope_theta` (before).

        Raises:
            ValueError: an unknown `model_type`, a missing key, or a setting that this decoder does not compute; the
                message names the key, the value found and what is supported.
        """
        model_type = config.get("model_type")
        if model_type not in SUPPORTED_MODEL_TYPES:
            raise ValueError(_unsupported("model_type", model_type, " or ".join(SUPPORTED_MODEL_TYPES)))
        _refuse_unsupported(config)
        heads = _required(config, "num_attention_heads")
        head_dim = config.get("head_dim")
        if head_dim is None:
            _check_positive_integer("num_attention_heads", heads)
            _check_positive_integer("hidden_size", _required(config, "hidden_size"))
            head_dim = config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads")
        is_moe = model_type == "qwen3_moe"
        return cls(
            model_type=model_type,
            vocab_size=_required(config, "vocab_size"),
            hidden_size=_required(config, "hidden_size"),
            intermediate_size=_required(config, "intermediate_size"),
            num_hidden_layers=_required(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_required(config, "max_position_embeddings"),
            rms_norm_eps=_positive_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            rope_theta=_rope_theta(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qk_norm=is_moe,
            **(_expert_fields(config) if is_moe else {}),
        )

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """The ``config.json`` of this decoder, as transformers 5 writes it; `from_hf` reads it back unchanged.

        `dtype` is the name of the stored parameters' type.
        """
        config: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "attention_bias": False,
            "dtype": dtype,
            "hidden_act": "silu",
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
        }
        for field in dataclasses.fields(self):
            if field.name not in ("rope_theta", "qk_norm") and (self.num_experts or field.name not in _EXPERT_FIELDS):
                config[field.name] = getattr(self, field.name)
        if self.num_experts:
            config["mlp_only_layers"] = list(self.mlp_only_layers)
        else:
            config["mlp_bias"] = False
        return dict(sorted(config.items()))


_EXPERT_FIELDS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
)


def _expert_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    experts = config.get("num_experts", config.get("num_local_experts"))
    if experts is None:
        raise ValueError("model config: there is neither num_experts nor num_local_experts; wanted one of them")
    return {
        "num_experts": experts,
        "num_experts_per_tok": _required(config, "num_experts_per_tok"),
        "moe_intermediate_size": _required(config, "moe_intermediate_size"),
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
        "decoder_sparse_step": config.get("decoder_sparse_step", 1),
        "mlp_only_layers": _layer_numbers(config.get("mlp_only_layers") or []),
    }


def _layer_numbers(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(type(layer) is int for layer in found):
        raise ValueError(f"model config: mlp_only_layers is {found!r}, wanted a list of layer numbers")
    return tuple(found)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raises for each setting that would change the numbers and is not computed here."""
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(_unsupported("hidden_act", config["hidden_act"], "'silu'"))
    for key in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if config.get(key, False):
            raise ValueError(_unsupported(key, config[key], "false"))


def _rope_theta(config: Mapping[str, Any]) -> float:
    """The rotary base, after checking that no scaling rule is asked for."""
    parameters: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        found = config.get(key) or {}
        if not isinstance(found, Mapping):
            raise ValueError(_unsupported(key, found, "a table with rope_type 'default'"))
        parameters.update(found)
        rope_type = found.get("rope_type", found.get("type", "default"))
        if rope_type != "default":
            raise ValueError(_unsupported(f"{key}.rope_type", rope_type, "'default'"))
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(_unsupported("partial_rotary_factor", partial, "1.0"))
    return _positive_number("rope_theta", parameters.get("rope_theta", config.get("rope_theta", 10000.0)))


def _required(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise ValueError(
            f"model config: {key} is missing; a config.json of model_type {config['model_type']!r} needs it"
        )
    return config[key]


def _check_positive_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"model config: {name} is {value!r}, wanted a positive integer")


def _positive_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"model config: {name} is {value!r}, wanted a positive number")
    return float(value)


def _unsupported(key: str, found: Any, wanted: str) -> str:
    return f"model config: {key} is {found!r}, which is not supported; supported: {wanted}"
