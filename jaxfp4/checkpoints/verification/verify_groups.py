"""Checks across modules: those that engines fuse, the experts of a layer, the scales of the key-value cache."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxfp4.checkpoints.configs import COMPRESSED_TENSORS
from jaxfp4.checkpoints.safetensors_file import Checkpoint
from jaxfp4.checkpoints.sibling_names import sibling_groups
from jaxfp4.checkpoints.stored import split_name
from jaxfp4.checkpoints.verification.findings import Finding, Rule, Severity
from jaxfp4.checkpoints.verification.quantized_modules import Inventory, QuantizedModule, StoredTensor, expert_of
from jaxfp4.checkpoints.verification.verify_values import usable_multiplier

EXPERT_OUTLIER_RATIO = 10

_SHARE = "quantize again with one scale for the whole group, from the largest amax; it costs no accuracy"

GLOBAL_EXPERTS = Rule(
    "fused-global-scale",
    Severity.ERROR,
    "vLLM and SGLang warn and use the gate's scale for both halves, which destroys the other one; TensorRT-LLM #14199 "
    "takes the largest and does not rescale the blocks",
    _SHARE,
)
GLOBAL_MODELOPT = Rule(
    "fused-global-scale",
    Severity.ERROR,
    "vLLM (with a warning) and SGLang (without) use the largest multiplier for all and leave the block scales, which "
    "destroys the others; TensorRT-LLM stops with an AssertionError",
    _SHARE,
)
GLOBAL_COMPRESSED = Rule(
    "fused-global-scale",
    Severity.ERROR,
    "vLLM (with a warning) and SGLang (without) use the largest divisor for all and leave the block scales, which "
    "destroys the others",
    _SHARE,
)
GLOBAL_COMPRESSED_W4A16 = Rule(
    "fused-global-scale",
    Severity.ERROR,
    "vLLM, without a warning, uses the largest divisor for all and leaves the block scales, which destroys the others",
    _SHARE,
)
INPUT_EXPERTS = Rule(
    "fused-input-scale",
    Severity.WARNING,
    "engines quantize the input of gate and up once, with one of the two scales",
    "calibrate gate and up together: they see the same input",
)
INPUT_MODELOPT = Rule(
    "fused-input-scale",
    Severity.ERROR,
    "TensorRT-LLM stops with an AssertionError; vLLM and SGLang take the largest multiplier",
    "calibrate the group together: its modules see the same input",
)
INPUT_COMPRESSED = Rule(
    "fused-input-scale",
    Severity.WARNING,
    "vLLM and SGLang take the largest divisor, so that the largest activations of the others are cut off",
    INPUT_MODELOPT.fix,
)
PARTLY = Rule(
    "partly-quantized-group",
    Severity.ERROR,
    "engines hold the group as one weight; vLLM and SGLang raise 'Detected some but not all shards ... are quantized'",
    "quantize all modules of the group in the same way, or none",
)
EXPERT_OUTLIER = Rule(
    "expert-input-scale-outlier",
    Severity.WARNING,
    "some MoE kernels (FlashInfer and TensorRT-LLM paths of SGLang) take the largest input scale of all experts, "
    "which costs the others accuracy; the rest take each expert's own",
    "calibrate with more tokens for each expert, or share one input scale among the experts",
)
EXPERT_INPUT = Rule(
    "expert-input-scale-missing",
    Severity.ERROR,
    "there is no scale to quantize the input of these experts with; the parameter stays unset and breaks the layer",
    "calibrate with data that reaches every expert, or give the missing ones the largest of their peers",
)
CACHE_SCALE = Rule(
    "cache-scale",
    Severity.ERROR,
    "keys and values are divided by it: the cache would hold zeros, infinities or NaN",
    "calibrate the key-value cache again",
)
CACHE_PAIR = Rule(
    "cache-scale-pair",
    Severity.WARNING,
    "the other one of keys and values has no scale of its own, and engines use 1",
    "calibrate keys and values together",
)


def check_groups(checkpoint: Checkpoint, inventory: Inventory) -> Iterator[Finding]:
    """All findings that compare modules with each other."""
    lengths = {name: module.shape[1] for name, module in inventory.quantized.items() if module.shape}
    # Weights that are quantized in another way are no part of a group here.
    lengths |= {name: module.tensor.shape[-1] for name, module in inventory.plain.items() if module.is_unquantized}
    for group in sibling_groups(lengths):
        if len(group) > 1:
            yield from _group(checkpoint, inventory, group)
    yield from _experts(checkpoint, inventory)
    yield from _cache(checkpoint, inventory.cache_scales)


def _group(checkpoint: Checkpoint, inventory: Inventory, group: Sequence[str]) -> Iterator[Finding]:
    modules = [inventory.quantized[name] for name in group if name in inventory.quantized]
    if not modules:
        return
    title = f"{split_name(group[0])[0]}.[{', '.join(split_name(name)[1] for name in group)}]".removeprefix(".")
    if len(modules) < len(group):
        rest = [split_name(name)[1] for name in group if name not in inventory.quantized]
        yield PARTLY.at(title, f"{', '.join(rest)} not quantized, the rest is")
        return
    if len({module.scheme for module in modules}) > 1 and expert_of(group[0]) is None:
        schemes = ", ".join(f"{split_name(module.name)[1]} {module.scheme}" for module in modules)
        yield PARTLY.at(title, f"{schemes}: some have an input scale, some have none")
    weight_scales = _multipliers(checkpoint, modules, [module.global_scale for module in modules])
    if len(set(weight_scales.values())) > 1:
        found, ratio = _differing("global scale", weight_scales)
        yield _global_rule(modules).at(title, found, ratio)
    input_scales = _multipliers(checkpoint, modules, [module.input_scale for module in modules])
    if len(set(input_scales.values())) > 1:
        found, ratio = _differing("input scale", input_scales)
        yield _input_rule(modules).at(title, found, ratio)


def _global_rule(modules: Sequence[QuantizedModule]) -> Rule:
    if expert_of(modules[0].name) is not None:
        return GLOBAL_EXPERTS
    if modules[0].file_format != COMPRESSED_TENSORS:
        return GLOBAL_MODELOPT
    return GLOBAL_COMPRESSED if modules[0].scheme == "W4A4" else GLOBAL_COMPRESSED_W4A16


def _input_rule(modules: Sequence[QuantizedModule]) -> Rule:
    if expert_of(modules[0].name) is not None:
        return INPUT_EXPERTS
    return INPUT_COMPRESSED if modules[0].file_format == COMPRESSED_TENSORS else INPUT_MODELOPT


def _multipliers(
    checkpoint: Checkpoint, modules: Sequence[QuantizedModule], tensors: Sequence[StoredTensor | None]
) -> dict[str, float]:
    """Module name -> usable scale; what is unusable is a finding of its own."""
    pairs = zip(modules, tensors, strict=True)
    found = {module.name: usable_multiplier(checkpoint, module, tensor) for module, tensor in pairs}
    return {name: value for name, value in found.items() if value is not None}


def _differing(what: str, scales: Mapping[str, float]) -> tuple[str, float]:
    ratio = max(scales.values()) / min(scales.values())
    values = ", ".join(f"{split_name(name)[1]} {value:.4g}" for name, value in scales.items())
    return f"{what}s differ by a factor of {ratio:.4g}: {values}", ratio


def _experts(checkpoint: Checkpoint, inventory: Inventory) -> Iterator[Finding]:
    """Each projection over the experts of its layer."""
    stacks: dict[tuple[str, str], list[QuantizedModule]] = {}
    for name, module in inventory.quantized.items():
        expert = expert_of(name)
        if expert is not None:
            before, _, after = name.rpartition(f"experts.{expert}.")
            stacks.setdefault((f"{before}experts", after), []).append(module)
    for (parent, projection), modules in stacks.items():
        title = f"{parent}.*.{projection}"
        missing = [module for module in modules if module.input_scale is None]
        if 0 < len(missing) < len(modules):
            first = ", ".join(str(expert_of(module.name)) for module in missing[:8])
            more = ", ..." if len(missing) > 8 else ""
            found = f"{len(missing)} of {len(modules)} experts have no input scale: {first}{more}"
            yield EXPERT_INPUT.at(title, found, len(missing))
        scales = _multipliers(checkpoint, modules, [module.input_scale for module in modules])
        if len(scales) > 1:
            middle, name = statistics.median(scales.values()), max(scales, key=scales.__getitem__)
            ratio = scales[name] / middle
            if ratio >= EXPERT_OUTLIER_RATIO:
                found = f"expert {expert_of(name)} has {scales[name]:.4g}, {ratio:.4g} times the median of the experts"
                yield EXPERT_OUTLIER.at(title, found, ratio)


def _cache(checkpoint: Checkpoint, cache_scales: Mapping[str, StoredTensor]) -> Iterator[Finding]:
    parents: dict[str, set[str]] = {}
    for name in cache_scales:
        module, last = split_name(name)
        holder, projection = split_name(module)
        parents.setdefault(holder if projection in ("k_proj", "v_proj") else module, set()).add(last)
        values = np.asarray(checkpoint.tensor(name), np.float32).reshape(-1)
        unusable = [float(value) for value in values if not (math.isfinite(value) and value > 0)]
        if unusable or not values.size:
            found = f"{unusable[0]:g}" if unusable else "empty"
            yield CACHE_SCALE.at(name, f"{found}: wanted a positive, finite number")
    for parent, found_scales in parents.items():
        if len(found_scales) == 1:
            there = found_scales.pop()
            other = "v_scale" if there == "k_scale" else "k_scale"
            yield CACHE_PAIR.at(parent, f"has {there} but no {other}")
