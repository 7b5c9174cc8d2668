"""The error of quantized weights against direct formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp4
from jaxfp4.reports import quality_table, weight_quality


def job(w):
    params = {"kernel": w, "bias": jnp.zeros(w.shape[-1])}
    plan = jaxfp4.plan(lambda p, x: x @ p["kernel"] + p["bias"], params, jnp.ones((2, w.shape[0])))
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
