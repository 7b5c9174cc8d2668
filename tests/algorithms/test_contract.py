"""What every algorithm must hold to, in each form in which it can be run. One row for each algorithm."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfp4.algorithms import calibrate, digest, make_calibrate_fn, quantize_params
from jaxfp4.algorithms.channels import after_folding, fold_channel_scales
from jaxfp4.recipes import Plan, plan
from jaxfp4.tensors import QuantizedWeight, global_amax
from jaxfp4.tensors.quantize import quantize_unchecked

E, D, F, T = 4, 64, 32, 96


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """The recipe that stands for it, and what it promises."""

    recipe: str
    objective: str = "none"
    """What it makes smaller than max calibration does: `weights`, their squares, `channels`, those weighted with the
    activation's, `output`, that of the product, or `none`."""
    exact: bool = False
    """Whether all forms give the same bytes; sums over tokens or channels may differ in their last bits."""
    data: bool = True
    """Whether it needs calibration data."""


ALGORITHMS = {
    "max": Algorithm("nvfp4", exact=True, data=False),
    "mse": Algorithm("nvfp4_mse", "weights", exact=True, data=False),
    "four_over_six": Algorithm("nvfp4_four_over_six", "weights", exact=True, data=False),
    "weighted_mse": Algorithm("nvfp4_weighted_mse", "channels", exact=True),
    "local_hessian": Algorithm("nvfp4_local_hessian", "output"),
    "gptq": Algorithm("nvfp4_gptq", "output"),
    "awq": Algorithm("nvfp4_weight_only_awq", "output"),
    "awq_clip": Algorithm("nvfp4_weight_only_awq_clip", "output"),
    "smoothquant": Algorithm("nvfp4_smoothquant"),
    "hadamard": Algorithm("nvfp4_hadamard"),
}

MOST_MOVED = 0.02
"""The largest share of codes that may differ between forms of an algorithm that is not exact."""


def one_expert(p, x):
    return (x * p["scale"]) @ p["w"]


def experts(p, x):
    return jnp.einsum("etd,edf->etf", x * p["scale"], p["w"])


def parameters(dtype) -> dict[str, jax.Array]:
    w = np.random.default_rng(0).normal(size=(E, D, F)) * np.array([1, 2, 0.5, 3])[:, None, None]
    return {"scale": jnp.asarray(np.random.default_rng(1).uniform(0.5, 2, D), dtype), "w": jnp.asarray(w, dtype)}


def batches(dtype, count: int = 3) -> list[jax.Array]:
    """Channels of different sizes that go together, and none for one channel."""
    rng = np.random.default_rng(2)
    mixing = np.eye(D) + 0.3 * rng.normal(size=(D, D)) / np.sqrt(D)
    sizes = np.exp(rng.normal(size=D)) * (np.arange(D) != 7)
    return [jnp.asarray(rng.normal(size=(E, T, D)) @ mixing * sizes, dtype) for _ in range(count)]


@functools.cache
def planned(algorithm: str, dtype: str, single: bool = False) -> Plan:
    w = jax.ShapeDtypeStruct((D, F) if single else (E, D, F), dtype)
    abstract = {"scale": jax.ShapeDtypeStruct((D,), dtype), "w": w}
    x = jax.ShapeDtypeStruct((T, D) if single else (E, T, D), dtype)
    return plan(one_expert if single else experts, abstract, x, recipe=ALGORITHMS[algorithm].recipe)


@functools.cache
def collected(algorithm: str, dtype: str) -> dict | None:
    if not ALGORITHMS[algorithm].data:
        return None
    return calibrate(experts, parameters(dtype), batches(dtype), planned(algorithm, dtype), progress=False)


@functools.cache
def eager(algorithm, dtype):
    return quantize_params(parameters(dtype), planned(algorithm, dtype), collected(algorithm, dtype))


