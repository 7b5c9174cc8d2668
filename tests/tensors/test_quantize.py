"""Quantizing arrays on one device: axes, padding, special values, gradients, errors."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_data import assert_same_bits

from jaxfp4.tensors import block_amax, fake_quantize, global_amax, quantize
from jaxfp4.tensors.quantize import fake_quantize_with_scale
from tensors.logical import assert_quantized, expected_block_amax, expected_per_expert, expected_quantized

jitted_quantize = jax.jit(quantize, static_argnames="axis")


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize(
    ("shape", "axis", "packed_shape"),
    [
        ((40, 7), 0, (24, 7)),
        ((3,), -1, (8,)),
        ((4, 32, 24), (0, 1), (4, 16, 24)),
        ((4, 8, 32), (1, 0), (16, 32)),
        ((4, 24, 8), (0, 2), (24, 16)),
        ((2, 3, 4, 8), (1, 3), (2, 4, 16)),
        ((2, 3, 5, 7), (0, 1, 2), (16, 7)),
    ],
    ids=str,
)
def test_blocks_run_along_the_flattened_contraction(shape, axis, packed_shape):
    """Any axis, several of them merged unless the last holds whole blocks, padded with zeros to a multiple of 16."""
    w = normal(*shape)
    q = quantize(w, axis)
    assert q.packed.shape == packed_shape
    assert_quantized(q, expected_quantized(w, axis))
    assert_same_bits(block_amax(w, axis), expected_block_amax(w, axis))
    assert (q.shape, q.ndim, q.dtype) == (shape, len(shape), np.float32)
    values = q.dequantize()
    assert values.shape == shape
    assert np.abs(w - values).max() <= np.abs(w).max() / 6  # half the widest step, on the grid of 6 at most
    assert_same_bits(fake_quantize(jnp.asarray(w), axis), values)


def test_values_of_a_merged_contraction_return_to_their_places():
    """Values that NVFP4 holds exactly come back as they were."""
    w = np.random.default_rng(0).choice(np.float32([-6, -3, -1, 0.5, 2, 4, 6]), (2, 5, 3, 8))
    w[:, 0], w[..., 0] = 6, -6
    assert_same_bits(quantize(w, (1, 3)).dequantize(), w)
    assert_same_bits(fake_quantize(w, (1, 3)), w)


@pytest.mark.parametrize(("shape", "axis"), [((0, 32), 1), ((32, 0), 0), ((0,), 0)], ids=str)
def test_empty_arrays(shape, axis):
    q = quantize(jnp.zeros(shape), axis)
    assert q.shape == shape
    assert q.dequantize().shape == fake_quantize(jnp.zeros(shape), axis).shape == shape
    assert global_amax(jnp.zeros(shape)) == 0
    assert "empty" in repr(q)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=lambda d: np.dtype(d).name)
def test_fake_quantize_is_dequantize_of_quantize(dtype):
    axis = (1, 2)
    x = jnp.asarray(normal(3, 8, 12).astype(dtype))
    for given in (None, 0.7):
        q = quantize(x, axis, global_amax=given)
        result = fake_quantize(x, axis, global_amax=given)
        assert result.dtype == x.dtype
        assert_same_bits(result, q.dequantize())
        assert_same_bits(fake_quantize_with_scale(x, axis, q.global_scale), result)


def test_one_global_amax_per_expert():
    w = normal(3, 32, 5) * np.float32([1, 100, 0.01]).reshape(3, 1, 1)
    amax = global_amax(w, keep_axes=(0,))
    assert_same_bits(amax, np.abs(w).max((1, 2), keepdims=True))
    q = quantize(w, 1, global_amax=amax)
    assert_quantized(q, expected_per_expert(w, 1))
    assert_same_bits(fake_quantize(w, 1, global_amax=amax), q.dequantize())


def test_a_global_scale_per_expert_with_a_merged_contraction():
    w = normal(3, 4, 8, 5)
    amax = global_amax(w, keep_axes=(0,))
    q = quantize(w, (1, 2), global_amax=amax)
    for i, expert in enumerate(w):
        assert_quantized(jax.tree.map(lambda part, i=i: part[i].squeeze(), q), expected_quantized(expert, (0, 1)))


def test_zero_block_and_zero_tensor():
    w = np.zeros((32, 2), np.float32)
    q = quantize(w, 0)
    assert float(q.global_scale) == 1
    assert_same_bits(q.dequantize(), w)
    assert (np.asarray(q.scales).view(np.uint8) == 0x38).all()
    w[0, 0] = -3
    q = quantize(w, 0)
    assert np.asarray(q.scales).view(np.uint8).tolist() == [[0x7E, 0x38], [0x38, 0x38]]
    assert_same_bits(q.dequantize(), w)


@pytest.mark.parametrize("amax", [1e-45, 1e-40, 9e-32], ids=str)
def test_a_tensor_too_small_for_float32_products_becomes_zeros(amax):
    q = quantize(np.full((16,), amax, np.float32), 0)
    assert float(q.global_scale) == 1
    assert not np.asarray(q.dequantize()).any()


def test_the_smallest_amax_that_is_kept():
    w = np.full((16,), 2.0**-103, np.float32)
    assert_quantized(quantize(w, 0), expected_quantized(w, 0))
    assert quantize(w, 0).dequantize()[0] == pytest.approx(2.0**-103, rel=1e-6)


def test_minus_zero_gets_code_zero_and_small_negatives_keep_their_sign():
    w = np.float32([-0.0, 0.0, -0.1, 0.1, -1e-42, 6] + [0] * 10)
    q = quantize(w, 0, global_amax=2688.0)
    assert np.asarray(q.packed)[:3].tolist() == [0x00, 0x08, 0x78]
    assert np.signbit(q.dequantize()).tolist() == [False, False, True, False, True] + [False] * 11


@pytest.mark.parametrize("factor", [0.25, 4.0, 1e6])
def test_block_amax_above_and_below_the_global_amax(factor):
    """Above: saturates at the given amax. Far below: the block scale stays at its least, 2^-9."""
    w = normal(16, 3)
    amax = np.float32(np.abs(w).max() * factor)
    q = quantize(w, 0, global_amax=amax)
    assert_quantized(q, expected_quantized(w, 0, amax))
    values = np.abs(np.asarray(q.dequantize()))
    assert np.isfinite(values).all() and values.max() <= amax * np.float32(1 + 2e-7)
    codes = np.asarray(q.scales).view(np.uint8)
    assert (codes == {0.25: 0x7E, 1e6: 0x01}[factor]).any() if factor != 4 else ((codes > 1) & (codes < 0x7E)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_errors_outside_jit(bad):
    w = normal(16, 3)
    w[5, 1] = bad
    with pytest.raises(ValueError, match=r"holds NaN or Inf: wanted finite values; repair or exclude it$"):
        quantize(w, 0)
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        quantize(w, 0, global_amax=1.0)
    with pytest.raises(ValueError, match="the array or its global amax holds NaN or Inf"):
        quantize(normal(16, 3), 0, global_amax=bad if bad > 0 else np.nan)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_inside_jit_cannot_go_unseen(bad):
    """With the tensor's own amax everything becomes NaN; with one given, the block that holds it."""
    w = normal(16, 3)
    w[5, 1] = bad
    assert np.isnan(jitted_quantize(w, axis=0).dequantize()).all()
    tensor = jitted_quantize(w, axis=0, global_amax=jnp.float32(3))
    assert np.isnan(tensor.dequantize()).tolist() == [[False, True, False]] * 16
    assert_same_bits(np.isnan(fake_quantize(w, 0, global_amax=3.0)), np.isnan(tensor.dequantize()))
    assert np.isnan(fake_quantize(w, 0)).all()
    assert np.isfinite(jitted_quantize(np.where(np.isfinite(w), w, 0), axis=0).dequantize()).all()


