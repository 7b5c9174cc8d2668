"""What the JSON files of a checkpoint say about its quantization, read leniently: whatever is malformed is left out."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Mapping
from typing import Any

from jaxfp4.checkpoints.configs import COMPRESSED_TENSORS, CONFIG_FILE, MODELOPT, MODELOPT_FILE

QUANTIZATION_KEY = "quantization_config"
MIXED = "MIXED_PRECISION"
W4A4, W4A16 = "NVFP4", "W4A16_NVFP4"
OTHER = "another"
"""The algorithm of a compressed-tensors group that is not NVFP4."""

_REGEX = "re:"
_ALL_LINEAR = "Linear"


@dataclasses.dataclass(frozen=True)
class Declaration:
    """One file's account of what is quantized, and how."""

    file: str
    file_format: str
    content: Mapping[str, Any]
    """The object that holds the keys."""

    algorithm: str | None
    """Model-Optimizer's `quant_algo`."""

    excluded: tuple[str, ...]
    groups: tuple[tuple[tuple[str, ...], str], ...]
    """Patterns of module names and the algorithm of what they match, the more specific first."""

    cache: str | None
    """The format of the key-value cache, such as `FP8`."""

    group_sizes: tuple[Any, ...]

    def excludes(self, module: str) -> bool:
        """Whether the module is listed as not quantized."""
        return module in self._excluded_names or any(self._matches(pattern, module) for pattern in self._wild_excluded)

    def nearly_excludes(self, module: str) -> bool:
        """Whether a listed name would match under another prefix, or is the module's parent.

        Engines that rename or that match parts of names then exclude it, others do not.
        """
        plain = [pattern for pattern in self.excluded if not pattern.startswith(_REGEX)]
        return any(
            module.startswith(f"{pattern}.")
            or fnmatch.fnmatchcase(module, f"*.{pattern}")
            or fnmatch.fnmatchcase(f"model.{module}", pattern)
            or fnmatch.fnmatchcase(f"language_model.{module}", pattern)
            for pattern in plain
        )

    def algorithm_of(self, module: str) -> str | None:
        """How the module is said to be quantized; None if nothing is said."""
        if module in self._algorithms:
            return self._algorithms[module]
        return next((algorithm for pattern, algorithm in self._wild_groups if self._matches(pattern, module)), None)

    # Large models list tens of thousands of modules by name: those are looked up, and only patterns are tried.

    @functools.cached_property
    def _excluded_names(self) -> frozenset[str]:
        return frozenset(pattern for pattern in self.excluded if not self._is_wild(pattern))

    @functools.cached_property
    def _wild_excluded(self) -> tuple[str, ...]:
        return tuple(pattern for pattern in self.excluded if self._is_wild(pattern))

    @functools.cached_property
    def _algorithms(self) -> dict[str, str]:
        pairs = [(pattern, algorithm) for patterns, algorithm in self.groups for pattern in patterns]
        return {pattern: algorithm for pattern, algorithm in reversed(pairs) if not self._is_wild(pattern)}

    @functools.cached_property
    def _wild_groups(self) -> tuple[tuple[str, str], ...]:
        pairs = [(pattern, algorithm) for patterns, algorithm in self.groups for pattern in patterns]
        return tuple((pattern, algorithm) for pattern, algorithm in pairs if self._is_wild(pattern))

    def _is_wild(self, pattern: str) -> bool:
        """Whether it can match another name than itself."""
        if self.file_format == MODELOPT:
            return any(character in pattern for character in "*?[")
        return pattern.startswith(_REGEX) or pattern == _ALL_LINEAR

    def _matches(self, pattern: str, module: str) -> bool:
        """Whether a pattern that `_is_wild` matches."""
        if self.file_format == MODELOPT:
            return fnmatch.fnmatchcase(module, pattern)
        if pattern == _ALL_LINEAR:
            return True
        compiled = compiled_regex(pattern)
        return compiled is not None and compiled.match(module) is not None


