"""Marked values: whose products they are, and what is seen of them, however deep they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType

from jaxfp4.algorithms import observed, quantize_params, quantized
from jaxfp4.recipes import CacheFormat, KvCache, Recipe, Rule, Scheme, plan
from jaxfp4.tensors.cache_rounding import fake_quantize_cache
from jaxfp4.transform.marks import find_marks
from jaxfp4.transform.trace import leaves_of, trace

D, T, L = 32, 8, 3
RECIPE = Recipe("cache", (Rule(Scheme.W4A4),), kv_cache=KvCache(CacheFormat.FP8))


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X = draw(T, D)
PARAMS = {n: draw(D, D, seed=i) / 4 for i, n in enumerate("qkvo")}
STACK = {n: jnp.stack([draw(D, D, seed=9 * i + j) / (4 - j) for j in range(L)]) for i, n in enumerate("qkvo")}


def rotate(x):
    """Stands for a rotary embedding: what lies between a weight's product and the cache."""
    first, second = jnp.split(x, 2, -1)
    angle = jnp.arange(x.shape[0], dtype=jnp.float32)[:, None]
    return jnp.concatenate([first * jnp.cos(angle) - second, second * jnp.cos(angle) + first], -1)


def attend(q, k, v):
    k, v = checkpoint_name(k, "keys"), checkpoint_name(v, "values")
    return jax.nn.softmax(q @ k.T) @ v


def block(p, x, wrap=lambda f: f, attend=attend):
    def inner(p, x):
        return x + attend(x @ p["q"], rotate(x @ p["k"]), x @ p["v"]) @ p["o"]

    return wrap(inner)(p, x)


def expected(p, x) -> tuple[float, float]:
    """The largest key and value."""
    k, v = jax.jit(lambda p, x: (jnp.abs(rotate(x @ p["k"])).max(), jnp.abs(x @ p["v"]).max()))(p, x)
    return float(k), float(v)


def layers_of(stack):
    return [jax.tree.map(lambda w, i=i: w[i], stack) for i in range(L)]


def scanned(p, x):
    return lax.scan(lambda c, w: (block(w, c), None), x, p)[0]


WRAPS = {
    "as it is": lambda f: f,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "jit in remat": lambda f: jax.checkpoint(jax.jit(f)),
    "cond": lambda f: lambda p, x: lax.cond(x.sum() < 1e9, f, lambda p, x: x, p, x),
    "scan": lambda f: lambda p, x: lax.scan(lambda c, _: (f(p, c), None), x, None, length=1)[0],
    "while": lambda f: lambda p, x: lax.while_loop(lambda s: s[0] < 1, lambda s: (s[0] + 1, f(p, s[1])), (0, x))[1],
    "shard_map": lambda f: jax.shard_map(
        f, mesh=jax.make_mesh((8,), ("dp",), axis_types=(AxisType.Auto,)), in_specs=(P(), P(None)), out_specs=P(None)
    ),
}


@pytest.mark.parametrize("name", WRAPS)
def test_seen_inside(name):
    def apply(p, x):
        return block(p, x, WRAPS[name])

    result = plan(apply, PARAMS, X, recipe=RECIPE)
    assert {e.path: e.cached for e in result.entries if e.cached} == {"k": ("keys",), "v": ("values",)}
    outputs, stats = jax.jit(observed(apply, result))(PARAMS, X)
    np.testing.assert_array_equal(outputs, jax.jit(apply)(PARAMS, X))
    keys, values = expected(PARAMS, X)
    np.testing.assert_allclose(stats["k"]["keys_amax"], keys, rtol=1e-6)
    np.testing.assert_allclose(stats["v"]["values_amax"], values, rtol=1e-6)
    assert set(stats["q"]) == {"amax"}


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "remat"])
def test_marked_in_a_function_that_holds_no_weight(wrap):
    """An attention function of its own, jitted or rematerialized."""

    def apply(p, x):
        return block(p, x, attend=wrap(attend))

    result = plan(apply, PARAMS, X, recipe=RECIPE)
    stats = jax.jit(observed(apply, result))(PARAMS, X)[1]
    np.testing.assert_allclose(stats["k"]["keys_amax"], expected(PARAMS, X)[0], rtol=1e-6)


def per_layer(stack) -> np.ndarray:
    """`[L, 2]` largest keys and values of a loop over the layers."""
    x, seen = X, []
    for p in layers_of(stack):
        seen.append(expected(p, x))
        x = block(p, x)
    return np.array(seen)


def sliced(p, x):
    for layer in layers_of(p):
        x = block(layer, x)
    return x


def indexed(p, x):
    return lax.fori_loop(0, L, lambda i, c: block(jax.tree.map(lambda w: w[i], p), c), x)


