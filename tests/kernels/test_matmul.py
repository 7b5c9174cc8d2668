"""The packed matmul against float64 products of decoded weights; on a CPU in Pallas' interpreter."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxfp4.formats import E2M1, E4M3
from jaxfp4.kernels import decoding
from jaxfp4.kernels.matmul import TILES, Tiles, packed_matmul

# From 0.12 on JAX warns that its Triton backend is going to be removed.

SMALL = Tiles(columns=32, programs=6, warps=1)
NAN = 0x7F


def draw(rows, length, columns, *, dtype=ml_dtypes.bfloat16, last=False, experts=(), seed=0):
    """Operands, and the product of what they stand for in float64 with the bound of its error."""
    random = np.random.default_rng(seed)
    pairs = random.integers(0, 256, (*experts, length // 2, columns), np.uint8)
    scales = random.integers(0, NAN, (*experts, length // 16, columns)).astype(np.uint8)
    scales[..., 0, :3] = 0
    global_scale = random.uniform(1e-3, 1e-2, experts).astype(np.float32)
    x = random.normal(size=(*experts, rows, length)).astype(dtype)

    codes = np.stack([pairs & 0xF, pairs >> 4], -2).reshape(*experts, length, columns)
    block_scales = E4M3.values[scales].astype(np.float32) * global_scale[..., None, None]
    w = E2M1.values[codes] * np.repeat(block_scales.astype(np.float64), 16, -2)
    wide = x.astype(np.float64)
    bound = (length + 8) * 2.0**-22 * (np.abs(wide) @ np.abs(w))
    if last:
        pairs, scales = (np.swapaxes(a, -1, -2) for a in (pairs, scales))
    return [jnp.asarray(a) for a in (x, pairs, scales, global_scale)], wide @ w, bound


@functools.partial(jax.jit, static_argnames=("contraction_last", "out_dtype", "tiles"))
def multiply(operands, contraction_last=False, out_dtype=jnp.float32, tiles=SMALL):
    return packed_matmul(*operands, contraction_last=contraction_last, out_dtype=out_dtype, tiles=tiles, interpret=True)


@pytest.mark.parametrize(
    ("rows", "length", "columns", "dtype", "last"),
    [(3, 176, 45, np.float32, False), (3, 176, 45, np.float32, True), (17, 128, 32, np.float16, False)],
)
def test_error_is_within_its_bound(rows, length, columns, dtype, last):
    """Odd sizes too, in float32: bfloat16 parts of float32 rows lose nothing."""
    operands, wanted, bound = draw(rows, length, columns, dtype=dtype, last=last)
    found = multiply(operands, contraction_last=last)
    assert np.all(np.abs(found - wanted) <= bound)


@pytest.mark.parametrize("last", [False, True])
def test_experts(last):
    """In bfloat16, with columns beyond the last tile."""
    operands, wanted, bound = draw(3, 64, 40, last=last, experts=(3,))
    found = multiply(operands, contraction_last=last)
    assert np.all(np.abs(found - wanted) <= bound)


@pytest.mark.parametrize("programs", [1, 4])
def test_result_is_cast_once(programs):
    """From the float32 sum, which has no error here, whether one program or several make it."""
    (_, packed, _, _), _, _ = draw(2, 128, 32)
    x = np.random.default_rng(1).integers(-8, 9, (2, 128)).astype(ml_dtypes.bfloat16)
    codes = np.stack([packed & 0xF, packed >> 4], 1).reshape(128, 32)
    wanted = x.astype(np.float64) @ E2M1.values[codes]
    assert np.any(wanted.astype(ml_dtypes.bfloat16) != wanted)
    operands = jnp.asarray(x), packed, jnp.full((8, 32), 0x38, jnp.uint8), jnp.float32(1)
    found = multiply(operands, out_dtype=None, tiles=Tiles(32, programs, warps=1))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, wanted.astype(ml_dtypes.bfloat16))


def test_nan_scale_reaches_its_column_and_nan_row_its_row():
    (x, packed, scales, global_scale), _, _ = draw(3, 64, 40)
    operands = x.at[1, 5].set(jnp.nan), packed, scales.at[2, 7].set(NAN), global_scale
    found = multiply(operands)
    wanted = np.zeros((3, 40), bool)
    wanted[1], wanted[:, 7] = True, True
    np.testing.assert_array_equal(np.isnan(found), wanted)
    assert np.isnan(multiply((*operands[:3], jnp.full_like(global_scale, jnp.nan)))).all()


def test_errors():
    (x, packed, scales, global_scale), _, _ = draw(2, 64, 32)
    with pytest.raises(ValueError, match=r"packed, scales and global_scale of shapes .* for x of shape \(1, 2, 48\): "):
        packed_matmul(x[:, :48], packed, scales, global_scale)
    with pytest.raises(ValueError, match="packed is uint8, scales float8_e4m3fn: wanted uint8"):
        packed_matmul(x, packed, scales.view(jnp.float8_e4m3fn), global_scale)
    with pytest.raises(ValueError, match="x is int32: wanted bfloat16, float16 or float32; cast it"):
        packed_matmul(x.astype(jnp.int32), packed, scales, global_scale)
    with pytest.raises(ValueError, match="x has 65 rows: wanted at most 64"):
        packed_matmul(jnp.zeros((65, 64)), packed, scales, global_scale)


# The inline assembly, which the interpreter does not run.


def as_bfloat16(words):
    return words.astype("<u4").view("<u2").view(ml_dtypes.bfloat16)


def on_pairs(function):
    """A function of float32 on both bfloat16 in words, rounded to bfloat16."""

    def words(*operands):
        with np.errstate(over="ignore", invalid="ignore"):  # how NaN is made
            result = function(*(as_bfloat16(w).astype(np.float32) for w in operands))
        return result.astype(ml_dtypes.bfloat16).view("<u2").view("<u4")

    return words


def picked_bytes(first, second, selectors):
    pair = first.astype(np.uint64) | (second.astype(np.uint64) << np.uint64(32))
    picked = [(pair >> np.uint64(8 * (int(selectors) >> 4 * i & 7))) & np.uint64(0xFF) for i in range(4)]
    return sum(p << np.uint64(8 * i) for i, p in enumerate(picked)).astype(np.uint32)


PTX = {
    "mov.b32": lambda a: a,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "prmt.b32": picked_bytes,
    "mul.bf16x2": on_pairs(np.multiply),
    "fma.rn.bf16x2": on_pairs(lambda a, b, c: a * b + c),
}
"""What the few instructions that the decoding uses do to numpy words."""


def run_ptx(text, registers):
    """The four results, as an axis of size 4."""
    registers = dict(registers)

    def value(name):
        if name in registers:
            return registers[name]
        return np.full_like(registers["$4"], int(name, 16) if "x" in name else int(name))

    for line in text.replace("\n", " ").removeprefix("{").removesuffix("}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        if rest.startswith("{low, high}"):
            word = value(rest.rpartition(" ")[2])
            registers["low"], registers["high"] = word & 0xFFFF, word >> 16
        elif "{" in rest:
            target, half = rest[: rest.index(",")], rest[rest.index("{") + 1 :].split(",")[0]
            registers[target] = registers[half] * np.uint32(0x10001)
        else:
            target, *sources = (s.strip() for s in rest.split(","))
            operands = [value(s) for s in sources]
            if name == "prmt.b32":
                operands[2] = int(sources[2], 16)
            registers[target] = PTX[name](*operands).astype(np.uint32)
    return np.stack([registers[f"${i}"] for i in range(4)], -1)


BYTES = np.arange(256, dtype=np.uint8)


def test_assembly_of_scales():
    found = as_bfloat16(run_ptx(decoding.SCALES, {"$4": BYTES.view("<u4")})).reshape(256, 2).astype(np.float64)
    np.testing.assert_array_equal(found, np.stack([E4M3.values * 2.0**119] * 2, -1))


def test_assembly_of_joined_bytes():
    first, second = BYTES, np.roll(BYTES, 7)
    words = run_ptx(decoding.JOIN, {"$4": first.view("<u4"), "$5": second.view("<u4")}).reshape(256)
    np.testing.assert_array_equal(words & 0xFF00FF, first | (second.astype(np.uint32) << 16))


@pytest.mark.parametrize("name", ["LOW", "HIGH"])
def test_codes_times_scales(name):
    """Exactly, for every pair of bytes, what lies between them, and every scale."""
    first, second = np.arange(256, dtype=np.uint32), np.roll(np.arange(256, dtype=np.uint32), 77)
    mask, factor = getattr(decoding, name)
    words = first | second << 16 | np.uint32(0xA500_5A00)
    codes = (words & np.uint32(mask)) * np.uint32(factor) & np.uint32(decoding.CODES)
    nibbles = np.stack([first, second], -1) >> (0 if name == "LOW" else 4) & 0xF
    values = as_bfloat16(codes).reshape(256, 2).astype(np.float64)
    np.testing.assert_array_equal(values, E2M1.values[nibbles] * 2.0**-126)
    for scale in E4M3.values[:NAN]:
        product = E2M1.values[nibbles] * scale * decoding.PRODUCT_FACTOR
        np.testing.assert_array_equal(product.astype(ml_dtypes.bfloat16).astype(np.float64), product)


# On a GPU, or for one.


def for_an_abstract_h200():
    """A context in which Triton kernels are lowered for a GPU that is not there; before 0.11 that needs none."""
    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
    axes = (jax.sharding.AxisType.Auto,)
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), axis_types=axes, abstract_device=device)
    )


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("rows", sorted(TILES))
def test_defaults_lower_for_cuda(rows, last):
    packed, scales = (
        jax.ShapeDtypeStruct((2048, k) if last else (k, 2048), jnp.uint8) for k in (1024 // 2, 1024 // 16)
    )
    operands = jax.ShapeDtypeStruct((rows, 1024), jnp.bfloat16), packed, scales, jax.ShapeDtypeStruct((), jnp.float32)
    function = jax.jit(functools.partial(packed_matmul, contraction_last=last))
    with for_an_abstract_h200():
        text = function.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert "triton" in text


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("rows", [1, 5, 16, 17, 64])
def test_on_the_gpu(rows, dtype, last):
    """With the default tiles, of sizes that they divide and do not; equal in every run."""
    for length, columns, experts in ((2048, 1024, ()), (1040, 1000, ()), (512, 384, (3,))):
        operands, wanted, bound = draw(rows, length, columns, dtype=dtype, last=last, experts=experts)
        run = jax.jit(functools.partial(packed_matmul, contraction_last=last, out_dtype=jnp.float32))
        found = np.asarray(run(*operands))
        assert np.all(np.abs(found - wanted) <= bound)
        np.testing.assert_array_equal(run(*operands), found)


@pytest.mark.gpu
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("warps", [1, 2, 4])
def test_warps_on_the_gpu(warps, last):
    operands, wanted, bound = draw(3, 1024, 512, last=last)
    tiles = Tiles(columns=128, programs=64, warps=warps)
    run = jax.jit(functools.partial(packed_matmul, contraction_last=last, out_dtype=jnp.float32, tiles=tiles))
    assert np.all(np.abs(np.asarray(run(*operands)) - wanted) <= bound)


@pytest.mark.gpu
def test_nan_scale_on_the_gpu():
    (x, packed, scales, global_scale), _, _ = draw(3, 256, 256)
    found = np.asarray(jax.jit(packed_matmul)(x, packed, scales.at[2, 7].set(NAN), global_scale))
    assert np.isnan(found[:, 7]).all()
    assert np.isnan(found).sum() == 3
