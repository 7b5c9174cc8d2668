"""What every algorithm must hold to, in each form in which it can be run. One row for each algorithm."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfp4.algorithms import digest, quantize_params
from jaxfp4.recipes import Plan, plan
from jaxfp4.tensors import QuantizedWeight

E, D, F, T = 4, 64, 32, 4
ALGORITHMS = {"max": "nvfp4"}
"""The recipe that stands for each."""


def one_expert(p, x):
    return x @ p["w"]


def experts(p, x):
    return jnp.einsum("etd,edf->etf", x, p["w"])


def weights(dtype) -> dict[str, jax.Array]:
    w = np.random.default_rng(0).normal(size=(E, D, F)) * np.array([1, 2, 0.5, 3])[:, None, None]
    return {"w": jnp.asarray(w, dtype)}


@functools.cache
def planned(algorithm: str, dtype: str, single: bool) -> Plan:
    shape = (D, F) if single else (E, D, F)
    abstract = {"w": jax.ShapeDtypeStruct(shape, dtype)}
    x = jax.ShapeDtypeStruct((T, D) if single else (E, T, D), dtype)
    recipe = ALGORITHMS[algorithm]
    return plan(one_expert if single else experts, abstract, x, recipe=recipe)


def eager(params, result, single):
    return quantize_params(params, result)


def under_jit(params, result, single):
    return jax.jit(quantize_params)(params, result)


def sharded(params, result, single):
    mesh = jax.make_mesh((2, 4), ("tp", "ep"), axis_types=(AxisType.Auto,) * 2)
    return quantize_params(jax.device_put(params, NamedSharding(mesh, P("ep", "tp"))), result)


def under_vmap(params, result, single):
    return jax.vmap(lambda p: quantize_params(p, single))(params)


each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@each_algorithm
@each_dtype
@pytest.mark.parametrize("form", [under_jit, sharded])
def test_form_does_not_matter(algorithm, dtype, form):
    """The bytes are those of the eager run on one device."""
    params, result = weights(dtype), planned(algorithm, dtype, False)
    assert digest(form(params, result, None)) == digest(eager(params, result, None))


@each_algorithm
@each_dtype
def test_vmap_over_experts(algorithm, dtype):
    """Mapped over experts, each gets the bytes that it gets alone."""
    params, single = weights(dtype), planned(algorithm, dtype, True)
    mapped = under_vmap(params, None, single)
    for i in range(E):
        alone = quantize_params({"w": params["w"][i]}, single)
        assert digest(jax.tree.map(lambda leaf, i=i: leaf[i], mapped)) == digest(alone)


@each_algorithm
@each_dtype
def test_result(algorithm, dtype):
    """Finite, near the weight, of its dtype, and the same when repeated."""
    params, result = weights(dtype), planned(algorithm, dtype, False)
    before = np.asarray(params["w"], np.float32)
    found = eager(params, result, None)["w"]
    assert isinstance(found, QuantizedWeight)
    assert {f.name for f in dataclasses.fields(found)} >= {"weight", "input_scale", "pre_scale"}
    values = np.asarray(found.weight.dequantize(jnp.float32))
    assert found.weight.dequantize().dtype == dtype
    assert np.linalg.norm(values - before) / np.linalg.norm(before) < 0.12
    np.testing.assert_array_equal(np.asarray(params["w"], np.float32), before)
    assert digest({"w": found}) == digest(eager(params, result, None))
