"""Products of FP4 codes: where they are chosen, and that results are those of the codes, up to float32 sums."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.algorithms import calibrate, quantize_params
from jaxfp4.algorithms.scaled_product import multiply_fp4, scaled_matmul, scaled_product
from jaxfp4.algorithms.simulation import simulation
from jaxfp4.recipes import plan
from jaxfp4.tensors import global_amax, quantize, quantize_unchecked
from jaxfp4.tensors.quantize import fake_quantize_with_scale, quantize_with_scale
from jaxfp4.transform.scope import original_product

from . import test_packed_product as products

small_weights_too = products.small_weights_too


@dataclasses.dataclass(frozen=True)
class Device:
    platform: str
    compute_capability: str


@pytest.mark.parametrize(
    "devices, wanted",
    [
        ([Device("gpu", "10.0")], True),
        ([Device("gpu", "12.1")], True),
        ([Device("gpu", "9.0")], False),
        ([Device("gpu", "gfx950")], False),
        ([Device("gpu", "10.0"), Device("gpu", "8.9")], False),
        ([Device("tpu", "10.0")], False),
        ([], False),
    ],
)
def test_capabilities(devices, wanted):
    assert multiply_fp4(devices) is wanted


def test_the_devices_at_hand_have_no_fp4():
    assert not multiply_fp4(jax.devices("cpu"))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_t(4, shape), jnp.float32)


def float64(*operands):
    """The values of tensors in real numbers, as no product of a code and its scales is in float32."""
    for tensor in operands:
        one = dataclasses.replace(tensor, global_scale=jnp.ones_like(tensor.global_scale))
        yield np.asarray(one.dequantize(jnp.float32), np.float64) * np.asarray(tensor.global_scale, np.float64)


def check_matrices(x, w, step=2.0**-24):
    """Within the bound that `scaled_matmul` states; `step` is what an addition is off by."""
    w_scale = w.global_scale if w.ndim == 2 else w.global_scale.reshape(-1)
    run = jax.jit(functools.partial(scaled_matmul, dtype=jnp.dtype(jnp.float32)))
    found = run(x.packed, x.scales, x.global_scale, w.packed, w.scales, w_scale)
    rows, columns = float64(x, w)
    columns = np.swapaxes(columns, -1, -2)
    bound = (rows.shape[-1] + 2) * step * (np.abs(rows) @ np.abs(columns))
    assert np.all(np.abs(np.asarray(found, np.float64) - rows @ columns) <= bound * 1.001)
    return found


def test_matrices():
    found = check_matrices(quantize(draw(5, 96), 1), quantize(draw(7, 96, seed=1), 1))
    assert found.shape == (5, 7)


def test_experts_with_their_own_scales():
    w = draw(3, 7, 64, seed=1) * jnp.array([1.0, 100.0, 1e-3])[:, None, None]
    found = check_matrices(quantize(draw(3, 5, 64), 2), quantize(w, 2, global_amax=global_amax(w, keep_axes=(0,))))
    assert found.shape == (3, 5, 7)


def test_every_code_and_scale():
    """All codes against all scales: none is converted or flushed on the way."""
    codes, scales = np.arange(16, dtype=np.uint8), np.arange(127, dtype=np.uint8)
    packed = np.repeat(np.repeat(codes * 17, 8).reshape(1, 16, 8), 127, 0).reshape(127, 128)
    x = quantize(jnp.zeros((127, 256)), 1)
    x = dataclasses.replace(
        x, packed=jnp.asarray(packed), scales=jnp.asarray(np.repeat(scales[:, None], 16, 1)).view(jnp.float8_e4m3fn)
    )
    w = jnp.repeat(jnp.eye(16), 16, 1) * jnp.tile(jnp.eye(16)[0], 16)  # column i takes the first value of block i
    found = check_matrices(x, quantize(w, 1))
    values = np.asarray(x.dequantize(jnp.float32))[:, ::16]
    np.testing.assert_array_equal(np.abs(np.asarray(found)), np.abs(values))


def test_nan_scales_spoil_their_rows_and_columns():
    x, w = quantize(draw(3, 32), 1), quantize(draw(4, 32, seed=1), 1)
    x = dataclasses.replace(x, scales=x.scales.at[1, 0].set(jnp.nan))
    w = dataclasses.replace(w, scales=w.scales.at[2, 1].set(jnp.nan))
    run = functools.partial(scaled_matmul, dtype=jnp.dtype(jnp.float32))
    found = np.isnan(run(x.packed, x.scales, x.global_scale, w.packed, w.scales, w.global_scale))
    wanted = np.zeros((3, 4), bool)
    wanted[1] = wanted[:, 2] = True
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("rotation", [0, 16])
def test_codes_under_a_given_scale_are_those_of_simulation(rotation):
    x = draw(5, 64).astype(jnp.bfloat16)
    tensor = quantize_with_scale(x, 1, jnp.float32(0.003), rotation=rotation)
    simulated = fake_quantize_with_scale(x, 1, jnp.float32(0.003), rotation=rotation)
    np.testing.assert_array_equal(tensor.dequantize(), simulated)
    whole = quantize_with_scale(x, 1, quantize_unchecked(x, 1).global_scale)
    np.testing.assert_array_equal(whole.packed, quantize_unchecked(x, 1).packed)


# In models.


@functools.cache
def prepared(name, recipe="nvfp4"):
    apply, params, x = products.model(name)
    result = plan(apply, params, x, recipe=recipe)
    stats = calibrate(apply, params, [x], result, progress=False)
    return apply, result, quantize_params(params, result, stats), x


def by_codes(apply, result):
    """`quantized`, as on a device that multiplies FP4."""
    return simulation(apply, result, lambda devices: multiply)


def multiply(meeting, activation, eqn):
    return scaled_product(meeting, eqn)


def plainly(apply, result):
    """`quantized`, as on a mesh."""
    return simulation(apply, result, lambda devices: original_product)


@pytest.fixture
def chosen_on_the_cpu(monkeypatch, small_weights_too):
    """What is chosen by platform is as on an NVIDIA GPU."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *operands, cuda, default: cuda(*operands))


