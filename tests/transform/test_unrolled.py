"""Functions whose loops over layers are unrolled, against the functions themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfp4.tensors.memory import brought
from jaxfp4.transform import jaxprs
from jaxfp4.transform.trace import leaves_of
from jaxfp4.transform.unrolled import find_split, unrolled

L, D = 3, 4
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(L, D, D)), jnp.float32)
B = jnp.asarray(RNG.normal(size=(L, D)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(2, D)), jnp.float32)
SPLIT = NamedSharding(jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,)), P(None, None, "tp"))
PARAMS = {"b": B, "w": W}
"""Leaf 0 is stacked beside the weight, leaf 1."""


def layer(x, w, b=0.0):
    return jnp.tanh(x @ w + b)


def scanned(p, x):
    return lax.scan(lambda x, p: (layer(x, p["w"], p["b"]), None), x, p)[0]


def with_results(p, x):
    """Results of each layer, its weight among them."""

    def step(x, p):
        y = layer(x, p["w"], p["b"])
        return y, (y, p["w"])

    return lax.scan(step, x, p)


def indexed(p, x):
    """With the number of the layer."""
    return lax.scan(lambda x, p: (layer(x, p[0]["w"]) * (p[1] + 1), None), x, (p, jnp.arange(L)))[0]


def two_loops(p, x):
    half = lax.scan(lambda x, w: (layer(x, w.astype(jnp.float32)), None), x, p["w"].astype(jnp.bfloat16))[0]
    return scanned(p, half)


def slices(p, x):
    return layer(layer(x, p["w"][1], p["b"][1]), p["w"][:1][0])


CLEAN = {
    "scan": scanned,
    "jit": lambda p, x: jax.jit(scanned)(p, x),
    "remat": lambda p, x: jax.checkpoint(scanned)(p, x),
    "remat of each layer": lambda p, x: lax.scan(lambda x, p: (jax.checkpoint(layer)(x, p["w"], p["b"]), None), x, p)[
        0
    ],
    "reversed": lambda p, x: lax.scan(lambda x, p: (layer(x, p["w"], p["b"]), None), x, p, reverse=True)[0],
    "results": with_results,
    "results reversed": lambda p, x: lax.scan(lambda x, p: (layer(x, p["w"]),) * 2, x, p, reverse=True),
    "index": indexed,
    "cast, two loops": two_loops,
    "constrained": lambda p, x: scanned(dict(p, w=lax.with_sharding_constraint(p["w"], SPLIT)), x),
    "slices": slices,
    "unused": lambda p, x: x,
}


@pytest.mark.parametrize("name", CLEAN)
def test_same_results(name):
    function = CLEAN[name]
    split = find_split(function, leaves_of(PARAMS), (X,), {1: (0,)})
    assert split is not None and split.axes[1] == (0,)
    parameters = [brought(value) for value in split.apart()]
    # One more parameter for each further layer, and for the number of each step.
    assert len(parameters) == len(PARAMS) + (L - 1) * len(split.axes) + split.steps
    found, wanted = jax.tree.leaves(unrolled(function, split)(parameters, X)), jax.tree.leaves(function(PARAMS, X))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    body = jaxprs.body_of(jax.make_jaxpr(unrolled(function, split))(parameters, X))
    assert "scan" not in {eqn.primitive.name for eqn in body.jaxpr.eqns}


def test_what_is_scanned_beside_is_taken_apart():
    split = find_split(scanned, leaves_of(PARAMS), (X,), {1: (0,)})
    assert split.axes == {0: (0,), 1: (0,)} and split.indices(0) == [(0,), (1,), (2,)]


def test_loops_are_told_apart():
    params = {"v": W, "w": W}

    def function(p, x):
        x = lax.scan(lambda x, w: (layer(x, w), None), x, p["v"])[0]
        return lax.scan(lambda x, w: (layer(x, w), None), x, p["w"])[0]

    split = find_split(function, leaves_of(params), (X,), {0: (0,), 1: (0,)})
    assert split.loops[0] != split.loops[1]


@pytest.mark.parametrize("axis", [1, 2])
def test_layers_along_another_axis(axis):
    params = {"w": jnp.moveaxis(W, 0, axis)}

    def function(p, x):
        return lax.scan(lambda x, w: (layer(x, w), None), x, jnp.moveaxis(p["w"], axis, 0))[0]

    split = find_split(function, leaves_of(params), (X,), {0: (axis,)})
    parameters = [brought(value) for value in split.apart()]
    assert [w.shape for w in parameters] == [(D, D)] * L + [()] * L
    np.testing.assert_allclose(unrolled(function, split)(parameters, X), function(params, X), rtol=1e-6)


@pytest.mark.parametrize("axes", [(0, 1), (1, 0)])
def test_loops_in_loops(axes):
    params = {"w": jnp.transpose(jnp.stack([W, 2 * W]), [*axes, 2, 3])}

    def function(p, x):
        inner = lambda x, w: (layer(x, w), None)  # noqa: E731
        return lax.scan(lambda x, w: lax.scan(inner, x, w), x, jnp.transpose(p["w"], [*axes, 3, 2]))[0]

    split = find_split(function, leaves_of(params), (X,), {0: (0, 1)})
    parameters = [brought(value) for value in split.apart()]
    assert len(parameters) == 2 * L + L
    np.testing.assert_allclose(unrolled(function, split)(parameters, X), function(params, X), rtol=1e-6)


def test_a_stack_that_is_used_as_a_whole_elsewhere():
    """One that is scanned beside a weight is put together again there."""

    def function(p, x):
        return scanned(p, x) + jnp.sum(p["b"])

    split = find_split(function, leaves_of(PARAMS), (X,), {1: (0,)})
    parameters = [brought(value) for value in split.apart()]
    np.testing.assert_allclose(unrolled(function, split)(parameters, X), function(PARAMS, X), rtol=1e-6)


PICKED = {
    "a loop that picks": lambda p, x: lax.fori_loop(0, L, lambda i, x: layer(x, p["w"][i]), x),
    "a scan over numbers": lambda p, x: lax.scan(lambda x, i: (layer(x, p["w"][i]), None), x, jnp.arange(L))[0],
    "used as a whole": lambda p, x: scanned(p, x) * jnp.max(p["w"]),
    "a slice with strides": lambda p, x: layer(x, p["w"][::2][1]),
    "scanned along another axis": lambda p, x: lax.scan(lambda x, w: (x + w.sum(), None), x, p["w"].swapaxes(0, 1))[0],
}


@pytest.mark.parametrize("name", PICKED)
def test_none_where_layers_are_picked(name):
    assert find_split(PICKED[name], leaves_of(PARAMS), (X,), {1: (0,)}) is None
