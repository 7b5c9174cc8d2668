"""Quantized parameters: the bytes of each weight, what siblings share, and trees of every kind."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from golden_data import assert_same_bits

import jaxfp4
from jaxfp4.algorithms import calibrate, digest, quantize_params
from jaxfp4.formats import LeafError
from jaxfp4.recipes import Recipe, Role, Rule, Scheme, plan
from jaxfp4.tensors import QuantizedWeight, quantize

from . import models

TOKENS = models.batches(1)[0]
STACKED = models.draw()
APART = models.apart(STACKED)
PLANS = {
    scale: plan(models.scanned, STACKED, TOKENS, recipe=jaxfp4.recipes.get("nvfp4").with_expert_scale(scale))
    for scale in ("stack", "expert")
}
CONTRACTED = {"q": 0, "k": 0, "v": 0, "o": (0, 1), "gate": 1, "up": 1, "down": 1}
GROUPS = {n: group for group in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)) for n in group}


def amax(arrays, axes=None):
    return np.max([np.abs(a).max(axes) for a in arrays], axis=0)


@pytest.mark.parametrize("scale", ["stack", "expert"])
def test_bytes_of_each_layer(scale):
    """Each layer of a stack is quantized as it would be alone, with the global amax of its siblings."""
    qparams = quantize_params(STACKED, PLANS[scale])
    assert qparams["layers"]["router"] is STACKED["layers"]["router"]
    assert qparams["embed"] is STACKED["embed"]
    for name in models.QUANTIZED:
        found = jax.tree.map(np.asarray, qparams["layers"][name].weight)
        assert qparams["layers"][name].input_scale is None
        per_expert = scale == "expert" and name in ("gate", "up", "down")
        for i in range(models.L):
            w = STACKED["layers"][name][i]
            shared = amax([STACKED["layers"][n][i] for n in GROUPS[name]], (1, 2) if per_expert else None)
            expected = quantize(w, CONTRACTED[name], global_amax=shared[:, None, None] if per_expert else shared)
            assert_same_bits(found.packed[i], expected.packed)
            assert_same_bits(found.scales[i], expected.scales)
            np.testing.assert_array_equal(found.global_scale[i].ravel(), np.ravel(expected.global_scale))


def test_scales_are_shared_by_siblings():
    stats = calibrate(models.scanned, STACKED, models.batches(), PLANS["stack"], progress=False)
    layers = quantize_params(STACKED, PLANS["stack"], stats)["layers"]
    for name, group in GROUPS.items():
        for other in group:
            np.testing.assert_array_equal(
                layers[name].weight.global_scale.ravel(), layers[other].weight.global_scale.ravel()
            )
            np.testing.assert_array_equal(layers[name].input_scale, layers[other].input_scale)
        assert layers[name].input_scale.shape == (models.L,)
        assert len(set(np.asarray(layers[name].input_scale).tolist())) == models.L


def test_w4a16_has_no_input_scale():
    result = plan(models.scanned, STACKED, TOKENS, recipe="nvfp4_weight_only")
    assert result.init_stats() == {}
    qparams = quantize_params(STACKED, result, {})
    assert qparams["layers"]["q"].input_scale is None
    assert digest(qparams) == digest(quantize_params(STACKED, PLANS["stack"]))


def test_under_jit():
    """The same bytes; the plan passes as a static argument."""
    under_jit = jax.jit(quantize_params)(STACKED, PLANS["stack"])
    assert digest(under_jit) == digest(quantize_params(STACKED, PLANS["stack"]))


def test_non_finite_weights_under_jit_dequantize_to_nan():
    params = STACKED | {"layers": STACKED["layers"] | {"o": STACKED["layers"]["o"] * np.float32(np.nan)}}
    o = jax.jit(quantize_params)(params, PLANS["stack"])["layers"]["o"]
    assert jnp.isnan(o.weight.dequantize()).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["v", "down"])
def test_non_finite_weights(bad, name):
    w = STACKED["layers"][name].copy()
    w.flat[77] = bad
    params = STACKED | {"layers": STACKED["layers"] | {name: w}}
    with pytest.raises(LeafError, match=f"^layers/{name}: it holds NaN or Inf: wanted finite weights"):
        quantize_params(params, PLANS["stack"])


def test_non_finite_weights_that_are_kept_are_no_matter():
    params = STACKED | {"head": np.full_like(STACKED["head"], np.nan)}
    assert digest(quantize_params(params, PLANS["stack"])) == digest(quantize_params(STACKED, PLANS["stack"]))


def test_parameters_of_another_plan():
    with pytest.raises(LeafError, match=r"^layers/\w+: params has 'layers/0/\w+' in its place; wanted the tree that"):
        quantize_params(APART, PLANS["stack"])


def zeros_model(p, x):
    return jax.nn.relu(x @ p["zero"]) + x @ p["w"]


def test_weights_that_are_all_zero():
    """A zero weight beside a sibling shares its scale; alone it has scale 1. Both dequantize to zeros."""
    params = {"zero": jnp.zeros((32, 16)), "w": jnp.ones((32, 16))}
    beside = quantize_params(params, plan(zeros_model, params, jnp.ones((2, 32))))
    assert beside["zero"].weight.global_scale == beside["w"].weight.global_scale == np.float32(1) / np.float32(2688)
    alone = quantize_params(params, plan(lambda p, x: x @ p["zero"] + 2 * x @ p["w"], params, jnp.ones((2, 32))))
    assert alone["zero"].weight.global_scale == 1
    for qparams in (beside, alone):
        np.testing.assert_array_equal(qparams["zero"].weight.dequantize(), 0)


# Parameter trees.


def dense(params, x):
    return jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


DENSE = {"down": {"kernel": jnp.arange(512.0).reshape(16, 32) / 99}, "up": {"kernel": jnp.ones((32, 16))}}
X = jnp.linspace(-1, 1, 64).reshape(2, 32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_dtypes(dtype):
    params = jax.tree.map(lambda w: jnp.asarray(w, dtype), DENSE)
    result = plan(dense, params, X)
    qparams = quantize_params(params, result)
    assert qparams["up"]["kernel"].weight.dtype == dtype
    rounded = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), params)
    assert digest(qparams) == digest(quantize_params(rounded, result))


class Dense(nnx.Module):
    def __init__(self):
        self.down = nnx.Linear(16, 32, use_bias=False, rngs=nnx.Rngs(0))
        self.up = nnx.Linear(32, 16, use_bias=False, rngs=nnx.Rngs(1))


def _nnx():
    module = Dense()
    module.down.kernel[...] = DENSE["down"]["kernel"]
    module.up.kernel[...] = DENSE["up"]["kernel"]
    graph, state = nnx.split(module)

    def apply(state, x):
        merged = nnx.merge(graph, state)
        return merged.down(jax.nn.relu(merged.up(x)))

    return apply, state


def _boxed():
    params = jax.tree.map(lambda w: nn.Partitioned(w, names=("embed", None)), DENSE)
    return lambda p, x: dense(nn.unbox(p), x), params


TREES = {
    "dict": lambda: (dense, DENSE),
    "FrozenDict": lambda: (dense, FrozenDict(DENSE)),
    "nnx.State": _nnx,
    "nn.Partitioned": _boxed,
    "list": lambda: (lambda p, x: jax.nn.relu(x @ p[1]) @ p[0], jax.tree.leaves(DENSE)),
}


@pytest.mark.parametrize("kind", TREES)
def test_trees(kind):
    """The tree keeps its structure, the weights their paths without boxes, and the function runs."""
    apply, params = TREES[kind]()
    result = plan(apply, params, X)
    if kind != "list":
        assert [e.path for e in result.quantized] == ["down/kernel", "up/kernel"]
    stats = calibrate(apply, params, [X], result, progress=False)
    qparams = quantize_params(params, result, stats)
    is_weight = lambda leaf: isinstance(leaf, QuantizedWeight)  # noqa: E731
    assert jax.tree.structure(qparams, is_leaf=is_weight) == jax.tree.structure(params)
    assert sum(is_weight(leaf) for leaf in jax.tree.leaves(qparams, is_leaf=is_weight)) == 2
    plain_plan = plan(dense, DENSE, X)
    plain = quantize_params(DENSE, plain_plan, calibrate(dense, DENSE, [X], plain_plan, progress=False))
    assert digest(qparams, inputs=True) == digest(plain, inputs=True)
    expected = jaxfp4.quantized(dense, plain_plan)(plain, X)
    np.testing.assert_array_equal(jaxfp4.quantized(apply, result)(qparams, X), expected)


def test_length_one_stack_of_experts_and_padding():
    """A contraction that is no multiple of 16, in a stack of one."""

    def apply(p, x):
        return jnp.einsum("etd,edf->etf", x, p["w"])

    w = np.random.default_rng(0).normal(size=(1, 40, 8)).astype(np.float32)
    result = plan(apply, {"w": w}, jnp.ones((1, 2, 40)))
    found = quantize_params({"w": w}, result)["w"].weight
    expected = quantize(w[0], 0)
    assert_same_bits(found.packed[0], expected.packed)
    np.testing.assert_array_equal(found.dequantize()[0], expected.dequantize())


def test_stated_axis_of_an_opaque_weight():
    """The bytes do not depend on whether the walk or a rule finds the contraction."""
    recipe = Recipe("mine", (Rule(Scheme.W4A16, include=("w",), axis=1),))
    params = {"w": STACKED["head"].T}
    opaque = plan(lambda p, x: x @ jnp.tanh(p["w"]).T, params, jnp.ones((2, models.D)), recipe=recipe)
    everything = Recipe("all", (Rule(Scheme.W4A16, roles=frozenset(Role)),))
    seen = plan(lambda p, x: x @ p["w"].T, params, jnp.ones((2, models.D)), recipe=everything)
    assert digest(quantize_params(params, opaque)) == digest(quantize_params(params, seen))
