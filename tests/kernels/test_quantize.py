"""Kernels against plain JAX: interpreted on the CPU, and compiled with `pytest -m gpu`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas

from jaxfp4.formats import exact
from jaxfp4.formats.thresholds import code_thresholds
from jaxfp4.kernels.blocks import Geometry, Launch
from jaxfp4.kernels.calls import call
from jaxfp4.kernels.quantize import (
    Tuning,
    block_amax_blocks,
    dequantize_blocks,
    fake_quantize_blocks,
    max_scales,
    quantize_blocks,
)
from jaxfp4.kernels.rounding import EMULATED, PTX, Coder, Prepared, Scales
from jaxfp4.tensors.quantize import fake_quantize_with_scale, quantize_unchecked

from .arrays import DTYPES, KINDS, hostile

SMALL = Tuning(minor=Launch(8, 1), strided=Launch(16, 1))
"""So small that arrays of a test take several programs, the last of them ragged."""

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
each_axis = pytest.mark.parametrize("axis", [0, 1])


def geometry_of(shape, axis):
    return Geometry(1, shape[0] * shape[1] // 16, 1) if axis == 1 else Geometry(1, shape[0] // 16, shape[1])


@functools.partial(jax.jit, static_argnames=("axis", "interpret"))
def kernel(x, axis, global_scale, *, interpret):
    """Packed codes, block scales, simulated and dequantized values, as `quantize` and `dequantize` shape them."""
    geometry = geometry_of(x.shape, axis)
    blocks = x.reshape(1, geometry.blocks, 16, geometry.inner)
    scale = jnp.reshape(global_scale, 1)
    packed, scales = quantize_blocks(blocks, scale, geometry, max_scales, SMALL, interpret=interpret)
    simulated = fake_quantize_blocks(blocks, scale, geometry, interpret=interpret)
    values = dequantize_blocks(packed, scales, scale, geometry, x.dtype, interpret=interpret)
    half, blocked = list(x.shape), list(x.shape)
    half[axis] //= 2
    blocked[axis] //= 16
    return packed.reshape(half), scales.reshape(blocked), simulated.reshape(x.shape), values.reshape(x.shape)


def check_against_plain(x, axis, run):
    """`run(x, axis, global_scale)` gives the bytes of plain JAX on the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        x = jnp.asarray(x)
        wanted = quantize_unchecked(x, axis)
        simulated = fake_quantize_with_scale(x, axis, wanted.global_scale)
        values = wanted.dequantize()
    packed, scales, found_simulated, found_values = run(x, axis, wanted.global_scale)
    np.testing.assert_array_equal(np.asarray(packed), np.asarray(wanted.packed))
    np.testing.assert_array_equal(np.asarray(scales), np.asarray(wanted.scales).view(np.uint8))
    for found, expected in ((found_simulated, simulated), (found_values, values)):
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), np.asarray(expected).view(np.uint8))


@pytest.mark.parametrize("axis, dtype", [(1, jnp.bfloat16), (1, jnp.float16), (0, jnp.float32)])
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_kernels_give_the_bytes_of_plain_jax(kind, dtype, axis):
    x = hostile(kind, (32, 80), dtype)
    check_against_plain(x, axis, functools.partial(kernel, interpret=True))


@pytest.mark.parametrize("axis, dtype", [(1, jnp.bfloat16), (0, jnp.float32)])
def test_block_amaxes_are_exact(dtype, axis):
    x = hostile("spread", (32, 80), dtype)
    geometry = geometry_of(x.shape, axis)
    blocks = jnp.asarray(x).reshape(1, geometry.blocks, 16, geometry.inner)
    found = block_amax_blocks(blocks, geometry, interpret=True)
    wanted = np.max(np.abs(np.asarray(x, np.float32)).reshape(1, geometry.blocks, 16, geometry.inner), 2, keepdims=True)
    np.testing.assert_array_equal(np.asarray(found), wanted)


@pytest.mark.parametrize("axis, dtype", [(1, jnp.bfloat16), (0, jnp.float32)])
def test_global_scales_smaller_than_the_values_saturate(axis, dtype):
    x = hostile("heavy", (32, 80), dtype)
    with_inf = quantize_unchecked(jnp.asarray(x), axis, global_amax=1e-25)
    packed, scales, *_ = kernel(jnp.asarray(x), axis, with_inf.global_scale, interpret=True)
    np.testing.assert_array_equal(np.asarray(packed), np.asarray(with_inf.packed))
    np.testing.assert_array_equal(np.asarray(scales), np.asarray(with_inf.scales).view(np.uint8))


