"""Recipes applied to a model: what they choose, what they refuse, and the table that says so."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import jaxfp4
from jaxfp4.recipes import ExpertScale, Recipe, Role, Rule, Scheme, plan

D, F, E, V, T = 32, 16, 4, 50, 6
TOKENS = jax.ShapeDtypeStruct((T,), jnp.int32)
SHAPES = {
    "embed": (V, D),
    "head": (D, V),
    "layers": [
        {"q": (D, D), "k": (D, D), "v": (D, D), "o": (D, D), "gate": (D, F), "up": (D, F), "down": (F, D)},
        {"router": (D, E), "w1": (E, D, F), "w2": (E, F, D)},
    ],
    "plain": (D, D),
    "opaque": (E, D, 8),
    "unused": (D, D),
}
PARAMS = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda s: isinstance(s, tuple))


def model(p, tokens):
    dense, moe = p["layers"]
    x = p["embed"][tokens] * 2
    q, k, v = (x @ dense[n] for n in "qkv")
    x = x + jax.nn.softmax(q @ k.T) @ v @ dense["o"]
    x = x + jax.nn.silu(x @ dense["gate"]) * (x @ dense["up"]) @ dense["down"]
    chosen = jnp.argmax(x @ moe["router"], -1)
    hidden = jnp.einsum("td,tdf->tf", x, moe["w1"][chosen])
    x = x + jnp.einsum("tf,tfd->td", jax.nn.relu(hidden), moe["w2"][chosen])
    x = x @ p["plain"] + jnp.tanh(p["opaque"]).sum()
    return x @ p["head"]


ATTENTION = {f"layers/0/{n}" for n in "qkvo"}
MLP = {"layers/0/gate", "layers/0/up", "layers/0/down", "plain"}
EXPERTS = {"layers/1/w1", "layers/1/w2"}


def schemes(recipe) -> dict[str, str]:
    return {e.path: e.scheme.value for e in plan(model, PARAMS, TOKENS, recipe=recipe).quantized}


PRESETS = {
    "nvfp4": (ATTENTION | MLP | EXPERTS, "W4A4"),
    "nvfp4_weight_only": (ATTENTION | MLP | EXPERTS, "W4A16"),
    "nvfp4_mlp_only": (MLP | EXPERTS, "W4A4"),
    "nvfp4_mlp_weight_only": (MLP | EXPERTS, "W4A16"),
    "nvfp4_experts_only": (EXPERTS, "W4A4"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    paths, scheme = PRESETS[name]
    assert name in jaxfp4.recipes.names()
    assert schemes(name) == dict.fromkeys(paths, scheme)


def test_default_recipe():
    assert plan(model, PARAMS, TOKENS) == plan(model, PARAMS, TOKENS, recipe="nvfp4")


W4A4, W4A16, NONE = Scheme.W4A4, Scheme.W4A16, Scheme.NONE
RULES = {
    "include": ((Rule(W4A4, include=("layers/0/*",)),), dict.fromkeys(ATTENTION | MLP - {"plain"}, "W4A4")),
    "star crosses slashes": ((Rule(W4A4, include=("*/o",)),), {"layers/0/o": "W4A4"}),
    "question mark": ((Rule(W4A4, include=("layers/?/w?",)),), dict.fromkeys(EXPERTS, "W4A4")),
    "several includes": (
        (Rule(W4A4, include=("plain", "*/up")),),
        {"plain": "W4A4", "layers/0/up": "W4A4"},
    ),
    "exclude": ((Rule(W4A4, exclude=("layers/0/*", "plain")),), dict.fromkeys(EXPERTS, "W4A4")),
    "first rule wins": (
        (Rule(W4A16, include=("layers/1/*",)), Rule(W4A4, include=("layers/1/*", "plain")), Rule(W4A16)),
        dict.fromkeys(EXPERTS | ATTENTION | MLP, "W4A16") | {"plain": "W4A4"},
    ),
    "none first": ((Rule(NONE, include=("layers/0/*",)), Rule(W4A4)), dict.fromkeys(EXPERTS | {"plain"}, "W4A4")),
    "roles": ((Rule(W4A4, roles=frozenset({Role.ATTENTION})),), dict.fromkeys(ATTENTION, "W4A4")),
    "router and head": (
        (Rule(W4A16, roles=frozenset({Role.ROUTER, Role.HEAD})),),
        {"layers/1/router": "W4A16", "head": "W4A16"},
    ),
    "stated axis": ((Rule(W4A16, include=("opaque",), axis=1),), {"opaque": "W4A16"}),
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    rules, expected = RULES[name]
    assert schemes(Recipe("mine", rules)) == expected


def test_stated_axis():
    recipe = Recipe("mine", (Rule(W4A16, include=("opaque",), axis=(-2, 2)), Rule(W4A4)))
    entry = plan(model, PARAMS, TOKENS, recipe=recipe).by_path["opaque"]
    assert entry.weight.contracted == (1, 2)
    assert entry.weight.siblings == ("opaque",)


ERRORS = {
    "no such path": (
        Rule(W4A4, include=("layer/*",)),
        r"recipe 'mine': the rule for include=\('layer/\*',\) exclude=\(\) matches no weight; wanted",
    ),
    "all excluded": (Rule(W4A4, include=("plain",), exclude=("pl*",)), "matches no weight"),
    "wrong roles": (Rule(W4A4, include=("head",)), "matches only weights with the roles head; wanted"),
    "only obstacles": (
        Rule(W4A4, include=("unused",)),
        r"matches no weight \(unused: the model does not use it\); wanted",
    ),
    "exclude": (
        Rule(W4A4, exclude=("layers/7/*",)),
        r"recipe 'mine': exclude='layers/7/\*' matches no weight; wanted a pattern over whole paths like 'embed'",
    ),
    "axis of a W4A4": (
        Rule(W4A4, include=("opaque",), axis=1),
        "opaque: a rule with axis=1 asks for W4A4: wanted W4A16",
    ),
    "axis out of range": (Rule(W4A16, include=("opaque",), axis=3), "opaque: axis=3 for an array of 3 dimensions"),
    "nothing left": (Rule(NONE), "recipe 'mine' leaves nothing to quantize"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    rule, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        plan(model, PARAMS, TOKENS, recipe=Recipe("mine", (rule,)))


def test_no_rules():
    with pytest.raises(ValueError, match="recipe 'mine' leaves nothing to quantize"):
        plan(model, PARAMS, TOKENS, recipe=Recipe("mine", ()))


def test_weight_with_an_obstacle():
    """Left alone by a rule for everything, an error for a rule that means it."""

    def apply(p, x):
        return x @ p["a"] + (x @ p["b"]) @ p["b"].T

    params = {"a": jnp.ones((D, D)), "b": jnp.ones((D, D))}
    x = jnp.ones((T, D))
    assert [e.path for e in plan(apply, params, x).quantized] == ["a"]
    with pytest.raises(ValueError, match="b: a rule asks for W4A4, but it is contracted along different axes in "):
        plan(apply, params, x, recipe=Recipe("mine", (Rule(W4A4, include=("b",)), Rule(W4A4))))
    assert plan(apply, params, x, recipe=Recipe("mine", (Rule(W4A16, ("b",), axis=0),))).by_path["b"].quantized


@pytest.mark.parametrize("name", ["nvfp8", "", "NVFP4"])
def test_unknown_recipe(name):
    with pytest.raises(ValueError, match=f"recipe='{name}': wanted a Recipe or one of nvfp4, nvfp4_weight_only"):
        plan(model, PARAMS, TOKENS, recipe=name)


def test_expert_scale():
    recipe = jaxfp4.recipes.get("nvfp4")
    assert recipe.expert_scale is ExpertScale.STACK
    assert recipe.with_expert_scale("expert").expert_scale is ExpertScale.EXPERT
    assert recipe.with_expert_scale(ExpertScale.EXPERT).with_expert_scale("stack") == recipe
    with pytest.raises(ValueError, match="expert_scale='layer': wanted 'stack' or 'expert'"):
        recipe.with_expert_scale("layer")


@pytest.mark.parametrize("params", [{}, [], {"a": {}}])
def test_no_parameters(params):
    with pytest.raises(ValueError, match="params holds no arrays: wanted a pytree of parameters"):
        plan(lambda p, x: x, params, jnp.ones(3))


def test_paths_that_are_not_unique():
    params = {"a": {"b": jnp.ones((D, F))}, "a/b": jnp.ones((D, F))}
    with pytest.raises(ValueError, match="params has several leaves at 'a/b': wanted one"):
        plan(lambda p, x: x @ p["a"]["b"], params, jnp.ones((T, D)))


# The table.


def rows(result) -> dict[str, list[str]]:
    """The cells of the printed table by path."""
    lines = [line for line in str(result).splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_table():
    result = plan(model, PARAMS, TOKENS)
    assert str(result) == repr(result)
    assert "nvfp4: 10 of 15 weights" in str(result)
    found = rows(result)
    assert list(found) == [e.path for e in result.entries]
    assert found["layers/0/q"] == ["32x32", "32 (axis 0)", "", "attention", "k, q, v", "W4A4"]
    assert found["layers/1/w2"] == ["4x16x32", "16 (axis 1)", "4 experts", "expert", "", "W4A4"]
    assert found["embed"] == ["50x32", "", "", "embedding", "", "kept: embedding: no rule is for it"]
    assert found["layers/1/router"] == ["32x4", "32 (axis 0)", "", "router", "", "kept: router: no rule is for it"]
    assert found["head"] == ["32x50", "32 (axis 0)", "", "head", "", "kept: head: no rule is for it"]
    assert found["unused"] == ["32x32", "", "", "", "", "kept: the model does not use it"]
    assert found["opaque"] == ["4x32x8", "", "", "", "", "kept: it goes into 'tanh', not into a contraction"]


def test_table_of_layers_two_axes_and_rules():
    def apply(p, x):
        return jax.lax.scan(lambda c, w: (jnp.einsum("thk,hkd->td", c.reshape(T, 2, 16), w), None), x, p["o"])[0]

    recipe = Recipe("mine", (Rule(W4A16), Rule(NONE, include=("*",))))
    found = rows(plan(apply, {"o": jnp.ones((3, 2, 16, D))}, jnp.ones((T, D)), recipe="nvfp4_weight_only"))
    assert found["o"] == ["3x2x16x32", "2 x 16 (axis 1, 2)", "3 layers", "linear", "", "W4A16"]
    left = Recipe("mine", (Rule(NONE, include=("plain",)), *recipe.rules[:1]))
    assert rows(plan(model, PARAMS, TOKENS, recipe=left))["plain"][-1] == "kept: left by a rule"


def test_table_shows_paths_as_they_are():
    """Square brackets and colons in a path are no markup."""
    params = {"[red]w[0]": jnp.ones((D, F)), ":smile:": jnp.ones((D, F))}
    result = plan(lambda p, x: x @ p["[red]w[0]"] + x @ p[":smile:"], params, jnp.ones((T, D)))
    assert set(rows(result)) == set(params)


def test_table_on_a_console():
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(plan(model, PARAMS, TOKENS))
    assert "layers/1/w1" in console.export_text()


def test_plans_are_static_and_comparable():
    """A plan is a pytree without leaves, equal to one made again, so it can pass through jit."""
    result = plan(model, PARAMS, TOKENS)
    assert jax.tree.leaves(result) == []
    assert hash(result) == hash(plan(model, PARAMS, TOKENS))
    assert result != plan(model, PARAMS, TOKENS, recipe="nvfp4_weight_only")
    assert jax.jit(lambda p, x: x * len(p.quantized))(result, 1) == 10


def test_siblings_that_are_quantized_share():
    """A sibling that a rule leaves alone has no part in the shared scales."""
    recipe = Recipe("mine", (Rule(NONE, include=("*/k",)), Rule(W4A4)))
    result = plan(model, PARAMS, TOKENS, recipe=recipe)
    assert result.by_path["layers/0/q"].weight.siblings == ("layers/0/k", "layers/0/q", "layers/0/v")
    assert [e.path for e in result.siblings(result.by_path["layers/0/q"])] == ["layers/0/q", "layers/0/v"]


@pytest.mark.parametrize("scale, axes", [("stack", (0,)), ("expert", (0, 1))])
def test_global_scale_axes(scale, axes):
    def apply(p, x):
        def layer(c, w):
            return c + jnp.einsum("etd,edf->etf", jnp.broadcast_to(c, (E, T, D)), w).sum(0), None

        return jax.lax.scan(layer, x, p["w"])[0]

    recipe = jaxfp4.recipes.get("nvfp4").with_expert_scale(scale)
    result = plan(apply, {"w": jnp.ones((3, E, D, D))}, jnp.ones((T, D)), recipe=recipe)
    (entry,) = result.quantized
    assert (entry.weight.layer_axes, entry.weight.expert_axes) == ((0,), (1,))
    assert result.global_scale_axes(entry) == axes
    assert result.init_stats()["w"]["amax"].shape == (3, E)


def test_recipes_are_data():
    recipe = jaxfp4.recipes.get("nvfp4")
    assert jaxfp4.recipes.get(recipe) is recipe
    assert dataclasses.replace(recipe, name="other") != recipe


def test_gptq_has_no_local_hessian_scales():
    with pytest.raises(ValueError, match=r"Method\(LocalHessian\(\), Gptq\(\)\): wanted Max, Mse, FourOverSix or"):
        jaxfp4.recipes.Method(jaxfp4.recipes.LocalHessian(), jaxfp4.recipes.Gptq())
