"""A parsed ``config.json`` as the fields of a `DecoderConfig`, and back.

Read as transformers reads it, the values that stand for a missing key included. A setting that changes the numbers and
is not computed here is refused by name and value; what has no part in them (token ids, dropout, how weights were
initialised) is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxfp4.models.checks import boolean, positive_integer, positive_number, required, shown, unsupported
from jaxfp4.models.families import FAMILIES, AttentionBias, Family, Window
from jaxfp4.models.rotary import rotary_from_hf, rotary_to_hf

#: The entries of `layer_types`.
FULL, SLIDING = "full_attention", "sliding_attention"

# Settings of other architectures that would change the numbers, with the values that do not; null never does. Biases,
# norms and experts beside those of the family need no entry: their tensors belong to no parameter and are refused.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_chunk_size": (),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "attn_temperature_tuning": (False, 0),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "hidden_act": ("silu",),
    "hidden_activation": ("silu",),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "lm_head_multiplier": (1,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "n_group": (1,),
    "no_rope_layer_interval": (),
    "no_rope_layers": ([],),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1.0,),
    "per_layer_config": ({},),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "routed_scaling_factor": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "scoring_func": ("softmax",),
    "topk_group": (1,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
}
_MOST_LAYERS = 1 << 16
_QK_NORM_KEYS = ("qk_layernorm", "qk_norm", "use_qk_norm")


def fields_from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `DecoderConfig`; see its `from_hf`."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ValueError(unsupported("model_type", model_type, " or ".join(FAMILIES)))
    _refuse_unsupported(config, family)
    heads = positive_integer("num_attention_heads", required(config, "num_attention_heads"))
    kv_heads = config.get("num_key_value_heads", family.num_key_value_heads)
    theta, scaling = rotary_from_hf(config, family.rope_theta)
    return {
        "model_type": model_type,
        "vocab_size": required(config, "vocab_size"),
        "hidden_size": required(config, "hidden_size"),
        "intermediate_size": required(config, "intermediate_size"),
        "num_hidden_layers": required(config, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": _head_dim(config, family, heads),
        "max_position_embeddings": required(config, "max_position_embeddings"),
        "rms_norm_eps": positive_number("rms_norm_eps", config.get("rms_norm_eps", family.rms_norm_eps)),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": _switch(config, "tie_word_embeddings"),
        "attention_bias": _attention_bias(config, family),
        "mlp_bias": _switch(config, "mlp_bias"),
        "qk_norm": family.qk_norm,
        **_window_fields(config, family),
        **_expert_fields(config, family),
    }


def _switch(config: Mapping[str, Any], key: str) -> bool:
    """A setting that is off if it is missing or null."""
    found = config.get(key)
    return False if found is None else boolean(key, found)


def _head_dim(config: Mapping[str, Any], family: Family, heads: int) -> Any:
    found = config.get("head_dim", family.head_dim)
    if found is not None or family.head_dim is not None:
        return found
    return positive_integer("hidden_size", required(config, "hidden_size")) // heads


def _attention_bias(config: Mapping[str, Any], family: Family) -> bool:
    """Whether the setting is on; Qwen2 has none, and configs that name it all the same can only mean what it does."""
    if family.attention_bias is AttentionBias.QKV:
        if config.get("attention_bias") is not None and not _switch(config, "attention_bias"):
            raise ValueError(unsupported("attention_bias", config["attention_bias"], "true, or leave it out"))
        return False
    return _switch(config, "attention_bias")


def _refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    """Raises for each setting that would change the numbers and is not computed here."""
    neutral = {**_NEUTRAL, **dict.fromkeys(_QK_NORM_KEYS, (family.qk_norm,)), "architectures": ([family.architecture],)}
    for key, accepted in neutral.items():
        found = config.get(key)
        if found is not None and found not in accepted:
            wanted = " or ".join(str(value).lower() if isinstance(value, bool) else repr(value) for value in accepted)
            raise ValueError(unsupported(key, found, wanted or "null"))


def _window_fields(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """`sliding_window` and `layer_types`: neither for no window, no `layer_types` for one on all layers."""
    layers = positive_integer("num_hidden_layers", required(config, "num_hidden_layers"), _MOST_LAYERS)
    switch = config.get("use_sliding_window")
    switched = _switch(config, "use_sliding_window")
    window = config.get("sliding_window", family.sliding_window)
    if family.window is Window.NEVER:
        if switched or config.get("sliding_window") is not None:
            key = "use_sliding_window" if switched else "sliding_window"
            raise ValueError(unsupported(key, config[key], f"null for model_type {config['model_type']!r}"))
        window = None
    elif family.window is Window.ALL_LAYERS:
        if window is not None and switch is False:
            raise ValueError(
                f"model config: use_sliding_window is False, but sliding_window is {window}, which a "
                f"{config['model_type']} always uses; wanted sliding_window null"
            )
    elif not switched:
        window = None
    if window is not None:
        positive_integer("sliding_window", window)
    types = _layer_types(config, family, window, layers)
    if SLIDING not in types:
        return {}
    return {"sliding_window": window, "layer_types": types if FULL in types else ()}


def _layer_types(config: Mapping[str, Any], family: Family, window: Any, layers: int) -> tuple[str, ...]:
    """The kind of attention of each layer."""
    given = config.get("layer_types")
    start = config.get("max_window_layers")
    uniform = (FULL if window is None else SLIDING,) * layers
    if family.window is Window.BY_LAYER and window is not None:
        start = 28 if start is None else start  # what transformers takes for a missing key
        if isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise ValueError(f"model config: max_window_layers is {shown(start)}, wanted an integer from 0")
        ruled = tuple(SLIDING if layer >= start else FULL for layer in range(layers))
        return ruled if given is None else _given_types(given, layers, (FULL, SLIDING))
    if window is not None and start:
        raise ValueError(
            unsupported("max_window_layers", start, f"0 for model_type {config['model_type']!r}: all layers have one")
        )
    return uniform if given is None else _given_types(given, layers, uniform[:1])


def _given_types(given: Any, layers: int, allowed: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(given, list) or len(given) != layers or any(entry not in allowed for entry in given):
        raise ValueError(
            unsupported(
                "layer_types",
                given,
                f"a list of {layers} times {' or '.join(map(repr, allowed))} (as many as "
                "num_hidden_layers) with this sliding window",
            )
        )
    return tuple(given)


def _expert_fields(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    counts = [config[key] for key in ("num_experts", "num_local_experts") if config.get(key) is not None]
    if counts and counts[0] != counts[-1]:
        raise ValueError(
            f"model config: num_experts is {shown(counts[0])}, but num_local_experts is {shown(counts[-1])}; wanted "
            "one of them"
        )
    if not family.experts:
        return {"num_experts": counts[0] if counts else 0}
    if not counts:
        raise ValueError("model config: there is neither num_experts nor num_local_experts; wanted one of them")
    mixtral = config["model_type"] == "mixtral"
    width = config.get("moe_intermediate_size", config.get("intermediate_size")) if mixtral else None
    return {
        "num_experts": counts[0],
        "num_experts_per_tok": required(config, "num_experts_per_tok"),
        "moe_intermediate_size": width if mixtral else required(config, "moe_intermediate_size"),
        "norm_topk_prob": boolean("norm_topk_prob", config.get("norm_topk_prob", mixtral)),
        "decoder_sparse_step": config.get("decoder_sparse_step", 1),
        "mlp_only_layers": _layer_numbers(config.get("mlp_only_layers") or []),
    }


def _layer_numbers(found: Any) -> tuple[int, ...]:
    if not isinstance(found, list) or not all(type(layer) is int for layer in found):
        raise ValueError(f"model config: mlp_only_layers is {shown(found)}, wanted a list of layer numbers")
    return tuple(found)


_PLAIN_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
_QWEN_EXPERT_FIELDS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
)


def hf_from_fields(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The ``config.json`` of the fields of a `DecoderConfig`, its keys sorted; see its `to_hf`."""
    family = FAMILIES[fields["model_type"]]
    written: dict[str, Any] = {"architectures": [family.architecture], "dtype": dtype, "hidden_act": "silu"}
    written |= {name: fields[name] for name in _PLAIN_FIELDS}
    written |= rotary_to_hf(fields["rope_theta"], fields["rope_scaling"])
    if family.attention_bias is AttentionBias.SETTING:
        written["attention_bias"] = fields["attention_bias"]
    if family.mlp_bias:
        written["mlp_bias"] = fields["mlp_bias"]
    written |= _written_window(family, fields)
    if fields["model_type"] == "mixtral":
        written |= {"num_local_experts": fields["num_experts"], "num_experts_per_tok": fields["num_experts_per_tok"]}
    elif family.experts:
        written |= {name: fields[name] for name in _QWEN_EXPERT_FIELDS}
        written["mlp_only_layers"] = list(fields["mlp_only_layers"])
    return dict(sorted(written.items()))


def _written_window(family: Family, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that the family has for a sliding window."""
    window = fields["sliding_window"]
    if family.window is Window.NEVER:
        return {}
    written: dict[str, Any] = {"sliding_window": window}
    if family.window is not Window.ALL_LAYERS:
        written["use_sliding_window"] = window is not None
    if family.window is Window.BY_LAYER and window is not None:
        types = list(fields["layer_types"]) or [SLIDING] * fields["num_hidden_layers"]
        start = types.index(SLIDING)
        written["layer_types"] = types
        if FULL not in types[start:]:
            written["max_window_layers"] = start
    return written