@functools.lru_cache(maxsize=1024)
def compiled_regex(pattern: str) -> re.Pattern[str] | None:
    """Of an entry `re:...`; None if it is no valid regular expression."""
    try:
        return re.compile(pattern.removeprefix(_REGEX))
    except (re.error, RecursionError, OverflowError):
        return None


def declarations(config: Mapping[str, Any], modelopt_file: Mapping[str, Any] | None) -> list[Declaration]:
    """Of config.json and of hf_quant_config.json, as far as they say something."""
    found = []
    inside = config.get(QUANTIZATION_KEY)
    if isinstance(inside, dict):
        method = inside.get("quant_method")
        read = _compressed if method == COMPRESSED_TENSORS else _modelopt
        found.append(read(CONFIG_FILE, inside))
    if modelopt_file is not None:
        found.append(_modelopt(MODELOPT_FILE, modelopt_file))
    return found


def _modelopt(file: str, content: Mapping[str, Any]) -> Declaration:
    nested = content.get("quantization")
    keys = nested if isinstance(nested, dict) else content
    algorithm = keys.get("quant_algo")
    algorithm = algorithm if isinstance(algorithm, str) else None
    groups: list[tuple[tuple[str, ...], str]] = []
    if algorithm == MIXED:
        layers = keys.get("quantized_layers")
        for name, entry in (layers if isinstance(layers, dict) else {}).items():
            own = entry.get("quant_algo") if isinstance(entry, dict) else None
            groups.append(((name,), own if isinstance(own, str) else OTHER))
    elif algorithm is not None:
        groups.append((("*",), algorithm))
    excluded = strings(keys.get("exclude_modules", keys.get("ignore")))
    cache = _cache(keys.get("kv_cache_quant_algo", keys.get("kv_cache_scheme")))
    sizes = [keys["group_size"]] if "group_size" in keys else []
    for group in config_groups(keys).values():
        sizes += [part["group_size"] for part in group.values() if isinstance(part, dict) and "group_size" in part]
    return Declaration(file, MODELOPT, keys, algorithm, excluded, tuple(groups), cache, tuple(sizes))


def _compressed(file: str, content: Mapping[str, Any]) -> Declaration:
    groups = [
        (strings(group.get("targets")), group_algorithm(group), _ALL_LINEAR in strings(group.get("targets")))
        for group in config_groups(content).values()
    ]
    groups.sort(key=lambda group: group[2])  # named modules before all linear ones
    sizes = [
        part["group_size"]
        for group in config_groups(content).values()
        for part in (group.get("weights"), group.get("input_activations"))
        if isinstance(part, dict) and part.get("num_bits") == 4 and part.get("group_size") is not None
    ]
    return Declaration(
        file,
        COMPRESSED_TENSORS,
        content,
        None,
        strings(content.get("ignore")),
        tuple((patterns, algorithm) for patterns, algorithm, _ in groups),
        _cache(content.get("kv_cache_scheme")),
        tuple(sizes),
    )


def config_groups(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries of `config_groups` that are objects."""
    groups = content.get("config_groups")
    found = groups.items() if isinstance(groups, dict) else ()
    return {name: group for name, group in found if isinstance(group, dict)}


def group_algorithm(group: Mapping[str, Any]) -> str:
    """`NVFP4`, `W4A16_NVFP4` or another, by the group's weights and activations."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or weights.get("num_bits") != 4 or weights.get("type") != "float":
        return OTHER
    return W4A4 if isinstance(inputs, dict) else W4A16


def strings(value: Any) -> tuple[str, ...]:
    """The strings in a list; empty for anything else."""
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list) else ()


def _cache(scheme: Any) -> str | None:
    if isinstance(scheme, dict):
        names = {8: "FP8", 4: "NVFP4"}
        bits = scheme.get("num_bits")
        return names.get(bits, OTHER) if type(bits) is int and scheme.get("type") == "float" else OTHER
    return scheme.upper() if isinstance(scheme, str) else None
