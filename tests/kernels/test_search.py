"""Searches in kernels choose the block scales that plain JAX chooses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.algorithms.four_over_six import four_over_six_scales
from jaxfp4.algorithms.mse import mse_scales
from jaxfp4.formats import nvfp4
from jaxfp4.kernels import search
from jaxfp4.kernels.blocks import Geometry, Launch
from jaxfp4.kernels.quantize import Tuning, quantize_blocks

from .arrays import KINDS, hostile

SMALL = Tuning(minor=Launch(64, 1), strided=Launch(128, 1))
CHOICES = {"mse": (search.mse_scales, mse_scales), "four_over_six": (search.four_over_six_scales, four_over_six_scales)}
DIVISORS = (2688, 6 * 256)


@functools.partial(jax.jit, static_argnames=("name", "axis", "tuning", "interpret"))
def in_kernel(x, global_scale, name, axis, tuning, interpret):
    """E4M3 codes of `x [rows, columns]` with blocks along an axis, flat."""
    rows, columns = x.shape
    geometry = Geometry(1, x.size // 16, 1) if axis == 1 else Geometry(1, rows // 16, columns)
    blocks = x.reshape(1, geometry.blocks, 16, geometry.inner)
    choose = CHOICES[name][0]
    return quantize_blocks(blocks, global_scale.reshape(1), geometry, choose, tuning, interpret=interpret)[1].reshape(
        -1
    )


@functools.partial(jax.jit, static_argnames=("name", "axis"))
def in_plain_jax(x, global_scale, name, axis):
    rows, columns = x.shape
    blocks = x.reshape(rows, columns // 16, 16) if axis == 1 else x.reshape(rows // 16, 16, columns)
    return CHOICES[name][1](blocks, global_scale, 2 if axis == 1 else 1).reshape(-1)


def global_scale_of(x, divisor):
    return nvfp4.global_scale(jnp.max(jnp.abs(jnp.asarray(x).astype(jnp.float32))), divisor)


@pytest.mark.parametrize(
    "name, axis, dtype", [("mse", 0, jnp.float32), ("mse", 1, jnp.bfloat16), ("four_over_six", 1, jnp.float32)]
)
def test_interpreted_kernels_choose_as_plain_jax_does(name, axis, dtype):
    for kind in KINDS:
        x = jnp.asarray(hostile(kind, (64, 128), dtype))
        for divisor in DIVISORS:
            scale = global_scale_of(x, divisor)
            found = in_kernel(x, scale, name, axis, SMALL, interpret=True)
            np.testing.assert_array_equal(found, in_plain_jax(x, scale, name, axis), err_msg=f"{kind} {divisor}")


def test_blocks_that_are_not_finite_are_stored_as_such():
    x = jnp.asarray(hostile("normal", (64, 128), jnp.bfloat16)).at[5, 17].set(jnp.nan).at[9, 40].set(jnp.inf)
    found = np.asarray(in_kernel(x, jnp.float32(0.01), "mse", 1, SMALL, interpret=True)).reshape(64, 8)
    assert np.argwhere(found == 0x7F).tolist() == [[5, 1], [9, 2]]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.skipif(not jax.__version__.startswith("0.10"), reason="newer versions lower kernels only beside a GPU")
def test_searches_lower_for_cuda_without_a_gpu(name, axis):
    arguments = jax.ShapeDtypeStruct((512, 1024), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.float32)
    traced = in_kernel.trace(*arguments, name, axis, search.TUNING, interpret=False)
    assert "__gpu$xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def compare_on_gpu(x, divisor, name, axis):
    """The codes of the compiled kernel that differ from those of plain JAX on the CPU."""
    gpu, cpu = jax.devices()[0], jax.devices("cpu")[0]
    assert gpu.platform == "gpu"
    scale = jax.device_put(np.asarray(global_scale_of(x, divisor)), gpu)
    found = in_kernel(jax.device_put(x, gpu), scale, name, axis, search.TUNING, interpret=False)
    wanted = in_plain_jax(jax.device_put(x, cpu), jax.device_put(scale, cpu), name, axis)
    return int(np.sum(np.asarray(found) != np.asarray(wanted)))


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHOICES)
def test_compiled_kernels_choose_as_the_cpu_does(name, kind, axis):
    for dtype in (jnp.bfloat16, jnp.float32):
        x = hostile(kind, (256, 512), dtype)
        assert [compare_on_gpu(x, divisor, name, axis) for divisor in DIVISORS] == [0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHOICES)
def test_no_tie_falls_otherwise_in_many_random_blocks(name):
    """2^26 blocks of bfloat16 against plain JAX on the same GPU."""
    different = 0
    for seed in range(16):
        x = jax.random.normal(jax.random.key(seed), (8192, 8192), jnp.bfloat16)
        scale = global_scale_of(x, DIVISORS[1])
        found = in_kernel(x, scale, name, 0, search.TUNING, interpret=False)
        different += int(jnp.sum(found != in_plain_jax(x, scale, name, 0)))
    assert different == 0
