"""The error of quantized weights against direct formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp4
from jaxfp4.reports import quality_table, weight_quality


def apply_fn(params, x):
    return x @ params["kernel"] + params["bias"]


def job(w, recipe="nvfp4"):
    params = {"kernel": w, "bias": jnp.zeros(w.shape[-1])}
    plan = jaxfp4.plan(apply_fn, params, jnp.ones((2, w.shape[0])), recipe=recipe)
    return params, jaxfp4.quantize_params(params, plan)


def test_signal_to_noise_is_the_ratio_of_energies():
    params, qparams = job(jax.random.normal(jax.random.key(0), (64, 8)))
    (row,) = weight_quality(params, qparams)
    w, q = np.asarray(params["kernel"], np.float64), np.asarray(qparams["kernel"].weight.dequantize(), np.float64)
    assert row.signal_to_noise == pytest.approx(10 * np.log10((w**2).sum() / ((w - q) ** 2).sum()), rel=1e-5)
    assert (row.path, row.shape, row.bits) == ("kernel", (64, 8), pytest.approx(4.5 + 32 / 512))
    table = quality_table([row])
    assert table.row_count == 1


@pytest.mark.parametrize(("value", "expected"), [(0.0, np.nan), (6.0, np.inf)])
def test_no_signal_and_no_noise(value, expected):
    params, qparams = job(jnp.full((32, 4), value))
    assert weight_quality(params, qparams)[0].signal_to_noise == pytest.approx(expected, nan_ok=True)


def test_other_parameters_are_refused():
    params, qparams = job(jnp.ones((32, 4)))
    with pytest.raises(ValueError, match="params and qparams differ at 'other'"):
        weight_quality({**params, "other": jnp.ones(3)}, qparams)


def test_a_rotated_weight_is_compared_with_the_original_rotated():
    params, qparams = job(jax.random.normal(jax.random.key(0), (64, 8)), "nvfp4_weight_only_hadamard")
    (row,) = weight_quality(params, qparams)
    blocks = np.asarray(params["kernel"], np.float64).reshape(4, 16, 8)
    signs = np.array([[(-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)]) / 4
    w = np.einsum("ij,bjn->bin", signs, blocks).reshape(64, 8)
    q = np.asarray(qparams["kernel"].weight.dequantize(), np.float64)
    assert row.signal_to_noise == pytest.approx(10 * np.log10((w**2).sum() / ((w - q) ** 2).sum()), rel=1e-5)
    assert row.signal_to_noise > 15


def test_parameters_before_the_channels_were_folded_are_refused():
    def normed(params, x):
        return (x * params["scale"]) @ params["kernel"]

    x = jax.random.normal(jax.random.key(1), (8, 64)) * jnp.exp2(jnp.arange(64) % 7)
    params = {"scale": jnp.ones(64), "kernel": jax.random.normal(jax.random.key(0), (64, 8))}
    plan = jaxfp4.plan(normed, params, x, recipe="nvfp4_smoothquant")
    stats = jaxfp4.calibrate(normed, params, [x], plan, progress=False)
    qparams = jaxfp4.quantize_params(params, plan, stats)
    with pytest.raises(ValueError, match=r"differ in the values of 'scale'.*pass fold_channel_scales\(params, plan"):
        weight_quality(params, qparams)
    (row,) = weight_quality(jaxfp4.fold_channel_scales(params, plan, stats), qparams)
    assert row.signal_to_noise > 15


@pytest.mark.parametrize("value", [0.1, np.nan, -0.0])
def test_what_was_rounded_does_not_differ(value):
    params, qparams = job(jnp.ones((32, 4)))
    params, qparams = {**params, "bias": jnp.full(4, value)}, {**qparams, "bias": jnp.full(4, value, jnp.bfloat16)}
    assert len(weight_quality(params, qparams)) == 1


def test_numbers_without_axes_are_compared():
    params, qparams = job(jnp.ones((32, 4)))
    params, same = {**params, "gain": jnp.float32(0.1)}, {**qparams, "gain": jnp.bfloat16(0.1)}
    assert len(weight_quality(params, same)) == 1
    with pytest.raises(ValueError, match="differ in the values of 'gain'"):
        weight_quality(params, {**qparams, "gain": jnp.bfloat16(0.2)})
