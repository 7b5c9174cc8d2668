"""Quantizing, simulating and dequantizing blocks in one pass over the memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxfp4.formats import BLOCK_SIZE, exact, fp8, nvfp4
from jaxfp4.kernels.blocks import Geometry, Launch, Part, Tiles, Values, visit
from jaxfp4.kernels.groups import Groups, visit_groups
from jaxfp4.kernels.rounding import EMULATED, PTX, Arithmetic, Coder, Prepared, Scales

MAGNITUDE = 0x7FFFFFFF


@dataclasses.dataclass(frozen=True)
class Context:
    """What a choice of block scales may use."""

    prepared: Prepared
    arithmetic: Arithmetic
    table: Sequence[Array] = ()
    """Numbers for the blocks' channels."""


KernelScales = Callable[[Values, Context], Scales]
"""Chooses the scales of blocks whose values are float32 bits, inside a kernel. Hashable."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What happens to the values of blocks between loading and quantizing them."""

    apply: Callable[[Values], Values]
    """From values in the dtype of the array to those to be quantized, in some float dtype."""
    across: bool
    """Whether it computes across the values of a block."""

    def whole_in_thread(self, launch: Launch) -> bool:
        """Whether a thread is better given whole blocks: if there is one for each."""
        return self.across and launch.blocks >= _THREADS_OF_WARP * launch.warps


