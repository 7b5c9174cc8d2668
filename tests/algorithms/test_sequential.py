"""Quantizing block by block: each block sees what the quantized ones before it put out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding

import jaxfp4
from jaxfp4.algorithms import (
    calibrate,
    digest,
    make_calibrate_fn,
    quantize_params,
    quantize_sequentially,
    quantized,
    weights,
)
from jaxfp4.algorithms.layers import blocks_of
from jaxfp4.formats import LeafError
from jaxfp4.recipes import plan

from . import models

D = 64
RNG = np.random.default_rng(0)
X = [jnp.asarray(RNG.normal(size=(24, D)) * np.exp(RNG.normal(size=D)), jnp.float32) for _ in range(3)]
MLP = {n: jnp.asarray(RNG.normal(size=(D, D)) / 8, jnp.float32) for n in ("w_0", "w_1", "w_2")}


def mlp(p, x):
    for name in ("w_0", "w_1", "w_2"):
        x = jax.nn.relu(x @ p[name])
    return x


def stacked_mlp(p, x):
    return jax.lax.scan(lambda c, w: (jax.nn.relu(c @ w), None), x, p["w"])[0]


STACKED = {"w": jnp.stack(list(MLP.values()))}


def run(apply, params, recipe, batches=X):
    result = plan(apply, params, batches[0], recipe=recipe)
    return result, quantize_sequentially(apply, params, batches, result, progress=False)


@functools.cache
def by_hand(recipe) -> dict:
    """The statistics of a layer taken with the layers before it quantized, in a loop over layers."""

    def product(p, x):
        return x @ p["w"]

    single = plan(product, {"w": MLP["w_0"]}, X[0], recipe=recipe)
    observe, apply = make_calibrate_fn(product, single), quantized(product, single)
    inputs, result = X, {}
    for name, w in MLP.items():
        stats = functools.reduce(lambda s, x, w=w: observe({"w": w}, s, x), inputs, single.init_stats())
        layer = quantize_params({"w": w}, single, stats)
        inputs = [jax.nn.relu(apply(layer, x)) for x in inputs]
        result[name] = layer["w"]
    return result


@pytest.mark.parametrize(
    "recipe, form", [("nvfp4", "apart"), ("nvfp4_weighted_mse", "apart"), ("nvfp4_weighted_mse", "stacked")]
)
def test_each_block_sees_the_quantized_ones(recipe, form):
    expected = by_hand(recipe)
    _, found = run(mlp, MLP, recipe) if form == "apart" else run(stacked_mlp, STACKED, recipe)
    for i, (name, wanted) in enumerate(expected.items()):
        got = (
            found[name]
            if form == "apart"
            else jax.tree.map(lambda leaf, i=i: jnp.asarray(np.asarray(leaf)[i]), found["w"])
        )
        assert np.mean(np.asarray(got.weight.packed) != np.asarray(wanted.weight.packed)) < 0.005
        np.testing.assert_allclose(got.weight.dequantize(), wanted.weight.dequantize(), atol=0.2)
        if wanted.input_scale is not None:
            np.testing.assert_allclose(got.input_scale, wanted.input_scale, rtol=1e-5)


def test_it_is_not_what_one_calibration_gives():
    """The input scales of later layers follow the quantized outputs of earlier ones."""
    result, found = run(mlp, MLP, "nvfp4")
    at_once = quantize_params(MLP, result, calibrate(mlp, MLP, X, result, progress=False))
    assert found["w_0"].input_scale == at_once["w_0"].input_scale
    assert found["w_2"].input_scale != at_once["w_2"].input_scale
    assert digest(found) == digest(at_once)


def test_gptq_is_better_than_nearest():
    """The outputs of the whole are nearer to the model's, calibrated at once or block by block."""
    result, found = run(mlp, MLP, "nvfp4_gptq_max")
    at_once = quantize_params(MLP, result, calibrate(mlp, MLP, X, result, progress=False))
    nearest, _ = run(mlp, MLP, "nvfp4")
    plain = quantize_params(MLP, nearest, calibrate(mlp, MLP, X, nearest, progress=False))
    apply = quantized(mlp, result)
    errors = [
        sum(float(np.square(np.asarray(apply(q, x)) - np.asarray(mlp(MLP, x))).sum()) for x in X)
        for q in (found, at_once, plain)
    ]
    assert errors[0] < 0.9 * errors[2] and errors[1] < 0.9 * errors[2]


