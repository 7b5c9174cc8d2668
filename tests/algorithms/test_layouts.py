"""The same bytes on every layout: digests over meshes, and how far input scales move."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp4
from jaxfp4.algorithms import calibrate, digest, input_scales, quantize_params
from jaxfp4.recipes import plan

from . import models

D, F, E, L = 64, 32, 8, 2


def apply(p, x):
    def layer(c, w):
        hidden = jnp.einsum("etd,edf->etf", jnp.broadcast_to(c, (E, *c.shape)), w["up"])
        return c + jnp.einsum("etf,efd->etd", hidden, w["down"]).sum(0), None

    return jax.lax.scan(layer, x @ p["a"] + x @ p["b"], p["layers"])[0]


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


PARAMS = {
    "a": draw(D, D, seed=1),
    "b": draw(D, D, seed=2) * 3,
    "layers": {
        "up": draw(L, E, D, F, seed=3),
        "down": draw(L, E, F, D, seed=4) * np.array([1, 5])[:, None, None, None],
    },
}
PARAMS = jax.tree.map(lambda w: w.astype(np.float32), PARAMS)
X = np.ones((4, D), np.float32)
PLANS = {
    scale: plan(apply, PARAMS, X, recipe=jaxfp4.recipes.get("nvfp4").with_expert_scale(scale))
    for scale in ("stack", "expert")
}
STATS = jax.tree.map(lambda s: jnp.arange(1.0, 1 + s.size).reshape(s.shape), PLANS["stack"].init_stats())

MEGATRON = {
    "a": P(None, "tp"),
    "b": P(None, "tp"),
    "layers": {"up": P(None, "ep", None, "tp"), "down": P(None, "ep", "tp")},
}
LAYOUTS = {
    "tp=8": ((8, 1), MEGATRON),
    "tp=4, ep=2": ((4, 2), MEGATRON),
    "tp=2, ep=4": ((2, 4), MEGATRON),
    "ep=8": ((1, 8), MEGATRON),
    "replicated": ((4, 2), jax.tree.map(lambda w: P(), PARAMS)),
    "blocks cut": (
        (8, 1),
        {"a": P("tp"), "b": P("tp"), "layers": {"up": P(None, None, "tp"), "down": P(None, None, "tp")}},
    ),
    "both axes on one dimension": (
        (2, 4),
        {
            "a": P(("tp", "ep")),
            "b": P(None, ("ep", "tp")),
            "layers": {"up": P(None, ("ep", "tp")), "down": P(None, None, None, ("tp", "ep"))},
        },
    ),
    "layers split": (
        (2, 4),
        {"a": P("ep"), "b": P(), "layers": {"up": P("tp", "ep"), "down": P("tp", None, None, "ep")}},
    ),
}


def placed(name: str, kind: AxisType = AxisType.Auto, params=PARAMS):
    (tp, ep), specs = LAYOUTS[name]
    mesh = jax.make_mesh((tp, ep), ("tp", "ep"), axis_types=(kind, kind))
    return jax.tree.map(lambda w, spec: jax.device_put(w, NamedSharding(mesh, spec)), params, specs)


@functools.cache
def expected(scale: str) -> str:
    """The digest on one device."""
    return digest(quantize_params(PARAMS, PLANS[scale], STATS), inputs=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_digest_is_equal(name):
    assert digest(quantize_params(placed(name), PLANS["stack"], STATS), inputs=True) == expected("stack")


@pytest.mark.parametrize("name", ["tp=4, ep=2", "blocks cut"])
def test_digest_is_equal_on_explicit_axes(name):
    assert digest(quantize_params(placed(name, AxisType.Explicit), PLANS["stack"], STATS), inputs=True) == expected(
        "stack"
    )


@pytest.mark.parametrize("name", ["tp=4, ep=2", "ep=8"])
def test_digest_is_equal_with_scales_of_experts(name):
    assert digest(quantize_params(placed(name), PLANS["expert"], STATS), inputs=True) == expected("expert")
    assert expected("expert") != expected("stack")


def test_digest_of_searched_scales_is_equal():
    """With equal statistics, of which the search takes channel sums as weights. Other searches: the contract test."""
    result = plan(apply, PARAMS, X, recipe="nvfp4_weighted_mse")
    stats = jax.tree.map(lambda s: 1 + (jnp.arange(s.size) * 37 % 101).reshape(s.shape) / 7, result.init_stats())
    expected = digest(quantize_params(PARAMS, result, stats))
    for name in ("blocks cut", "both axes on one dimension"):
        assert digest(quantize_params(placed(name), result, stats)) == expected, name


def test_digest_is_equal_under_jit_on_a_mesh():
    assert digest(jax.jit(quantize_params)(placed("tp=2, ep=4"), PLANS["stack"])) == digest(
        quantize_params(PARAMS, PLANS["stack"])
    )


def test_codes_keep_the_sharding():
    qparams = quantize_params(placed("tp=4, ep=2"), PLANS["stack"])
    up = qparams["layers"]["up"].weight
    assert up.packed.sharding.spec == up.scales.sharding.spec == P(None, "ep", None, "tp")


# Input scales.


def language_model(tp: int, ep: int) -> dict:
    """The language model's parameters split over a mesh, or with (1, 1) on a single device."""
    params = models.draw()
    if tp * ep > 1:
        mesh = jax.make_mesh((tp, ep), ("tp", "ep"), axis_types=(AxisType.Auto,) * 2)
        specs = {n: P(None, *s) for n, s in models.SPECS.items()}
        if tp > models.HEADS:
            specs |= {n: P() for n in "kvo"}
        specs = {"embed": P(None, "tp"), "head": P(), "layers": specs}
        params = jax.tree.map(lambda w, s: jax.device_put(w, NamedSharding(mesh, s)), params, specs)
    return params


