"""The quantized weights of a checkpoint as it stores them, in either format, checked and memory-mapped."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxfp4.checkpoints.configs import COMPRESSED_TENSORS, FORMATS, MODELOPT, quant_method, read_config
from jaxfp4.checkpoints.safetensors_file import Checkpoint, open_checkpoint
from jaxfp4.formats import BLOCK_SIZE, nvfp4

_U8, _F32, _E4M3 = np.dtype(np.uint8), np.dtype(np.float32), np.dtype(ml_dtypes.float8_e4m3fn)
_WEIGHT_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
_ROUND_AMAX_BITS = 11


@dataclasses.dataclass(frozen=True)
class Suffixes:
    """Last parts of the names under which a format stores a quantized weight."""

    packed: str
    global_scale: str
    input_scale: str
    scales: str = "weight_scale"
    pre_scale: str = "pre_quant_scale"


FP8_SCALE, FP8_INPUT_SCALE = "weight_scale", "input_scale"
"""Of an FP8 weight, in both formats, where they multiply."""

SUFFIXES: Mapping[str, Suffixes] = {
    MODELOPT: Suffixes("weight", "weight_scale_2", "input_scale"),
    COMPRESSED_TENSORS: Suffixes("weight_packed", "weight_global_scale", "input_global_scale"),
}


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """One weight `[N, K]`. The first two arrays are views of the mapped file."""

    packed: np.ndarray
    """uint8 `[N, K/2]`."""

    scales: np.ndarray
    """float8_e4m3fn `[N, K/16]`."""

    global_scale: np.float32
    input_scale: np.float32 | None
    pre_scale: np.ndarray | None
    """`[K]`, in the dtype of the file."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return self.packed.shape[0], 2 * self.packed.shape[1]


@dataclasses.dataclass(frozen=True)
class StoredFP8:
    """One weight `[N, K]` in FP8. The values are a view of the mapped file."""

    values: np.ndarray
    """float8_e4m3fn `[N, K]`."""

    scale: np.float32
    input_scale: np.float32 | None

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return self.values.shape[0], self.values.shape[1]