def in_float32(apply, result, qparams, x):
    """The simulated product with operands that are not rounded to bfloat16."""
    weight = dataclasses.replace(qparams["w"].weight, dtype=np.dtype(np.float32))
    wide = {"w": dataclasses.replace(qparams["w"], weight=weight)}
    with jax.default_matmul_precision("highest"):
        return np.asarray(plainly(apply, result)(wide, x.astype(jnp.float32)), np.float64)


def magnitudes(apply, qparams, x):
    """`sum(|x| * |w|)`, at most: no value is rounded to more than its double."""
    return 2 * np.asarray(apply({"w": jnp.abs(qparams["w"].weight.dequantize(jnp.float32))}, jnp.abs(x)), np.float64)


@pytest.mark.parametrize("name", products.PRODUCTS)
def test_a_product_of_codes_is_the_simulated_product(chosen_on_the_cpu, name):
    apply, result, qparams, x = prepared(name)
    run = by_codes(apply, result)
    assert "scaled_dot" in str(jax.make_jaxpr(run)(qparams, x))
    found, plain = run(qparams, x), plainly(apply, result)(qparams, x)
    assert (found.shape, found.dtype) == (plain.shape, plain.dtype)
    most, wanted = magnitudes(apply, qparams, x), in_float32(apply, result, qparams, x)
    # float32: the sum and two factors here, the sum and two operands there. bfloat16: the result, if that is its dtype.
    sums = 2 * (products.K + 2) * 2.0**-24 * most
    rounding = 2.0**-8 * np.abs(wanted) if found.dtype == jnp.bfloat16 else 0
    assert np.all(np.abs(np.asarray(found, np.float64) - wanted) <= sums + rounding)
    # Simulation in bfloat16 rounds both operands too.
    operands = (2 * 2.0**-8) * most
    assert np.all(
        np.abs(np.asarray(found, np.float64) - np.asarray(plain, np.float64)) <= sums + operands + 2 * rounding
    )