@functools.cache
def language_model(form: str):
    params = models.draw()
    if form == "unrolled":
        return models.unrolled, models.apart(params)
    return models.scanned, params


def test_layers_stacked_and_apart():
    """The same model with its layers in a scan and in a list, attention and experts included."""
    gptq = jaxfp4.recipes.get("nvfp4_gptq").rules[0].method
    rules = (
        jaxfp4.Rule(jaxfp4.Scheme.W4A4, include=("*/o", "*/down"), method=gptq),
        jaxfp4.Rule(jaxfp4.Scheme.W4A4),
    )
    found = {}
    for form in ("scanned", "unrolled"):
        apply, params = language_model(form)
        found[form] = run(apply, params, jaxfp4.Recipe("some gptq", rules), models.batches(2))[1]
    together = jax.tree.map(lambda *leaves: np.stack(leaves), *found["unrolled"]["layers"])
    for name in models.QUANTIZED:
        left, right = together[name], found["scanned"]["layers"][name]
        assert left.weight.packed.shape == right.weight.packed.shape
        assert np.mean(np.asarray(left.weight.packed) != np.asarray(right.weight.packed)) < 0.02
        np.testing.assert_allclose(left.input_scale, right.input_scale, rtol=2e-2)
        np.testing.assert_array_equal(np.ravel(left.weight.global_scale), np.ravel(right.weight.global_scale))


def test_blocks_are_layers_in_the_order_of_use():
    apply, params = language_model("unrolled")
    blocks = blocks_of(plan(apply, params, models.batches(1)[0]))
    assert [b.index for b in blocks] == [()] * models.L
    assert [set(b.paths) for b in blocks] == [{f"layers/{i}/{n}" for n in models.QUANTIZED} for i in range(models.L)]
    apply, params = language_model("scanned")
    blocks = blocks_of(plan(apply, params, models.batches(1)[0]))
    assert [b.index for b in blocks] == [(i,) for i in range(models.L)]


def test_weights_without_numbers_are_blocks_with_their_siblings():
    params = dict.fromkeys(("z_first", "gate", "up", "a_last"), MLP["w_0"])

    def apply(p, x):
        x = x @ p["z_first"]
        return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["a_last"]

    blocks = blocks_of(plan(apply, params, X[0]))
    assert [b.paths for b in blocks] == [("z_first",), ("gate", "up"), ("a_last",)]


def with_more(p, x):
    """A scan over weights, over biases along another axis and over the numbers of layers."""

    def step(x, xs):
        w, b, i = xs
        return jax.nn.relu(x @ w + b) * (1 + i), None

    return jax.lax.scan(step, x, (p["w"], p["b"].T, jnp.arange(3.0)))[0]


ONE_FORM = {
    "apart": (mlp, MLP),
    "stacked": (stacked_mlp, STACKED),
    "with more": (with_more, STACKED | {"b": jnp.ones((D, 3))}),
}


@pytest.mark.parametrize("form", ONE_FORM)
def test_compiles_once_for_layers_of_one_form(caplog, form):
    with jax.log_compiles():
        run(*ONE_FORM[form], "nvfp4_weighted_mse")
    compiled = [m for m in caplog.messages if "Compiling jit(_observe)" in m]
    assert len(compiled) == 1


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_weight_only_weighted_mse"])
def test_passes_do_not_begin_at_the_first_layer(recipe):
    """What is between two layers is computed once for each batch, however many layers follow."""
    count, calls = 6, [0] * 6

    def counted(layer, x):
        def call(x):
            calls[layer] += 1
            return x

        return jax.pure_callback(call, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def deep(p, x):
        for i in range(count):
            x = jax.nn.relu(counted(i, x) @ p[f"w_{i}"])
        return x

    run(deep, {f"w_{i}": MLP["w_0"] for i in range(count)}, recipe)
    assert calls == [len(X)] * count


@pytest.mark.parametrize("picks", [False, True])
def test_passes_through_a_scan_do_not_begin_at_the_first_layer(picks):
    """A scan over layers is a list of layers; one that picks them by itself is passed again for each of them."""
    count, calls = 6, 0

    def counted(x):
        def call(x):
            nonlocal calls
            calls += 1
            return x

        return jax.pure_callback(call, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    def deep(p, x):
        if picks:
            return jax.lax.scan(lambda x, i: (jax.nn.relu(counted(x) @ p["w"][i]), None), x, jnp.arange(count))[0]
        return jax.lax.scan(lambda x, w: (jax.nn.relu(counted(x) @ w), None), x, p["w"])[0]

    run(deep, {"w": jnp.stack([MLP["w_0"]] * count)}, "nvfp4")
    assert calls == len(X) * count * (count if picks else 1)


def test_weights_of_a_scan_that_all_meet_one_activation():
    """As in cross-attention: they are no layers to the plan, but scanned over together with layers."""
    params = {"encoder": MLP["w_0"], "w": STACKED["w"], "cross": 2 * STACKED["w"]}

    def scan(p, x):
        e = x @ p["encoder"]
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w[0] + e @ w[1]), None), x, (p["w"], p["cross"]))[0]

    def picks(p, x):
        e = x @ p["encoder"]
        return jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["w"][i] + e @ p["cross"][i]), x)

    result, found = run(scan, params, "nvfp4_weighted_mse")
    assert not result.by_path["cross"].weight.layer_axes
    _, wanted = run(picks, params, "nvfp4_weighted_mse")
    for name, weight in found.items():
        assert np.mean(np.asarray(weight.weight.packed) != np.asarray(wanted[name].weight.packed)) < 0.005
        np.testing.assert_allclose(weight.input_scale, wanted[name].input_scale, rtol=1e-5)


