"""Methods that use statistics: what they refuse, and what they do where there is nothing to go by."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from reference import E2M1_VALUES, e2m1_codes, scale_codes

import jaxfp4
from jaxfp4.algorithms import calibrate, digest, fold_channel_scales, quantize_params
from jaxfp4.algorithms.awq import awq_scales
from jaxfp4.algorithms.encoders import encoder_for
from jaxfp4.algorithms.local_hessian import DAMPING
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


@pytest.mark.parametrize("recipe", ["nvfp4_awq", "nvfp4_awq_clip", "nvfp4_smoothquant"])
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


# Clipping.

RATIOS = np.arange(10, 21) / 20
"""Of AWQ's clipping, as Model-Optimizer's `awq_clip` has them."""


def of_experts(p, x):
    return jnp.einsum("ted,edf->tef", x * p["scale"], p["w"])


def of_layers(p, x):
    return jax.lax.scan(lambda total, w: (total, normed({"scale": w["scale"], "w": w["w"]}, x)), 0.0, p)[1]


STACKED = {"dense": (normed, ()), "experts": (of_experts, (E,)), "layers": (of_layers, (E,))}


@pytest.mark.parametrize("kind", STACKED)
def test_awq_clips_each_block_for_the_least_output_error(kind):
    """Never more of its objective than any of AWQ's ratios gives, 1.0 for no clipping among them, in float64."""
    apply, stack = STACKED[kind]
    rng = np.random.default_rng(5)
    scale = jnp.asarray(rng.uniform(0.5, 2, (E, D) if kind == "layers" else D), jnp.float32)
    params = {"scale": scale, "w": jnp.asarray(rng.standard_t(4, size=(*stack, D, F)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(T, E, D)) * np.exp(rng.normal(size=D)), jnp.float32) if kind == "experts" else X
    result = plan(apply, params, x, recipe="nvfp4_weight_only_awq_clip")
    assert str(result.quantized[0].method) == "awq, local_hessian" and len(result.folds) == 1
    stats = calibrate(apply, params, [x], result, progress=False)
    folded = fold_channel_scales(params, result, stats)
    weight = quantize_params(params, result, stats)["w"].weight
    w, q = (np.asarray(a, np.float64).reshape(-1, D // 16, 16, F) for a in (folded["w"], weight.dequantize()))
    inputs = np.asarray(x, np.float64)
    inputs = np.moveaxis(inputs, 1, 0) if kind == "experts" else inputs[None]
    factors = np.asarray(folded["scale"], np.float64)
    inputs = (inputs * (factors[:, None] if kind == "layers" else factors)).reshape(len(w), T, D // 16, 16)
    hessian = np.einsum("etbi,etbj->ebij", inputs, inputs)
    damping = DAMPING * np.trace(hessian, axis1=2, axis2=3) / 16
    hessian += damping[..., None, None] * np.eye(16)

    def errors(values: np.ndarray) -> np.ndarray:
        return np.einsum("ebif,ebij,ebjf->ebf", values - w, hessian, values - w)

    found, clipped, unit = errors(q), [], np.asarray(weight.global_scale).reshape(-1, 1, 1, 1)
    amax = np.abs(w).max(2, keepdims=True)
    for ratio in RATIOS:
        code = scale_codes(np.float32(amax * ratio), unit).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        step = (code * unit).astype(np.float32)
        values = E2M1_VALUES[e2m1_codes(np.abs(w).astype(np.float32) / step)] * step
        clipped.append(errors(np.sign(w) * values))
    assert np.all(found <= np.min(clipped, 0) * (1 + 1e-5))
    assert found.sum() < 0.9 * clipped[-1].sum()
    assert np.mean(np.argmin(clipped, 0) != len(RATIOS) - 1) > 0.2


def test_awq_clip_of_an_expert_without_tokens_is_mse_of_the_scaled_weight():
    def apply(p, x):
        return routed(p, x * p["scale"])

    rng = np.random.default_rng(6)
    params = {"scale": jnp.ones(D), "w": jnp.asarray(rng.normal(size=(E, D, F)), jnp.float32)}
    result = plan(apply, params, X, recipe="nvfp4_weight_only_awq_clip")
    stats = calibrate(apply, params, [X], result, progress=False)
    folded = fold_channel_scales(params, result, stats)
    assert np.any(np.asarray(folded["scale"]) != 1)
    found = quantize_params(params, result, stats)["w"].weight
    expected = quantize_params(folded, plan(apply, params, X, recipe="nvfp4_weight_only_mse"))["w"].weight
    np.testing.assert_array_equal(found.packed[2], expected.packed[2])
    assert np.any(np.asarray(found.packed[0]) != np.asarray(expected.packed[0]))


def test_awq_clip_without_any_token_is_mse():
    params = {"scale": jnp.ones(D), **W}
    result = plan(normed, params, X, recipe="nvfp4_weight_only_awq_clip")
    found = quantize_params(params, result, result.init_stats())
    expected = quantize_params(params, plan(normed, params, X, recipe="nvfp4_weight_only_mse"))
    np.testing.assert_array_equal(found["scale"], params["scale"])
    assert digest(found) == digest(expected)


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
