"""Methods that use statistics: what they refuse, and what they do where there is nothing to go by."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxfp4
from jaxfp4.algorithms import calibrate, digest, fold_channel_scales, quantize_params
from jaxfp4.algorithms.awq import awq_scales
from jaxfp4.algorithms.encoders import encoder_for
from jaxfp4.algorithms.moments import reduced
from jaxfp4.algorithms.smoothquant import smoothquant_scales
from jaxfp4.formats import LeafError
from jaxfp4.recipes import Awq, Gptq, Hadamard, Method, Mse, Recipe, Rule, Scheme, SmoothQuant, WeightedMse, plan
from jaxfp4.tensors.hadamard import hadamard
from jaxfp4.transform.statistics import MomentForm

D, F, E, T = 32, 16, 4, 40
RNG = np.random.default_rng(0)
W = {"w": jnp.asarray(RNG.normal(size=(D, F)), jnp.float32)}
X = jnp.asarray(RNG.normal(size=(T, D)) * np.exp(RNG.normal(size=D)), jnp.float32)
USING_MOMENTS = ["nvfp4_weighted_mse", "nvfp4_local_hessian", "nvfp4_gptq", "nvfp4_weight_only_gptq"]


def product(p, x):
    return x @ p["w"]


def normed(p, x):
    return (x * p["scale"]) @ p["w"]


@pytest.mark.parametrize("recipe", USING_MOMENTS)
def test_no_calibration_data(recipe):
    with pytest.raises(LeafError, match=r"^w: .* needs the activation's second moments, but there are no statistics: "):
        quantize_params(W, plan(product, W, X, recipe=recipe))


@pytest.mark.parametrize("recipe", ["nvfp4_awq", "nvfp4_smoothquant"])
def test_no_calibration_data_for_channel_scales(recipe):
    params = {"scale": jnp.ones(D), **W}
    result = plan(normed, params, X, recipe=recipe)
    for refused in (quantize_params, fold_channel_scales):
        with pytest.raises(ValueError, match=r"^w: .* needs statistics of the activation, but there are none: wanted"):
            refused(params, result, None)


def test_an_encoder_without_moments():
    with pytest.raises(ValueError, match="gptq without second moments: wanted those of the activation; calibrate"):
        jaxfp4.tensors.quantize_unchecked(W["w"], 0, encoder=encoder_for(Method(Mse(), Gptq())))


def test_statistics_of_a_simpler_plan():
    stats = calibrate(product, W, [X], plan(product, W, X), progress=False)
    with pytest.raises(LeafError, match=r"^w: statistics 'moments' of shape nothing: wanted \(32, 32\); use plan"):
        quantize_params(W, plan(product, W, X, recipe="nvfp4_gptq"), stats)


def test_statistics_of_a_richer_plan_serve_a_simpler_one():
    rich = calibrate(product, W, [X], plan(product, W, X, recipe="nvfp4_gptq"), progress=False)
    simple = plan(product, W, X)
    expected = quantize_params(W, simple, calibrate(product, W, [X], simple, progress=False))
    assert digest(quantize_params(W, simple, rich), inputs=True) == digest(expected, inputs=True)


def routed(p, x):
    """Each token to one of the experts, none to expert 2."""
    sizes = jnp.array([T // 2, T // 4, 0, T // 4])
    return jax.lax.ragged_dot(x, p["w"], sizes)


@pytest.mark.parametrize(
    "recipe, fallback",
    [("nvfp4_weighted_mse", "nvfp4_mse"), ("nvfp4_local_hessian", "nvfp4_mse"), ("nvfp4_gptq", "nvfp4_mse")],
)
def test_experts_without_tokens_are_searched_unweighted(recipe, fallback, caplog):
    params = {"w": jnp.asarray(RNG.normal(size=(E, D, F)), jnp.float32)}
    result = plan(routed, params, X, recipe=recipe)
    stats = calibrate(routed, params, [X], result, progress=False)
    assert caplog.messages == ["w: no token reached experts [2]; they get their layer's shared scale"]
    found = quantize_params(params, result, stats)["w"].weight
    expected = quantize_params(params, plan(routed, params, X, recipe=fallback))["w"].weight
    np.testing.assert_array_equal(found.packed[2], expected.packed[2])
    assert np.any(np.asarray(found.packed[0]) != np.asarray(expected.packed[0]))


@pytest.mark.parametrize("recipe", USING_MOMENTS)
def test_moments_count_only_the_tokens_of_an_expert(recipe):
    params = {"w": jnp.asarray(RNG.normal(size=(E, D, F)), jnp.float32)}
    result = plan(routed, params, X, recipe=recipe)
    stats = calibrate(routed, params, [X], result, progress=False)
    source, form = result.moments_source(result.quantized[0])
    found = np.asarray(reduced(stats[source]["moments"], form, MomentForm.DIAGONAL))
    edges = np.cumsum([0, T // 2, T // 4, 0, T // 4])
    expected = [np.square(np.asarray(X[a:b])).sum(0) for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_moments_of_all_forms():
    products = np.asarray(X.T @ X)
    full = jnp.asarray(products)
    blocks = np.concatenate([products[i : i + 16, i : i + 16] for i in (0, 16)])
    np.testing.assert_array_equal(reduced(full, MomentForm.FULL, MomentForm.BLOCKS), blocks)
    for collected, form in ((full, MomentForm.FULL), (jnp.asarray(blocks), MomentForm.BLOCKS)):
        np.testing.assert_array_equal(reduced(collected, form, MomentForm.DIAGONAL), np.diag(products))


@pytest.mark.parametrize("recipe", ["nvfp4_local_hessian", "nvfp4_gptq", "nvfp4_hadamard"])
def test_ragged_contractions_and_several_axes(recipe):
    """A contraction of two axes, and for all but rotations one that is no multiple of 16: finite, near the weight."""
    shapes = [(4, 12, F)] if recipe == "nvfp4_hadamard" else [(4, 12, F), (3, 7, F)]
    for shape in shapes:
        params = {"w": jnp.asarray(RNG.normal(size=shape), jnp.float32)}
        x = jnp.asarray(RNG.normal(size=(T, *shape[:2])), jnp.float32)
        apply = lambda p, x: jnp.einsum("thk,hkd->td", x, p["w"])  # noqa: E731
        result = plan(apply, params, x, recipe=recipe)
        qparams = quantize_params(params, result, calibrate(apply, params, [x], result, progress=False))
        error = jaxfp4.quantized(apply, result)(qparams, x) - apply(params, x)
        assert jnp.linalg.norm(error) < 0.2 * jnp.linalg.norm(apply(params, x))


def test_channels_split_in_a_shard_map():
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(AxisType.Auto,))

    @jax.shard_map(mesh=mesh, in_specs=({"w": P("tp")}, P(None, "tp")), out_specs=P())
    def apply(p, x):
        return jax.lax.psum(x @ p["w"], "tp")

    params = {"w": jnp.ones((64, F))}
    result = plan(apply, params, jnp.ones((T, 64)), recipe="nvfp4_weighted_mse")
    with pytest.raises(ValueError, match=r"a shard_map splits its contraction, 16 of 64 channels: wanted all of them"):
        calibrate(apply, params, [jnp.ones((T, 64))], result, progress=False)


def test_a_stated_axis_allows_no_method_that_needs_data():
    rule = Rule(Scheme.W4A16, axis=0, method=Method(WeightedMse()))
    with pytest.raises(LeafError, match=r"^w: a rule with axis=0 asks for .*: wanted a method that needs nothing of"):
        plan(product, W, X, recipe=Recipe("stated", (rule,)))
    stated = plan(product, W, X, recipe=Recipe("stated", (Rule(Scheme.W4A16, axis=0, method=Method(Mse())),)))
    assert digest(quantize_params(W, stated)) == digest(quantize_params(W, plan(product, W, X, recipe="nvfp4_mse")))


# Channel scales.


def test_folding_changes_the_function_by_rounding_only():
    params = {"scale": jnp.asarray(RNG.uniform(0.5, 2, D), jnp.float32), **W}
    for recipe in ("nvfp4_awq", "nvfp4_smoothquant"):
        result = plan(normed, params, X, recipe=recipe)
        stats = calibrate(normed, params, [X], result, progress=False)
        folded = fold_channel_scales(params, result, stats)
        assert np.max(np.abs(folded["scale"] / params["scale"] - 1)) > 0.1
        np.testing.assert_allclose(normed(folded, X), normed(params, X), rtol=2e-5, atol=2e-5)
        qparams = quantize_params(params, result, stats)
        np.testing.assert_array_equal(qparams["scale"], folded["scale"])
        assert qparams["w"].pre_scale is None


def test_input_scales_are_those_of_the_scaled_activation():
    params = {"scale": jnp.asarray(RNG.uniform(0.5, 2, D), jnp.float32), **W}
    result = plan(normed, params, X, recipe="nvfp4_smoothquant")
    stats = calibrate(normed, params, [X], result, progress=False)
    folded = fold_channel_scales(params, result, stats)
    expected = np.abs(X * folded["scale"]).max() / 2688
    np.testing.assert_allclose(quantize_params(params, result, stats)["w"].input_scale, expected, rtol=1e-5)


def test_weights_that_cannot_be_folded_are_left_unscaled():
    result = plan(product, W, X, recipe="nvfp4_smoothquant")
    assert result.folds == () and "w" in result.unscaled
    assert "channels not scaled: its activation" in str(result)
    stats = calibrate(product, W, [X], result, progress=False)
    assert digest(quantize_params(W, result, stats)) == digest(
        quantize_params(W, plan(product, W, X, recipe="nvfp4_mse"))
    )


def test_smoothquant_evens_out_channels():
    activation, weight = jnp.array([8.0, 2.0, 0.0, 1.0]), jnp.array([0.5, 2.0, 1.0, 0.0])
    scales = smoothquant_scales(activation, weight, 0.5)
    smoothed = np.asarray(activation / scales)[:2], np.asarray(weight * scales)[:2]
    np.testing.assert_allclose(smoothed[0] / smoothed[1], (smoothed[0] / smoothed[1])[0], rtol=1e-5)
    np.testing.assert_array_equal(scales[2:], 1)


def test_awq_keeps_no_scaling_where_nothing_is_better():
    x = jnp.array([1.0, 2.0, 4.0])
    worse = awq_scales(x, jnp.ones(3), 4, lambda s: jnp.sum(jnp.log(s) ** 2))
    np.testing.assert_array_equal(worse, 1)
    np.testing.assert_array_equal(awq_scales(x, jnp.ones(3), 4, lambda s: jnp.float32(jnp.nan) * s[0]), 1)
    wanted = jnp.array([0.5, 1, 2])
    found = awq_scales(x, jnp.ones(3), 4, lambda s: jnp.sum((s - wanted) ** 2))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_methods_have_names():
    assert str(Method()) == ""
    assert str(Method(WeightedMse(), Gptq(), channels=SmoothQuant())) == "smooth_quant, weighted_mse, gptq"
    assert str(Method(rotation=Hadamard())) == "hadamard"
    assert Method(channels=Awq()).moments is MomentForm.FULL


# Rotation.


def test_hadamard_is_the_matrix():
    matrix = np.array([[1, 1], [1, -1]])
    for _ in range(3):
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    expected = np.asarray(X).reshape(T, 2, 16) @ matrix / 4
    np.testing.assert_allclose(hadamard(X), expected.reshape(T, D), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(hadamard(hadamard(X)), X, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(hadamard(X.T, 0), hadamard(X).T)
    np.testing.assert_allclose(hadamard(X.reshape(T, 4, 8), (1, 2)).reshape(T, D), hadamard(X))
    assert hadamard(X.astype(jnp.bfloat16), size=32).dtype == jnp.bfloat16


@pytest.mark.parametrize("size", [0, 1, 12, 64])
def test_hadamard_of_other_sizes(size):
    with pytest.raises(ValueError, match=rf"hadamard: size={size} for a contraction of 32: wanted a power of two"):
        hadamard(X, size=size)


def test_a_rotated_product_is_the_product():
    """Up to quantization: with weights alone rounded, and near the unrotated one."""
    recipe = Recipe("rotated", (Rule(Scheme.W4A16, method=Method(Mse(), rotation=Hadamard(32))),))
    result = plan(product, W, X, recipe=recipe)
    qparams = quantize_params(W, result)
    assert qparams["w"].rotation == 32
    expected = hadamard(X, size=32) @ qparams["w"].weight.dequantize()
    np.testing.assert_allclose(jaxfp4.quantized(product, result)(qparams, X), expected, rtol=1e-4, atol=1e-4)
    assert jnp.linalg.norm(expected - product(W, X)) < 0.1 * jnp.linalg.norm(product(W, X))