def shared_body(p, x):
    """One jitted block called for each layer: the same jaxpr with other weights."""
    step = jax.jit(block)
    for layer in layers_of(p):
        x = step(layer, x)
    return x


def all_layers(p, x):
    """Keys and values of each layer, a layer's input being the sum of all before."""
    made = []
    for layer in layers_of(p):
        made.append((rotate(x @ layer["k"]), x @ layer["v"]))
        x = x + jnp.tanh(made[-1][0]) + made[-1][1]
    return made


def later(p, x, attend=attend):
    """All products first, the marks behind them in the other order."""
    for layer, (k, v) in reversed(list(zip(layers_of(p), all_layers(p, x), strict=True))):
        x = x + attend(x @ layer["q"], k, v) @ layer["o"]
    return x


@pytest.mark.parametrize("apply", [scanned, sliced, indexed, shared_body], ids=lambda f: f.__name__)
def test_layers_of_a_stack(apply):
    result = plan(apply, STACK, X, recipe=RECIPE)
    stats = jax.jit(observed(apply, result))(STACK, X)[1]
    found = np.stack([stats["k"]["keys_amax"], stats["v"]["values_amax"]], -1)
    np.testing.assert_allclose(found, per_layer(STACK), rtol=1e-5)


def test_layers_in_a_list():
    apart = layers_of(STACK)

    def apply(p, x):
        for layer in p:
            x = block(layer, x)
        return x

    result = plan(apply, apart, X, recipe=RECIPE)
    stats = jax.jit(observed(apply, result))(apart, X)[1]
    found = [[stats[f"{i}/k"]["keys_amax"], stats[f"{i}/v"]["values_amax"]] for i in range(L)]
    np.testing.assert_allclose(np.array(found), per_layer(STACK), rtol=1e-5)


def test_a_mark_belongs_to_the_product_that_made_it():
    """Not to the weight's last product before it."""
    result = plan(later, STACK, X, recipe=RECIPE)
    stats = jax.jit(observed(later, result))(STACK, X)[1]
    keys, values = zip(*jax.jit(all_layers)(STACK, X), strict=True)
    np.testing.assert_allclose(stats["k"]["keys_amax"], [jnp.abs(k).max() for k in keys], rtol=1e-6)
    np.testing.assert_allclose(stats["v"]["values_amax"], [jnp.abs(v).max() for v in values], rtol=1e-6)


@pytest.mark.parametrize("apply", [scanned, sliced, later], ids=lambda f: f.__name__)
def test_each_layer_is_quantized_with_its_own_amax(apply):
    """Against the model with the rounding written into it, weights and other activations dequantized alike."""
    recipe = Recipe("cache", (Rule(Scheme.W4A16),), kv_cache=KvCache(CacheFormat.NVFP4))
    result = plan(apply, STACK, X, recipe=recipe)
    amaxes = {"k": {"keys_amax": jnp.array([1.0, 0.2, 3.0])}, "v": {"values_amax": jnp.array([0.3, 2.0, 1.0])}}
    qparams = quantize_params(STACK, result, amaxes)
    plain = {n: w.weight.dequantize() for n, w in qparams.items()}
    order = iter(reversed(range(L)) if apply is later else range(L))

    def rounding(q, k, v):
        i = next(order)
        k = fake_quantize_cache(k, amaxes["k"]["keys_amax"][i], CacheFormat.NVFP4)
        v = fake_quantize_cache(v, amaxes["v"]["values_amax"][i], CacheFormat.NVFP4)
        return jax.nn.softmax(q @ k.T) @ v

    def by_hand(p, x):
        if apply is later:
            return later(p, x, rounding)
        for layer in layers_of(p):
            x = block(layer, x, attend=rounding)
        return x

    found = quantized(apply, result)(qparams, X)
    np.testing.assert_allclose(found, jax.jit(by_hand)(plain, X), rtol=1e-4, atol=1e-4)
    assert np.abs(found - jax.jit(apply)(plain, X)).max() > 0.01


def test_one_weight_for_keys_and_values():
    def apply(p, x):
        k, v = jnp.split(x @ p["kv"], 2, -1)
        return attend(x @ p["q"], rotate(k), v) @ p["o"]

    params = {"kv": jnp.concatenate([PARAMS["k"], PARAMS["v"]], 1), "q": PARAMS["q"], "o": PARAMS["o"]}
    result = plan(apply, params, X, recipe=RECIPE)
    assert result.by_path["kv"].cached == ("keys", "values")
    stats = jax.jit(observed(apply, result))(params, X)[1]
    keys, values = expected(PARAMS, X)
    np.testing.assert_allclose(stats["kv"]["keys_amax"], keys, rtol=1e-6)
    np.testing.assert_allclose(stats["kv"]["values_amax"], values, rtol=1e-6)


