"""The JSON files that tell a serving engine how a checkpoint is quantized."""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxfp4.formats import BLOCK_SIZE
from jaxfp4.tensors.cache import CacheFormat

CONFIG_FILE = "config.json"
MODELOPT_FILE = "hf_quant_config.json"
MODELOPT = "modelopt"
COMPRESSED_TENSORS = "compressed-tensors"
FORMATS = (MODELOPT, COMPRESSED_TENSORS)

_QUANTIZATION = "quantization_config"
_PACK_FORMAT, _FLOAT_FORMAT, _MIXED_FORMAT = "nvfp4-pack-quantized", "float-quantized", "mixed-precision"
_FP8_KV_SCHEME = {"dynamic": False, "num_bits": 8, "type": "float"}
_COMPRESSED_FP8 = {
    "num_bits": 8,
    "type": "float",
    "strategy": "tensor",
    "symmetric": True,
    "dynamic": False,
}
_KV_SCHEMES: Mapping[CacheFormat, object] = {CacheFormat.FP8: _FP8_KV_SCHEME, CacheFormat.NVFP4: "NVFP4"}


class Kind(enum.Enum):
    """What a quantized module stores, by Model-Optimizer's name for it."""

    W4A4 = "NVFP4"
    """NVFP4 weights with an input scale."""
    W4A16 = "W4A16_NVFP4"
    """NVFP4 weights without."""
    FP8 = "FP8"
    """E4M3 weights with one scale, and an input scale."""


@dataclasses.dataclass(frozen=True)
class Modules:
    """The checkpoint's modules by what was done to them."""

    quantized: Mapping[str, Kind]
    """What the weight of each module became."""

    excluded: list[str]
    """Not quantized, with a parameter of at least two dimensions; sorted."""

    cache: CacheFormat | None = None
    """How keys and values are stored, where it is known."""

    def of(self, kind: Kind) -> list[str]:
        """The modules of one kind, sorted."""
        return sorted(module for module, found in self.quantized.items() if found is kind)

    @property
    def kinds(self) -> list[Kind]:
        """The kinds that there are."""
        return [kind for kind in Kind if kind in self.quantized.values()]


def config_files(modules: Modules, source: Mapping[str, Any] | None, file_format: str) -> dict[str, dict[str, Any]]:
    """File name -> content. `source` is the model's own config.json; its keys stay in front.

    A key-value cache scheme that `source` declares as already quantized by Model-Optimizer is kept in that format,
    unless `modules` has one.
    """
    source = dict(source or {})
    if file_format == COMPRESSED_TENSORS:
        return {CONFIG_FILE: {**source, _QUANTIZATION: _compressed_tensors(modules)}}
    quantization = _modelopt(modules, _kv_scheme(source) if modules.cache is None else _KV_SCHEMES[modules.cache])
    details = {
        "quant_algo": quantization["quant_algo"],
        "kv_cache_quant_algo": _kv_algorithm(quantization.get("kv_cache_scheme")),
        "group_size": BLOCK_SIZE,
        "exclude_modules": quantization["ignore"],
    }
    if "quantized_layers" in quantization:
        details["quantized_layers"] = quantization["quantized_layers"]
    return {
        MODELOPT_FILE: {"producer": quantization["producer"], "quantization": details},
        CONFIG_FILE: {**source, _QUANTIZATION: quantization},
    }


def refuse_unserializable(source: Mapping[str, Any] | None) -> None:
    """ValueError if the model's config cannot be written as JSON."""
    try:
        json.dumps(source)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"config cannot be written as JSON ({error}): wanted the content of the model's config.json"
        ) from None


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """The content of config.json; empty if there is no such file. ValueError if it holds no JSON object."""
    path = directory / CONFIG_FILE
    return read_object(path) if path.is_file() else {}


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object that a file holds; ValueError in one line if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no valid JSON ({' '.join(str(error).split())}); restore the file") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a JSON {type(content).__name__}: wanted an object; restore the file")
    return content


def quant_method(config: Mapping[str, Any]) -> str | None:
    """What config.json says about the format; None if it says nothing."""
    quantization = config.get(_QUANTIZATION)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if isinstance(method, str) else None


