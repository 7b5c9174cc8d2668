"""Loops over more programs than a CPU device has places for; jaxlib 0.10 aborts the process if they are not paced."""

import jax
import jax.numpy as jnp
import pytest

import jaxfp4
from jaxfp4.tensors.hadamard import hadamard
from tests.tensors.meshes import mesh

COUNT = 48
"""A device has 32 places."""


@pytest.fixture(scope="module")
def split():
    whole = jax.random.normal(jax.random.key(0), (1024, 1024))
    return jax.device_put(whole, jax.NamedSharding(mesh("tp8"), jax.P("tp")))


def costly(x):
    return jax.lax.fori_loop(0, 20, lambda _, x: 0.5 * x + 1, x)


def test_quantize_params(split):
    other = jax.device_put(split, jax.NamedSharding(mesh("tp8"), jax.P(None, "tp")))
    params = {f"layer_{i}": {"kernel": other if i % 2 else split} for i in range(2 * COUNT)}

    def apply_fn(params, x):
        return [x @ layer["kernel"] for layer in params.values()]

    plan = jaxfp4.plan(apply_fn, params, jnp.ones((1, 1024)))
    qparams = jaxfp4.quantize_params(params, plan)
    digests = {jaxfp4.digest(layer["kernel"]) for layer in qparams.values()}
    assert len(plan.quantized) == 2 * COUNT and len(digests) == 1


def test_calibrate(split):
    rows = jax.device_put(jnp.ones((8, 1024)), jax.NamedSharding(mesh("tp8"), jax.P("tp")))

    def apply_fn(params, x):
        return costly(x) @ params["kernel"]

    plan = jaxfp4.plan(apply_fn, {"kernel": split}, rows)
    stats = jaxfp4.calibrate(apply_fn, {"kernel": split}, [rows] * COUNT, plan, progress=False)
    assert all(x.is_ready() for x in jax.tree.leaves(stats))


@pytest.mark.parametrize(
    "function",
    [
        jaxfp4.global_amax,
        jaxfp4.block_amax,
        jaxfp4.fake_quantize,
        lambda x: hadamard(x, 1, 16),
        lambda x: jaxfp4.quantize(x, 1).dequantize(),
    ],
    ids=["global_amax", "block_amax", "fake_quantize", "hadamard", "dequantize"],
)
def test_of_one_array(split, function):
    results = [function(split) for _ in range(COUNT)]
    assert all(x.is_ready() for x in results)
