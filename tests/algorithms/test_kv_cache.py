"""Recipes with a quantized key-value cache, from calibration to the quantized function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp4
from jaxfp4.algorithms import calibrate, observed, quantize_params, quantized
from jaxfp4.algorithms.cache import cache_amaxes
from jaxfp4.formats import LeafError
from jaxfp4.models import DecoderConfig, from_flax
from jaxfp4.recipes import Awq, CacheFormat, KvCache, Method, Recipe, Role, Rule, Scheme, plan
from jaxfp4.tensors import QuantizedWeight
from jaxfp4.tensors.cache_rounding import fake_quantize_cache

from . import models

PRESETS = {"nvfp4_kv_fp8": CacheFormat.FP8, "nvfp4_kv_nvfp4": CacheFormat.NVFP4}
D, H, K, T, L = 32, 4, 16, 8, 3
EVERYTHING = frozenset(Role)


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def attention(p, x, rounded=lambda x, kind: checkpoint_name(x, kind)):
    q, k, v = (jnp.einsum("td,dhk->thk", x, p[n]) for n in "qkv")
    k, v = rounded(jnp.tanh(k), "keys"), rounded(v, "values")
    weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k))
    return x + jnp.einsum("hts,shk,hkd->td", weights, v, p["o"])


in_full = jax.jit(attention)


def scanned(p, x):
    return lax.scan(lambda c, w: (attention(w, c), None), x, p)[0]


LAYER = {"q": (D, H, K), "k": (D, H, K), "v": (D, H, K), "o": (H, K, D)}
PARAMS = {n: draw(*s, seed=i) / 4 for i, (n, s) in enumerate(LAYER.items())}
STACK = {n: jnp.stack([w * f for f in (1, 0.5, 2)]) for n, w in PARAMS.items()}
X = draw(T, D, seed=9)


def weight_only(preset: str) -> Recipe:
    """The preset's cache with activations as they are."""
    return Recipe("w", (Rule(Scheme.W4A16),), kv_cache=KvCache(PRESETS[preset]))


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_quantized_is_rounding_at_the_marks(preset, calibrated):
    """Against the function with the rounding written into it; without statistics with the amax at hand."""
    result = plan(attention, PARAMS, X, recipe=weight_only(preset))
    stats = calibrate(attention, PARAMS, [X * 0.7], result, progress=False)
    qparams = quantize_params(PARAMS, result, stats if calibrated else None)
    amaxes = {"keys": None, "values": None}
    if calibrated:
        assert qparams["k"].cache.keys == stats["k"]["keys_amax"]
        assert qparams["k"].cache.values is None
        amaxes = {"keys": qparams["k"].cache.keys, "values": qparams["v"].cache.values}
    else:
        assert qparams["k"].cache is None
    assert qparams["q"].cache is None
    plain = {n: w.weight.dequantize() for n, w in qparams.items()}
    by_hand = jax.jit(lambda p, x: attention(p, x, lambda x, n: fake_quantize_cache(x, amaxes[n], PRESETS[preset])))
    found = quantized(attention, result)(qparams, X)
    np.testing.assert_allclose(found, by_hand(plain, X), rtol=1e-5, atol=1e-5)
    assert np.abs(found - in_full(plain, X)).max() > 1e-3


def test_one_calibration_serves_both_formats():
    """And the weights are quantized as without a cache."""
    plans = {preset: plan(attention, PARAMS, X, recipe=preset) for preset in ("nvfp4", *PRESETS)}
    stats = calibrate(attention, PARAMS, [X], plans["nvfp4_kv_fp8"], progress=False)
    qparams = {preset: quantize_params(PARAMS, one, stats) for preset, one in plans.items()}
    assert len({jaxfp4.digest(q, inputs=True) for q in qparams.values()}) == 1
    assert [qparams[p]["v"].cache.format for p in PRESETS] == list(PRESETS.values())


@pytest.mark.parametrize("preset", PRESETS)
def test_layers_of_a_scan(preset):
    result = plan(scanned, STACK, X, recipe=preset)
    stats = calibrate(scanned, STACK, [X, X * 2], result, progress=False)
    qparams = quantize_params(STACK, result, stats)
    assert qparams["k"].cache.keys.shape == qparams["v"].cache.values.shape == (L,)
    x = quantized(scanned, result)(qparams, X)
    c, one = X, plan(attention, PARAMS, X, recipe=preset)
    apply = quantized(attention, one)
    for i in range(L):
        layer, own = jax.tree.map(lambda stack, i=i: jnp.asarray(np.asarray(stack)[i]), (STACK, stats))
        c = apply(quantize_params(layer, one, own), c)
    np.testing.assert_allclose(x, c, rtol=1e-3, atol=1e-3)


