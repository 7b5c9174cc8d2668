"""Which weights of a checkpoint are linear layers, and which of them engines fuse, told by names alone.

Where there is a function to trace, `jaxfp4.plan` finds both from the computation. Here there are only files.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxfp4.checkpoints.streaming.slab_quantizer import FLOATS
from jaxfp4.formats import BLOCK_SIZE

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wq", "wk", "wv"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("to_q", "to_k", "to_v"),
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("in_proj_qkv", "in_proj_z"),
)
"""Last parts of the names of modules that serving engines fuse when they lie in the same parent: attention, gated
multilayer perceptrons and each of their experts (also `w1`, `w3`), multi-head latent attention (DeepSeek), diffusion
transformers, and gated linear attention (Qwen3.5)."""

_FAMILY = {member: family for family in FUSED for member in family}

_LEFT = (
    ("embedding", ("*embed*", "wte", "wpe", "*time_emb*", "relative_attention_bias")),
    ("output head", ("lm_head", "output_layer", "proj_out", "embed_out", "score", "classifier", "shared_head")),
    ("router", ("gate", "*router*", "shared_expert_gate")),
    ("normalization", ("*norm", "*norm_out", "ln_*", "*_ln", "ln[0-9]")),
    ("convolution", ("conv*", "*_conv", "*conv1d*", "*conv2d*", "*conv3d*")),
    (
        "vision or audio part",
        ("*vision*", "visual*", "*multi_modal_projector*", "mm_projector", "audio_*", "connector"),
    ),
    ("multi-token prediction", ("mtp", "mtp_*")),
    ("linear attention's small projection", ("in_proj_a*", "in_proj_b*")),
    ("indexer's head weights", ("weights_proj",)),
)
"""Why a tensor is left as it is, and patterns of which one component of its module's name matches one. The list is
Model-Optimizer's default one with what other families call the same parts."""

_TOP_LEVEL_HEADS = ("output", "head")
_TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_TRANSPOSED_NAMES = ("c_attn", "c_fc", "c_proj", "q_attn")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.")
_WEIGHT = ".weight"


def sibling_groups(lengths: Mapping[str, int]) -> list[tuple[str, ...]]:
    """The modules in groups that engines fuse, each module in one group, most of them alone.

    `lengths` has each module's contraction K. Members of a group have the same parent, belong to one entry of `FUSED`
    and have the same K, without which they cannot be fused (as in cross attention).

    >>> sibling_groups({"a.q_proj": 64, "a.o_proj": 64, "a.k_proj": 64, "b.q_proj": 64})
    [('a.q_proj', 'a.k_proj'), ('a.o_proj',), ('b.q_proj',)]
    """
    groups: dict[tuple[object, ...], list[str]] = {}
    for module, length in lengths.items():
        parent, _, last = module.rpartition(".")
        family = _FAMILY.get(last)
        groups.setdefault((parent, family, length) if family else (module,), []).append(module)
    return [tuple(group) for group in groups.values()]


def experts_of(name: str) -> str | None:
    """The module of all experts of a layer, if the tensor belongs to one of them.

    >>> experts_of("layers.0.mlp.experts.7.up_proj.weight")
    'layers.0.mlp.experts'
    """
    found = _EXPERT.match(name)
    return found[1] if found else None


def module_of(name: str) -> str:
    """The module that holds a tensor: its name without the last component."""
    return name.rpartition(".")[0]


def reason_to_leave(name: str, dtype: np.dtype, shape: tuple[int, ...], config: Mapping[str, Any]) -> str | None:
    """Why a tensor is not quantized; None for the weight of a linear layer, which is.

    That is a 2-D `*.weight` `[N, K]` of float32, bfloat16 or float16 with K a positive multiple of 16, unless a
    component of its module's name says that it is something else (embedding, output head, router, normalization,
    convolution, part for images or audio, multi-token prediction), or config.json does: N is `vocab_size` outside of
    any layer; a layer at or above `num_hidden_layers` where there are `num_nextn_predict_layers`; a `model_type` whose
    linear layers are stored as `[K, N]`.

    >>> reason_to_leave("model.layers.0.mlp.gate.weight", np.dtype("float32"), (8, 64), {})
    'router'
    """
    module = module_of(name)
    parts = module.split(".")
    if len(shape) == 3 and "expert" in name and dtype in FLOATS:
        return "stack of experts: its names do not tell which axis is contracted"
    if not name.endswith(_WEIGHT) or len(shape) != 2:
        return "not a matrix of a linear layer"
    if dtype not in FLOATS:
        return f"dtype {dtype.name}"
    for reason, patterns in _LEFT:
        if any(fnmatch.fnmatchcase(part, pattern) for part in parts for pattern in patterns):
            return reason
    if module in _TOP_LEVEL_HEADS:
        return "output head"
    text = config.get("text_config")
    return _reason_in_config(module, shape, {**config, **(text if isinstance(text, dict) else {})}) or _misfit(shape)


def _reason_in_config(module: str, shape: tuple[int, ...], config: Mapping[str, Any]) -> str | None:
    layer = _LAYER.search(module)
    if shape[0] == config.get("vocab_size") and not re.search(r"(?:^|\.)\d+(?:\.|$)", module):
        return "as many rows as the vocabulary"
    layers, extra = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers")
    if layer and isinstance(layers, int) and isinstance(extra, int) and extra > 0 and int(layer[1]) >= layers:
        return "multi-token prediction"
    kind = config.get("model_type")
    if module.rpartition(".")[2] in _TRANSPOSED_NAMES and (kind is None or kind in _TRANSPOSED_MODELS):
        return "stored as [K, N]" if kind else "perhaps stored as [K, N]: there is no model_type in config.json to tell"
    return None


def _misfit(shape: tuple[int, ...]) -> str | None:
    if 0 in shape:
        return "no values"
    return f"contraction no multiple of {BLOCK_SIZE}" if shape[1] % BLOCK_SIZE else None


def refuse_unmatched_patterns(patterns: Iterable[str], names: Iterable[str]) -> None:
    """ValueError if a pattern matches no tensor."""
    names = list(names)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise ValueError(
                f"exclude={pattern!r} matches no tensor: wanted a shell pattern for names such as {min(names)!r}; "
                "correct or remove it"
            )


def matches(pattern: str, name: str) -> bool:
    """Whether a shell pattern matches a tensor's name or its module's, `*` also across '.'."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(module_of(name), pattern)
