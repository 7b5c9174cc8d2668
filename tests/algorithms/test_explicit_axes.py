"""Calibration on a mesh of Explicit axes: statistics, digests and outputs are those of one device."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding, reshard

from jaxfp4.algorithms import calibrate, digest, observed, quantize_params, quantize_sequentially, quantized
from jaxfp4.recipes import plan

D = 64
RNG = np.random.default_rng(0)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("tp", "ep"), axis_types=(AxisType.Explicit,) * 2)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of activations and a weight, and ways in which activations may be split."""

    equation: str
    x: Any
    w: Any
    w_spec: P
    x_specs: tuple[P, ...]

    def apply(self, out_sharding: P | None) -> Callable[..., Any]:
        return lambda p, x: jnp.einsum(self.equation, x, p["w"], out_sharding=out_sharding)


PRODUCTS = {
    "rows": Product(
        "tk,kn->tn", draw(16, D), draw(D, D), P(), (P("tp"), P(None, "ep"), P("tp", "ep"), P(("tp", "ep")))
    ),
    "batches": Product(
        "btk,kn->btn",
        draw(4, 8, D),
        draw(D, D),
        P("ep"),
        (P("tp"), P(None, "tp"), P("tp", None, "ep"), P("tp", "ep"), P(None, None, ("tp", "ep"))),
    ),
    "experts": Product(
        "etk,ekn->etn", draw(4, 8, D), draw(4, D, D), P("ep"), (P("ep"), P("ep", "tp"), P("ep", None, "tp"))
    ),
    "heads": Product(
        "bthd,hdn->btn",
        draw(4, 8, 8, 8),
        draw(8, 8, D),
        P("ep"),
        (P("tp"), P(None, None, "ep"), P(None, "tp", None, "ep")),
    ),
}
EACH = [(name, spec, "nvfp4_gptq") for name, product in PRODUCTS.items() for spec in product.x_specs]
SOME = [
    (name, product.x_specs[i], recipe)
    for name, product in PRODUCTS.items()
    for i, recipe in ((1, "nvfp4_local_hessian"), (-1, "nvfp4_hadamard"))
]


@functools.cache
def on_one_device(name: str, recipe: str) -> tuple[Any, Any, str, Any]:
    """The plan, the statistics, the digest and the quantized model's outputs."""
    product = PRODUCTS[name]
    apply, params = product.apply(None), {"w": product.w}
    result = plan(apply, params, product.x, recipe=recipe)
    stats = jax.jit(observed(apply, result))(params, product.x)[1]
    weights = quantize_params(params, result, stats)
    return result, stats, digest(weights), jax.jit(quantized(apply, result))(weights, product.x)


@pytest.mark.parametrize(("name", "spec", "recipe"), [*EACH, *SOME], ids=str)
def test_split_activations(name, spec, recipe):
    product = PRODUCTS[name]
    result, expected, wanted, outputs = on_one_device(name, recipe)
    with jax.set_mesh(mesh()):
        apply = product.apply(P())
        split = {"w": jax.device_put(product.w, NamedSharding(mesh(), product.w_spec))}
        x = jax.device_put(product.x, NamedSharding(mesh(), spec))
        on_mesh = plan(apply, split, x, recipe=recipe)
        assert on_mesh == result
        stats = jax.jit(observed(apply, on_mesh))(split, x)[1]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), stats, expected)
        np.testing.assert_array_equal(stats["w"]["amax"], expected["w"]["amax"])
        found = quantize_params(split, on_mesh, stats)
        # Sums are in another order: few codes may move, none does here.
        assert digest(found) == wanted
        np.testing.assert_allclose(jax.jit(quantized(apply, on_mesh))(found, x), outputs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("recipe", "memory_kind"), [("nvfp4", "pinned_host"), ("nvfp4_gptq", "device")])
def test_layers_in_a_scan(recipe, memory_kind):
    """At once and layer by layer."""
    params, batches = {"w": draw(3, D, D) / 8}, [draw(24, D) for _ in range(2)]

    def whole(p, x):
        return jax.lax.scan(lambda c, w: (jax.nn.relu(c @ w), None), x, p["w"])[0]

    def split(p, x):
        return jax.lax.scan(lambda c, w: (reshard(jax.nn.relu(c @ w), P("tp", None)), None), x, p["w"])[0]

    result = plan(whole, params, batches[0], recipe=recipe)
    expected = quantize_params(params, result, calibrate(whole, params, batches, result, progress=False))
    sequential = quantize_sequentially(whole, params, batches, result, progress=False)
    with jax.set_mesh(mesh()):
        params = {"w": jax.device_put(params["w"], NamedSharding(mesh(), P(None, None, "ep"), memory_kind=memory_kind))}
        batches = [jax.device_put(x, NamedSharding(mesh(), P("tp", None))) for x in batches]
        on_mesh = plan(split, params, batches[0], recipe=recipe)
        stats = calibrate(split, params, batches, on_mesh, progress=False)
        assert digest(quantize_params(params, on_mesh, stats)) == digest(expected)
        assert digest(quantize_sequentially(split, params, batches, on_mesh, progress=False)) == digest(sequential)
