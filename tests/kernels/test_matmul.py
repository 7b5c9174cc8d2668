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

SMALL = Tiles(columns=32, programs=6)
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
    found = multiply(operands, out_dtype=None, tiles=Tiles(32, programs))
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


def bfloat16_pair(bits, function, *others):
    """A function of float32 on both bfloat16 in words, rounded to bfloat16."""
    halves = [w.astype("<u4").view("<u2").view(ml_dtypes.bfloat16).astype(np.float32) for w in (bits, *others)]
    return function(*halves)


def run_ptx(text, registers):
    """What the few instructions that the decoding uses do to numpy words."""
    registers = dict(registers)

    def value(name):
        return registers[name] if name in registers else np.uint32(int(name, 16) if "x" in name else int(name))

    def greater(a, b):
        return np.where(a > b, 0xFFFF, 0).astype("<u2").view("<u4")

    def product(a, b):
        return (a * b).astype(ml_dtypes.bfloat16).view("<u2").view("<u4")

    simple = {
        "mov.b32": lambda a: a + np.zeros_like(registers["$2"]),
        "and.b32": np.bitwise_and,
        "or.b32": np.bitwise_or,
        "shl.b32": np.left_shift,
        "mul.lo.u32": lambda a, b: a * b,
        "mul.bf16x2": lambda a, b: bfloat16_pair(a, product, b),
        "set.gt.u32.bf16x2": lambda a, b: bfloat16_pair(a, greater, b),
    }
    for line in text.strip("{}").replace("\n", " ").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = (s.strip() for s in rest.split(","))
        if name == "prmt.b32":
            source, selector = registers[sources[0]], int(sources[2], 16)
            picked = [(source >> (8 * (selector >> 4 * i & 0xF))) & 0xFF for i in range(4)]
            registers[target] = sum((p << (8 * i) for i, p in enumerate(picked)), np.zeros_like(source))
        else:
            registers[target] = simple[name](*(value(s) for s in sources)).astype(np.uint32)
    return np.stack([registers["$0"], registers["$1"]], 1).view("<u2").view(ml_dtypes.bfloat16).reshape(-1)


BYTES = np.arange(256, dtype=np.uint8)


def test_assembly_of_scales():
    found = run_ptx(decoding.SCALES, {"$2": BYTES.view("<u4")}).astype(np.float64)
    np.testing.assert_array_equal(found, E4M3.values)


@pytest.mark.parametrize("text", ["LOW", "HIGH"])
def test_assembly_of_codes(text):
    """Exactly, for every byte and every scale."""
    nibbles = BYTES & 0xF if text == "LOW" else BYTES >> 4
    for scale in E4M3.values[:NAN]:
        factor = np.full((64, 4), scale * 2.0**119).astype(ml_dtypes.bfloat16).view("<u4")
        registers = {"$2": BYTES.view("<u4"), "$3": factor[:, 0].copy(), "$4": factor[:, 1].copy()}
        found = run_ptx(getattr(decoding, text), registers).astype(np.float64)
        np.testing.assert_array_equal(found, E2M1.values[nibbles] * scale * 2.0**-7)


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
    tiles = Tiles(columns=64, depth=64, warps=warps, stages=2, programs=64)
    run = jax.jit(functools.partial(packed_matmul, contraction_last=last, out_dtype=jnp.float32, tiles=tiles))
    assert np.all(np.abs(np.asarray(run(*operands)) - wanted) <= bound)


@pytest.mark.gpu
def test_nan_scale_on_the_gpu():
    (x, packed, scales, global_scale), _, _ = draw(3, 256, 256)
    found = np.asarray(jax.jit(packed_matmul)(x, packed, scales.at[2, 7].set(NAN), global_scale))
    assert np.isnan(found[:, 7]).all()
    assert np.isnan(found).sum() == 3
