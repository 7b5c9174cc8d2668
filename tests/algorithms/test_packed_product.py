"""Contractions that go to the kernel of packed weights: which do, and that its results have the right places."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.algorithms import packed_product, quantize_params, quantized
from jaxfp4.kernels.matmul import Tiles, packed_matmul
from jaxfp4.recipes import plan

from .test_simulation import dequantized

# From 0.12 on JAX warns that its Triton backend is going to be removed.

K, N, T = 64, 48, 3
TILES = Tiles(columns=64, programs=1, warps=1)


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


PRODUCTS = {
    "first": (lambda x, w: x @ w, (T, K), (K, N)),
    "vector": (lambda x, w: x @ w, (K,), (K, N)),
    "contraction inside": (lambda x, w: jnp.einsum("akb,kn->abn", x, w), (2, K, T), (K, N)),
    "last": (lambda x, w: jnp.einsum("tk,nk->tn", x, w), (T, K), (N, K)),
    "weight on the left": (lambda x, w: jax.lax.dot_general(w, x, (((0,), (1,)), ((), ()))), (T, K), (K, N)),
    "experts inside": (lambda x, w: jnp.einsum("tek,ekn->ten", x, w), (T, 2, K), (2, K, N)),
    "float32 result": (lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32), (T, K), (K, N)),
}


def model(name):
    """A one-product model: function, weights, activation."""
    function, x_shape, w_shape = PRODUCTS[name]
    return lambda p, x: function(x, p["w"]), {"w": draw(*w_shape)}, draw(*x_shape, seed=1)


@functools.cache
def prepared(name):
    """The model's function, plan, quantized weights and activation; the same in every test."""
    apply, params, x = model(name)
    result = plan(apply, params, x, recipe="nvfp4_weight_only")
    assert result.quantized
    return apply, result, quantize_params(params, result), x


@pytest.fixture
def small_weights_too(monkeypatch):
    monkeypatch.setattr(packed_product, "SMALLEST_WEIGHT", 0)


@pytest.fixture
def kernel_on_the_cpu(monkeypatch, small_weights_too):
    """As on a GPU, the kernel in Pallas' interpreter."""
    interpreted = functools.partial(packed_matmul, interpret=True, tiles=TILES)
    monkeypatch.setattr(packed_product, "packed_matmul", interpreted)
    monkeypatch.setattr(packed_product.lax, "platform_dependent", lambda *operands, cuda, default: cuda(*operands))


def exact(apply, qparams, x):
    """The product in float32 of the weight as it is not rounded to bfloat16."""
    w = qparams["w"].weight.dequantize(jnp.float32)
    with jax.default_matmul_precision("highest"):
        return np.asarray(apply({"w": w}, x.astype(jnp.float32)))


@functools.cache
def plain_product(name):
    """Of the dequantized weight, as the model has it."""
    apply, _, qparams, x = prepared(name)
    return jax.jit(apply)(dequantized(qparams), x)


@pytest.mark.parametrize("name", PRODUCTS)
def test_kernel_result_is_the_product(kernel_on_the_cpu, name):
    apply, result, qparams, x = prepared(name)
    found = quantized(apply, result)(qparams, x)
    plain = plain_product(name)
    assert (found.shape, found.dtype) == (plain.shape, plain.dtype)
    np.testing.assert_allclose(found.astype(jnp.float32), exact(apply, qparams, x), rtol=2.0**-8, atol=1e-4)
    assert not np.array_equal(found, plain), "the weight is not rounded, so the kernel has not run"


@pytest.mark.parametrize("name", ["first", "weight on the left", "experts inside"])
def test_other_platforms_keep_every_bit(small_weights_too, name):
    apply, result, qparams, x = prepared(name)
    np.testing.assert_array_equal(quantized(apply, result)(qparams, x), plain_product(name))


def test_other_platforms_keep_every_bit_of_gradients(small_weights_too):
    apply, result, qparams, x = prepared("last")
    run = quantized(apply, result)
    gradient = jax.grad(lambda x: run(qparams, x).astype(jnp.float32).sum())(x)
    wanted = jax.grad(lambda x: jax.jit(apply)(dequantized(qparams), x).astype(jnp.float32).sum())(x)
    np.testing.assert_array_equal(gradient, wanted)


def test_derivatives_are_those_of_the_plain_product(kernel_on_the_cpu):
    apply, result, qparams, x = prepared("first")
    run = quantized(apply, result)
    _, tangent = jax.jvp(lambda x: run(qparams, x), (x,), (x,))
    np.testing.assert_array_equal(tangent, plain_product("first"))


def test_vmap_takes_the_plain_product(kernel_on_the_cpu):
    apply, result, qparams, x = prepared("first")
    found = jax.vmap(quantized(apply, result), in_axes=(None, 0))(qparams, jnp.stack([x, -x]))
    plain = plain_product("first")
    np.testing.assert_array_equal(found, jnp.stack([plain, -plain]))


def test_many_rows_take_the_plain_product(kernel_on_the_cpu):
    apply, params, _ = model("first")
    x = draw(65, K, seed=1)
    result = plan(apply, params, x, recipe="nvfp4_weight_only")
    qparams = quantize_params(params, result)
    np.testing.assert_array_equal(quantized(apply, result)(qparams, x), jax.jit(apply)(dequantized(qparams), x))


def test_small_weights_take_the_plain_product(kernel_on_the_cpu, monkeypatch):
    monkeypatch.setattr(packed_product, "SMALLEST_WEIGHT", K * N + 1)
    apply, result, qparams, x = prepared("first")
    np.testing.assert_array_equal(quantized(apply, result)(qparams, x), plain_product("first"))


def test_arrays_that_may_be_split_take_the_plain_product(kernel_on_the_cpu):
    """On a mesh, or traced where there are eight devices: the compiler cannot partition a kernel."""
    apply, result, qparams, x = prepared("first")
    run = quantized(apply, result)
    plain = plain_product("first")
    np.testing.assert_array_equal(jax.jit(run)(qparams, x), plain)
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P()))
    on_mesh = jax.device_put(qparams, jax.NamedSharding(mesh, jax.P()))
    np.testing.assert_array_equal(run(on_mesh, split), plain)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [0, 1])
def test_on_the_gpu(axis):
    """A large weight, one row to several: the kernel's result is nearer to the product than bfloat16 can show."""
    equation = "tk,kn->tn" if axis == 0 else "tk,nk->tn"
    params, x = {"w": draw(1024, 2048)}, draw(4, (1024, 2048)[axis], seed=1)

    def apply(p, x):
        return jnp.einsum(equation, x, p["w"])

    result = plan(apply, params, x, recipe="nvfp4_weight_only")
    qparams = quantize_params(params, result)
    run = quantized(apply, result)
    found = np.asarray(run(qparams, x), np.float32)
    wanted = exact(apply, qparams, x)
    np.testing.assert_allclose(found, wanted, rtol=2.0**-8, atol=1e-3 * np.abs(wanted).max())
    assert jax.grad(lambda x: run(qparams, x).astype(jnp.float32).sum())(x).shape == x.shape
