"""The shape of a decoder, read from and written to a Hugging Face ``config.json``.

Only what changes the numbers is kept. A setting that this package does not compute is refused by name and value: a
model that loads runs as its authors meant it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxfp4.models.checks import positive_integer, shown, unsupported
from jaxfp4.models.families import FAMILIES, AttentionBias, Family, Window
from jaxfp4.models.hf_config import FULL, SLIDING, fields_from_hf, hf_from_fields
from jaxfp4.models.rotary import Dynamic, LongRope, RotaryScaling, Rotation, plain_frequencies

SUPPORTED_MODEL_TYPES = tuple(FAMILIES)
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
            size is odd (rotary attention pairs its halves), the expert counts contradict each other, or a setting is
            one that models of this `model_type` do not have.
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
    #: How the rotation is stretched to longer sequences.
    rope_scaling: RotaryScaling | None = None
    #: A bias in all four projections of attention. Qwen2 has one in queries, keys and values without this.
    attention_bias: bool = False
    #: A bias in the three matrices of the MLP.
    mlp_bias: bool = False
    #: A token attends to itself and the ``sliding_window - 1`` before it; None: to all before it.
    sliding_window: int | None = None
    #: "sliding_attention" or "full_attention" for each layer; () if all layers are alike.
    layer_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise ValueError(unsupported("model_type", self.model_type, " or ".join(FAMILIES)))
        for name, allowed in self._limits().items():
            if getattr(self, name) not in allowed:
                wanted = " or ".join(map(repr, allowed))
                raise ValueError(unsupported(name, getattr(self, name), f"{wanted} for model_type {self.model_type!r}"))
        names = _POSITIVE_INTEGERS
        if self.num_experts or self.model_type == "mixtral":
            names += ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
        if self.sliding_window is not None:
            names += ("sliding_window",)
        for name in names:
            positive_integer(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model config: num_attention_heads is {self.num_attention_heads}, wanted a multiple of "
                f"num_key_value_heads, which is {self.num_key_value_heads}"
            )
        if self.num_experts and self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"model config: num_experts_per_tok is {self.num_experts_per_tok}, wanted at most num_experts, "
                f"which is {self.num_experts}"
            )
        self._check_rotation()
        if self.layer_types and (
            set(self.layer_types) != {FULL, SLIDING}
            or len(self.layer_types) != self.num_hidden_layers
            or self.sliding_window is None
        ):
            raise ValueError(
                f"model config: layer_types is {shown(self.layer_types)} with sliding_window {self.sliding_window}, "
                f"wanted {FULL!r} or {SLIDING!r}, both in use, for each of {self.num_hidden_layers} layers, and a "
                "window; or ()"
            )

    def _check_rotation(self) -> None:
        if self.head_dim % 2:
            raise ValueError(f"model config: head_dim is {self.head_dim}, wanted an even number")
        scaling = self.rope_scaling
        if isinstance(scaling, Dynamic) and self.head_dim == 2:
            raise ValueError("model config: head_dim is 2, wanted at least 4 with rope_type 'dynamic'")
        if isinstance(scaling, LongRope):
            for name in ("short_factor", "long_factor"):
                if len(getattr(scaling, name)) != self.head_dim // 2:
                    raise ValueError(
                        f"model config: {name} has {len(getattr(scaling, name))} numbers, wanted head_dim / 2, which "
                        f"is {self.head_dim // 2}"
                    )

    def _limits(self) -> dict[str, tuple[Any, ...]]:
        """The values of the settings that not every family has, where the family leaves a choice of few."""
        family = self.family
        limits: dict[str, tuple[Any, ...]] = {"qk_norm": (family.qk_norm,)}
        if family.attention_bias is not AttentionBias.SETTING:
            limits["attention_bias"] = (False,)
        if not family.mlp_bias:
            limits["mlp_bias"] = (False,)
        if family.window is Window.NEVER:
            limits["sliding_window"] = (None,)
        if family.window is not Window.BY_LAYER:
            limits["layer_types"] = ((),)
        if not family.experts:
            limits["num_experts"] = (0,)
        if self.model_type == "mixtral":
            limits |= {"moe_intermediate_size": (self.intermediate_size,), "norm_topk_prob": (True,)}
            limits |= {"decoder_sparse_step": (1,), "mlp_only_layers": ((),)}
        return limits

    @property
    def family(self) -> Family:
        """What all models of this `model_type` share."""
        return FAMILIES[self.model_type]

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.attention_bias or self.family.attention_bias is AttentionBias.QKV

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) holds experts."""
        if not self.num_experts or layer in self.mlp_only_layers:
            return False
        return (layer + 1) % self.decoder_sparse_step == 0

    def window(self, layer: int) -> int | None:
        """How many tokens, itself included, a token sees in layer number `layer` (from 0); None for all."""
        if self.layer_types and self.layer_types[layer] == FULL:
            return None
        return self.sliding_window

    def rotation(self, time: int) -> Rotation:
        """How queries and keys are rotated in sequences of `time` tokens."""
        if self.rope_scaling is None:
            return Rotation(plain_frequencies(self.rope_theta, self.head_dim))
        return self.rope_scaling.rotation(self.rope_theta, self.head_dim, time, self.max_position_embeddings)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """The decoder that a parsed ``config.json`` describes.

        Both spellings of the rotary settings are read: `rope_parameters` (transformers 5), and `rope_theta` with
        `rope_scaling` (before). A missing key stands for what it does in transformers; the sizes must be there.

        Raises:
            ValueError: an unknown `model_type`, a missing key, or a setting that this decoder does not compute; the
                message names the key, the value found and what is supported.
        """
        return cls(**fields_from_hf(config))

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """The ``config.json`` of this decoder, for transformers 5 and before; `from_hf` reads it back unchanged.

        `dtype` is the name of the stored parameters' type.
        """
        return hf_from_fields({field.name: getattr(self, field.name) for field in dataclasses.fields(self)}, dtype)
