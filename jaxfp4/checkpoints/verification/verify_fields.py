"""Checks of the quantization's entries in config.json and hf_quant_config.json, and of the two against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxfp4.checkpoints.configs import COMPRESSED_TENSORS, CONFIG_FILE, FORMATS, MODELOPT, MODELOPT_FILE
from jaxfp4.checkpoints.verification.declarations import (
    MIXED,
    OTHER,
    QUANTIZATION_KEY,
    Declaration,
    compiled_regex,
    config_groups,
    group_algorithm,
    strings,
)
from jaxfp4.checkpoints.verification.findings import Finding, Rule, Severity
from jaxfp4.formats import BLOCK_SIZE

_PACK_FORMAT = "nvfp4-pack-quantized"
_REQUIRED = ("group_size", "kv_cache_quant_algo", "exclude_modules")
_REFUSED = ("NVFP4_AWQ", "NVFP4_SVD")
_VLLM = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", MIXED)
_SGLANG = ("FP8", "NVFP4")
_WEIGHT_FIELDS: Mapping[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "group_size": BLOCK_SIZE,
    "strategy": "tensor_group",
}

NO_QUANTIZATION = Rule(
    "no-quantization-config",
    Severity.ERROR,
    "engines build the unquantized model, whose parameters do not fit the packed codes",
    "write quantization_config into config.json (and hf_quant_config.json for Model-Optimizer's format)",
)
ONE_FILE_ONLY = Rule(
    "one-quantization-config",
    Severity.WARNING,
    "engines and versions that read only the other file see no quantization",
    "write both config.json's quantization_config and hf_quant_config.json",
)
REQUIRED_KEY = Rule(
    "required-key",
    Severity.ERROR,
    "vLLM raises a ValueError: NVFP4 needs group_size, kv_cache_quant_algo (null is allowed) and exclude_modules",
    "add the key to hf_quant_config.json",
)
EMPTY_EXCLUDED = Rule(
    "empty-exclude-modules",
    Severity.WARNING,
    "some versions of SGLang raise a ValueError for an empty list",
    "list at least lm_head",
)
REFUSED_ALGORITHM = Rule(
    "refused-algorithm",
    Severity.ERROR,
    "vLLM and SGLang refuse it",
    "fold the scales into the layer in front and export as plain NVFP4",
)
UNKNOWN_ALGORITHM = Rule(
    "unknown-algorithm",
    Severity.ERROR,
    "vLLM and SGLang refuse an algorithm that is not in their list",
    "export as NVFP4 or W4A16_NVFP4",
)
NOT_IN_SGLANG = Rule(
    "algorithm-not-in-sglang",
    Severity.WARNING,
    "vLLM loads it; SGLang's list for this format has FP8 and NVFP4 only",
    "serve with vLLM, or export as NVFP4",
)
GROUP_SIZE = Rule(
    "group-size",
    Severity.ERROR,
    "vLLM takes the block size from here and then expects other shapes of the block scales",
    "write 16, and quantize in blocks of 16",
)
FILES_DISAGREE = Rule(
    "config-files-disagree",
    Severity.ERROR,
    "engines read one of the two files, so that they load different models",
    "make both files say the same",
)
LISTS_DISAGREE = Rule(
    "exclusions-disagree",
    Severity.WARNING,
    FILES_DISAGREE.engines,
    "write the same list as ignore in config.json and as exclude_modules in hf_quant_config.json",
)
METHOD = Rule(
    "quant-method",
    Severity.ERROR,
    "engines choose the loader by this key",
    "write the method that the tensors were stored by, 'modelopt' or 'compressed-tensors'",
)
SCHEME = Rule(
    "config-group",
    Severity.ERROR,
    "vLLM and SGLang recognise NVFP4 by these fields and take it for another scheme, or refuse it",
    "write the config_groups that compressed-tensors writes for NVFP4",
)
STATUS = Rule(
    "quantization-status",
    Severity.WARNING,
    "readers take the weights for not yet compressed",
    "write quantization_status 'compressed'",
)
BAD_PATTERN = Rule(
    "invalid-pattern",
    Severity.ERROR,
    "compressed-tensors and vLLM compile every re: entry and fail",
    "correct the regular expression",
)
STRAY_FILE = Rule(
    "stray-file",
    Severity.WARNING,
    "engines that look for hf_quant_config.json first take the checkpoint for one of Model-Optimizer's",
    "remove hf_quant_config.json",
)


def check_fields(config: Mapping[str, Any], found: Sequence[Declaration]) -> Iterator[Finding]:
    """All findings about the declarations themselves."""
    inside = config.get(QUANTIZATION_KEY)
    if not found:
        what = "has no quantization_config" if inside is None else f"quantization_config is {_short(inside)}"
        yield NO_QUANTIZATION.at(CONFIG_FILE, f"{what}, and there is no hf_quant_config.json")
        return
    if isinstance(inside, dict) and inside.get("quant_method") not in FORMATS:
        method = inside.get("quant_method")
        yield METHOD.at(CONFIG_FILE, f"quant_method is {_short(method)}: wanted one of {', '.join(FORMATS)}")
    for declaration in found:
        check = _modelopt if declaration.file_format == MODELOPT else _compressed
        yield from check(declaration)
        wrong = [size for size in declaration.group_sizes if type(size) is not int or size != BLOCK_SIZE]
        if wrong:
            yield GROUP_SIZE.at(declaration.file, f"group_size is {_short(wrong[0])}: wanted {BLOCK_SIZE}")
    if len(found) > 1:
        yield from _both(*found[:2])
    elif found[0].file_format == MODELOPT:
        other = MODELOPT_FILE if found[0].file == CONFIG_FILE else f"{QUANTIZATION_KEY} in {CONFIG_FILE}"
        yield ONE_FILE_ONLY.at(found[0].file, f"describes the quantization, but there is no {other}")


def _modelopt(declaration: Declaration) -> Iterator[Finding]:
    file, keys, algorithm = declaration.file, declaration.content, declaration.algorithm
    if file == MODELOPT_FILE:
        missing = [key for key in _REQUIRED if key not in keys]
        if missing:
            yield REQUIRED_KEY.at(file, f"has no {', no '.join(missing)}", len(missing))
    listed = keys.get("exclude_modules", keys.get("ignore"))
    if listed == []:
        yield EMPTY_EXCLUDED.at(file, "no module is excluded")
    if algorithm in _REFUSED:
        yield REFUSED_ALGORITHM.at(file, f"quant_algo is {algorithm}")
    elif algorithm not in _VLLM:
        yield UNKNOWN_ALGORITHM.at(file, f"quant_algo is {_short(keys.get('quant_algo'))}")
    elif algorithm not in _SGLANG:
        yield NOT_IN_SGLANG.at(file, f"quant_algo is {algorithm}")
    if algorithm == MIXED and not isinstance(keys.get("quantized_layers"), dict):
        yield UNKNOWN_ALGORITHM.at(file, "quant_algo is MIXED_PRECISION without an object quantized_layers")


def _compressed(declaration: Declaration) -> Iterator[Finding]:
    file, content = declaration.file, declaration.content
    groups = config_groups(content)
    if not groups:
        yield SCHEME.at(file, f"config_groups is {_short(content.get('config_groups'))}: wanted at least one group")
    for name, group in groups.items():
        yield from _group(file, name, group)
    if groups and all(group_algorithm(group) == OTHER for group in groups.values()):
        yield SCHEME.at(file, "no group has weights with num_bits 4 and type 'float'")
    formats = [group.get("format") for group in groups.values()]
    if _PACK_FORMAT not in [content.get("format"), *formats]:
        yield SCHEME.at(file, f"format is {_short(content.get('format'))}: wanted {_PACK_FORMAT!r}")
    status = content.get("quantization_status")
    if status != "compressed":
        yield STATUS.at(file, f"quantization_status is {_short(status)}")
    patterns = [*declaration.excluded, *(pattern for some, _ in declaration.groups for pattern in some)]
    for pattern in dict.fromkeys(patterns):
        if pattern.startswith("re:") and compiled_regex(pattern) is None:
            yield BAD_PATTERN.at(file, f"{_short(pattern)} is no regular expression")


def _group(file: str, name: str, group: Mapping[str, Any]) -> Iterator[Finding]:
    if not strings(group.get("targets")):
        yield SCHEME.at(file, f"{name}: targets is {_short(group.get('targets'))}: wanted names or 'Linear'")
    if group_algorithm(group) == OTHER:
        return
    weights, inputs = group["weights"], group.get("input_activations")
    wanted = {**_WEIGHT_FIELDS, "dynamic": False}
    yield from _fields(file, f"{name}.weights", weights, wanted)
    if isinstance(inputs, dict):
        yield from _fields(file, f"{name}.input_activations", inputs, {**_WEIGHT_FIELDS, "dynamic": "local"})


def _fields(file: str, where: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[Finding]:
    for key, value in wanted.items():
        # The group size has a rule of its own.
        if key != "group_size" and (found.get(key) != value or type(found.get(key)) is not type(value)):
            yield SCHEME.at(file, f"{where}.{key} is {_short(found.get(key))}: wanted {value!r}")
    if found.get("group_size") is None:
        yield SCHEME.at(file, f"{where}.group_size is missing: wanted {BLOCK_SIZE}")


def _both(first: Declaration, second: Declaration) -> Iterator[Finding]:
    if first.file_format == COMPRESSED_TENSORS:
        yield STRAY_FILE.at(second.file, "stands beside a config.json of compressed-tensors")
        return
    names = f"{first.file} and {second.file}"
    if first.algorithm != second.algorithm:
        yield FILES_DISAGREE.at(names, f"quant_algo {first.algorithm} and {second.algorithm}")
    elif first.algorithm == MIXED and first.groups != second.groups and set(first.groups) != set(second.groups):
        odd = sorted(str(pattern[0]) for pattern, _ in set(first.groups) ^ set(second.groups))
        yield FILES_DISAGREE.at(names, f"quantized_layers differ, at {odd[0]} first")
    if first.cache != second.cache:
        yield FILES_DISAGREE.at(names, f"key-value cache {first.cache} and {second.cache}")
    odd = sorted(set(first.excluded) ^ set(second.excluded))
    if odd:
        yield LISTS_DISAGREE.at(names, f"{len(odd)} names are excluded in one of them only, such as {odd[0]}", len(odd))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
