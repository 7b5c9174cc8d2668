"""`quantize_params(donate=True)` frees weights as it goes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp4
from jaxfp4.formats import LeafError

WEIGHTS, SIZE = 6, 256


def apply_fn(params, x):
    for name in sorted(params["layers"]):
        x = x @ params["layers"][name]
    return x * params["scale"]


def draw(layers=WEIGHTS):
    keys = jax.random.split(jax.random.key(0), layers)
    weights = {f"w{i}": jax.random.normal(key, (SIZE, SIZE), jnp.float32) for i, key in enumerate(keys)}
    return {"layers": weights, "scale": jnp.ones(())}


def plan_for(params):
    return jaxfp4.plan(apply_fn, params, jnp.ones((2, SIZE)), recipe="nvfp4_weight_only")


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays())


def test_same_bytes_and_only_the_weights_are_freed():
    params = draw()
    plan = plan_for(params)
    wanted = jaxfp4.digest(jaxfp4.quantize_params(params, plan))
    assert not any(w.is_deleted() for w in params["layers"].values())
    found = jaxfp4.quantize_params(params, plan, donate=True)
    assert jaxfp4.digest(found) == wanted
    assert all(w.is_deleted() for w in params["layers"].values()) and not params["scale"].is_deleted()


def test_memory_falls_with_each_weight():
    params = draw()
    plan = plan_for(params)
    before = live_bytes()
    quantized = jaxfp4.quantize_params(params, plan, donate=True)
    assert before - live_bytes() > 0.85 * WEIGHTS * SIZE * SIZE * 4
    assert len(jax.tree.leaves(quantized)) == 3 * WEIGHTS + 1


def test_an_array_that_is_two_leaves_stays():
    params = draw(2)
    params["layers"]["w1"] = params["layers"]["w0"]
    jaxfp4.quantize_params(params, plan_for(params), donate=True)
    assert not params["layers"]["w0"].is_deleted()


def test_the_first_group_that_is_not_finite_is_named():
    params = draw(2)
    plan = plan_for(params)
    params["layers"]["w1"] = params["layers"]["w1"].at[3, 5].set(np.nan)
    with pytest.raises(LeafError, match=r"w1.*: it holds NaN or Inf"):
        jaxfp4.quantize_params(params, plan, donate=True)


def test_traced_parameters_are_refused():
    params = draw(1)
    plan = plan_for(params)
    with pytest.raises(ValueError, match="donate=True under jit: wanted parameters that are not traced"):
        jax.jit(lambda p: jaxfp4.quantize_params(p, plan, donate=True))(params)
