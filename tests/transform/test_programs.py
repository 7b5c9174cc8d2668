"""Programs are equal if they compute the same, whatever their variables are called."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.transform import jaxprs
from jaxfp4.transform.programs import Program

X = jnp.arange(6.0).reshape(2, 3)


def program(function, *args):
    body = jaxprs.body_of(jax.make_jaxpr(function)(*args or (X,)))
    assert not body.consts
    return Program(tuple(body.jaxpr.eqns), tuple(body.jaxpr.outvars))


def layer(x):
    h = jax.nn.gelu(jax.jit(lambda x: x @ x.T)(x))
    return jax.lax.scan(lambda c, y: (c + y, c), h[0], h)


SAME = {
    "a layer with calls and a scan": layer,
    "custom derivatives": jax.nn.relu,
    "remat": lambda x: jax.checkpoint(jnp.sin)(x),
    "cond": lambda x: jax.lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
    "an array in a parameter": lambda x: jax.lax.pad(x, np.float32(0), [(0, 1, 0), (1, 0, 0)]),
}


@pytest.mark.parametrize("name", SAME)
def test_equal_programs(name):
    one, other = program(SAME[name]), program(lambda x: SAME[name](x))
    assert one == other and hash(one) == hash(other) and one == one
    assert one.inputs != other.inputs
    for found, wanted in zip(other([X]), jax.tree.leaves(SAME[name](X)), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


OTHERS = {
    "another primitive": (jnp.sin, jnp.cos),
    "another literal": (lambda x: x * 2, lambda x: x * 3),
    "another zero": (lambda x: x * 0.0, lambda x: x * -0.0),
    "another parameter": (lambda x: jnp.sum(x, 0), lambda x: jnp.sum(x, 1)),
    "another order of operands": (lambda x: x - x[0], lambda x: x[0] - x),
    "another result": (lambda x: (x + 1, x + 2)[0], lambda x: (x + 1, x + 2)[1]),
    "another inner function": (lambda x: jax.jit(jnp.sin)(x), lambda x: jax.jit(jnp.cos)(x)),
    "another body of a loop": (
        lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x + 1, x),
        lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x + 2, x),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_programs(name):
    one, other = (program(f) for f in OTHERS[name])
    assert one != other and one != "something else"


def test_shapes_and_inputs_tell_programs_apart():
    assert program(jnp.sin, X) != program(jnp.sin, X[0])
    assert program(lambda x, y: x * y, X, X) != program(lambda x, y: x * x, X, X)
    assert program(lambda x, y: x - y, X, X).inputs != program(lambda x, y: y - x, X, X).inputs
    # Inputs are numbered by their first use.
    assert program(lambda x, y: x - y, X, X) == program(lambda x, y: y - x, X, X)


def test_one_compilation_serves_equal_programs(caplog):
    run = jax.jit(lambda program, values: program(values), static_argnums=0)
    with jax.log_compiles():
        for _ in range(3):
            run(program(lambda x: layer(x)), [X])
    assert len([m for m in caplog.messages if m.startswith("Compiling jit(<lambda>)")]) == 1