@functools.cache
def model_scales(tp: int, ep: int) -> dict[str, np.ndarray]:
    """Calibrated input scales of the language model."""
    params, tokens = language_model(tp, ep), models.batches(1)
    result = plan(models.scanned, params, tokens[0])
    stats = calibrate(models.scanned, params, tokens, result, progress=False)
    return {path: np.asarray(scale) for path, scale in input_scales(result, stats).items()}


@pytest.mark.parametrize("tp, ep", [(8, 1), (4, 2), (2, 4)])
def test_input_scales_over_layouts(tp, ep, record_property):
    """Statistics are exact reductions, but the forward pass before them adds up in another order on each layout.

    The figure is recorded; the bound is loose, that of many float32 roundings.
    """
    single, other = model_scales(1, 1), model_scales(tp, ep)
    moved = max(float(np.max(np.abs(other[p] / single[p] - 1))) for p in single)
    print(f"input scales on tp={tp} ep={ep}: at most {moved:.1e} from those of one device")
    record_property("input_scale_movement", moved)
    assert moved < 1e-4


def test_codes_of_sums_over_layouts():
    """How far GPTQ's codes move if a model is calibrated on another mesh: sums over tokens are in another order there.

    None did when this was written; the bound leaves room for a near tie.
    """
    gptq = jaxfp4.recipes.get("nvfp4_gptq").rules[0].method
    recipe = jaxfp4.Recipe("experts", (jaxfp4.Rule(jaxfp4.Scheme.W4A16, include=("*/down", "*/o"), method=gptq),))
    found = []
    for tp, ep in ((1, 1), (2, 4)):
        params, tokens = language_model(tp, ep), models.batches(2)
        result = plan(models.scanned, params, tokens[0], recipe=recipe)
        stats = calibrate(models.scanned, params, tokens, result, progress=False)
        qparams = quantize_params(params, result, stats)
        found.append([np.asarray(w.weight.packed) for w in jaxfp4.weights(qparams).values()])
    codes = [np.concatenate([np.stack([p & 15, p >> 4]).ravel() for p in packed]) for packed in found]
    moved = float(np.mean(codes[0] != codes[1]))
    print(f"{moved:.1e} of the codes moved")
    assert moved <= 1e-3


@pytest.mark.parametrize("recipe", ["nvfp4_smoothquant", "nvfp4_gptq_max"])
def test_statistics_of_other_devices(recipe):
    """Calibrated on a mesh and quantized on one device, and the reverse: everything is where the weights are."""
    w = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(32, 16)), jnp.float32)}
    w |= {"norm": jnp.ones(32)}
    on_mesh = jax.device_put(w, NamedSharding(jax.make_mesh((8,), ("tp",), axis_types=(AxisType.Auto,)), P()))

    def apply(params, x):
        return (x * params["norm"]) @ params["a"]

    x = jnp.ones((4, 32))
    chosen = plan(apply, w, x, recipe=recipe)
    wanted = jaxfp4.quantize_params(w, chosen, jaxfp4.calibrate(apply, w, [x], chosen, progress=False))
    for calibrated, quantized in ((on_mesh, w), (w, on_mesh)):
        stats = jaxfp4.calibrate(apply, calibrated, [x], chosen, progress=False)
        found = jaxfp4.quantize_params(quantized, chosen, stats)
        assert jaxfp4.digest(found) == jaxfp4.digest(wanted)
        devices = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(found)}
        assert devices == {len(quantized["a"].sharding.device_set)}
