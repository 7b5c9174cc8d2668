"""Flax modules as functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxfp4


def test_an_nnx_module_with_other_state_computes_the_same():
    module = nnx.Sequential(
        nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.BatchNorm(16, rngs=nnx.Rngs(1)), nnx.Dropout(0.5, rngs=nnx.Rngs(2))
    )
    module.eval()
    apply_fn, params = jaxfp4.from_flax(module)
    x = jax.random.normal(jax.random.key(0), (4, 8))
    np.testing.assert_array_equal(apply_fn(params, x), module(x))
    doubled = jax.tree.map(lambda p: 2 * p, params)
    assert not np.array_equal(apply_fn(doubled, x), module(x))


def test_a_linen_module_keeps_its_other_collections():
    module = linen.Sequential([linen.Dense(16), linen.BatchNorm(use_running_average=True)])
    x = jax.random.normal(jax.random.key(0), (4, 8))
    variables = module.init(jax.random.key(1), x)
    apply_fn, params = jaxfp4.from_flax(module, variables)
    assert params is variables["params"]
    np.testing.assert_array_equal(apply_fn(params, x), module.apply(variables, x))


def test_misuse_is_an_error():
    with pytest.raises(ValueError, match="variables given with an NNX module: wanted none"):
        jaxfp4.from_flax(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {"params": {}})
    with pytest.raises(ValueError, match="found none: wanted those of the Linen module"):
        jaxfp4.from_flax(linen.Dense(2))
    with pytest.raises(ValueError, match=r"found the collections \['cache'\]"):
        jaxfp4.from_flax(linen.Dense(2), {"cache": {}})
    with pytest.raises(TypeError, match=r"module is a function: wanted an nnx\.Module or a linen\.Module"):
        jaxfp4.from_flax(lambda x: x, {"params": jnp.ones(2)})