def test_amax_propagates_nan_above_inf():
    w = normal(32, 2)
    w[3, 0] = -np.inf
    assert global_amax(w) == np.inf
    assert block_amax(w, 0)[0].tolist() == [np.inf, np.abs(w[:16, 1]).max()]
    w[4, 0] = np.nan
    assert np.isnan(global_amax(w))
    assert np.isnan(block_amax(w, 0)).tolist() == [[True, False], [False, False]]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16], ids=lambda d: np.dtype(d).name)
def test_amax_is_float32_in_every_dtype_and_keeps_subnormals(dtype):
    w = normal(4, 32).astype(dtype)
    for result, expected in ((block_amax(w), expected_block_amax(w, -1)), (global_amax(w), np.abs(w).max())):
        assert_same_bits(result, expected.astype(np.float32))
    tiny = np.full((1, 16), np.array(3, f"u{w.itemsize}").view(dtype))
    assert_same_bits(block_amax(tiny)[0, 0], tiny[0, 0].astype(np.float32))
    assert_same_bits(global_amax(tiny), tiny[0, 0].astype(np.float32))


def test_straight_through_gradient():
    x = jnp.asarray(normal(3, 32))
    target = jnp.asarray(normal(3, 32, seed=1))

    def loss(x):
        return jnp.sum(fake_quantize(x) * target)

    assert_same_bits(jax.jit(jax.grad(loss))(x), target)
    value, tangent = jax.jvp(lambda x: fake_quantize(x, global_amax=2.0), (x,), (target,))
    assert_same_bits(value, fake_quantize(x, global_amax=2.0))
    assert_same_bits(tangent, target)
    per_row = jax.vmap(jax.grad(lambda x, t: jnp.sum(fake_quantize(x) * t)))(x, target)
    assert_same_bits(per_row, target)


