"""Histograms of block amaxes on a logarithmic scale, in exact integers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxfp4.formats import exact
from jaxfp4.tensors import block_amax
from jaxfp4.tensors.mesh import AxisNames, Layout, layout_of, replicated, sum_over_mesh, varying_axes
from jaxfp4.tensors.pacing import paced
from jaxfp4.transform.statistics import Places, Sample

BINS = 512
LOWEST, HIGHEST = -40, 40
"""The bins divide [2^-40, 2^40) evenly in the logarithm, 5/32 of an octave each, as Model-Optimizer's do."""

_STEPS = 32
"""Parts of an octave; a bin has five of them."""

_PARTS = -(-(HIGHEST - LOWEST) * _STEPS // BINS)
_LIMB = 16
_BIAS, _MANTISSA_BITS = 127, 23


def edges() -> np.ndarray:
    """`2 ** (-40 + 5 i / 32)` for i up to 512, the least float32 that is not below it; bin i is `[edge i, edge i+1)`.

    >>> edges()[[0, 256, 512]].tolist() == [2.0**-40, 1.0, 2.0**40]
    True
    """
    steps = np.arange(BINS + 1) * _PARTS
    return (_mantissas()[steps % _STEPS] * np.exp2(LOWEST + steps // _STEPS)).astype(np.float32)


def centres() -> np.ndarray:
    """`2 ** (-40 + 5 (i + 1/2) / 32)`, float32: the value that stands for bin i."""
    return np.exp2(LOWEST + (np.arange(BINS) + 0.5) * _PARTS / _STEPS).astype(np.float32)


@functools.cache
def _mantissas() -> np.ndarray:
    """`2 ** (k / 32)`, each the least float32 that is not below it."""
    wide = np.exp2(np.arange(_STEPS) / _STEPS)
    narrow = wide.astype(np.float32)
    return np.where(narrow < wide, np.nextafter(narrow, np.float32(2)), narrow)


def bins_of(amax: Array) -> Array:
    """The bin of each float32 magnitude, int32. Beyond the ends it is the first or the last bin.

    Zero, NaN and Inf belong to none: their bin is 512. Found by comparing bits, so equal on every backend.
    """
    bits = exact.magnitude_bits(amax)
    exponent = (bits >> _MANTISSA_BITS).astype(jnp.int32) - _BIAS
    fraction = bits & ((1 << _MANTISSA_BITS) - 1)
    part = jnp.zeros(bits.shape, jnp.int32)
    for mantissa in _mantissas()[1:].view(np.uint32).tolist():
        part += (fraction >= (mantissa & ((1 << _MANTISSA_BITS) - 1))).astype(jnp.int32)
    step = jnp.clip((exponent - LOWEST) * _STEPS + part, 0, BINS * _PARTS - 1)
    return jnp.where((bits == 0) | (exponent > _BIAS), BINS, step // _PARTS)


@dataclasses.dataclass(frozen=True)
class LogHistogram:
    """How many blocks of 16 along the contraction have their amax in each of 512 bins; `edges` says which.

    Zero blocks are not counted, nor are blocks with NaN or Inf; `AbsoluteMaximum` beside it shows those. States are
    uint32 and end in `[512, 2]`: a count is `state[.., 0] + 2^16 * state[.., 1]`, the first below 2^16. Sums of
    integers are exact in any order, so equal on every layout. A count may grow to 2^48 blocks, which 2^40 tokens of
    4096 channels have; one activation must hold fewer than 2^32.
    """

    def init(self, stack: Sequence[int]) -> Array:
        """Zeros: nothing seen."""
        return jnp.zeros((*stack, BINS, 2), jnp.uint32)

    def observe(self, sample: Sample) -> Array:
        """The counts of one activation for each entry of its kept dimensions."""
        return _counts(_block_amaxes(sample), len(sample.kept))

    def observe_at(self, state: Array, places: Places, sample: Sample) -> Array:
        """The counts added at stack positions.

        Rows that are kept apart, as tokens routed to experts are, are counted into the stack one by one, because a
        histogram of each row would take too much memory.
        """
        stack = state.shape[: len(places.index)]
        kept = len(sample.kept)
        if math.prod(sample.activation.shape[d] for d in sample.kept) <= math.prod(stack):
            observed = lax.expand_dims(replicated(self.observe(sample)), range(kept, kept + places.shared))
            return carried(state.at[places.index].add(observed, mode="drop"))
        amaxes = replicated(_block_amaxes(sample))
        bins = bins_of(amaxes.reshape(*amaxes.shape[:kept], -1))
        bins = lax.expand_dims(bins, range(kept, kept + places.shared))
        index = [lax.expand_dims(i, [i.ndim]) if i.ndim else i for i in places.index]
        return carried(state.at[(*index, bins, 0)].add(1, mode="drop"))

    def merge(self, left: Array, right: Array) -> Array:
        """The sum."""
        return carried(left + right)

    def merge_over_mesh(self, state: Array, names: AxisNames) -> Array:
        """`lax.psum` of both parts."""
        return carried(sum_over_mesh(state, names))


def merged(state: Array, axes: Sequence[int]) -> Array:
    """The counts of all entries along some leading axes together."""
    return carried(jnp.sum(state, tuple(axes), dtype=jnp.uint32))


def carried(state: Array) -> Array:
    """Both parts after an addition, the first below 2^16 again."""
    low, high = state[..., 0], state[..., 1]
    return jnp.stack([low & ((1 << _LIMB) - 1), high + (low >> _LIMB)], -1)


def _block_amaxes(sample: Sample) -> Array:
    """`[*kept, ...]`: the amax of each block of 16 along the contraction."""
    x = sample.arranged()
    return block_amax(x, tuple(range(x.ndim - len(sample.contracted), x.ndim)))


def _counts(amaxes: Array, kept: int) -> Array:
    """The histogram over all dimensions but the first `kept`."""
    layout = layout_of(amaxes)
    return _local_counts(amaxes, kept) if layout is None else _sharded_counts(amaxes, kept, layout)


def _local_counts(amaxes: Array, kept: int) -> Array:
    bins = bins_of(amaxes).reshape(math.prod(amaxes.shape[:kept]), -1)
    counts = jnp.zeros((bins.shape[0], BINS), jnp.uint32)
    missing = tuple(n for n in varying_axes(bins) if n not in varying_axes(counts))
    counts = lax.pcast(counts, missing, to="varying") if missing else counts
    counts = counts.at[jnp.arange(bins.shape[0])[:, None], bins].add(1, mode="drop")
    return carried(jnp.stack([counts, jnp.zeros_like(counts)], -1)).reshape(*amaxes.shape[:kept], BINS, 2)


@paced
@functools.partial(jax.jit, static_argnums=(1, 2))
def _sharded_counts(amaxes: Array, kept: int, layout: Layout) -> Array:
    split = layout.restricted(range(kept))
    names = tuple(name for name in layout.splitting if name not in split.splitting)

    def local(shard: Array) -> Array:
        return carried(sum_over_mesh(_local_counts(shard, kept), names))

    return jax.shard_map(local, mesh=layout.mesh, in_specs=layout.spec, out_specs=split.spec)(amaxes)