def cache_format(config: Mapping[str, Any]) -> CacheFormat | None:
    """How the checkpoint of this config.json has keys and values stored; None if they are not quantized."""
    quantization = config.get(_QUANTIZATION)
    scheme = quantization.get("kv_cache_scheme") if isinstance(quantization, dict) else None
    if isinstance(scheme, dict) and scheme.get("num_bits") == 8 and scheme.get("type") == "float":
        return CacheFormat.FP8
    return CacheFormat.NVFP4 if scheme == "NVFP4" else None


def cache_module(file_format: str, module: str) -> str:
    """The module whose `k_scale` and `v_scale` are for the keys and values that `module` makes.

    >>> cache_module("modelopt", "layers.0.self_attn.k_proj"), cache_module("compressed-tensors", "self_attn.k_proj")
    ('layers.0.self_attn.k_proj', 'self_attn')
    """
    return module.rpartition(".")[0] if file_format == COMPRESSED_TENSORS else module


def _producer() -> dict[str, str]:
    return {"name": "jaxfp4", "version": importlib.metadata.version("jaxfp4")}


def _modelopt(modules: Modules, kv_scheme: object) -> dict[str, Any]:
    kinds = modules.kinds
    algorithm, quantized_layers = kinds[0].value, {}
    if len(kinds) > 1:
        algorithm = "MIXED_PRECISION"
        quantized_layers = {name: _layer(kind) for name, kind in sorted(modules.quantized.items())}
    return {
        "config_groups": _with_targets([_group(kind) for kind in kinds], modules),
        **({"quantized_layers": quantized_layers} if quantized_layers else {}),
        "ignore": modules.excluded,
        "quant_algo": algorithm,
        **({"kv_cache_scheme": kv_scheme} if kv_scheme is not None else {}),
        "producer": _producer(),
        "quant_method": MODELOPT,
    }


def _layer(kind: Kind) -> dict[str, Any]:
    return {"quant_algo": kind.value, **({} if kind is Kind.FP8 else {"group_size": BLOCK_SIZE})}


def _group(kind: Kind) -> dict[str, Any]:
    if kind is Kind.FP8:
        values: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
    else:
        values = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK_SIZE}
    return {**({} if kind is Kind.W4A16 else {"input_activations": dict(values)}), "weights": dict(values)}


def _compressed_tensors(modules: Modules) -> dict[str, Any]:
    groups = [_compressed_group(kind) for kind in modules.kinds]
    formats = {group["format"] for group in groups}
    return {
        "config_groups": _with_targets(groups, modules),
        "format": formats.pop() if len(formats) == 1 else _MIXED_FORMAT,
        "ignore": modules.excluded,
        "kv_cache_scheme": None if modules.cache is None else dict(_COMPRESSED_FP8),
        "quant_method": COMPRESSED_TENSORS,
        "quantization_status": "compressed",
    }


def _compressed_group(kind: Kind) -> dict[str, Any]:
    if kind is Kind.FP8:
        both = {"weights": dict(_COMPRESSED_FP8), "input_activations": dict(_COMPRESSED_FP8)}
        return {**both, "output_activations": None, "format": _FLOAT_FORMAT}
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "group_size": BLOCK_SIZE,
        "strategy": "tensor_group",
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn",
    }
    inputs = {**weights, "dynamic": "local", "observer": "static_minmax"} if kind is Kind.W4A4 else None
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": _PACK_FORMAT}


def _with_targets(groups: list[dict[str, Any]], modules: Modules) -> dict[str, Any]:
    """`group_0`, ..: one group is about all linear layers, several name their modules."""
    targets = [modules.of(kind) for kind in modules.kinds] if len(groups) > 1 else [["Linear"]]
    return {
        f"group_{i}": {**group, "targets": names} for i, (group, names) in enumerate(zip(groups, targets, strict=True))
    }


def _kv_scheme(source: Mapping[str, Any]) -> object:
    if quant_method(source) != MODELOPT:
        return None
    return source[_QUANTIZATION].get("kv_cache_scheme")


def _kv_algorithm(scheme: object) -> object:
    return "FP8" if scheme == _FP8_KV_SCHEME else scheme