@pytest.mark.parametrize("axis, dtype", [(1, jnp.bfloat16), (1, jnp.float16), (0, jnp.float32)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_blocks_that_are_not_finite_become_nan_and_no_others(value, dtype, axis):
    x = jnp.asarray(hostile("normal", (32, 80), dtype)).at[3, 5].set(value)
    _, scales, simulated, values = kernel(x, axis, jnp.float32(0.01), interpret=True)
    hit = np.zeros((32, 80), bool)
    hit[3, :16] = axis == 1
    hit[:16, 5] |= axis == 0
    np.testing.assert_array_equal(np.isnan(np.asarray(values, np.float32)), hit)
    np.testing.assert_array_equal(np.isnan(np.asarray(simulated, np.float32)), hit)
    assert np.sum(np.asarray(scales) == 0x7F) == 1


def test_a_global_scale_that_is_nan_makes_everything_nan():
    x = jnp.asarray(hostile("normal", (32, 80), jnp.float32))
    _, scales, simulated, values = kernel(x, 0, jnp.float32(np.nan), interpret=True)
    assert np.all(np.isnan(np.asarray(values))) and np.all(np.isnan(np.asarray(simulated)))
    assert np.all(np.asarray(scales) == 0x7F)


def test_parts_have_their_own_global_scales_under_vmap_and_without():
    x = jnp.asarray(hostile("normal", (3 * 32, 24), jnp.bfloat16)).reshape(3, 48, 16, 1)
    scales = jnp.asarray([0.01, 0.5, 3.0], jnp.float32)
    together = quantize_blocks(x, scales, Geometry(3, 48, 1), max_scales, SMALL, interpret=True)
    one = functools.partial(
        quantize_blocks, geometry=Geometry(1, 48, 1), choose=max_scales, tuning=SMALL, interpret=True
    )
    mapped = jax.vmap(lambda w, s: one(w[None], s[None]))(x, scales)
    for i in range(3):
        apart = one(x[i][None], scales[i][None])
        for whole, some, single in zip(together, mapped, apart, strict=True):
            np.testing.assert_array_equal(whole[i], single[0])
            np.testing.assert_array_equal(some[i], single)


@each_axis
@each_dtype
@pytest.mark.skipif(not jax.__version__.startswith("0.10"), reason="newer versions lower kernels only beside a GPU")
def test_kernels_lower_for_cuda_without_a_gpu(dtype, axis):
    def run(x, scale):
        return kernel(x, axis, scale, interpret=False)

    arguments = jax.ShapeDtypeStruct((64, 96), dtype), jax.ShapeDtypeStruct((), jnp.float32)
    text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3


@pytest.mark.gpu
@each_axis
@each_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_kernels_give_the_bytes_of_the_cpu(kind, dtype, axis):
    def run(x, axis, scale):
        device = jax.devices()[0]
        assert device.platform == "gpu"
        return kernel(jax.device_put(x, device), axis, jax.device_put(scale, device), interpret=False)

    check_against_plain(hostile(kind, (512, 768), dtype), axis, run)


MANTISSAS = 1 << 23
AT_A_TIME = 1 << 18


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_every_mantissa_of_the_divisor_divides_exactly(dtype):
    """For each the two values that are nearest to each border between codes, against the exact thresholds."""
    run = jax.jit(functools.partial(count_wrong_codes, dtype=dtype, encode=encode_emulated))
    assert sum(int(run(np.uint32(start))) for start in range(0, MANTISSAS, AT_A_TIME)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_every_mantissa_of_the_divisor_divides_exactly_on_the_gpu(dtype):
    run = jax.jit(functools.partial(count_wrong_codes, dtype=dtype, encode=encode_in_kernel))
    device = jax.devices()[0]
    starts = [jax.device_put(np.uint32(start), device) for start in range(0, MANTISSAS, AT_A_TIME)]
    assert sum(int(wrong) for wrong in map(run, starts)) == 0


def count_wrong_codes(start, dtype, encode):
    """Of the divisors in [1, 2) whose mantissas begin with `start`."""
    divisor = exact.as_float((start + jnp.arange(AT_A_TIME, dtype=jnp.uint32)) | jnp.uint32(127 << 23))
    reached = code_thresholds(divisor).reached
    step = 1 << (23 - jnp.finfo(dtype).nmant)
    wrong = jnp.int32(0)
    for border in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0):
        below = exact.as_bits(divisor * border) & jnp.uint32((1 << 32) - step)
        for bits in (below, below + jnp.uint32(step)):
            wanted = sum((bits >= least).astype(jnp.uint32) for least in reached)
            wrong += jnp.sum(encode(bits, divisor, dtype) != wanted)
    return wrong


def codes_under(bits, divisor, dtype, arithmetic):
    """The codes of values each under its own global scale and block scale 1."""
    scales = Scales(jnp.full(bits.shape, 0x38, jnp.uint32), jnp.ones(bits.shape, jnp.float32))
    return Coder.of(scales, Prepared.of(divisor), arithmetic, dtype).encode(bits) & 15


def encode_emulated(bits, divisor, dtype):
    return codes_under(bits, divisor, dtype, EMULATED)


def encode_in_kernel(bits, divisor, dtype):
    def body(bits_ref, divisor_ref, out_ref):
        out_ref[...] = codes_under(bits_ref[...], divisor_ref[...], dtype, PTX)

    spec = pallas.BlockSpec((1024,), lambda i: (i,))
    run = call(
        body,
        warps=4,
        interpret=False,
        grid=(bits.size // 1024,),
        in_specs=[spec, spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(bits.shape, jnp.uint32),
    )
    return run(bits, divisor)


def test_emulated_residuals_are_exact():
    rng = np.random.default_rng(0)
    x, d = (rng.uniform(1, 2, 10_000).astype(np.float32) for _ in range(2))
    q = (x / d).astype(np.float32)
    found = np.asarray(EMULATED.residual(jnp.asarray(x), jnp.asarray(q), jnp.asarray(d)), np.float64)
    np.testing.assert_array_equal(found, x.astype(np.float64) - q.astype(np.float64) * d.astype(np.float64))