@functools.cache
def jitted(algorithm):
    """Shared by what is run and what is counted. JAX keeps one cache for all jitted forms of a function."""
    return jax.jit(lambda *args: quantize_params(*args), static_argnums=1)


def under_jit(algorithm, dtype):
    """The plan is a static argument for float32, and one like the others for bfloat16."""
    call = jitted(algorithm) if dtype == "float32" else jax.jit(quantize_params)
    return call(parameters(dtype), planned(algorithm, dtype), collected(algorithm, dtype))


def on_a_mesh(algorithm, dtype, spec):
    mesh = jax.make_mesh((2, 4), ("tp", "ep"), axis_types=(AxisType.Auto,) * 2)
    params = parameters(dtype)
    for name, placed in (("w", spec), ("scale", P())):
        params[name] = jax.device_put(np.asarray(params[name]), NamedSharding(mesh, placed))
    return quantize_params(params, planned(algorithm, dtype), collected(algorithm, dtype))


def contraction_split(algorithm, dtype):
    return on_a_mesh(algorithm, dtype, P("ep", "tp"))


@functools.cache
def outputs_split(algorithm, dtype):
    return on_a_mesh(algorithm, dtype, P(None, None, "tp"))


def moved(left, right) -> float:
    """The share of codes that differ, two to a byte."""
    bytes_of = [np.asarray(q["w"].weight.packed) for q in (left, right)]
    return float(np.mean([np.mean(bytes_of[0] >> s & 15 != bytes_of[1] >> s & 15) for s in (0, 4)]))


each_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


@each_algorithm
@pytest.mark.parametrize(
    "form, dtype",
    [
        (under_jit, "float32"),
        (under_jit, "bfloat16"),
        (contraction_split, "float32"),
        (outputs_split, "bfloat16"),
    ],
)
def test_form_does_not_matter(algorithm, dtype, form):
    """The bytes are those of the eager run on one device, or nearly so where sums over tokens decide."""
    found, expected = form(algorithm, dtype), eager(algorithm, dtype)
    if ALGORITHMS[algorithm].exact:
        assert digest(found) == digest(expected)
    assert moved(found, expected) <= MOST_MOVED
    assert found["w"].weight.shape == (E, D, F)


@each_algorithm
def test_keeps_the_sharding(algorithm):
    found = outputs_split(algorithm, "bfloat16")["w"].weight
    for part in (found.packed, found.scales):
        assert part.sharding.spec == P(None, None, "tp")


@each_algorithm
@each_dtype
def test_vmap_over_experts(algorithm, dtype):
    """Mapped over experts, each gets the bytes that it gets alone."""
    single = planned(algorithm, dtype, single=True)
    params = parameters(dtype)
    params["scale"] = jnp.broadcast_to(params["scale"], (E, D))
    stats = None
    if ALGORITHMS[algorithm].data:
        # No weight's own activation is all zero: each expert meets its part of every batch.
        step = make_calibrate_fn(one_expert, single)
        of_expert = []
        for i in range(E):
            own = {"scale": params["scale"][i], "w": params["w"][i]}
            of_expert.append(
                functools.reduce(lambda s, x, i=i, p=own: step(p, s, x[i]), batches(dtype), single.init_stats())
            )
        stats = jax.tree.map(lambda *states: np.stack(states), *of_expert)
    mapped = jax.vmap(lambda p, s: quantize_params(p, single, s))(params, stats)
    for i in range(E):
        own, own_stats = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], (params, stats))
        alone = quantize_params(jax.tree.map(jnp.asarray, own), single, jax.tree.map(jnp.asarray, own_stats))
        found = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], mapped)
        if ALGORITHMS[algorithm].exact:
            assert digest(found) == digest(alone)
        assert moved(found, alone) <= MOST_MOVED