def test_names_of_ones_own():
    recipe = Recipe("cache", RECIPE.rules, kv_cache=KvCache(keys="k_rotated", values="v_state"))

    def apply(p, x):
        k, v = checkpoint_name(rotate(x @ p["k"]), "k_rotated"), checkpoint_name(x @ p["v"], "v_state")
        return jax.nn.softmax(checkpoint_name(x @ p["q"], "queries") @ k.T) @ v @ p["o"]

    result = plan(apply, PARAMS, X, recipe=recipe)
    assert {e.path for e in result.entries if e.cached} == {"k", "v"}


def test_other_marks_stay_as_they_are():
    """Without a kv_cache, names mean nothing."""

    def apply(p, x):
        return block(p, x)

    result = plan(apply, PARAMS, X)
    assert not any(e.cached for e in result.entries)
    assert set(observed(apply, result)(PARAMS, X)[1]["k"]) == {"amax"}


@pytest.mark.parametrize("split", ["tokens", "heads"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_sees_the_maximum_of_all_devices(split, check_vma):
    mesh = jax.make_mesh((2, 4), ("tp", "dp"), axis_types=(AxisType.Auto,) * 2)

    def body(p, x):
        k = checkpoint_name(x @ p["k"], "keys")
        v = checkpoint_name(x @ p["v"], "values")
        return k * v

    spec, x_spec = (P(), P("dp")) if split == "tokens" else (P(None, "tp"), P())
    out = P("dp") if split == "tokens" else P(None, "tp")
    params, x = {n: jnp.round(PARAMS[n] * 9) for n in "kv"}, jnp.round(X * 4)
    apply = jax.shard_map(
        body, mesh=mesh, in_specs=(dict.fromkeys("kv", spec), x_spec), out_specs=out, check_vma=check_vma
    )
    result = plan(apply, params, x, recipe=RECIPE)
    stats = jax.jit(observed(apply, result))(params, x)[1]
    np.testing.assert_array_equal(stats["k"]["keys_amax"], jnp.abs(x @ params["k"]).max())
    np.testing.assert_array_equal(stats["v"]["values_amax"], jnp.abs(x @ params["v"]).max())


def test_nan_in_keys():
    def apply(p, x):
        return attend(x @ p["q"], jnp.sqrt(x @ p["k"]), x @ p["v"]) @ p["o"]

    stats = observed(apply, plan(apply, PARAMS, X, recipe=RECIPE))(PARAMS, X)[1]
    assert np.isnan(stats["k"]["keys_amax"])
    assert np.isfinite(stats["k"]["amax"])


# What is refused.


def unmarked(p, x):
    return jax.nn.softmax(x @ p["q"] @ (x @ p["k"]).T) @ (x @ p["v"]) @ p["o"]


def sum_of_two(p, x):
    return attend(x @ p["q"], x @ p["k"] + x @ p["o"], x @ p["v"])


def from_inputs(p, x):
    return attend(x @ p["q"], x, x @ p["v"]) @ p["o"] + x @ p["k"]


REFUSED = {
    "unmarked": (unmarked, r"the model marks no value with the name 'keys' \(names found: none\): wanted one for the"),
    "sum of two": (sum_of_two, "the value marked 'keys' is made by k, o: wanted the result of exactly one weight"),
    "inputs": (from_inputs, "the value marked 'keys' is made by no weight: wanted the result of exactly one weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_usable_marks(name):
    apply, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        plan(apply, PARAMS, X, recipe=RECIPE)


def test_other_names_are_listed():
    recipe = Recipe("cache", RECIPE.rules, kv_cache=KvCache(keys="k"))
    with pytest.raises(ValueError, match=r"no value with the name 'k' \(names found: 'keys', 'values'\)"):
        plan(lambda p, x: block(p, x), PARAMS, X, recipe=recipe)


def test_marked_in_another_loop():
    """The mark is inside a loop, the product outside."""

    def apply(p, x):
        k, v = x @ p["k"], checkpoint_name(x @ p["v"], "values")
        scores = lax.scan(lambda c, _: (c + x @ p["q"] @ checkpoint_name(k, "keys").T, None), 0 * x @ k.T, length=2)[0]
        return scores @ v @ p["o"]

    result = plan(apply, PARAMS, X, recipe=RECIPE)
    with pytest.raises(ValueError, match="the value marked 'keys' is made in another loop, branch or shard_map than"):
        observed(apply, result)(PARAMS, X)


def test_marks_by_equation():
    leaves = leaves_of(PARAMS)
    body = trace(lambda p, x: block(p, x, jax.jit), leaves, (X,)).body
    marks = find_marks(body, leaves.paths, {"keys": "keys", "values": "values"})
    assert sorted((leaves.paths[m.leaf], m.kind, m.part) for m in marks.values()) == [
        ("k", "keys", "keys_amax"),
        ("v", "values", "values_amax"),
    ]
    assert all(path[0] == m.site[0] for path, m in marks.items())
