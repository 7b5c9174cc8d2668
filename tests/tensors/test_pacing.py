"""When `paced` waits, and when it does not."""

import jax
import jax.numpy as jnp
import pytest

from jaxfp4.tensors.pacing import paced
from tests.tensors.meshes import mesh


def costly(x):
    # The CPU client computes at once what it takes for cheap, and a busy machine may not look for a while.
    return jax.lax.fori_loop(0, 400, lambda _, x: 0.5 * (x @ x), x)


@pytest.fixture
def whole():
    return jnp.eye(256)


@pytest.fixture
def split(whole):
    return jax.device_put(whole, jax.NamedSharding(mesh("tp8"), jax.P("tp")))


def test_waits_for_several_cpu_devices(split):
    assert not jax.jit(costly)(split).is_ready()
    assert all(
        x.is_ready() for x in paced(jax.jit(lambda x: {"a": costly(x), "b": jnp.max(costly(x))}))(split).values()
    )


def test_does_not_wait_for_one_device(whole):
    assert not paced(jax.jit(costly))(whole).is_ready()


def test_traced_results_pass(split):
    assert jax.jit(paced(costly))(split).shape == split.shape
    assert jax.eval_shape(paced(costly), split).shape == split.shape


def test_keeps_the_name():
    assert paced(costly).__name__ == "costly"


@pytest.mark.parametrize("tree", [None, (), 1.5, {"a": "text"}])
def test_results_without_arrays(tree):
    assert paced(lambda: tree)() == tree