def test_gradient_beyond_the_clip_range_and_towards_the_scale():
    """The identity's gradient everywhere, none for the global amax or scale."""
    x = jnp.asarray(normal(16) * 100)
    for given in (lambda a: fake_quantize(x, global_amax=a), lambda a: fake_quantize_with_scale(x, 0, a)):
        assert jax.grad(lambda a, given=given: jnp.sum(given(a)))(jnp.float32(1.0)) == 0
    assert jax.grad(lambda x: jnp.sum(fake_quantize(x, global_amax=1.0)))(x).tolist() == [1.0] * 16


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_jit_traces_once_for_different_values(dtype):
    traces = []

    @jax.jit
    def f(x, amax):
        traces.append(x.dtype)
        return quantize(x, 0, global_amax=amax)

    for seed in range(3):
        f(normal(16, seed=seed).astype(dtype), jnp.float32(seed + 1))
    assert len(traces) == 1


@pytest.mark.parametrize("function", [quantize, fake_quantize, block_amax, global_amax], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", ["int32", "float8_e4m3fn", "bool"])
def test_other_dtypes_are_refused(function, dtype):
    with pytest.raises(TypeError, match=rf"dtype {dtype}: wanted one of float32, bfloat16, float16; cast it first"):
        function(jnp.zeros((16,), dtype))


@pytest.mark.parametrize("function", [quantize, fake_quantize, block_amax], ids=lambda f: f.__name__)
@pytest.mark.parametrize("axis", [2, -3, (0, 0), (1, -1), ()], ids=str)
def test_bad_axes_are_refused(function, axis):
    with pytest.raises(
        ValueError, match=r"axis=.* for an array of 2 dimensions: wanted .* different contraction axes in \[-2, 2\)"
    ):
        function(jnp.zeros((16, 16)), axis)


def test_a_scalar_has_no_contraction():
    with pytest.raises(ValueError, match=r"axis=0 for an array of 0 dimensions"):
        quantize(jnp.float32(1))


def test_numpy_integers_are_axes():
    assert quantize(normal(16, 3), np.int64(0)).axes == (-2,)


@pytest.mark.parametrize("shape", [(3,), (1, 16, 1), (3, 16, 1), (2, 1, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("function", [quantize, fake_quantize], ids=lambda f: f.__name__)
def test_a_global_amax_of_the_wrong_shape_is_refused(function, shape):
    message = r"global_amax of shape \(.*\) for an array of shape \(3, 16, 5\) .*: wanted a scalar .* \(3, 1, 5\)"
    with pytest.raises(ValueError, match=message):
        function(jnp.ones((3, 16, 5)), 1, global_amax=jnp.ones(shape))