def objective(kind: str, dtype: str, error: np.ndarray) -> np.ndarray:
    """By block of 16 channels and output, or in all for `output`; the error in units of the weights as they were."""
    x = np.concatenate([np.asarray(x, np.float64) for x in batches(dtype)], 1) * np.asarray(
        parameters(dtype)["scale"], np.float64
    )
    if kind == "output":
        return np.array([np.square(x @ error).sum()])
    weights = np.square(x).sum(1)[:, :, None] if kind == "channels" else 1.0
    return (weights * error**2).reshape(E, D // 16, 16, F).sum(2)


@each_algorithm
@each_dtype
def test_folding_first_is_the_same(algorithm, dtype):
    job = parameters(dtype), planned(algorithm, dtype), collected(algorithm, dtype)
    params, rest, stats = after_folding(*job)
    assert not rest.folds and bool(job[1].folds) == (params is not job[0])
    assert digest(quantize_params(params, rest, stats)) == digest(eager(algorithm, dtype))


@each_algorithm
@each_dtype
def test_never_worse_than_max_in_its_own_objective(algorithm, dtype):
    row = ALGORITHMS[algorithm]
    if row.objective == "none":
        pytest.skip("it has none that max calibration shares")
    params, stats = parameters(dtype), collected(algorithm, dtype)
    folded = fold_channel_scales(params, planned(algorithm, dtype), stats)
    before = np.asarray(folded["w"], np.float64)
    found = np.asarray(eager(algorithm, dtype)["w"].weight.dequantize(jnp.float32), np.float64)
    # Folded channels: an error of the weight counts as that of the original one.
    unfolded = np.asarray(folded["scale"], np.float64) / np.asarray(params["scale"], np.float64)
    divisor = planned(algorithm, dtype).quantized[0].method.scales.divisor
    plain = quantize_unchecked(params["w"], 1, global_amax=global_amax(params["w"]), divisor=divisor)
    theirs = np.asarray(plain.dequantize(jnp.float32), np.float64) - np.asarray(params["w"], np.float64)
    ours = objective(row.objective, dtype, (found - before) * unfolded[:, None])
    assert np.all(ours <= objective(row.objective, dtype, theirs) * (1 + 1e-5))
    assert ours.sum() < 0.97 * objective(row.objective, dtype, theirs).sum() or algorithm == "max"


@each_algorithm
def test_order_of_batches(algorithm):
    """Maxima are the same bits in any order, sums to 1e-5."""
    if not ALGORITHMS[algorithm].data:
        pytest.skip("it needs no data")
    params, result = parameters("float32"), planned(algorithm, "float32")
    forwards, backwards = (
        calibrate(experts, params, order, result, progress=False)
        for order in (batches("float32"), batches("float32")[::-1])
    )
    for name, state in forwards["w"].items():
        scale = np.abs(state).max()
        np.testing.assert_allclose(state, backwards["w"][name], rtol=0, atol=0 if "amax" in name else 1e-5 * scale)


@each_algorithm
def test_compiles_once_for_a_shape(algorithm):
    result, stats = planned(algorithm, "float32"), collected(algorithm, "float32")
    for factor in (1, 2):
        jitted(algorithm)(jax.tree.map(lambda leaf, f=factor: leaf * f, parameters("float32")), result, stats)
    assert jitted(algorithm)._cache_size() == 1


@each_algorithm
@each_dtype
def test_result(algorithm, dtype):
    """Finite, near the weight, of its dtype, with finite positive scales, and the same when repeated."""
    params = parameters(dtype)
    before = np.asarray(params["w"], np.float32)
    found = eager(algorithm, dtype)["w"]
    assert isinstance(found, QuantizedWeight)
    assert {f.name for f in dataclasses.fields(found)} >= {"weight", "input_scale", "pre_scale"}
    assert found.weight.dequantize().dtype == dtype
    scales = np.asarray(found.weight.scales, np.float32)
    assert np.all(np.isfinite(scales)) and np.all(scales > 0)
    np.testing.assert_array_equal(np.asarray(params["w"], np.float32), before)
    assert digest({"w": found}) == digest(eager.__wrapped__(algorithm, dtype))
