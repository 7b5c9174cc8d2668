"""The modules of any checkpoint by what its tensors' names, dtypes and shapes say, sound or not; nothing is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxfp4.checkpoints.configs import COMPRESSED_TENSORS, MODELOPT
from jaxfp4.checkpoints.safetensors_file import Checkpoint
from jaxfp4.checkpoints.stored import SUFFIXES, joined, split_name
from jaxfp4.formats import BLOCK_SIZE

U8, F32, E4M3 = np.dtype(np.uint8), np.dtype(np.float32), np.dtype(ml_dtypes.float8_e4m3fn)
_FLOAT8 = (E4M3, np.dtype(ml_dtypes.float8_e5m2))
_FLOATS = (F32, np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float64))
_SHORT_NAMES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}

_SCALES = ("_scale", "_scale_2", "_scale_inv")
STACK = "NVFP4 stack"
"""The scheme of experts that are packed in one tensor of three dimensions, as in Llama 4."""

# No number is longer than any that counts something: Python refuses to read thousands of digits.
_LAYER = re.compile(r"(?:^|(?<=\.))(layers|layer|h|blocks|block)\.(\d{1,18})(?=\.|$)")
_EXPERT = re.compile(r"(?:^|(?<=\.))experts\.(\d{1,18})(?=\.|$)")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as the file's header describes it."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype.name} {list(self.shape)}"

    @property
    def is_scalar(self) -> bool:
        """Whether it holds one value, as `[]` or `[1]`."""
        return self.shape in ((), (1,))

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class QuantizedModule:
    """The tensors of an NVFP4 weight, as far as they are there."""

    name: str
    file_format: str
    codes: StoredTensor | None
    block_scales: StoredTensor | None
    global_scale: StoredTensor | None
    input_scale: StoredTensor | None
    pre_scale: StoredTensor | None
    others: tuple[str, ...]
    """Last parts of the module's other tensors, such as `bias`."""

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """Those of its five that are there."""
        every = (self.codes, self.block_scales, self.global_scale, self.input_scale, self.pre_scale)
        return tuple(tensor for tensor in every if tensor is not None)

    @property
    def shape(self) -> tuple[int, int] | None:
        """`(N, K)` of the weight; None without two-dimensional codes."""
        if self.codes is None or len(self.codes.shape) != 2:
            return None
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def has_values(self) -> bool:
        """Whether codes and block scales are there and fit each other, so that they can be decoded."""
        if self.codes is None or self.block_scales is None or self.shape is None:
            return False
        n, k = self.shape
        fits = k % BLOCK_SIZE == 0 and self.block_scales.shape == (n, k // BLOCK_SIZE)
        return fits and self.codes.dtype == U8 and self.block_scales.dtype == E4M3 and n * k > 0

    @property
    def scheme(self) -> str:
        """`W4A4` with an input scale, else `W4A16`."""
        return "W4A16" if self.input_scale is None else "W4A4"


@dataclasses.dataclass(frozen=True)
class PlainModule:
    """A weight of at least two dimensions in another precision."""

    name: str
    tensor: StoredTensor
    scheme: str
    """`bf16`, `f32`, `FP8`, `MXFP4`, `STACK`, or the dtype."""

    nbytes: int
    """Bytes of the weight and of its scales."""

    @property
    def is_unquantized(self) -> bool:
        """Whether it is stored in an ordinary floating point format."""
        return self.tensor.dtype in _FLOATS

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: with two codes a byte, the last axis is twice as long as the tensor's."""
        packed = self.scheme in ("MXFP4", STACK)
        return (*self.tensor.shape[:-1], 2 * self.tensor.shape[-1]) if packed else self.tensor.shape


@dataclasses.dataclass(frozen=True)
class Inventory:
    """All tensors of a checkpoint in their roles, each mapping in the order of natural sorting."""

    quantized: Mapping[str, QuantizedModule]
    plain: Mapping[str, PlainModule]
    cache_scales: Mapping[str, StoredTensor]
    """Tensor name -> `k_scale` and `v_scale` of the key-value cache."""


def take_inventory(checkpoint: Checkpoint) -> Inventory:
    """Looks at names, dtypes and shapes only."""
    parts: dict[str, dict[str, StoredTensor]] = {}
    for name in sorted(checkpoint.names(), key=natural_order):
        module, last = split_name(name)
        parts.setdefault(module, {})[last] = StoredTensor(name, *checkpoint.info(name))
    quantized, plain, cache_scales = {}, {}, {}
    for module, tensors in parts.items():
        file_format = _nvfp4_format(tensors)
        if file_format is not None:
            quantized[module] = _quantized_module(module, file_format, tensors)
        cache_scales.update({t.name: t for last, t in tensors.items() if last in ("k_scale", "v_scale")})
        taken = SUFFIXES[file_format].packed if file_format else None
        for last, tensor in tensors.items():
            if last != taken and len(tensor.shape) >= 2 and not last.endswith(_SCALES):
                found = _plain_module(module, last, tensors)
                plain[found.name] = found
    return Inventory(quantized, plain, cache_scales)


def _nvfp4_format(tensors: Mapping[str, StoredTensor]) -> str | None:
    """The format of an NVFP4 weight that these tensors of one module are at least a part of."""
    packed, weight, scales = (tensors.get(last) for last in ("weight_packed", "weight", "weight_scale"))
    if "weight_global_scale" in tensors or "input_global_scale" in tensors or (packed and packed.dtype == U8):
        return COMPRESSED_TENSORS
    if "weight_scale_2" in tensors:
        return MODELOPT
    block_scales = scales is not None and scales.dtype == E4M3 and len(scales.shape) >= 2
    if weight is None:
        return MODELOPT if block_scales or "input_scale" in tensors else None
    if weight.dtype == U8:
        return None if _is_mxfp4(scales) else MODELOPT
    return MODELOPT if block_scales and weight.dtype in _FLOATS else None


def _is_mxfp4(scales: StoredTensor | None) -> bool:
    return scales is not None and scales.dtype in (U8, np.dtype(ml_dtypes.float8_e8m0fnu))


def _quantized_module(module: str, file_format: str, tensors: Mapping[str, StoredTensor]) -> QuantizedModule:
    suffixes = SUFFIXES[file_format]
    names = (suffixes.packed, suffixes.scales, suffixes.global_scale, suffixes.input_scale, suffixes.pre_scale)
    others = tuple(last for last in tensors if last not in names)
    codes, block_scales, global_scale, input_scale, pre_scale = (tensors.get(last) for last in names)
    return QuantizedModule(module, file_format, codes, block_scales, global_scale, input_scale, pre_scale, others)


def _plain_module(module: str, last: str, tensors: Mapping[str, StoredTensor]) -> PlainModule:
    tensor = tensors[last]
    prefix = "" if last == "weight" else f"{last}_"
    names = (f"{prefix}weight_scale", f"{prefix}weight_scale_2", f"{prefix}weight_scale_inv", f"{prefix}input_scale")
    scales = [tensors[name] for name in names if name in tensors]
    scale = tensors.get(f"{prefix}weight_scale")
    if tensor.dtype in _FLOAT8:
        scheme = "FP8"
    elif tensor.dtype == U8 and _is_mxfp4(scale):
        scheme = "MXFP4"
    elif tensor.dtype == U8 and len(tensor.shape) == 3 and scale is not None and scale.dtype == E4M3:
        scheme = STACK
    else:
        scheme = _SHORT_NAMES.get(tensor.dtype.name, tensor.dtype.name)
    name = module if last == "weight" else joined(module, last)
    return PlainModule(name, tensor, scheme, tensor.nbytes + sum(one.nbytes for one in scales))


def multiplier(checkpoint: Checkpoint, module: QuantizedModule, tensor: StoredTensor) -> float:
    """What a global or input scale multiplies by: its value, or in compressed-tensors the reciprocal of it.

    `tensor` must be a scalar. A zero divisor gives infinity.
    """
    stored = np.float32(checkpoint.tensor(tensor.name).reshape(()))
    if module.file_format != COMPRESSED_TENSORS:
        return float(stored)
    with np.errstate(all="ignore"):
        return float(np.float32(1) / stored)


def natural_order(name: str) -> tuple[tuple[int, str], ...]:
    """A key that sorts numbers in names by their value.

    >>> sorted(["layers.10", "layers.9"], key=natural_order)
    ['layers.9', 'layers.10']
    """
    return tuple(_natural_part(part) for part in name.split("."))


def _natural_part(part: str) -> tuple[int, str]:
    if not (part.isdecimal() and part.isascii()):
        return -1, part
    digits = part.lstrip("0")
    return len(digits), digits


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack and the number of the layer that a module is in.

    >>> layer_of("model.layers.3.mlp.up_proj"), layer_of("lm_head")
    (('model.layers', 3), None)
    """
    found = _LAYER.search(name)
    return (name[: found.end(1)], int(found.group(2))) if found else None


def expert_of(name: str) -> int | None:
    """The number of the expert that a module is in.

    >>> expert_of("model.layers.3.mlp.experts.7.up_proj"), expert_of("model.layers.3.mlp.shared_experts.up_proj")
    (7, None)
    """
    found = _EXPERT.search(name)
    return int(found.group(1)) if found else None


def kind_of(name: str) -> str:
    """The name without its layer and expert.

    >>> kind_of("model.layers.3.mlp.experts.7.up_proj")
    'model.layers.{layer}.mlp.experts.{expert}.up_proj'
    """
    return _EXPERT.sub("experts.{expert}", _LAYER.sub(r"\1.{layer}", name, count=1), count=1)
