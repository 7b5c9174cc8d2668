"""What happens to each tensor of a directory that is quantized without its model's code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxfp4.checkpoints.configs import CONFIG_FILE, MODELOPT_FILE, Kind, Modules, read_config
from jaxfp4.checkpoints.safetensors_file import DTYPES
from jaxfp4.checkpoints.sibling_names import (
    experts_of,
    matches,
    module_of,
    reason_to_leave,
    refuse_unmatched_patterns,
    sibling_groups,
)
from jaxfp4.checkpoints.streaming.tensor_source import StoredTensor, TensorSource, open_source
from jaxfp4.recipes import presets
from jaxfp4.recipes.methods import Method
from jaxfp4.recipes.recipe import Recipe, Rule, Scheme

_QUANTIZED_PARTS = ("weight_scale_inv", "weight_scale", "weight_scale_2", "weight_packed", "qweight", "qzeros", "g_idx")
_QUANTIZED_ENDS = (
    "_scale_inv",
    "_blocks",
    ".absmax",
    ".quant_map",
    ".weight_zero_point",
    "bitsandbytes__nf4",
)
_ENTRIES = ("quantization_config", "compression_config")
_NARROW = tuple(DTYPES[name] for name in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "I8"))


@dataclasses.dataclass(frozen=True)
class FilePlan:
    """The weights to quantize, in groups that share a global scale, and why the other tensors are left."""

    source: TensorSource
    config: Mapping[str, Any]
    groups: tuple[tuple[StoredTensor, ...], ...]
    left: Mapping[str, str]
    """Tensor name -> reason."""
    exclude: tuple[str, ...]
    """The patterns it was made with."""

    @property
    def quantized(self) -> tuple[StoredTensor, ...]:
        """The weights that are quantized."""
        return tuple(tensor for group in self.groups for tensor in group)

    @property
    def modules(self) -> Modules:
        """The modules as the configuration files list them.

        Left out are modules that hold a matrix of their own beside quantized modules below them, as engines would
        leave everything below them unquantized.
        """
        quantized = {module_of(tensor.name) for tensor in self.quantized}
        above = {parent for module in quantized for parent in _parents(module)}
        excluded = {module_of(name) for name in self.left if len(self.source.tensors[name].shape) >= 2}
        return Modules(dict.fromkeys(quantized, Kind.W4A16), sorted(excluded - quantized - above - {""}))


def plan_files(directory: Path, exclude: Sequence[str] = ()) -> FilePlan:
    """Decides, from names, headers and config.json, what is quantized; no values are read.

    Linear layers are found as `reason_to_leave` says, siblings as `sibling_groups`. `exclude` has shell patterns of
    tensor or module names. Where a member of a group of siblings is left, so are the others, and where a weight of an
    expert is left, so are all experts of the layer: engines fuse them, and cannot fuse a quantized weight with another.

    Raises FileNotFoundError or ValueError as `open_source`, and ValueError if the checkpoint is quantized already, a
    pattern matches nothing, or nothing is left to quantize.
    """
    source = open_source(directory)
    config = read_config(directory)
    _refuse_quantized(source, config)
    refuse_unmatched_patterns(exclude, source.tensors)
    left = _left_alone(source, config, exclude)
    matrices = sorted(name for name, t in source.tensors.items() if name.endswith(".weight") and len(t.shape) == 2)
    siblings = sibling_groups({module_of(name): source.tensors[name].shape[1] for name in matrices})
    groups = [tuple(source.tensors[f"{module}.weight"] for module in group) for group in siblings]
    _leave_what_is_fused(left, groups)
    groups = [group for group in groups if group[0].name not in left]
    if not groups:
        raise ValueError(
            f"{directory}: none of {len(source.tensors)} tensors is to be quantized: wanted a 2-D floating point "
            "*.weight of a linear layer with a multiple of 16 columns; check the directory and --exclude"
        )
    return FilePlan(source, config, tuple(groups), left, tuple(exclude))


def _left_alone(source: TensorSource, config: Mapping[str, Any], exclude: Sequence[str]) -> dict[str, str]:
    """Tensor name -> reason, each tensor looked at by itself."""
    left = {}
    for name, tensor in source.tensors.items():
        reason = reason_to_leave(name, tensor.dtype, tensor.shape, config)
        pattern = next((pattern for pattern in exclude if matches(pattern, name)), None)
        if reason is None and pattern is not None:
            reason = f"excluded by {pattern!r}"
        if reason is not None:
            left[name] = reason
    return left


def _leave_what_is_fused(left: dict[str, str], groups: Sequence[tuple[StoredTensor, ...]]) -> None:
    """Adds the weights that an engine makes one tensor with one that is left: siblings, and all experts of a layer."""
    units = [[tensor.name for tensor in group] for group in groups]
    experts: dict[str, list[str]] = {}
    for name in sorted(name for unit in units for name in unit):
        stack = experts_of(name)
        if stack:
            experts.setdefault(stack, []).append(name)
    for unit in (*units, *experts.values()):
        cause = next((name for name in unit if name in left), None)
        for name in unit:
            if cause is not None and name not in left:
                left[name] = f"fused by engines with {cause.removesuffix('.weight')}, which is left"


def method_of(recipe: str | Recipe) -> Method:
    """The method of a recipe that needs neither data nor the model. ValueError for any other."""
    recipe = presets.get(recipe)
    rule = recipe.rules[0]
    if recipe.kv_cache is not None or any(rule.scheme is not Scheme.W4A16 for rule in recipe.rules):
        problem = "quantizes activations, for which the model must be run"
    elif recipe.rules != (Rule(Scheme.W4A16, method=rule.method),):
        problem = "chooses weights by their place in the model"
    elif not _needs_no_data(rule.method):
        problem = "needs calibration data, for which the model must be run"
    else:
        return rule.method
    raise ValueError(
        f"recipe {recipe.name!r} {problem}: wanted for files alone one of {', '.join(data_free_recipes())}; or "
        "leave out --weight-only"
    )


def data_free_recipes() -> tuple[str, ...]:
    """The names of the recipes that `method_of` takes."""
    return tuple(
        name
        for name, recipe in presets.presets().items()
        if recipe.rules == (Rule(Scheme.W4A16, method=recipe.rules[0].method),)
        and recipe.kv_cache is None
        and _needs_no_data(recipe.rules[0].method)
    )


def _needs_no_data(method: Method) -> bool:
    return method == Method(method.scales) and not method.moments.value


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _refuse_quantized(source: TensorSource, config: Mapping[str, Any]) -> None:
    found = next(
        filter(None, (*_signs_in_config(source, config), *map(sign_of_quantization, source.tensors.values()))), None
    )
    if found:
        raise ValueError(
            f"{source.directory}: it is quantized already ({found}): wanted weights in float32, bfloat16 or float16; "
            "start from the unquantized checkpoint"
        )


def _signs_in_config(source: TensorSource, config: Mapping[str, Any]) -> list[str | None]:
    signs: list[str | None] = []
    for place in (config, config.get("text_config")):
        for key in _ENTRIES:
            entry = place.get(key) if isinstance(place, dict) else None
            if entry is not None:
                method = entry.get("quant_method") if isinstance(entry, dict) else entry
                signs.append(f"{CONFIG_FILE} has {key} with quant_method {method!r}")
    if (source.directory / MODELOPT_FILE).exists():
        signs.append(f"there is {MODELOPT_FILE}")
    return signs


def sign_of_quantization(tensor: StoredTensor) -> str | None:
    """What shows that a tensor belongs to a quantized weight."""
    last = tensor.name.rpartition(".")[2]
    if last in _QUANTIZED_PARTS or tensor.name.endswith(_QUANTIZED_ENDS):
        return f"there is tensor {tensor.name!r}"
    if last == "weight" and len(tensor.shape) >= 2 and (tensor.dtype in _NARROW or tensor.dtype.kind in "iu"):
        return f"tensor {tensor.name!r} is {np.dtype(tensor.dtype).name}"
    return None