def test_under_jit():
    result = plan(scanned, STACK, X, recipe="nvfp4_kv_fp8")
    stats = calibrate(scanned, STACK, [X], result, progress=False)
    eager, jitted = (
        quantize_params(STACK, result, stats),
        jax.jit(lambda p, s: quantize_params(p, result, s))(STACK, stats),
    )
    jax.tree.map(np.testing.assert_array_equal, eager, jitted)


@pytest.mark.parametrize("preset", PRESETS)
def test_gradient_is_straight_through(preset):
    """That of the same function with rounded values and no derivative of the rounding."""
    result = plan(attention, PARAMS, X, recipe=weight_only(preset))
    qparams = quantize_params(PARAMS, result, calibrate(attention, PARAMS, [X], result, progress=False))
    plain = {n: w.weight.dequantize() for n, w in qparams.items()}
    amaxes = {"keys": qparams["k"].cache.keys, "values": qparams["v"].cache.values}

    def straight_through(x, name):
        return x + lax.stop_gradient(fake_quantize_cache(x, amaxes[name], PRESETS[preset]) - x)

    found = jax.jit(jax.grad(lambda x: (quantized(attention, result)(qparams, x) ** 2).sum()))(X)
    wanted = jax.jit(jax.grad(lambda x: (attention(plain, x, straight_through) ** 2).sum()))(X)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    assert np.abs(found).max() > 1


SPECS = {n: P(None, "tp") for n in "qkv"} | {"o": P("tp")}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_equal_statistics_on_meshes(kind):
    """Keys that are sums of integers are exact, so their amaxes are the same bits however heads are split."""

    def apply(p, x):
        k = checkpoint_name(jnp.einsum("td,dhk->thk", x, p["k"]), "keys")
        return k + checkpoint_name(jnp.einsum("td,dhk->thk", x, p["v"]), "values")

    params, x = {n: jnp.round(PARAMS[n] * 9) for n in ("k", "v")}, jnp.round(X * 4)
    result = plan(apply, params, x, recipe=Recipe("all", (Rule(Scheme.W4A4, roles=EVERYTHING),), kv_cache=KvCache()))
    observe = jax.jit(observed(apply, result))
    single = observe(params, x)[1]
    qparams = quantize_params(params, result, single)
    outputs = quantized(apply, result)(qparams, x)
    mesh = jax.make_mesh((2, 4), ("dp", "tp"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        placed = {n: jax.device_put(np.asarray(w), NamedSharding(mesh, SPECS[n])) for n, w in params.items()}
        split = jax.device_put(np.asarray(x), NamedSharding(mesh, P("dp")))
        _, stats = observe(placed, split)
        for path, states in single.items():
            for name, state in states.items():
                np.testing.assert_array_equal(stats[path][name], state, err_msg=f"{path} {name}")
        on_mesh = quantize_params(placed, result, stats)
        assert on_mesh["k"].cache.keys == qparams["k"].cache.keys
        np.testing.assert_allclose(quantized(apply, result)(on_mesh, split), outputs, rtol=1e-5, atol=1e-4)


def test_order_of_batches():
    result = plan(scanned, STACK, X, recipe="nvfp4_kv_fp8")
    batches = [X, X * 3, -X]
    found = [calibrate(scanned, STACK, order, result, progress=False) for order in (batches, batches[::-1])]
    jax.tree.map(np.testing.assert_array_equal, *found)


# The built-in decoder.


CONFIG = DecoderConfig.from_hf(
    {
        "model_type": "llama", "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
)  # fmt: skip
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 12)), jnp.int32)