AS_THEY_ARE = Preparation(lambda values: values, across=False)
_THREADS_OF_WARP = 32


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Launches by geometry; measured on an H200."""

    minor: Launch
    strided: Launch

    def launch(self, geometry: Geometry) -> Launch:
        """That of a geometry."""
        return self.minor if geometry.is_minor else self.strided


ROUNDING = Tuning(minor=Launch(64, 1), strided=Launch(128, 1))
SIMULATING = Tuning(minor=Launch(128, 4), strided=Launch(64, 1))
DEQUANTIZING = Tuning(minor=Launch(128, 4), strided=Launch(128, 2))


def amax_bits(values: Values) -> Array:
    """The bits of the largest magnitude of each block."""
    return values.map(lambda bits: bits & jnp.uint32(MAGNITUDE)).reduce(jnp.maximum, jnp.max)


def max_scales(values: Values, context: Context) -> Scales:
    """Block scales from block amaxes."""
    return Scales.of_amax(amax_bits(values), context.prepared, context.arithmetic)


def _bits(x: Array) -> Array:
    """The bits of the values as float32."""
    if x.dtype == jnp.bfloat16:  # never as floats: some backend might flush a subnormal
        return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
    return exact.as_bits(exact.to_float32(x))


def block_amax_blocks(
    x: Array, geometry: Geometry, *, prepare: Preparation = AS_THEY_ARE, interpret: bool = False
) -> Array:
    """The largest magnitudes, float32 `[outer, blocks, 1, inner]`, of `x [outer, blocks, 16, inner]`, prepared."""

    def body(inputs: Sequence[Values], _: Sequence[Array]) -> tuple[Tiles]:
        return ((exact.as_float(amax_bits(prepare.apply(inputs[0]).map(_bits))),),)

    launch = SIMULATING.launch(geometry)
    whole = prepare.whole_in_thread(launch)
    parts = (Part(1, jnp.float32),)
    return visit(body, [x], None, geometry, parts, launch, whole_in_thread=whole, interpret=interpret)[0]


def quantize_blocks(
    x: Array,
    global_scale: Array,
    geometry: Geometry,
    choose: KernelScales,
    tuning: Tuning,
    *,
    prepare: Preparation = AS_THEY_ARE,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """`(packed uint8 [outer, blocks, 8, inner], E4M3 codes uint8 [outer, blocks, 1, inner])`.

    Of `x [outer, blocks, 16, inner]`, prepared, under float32 global scales `[outer]`.
    """
    encode = _encoding(choose, prepare, interpret)

    def body(inputs: Sequence[Values], constants: Sequence[Array]) -> tuple[Tiles, Tiles]:
        return encode(inputs[0], constants, ())

    constants, launch = Prepared.of(global_scale).stacked(), tuning.launch(geometry)
    whole = prepare.whole_in_thread(launch)
    packed, scales = visit(body, [x], constants, geometry, _ENCODED, launch, whole_in_thread=whole, interpret=interpret)
    return packed, scales


def quantize_in_groups(
    x: Array,
    global_scale: Array,
    table: Array,
    groups: Groups,
    choose: KernelScales,
    launch: Launch,
    *,
    prepare: Preparation = AS_THEY_ARE,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """As `quantize_blocks`, with `table`, float32 `[lead, groups, D]`, for `choose`; shapes as those of `groups`."""
    encode = _encoding(choose, prepare, interpret)
    constants = Prepared.of(global_scale).stacked()
    packed, scales = visit_groups(encode, x, constants, table, groups, _ENCODED, launch, interpret=interpret)
    return packed, scales


_ENCODED = (Part(BLOCK_SIZE // 2, jnp.uint8), Part(1, jnp.uint8))


def _encoding(
    choose: KernelScales, prepare: Preparation, interpret: bool
) -> Callable[[Values, Sequence[Array], Sequence[Array]], tuple[Tiles, Tiles]]:
    """`(values, global scale as prepared, table) -> (packed, scales)` of blocks."""
    arithmetic = EMULATED if interpret else PTX

    def encode(values: Values, constants: Sequence[Array], table: Sequence[Array]) -> tuple[Tiles, Tiles]:
        prepared, values = Prepared(*constants), prepare.apply(values)
        bits = values.map(_bits)
        scales = choose(bits, Context(prepared, arithmetic, table))
        coder = Coder.of(scales, prepared, arithmetic, values.dtype)
        return bits.map(coder.encode).packed(), (scales.codes,)

    return encode


def fake_quantize_blocks(
    x: Array,
    global_scale: Array,
    geometry: Geometry,
    *,
    prepare: Preparation = AS_THEY_ARE,
    interpret: bool = False,
) -> Array:
    """`x [outer, blocks, 16, inner]`, prepared, quantized under max scales and dequantized, in the dtype of `x`."""
    arithmetic = EMULATED if interpret else PTX

    def body(inputs: Sequence[Values], constants: Sequence[Array]) -> tuple[Values]:
        prepared = Prepared(*constants)
        changed = prepare.apply(inputs[0])
        values = changed.map(_bits)
        scales = max_scales(values, Context(prepared, arithmetic))
        coder = Coder.of(scales, prepared, arithmetic, changed.dtype)
        return (values.map(coder.round_trip),)

    constants, parts = Prepared.of(global_scale).stacked(), (Part(BLOCK_SIZE, x.dtype),)
    launch = SIMULATING.launch(geometry)
    whole = prepare.whole_in_thread(launch)
    return visit(body, [x], constants, geometry, parts, launch, whole_in_thread=whole, interpret=interpret)[0]


def dequantize_blocks(
    packed: Array, scales: Array, global_scale: Array, geometry: Geometry, dtype: np.dtype, *, interpret: bool = False
) -> Array:
    """`[outer, blocks, 16, inner]` of a dtype from what `quantize_blocks` gives."""

    def body(inputs: Sequence[Tiles], constants: Sequence[Array]) -> tuple[Values]:
        codes, (scale,) = inputs
        factor = fp8.decode(scale) * constants[0]
        wide = [tile.astype(jnp.uint32) for tile in codes]
        low, high = ([nvfp4.decode_values(half) * factor for half in halves] for halves in _nibbles(wide))
        return (Values(tuple(low), tuple(high)),)

    parts = (Part(BLOCK_SIZE, dtype),)
    launch = DEQUANTIZING.launch(geometry)
    return visit(body, [packed, scales], global_scale[:, None], geometry, parts, launch, interpret=interpret)[0]


def _nibbles(wide: Sequence[Array]) -> tuple[list[Array], list[Array]]:
    return [tile & 15 for tile in wide], [tile >> 4 for tile in wide]
