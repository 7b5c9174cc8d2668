"""Plans as JSON and back: equal, usable with the same function, and clear errors for data that is damaged."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxfp4
from jaxfp4.formats import LeafError
from jaxfp4.recipes import (
    Gptq,
    HeadroomActivations,
    KvCache,
    Method,
    Mse,
    Order,
    PercentileActivations,
    Recipe,
    Role,
    Rule,
    Scheme,
    plan,
)
from jaxfp4.recipes.plan_data import plan_from_data, plan_to_data

from .test_plan import PARAMS, TOKENS, model

D, F = 32, 64
MLP = {"norm": (D,), "gate": (D, F), "up": (D, F), "down": (F, D)}


def mlp(p, x):
    x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p["norm"]
    return jax.nn.silu(x @ p["gate"]) * (x @ p["up"]) @ p["down"]


def draw():
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=shape) / 8 + (name == "norm"), jnp.float32) for name, shape in MLP.items()
    }


X = jnp.asarray(np.random.default_rng(1).normal(size=(8, D)), jnp.float32)


def as_json(data):
    return json.loads(json.dumps(data, allow_nan=False))


def restored(original):
    return plan_from_data(as_json(plan_to_data(original)))


OWN = Recipe(
    "my own",
    (
        Rule(Scheme.NONE, include=("plain",)),
        Rule(Scheme.W4A16, include=("opaque",), axis=(0, 1)),
        Rule(Scheme.W4A16, include=("layers/0/*",), exclude=("*/o",), method=Method(Mse(), Gptq(0.05, Order.STATIC))),
        Rule(Scheme.W4A4, roles=frozenset({Role.EXPERT}), method=Method(activations=HeadroomActivations(rho=4))),
        Rule(Scheme.W4A4, method=Method(activations=PercentileActivations(99.5))),
    ),
)


@pytest.mark.parametrize("recipe", [OWN, *(name for name in jaxfp4.recipes.names() if "_kv_" not in name)], ids=str)
def test_every_recipe_comes_back_equal(recipe):
    original = plan(model, PARAMS, TOKENS, recipe=recipe)
    other = restored(original)
    assert other == original and hash(other) == hash(original) and str(other) == str(original)
    assert other.statistics == original.statistics and other.unscaled == original.unscaled
    assert [fold.fold.shape for fold in other.folds] == [fold.fold.shape for fold in original.folds]


def test_names_of_cached_keys_and_values_come_back():
    def attention(p, x):
        k = jax.ad_checkpoint.checkpoint_name(x @ p["k"], "my keys")
        v = jax.ad_checkpoint.checkpoint_name(x @ p["v"], "my values")
        return jax.nn.softmax(x @ p["q"] @ k.T) @ v

    params = {name: jnp.ones((16, 16)) for name in "kqv"}
    recipe = Recipe("cached", (Rule(Scheme.W4A4),), kv_cache=KvCache(keys="my keys", values="my values"))
    original = plan(attention, params, jnp.ones((4, 16)), recipe=recipe)
    assert restored(original) == original
    assert restored(original).by_path["k"].cached == ("keys",)


def test_numbers_of_numpy_are_plain_numbers():
    recipe = Recipe("r", (Rule(Scheme.W4A16, include=("*/q", "opaque"), axis=np.int64(0)),))
    original = plan(model, PARAMS, TOKENS, recipe=recipe)
    assert restored(original) == original


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_smoothquant"])
def test_it_does_what_the_original_does(recipe):
    params = draw()
    original = plan(mlp, params, X, recipe=recipe)
    other = restored(original)
    stats = jaxfp4.make_calibrate_fn(mlp, other)(params, other.init_stats(), X)
    qparams = jaxfp4.quantize_params(params, other, stats)
    expected = jaxfp4.quantize_params(params, original, stats)
    assert jaxfp4.digest(qparams, inputs=True) == jaxfp4.digest(expected, inputs=True)
    np.testing.assert_array_equal(qparams["norm"], expected["norm"])
    assert bool(other.folds) == (recipe == "nvfp4_smoothquant")
    np.testing.assert_array_equal(jaxfp4.quantized(mlp, other)(qparams, X), jaxfp4.quantized(mlp, original)(qparams, X))


def test_another_model_is_refused_by_path():
    other = restored(plan(mlp, draw(), X))
    params = draw()
    with pytest.raises(LeafError, match=r"up: params has 'upper' in its place; wanted the tree that the plan was made"):
        jaxfp4.quantize_params({("upper" if n == "up" else n): w for n, w in params.items()}, other)
    with pytest.raises(LeafError, match=r"down: shape \(64, 16\): wanted \(64, 32\), as in the plan"):
        jaxfp4.quantize_params({**params, "down": params["down"][:, :16]}, other)


GOOD = as_json(plan_to_data(plan(mlp, jax.eval_shape(draw), X, recipe="nvfp4_awq")))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["format"], "jaxfp4", "plan: found 'jaxfp4': wanted the format 'jaxfp4 plan'; or make the plan again"),
        (["version"], 2, "plan: found version 2: wanted 1, which this jaxfp4 reads; install the one that wrote it"),
        (["plan"], None, "plan: found None: wanted Plan"),
        (["plan", "class"], "Recipe", "wanted Plan"),
        (["plan", "new"], 1, "plan: found ['new']: wanted only recipe, entries"),
        (["plan", "entries"], {}, "plan.entries: found {}: wanted a list"),
        (["plan", "entries", 0, "scheme"], "W8", "plan.entries[0].scheme: found 'W8': wanted 'W4A4' or 'W4A16' or"),
        (["plan", "entries", 0, "scheme"], [], "plan.entries[0].scheme: found []: wanted 'W4A4'"),
        (["plan", "entries", 0, "weight", "leaf"], True, "weight.leaf: found True: wanted an integer"),
        (["plan", "entries", 0, "weight", "leaf"], 1.5, "weight.leaf: found 1.5: wanted an integer"),
        (["plan", "entries", 0, "weight", "path"], 3, "weight.path: found 3: wanted a string"),
        (
            ["plan", "entries", 1, "weight", "path"],
            "down",
            "entries[1].weight.path: found 'down': wanted each path once",
        ),
        (["plan", "entries", 0, "weight", "shape"], [1, "2"], "weight.shape[1]: found '2': wanted an integer"),
        (
            ["plan", "entries", 0, "weight", "contracted"],
            [2],
            "contracted: found (2,): wanted axes below 2, as of down",
        ),
        (["plan", "entries", 0, "weight", "siblings"], ["x"], "siblings: found ['x']: wanted paths in the plan"),
        (
            ["plan", "entries", 0, "method", "scales", "class"],
            "Min",
            "scales.class: found 'Min': wanted one of Max, Mse",
        ),
        (["plan", "entries", 0, "method", "scales", "class"], [], "scales.class: found []: wanted one of Max, Mse"),
        (["plan", "entries", 0, "method", "channels"], 3, "method.channels: found 3: wanted an object"),
        (["plan", "entries", 0, "method", "channels", "steps"], "x", "channels.steps: found 'x': wanted an integer"),
        (["plan", "recipe", "rules", 0, "roles"], ["x"], "rules[0].roles[0]: found 'x': wanted 'attention' or"),
        (["plan", "recipe", "rules", 0, "axis"], "x", "rules[0].axis: found 'x': wanted an integer"),
        (["plan", "recipe", "expert_scale"], "x", "recipe.expert_scale: found 'x': wanted 'stack' or 'expert'"),
        (["plan", "folding"], [], "plan.folding: found []: wanted an object"),
        (["plan", "folding", "reasons"], [], "folding.reasons: found []: wanted an object"),
        (
            ["plan", "folding", "folds", 0, "consumers", 0, "index"],
            [[1], 2],
            "index: found [[1], 2]: wanted integers in",
        ),
        (["plan", "folding", "folds", 0, "consumers", 0, "index"], [0.5], "index: found [0.5]: wanted integers in"),
        (["plan", "folding_digest"], "x", "plan.folding_digest: found 'x': wanted"),
    ],
)
def test_damaged_data_is_one_clear_line(place, value, message):
    data = copy.deepcopy(GOOD)
    target = data
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(ValueError) as error:
        plan_from_data(data)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_plan_at_all():
    for data, found in (([], r"\[\]"), (None, "None"), ({}, "None")):
        with pytest.raises(ValueError, match=f"plan: found {found}: wanted the format 'jaxfp4 plan'"):
            plan_from_data(data)
    data = copy.deepcopy(GOOD)
    del data["plan"]["entries"][0]["weight"]["shape"]
    with pytest.raises(ValueError, match=r"plan.entries\[0\].weight: found \['class', .*: wanted shape too"):
        plan_from_data(data)


def test_values_that_a_method_refuses_are_named():
    original = plan(mlp, jax.eval_shape(draw), X, recipe="nvfp4_act_percentile")
    data = as_json(plan_to_data(original))
    data["plan"]["entries"][0]["method"]["activations"]["percentile"] = 0
    with pytest.raises(
        ValueError, match=r"plan.entries\[0\].method.activations: PercentileActivations\(percentile=0\)"
    ):
        plan_from_data(data)


def test_fields_with_defaults_may_be_missing():
    """So that a later version may add some."""
    data = copy.deepcopy(GOOD)
    del data["plan"]["recipe"]["kv_cache"]
    assert plan_from_data(data) == plan_from_data(GOOD)
