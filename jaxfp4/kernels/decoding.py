"""Packed codes to pairs of bfloat16 in one 32-bit word, as the registers of a tensor-core operand hold them.

Inline assembly does what Triton would do byte by byte. Each text is elementwise over `uint8` arguments, four at a time:
`$0` to `$3` are the results. Words are int32 arrays, as Pallas gives Triton no unsigned results of inline assembly.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton

from jaxfp4.formats import fp8, nvfp4

PRODUCT_FACTOR = 2.0**-7
"""Decoded values are E2M1 times scale times this."""

JOIN = "\n".join(
    f"prmt.b32 ${i}, $4, $5, {selected};" for i, selected in enumerate(("0x5410", "0x6521", "0x7632", "0x0703"))
)
"""Words with a byte of the first argument in bits 7 to 0, of the second in 23 to 16, and anything in the others."""

# Exponent and mantissa at bits 10 to 4 are the scale times 2^-120. Two powers of two make that the scale times 2^119.
# With another factor the code of NaN alone, 480 so far, overflows, and Inf times zero is the NaN to add.
_TIMES = (
    "mul.bf16x2 p, p, most; mul.bf16x2 o, p, over; mul.bf16x2 p, p, rest; fma.rn.bf16x2 p, o, zero, p;"
    "mov.b32 {low, high}, p;"
)
SCALES = (
    "{.reg .b32 p, s, o, most, over, rest, zero; .reg .b16 low, high; mov.b32 zero, 0;"
    "mov.b32 most, 0x7F007F00; mov.b32 over, 0x77907790; mov.b32 rest, 0x77807780;"
    "shl.b32 p, $4, 4; and.b32 p, p, 0x07F007F0; shl.b32 s, $4, 8; and.b32 s, s, 0x80008000; or.b32 p, p, s;"
    f"{_TIMES} mov.b32 $0, {{low, low}}; mov.b32 $2, {{high, high}};"
    "shr.u32 p, $4, 4; and.b32 p, p, 0x07F007F0; and.b32 s, $4, 0x80008000; or.b32 p, p, s;"
    f"{_TIMES} mov.b32 $1, {{low, low}}; mov.b32 $3, {{high, high}};}}"
)
"""Two bfloat16 in a word, both the E4M3 scale times 2^119; NaN for the code of NaN."""

LOW = 0x000F000F, 0x1040
HIGH = 0x00F000F0, 0x0104
"""Bits of two codes and the factor that moves them, without carries, to where `CODES` are."""

CODES = 0x81C081C0
"""The bits of two bfloat16 in which E2M1 codes are 2^-126 times their values, subnormals included."""


def decode_pairs(first: Array, second: Array, scales: Array) -> tuple[Array, Array]:
    """bfloat16 `e2m1 * scale * 2^-7`, exactly, of the low and of the high nibbles, in a Triton kernel.

    All are uint8 of one shape: packed codes, the same scale for both of them. The results have another axis, last, of
    size 2: the first and the second.
    """
    words = _words(JOIN, [first, second], "=&r,=&r,=&r,=&r,r,r")
    factors = _words(SCALES, [scales], "=&r,=&r,=&r,=&r,r")

    def values(mask: int, factor: int) -> Array:
        codes = ((words & jnp.int32(mask)) * jnp.int32(factor)) & jnp.int32(CODES - (1 << 32))
        product = _words("mul.bf16x2 $0, $1, $2;", [codes, factors], "=r,r,r", pack=1)
        halves = product, lax.shift_right_logical(product, jnp.full_like(product, 16))
        low, high = (lax.bitcast_convert_type(h.astype(jnp.uint16), jnp.bfloat16) for h in halves)
        return jnp.stack([low, high], -1)

    return values(*LOW), values(*HIGH)


def decode_pairs_plainly(first: Array, second: Array, scales: Array) -> tuple[Array, Array]:
    """The same without inline assembly, for which there is no interpreter."""
    factors = fp8.decode(scales).astype(jnp.float32) * PRODUCT_FACTOR

    def values(shift: int) -> Array:
        both = [nvfp4.decode_values((c >> shift) & 0xF).astype(jnp.float32) * factors for c in (first, second)]
        return jnp.stack(both, -1).astype(jnp.bfloat16)

    return values(0), values(4)


def _words(text: str, arguments: Sequence[Array], constraints: str, pack: int = 4) -> Array:
    result = jax.ShapeDtypeStruct(arguments[0].shape, jnp.int32)
    (words,) = triton.elementwise_inline_asm(
        text, args=arguments, constraints=constraints, pack=pack, result_shape_dtypes=[result]
    )
    return words