def test_siblings_that_are_not_quantized():
    """Keys and one of two branches are left by a rule, with layers in a scan as in a list."""
    rule = jaxfp4.Rule(jaxfp4.Scheme.W4A4, exclude=("*/k", "*/up"))
    found = {}
    for form in ("scanned", "unrolled"):
        apply, params = language_model(form)
        found[form] = run(apply, params, jaxfp4.Recipe("some", (rule,)), models.batches(1))[1]["layers"]
    together = jax.tree.map(lambda *leaves: np.stack(leaves), *found["unrolled"])
    for name in models.SHAPES:
        one, other = (tree[name] for tree in (found["scanned"], together))
        if name in ("k", "up", "router"):
            np.testing.assert_array_equal(one, other)
        else:
            assert np.mean(np.asarray(one.weight.packed) != other.weight.packed) < 0.02


def test_two_scans_of_one_length_are_blocks_of_their_own():
    """Layers of the second see all of the first quantized."""
    params = dict.fromkeys(("first", "second"), STACKED["w"])

    def twice(p, x):
        return stacked_mlp({"w": p["second"]}, stacked_mlp({"w": p["first"]}, x))

    def apart(p, x):
        return functools.reduce(lambda x, w: jax.nn.relu(x @ w), p.values(), x)

    _, found = run(twice, params, "nvfp4")
    _, wanted = run(apart, {f"w_{i}": w for i, w in enumerate([*STACKED["w"], *STACKED["w"]])}, "nvfp4")
    scales = np.concatenate([found["first"].input_scale, found["second"].input_scale])
    np.testing.assert_allclose(scales, [w.input_scale for w in wanted.values()], rtol=1e-6)


def layer(x, w):
    return jax.nn.relu(x @ w)


@jax.custom_vjp
def with_derivative(x, w):
    return layer(x, w)


