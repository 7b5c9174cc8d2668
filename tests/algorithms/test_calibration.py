"""Statistics over batches, the input scales that follow, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.algorithms import calibrate, calibration, input_scales, make_calibrate_fn, observed, unseen_experts
from jaxfp4.formats import LeafError
from jaxfp4.recipes import plan

from . import models

D, F, E, T = 32, 16, 4, 6


def two_matrices(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


PARAMS = {"a": draw(D, F), "b": draw(F, D)}
BATCHES = [draw(T, D, seed=i) for i in range(3)]
PLAN = plan(two_matrices, PARAMS, BATCHES[0])


def test_amaxes_over_batches():
    stats = calibrate(two_matrices, PARAMS, BATCHES, PLAN, progress=False)
    forward = jax.jit(lambda x: jax.nn.relu(x @ PARAMS["a"]))
    np.testing.assert_array_equal(stats["a"]["amax"], max(jnp.abs(x).max() for x in BATCHES))
    np.testing.assert_array_equal(stats["b"]["amax"], max(forward(x).max() for x in BATCHES))


def test_order_of_batches_does_not_matter():
    params, tokens = models.draw(), models.batches()
    result = plan(models.scanned, params, tokens[0])
    calibrate_fn = make_calibrate_fn(models.scanned, result)
    found = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0, 0]):
        stats = result.init_stats()
        for i in order:
            stats = calibrate_fn(params, stats, tokens[i])
        found.append(stats)
    assert found[0].keys() == {f"layers/{n}" for n in models.QUANTIZED}
    for other in found[1:]:
        for path, state in found[0].items():
            np.testing.assert_array_equal(state["amax"], other[path]["amax"], err_msg=path)


def test_traces_once_for_a_shape():
    traces = []

    def apply(p, x):
        traces.append(x.shape)
        return two_matrices(p, x)

    result = plan(apply, PARAMS, BATCHES[0])
    traces.clear()
    calibrate(apply, PARAMS, BATCHES, result, progress=False)
    assert traces == [(T, D)]
    traces.clear()
    calibrate(apply, PARAMS, [*BATCHES, BATCHES[0][:2]] * 2, result, progress=False)
    assert traces == [(T, D), (2, D)]


@pytest.mark.parametrize("form", [list, tuple, iter])
def test_batches_in_any_iterable(form):
    batches = form((x,) for x in BATCHES)
    stats = calibrate(two_matrices, PARAMS, batches, PLAN, progress=False)
    np.testing.assert_array_equal(stats["a"]["amax"], max(jnp.abs(x).max() for x in BATCHES))


def test_several_arguments():
    def apply(p, x, scale):
        return (x * scale) @ p["a"]

    params = {"a": PARAMS["a"]}
    result = plan(apply, params, BATCHES[0], 2.0)
    stats = calibrate(apply, params, [(BATCHES[0], 2.0), (BATCHES[0], 4.0)], result, progress=False)
    np.testing.assert_array_equal(stats["a"]["amax"], jnp.abs(BATCHES[0]).max() * 4)


@pytest.mark.parametrize("batches, total", [(BATCHES, 3), (iter(BATCHES), None)])
@pytest.mark.parametrize("progress", [True, False])
def test_progress_bar(monkeypatch, batches, total, progress):
    """The bar knows how many batches there are, if they know it."""
    seen = {}

    def track(sequence, description, **options):
        seen.update(options)
        return BATCHES

    monkeypatch.setattr(calibration, "track", track)
    calibrate(two_matrices, PARAMS, batches, PLAN, progress=progress)
    assert seen["total"] == total
    assert seen["disable"] is not progress


def test_no_batches():
    with pytest.raises(ValueError, match="batches is empty: wanted at least one batch of calibration data"):
        calibrate(two_matrices, PARAMS, [], PLAN)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_activations(bad):
    """NaN and Inf go through the statistics to an error that names the first weight that met them."""
    batches = [*BATCHES[:2], BATCHES[2].at[3, 5].set(bad), BATCHES[0]]
    with pytest.raises(LeafError, match=r"^a: its activations hold NaN or Inf: wanted finite calibration data"):
        calibrate(two_matrices, PARAMS, batches, PLAN, progress=False)
    _, stats = observed(two_matrices, PLAN)(PARAMS, batches[2])
    assert np.isnan(stats["a"]["amax"]) if np.isnan(bad) else np.isposinf(stats["a"]["amax"])
    with pytest.raises(LeafError, match=r"^a: its activations hold NaN or Inf"):
        input_scales(PLAN, stats)


def test_nan_of_one_expert():
    def apply(p, x):
        return jnp.einsum("etd,edf->etf", x, p["w"])

    params, x = {"w": draw(E, D, F)}, draw(E, T, D).at[2, 0, 0].set(np.nan)
    result = plan(apply, params, x)
    _, stats = observed(apply, result)(params, x)
    np.testing.assert_array_equal(np.isnan(stats["w"]["amax"]), [False, False, True, False])
    with pytest.raises(LeafError, match=r"^w: its activations hold NaN"):
        calibrate(apply, params, [x], result, progress=False)


def test_nan_only_inside_the_model():
    def apply(p, x):
        return jnp.sqrt(x @ p["a"]) @ p["b"]

    result = plan(apply, PARAMS, BATCHES[0])
    with pytest.raises(LeafError, match=r"^b: its activations hold NaN or Inf"):
        calibrate(apply, PARAMS, BATCHES, result, progress=False)


# Experts without tokens.


def routed(p, x, sizes):
    h = jax.lax.ragged_dot(x, p["gate"], sizes) * jax.lax.ragged_dot(x, p["up"], sizes)
    return jax.lax.ragged_dot(h, p["down"], sizes)


EXPERTS = {"gate": draw(E, D, F), "up": draw(E, D, F), "down": draw(E, F, D)}
SIZES = jnp.array([2, 0, 4, 0], jnp.int32)


def test_experts_without_tokens(caplog):
    result = plan(routed, EXPERTS, BATCHES[0], SIZES)
    with caplog.at_level("WARNING", logger="jaxfp4"):
        stats = calibrate(routed, EXPERTS, [(BATCHES[0], SIZES)], result, progress=False)
    assert unseen_experts(result, stats) == {n: [1, 3] for n in EXPERTS}
    assert sorted(caplog.messages) == [
        f"{n}: no token reached experts [1, 3]; they get their layer's shared scale" for n in sorted(EXPERTS)
    ]
    rows = np.abs(np.asarray(BATCHES[0])).max(1)
    np.testing.assert_array_equal(stats["gate"]["amax"], [rows[:2].max(), 0, rows[2:].max(), 0])
    scales = input_scales(result, stats)
    np.testing.assert_array_equal(scales["gate"], np.float32(rows.max()) / np.float32(2688))
    np.testing.assert_array_equal(scales["gate"], scales["up"])


def test_all_experts_reached(caplog):
    result = plan(routed, EXPERTS, BATCHES[0], SIZES)
    stats = calibrate(routed, EXPERTS, [(BATCHES[0], SIZES), (BATCHES[1], SIZES[::-1])], result, progress=False)
    assert unseen_experts(result, stats) == {}
    assert caplog.messages == []


def test_experts_without_tokens_in_layers():
    params, tokens = models.draw(), models.batches(1)
    result = plan(models.scanned, params, tokens[0])
    _, stats = observed(models.scanned, result)(params, tokens[0])
    stats["layers/up"]["amax"] = stats["layers/up"]["amax"].at[:].set(1).at[1, 4].set(0)
    assert unseen_experts(result, stats)["layers/up"] == [[1, 4]]


# Input scales.


def test_scales_of_layers_experts_and_siblings():
    params, tokens = models.draw(), models.batches(1)
    result = plan(models.scanned, params, tokens[0])
    stats = calibrate(models.scanned, params, tokens, result, progress=False)
    scales = input_scales(result, stats)
    for group in (["q", "k", "v"], ["gate", "up"], ["o"], ["down"]):
        amaxes = [np.asarray(stats[f"layers/{n}"]["amax"]).reshape(models.L, -1).max(1) for n in group]
        expected = np.maximum.reduce(amaxes) / np.float32(2688)
        for name in group:
            np.testing.assert_array_equal(scales[f"layers/{name}"], expected, err_msg=name)


def test_no_statistics_no_scales():
    assert input_scales(PLAN, None) == {}


def test_scales_under_jit():
    stats = {"a": {"amax": jnp.float32(1)}, "b": {"amax": jnp.float32(0)}}
    assert jax.jit(lambda s: input_scales(PLAN, s))(stats).keys() == {"a", "b"}


def test_activations_that_are_all_zero():
    with pytest.raises(LeafError, match=r"^b: its activations were all zero in calibration: wanted some data"):
        input_scales(PLAN, {"a": {"amax": jnp.float32(1)}, "b": {"amax": jnp.float32(0)}})


def test_activations_that_are_all_zero_in_some_layers():
    params, tokens = models.draw(), models.batches(1)
    result = plan(models.scanned, params, tokens[0])
    stats = jax.tree.map(jnp.ones_like, result.init_stats())
    stats["layers/o"]["amax"] = jnp.array([1.0, 0.0])
    with pytest.raises(LeafError, match=r"^layers/o: its activations were all zero in layers \[1\] in calibration"):
        input_scales(result, stats)


WRONG_STATS = {
    "missing": (
        {"a": {"amax": jnp.float32(1)}},
        "stats of another plan: 'b' is missing from them; start with plan.init_stats",
    ),
    "unknown": (
        {n: {"amax": jnp.float32(1)} for n in "abc"},
        "stats of another plan: 'c' is unknown in them; start with plan.init_stats",
    ),
    "bare": (
        {"a": jnp.float32(1), "b": jnp.float32(1)},
        r"a: its statistics are of type \w+: wanted a dict like \{'amax': array\}; use plan.init_stats",
    ),
    "shape": (
        {n: {"amax": jnp.ones(s)} for n, s in (("a", 2), ("b", ()))},
        r"a: statistics 'amax' of shape \(2,\): wanted \(\)",
    ),
}


@pytest.mark.parametrize("name", WRONG_STATS)
def test_statistics_of_another_plan(name):
    stats, message = WRONG_STATS[name]
    with pytest.raises(ValueError, match=message):
        input_scales(PLAN, stats)
    with pytest.raises(ValueError, match=message):
        make_calibrate_fn(two_matrices, PLAN)(PARAMS, stats, BATCHES[0])


@pytest.mark.parametrize(
    "params, message",
    [
        ({"a": PARAMS["a"]}, "b: params has 'nothing' in its place"),
        ({"a": PARAMS["a"], "c": PARAMS["b"]}, "b: params has 'c' in its place; wanted the tree that the plan"),
        ({"a": PARAMS["a"].T, "b": PARAMS["b"]}, r"a: shape \(16, 32\): wanted \(32, 16\), as in the plan"),
    ],
)
def test_parameters_of_another_plan(params, message):
    with pytest.raises(LeafError, match=message):
        calibrate(two_matrices, params, BATCHES, PLAN, progress=False)
