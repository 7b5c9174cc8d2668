"""Kernels that rotate blocks before anything else, against plain JAX: interpreted on the CPU, compiled on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.algorithms.encoders import encoder_for
from jaxfp4.kernels import search
from jaxfp4.kernels.blocks import Geometry, Launch
from jaxfp4.kernels.quantize import Tuning, block_amax_blocks, fake_quantize_blocks, max_scales, quantize_blocks
from jaxfp4.kernels.rotation import rotation
from jaxfp4.recipes import Method, Mse, WeightedMse
from jaxfp4.tensors import accelerated, block_amax, quantize_unchecked
from jaxfp4.tensors.blocks import Blocking
from jaxfp4.tensors.hadamard import hadamard
from jaxfp4.tensors.quantize import fake_quantize_with_scale
from jaxfp4.tensors.reductions import rotated_amax

from .arrays import DTYPES, KINDS, hostile

SHAPE = (48, 80)
WHOLE = Tuning(minor=Launch(64, 1), strided=Launch(32, 1))
"""Minor blocks come in tiles of 16 bytes; the last program is ragged in both directions."""
SHARED = Tuning(minor=Launch(16, 1), strided=Launch(128, 1))
"""Minor blocks come in one tile, so that two threads or more have one."""

each_axis = pytest.mark.parametrize("axis", [0, 1])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)


@functools.partial(jax.jit, static_argnames=("axis", "tuning", "interpret"))
def kernel(x, axis, global_scale, *, tuning=WHOLE, interpret):
    """Packed codes, block scales, simulated values and block amaxes of rotated blocks, as plain JAX shapes them."""
    geometry = Geometry(1, x.size // 16, 1) if axis == 1 else Geometry(1, x.shape[0] // 16, x.shape[1])
    blocks = x.reshape(1, geometry.blocks, 16, geometry.inner)
    scale = jnp.reshape(global_scale, 1)
    wide, same = rotation(np.dtype(np.float32)), rotation(x.dtype)
    packed, scales = quantize_blocks(blocks, scale, geometry, max_scales, tuning, prepare=wide, interpret=interpret)
    simulated = fake_quantize_blocks(blocks, scale, geometry, prepare=same, interpret=interpret)
    amaxes = block_amax_blocks(blocks, geometry, prepare=wide, interpret=interpret)
    half, blocked = list(x.shape), list(x.shape)
    half[axis] //= 2
    blocked[axis] //= 16
    return packed.reshape(half), scales.reshape(blocked), simulated.reshape(x.shape), amaxes.reshape(blocked)


def check_against_plain(x, axis, run, device=None):
    """`run(x, axis, global_scale)` gives the bytes of plain JAX on a device, by default the CPU."""
    with jax.default_device(device or jax.devices("cpu")[0]):
        x = jnp.asarray(x)
        rotated = hadamard(x.astype(jnp.float32), axis)
        wanted = quantize_unchecked(rotated, axis)
        simulated = fake_quantize_with_scale(hadamard(x, axis), axis, wanted.global_scale)
        amaxes = block_amax(rotated, axis)
    packed, scales, found_simulated, found_amaxes = run(x, axis, wanted.global_scale)
    np.testing.assert_array_equal(np.asarray(packed), np.asarray(wanted.packed))
    np.testing.assert_array_equal(np.asarray(scales), np.asarray(wanted.scales).view(np.uint8))
    np.testing.assert_array_equal(np.asarray(found_amaxes), np.asarray(amaxes))
    # As float32, in which zeros have signs that count and NaN, of float16 beyond its range, has no bits that do.
    found, wanted = (np.asarray(v).astype(np.float32) for v in (found_simulated, simulated))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.signbit(found)[~np.isnan(found)], np.signbit(wanted)[~np.isnan(wanted)])


@pytest.mark.parametrize("axis, dtype", [(1, jnp.float16), (0, jnp.bfloat16)])
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_kernels_give_the_bytes_of_plain_jax(kind, dtype, axis):
    check_against_plain(hostile(kind, SHAPE, dtype), axis, functools.partial(kernel, interpret=True))


def test_blocks_that_threads_share_are_the_same():
    x = hostile("heavy", SHAPE, jnp.float32)
    check_against_plain(x, 1, functools.partial(kernel, tuning=SHARED, interpret=True))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_spoils_its_block_and_no_other(value):
    x = jnp.asarray(hostile("normal", SHAPE, jnp.float16)).at[3, 5].set(value)
    _, scales, simulated, _ = kernel(x, 1, jnp.float32(0.01), interpret=True)
    hit = np.zeros(SHAPE, bool)
    hit[3, :16] = True
    np.testing.assert_array_equal(np.isnan(np.asarray(simulated, np.float32)), hit)
    assert np.sum(np.asarray(scales) == 0x7F) == 1


def test_searches_see_rotated_blocks():
    x = jnp.asarray(hostile("normal", (32, 48), jnp.bfloat16))
    method = Method(Mse())
    wanted = quantize_unchecked(hadamard(x.astype(jnp.float32), 1), 1, encoder=encoder_for(method))
    geometry = Geometry(1, 96, 1)
    blocks = x.reshape(1, 96, 16, 1)

    @jax.jit
    def run(blocks, scale):
        prepare = rotation(np.dtype(np.float32))
        return quantize_blocks(
            blocks, scale, geometry, search.mse_scales, search.TUNING, prepare=prepare, interpret=True
        )

    packed, scales = run(blocks, wanted.global_scale[None])
    np.testing.assert_array_equal(packed.reshape(-1), wanted.packed.reshape(-1))
    np.testing.assert_array_equal(scales.reshape(-1), np.asarray(wanted.scales).view(np.uint8).reshape(-1))


def test_rotations_of_a_dtype_are_one_object():
    """Or every trace would compile again."""
    assert accelerated.preparation(jnp.bfloat16, True) is accelerated.preparation("bfloat16", True)
    assert not accelerated.preparation(jnp.bfloat16, False).across


@each_axis
@each_dtype
@pytest.mark.skipif(not jax.__version__.startswith("0.10"), reason="newer versions lower kernels only beside a GPU")
def test_kernels_lower_for_cuda_without_a_gpu(dtype, axis):
    def run(x, scale):
        return [kernel(x, axis, scale, tuning=tuning, interpret=False) for tuning in (WHOLE, SHARED)]

    arguments = jax.ShapeDtypeStruct((64, 96), dtype), jax.ShapeDtypeStruct((), jnp.float32)
    text = jax.jit(run).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 6


@pytest.mark.gpu
@each_axis
@each_dtype
@pytest.mark.parametrize("tuning", [WHOLE, SHARED], ids=["whole", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_kernels_give_the_bytes_of_the_cpu(kind, tuning, dtype, axis):
    """But for sums of float32 subnormals, zero for XLA on a CPU: these are as plain JAX on the GPU has them."""
    device = jax.devices()[0]
    assert device.platform == "gpu"

    def run(x, axis, scale):
        there = jax.device_put((x, scale), device)
        return kernel(there[0], axis, there[1], tuning=tuning, interpret=False)

    check_against_plain(hostile(kind, (512, 768), dtype), axis, run, device if kind == "subnormal" else None)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [1, 2])
def test_experts_on_a_gpu_have_the_bytes_of_the_cpu(axis):
    x = hostile("heavy", (4 * 64, 96), jnp.bfloat16).reshape(4, 64, 96)

    def run(x):
        amax = rotated_amax(x, axis, 16, keep_axes=(0,))
        tensor = quantize_unchecked(x, axis, global_amax=amax, rotation=16)
        scale = amax[0, 0, 0] / 2688
        return tensor.packed, tensor.scales, amax, fake_quantize_with_scale(x, axis, scale, rotation=16)

    with jax.default_device(jax.devices("cpu")[0]):
        wanted = run(jnp.asarray(x))
    assert accelerated.can_run(jnp.asarray(x))
    assert accelerated.geometry_of(Blocking(x.shape, (axis,)), wanted[2]) is not None
    for form in (run, jax.jit(run)):
        for found, expected in zip(form(jnp.asarray(x)), wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(found).view(np.uint8), np.asarray(expected).view(np.uint8))


@pytest.mark.gpu
@each_axis
@pytest.mark.parametrize("method", [Method(Mse()), Method(WeightedMse())], ids=str)
def test_searches_on_a_gpu_choose_as_the_cpu_does(method, axis):
    x = hostile("normal", (256, 384), jnp.bfloat16)
    importance = np.random.default_rng(1).uniform(size=x.shape[axis]).astype(np.float32)
    moments = importance.reshape((1, -1, 1) if axis == 0 else (1, 1, -1))

    def run(x, moments):
        return quantize_unchecked(x, axis, encoder=encoder_for(method), moments=moments, rotation=16)

    with jax.default_device(jax.devices("cpu")[0]):
        wanted = run(jnp.asarray(x), jnp.asarray(moments))
    found = run(jnp.asarray(x), jnp.asarray(moments))
    np.testing.assert_array_equal(np.asarray(found.packed), np.asarray(wanted.packed))
    np.testing.assert_array_equal(np.asarray(found.scales).view(np.uint8), np.asarray(wanted.scales).view(np.uint8))
