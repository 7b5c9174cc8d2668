"""One number that is equal exactly if all quantized bytes are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxfp4.formats import LeafError
from jaxfp4.tensors import QuantizedWeight
from jaxfp4.transform.trace import leaves_of

_Unit = tuple[tuple[str, ...], tuple[int, ...], list[np.ndarray]]


def digest(qparams: Any, *, inputs: bool = False) -> str:
    """SHA-256 in hexadecimal over packed codes, block scales and global scales, and with `inputs` also input scales.

    Bytes are taken in path order, and within a weight layer by layer where it has separate global scales. Numbers in a
    path sort after its names, so that layers stacked for a scan give the digest of layers kept apart. Equal for every
    sharding; other leaves do not count. Weights are brought to the host one at a time.

    Raises `LeafError` for a weight whose shards this process does not hold all, ValueError if nothing is quantized.
    """
    leaves = leaves_of(qparams)
    quantized = [(p, v) for p, v in zip(leaves.paths, leaves.values, strict=True) if isinstance(v, QuantizedWeight)]
    if not quantized:
        raise ValueError("qparams holds no QuantizedWeight: wanted the result of quantize_params")
    keyed = sorted(
        (*_sort_key(path, index), i, index) for i, (path, v) in enumerate(quantized) for index in _indices(v)
    )
    total = hashlib.sha256()
    loaded, fields = -1, []
    for *_, i, index in keyed:
        if i != loaded:
            loaded, fields = i, _fetch(*quantized[i], inputs)
        for field in fields:
            total.update(np.ascontiguousarray(field[index[: field.ndim]]).tobytes())
    return total.hexdigest()


def _indices(weight: QuantizedWeight) -> Iterator[tuple[int, ...]]:
    """Positions in the leading axes along which the weight has separate global scales."""
    shape = weight.weight.global_scale.shape
    separate = len(shape) - next((i for i, n in enumerate(reversed(shape)) if n > 1), len(shape))
    return np.ndindex(*shape[:separate])


def _sort_key(path: str, index: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names in a path, then its numbers, those of the position in a stack first."""
    parts = [re.fullmatch(r"(.*?)_?(\d*)", part) for part in path.split("/")]
    names = tuple(part[1] for part in parts if part and part[1])
    return names, (*index, *(int(part[2]) for part in parts if part and part[2]))


def _fetch(path: str, weight: QuantizedWeight, inputs: bool) -> list[np.ndarray]:
    """The arrays that count, on the host."""
    fields = [weight.weight.packed, weight.weight.scales, weight.weight.global_scale]
    if inputs and weight.input_scale is not None:
        fields.append(weight.input_scale)
    for field in fields:
        if isinstance(field, jax.Array) and not field.is_fully_addressable:
            raise LeafError(f"{path}: spread over several processes; wanted all shards here; gather it first")
    return [np.asarray(field) for field in fields]
