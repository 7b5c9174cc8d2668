"""Checks of what the configuration says against the tensors."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from jaxfp4.checkpoints.configs import COMPRESSED_TENSORS, CONFIG_FILE, MODELOPT
from jaxfp4.checkpoints.stored import SUFFIXES, split_name
from jaxfp4.checkpoints.verification.declarations import MIXED, W4A4, W4A16, Declaration
from jaxfp4.checkpoints.verification.findings import Finding, Rule, Severity
from jaxfp4.checkpoints.verification.quantized_modules import STACK, Inventory, PlainModule, expert_of, layer_of

_NOT_LINEAR = re.compile(r"embed|norm|\bwte\b|\bwpe\b|_bias\b|conv", re.IGNORECASE)
_ROUTER = re.compile(r"(^|\.|_)(gate|router)(\.|$)")
_OUTSIDE = re.compile(r"(^|\.)(lm_head|output)$|vision|visual")
_SHOWN = 8
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")

NO_NVFP4 = Rule(
    "no-nvfp4-weight",
    Severity.ERROR,
    "nothing here is NVFP4: an engine loads it unquantized, or fails where the configuration says otherwise",
    "quantize the model first",
)
STACKED = Rule(
    "stacked-experts",
    Severity.NOTE,
    "engines that know the model's own layout of experts load it; the names do not tell which axis is contracted",
    "nothing; its shapes and values were not checked",
)
FORMAT_MISMATCH = Rule(
    "format-mismatch",
    Severity.ERROR,
    "engines look for the tensors of the format that the configuration names, and do not find these",
    "write the quant_method that the tensors were stored by, or convert them",
)
UNLISTED = Rule(
    "unlisted-module",
    Severity.ERROR,
    "engines build an NVFP4 layer for it and fail on the shapes of what is loaded",
    "list it in exclude_modules and ignore",
)
UNLISTED_ROUTER = Rule(
    "unlisted-module",
    Severity.ERROR,
    "MoE routers must be listed, or the engine asserts a shape mismatch",
    UNLISTED.fix,
)
UNLISTED_OUTSIDE = Rule(
    "unlisted-module",
    Severity.WARNING,
    "some engines never quantize output heads and vision towers, others do as the configuration says and fail",
    UNLISTED.fix,
)
LISTED_OTHERWISE = Rule(
    "exclusion-by-another-name",
    Severity.WARNING,
    "engines that rename modules or match parts of names exclude it, others build an NVFP4 layer and fail",
    "list the name that the tensors have, or a wildcard that matches it",
)
EXCLUDED = Rule(
    "excluded-but-quantized",
    Severity.ERROR,
    "engines build an unquantized layer [N, K], into which codes [N, K/2] do not fit",
    "remove it from exclude_modules and ignore, or store it unquantized",
)
UNTARGETED = Rule(
    "quantized-but-not-declared",
    Severity.ERROR,
    "engines build an unquantized layer, or one of another scheme, for it",
    "add the module to quantized_layers, or to the targets of a config group",
)
DECLARED_OTHERWISE = Rule(
    "declared-but-not-quantized",
    Severity.ERROR,
    "engines look for NVFP4 tensors that are not there",
    "correct quantized_layers or the targets of the config group, or quantize the module",
)
NO_INPUT_SCALE = Rule(
    "input-scale-missing",
    Severity.ERROR,
    "the configuration says W4A4, and there is no scale to quantize the input with: the parameter stays unset",
    "calibrate and export again, or declare the module weight-only (W4A16_NVFP4)",
)
UNUSED_INPUT_SCALE = Rule(
    "input-scale-unused",
    Severity.NOTE,
    "the configuration says weight-only; vLLM accepts the tensor and drops it",
    "declare NVFP4 to quantize activations, or leave the tensor out",
)
UNUSED_INPUT_DIVISOR = Rule(
    "input-scale-unused",
    Severity.WARNING,
    "the configuration says weight-only, whose layer has no such parameter",
    "give the config group input_activations, or leave the tensor out",
)
CACHE_MISSING = Rule(
    "cache-scale-missing",
    Severity.WARNING,
    "engines use a scale of 1 for these keys and values",
    "calibrate the key-value cache, unless it was quantized with a scale of 1 on purpose",
)
CACHE_UNDECLARED = Rule(
    "cache-scale-undeclared",
    Severity.WARNING,
    "the configuration names no format of the key-value cache: engines keep it unquantized and drop the scales",
    "write kv_cache_scheme and kv_cache_quant_algo, or leave the scales out",
)
CACHE_NVFP4 = Rule(
    "cache-nvfp4",
    Severity.NOTE,
    "TensorRT-LLM loads the scales of an NVFP4 cache only with TRTLLM_LOAD_KV_SCALES=1; writers do not agree whether "
    "they are amax / 448 (Model-Optimizer's Hugging Face export, and jaxfp4) or amax / 2688 (auto-round)",
    "set the variable, and compare outputs with those of an unquantized cache",
)
LAYERS = Rule(
    "missing-layers",
    Severity.ERROR,
    "engines build the number of layers of config.json; those without tensors hold garbage, or loading fails",
    "export the missing layers, or correct num_hidden_layers",
)
EXTRA_LAYERS = Rule(
    "extra-layers",
    Severity.WARNING,
    "loaders fail on names that no layer has, or drop them",
    "correct num_hidden_layers",
)
EXPERTS = Rule(
    "missing-experts",
    Severity.ERROR,
    "engines build the number of experts of config.json; those without tensors hold garbage",
    "export the missing experts, or correct the number in config.json",
)


def check_config(inventory: Inventory, config: Mapping[str, Any], found: Sequence[Declaration]) -> Iterator[Finding]:
    """All findings about the configuration and the tensors together."""
    stacks = [name for name, module in inventory.plain.items() if module.scheme == STACK]
    for name in stacks:
        yield STACKED.at(name, f"codes {list(inventory.plain[name].tensor.shape)} of all experts together")
    if not inventory.quantized and not stacks:
        yield NO_NVFP4.at("the checkpoint", f"{len(inventory.plain)} weights, none of them NVFP4")
    seen: set[tuple[str, str]] = set()
    for declaration in found:
        for finding in _declared(inventory, declaration):
            if (finding.check, finding.subject) not in seen:
                seen.add((finding.check, finding.subject))
                yield finding
    if found:
        yield from _cache(inventory, found[0])
    yield from _layers(inventory, config)
    yield from _experts(inventory, config)


def _declared(inventory: Inventory, declaration: Declaration) -> Iterator[Finding]:
    file = declaration.file
    for name, module in inventory.quantized.items():
        if module.file_format != declaration.file_format:
            names = SUFFIXES[module.file_format]
            found = f"stored as {names.packed}, {names.global_scale}; {file} says {declaration.file_format}"
            yield FORMAT_MISMATCH.at(name, found)
            continue
        algorithm = declaration.algorithm_of(name)
        if declaration.excludes(name):
            yield EXCLUDED.at(name, f"has NVFP4 codes, but {file} lists it as not quantized")
        elif declaration.groups and algorithm not in (W4A4, W4A16) and _is_specific(declaration):
            said = "nothing" if algorithm is None else algorithm
            yield UNTARGETED.at(name, f"has NVFP4 codes; {file} says {said} of it")
        elif algorithm == W4A4 and module.input_scale is None and module.codes is not None:
            yield NO_INPUT_SCALE.at(name, f"has no {SUFFIXES[module.file_format].input_scale}; {file} says W4A4")
        elif algorithm == W4A16 and module.input_scale is not None:
            rule = UNUSED_INPUT_DIVISOR if module.file_format == COMPRESSED_TENSORS else UNUSED_INPUT_SCALE
            yield rule.at(name, f"has {split_name(module.input_scale.name)[1]}; {file} says weight-only")
    for module_name, plain in inventory.plain.items():
        yield from _plain(module_name, plain, declaration)


def _is_specific(declaration: Declaration) -> bool:
    """Whether the groups say which modules they are about; one algorithm for all is judged by its name alone."""
    return declaration.file_format != MODELOPT or declaration.algorithm == MIXED


def _plain(name: str, module: PlainModule, declaration: Declaration) -> Iterator[Finding]:
    algorithm = declaration.algorithm_of(name)
    if algorithm not in (W4A4, W4A16) or declaration.excludes(name) or not _is_linear(name, module):
        return
    found = f"{module.scheme} {list(module.tensor.shape)}, not among the modules that {declaration.file} excludes"
    if not module.is_unquantized or declaration.algorithm == MIXED:
        yield DECLARED_OTHERWISE.at(name, f"is {module.scheme}; {declaration.file} says {algorithm}")
    elif declaration.nearly_excludes(name):
        yield LISTED_OTHERWISE.at(name, f"{found}, though one of them is close to its name")
    elif _OUTSIDE.search(name):
        yield UNLISTED_OUTSIDE.at(name, found)
    else:
        yield (UNLISTED_ROUTER if _ROUTER.search(name) else UNLISTED).at(name, found)


def _is_linear(name: str, module: PlainModule) -> bool:
    """Whether an engine would make a linear layer of it: a matrix, or a stack of them for experts."""
    if _NOT_LINEAR.search(name) or module.scheme == STACK:
        return False
    dimensions = len(module.tensor.shape)
    if split_name(module.tensor.name)[1] == "weight":
        return dimensions == 2
    return dimensions == 3 and "experts." in name


def _cache(inventory: Inventory, declaration: Declaration) -> Iterator[Finding]:
    scales = inventory.cache_scales
    if declaration.cache is None:
        if scales:
            yield CACHE_UNDECLARED.at(declaration.file, f"{len(scales)} tensors such as {next(iter(scales))}")
        return
    if declaration.cache == "NVFP4" and scales:
        yield CACHE_NVFP4.at(declaration.file, f"{len(scales)} scales of keys and values")
    attention = {layer_of(name) for name in [*inventory.quantized, *inventory.plain] if "attn" in name}
    without = sorted(attention - {layer_of(name) for name in scales} - {None}, key=str)
    if without:
        found = f"{declaration.cache} by {declaration.file}, but no k_scale and v_scale in {len(without)} layers"
        stack, number = without[0] or ("", 0)
        yield CACHE_MISSING.at(f"{stack}.{number}", found, len(without))


def _layers(inventory: Inventory, config: Mapping[str, Any]) -> Iterator[Finding]:
    text = config.get("text_config")
    inside = text if isinstance(text, dict) else config
    wanted = inside.get("num_hidden_layers", config.get("num_hidden_layers"))
    if type(wanted) is not int or wanted < 1:
        return
    stacks: dict[str, set[int]] = {}
    for name in [*inventory.quantized, *inventory.plain]:
        place = layer_of(name)
        if place and not _OUTSIDE.search(name):
            stacks.setdefault(place[0], set()).add(place[1])
    if not stacks:
        return
    stack = max(stacks, key=lambda one: len(stacks[one]))
    missing, first = _missing(wanted, stacks[stack])
    if missing:
        found = f"{missing} of {wanted} layers have no weight: {_numbers(first)}; config.json says {wanted}"
        yield LAYERS.at(stack, found, missing)
    predicting = inside.get("num_nextn_predict_layers")
    allowed = wanted + (predicting if type(predicting) is int and predicting > 0 else 0)
    extra = sorted(number for number in stacks[stack] if number >= allowed)
    if extra:
        yield EXTRA_LAYERS.at(stack, f"layers {_numbers(extra)} are there; {CONFIG_FILE} says {wanted}", len(extra))


def _experts(inventory: Inventory, config: Mapping[str, Any]) -> Iterator[Finding]:
    text = config.get("text_config")
    inside = text if isinstance(text, dict) else config
    counts = [inside[key] for key in _EXPERT_COUNTS if type(inside.get(key)) is int]
    if not counts:
        return
    stacks: dict[str, set[int]] = {}
    for name in [*inventory.quantized, *inventory.plain]:
        expert = expert_of(name)
        if expert is not None:
            stacks.setdefault(name.partition(f"experts.{expert}.")[0] + "experts", set()).add(expert)
    for stack, there in stacks.items():
        missing, first = _missing(counts[0], there)
        if missing:
            found = f"{missing} of {counts[0]} experts have no weight: {_numbers(first)}"
            yield EXPERTS.at(stack, found, missing)


def _missing(wanted: int, there: Set[int]) -> tuple[int, list[int]]:
    """How many of the numbers below `wanted` are not there, and the first of them, a few more than are shown.

    Takes no time for a `wanted` beyond all reason, which a broken file may say.
    """
    count = max(wanted, 0) - sum(0 <= number < wanted for number in there)
    absent = (number for number in itertools.count() if number not in there)
    return count, list(itertools.islice(absent, min(count, _SHOWN + 1)))


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:_SHOWN])) + (", ..." if len(numbers) > _SHOWN else "")
