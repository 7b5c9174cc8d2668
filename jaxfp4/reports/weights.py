"""The error of each quantized weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray
from rich.table import Table

from jaxfp4.tensors import QuantizedWeight
from jaxfp4.tensors.hadamard import hadamard
from jaxfp4.tensors.memory import on_devices
from jaxfp4.transform.trace import leaves_of


@dataclasses.dataclass(frozen=True)
class WeightQuality:
    """The error of one quantized weight."""

    path: str
    shape: tuple[int, ...]
    bits: float
    """Bits stored for each value, scales included."""
    signal_to_noise: float
    """`10 * log10(sum(w**2) / sum((w - q)**2))` in decibels; infinite for no error, NaN for a weight of zeros."""


def weight_quality(params: Any, qparams: Any) -> tuple[WeightQuality, ...]:
    """The signal-to-noise ratio of each quantized weight against the original, in the order of the tree.

    A rotated weight is compared with the original rotated. Where channel scales were folded, `params` are those after
    it: `jaxfp4.fold_channel_scales(params, plan, stats)`.

    Raises ValueError if the two trees differ in their paths, or in an array that is not quantized.
    """
    before, after = leaves_of(params), leaves_of(qparams)
    if before.paths != after.paths:
        odd = sorted(set(before.paths) ^ set(after.paths))[0]
        raise ValueError(f"params and qparams differ at {odd!r}: wanted the parameters that qparams was made from")
    for path, w, q in zip(before.paths, before.values, after.values, strict=True):
        if not isinstance(q, QuantizedWeight) and w is not q and differ(np.asarray(w), np.asarray(q)):
            raise ValueError(
                f"params and qparams differ in the values of {path!r}, which is not quantized: wanted the parameters "
                "that qparams was made from; after AWQ or SmoothQuant pass fold_channel_scales(params, plan, stats)"
            )
    return tuple(
        _quality(path, on_devices(w), q)
        for path, w, q in zip(before.paths, before.values, after.values, strict=True)
        if isinstance(q, QuantizedWeight)
    )


def differ(before: NDArray[Any], after: NDArray[Any]) -> bool:
    """Whether shapes or values differ, bit for bit, once `before` is rounded to the type of `after`."""
    with np.errstate(all="ignore"):
        expected = before.astype(after.dtype)
    # Flat, as numpy has no other view of a scalar.
    return before.shape != after.shape or not np.array_equal(
        expected.reshape(-1).view(np.uint8), after.reshape(-1).view(np.uint8)
    )


def _quality(path: str, w: Array, q: QuantizedWeight) -> WeightQuality:
    signal, noise = (float(x) for x in _energies(w, q))
    ratio = math.nan if signal == 0 else math.inf if noise == 0 else 10 * math.log10(signal / noise)
    return WeightQuality(path, tuple(w.shape), 8 * q.weight.nbytes / w.size, ratio)


@jax.jit
def _energies(w: Array, q: QuantizedWeight) -> tuple[Array, Array]:
    wide = w.astype(jnp.float32)
    if q.rotation:
        wide = hadamard(wide, q.weight.axes, q.rotation)
    return jnp.sum(wide**2), jnp.sum((wide - q.weight.dequantize(jnp.float32)) ** 2)


def quality_table(rows: Sequence[WeightQuality]) -> Table:
    """The qualities as a table."""
    table = Table(title="signal-to-noise of the quantized weights", title_justify="left")
    table.add_column("path")
    table.add_column("shape")
    table.add_column("bits/value", justify="right")
    table.add_column("SNR (dB)", justify="right")
    for row in rows:
        table.add_row(row.path, "x".join(map(str, row.shape)), f"{row.bits:.2f}", f"{row.signal_to_noise:.2f}")
    return table
