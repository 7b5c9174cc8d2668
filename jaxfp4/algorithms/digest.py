"""One number that is equal exactly if all quantized bytes are."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import jax
import numpy as np

from jaxfp4.formats import LeafError, path_string
from jaxfp4.tensors import FP8Tensor, NVFP4Tensor, QuantizedTensor, QuantizedWeight

_Field = tuple[np.ndarray, dict[int, int]]
"""An array, and for each of its axes that runs over separate weights, which number of an index belongs to it."""


def digest(qparams: Any, *, inputs: bool = False) -> str:
    """SHA-256 in hexadecimal over codes, block scales and global scales, and with `inputs` also input scales.

    Bytes are taken in path order, and within a weight layer by layer where it has separate global scales. Numbers in a
    path sort after its names, so that layers stacked for a scan give the digest of layers kept apart. Equal for every
    sharding; leaves that are not quantized do not count. Weights are brought to the host one at
    a time.

    Raises `LeafError` for a weight whose shards this process does not hold all, ValueError if nothing is quantized.
    """
    quantized = list(weights(qparams).items())
    if not quantized:
        raise ValueError("qparams holds no QuantizedWeight: wanted the result of quantize_params")
    keyed = sorted(
        (*_sort_key(path, index), i, index) for i, (path, v) in enumerate(quantized) for index in np.ndindex(_sizes(v))
    )
    total = hashlib.sha256()
    loaded, fields = -1, []
    for *_, i, index in keyed:
        if i != loaded:
            loaded, fields = i, _fetch(*quantized[i], inputs)
        for field, places in fields:
            part = field[tuple(index[places[a]] if a in places else slice(None) for a in range(field.ndim))]
            total.update(np.ascontiguousarray(part).tobytes())
    return total.hexdigest()


def weights(qparams: Any) -> dict[str, QuantizedWeight]:
    """The quantized weights of a tree by path; a bare `NVFP4Tensor` or `FP8Tensor` counts as one
    without input scale.

    >>> import jax.numpy as jnp, jaxfp4
    >>> weights({"layers": [{"kernel": jaxfp4.quantize(jnp.ones((16, 2)))}], "bias": jnp.zeros(2)})
    {'layers/0/kernel': QuantizedWeight(NVFP4Tensor(shape=(16, 2), axis=-2, dtype=float32, 5.50 bits/value))}
    """
    kinds = (QuantizedWeight, NVFP4Tensor, FP8Tensor)
    leaves = jax.tree_util.tree_leaves_with_path(qparams, is_leaf=lambda x: isinstance(x, kinds))
    found = {path_string(keys): value for keys, value in leaves if isinstance(value, kinds)}
    return {path: QuantizedWeight(v) if isinstance(v, QuantizedTensor) else v for path, v in found.items()}


def _separate_axes(weight: QuantizedWeight) -> list[int]:
    """The axes along which the weight has separate global scales."""
    return [axis for axis, n in enumerate(weight.weight.global_scale.shape) if n > 1]


def _sizes(weight: QuantizedWeight) -> tuple[int, ...]:
    """How many there are along each of them."""
    return tuple(weight.weight.global_scale.shape[axis] for axis in _separate_axes(weight))


def _sort_key(path: str, index: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names in a path, then its numbers and behind them the position in a stack."""
    parts = [re.fullmatch(r"(.*?)_?(\d*)", part) for part in path.split("/")]
    names = tuple(part[1] for part in parts if part and part[1])
    return names, (*(int(part[2]) for part in parts if part and part[2]), *index)


def _fetch(path: str, weight: QuantizedWeight, inputs: bool) -> list[_Field]:
    """The arrays that count, on the host."""
    tensor, axes = weight.weight, _separate_axes(weight)
    unmerged = {axis: i for i, axis in enumerate(axes)}
    if isinstance(tensor, FP8Tensor):
        fields = [(tensor.values, unmerged), (tensor.global_scale, unmerged)]
    else:
        merged = tensor.blocking.axes[:-1] if tensor.blocking.merged else ()
        places = {axis - sum(m < axis for m in merged): i for i, axis in enumerate(axes)}
        fields = [(tensor.packed, places), (tensor.scales, places), (tensor.global_scale, unmerged)]
    if inputs and weight.input_scale is not None:
        fields.append((weight.input_scale, _input_places(weight.input_scale.shape, _sizes(weight))))
    for field, _ in fields:
        if isinstance(field, jax.Array) and not field.is_fully_addressable:
            raise LeafError(f"{path}: spread over several processes; wanted all shards here; gather it first")
    return [(np.asarray(field), places) for field, places in fields]


def _input_places(shape: tuple[int, ...], sizes: tuple[int, ...]) -> dict[int, int]:
    """The axes of an input scale, one for each layer axis, among the `sizes` of layer and expert axes."""
    places: dict[int, int] = {}
    for i, n in enumerate(sizes):
        if len(places) < len(shape) and n == shape[len(places)]:
            places[len(places)] = i
    return places
