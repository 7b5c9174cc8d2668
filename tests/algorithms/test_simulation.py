"""The function with the plan's numerics, against the plain one on dequantized values and hand-written code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxfp4
from jaxfp4.algorithms import calibrate, input_scales, quantize_params, quantized
from jaxfp4.formats import LeafError
from jaxfp4.recipes import plan
from jaxfp4.tensors import QuantizedWeight

from . import models

D, F, T = 32, 16, 6
TOKENS = models.batches(1)[0]
STACKED = models.draw()


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def dequantized(qparams):
    """The parameters that the quantized ones stand for."""
    is_weight = lambda leaf: isinstance(leaf, QuantizedWeight)  # noqa: E731
    return jax.tree.map(lambda v: v.weight.dequantize() if is_weight(v) else v, qparams, is_leaf=is_weight)


@pytest.mark.parametrize("form", ["scanned", "sliced"])
def test_w4a16_is_the_function_of_the_dequantized_weights(form):
    """Bit for bit: dequantizing is elementwise in float32, so fusing it with its neighbours rounds nothing anew."""
    apply = getattr(models, form)
    result = plan(apply, STACKED, TOKENS, recipe="nvfp4_weight_only")
    qparams = quantize_params(STACKED, result)
    expected = jax.jit(apply)(dequantized(qparams), TOKENS)
    np.testing.assert_array_equal(quantized(apply, result)(qparams, TOKENS), expected)
    assert np.abs(expected - jax.jit(apply)(STACKED, TOKENS)).max() > 0.01


def mlp(p, x):
    h = jax.nn.relu(x @ p["up"]) * (x @ p["gate"])
    return h.astype(jnp.bfloat16) @ p["down"].astype(jnp.bfloat16)


MLP = {"up": draw(D, F), "gate": draw(D, F, seed=1), "down": draw(F, D, seed=2)}
X = draw(T, D, seed=3)


def simulated_mlp(qparams, x, amax=lambda name: None):
    """What W4A4 means, written at each matrix product."""
    p = dequantized(qparams)
    x = jaxfp4.fake_quantize(x, -1, global_amax=amax("up"))
    h = jax.nn.relu(x @ p["up"]) * (x @ p["gate"])
    h = jaxfp4.fake_quantize(h.astype(jnp.bfloat16), -1, global_amax=amax("down"))
    return h @ p["down"].astype(jnp.bfloat16)


@pytest.mark.parametrize("calibrated", [True, False])
def test_w4a4_is_fake_quantize_at_each_product(calibrated):
    """With calibrated amaxes, and without statistics with those of the activation at hand."""
    result = plan(mlp, MLP, X)
    stats = calibrate(mlp, MLP, [X * 0.9], result, progress=False) if calibrated else None
    qparams = quantize_params(MLP, result, stats)
    expected = jax.jit(lambda q, x: simulated_mlp(q, x, lambda n: stats[n]["amax"] if calibrated else None))(qparams, X)
    np.testing.assert_array_equal(quantized(mlp, result)(qparams, X), expected)


def test_w4a4_of_the_language_model():
    """Each layer's own scales reach its contractions, in a scan as in a loop over a list."""
    outputs = []
    for form in ("scanned", "unrolled"):
        apply = getattr(models, form)
        params = models.apart(STACKED) if form == "unrolled" else STACKED
        result = plan(apply, params, TOKENS)
        stats = calibrate(apply, params, models.batches(), result, progress=False)
        outputs.append(quantized(apply, result)(quantize_params(params, result, stats), TOKENS))
    np.testing.assert_allclose(*outputs, atol=0.05 * float(jnp.abs(outputs[0]).max()))
    plain = jax.jit(models.scanned)(STACKED, TOKENS)
    error = jnp.linalg.norm(outputs[0] - plain) / jnp.linalg.norm(plain)
    assert 0.01 < error < 0.3