with_derivative.defvjp(lambda x, w: (layer(x, w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
ROWS, COLUMNS = jax.P("tp"), jax.P(None, "tp")


def layers(one):
    def apply(p, x):
        return functools.reduce(one, (p[name] for name in MLP), x)

    return apply


def in_shard_map(function, in_specs, out_specs):
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


FORMS = {
    "jit": lambda: layers(jax.jit(layer)),
    "remat": lambda: layers(jax.checkpoint(layer)),
    "custom_vjp": lambda: layers(with_derivative),
    "cond": lambda: layers(lambda x, w: jax.lax.cond(jnp.sum(x) > -1e30, layer, lambda x, w: x @ w, x, w)),
    "loop": lambda: layers(lambda x, w: jax.lax.fori_loop(0, 1, lambda i, x: layer(x, w), x)),
    "shard_map": lambda: layers(in_shard_map(layer, (ROWS, jax.P()), ROWS)),
    "columns": lambda: layers(in_shard_map(layer, (jax.P(), COLUMNS), COLUMNS)),
    "all in jit": lambda: jax.jit(layers(layer)),
    "all in remat": lambda: jax.checkpoint(layers(layer)),
    "all in shard_map": lambda: in_shard_map(layers(layer), (jax.P(), ROWS), ROWS),
}


@pytest.mark.parametrize("form", FORMS)
def test_whatever_is_around_a_layer(form):
    _, found = run(FORMS[form](), MLP, "nvfp4_weighted_mse")
    for name, wanted in expected_of_plain_layers().items():
        np.testing.assert_allclose(found[name].input_scale, wanted.input_scale, rtol=1e-5)
        assert np.mean(np.asarray(found[name].weight.packed) != np.asarray(wanted.weight.packed)) < 0.005


@functools.cache
def expected_of_plain_layers():
    return run(mlp, MLP, "nvfp4_weighted_mse")[1]


def test_batches_of_several_shapes():
    batches = [X[0], X[1][:10], X[2]]
    _, found = run(mlp, MLP, "nvfp4_weighted_mse", batches)
    _, others = run(mlp, MLP, "nvfp4_weighted_mse", [jnp.concatenate([X[0], X[1][:10]]), X[2]])
    for name in MLP:
        np.testing.assert_allclose(found[name].input_scale, others[name].input_scale, rtol=1e-5)
        assert np.mean(np.asarray(found[name].weight.packed) != np.asarray(others[name].weight.packed)) < 0.005


def test_a_weight_used_before_and_after_another():
    """The layer between sees it quantized; its statistics are those of both activations."""

    def shared(p, x):
        x = jax.nn.relu(x @ p["w_0"])
        return jax.nn.relu(x @ p["w_1"]) @ p["w_0"]

    params = {name: MLP[name] for name in ("w_0", "w_1")}
    result, found = run(shared, params, "nvfp4")
    at_once = quantize_params(params, result, calibrate(shared, params, X, result, progress=False))
    np.testing.assert_allclose(found["w_0"].input_scale, at_once["w_0"].input_scale, rtol=1e-5)
    single = plan(lambda p, x: x @ p["w"], {"w": MLP["w_0"]}, X[0])
    apply = quantized(lambda p, x: x @ p["w"], single)
    inputs = [jax.nn.relu(apply({"w": found["w_0"]}, x)) for x in X]
    largest = max(float(jnp.max(jnp.abs(x))) for x in inputs)
    np.testing.assert_allclose(found["w_1"].input_scale, largest / 2688, rtol=1e-5)


def test_channel_scales_are_folded_before():
    params = {"scale": jnp.asarray(RNG.uniform(0.5, 2, D), jnp.float32), "w": MLP["w_0"]}

    def apply(p, x):
        return (x * p["scale"]) @ p["w"]

    result, found = run(apply, params, "nvfp4_smoothquant_gptq")
    assert result.folds
    expected = quantize_params(params, result, calibrate(apply, params, X, result, progress=False))
    np.testing.assert_allclose(found["scale"], expected["scale"], rtol=1e-5)
    np.testing.assert_allclose(
        found["w"].weight.dequantize(), expected["w"].weight.dequantize(), atol=0.2 * float(jnp.abs(params["w"]).max())
    )


def test_rotated_weights():
    expected = by_hand("nvfp4_hadamard")
    _, found = run(mlp, MLP, "nvfp4_hadamard")
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name].input_scale, wanted.input_scale, rtol=1e-5)
        assert found[name].rotation == 16


def test_on_a_mesh():
    mesh = jax.make_mesh((2, 4), ("tp", "ep"), axis_types=(AxisType.Auto,) * 2)
    apply, params = language_model("scanned")
    specs = {n: jax.P(None, *models.SPECS[n]) for n in models.SHAPES}
    placed = dict(
        params, layers={n: jax.device_put(w, NamedSharding(mesh, specs[n])) for n, w in params["layers"].items()}
    )
    alone, spread = (run(apply, p, "nvfp4", models.batches(2))[1] for p in (params, placed))
    assert digest(spread) == digest(alone)
    for path, weight in weights(spread).items():
        np.testing.assert_allclose(weight.input_scale, weights(alone)[path].input_scale, rtol=1e-2)


def test_refuses_no_batches_and_bad_ones():
    result = plan(mlp, MLP, X[0])
    with pytest.raises(ValueError, match="batches is empty: wanted at least one batch of calibration data"):
        quantize_sequentially(mlp, MLP, [], result, progress=False)
    with pytest.raises(LeafError, match=r"^w_0: its activations hold NaN or Inf"):
        quantize_sequentially(mlp, MLP, [X[0] * jnp.nan], result, progress=False)


def test_plans_without_statistics_need_no_pass():
    result, found = run(mlp, MLP, "nvfp4_weight_only_mse")
    assert digest(found) == digest(quantize_params(MLP, result))
    assert dataclasses.is_dataclass(found["w_0"]) and jaxfp4.digest(found)