def test_rotated_and_many_rows(chosen_on_the_cpu):
    apply, params, _ = products.model("first")
    x = products.draw(100, products.K, seed=1)
    result = plan(apply, params, x, recipe="nvfp4_hadamard")
    qparams = quantize_params(params, result, calibrate(apply, params, [x], result, progress=False))
    run = by_codes(apply, result)
    assert "scaled_dot" in str(jax.make_jaxpr(run)(qparams, x))
    found, plain = (np.asarray(f(qparams, x), np.float64) for f in (run, plainly(apply, result)))
    assert np.linalg.norm(found - plain) < 2.0**-7 * np.linalg.norm(plain)


def test_other_platforms_keep_every_bit(small_weights_too):
    apply, result, qparams, x = prepared("first")
    np.testing.assert_array_equal(by_codes(apply, result)(qparams, x), plainly(apply, result)(qparams, x))


def test_derivatives_and_vmap_are_those_of_simulation(chosen_on_the_cpu):
    apply, result, qparams, x = prepared("last")
    run, plain = by_codes(apply, result), plainly(apply, result)

    def total(function):
        return lambda x: jnp.sum(function(qparams, x).astype(jnp.float32))

    np.testing.assert_array_equal(jax.grad(total(run))(x), jax.grad(total(plain))(x))
    mapped = [jax.vmap(function, in_axes=(None, 0))(qparams, jnp.stack([x, -x])) for function in (run, plain)]
    np.testing.assert_array_equal(*mapped)


def test_without_an_input_scale_and_for_small_weights_there_is_none(chosen_on_the_cpu, monkeypatch):
    apply, result, qparams, x = prepared("first")
    dynamic = {"w": dataclasses.replace(qparams["w"], input_scale=None)}
    assert "scaled_dot" not in str(jax.make_jaxpr(by_codes(apply, result))(dynamic, x))
    monkeypatch.setattr(products.packed_product, "SMALLEST_WEIGHT", products.K * products.N + 1)
    assert "scaled_dot" not in str(jax.make_jaxpr(by_codes(apply, result))(qparams, x))


@pytest.mark.parametrize("shape", [(3, 40), (3, 4, 8)], ids=["ragged", "two axes"])
def test_other_contractions_are_simulated(chosen_on_the_cpu, shape):
    """A contraction that is no multiple of 16, and one over two axes."""
    x = products.draw(*shape)
    params = {"w": products.draw(*shape[1:], 16)}

    def apply(p, x):
        return jnp.tensordot(x, p["w"], x.ndim - 1)

    result = plan(apply, params, x, recipe="nvfp4")
    qparams = quantize_params(params, result, calibrate(apply, params, [x], result, progress=False))
    assert "scaled_dot" not in str(jax.make_jaxpr(by_codes(apply, result))(qparams, x))
    np.testing.assert_array_equal(by_codes(apply, result)(qparams, x), plainly(apply, result)(qparams, x))


@pytest.mark.gpu
def test_matrices_on_the_gpu():
    """Bytes are read as codes in the right order, whatever multiplies them there."""
    check_matrices(quantize(draw(64, 256), 1), quantize(draw(96, 256, seed=1), 1), step=2.0**-22)


@pytest.mark.gpu
def test_a_large_product_on_the_gpu():
    params, x = {"w": products.draw(1024, 2048)}, products.draw(128, 1024, seed=1)

    def apply(p, x):
        return x @ p["w"]

    result = plan(apply, params, x, recipe="nvfp4")
    qparams = quantize_params(params, result, calibrate(apply, params, [x], result, progress=False))
    found, plain = (np.asarray(f(qparams, x), np.float64) for f in (by_codes(apply, result), plainly(apply, result)))
    assert np.linalg.norm(found - plain) < 2.0**-7 * np.linalg.norm(plain)