def layers(p, x):
    return lax.scan(lambda c, w: (c @ w, None), x, p["w"])[0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_scales_of_layers_stacked_along_any_axis(axis):
    """Each step of the scan gets its own layer's input scale."""
    w = draw(3, D, D) / 4

    def apply(p, x):
        return layers({"w": jnp.moveaxis(p["w"], axis, 0)}, x)

    params = {"w": jnp.moveaxis(w, 0, axis)}
    result = plan(apply, params, X)
    stats = calibrate(apply, params, [X], result, progress=False)
    qparams = quantize_params(params, result, stats)
    expected = X
    for i in range(3):
        q = jaxfp4.quantize(w[i], 0)
        expected = jaxfp4.fake_quantize(expected, -1, global_amax=stats["w"]["amax"][i]) @ q.dequantize()
    np.testing.assert_allclose(quantized(apply, result)(qparams, X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["slices", "fori_loop"])
def test_scales_of_layers_taken_by_index(form):
    """A layer taken out of a stack brings its own input scale."""
    w = draw(3, D, D) / 4

    def apply(p, x):
        if form == "fori_loop":
            return lax.fori_loop(0, 3, lambda i, c: c @ p["w"][i], x)
        for i in range(3):
            x = x @ p["w"][i]
        return x

    result = plan(apply, {"w": w}, X)
    amaxes = jnp.abs(X).max() * jnp.array([1, 7, 0.2])
    expected = X
    for layer, amax in zip(w, amaxes, strict=True):
        expected = jaxfp4.fake_quantize(expected, -1, global_amax=amax) @ jaxfp4.quantize(layer, 0).dequantize()
    found = quantized(apply, result)(quantize_params({"w": w}, result, {"w": {"amax": amaxes}}), X)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "contraction",
    [
        lambda x, w: jnp.einsum("thk,hkd->td", x, w),
        lambda x, w: lax.dot_general(x, w, (((2, 1), (1, 0)), ((), ()))),
        lambda x, w: jnp.einsum("tkh,hkd->td", jnp.swapaxes(x, 1, 2), w),
    ],
)
def test_blocks_run_along_the_weights_own_axes(contraction):
    """Over two axes of 8 and 24, however they are listed, the activation's blocks are those of the weight."""
    params, x = {"w": draw(8, 24, F)}, draw(T, 8, 24, seed=1)

    def apply(p, x):
        return contraction(x, p["w"])

    result = plan(apply, params, x)
    qparams = quantize_params(params, result)
    expected = jaxfp4.fake_quantize(x, (1, 2)).reshape(T, -1) @ dequantized(qparams)["w"].reshape(-1, F)
    np.testing.assert_allclose(quantized(apply, result)(qparams, x), expected, rtol=1e-5, atol=1e-5)


# pre_scale.


def with_pre_scale(qparams, name, pre_scale):
    return qparams | {name: dataclasses.replace(qparams[name], pre_scale=pre_scale)}


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_weight_only"])
def test_pre_scale(recipe):
    """Factors for the activation's channels, multiplied in before it is quantized."""
    result = plan(mlp, MLP, X, recipe=recipe)
    factors = jnp.exp2(jnp.arange(F) % 5 - 2.0)
    qparams = with_pre_scale(quantize_params(MLP, result), "down", factors)
    fake = jaxfp4.fake_quantize if recipe == "nvfp4" else lambda x: x

    def expected(q, x):
        p = dequantized(q)
        x = fake(x)
        h = (jax.nn.relu(x @ p["up"]) * (x @ p["gate"])).astype(jnp.bfloat16)
        return fake((h * factors).astype(h.dtype)) @ p["down"].astype(jnp.bfloat16)

    np.testing.assert_array_equal(quantized(mlp, result)(qparams, X), jax.jit(expected)(qparams, X))


@pytest.mark.parametrize("order", ["thk", "tkh", "htk"])
def test_pre_scale_over_two_axes(order):
    params, x = {"w": draw(2, 16, F)}, draw(T, 2, 16, seed=1)

    def apply(p, x):
        return jnp.einsum(f"{order},hkd->td", jnp.einsum(f"thk->{order}", x), p["w"])

    result = plan(apply, params, x, recipe="nvfp4_weight_only")
    factors = draw(2, 16, seed=2)
    qparams = with_pre_scale(quantize_params(params, result), "w", factors)
    expected = (x * factors).reshape(T, -1) @ dequantized(qparams)["w"].reshape(-1, F)
    np.testing.assert_allclose(quantized(apply, result)(qparams, x), expected, rtol=1e-5, atol=1e-5)


def test_pre_scale_of_layers():
    params = {"w": draw(3, D, D) / 4}
    result = plan(layers, params, X, recipe="nvfp4_weight_only")
    factors = draw(3, D, seed=2)
    qparams = with_pre_scale(quantize_params(params, result), "w", factors)
    expected = X
    for factor, w in zip(factors, dequantized(qparams)["w"], strict=True):
        expected = (expected * factor) @ w
    np.testing.assert_allclose(quantized(layers, result)(qparams, X), expected, rtol=1e-4, atol=1e-4)


# Transformations of the quantized function.


def test_gradient_is_straight_through():
    """The derivative for the activation is that of the product with the dequantized weight."""
    params = {"w": draw(D, F)}
    result = plan(lambda p, x: x @ p["w"], params, X)
    qparams = quantize_params(params, result, {"w": {"amax": jnp.abs(X).max()}})
    gradient = jax.grad(lambda x: quantized(lambda p, x: x @ p["w"], result)(qparams, x).sum())(X)
    expected = jnp.broadcast_to(dequantized(qparams)["w"].sum(1), X.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_gradient_through_layers_and_remat():
    def apply(p, x):
        return layers({"w": p["w"]}, x) + jax.checkpoint(lambda c: jnp.tanh(c) @ p["w"][0])(x)

    def loss(f):
        return jax.grad(lambda x: (f(x) ** 2).sum())

    params = {"w": draw(3, D, D) / 4}
    result = plan(apply, params, X)
    qparams = quantize_params(params, result, calibrate(apply, params, [X], result, progress=False))
    found = loss(lambda x: quantized(apply, result)(qparams, x))(X)
    plain = loss(lambda x: apply(dequantized(qparams), x))(X)
    cosine = (found * plain).sum() / jnp.linalg.norm(found) / jnp.linalg.norm(plain)
    assert 0.95 < cosine < 0.9999


def test_vmap_and_jit():
    result = plan(mlp, MLP, X)
    qparams = quantize_params(MLP, result, calibrate(mlp, MLP, [X], result, progress=False))
    run = quantized(mlp, result)
    batch = jnp.stack([X, X * 0.5, -X])
    found = jax.jit(jax.vmap(run, in_axes=(None, 0)))(qparams, batch)
    for one, x in zip(found, batch, strict=True):
        np.testing.assert_array_equal(one, run(qparams, x))


def test_vmap_over_weights():
    """An ensemble of quantized parameters."""
    result = plan(mlp, MLP, X)
    members = [quantize_params(jax.tree.map(lambda w, i=i: w * i, MLP), result) for i in (1, 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    found = jax.vmap(quantized(mlp, result), in_axes=(0, None))(stacked, X)
    for one, member in zip(found, members, strict=True):
        np.testing.assert_allclose(
            one.astype(jnp.float32), quantized(mlp, result)(member, X).astype(jnp.float32), rtol=0.02, atol=0.02
        )


def jaxprs_inside(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from jaxprs_inside(inner)


@pytest.mark.parametrize("scale", ["stack", "expert"])
def test_scans_run_over_packed_weights(scale):
    """uint8 codes enter the scan, so only one layer at a time is dequantized."""
    recipe = jaxfp4.recipes.get("nvfp4").with_expert_scale(scale)
    result = plan(models.scanned, STACKED, TOKENS, recipe=recipe)
    qparams = quantize_params(STACKED, result)
    jaxpr = jax.make_jaxpr(quantized(models.scanned, result))(qparams, TOKENS)
    (scan,) = [e for e in jaxprs_inside(jaxpr.jaxpr) if e.primitive.name == "scan"]
    codes = [v.aval for v in scan.invars if v.aval.dtype == jnp.uint8]
    expected = [qparams["layers"][n].weight.packed.shape for n in models.QUANTIZED]
    assert sorted(a.shape for a in codes) == sorted(expected)
    whole = {w.shape for n, w in STACKED["layers"].items() if n != "router"}
    assert not [v.aval for v in scan.invars if v.aval.shape in whole and v.aval.dtype == jnp.float32]


def test_parameters_of_another_plan():
    result = plan(mlp, MLP, X)
    with pytest.raises(LeafError, match=r"^up: shape \(32, 8\): wanted \(32, 16\), as in the plan"):
        quantized(mlp, result)(quantize_params(MLP, result) | {"up": jnp.ones((D, 8))}, X)


def test_plain_parameters_pass_too():
    """Weights that are still in full precision get quantized activations only."""
    result = plan(lambda p, x: x @ p["w"], {"w": MLP["up"]}, X)
    found = quantized(lambda p, x: x @ p["w"], result)({"w": MLP["up"]}, X)
    np.testing.assert_array_equal(found, jax.jit(lambda x: jaxfp4.fake_quantize(x) @ MLP["up"])(X))


def test_input_scale_is_used():
    """A larger calibrated amax gives a coarser activation, not the dynamic one."""
    result = plan(mlp, MLP, X)
    stats = calibrate(mlp, MLP, [X], result, progress=False)
    scales = input_scales(result, stats)
    outputs = [
        quantized(mlp, result)(quantize_params(MLP, result, jax.tree.map(lambda s, k=k: s * k, stats)), X)
        for k in (1.0, 50.0)
    ]
    assert scales["up"] == np.float32(np.abs(X).max()) / np.float32(2688)
    assert not np.array_equal(*outputs)