def test_decoder_marks_its_keys_and_values():
    apply, params = from_flax(models.drawn_decoder(CONFIG))
    result = plan(apply, params, TOKENS, recipe="nvfp4_kv_fp8")
    kinds = {"k_proj": "keys", "v_proj": "values"}
    assert {e.path: e.cached for e in result.entries if e.cached} == {
        f"layers/{i}/attention/{name}/kernel": (kind,) for i in range(2) for name, kind in kinds.items()
    }
    assert "W4A4, values FP8" in str(result)
    stats = calibrate(apply, params, [TOKENS], result, progress=False)
    outputs = {}
    for preset in PRESETS:
        one = plan(apply, params, TOKENS, recipe=weight_only(preset))
        qparams = quantize_params(params, one, stats)
        outputs[preset] = quantized(apply, one)(qparams, TOKENS)
    plain = jax.jit(apply)(jax.tree.map(dequantized, qparams, is_leaf=is_weight), TOKENS)
    moved = [jnp.linalg.norm(outputs[p] - plain) / jnp.linalg.norm(plain) for p in PRESETS]
    print(f"relative change of the logits: FP8 {moved[0]:.3f}, NVFP4 {moved[1]:.3f}")
    assert 0.01 < 2 * moved[0] < moved[1] < 0.2


def is_weight(leaf) -> bool:
    return isinstance(leaf, QuantizedWeight)


def dequantized(leaf):
    return leaf.weight.dequantize() if is_weight(leaf) else leaf


# What is refused.


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    recipe = jaxfp4.recipes.get(preset)
    assert recipe.kv_cache == KvCache(PRESETS[preset], "keys", "values")
    assert [rule.scheme for rule in recipe.rules] == [Scheme.W4A4]


def test_names_must_differ():
    with pytest.raises(ValueError, match=r"KvCache\(keys='kv', values='kv'\): wanted two different names"):
        KvCache(keys="kv", values="kv")


def test_weights_that_stay_as_they_are():
    recipe = Recipe("mine", (Rule(Scheme.NONE, include=("k",)), Rule(Scheme.W4A4)), kv_cache=KvCache())
    with pytest.raises(ValueError, match=r"^k: it makes keys for a quantized key-value cache but is kept \(left by"):
        plan(attention, PARAMS, X, recipe=recipe)


def test_channel_scaling():
    recipe = Recipe("mine", (Rule(Scheme.W4A4, method=Method(channels=Awq())),), kv_cache=KvCache())
    with pytest.raises(ValueError, match=r"recipe 'mine': kv_cache with awq: wanted a method without channels"):
        plan(attention, PARAMS, X, recipe=recipe)


@pytest.mark.parametrize("bad, found", [(0.0, "0.0"), (np.nan, "nan"), (np.inf, "inf")])
def test_unusable_maxima(bad, found):
    result = plan(attention, PARAMS, X, recipe="nvfp4_kv_fp8")
    stats = jax.tree.map(jnp.ones_like, result.init_stats())
    stats["v"]["values_amax"] = jnp.float32(bad)
    with pytest.raises(LeafError, match=rf"^v: the largest magnitude of its values was {found} in calibration: wanted"):
        cache_amaxes(result, stats)


def test_unusable_maxima_of_a_layer():
    result = plan(scanned, STACK, X, recipe="nvfp4_kv_fp8")
    stats = jax.tree.map(jnp.ones_like, result.init_stats())
    stats["k"]["keys_amax"] = jnp.array([1.0, 0.0, 2.0])
    with pytest.raises(LeafError, match=r"^k: the largest magnitude of its keys was 0.0 in layers \[1\] in"):
        quantize_params(STACK, result, stats)


def test_non_finite_keys_in_calibration():
    def apply(p, x):
        return attention(p, x, lambda x, n: checkpoint_name(jnp.log(x), n))

    result = plan(apply, PARAMS, X, recipe="nvfp4_kv_fp8")
    with pytest.raises(LeafError, match=r"^k: its activations hold NaN or Inf"):
        calibrate(apply, PARAMS, [X], result, progress=False)


def test_statistics_without_the_cache():
    plain, cached = (plan(attention, PARAMS, X, recipe=r) for r in ("nvfp4", "nvfp4_kv_fp8"))
    stats = calibrate(attention, PARAMS, [X], plain, progress=False)
    with pytest.raises(LeafError, match=r"^k: statistics 'keys_amax' of shape nothing: wanted \(\)"):
        quantize_params(PARAMS, cached, stats)


def test_a_function_with_other_marks():
    def swapped(p, x):
        return attention(p, x, lambda x, n: checkpoint_name(x, {"keys": "values", "values": "keys"}[n]))

    result = plan(attention, PARAMS, X, recipe="nvfp4_kv_fp8")
    with pytest.raises(LeafError, match=r"^k: it makes values for the key-value cache here, but did not"):
        quantized(swapped, result)(quantize_params(PARAMS, result), X)
