"""Several weights in one program give the bytes and shardings of one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp4
from jaxfp4.algorithms.quantization import quantize_weights
from jaxfp4.algorithms.together import quantized_together
from jaxfp4.formats import LeafError
from jaxfp4.recipes import Recipe, Rule, Scheme

D, F, E, LAYERS = 32, 32, 4, 2
SPECS = {"q": P(None, "tp"), "k": P(None, "tp"), "up": P("ep", None, "tp"), "down": P("ep", "tp", None)}


def apply_fn(params, x):
    for w in params:
        x = (x @ w["q"]) * jnp.mean(x @ w["k"])
        x = jnp.einsum("etf,efd->td", jnp.einsum("td,edf->etf", x, w["up"]), w["down"])
    return x


def draw():
    rng = np.random.default_rng(0)
    shapes = {"q": (D, D), "k": (D, F), "up": (E, D, F), "down": (E, F, D)}
    layers = [{n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(LAYERS)]
    for i, layer in enumerate(layers):
        layer["k"] *= 3 + i
        layer["up"][-1] *= 5
        layer["q"][:16, 0] = 0
    return layers


PARAMS = draw()
FP8 = Recipe("fp8", (Rule(Scheme.W8A8),))
PLANS = {
    scale: jaxfp4.plan(
        apply_fn,
        PARAMS,
        np.ones((2, D), np.float32),
        recipe=jaxfp4.recipes.get("nvfp4_weight_only").with_expert_scale(scale),
    )
    for scale in ("stack", "expert")
}


def placed(where, specs=SPECS):
    if where is None:
        return jax.device_put(PARAMS, jax.devices()[0])
    sizes, kind = where
    mesh = jax.make_mesh(sizes, ("tp", "ep"), axis_types=(kind,) * 2, devices=jax.devices()[: sizes[0] * sizes[1]])
    return [{n: jax.device_put(w, NamedSharding(mesh, specs[n])) for n, w in layer.items()} for layer in PARAMS]


def by_path(plan, params):
    leaves = jax.tree.leaves(params)
    return {e.path: leaves[e.weight.leaf] for e in plan.quantized}


def groups_of(plan):
    return list(dict.fromkeys(plan.siblings(e) for e in plan.quantized))


def assert_alike(found, wanted):
    assert list(found) == list(wanted)
    for path, weight in wanted.items():
        for one, other in zip(jax.tree.leaves(found[path]), jax.tree.leaves(weight), strict=True):
            assert one.dtype == other.dtype and one.sharding.is_equivalent_to(other.sharding, one.ndim)
            np.testing.assert_array_equal(*(np.asarray(x).view(f"u{x.dtype.itemsize}") for x in (one, other)))
        assert jax.tree.structure(found[path]) == jax.tree.structure(weight)


@pytest.mark.parametrize(
    ("where", "scale"),
    [(None, "stack"), (((2, 2), AxisType.Auto), "expert"), (((1, 2), AxisType.Explicit), "stack")],
    ids=str,
)
def test_same_bytes_and_places(where, scale):
    plan, params = PLANS[scale], placed(where)
    arrays = by_path(plan, params)
    found = quantized_together(plan, groups_of(plan), arrays)
    assert set(found.tensors) == set(arrays) and all(bool(flag) for _, flag in found.finite)
    # Layers are alike, so that each kind of group is one program.
    assert sorted(len(paths) for paths, _ in found.finite) == [LAYERS, LAYERS, 2 * LAYERS]
    assert_alike(
        quantize_weights(plan, arrays, None, together=True), quantize_weights(plan, arrays, None, together=False)
    )


def test_siblings_that_are_split_differently_are_taken_too():
    """`q` over tp, `k` whole: their common maximum is over both."""
    plan, params = PLANS["stack"], placed(((2, 2), AxisType.Auto), {**SPECS, "k": P()})
    arrays = by_path(plan, params)
    assert len(quantized_together(plan, groups_of(plan), arrays).tensors) == len(arrays)
    assert_alike(
        quantize_weights(plan, arrays, None, together=True), quantize_weights(plan, arrays, None, together=False)
    )


def test_cut_blocks_go_another_way_to_the_same_bytes():
    plan, params = PLANS["stack"], placed(((2, 2), AxisType.Auto), {**SPECS, "down": P(None, ("tp", "ep"))})
    arrays = by_path(plan, params)
    found = quantized_together(plan, groups_of(plan), arrays).tensors
    assert set(arrays) - set(found) == {path for path in arrays if path.endswith("down")}
    result = quantize_weights(plan, arrays, None, together=True)
    assert jaxfp4.digest(result) == jaxfp4.digest(quantize_weights(plan, by_path(plan, placed(None)), None))


@pytest.mark.parametrize("recipe", ["nvfp4_hadamard", "nvfp4_weighted_mse", "nvfp4_gptq", FP8], ids=str)
def test_what_needs_more_than_the_weights_is_left(recipe):
    plan = jaxfp4.plan(apply_fn, PARAMS, np.ones((2, D), np.float32), recipe=recipe)
    assert not quantized_together(plan, groups_of(plan), by_path(plan, placed(None))).tensors


def test_traced_arrays_numpy_arrays_and_other_devices_are_left():
    plan = PLANS["stack"]
    groups = groups_of(plan)
    assert not quantized_together(plan, groups, by_path(plan, PARAMS)).tensors

    def traced(params):
        assert not quantized_together(plan, groups, by_path(plan, params)).tensors
        return params

    jax.eval_shape(traced, PARAMS)
    params = placed(None)
    params[0]["k"] = jax.device_put(params[0]["k"], jax.devices()[1])
    left = set(by_path(plan, params)) - set(quantized_together(plan, groups, by_path(plan, params)).tensors)
    assert left == {"0/q", "0/k"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(bad):
    plan, params = PLANS["stack"], placed(None)
    params[1]["up"] = params[1]["up"].at[2, 3, 4].set(bad)
    arrays = by_path(plan, params)
    assert [bool(flag) for _, flag in quantized_together(plan, groups_of(plan), arrays).finite].count(False) == 1
    with pytest.raises(LeafError, match=r"1/up: it holds NaN or Inf: wanted finite weights"):
        quantize_weights(plan, arrays, None, together=True)


def test_weights_are_freed_group_by_group():
    plan, params = PLANS["stack"], placed(None)
    arrays = by_path(plan, params)
    freed = []

    def release(group):
        freed.append([e.path for e in group])
        for entry in group:
            arrays[entry.path].delete()

    found = quantize_weights(plan, arrays, None, release, together=True)
    assert len(freed) == 3 * LAYERS and all(w.is_deleted() for w in arrays.values())
    assert jaxfp4.digest(found) == jaxfp4.digest(quantize_weights(plan, by_path(plan, placed(None)), None))
