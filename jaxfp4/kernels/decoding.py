"""Four codes at a time to bfloat16, as inline assembly: what Triton makes of the same on single bytes is far longer.

Each text takes one register of four bytes, `$2`, and gives two registers of two bfloat16, `$0` and `$1`.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton


def decode_words(text: str, arguments: Sequence[Array]) -> Array:
    """bfloat16 values of uint8 codes, by `LOW`, `HIGH` or `SCALES`, in a kernel.

    For the first two the arguments are the packed codes and, of the same shape, bfloat16 factors.
    """
    constraints = ",".join(["=r", "=r", *["r", "r,r"][: len(arguments)]])
    result = jax.ShapeDtypeStruct(arguments[0].shape, jnp.bfloat16)
    (values,) = triton.elementwise_inline_asm(
        text, args=arguments, constraints=constraints, pack=4, result_shape_dtypes=[result]
    )
    return values


def _assembly(pair: str, before: str = "") -> str:
    """PTX in which `pair` makes two bfloat16 of `p`: two of the bytes, each twice in its half."""
    lines = [".reg .b32 p, a, b;", before]
    for result, factor, selected in (("$0", "$3", "0x1100"), ("$1", "$4", "0x3322")):
        lines.append(f"prmt.b32 p, $2, 0, {selected};")
        lines.append(pair.replace("RESULT", result).replace("FACTOR", factor))
    return "{" + "\n".join(lines) + "}"


LOW = _assembly(
    # Without carries, times 2^6 + 2^12 moves the code to where its value is and to where its sign is.
    "and.b32 a, p, 0x000F000F; mul.lo.u32 a, a, 0x1040; and.b32 a, a, 0x81C081C0; mul.bf16x2 RESULT, a, FACTOR;"
)
"""The E2M1 value of the low nibble, times 2^-126, times the factor."""

HIGH = _assembly(
    "shl.b32 a, p, 2; and.b32 a, a, 0x01C001C0; and.b32 b, p, 0x80008000; or.b32 a, a, b; mul.bf16x2 RESULT, a, FACTOR;"
)
"""The same of the high nibble."""

SCALES = _assembly(
    # Exponent and mantissa at bits 10 to 4 are the scale times 2^-120. The code of NaN is 480 so far, all ones then.
    "shl.b32 a, p, 4; and.b32 a, a, 0x07F007F0; mul.bf16x2 a, a, up; set.gt.u32.bf16x2 b, a, most;"
    "and.b32 p, p, 0x80008000; or.b32 a, a, b; or.b32 RESULT, a, p;",
    before=".reg .b32 up, most; mov.b32 up, 0x7B807B80; mov.b32 most, 0x43E043E0;",
)
"""The value of an E4M3 code; NaN for that of NaN."""
