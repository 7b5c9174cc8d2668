"""Reads NVFP4 checkpoints, of either format, into a tree of arrays on any mesh."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxfp4.checkpoints.configs import COMPRESSED_TENSORS, FORMATS, MODELOPT, quant_method, read_config
from jaxfp4.checkpoints.safetensors_file import Checkpoint, open_checkpoint
from jaxfp4.formats import BLOCK_SIZE, nvfp4
from jaxfp4.tensors import NVFP4Tensor, QuantizedWeight

Shardings = Sharding | Mapping[str, Sharding] | None

_U8, _F32, _E4M3 = np.dtype(np.uint8), np.dtype(np.float32), np.dtype(ml_dtypes.float8_e4m3fn)
_WEIGHT_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_ROUND_AMAX_BITS = 11


@dataclasses.dataclass(frozen=True)
class _Suffixes:
    """Last parts of the names under which a format stores a quantized weight."""

    packed: str
    global_scale: str
    input_scale: str
    scales: str = "weight_scale"
    pre_scale: str = "pre_quant_scale"


_SUFFIXES = {
    MODELOPT: _Suffixes("weight", "weight_scale_2", "input_scale"),
    COMPRESSED_TENSORS: _Suffixes("weight_packed", "weight_global_scale", "input_global_scale"),
}


def load_checkpoint(path: str | os.PathLike[str], *, shardings: Shardings = None) -> dict[str, Any]:
    """Reads the checkpoint in the directory `path`, in Model-Optimizer's or the compressed-tensors format.

    The result is a nested dict whose keys are the components of the tensor names, so a leaf's path with '/' replaced by
    '.' is its name: `tree["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"]`. A quantized module's `weight` is a
    `QuantizedWeight`: an `NVFP4Tensor` of shape `[N, K]` with contraction axis -1, `input_scale` float32 `[]` or None,
    and `pre_scale` `[K]` if the file has a `pre_quant_scale`. Its dtype is what config.json calls `dtype` or
    `torch_dtype`; without that, or with another than float32, bfloat16 and float16, it is float32. All other tensors,
    `k_scale` and `v_scale` too, are plain arrays as stored; those with 64-bit numbers stay numpy arrays unless JAX has
    x64 enabled.

    The format is what config.json calls `quant_method`, and without that follows from the names of the tensors.
    compressed-tensors stores reciprocals `d` of the scales. Read is the float32 whose reciprocal is `d`, of two the one
    that a bfloat16 or float16 amax gives; where there is none, float32 1/d. Exporting what was read gives the same
    files, but in this last case `d` may change by its last bit.

    Args:
        path: a directory with `model.safetensors`, or shards and their index, and config.json.
        shardings: None for the default device; a sharding for everything, where arrays that it does not fit (too few
            dimensions, not divisible, or blocks of 16 cut) are replicated over its mesh; or a mapping from a leaf's
            path, components joined by '/', to the sharding of that array, for a `QuantizedWeight` of the logical weight
            `[N, K]` (block scales follow, scalars are replicated). Leaves that are not mentioned go to the default
            device. Each device reads only its slice of the memory-mapped file.

    Raises:
        FileNotFoundError: the directory, its tensors or one of its files is missing.
        ValueError: a file is broken; the checkpoint is in neither format; a tensor of a quantized weight is missing, or
            has the wrong dtype or shape; a mapping in `shardings` names a path that is not there, or does not fit.
        TypeError: `shardings` holds something else.
    """
    directory = pathlib.Path(path)
    checkpoint = open_checkpoint(directory)
    config = read_config(directory)
    names = set(checkpoint.names())
    suffixes = _SUFFIXES[_detect_format(directory, quant_method(config), names)]
    dtype = _weight_dtype(config)
    modules = _quantized_modules(checkpoint, names, suffixes)
    if not modules:
        raise ValueError(
            f"{directory}: no tensor *.{suffixes.packed} of dtype uint8 and no *.{suffixes.global_scale}: wanted an "
            "NVFP4 checkpoint; quantize the model first"
        )
    placement = _Placement(shardings)
    tree: dict[str, Any] = {}
    for module in modules:
        name = _join(module, "weight")
        parts = _weight_parts(checkpoint, names, module, suffixes, placement.of(name), dtype)
        names -= {_join(module, suffix) for suffix in dataclasses.astuple(suffixes)}
        _insert(tree, directory, name, parts)
    for name in sorted(names):
        _insert(tree, directory, name, _place(name, checkpoint.tensor(name), placement.of(name)))
    placement.refuse_unused()
    return tree


def _detect_format(directory: pathlib.Path, method: str | None, names: set[str]) -> str:
    if method in FORMATS:
        return method
    if method is None:
        for file_format, suffixes in _SUFFIXES.items():
            if any(_split(name)[1] == suffixes.global_scale for name in names):
                return file_format
        for file_format, suffixes in reversed(_SUFFIXES.items()):
            if any(_split(name)[1] == suffixes.packed for name in names) and any(
                _split(name)[1] == suffixes.scales for name in names
            ):
                return file_format
    found = "no quantization in config.json or among the tensors" if method is None else f"quant_method {method!r}"
    raise ValueError(
        f"{directory}: {found}: wanted an NVFP4 checkpoint, of {' or '.join(FORMATS)}; quantize the model first"
    )


def _weight_dtype(config: Mapping[str, Any]) -> np.dtype:
    name = config.get("dtype", config.get("torch_dtype"))
    return _WEIGHT_DTYPES.get(name, _F32) if isinstance(name, str) else _F32


def _quantized_modules(checkpoint: Checkpoint, names: set[str], suffixes: _Suffixes) -> list[str]:
    """Modules with packed codes, and those with a global scale, whose codes must then be there too."""
    modules = set()
    for name in names:
        module, last = _split(name)
        if last == suffixes.global_scale or (last == suffixes.packed and checkpoint.info(name)[0] == _U8):
            modules.add(module)
    return sorted(modules)


def _weight_parts(
    checkpoint: Checkpoint,
    names: set[str],
    module: str,
    suffixes: _Suffixes,
    sharding: _Placed,
    dtype: np.dtype,
) -> QuantizedWeight:
    def part(suffix: str, wanted_dtype: np.dtype, wanted_shape: tuple[int, ...] | None) -> np.ndarray:
        name = _join(module, suffix)
        if name not in names:
            raise ValueError(
                f"{checkpoint.directory}: tensor {name!r} is missing beside {_join(module, '*')!r}: wanted it for an "
                "NVFP4 weight; export the checkpoint again"
            )
        found_dtype, shape = checkpoint.info(name)
        scalar = wanted_shape == () and shape in ((), (1,))
        if found_dtype != wanted_dtype or (wanted_shape is not None and shape != wanted_shape and not scalar):
            wanted = wanted_dtype.name if wanted_shape is None else f"{wanted_dtype.name} {wanted_shape}"
            raise ValueError(
                f"{checkpoint.directory}: tensor {name!r} is {found_dtype.name} {shape}: wanted {wanted}; export the "
                "checkpoint again"
            )
        return checkpoint.tensor(name)

    packed = part(suffixes.packed, _U8, None)
    if packed.ndim != 2 or packed.shape[1] % (BLOCK_SIZE // 2) or not packed.shape[1]:
        raise ValueError(
            f"{checkpoint.directory}: tensor {_join(module, suffixes.packed)!r} has shape {packed.shape}: wanted [N, "
            f"K/2] with K a positive multiple of {BLOCK_SIZE}; export the checkpoint again"
        )
    rows, length = packed.shape[0], 2 * packed.shape[1]
    scales = part(suffixes.scales, _E4M3, (rows, length // BLOCK_SIZE))
    reciprocal = suffixes is _SUFFIXES[COMPRESSED_TENSORS]

    def scalar(suffix: str) -> jax.Array:
        stored = np.float32(part(suffix, _F32, ()).reshape(()))
        value = inverse_of_reciprocal(stored) if reciprocal else stored
        return _place(_join(module, suffix), np.asarray(value), sharding.replicated())

    name = _join(module, "weight")
    sharding = sharding.fit_weight(name, (rows, length))
    weight = NVFP4Tensor(
        _place(name, packed, sharding),
        _place(name, scales, sharding),
        scalar(suffixes.global_scale),
        (-1,),
        (length,),
        dtype,
    )
    input_scale = scalar(suffixes.input_scale) if _join(module, suffixes.input_scale) in names else None
    pre_scale_name = _join(module, suffixes.pre_scale)
    pre_scale = None
    if pre_scale_name in names:
        stored_dtype = checkpoint.info(pre_scale_name)[0]
        pre_scale = _place(name, part(suffixes.pre_scale, stored_dtype, (length,)), sharding.replicated())
    return QuantizedWeight(weight, input_scale, pre_scale)


def inverse_of_reciprocal(stored: np.float32) -> np.float32:
    """The float32 whose float32 reciprocal is `stored`; of several the scale of a round amax, then the nearest to
    1/stored.

    An amax is round if it has at most 11 significant bits, as those of bfloat16 and float16 tensors have, so the global
    scales of such tensors come back exactly. If there is no such float32, the result is `1 / stored`.

    >>> scale = np.float32(1.375) / np.float32(2688)
    >>> bool(inverse_of_reciprocal(np.float32(1) / scale) == scale)
    True
    """
    with np.errstate(all="ignore"):
        nearest = np.float32(1) / stored
        neighbours = [nearest, np.nextafter(nearest, np.float32(0)), np.nextafter(nearest, np.float32(np.inf))]
        inverses = [value for value in neighbours if np.float32(1) / value == stored]
    return next((value for value in inverses if _has_round_amax(value)), inverses[0] if inverses else nearest)


def _has_round_amax(scale: np.float32) -> bool:
    if not np.isfinite(scale):
        return False
    mantissa, exponent = math.frexp(float(scale) * nvfp4.TENSOR_DIVISOR)
    amax = math.ldexp(round(mantissa * 2**_ROUND_AMAX_BITS), exponent - _ROUND_AMAX_BITS)
    return bool(np.float32(amax) / np.float32(nvfp4.TENSOR_DIVISOR) == scale)


def _split(name: str) -> tuple[str, str]:
    module, _, last = name.rpartition(".")
    return module, last


def _join(module: str, last: str) -> str:
    return f"{module}.{last}" if module else last


def _insert(tree: dict[str, Any], directory: pathlib.Path, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(
                f"{directory}: tensor {name!r} lies below another tensor: wanted names that form a tree; rename it"
            )
    if last in node:
        raise ValueError(
            f"{directory}: tensor {name!r} is there twice, or above others: wanted names that form a tree; rename it"
        )
    node[last] = value


@dataclasses.dataclass(frozen=True)
class _Placed:
    """Where one leaf goes. `strict`: a sharding that does not fit is an error, otherwise the leaf is replicated."""

    sharding: Sharding | None
    strict: bool = True

    def replicated(self) -> _Placed:
        """For scalars beside a weight: on the same devices, whole on each."""
        if isinstance(self.sharding, NamedSharding):
            everywhere = NamedSharding(self.sharding.mesh, PartitionSpec(), memory_kind=self.sharding.memory_kind)
            return _Placed(everywhere, self.strict)
        return self

    def fit(self, name: str, shape: tuple[int, ...], what: str = "the array") -> _Placed:
        """This, if the sharding divides the shape; else ValueError if strict, replicated if not."""
        if self.sharding is None or _divides(self.sharding, shape):
            return self
        if self.strict:
            raise ValueError(
                f"shardings[{_path(name)!r}] is {self.sharding}, which does not divide {what} of shape {shape}: wanted "
                "equal whole parts; split another dimension"
            )
        return self.replicated()

    def fit_weight(self, name: str, shape: tuple[int, ...]) -> _Placed:
        """As `fit` for a weight `[N, K]`, of which no block of 16 along K may be cut."""
        return self.fit(name, shape).fit(name, (shape[0], shape[1] // BLOCK_SIZE), "the block scales")


def _divides(sharding: Sharding, shape: tuple[int, ...]) -> bool:
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):
        return False
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


class _Placement:
    """The caller's `shardings` by tensor name, and which of them were asked for."""

    def __init__(self, shardings: Shardings):
        for path, sharding in shardings.items() if isinstance(shardings, Mapping) else [("", shardings)]:
            if sharding is not None and not isinstance(sharding, NamedSharding | SingleDeviceSharding):
                where = f"shardings[{path!r}]" if path else "shardings"
                raise TypeError(
                    f"{where} is {sharding!r}: wanted a jax.sharding.NamedSharding or SingleDeviceSharding, or a "
                    "mapping of them by path"
                )
        self._shardings = shardings
        self._unused = set(shardings) if isinstance(shardings, Mapping) else set()

    def of(self, name: str) -> _Placed:
        path = _path(name)
        if isinstance(self._shardings, Mapping):
            self._unused.discard(path)
            return _Placed(self._shardings.get(path))
        return _Placed(self._shardings, strict=False)

    def refuse_unused(self) -> None:
        if self._unused:
            raise ValueError(
                f"shardings has {min(self._unused)!r}, which is no leaf: wanted paths such as 'model/norm/weight'; "
                "correct it"
            )


def _path(name: str) -> str:
    return name.replace(".", "/")


def _place(name: str, values: np.ndarray, placed: _Placed) -> Any:
    """The array on its devices, each reading its own slice; values that JAX would narrow stay on the host."""
    if jax.dtypes.canonicalize_dtype(values.dtype) != values.dtype:
        return np.array(values)
    sharding = placed.fit(name, values.shape).sharding
    if sharding is None:
        return jnp.asarray(np.array(values))
    return jax.make_array_from_callback(values.shape, sharding, lambda index: np.array(values[index]))
