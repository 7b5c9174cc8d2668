"""Observing one layer of stacked weights gives what observing all gives for that layer, in one layer's memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType

from jaxfp4.algorithms.inputs import leaves_for, tracked_weight
from jaxfp4.recipes import plan
from jaxfp4.transform.evaluate import evaluate
from jaxfp4.transform.jaxprs import body_of
from jaxfp4.transform.scope import Hooks
from jaxfp4.transform.sites import OBSERVED
from jaxfp4.transform.statistics import AbsoluteMaximum, MomentForm, SecondMoments, Statistics
from jaxfp4.transform.trace import trace

from .cases import CASES, EVERYTHING, Case, Found

STACKED = [name for name, case in CASES.items() if any(found.layers for found in case.found.values())]


def twice(p, x, xs):
    """Layers in a loop, then all at once."""
    x = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]
    return x, jnp.einsum("lti,lij->ltj", xs, p["w"])


TWICE = Case(
    twice,
    {"w": (3, 8, 8)},
    {"w": Found((1,), (0,))},
    lambda p, x, xs: {},
    (5, 8),
    (np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32),),
)


def loop_in_shard_map(p, x, check_vma):
    mapped = jax.shard_map(
        lambda w, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0],
        mesh=jax.make_mesh((2, 4), ("tp", "ep"), axis_types=(AxisType.Auto,) * 2),
        in_specs=(P(), P("tp")),
        out_specs=P("tp"),
        check_vma=check_vma,
    )
    return mapped(p["w"], x)


def shard_map_in_loop(p, x):
    def product(w, x):
        return jnp.tanh(jax.lax.psum(jnp.einsum("td,edf->tef", x, w).sum(1), "ep"))

    mesh = jax.make_mesh((2, 4), ("tp", "ep"), axis_types=(AxisType.Auto,) * 2)
    inner = jax.shard_map(product, mesh=mesh, in_specs=(P("ep"), P()), out_specs=P())
    return jax.lax.scan(lambda c, w: (inner(w, c), None), x, p["w"])[0]


MORE = {
    "twice": TWICE,
    "loop in a shard_map": Case(
        functools.partial(loop_in_shard_map, check_vma=True), {"w": (3, 16, 16)}, {}, lambda p, x: {}, (8, 16)
    ),
    "loop in an unchecked shard_map": Case(
        functools.partial(loop_in_shard_map, check_vma=False), {"w": (3, 16, 16)}, {}, lambda p, x: {}, (8, 16)
    ),
    "shard_map in a loop": Case(shard_map_in_loop, {"w": (2, 4, 16, 16)}, {}, lambda p, x: {}, (8, 16)),
}


def observer(case, params, args):
    """A function of flags by path that gives the statistics by path, and the plan."""
    result = plan(case.apply, params, *args, recipe=EVERYTHING)
    leaves = leaves_for(result, params)
    traced = trace(case.apply, leaves, args)
    statistics = {
        e.weight.leaf: Statistics(
            (("amax", AbsoluteMaximum()), ("moments", SecondMoments(e.channels, MomentForm.FULL)))
        )
        for e in result.quantized
    }

    def observe(flags):
        inputs = [jnp.asarray(v) for v in leaves.values]
        for e in result.quantized:
            tracked = tracked_weight(e, inputs[e.weight.leaf])
            scales = {OBSERVED: flags[e.path]} if e.path in flags else {}
            inputs[e.weight.leaf] = dataclasses.replace(tracked, scales=scales)
        found = evaluate(traced.body, [*inputs, *jax.tree.leaves(args)], Hooks(statistics=statistics))[1]
        return {e.path: found[e.weight.leaf] for e in result.quantized if e.weight.leaf in found}

    return observe, result


def flags_of(result, number):
    """One layer of each stacked weight, by path: its index and its flags."""
    found = {}
    for e in result.quantized:
        sizes = e.weight.sizes(e.weight.layer_axes)
        if sizes:
            index = np.unravel_index(number % math.prod(sizes), sizes)
            found[e.path] = index, jnp.zeros(sizes).at[index].set(1)
    return found


@pytest.mark.parametrize("name", [*STACKED, *MORE])
def test_it_is_the_layer_of_the_whole(name):
    case = MORE[name] if name in MORE else CASES[name]
    observe, result = observer(case, case.params(), case.args())
    whole = jax.jit(observe)({})
    alone = jax.jit(observe)
    for number in range(3):
        chosen = flags_of(result, number)
        found = alone({path: flags for path, (_, flags) in chosen.items()})
        assert found.keys() == whole.keys()
        for e in result.quantized:
            index = dict(zip(e.weight.layer_axes, chosen[e.path][0], strict=True)) if e.path in chosen else {}
            place = tuple(index.get(a, slice(None)) for a in e.weight.stack_axes)
            wanted = jax.tree.map(lambda s, place=place: s[place], whole[e.path])
            np.testing.assert_array_equal(found[e.path]["amax"], wanted["amax"], err_msg=e.path)
            np.testing.assert_allclose(found[e.path]["moments"], wanted["moments"], rtol=1e-5, atol=1e-4)


def shapes_in(body):
    """Of all arrays that a jaxpr makes, those of the bodies inside included."""
    for eqn in body.jaxpr.eqns:
        yield from (tuple(v.aval.shape) for v in eqn.outvars)
        for parameter in eqn.params.values():
            for inner in parameter if isinstance(parameter, tuple) else (parameter,):
                if isinstance(inner, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)):
                    yield from shapes_in(body_of(inner))


@pytest.mark.parametrize("form", ["scanned", "indexed"])
def test_no_array_holds_the_moments_of_all_layers(form):
    layers, width = 3, 24

    def scanned(p, x):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]

    def indexed(p, x):
        for i in range(layers):
            x = jnp.tanh(x @ p["w"][i])
        return x

    apply = scanned if form == "scanned" else indexed
    case = Case(apply, {"w": (layers, width, width)}, {}, lambda p, x: {}, (5, width))
    observe, result = observer(case, case.params(), case.args())
    flags = {path: f for path, (_, f) in flags_of(result, 0).items()}
    moments = (layers, width, width)
    # The weight has that shape too, but nothing makes it.
    assert moments in set(shapes_in(body_of(jax.make_jaxpr(observe)({}))))
    assert moments not in set(shapes_in(body_of(jax.make_jaxpr(observe)(flags))))