@dataclasses.dataclass(frozen=True)
class StoredCheckpoint:
    """An NVFP4 checkpoint whose format is known; see `open_quantized`."""

    directory: pathlib.Path
    tensors: Checkpoint
    file_format: str
    config: Mapping[str, Any]
    modules: frozenset[str]
    """The modules that hold a quantized weight."""
    names: frozenset[str]
    """The names of all tensors."""

    @property
    def plain(self) -> frozenset[str]:
        """The names of the tensors that belong to no quantized weight."""
        return self.names - self.parts(self.modules)

    def parts(self, modules: Iterable[str]) -> frozenset[str]:
        """The names of all tensors that quantized weights of these modules may have."""
        suffixes = dataclasses.astuple(SUFFIXES[self.file_format])
        return frozenset(joined(module, suffix) for module in modules for suffix in suffixes)

    @property
    def weight_dtype(self) -> np.dtype:
        """What config.json calls `dtype` or `torch_dtype`; float32 without it, or if it is no 16 or 32-bit float."""
        name = self.config.get("dtype", self.config.get("torch_dtype"))
        return _WEIGHT_DTYPES.get(name, _F32) if isinstance(name, str) else _F32

    def weight(self, module: str) -> StoredWeight:
        """The weight of one of `modules`. ValueError if a part is missing or has the wrong dtype or shape."""
        suffixes = SUFFIXES[self.file_format]
        packed = self._part(module, suffixes.packed, _U8, None)
        if packed.ndim != 2 or packed.shape[1] % (BLOCK_SIZE // 2) or not packed.shape[1]:
            raise ValueError(
                f"{self.directory}: tensor {joined(module, suffixes.packed)!r} has shape {packed.shape}: wanted [N, "
                f"K/2] with K a positive multiple of {BLOCK_SIZE}; export the checkpoint again"
            )
        rows, length = packed.shape[0], 2 * packed.shape[1]
        scales = self._part(module, suffixes.scales, _E4M3, (rows, length // BLOCK_SIZE))
        global_scale = self._scalar(module, suffixes.global_scale)
        input_scale = None
        if self._has(module, suffixes.input_scale):
            input_scale = self._scalar(module, suffixes.input_scale)
        pre_scale = None
        if self._has(module, suffixes.pre_scale):
            stored_dtype = self.tensors.info(joined(module, suffixes.pre_scale))[0]
            pre_scale = self._part(module, suffixes.pre_scale, stored_dtype, (length,))
        return StoredWeight(packed, scales, global_scale, input_scale, pre_scale)

    @functools.cached_property
    def fp8_modules(self) -> frozenset[str]:
        """The modules that hold an FP8 weight with one scale; other kinds of FP8 are left as they are stored."""
        ends = [name.removesuffix(f".{FP8_SCALE}") for name in self.plain if split_name(name)[1] == FP8_SCALE]
        return frozenset(module for module in ends if self._is_fp8(module))

    def _is_fp8(self, module: str) -> bool:
        weight = joined(module, "weight")
        if weight not in self.names or self.tensors.info(weight)[0] != _E4M3 or len(self.tensors.info(weight)[1]) != 2:
            return False
        return self.tensors.info(joined(module, FP8_SCALE)) in ((_F32, ()), (_F32, (1,)))

    def fp8_weight(self, module: str) -> StoredFP8:
        """The weight of one of `fp8_modules`."""

        def scalar(last: str) -> np.float32:
            return np.float32(self.tensors.tensor(joined(module, last)).reshape(()))

        has_input = joined(module, FP8_INPUT_SCALE) in self.names
        values = self.tensors.tensor(joined(module, "weight"))
        return StoredFP8(values, scalar(FP8_SCALE), scalar(FP8_INPUT_SCALE) if has_input else None)

    def fp8_parts(self, modules: Iterable[str]) -> frozenset[str]:
        """The names of all tensors that FP8 weights of these modules may have."""
        return frozenset(joined(m, last) for m in modules for last in ("weight", FP8_SCALE, FP8_INPUT_SCALE))

    def _has(self, module: str, suffix: str) -> bool:
        return joined(module, suffix) in self.names

    def _scalar(self, module: str, suffix: str) -> np.float32:
        stored = np.float32(self._part(module, suffix, _F32, ()).reshape(()))
        return inverse_of_reciprocal(stored) if self.file_format == COMPRESSED_TENSORS else stored

    def _part(
        self, module: str, suffix: str, wanted_dtype: np.dtype, wanted_shape: tuple[int, ...] | None
    ) -> np.ndarray:
        name = joined(module, suffix)
        if not self._has(module, suffix):
            raise ValueError(
                f"{self.directory}: tensor {name!r} is missing beside {joined(module, '*')!r}: wanted it for an "
                "NVFP4 weight; export the checkpoint again"
            )
        found_dtype, shape = self.tensors.info(name)
        scalar = wanted_shape == () and shape in ((), (1,))
        if found_dtype != wanted_dtype or (wanted_shape is not None and shape != wanted_shape and not scalar):
            wanted = wanted_dtype.name if wanted_shape is None else f"{wanted_dtype.name} {wanted_shape}"
            raise ValueError(
                f"{self.directory}: tensor {name!r} is {found_dtype.name} {shape}: wanted {wanted}; export the "
                "checkpoint again"
            )
        return self.tensors.tensor(name)


def open_quantized(directory: pathlib.Path) -> StoredCheckpoint:
    """Opens a checkpoint and finds its format: what config.json calls `quant_method`, or by the names of the tensors.

    Raises what `open_checkpoint` raises, and ValueError if it is in neither format.
    """
    tensors = open_checkpoint(directory)
    config = read_config(directory)
    names = set(tensors.names())
    file_format = _detect_format(directory, quant_method(config), names)
    suffixes = SUFFIXES[file_format]
    modules = _quantized_modules(tensors, names, suffixes)
    if not modules:
        raise ValueError(
            f"{directory}: no tensor *.{suffixes.packed} of dtype uint8 and no *.{suffixes.global_scale}: wanted an "
            "NVFP4 checkpoint; quantize the model first"
        )
    return StoredCheckpoint(directory, tensors, file_format, config, modules, frozenset(names))


def _detect_format(directory: pathlib.Path, method: str | None, names: set[str]) -> str:
    if method in FORMATS:
        return method
    if method is None:
        for file_format, suffixes in SUFFIXES.items():
            if any(split_name(name)[1] == suffixes.global_scale for name in names):
                return file_format
        for file_format in (COMPRESSED_TENSORS, MODELOPT):
            suffixes = SUFFIXES[file_format]
            if any(split_name(name)[1] == suffixes.packed for name in names) and any(
                split_name(name)[1] == suffixes.scales for name in names
            ):
                return file_format
    found = "no quantization in config.json or among the tensors" if method is None else f"quant_method {method!r}"
    raise ValueError(
        f"{directory}: {found}: wanted an NVFP4 checkpoint, of {' or '.join(FORMATS)}; quantize the model first"
    )


def _quantized_modules(checkpoint: Checkpoint, names: set[str], suffixes: Suffixes) -> frozenset[str]:
    """Modules with packed codes, and those with a global scale, whose codes must then be there too."""
    modules = set()
    for name in names:
        module, last = split_name(name)
        if last == suffixes.global_scale or (last == suffixes.packed and checkpoint.info(name)[0] == _U8):
            modules.add(module)
    return frozenset(modules)


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


def split_name(name: str) -> tuple[str, str]:
    """A tensor's name as module and last part; the module may be empty."""
    module, _, last = name.rpartition(".")
    return module, last


def joined(module: str, last: str) -> str:
    """The inverse of `split_name`."""
    return f"{module}.{last}" if module else last
