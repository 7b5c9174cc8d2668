"""Rotation by the quantizers themselves: that of the rotated array, on any layout and of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import assert_same_bits
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxfp4.tensors import global_amax, quantize_unchecked
from jaxfp4.tensors.hadamard import hadamard
from jaxfp4.tensors.quantize import fake_quantize_with_scale
from jaxfp4.tensors.reductions import rotated_amax
from tensors.meshes import mesh, put

SCALE = jnp.float32(0.02)


def draw(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_t(3, shape), dtype)


@pytest.mark.parametrize(
    "shape, axis, keep, size, dtype",
    [
        ((64, 24), 0, (), 16, jnp.bfloat16),
        ((64, 24), 0, (), 32, jnp.bfloat16),
        ((3, 4, 8, 5), (1, 2), (0,), 16, jnp.float32),
        ((4, 3, 8), (0, 2), (1,), 16, jnp.float16),
        ((2, 3, 32), (1, 2), (0,), 16, jnp.bfloat16),
        ((2, 8, 6), 1, (0,), 4, jnp.float16),
        ((2, 17), 1, (0,), 0, jnp.float32),
    ],
)
def test_it_is_that_of_the_rotated_array(shape, axis, keep, size, dtype):
    x = draw(*shape, dtype=dtype)
    wide, same = x.astype(jnp.float32), x
    if size:
        wide, same = hadamard(wide, axis, size), hadamard(x, axis, size)
    amax = rotated_amax(x, axis, size, keep_axes=keep)
    assert_same_bits(amax, global_amax(wide, keep_axes=keep))
    for given in (None, amax):
        found = quantize_unchecked(x, axis, global_amax=given, rotation=size)
        wanted = quantize_unchecked(wide, axis, global_amax=given)
        assert found.dtype == dtype
        jax.tree.map(assert_same_bits, (found.packed, found.scales), (wanted.packed, wanted.scales))
    found = fake_quantize_with_scale(x, axis, SCALE, rotation=size)
    assert_same_bits(found, fake_quantize_with_scale(same, axis, SCALE))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("spec", [P("ep", "tp"), P("ep", None, "tp"), P(None, ("ep", "tp"))], ids=str)
def test_bytes_do_not_depend_on_the_layout(spec, kind):
    """The last of these layouts cuts blocks."""
    w = np.asarray(draw(4, 64, 16))
    wanted = quantize_unchecked(hadamard(jnp.asarray(w), 1), 1)
    simulated = fake_quantize_with_scale(hadamard(jnp.asarray(w), 1), 1, SCALE)
    on = mesh("tp4 ep2", kind)
    with jax.set_mesh(on):
        there = put(w, on, spec)
        found = quantize_unchecked(there, 1, rotation=16)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert_same_bits(one, other)
        assert_same_bits(fake_quantize_with_scale(there, 1, SCALE, rotation=16), simulated)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [16, 64])
def test_gradients_are_those_of_the_rotation(size, dtype):
    """Which is its own transpose. Sums of small integers are exact in any order."""
    x, weights = draw(3, 64, dtype=dtype), jnp.asarray(np.random.default_rng(1).integers(-2, 3, (3, 64)), dtype)
    wanted = hadamard(weights, size=size)

    def simulated(x):
        return fake_quantize_with_scale(x, -1, SCALE, rotation=size)

    for function in (lambda x: hadamard(x, size=size), simulated):
        gradient = jax.jit(jax.grad(lambda x: jnp.sum((function(x) * weights).astype(jnp.float32))))(x)  # noqa: B023
        assert_same_bits(gradient, wanted)


def test_a_contraction_without_whole_groups_is_refused():
    message = r"hadamard: size=16 for a contraction of 24: wanted a power of two from 2 on that divides it"
    x = draw(2, 24)
    for function in (
        lambda: quantize_unchecked(x, 1, rotation=16),
        lambda: fake_quantize_with_scale(x, 1, SCALE, rotation=16),
        lambda: rotated_amax(x, 1, 16),
    ):
        with pytest.raises(ValueError, match=message):
            function()


def test_kept_axes_are_not_rotated_along():
    with pytest.raises(ValueError, match=r"keep_axes=\(1,\) of a rotation along \(1,\): wanted other axes than these"):
        rotated_amax(draw(2, 32), 1, 16, keep_axes=(1,))
