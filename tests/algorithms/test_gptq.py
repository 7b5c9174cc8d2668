"""GPTQ against a textbook in float64, closed forms, and what must not depend on the layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import E2M1_MIDPOINTS, E2M1_VALUES
from strict_jax import strict_promotion as strict_promotion

from jaxfp4.algorithms.gptq import Order, gptq
from jaxfp4.formats import E4M3, nvfp4

from . import synthetic
from .synthetic import relative_objective

each_order = pytest.mark.parametrize("order", Order)


def largest(blocks, global_scale, axis, importance):
    return nvfp4.encode_scale(jnp.max(jnp.abs(blocks), axis, keepdims=True), global_scale)


def sweep(blocks, global_scale, axis, importance):
    """The E4M3 code of least weighted squared error, the lowest of equals."""
    best = jnp.full_like(jnp.sum(blocks, axis, keepdims=True), jnp.inf)
    codes = jnp.zeros_like(best, jnp.uint8)
    importance = jnp.float32(1) if importance is None else importance

    def consider(code, found):
        best, codes = found
        scale = nvfp4.decode_scale(code.astype(jnp.uint8))
        rounded = nvfp4.dequantize(nvfp4.encode_values(blocks, scale, global_scale), scale, global_scale)
        error = jnp.sum(importance * (blocks - rounded) ** 2, axis, keepdims=True)
        return jnp.minimum(error, best), jnp.where(error < best, code.astype(jnp.uint8), codes)

    return jax.lax.fori_loop(1, len(E4M3.magnitudes), consider, (best, codes))[1]


def draw(rows: int, channels: int, seed: int = 0, tokens: int = 256) -> tuple[jax.Array, jax.Array]:
    """A weight and a Hessian of correlated channels of different sizes."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(channels, channels)) * np.exp(rng.normal(size=channels))
    x = (rng.normal(size=(tokens, channels)) @ mixing).astype(np.float32)
    return jnp.asarray(rng.normal(size=(rows, channels)), jnp.float32), jnp.asarray(x.T @ x)


@jax.jit
def scale_of(w) -> jax.Array:
    return nvfp4.global_scale(jnp.max(jnp.abs(w.astype(jnp.float32))))


def to_nearest(w, choose=largest, global_scale=None):
    """Codes of `w` `[N, K]` rounded to nearest, K a multiple of 16."""
    return _to_nearest(w, scale_of(w) if global_scale is None else global_scale, choose)


@functools.partial(jax.jit, static_argnums=2)
def _to_nearest(w, global_scale, choose):
    blocks = w.reshape(len(w), -1, 16)
    scales = choose(blocks.astype(jnp.float32), global_scale, 2, None)
    return nvfp4.encode_values(blocks, nvfp4.decode_scale(scales), global_scale).reshape(w.shape), scales[..., 0]


def dequantized(encoded, global_scale) -> np.ndarray:
    return np.asarray(_dequantized(*encoded, global_scale))


@jax.jit
def _dequantized(values, scales, global_scale):
    return nvfp4.dequantize(values, jnp.repeat(nvfp4.decode_scale(scales), 16, 1), global_scale)


def assert_same(found, wanted):
    for name, a, b in zip(("values", "scales"), found, wanted, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def textbook(w, hessian, scales, damping, order):
    """GPTQ as in the paper, column by column with the Cholesky factor of the inverse, float64; `scales` `[N, K]`."""
    w, hessian = np.array(w, np.float64), np.array(hessian, np.float64)
    energy = np.diag(hessian).copy()
    dead = energy == 0
    hessian[np.diag_indices_from(hessian)] += damping * energy[~dead].mean()
    hessian[dead] = hessian[:, dead] = 0
    hessian[dead, dead] = 1
    visits = np.argsort(-energy, kind="stable") if order is Order.ACTIVATION else np.arange(len(energy))
    upper = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(visits, visits)])).T
    result = np.zeros_like(w)
    for i, k in enumerate(visits):
        quotient = w[:, k] / scales[:, k]
        nearest = E2M1_VALUES[np.searchsorted(E2M1_MIDPOINTS, np.abs(quotient))]
        result[:, k] = np.sign(quotient) * nearest * scales[:, k]
        error = (w[:, k] - result[:, k]) / upper[i, i]
        w[:, visits[i:]] -= error[:, None] * upper[i, i:]
    return result


@each_order
@pytest.mark.parametrize(
    ("rows", "channels", "tokens", "choose", "dead"),
    [
        (8, 64, 256, sweep, []),
        (24, 160, 400, largest, [0, 7, 100]),
        (16, 96, 40, largest, []),
        (3, 37, 100, largest, [36]),
    ],
)
def test_textbook(rows, channels, tokens, choose, dead, order):
    w, hessian = draw(rows, channels, tokens=tokens)
    live = ~np.isin(np.arange(channels), dead)
    hessian = jnp.asarray(np.where(live[:, None] & live, hessian, 0), jnp.float32)
    scale = scale_of(w)
    encoded = gptq(w, hessian, scale, choose, order=order)
    scales = np.repeat(np.asarray(nvfp4.decode_scale(encoded.scales) * scale, np.float64), 16, 1)[:, :channels]
    found = dequantized(encoded, scale)[:, :channels]
    wanted = textbook(w, hessian, scales, 0.01, order)
    # A value near a midpoint may go either way in float32, and later columns follow it.
    different = found != wanted.astype(np.float32)
    if different.any():
        objective = relative_objective(w, wanted, hessian)
        assert relative_objective(w, found, hessian) == pytest.approx(objective, rel=1e-5)
    assert np.mean(different) < 0.01


@each_order
@pytest.mark.parametrize(
    "diagonal", ["identity", "any", "zero", "nan", "inf", "indefinite", "negative", "huge", "tiny"]
)
def test_rounds_to_nearest_without_correlation(diagonal, order):
    w, hessian = draw(8, 64)
    w = w.at[0, 0].set(-1e-40).at[1, :16].set(0.0).at[2, 5].set(-0.0)
    energy = jnp.exp(jnp.linspace(-4, 4, 64))
    hessian = {
        "identity": jnp.eye(64),
        "any": jnp.diag(energy),
        "zero": jnp.zeros((64, 64)),
        "nan": hessian.at[3, 9].set(jnp.nan),
        "inf": hessian.at[3, 3].set(jnp.inf),
        "indefinite": jnp.full((64, 64), 2.0) - jnp.eye(64),
        "negative": hessian.at[3, :].set(0.0).at[:, 3].set(0.0).at[3, 3].set(-1.0),
        "huge": jnp.diag(energy * 1e36),
        "tiny": jnp.diag(energy * 1e-36),
    }[diagonal]
    assert_same(gptq(w, hessian, scale_of(w), largest, order=order), to_nearest(w))


@pytest.mark.parametrize("kind", ["zero", "nan", "inf", "indefinite"])
def test_equal_importance_without_a_usable_hessian(kind):
    w, hessian = draw(8, 64)
    hessian = {
        "zero": jnp.zeros((64, 64)),
        "nan": hessian.at[0, 0].set(jnp.nan),
        "inf": hessian.at[0, 1].set(-jnp.inf),
        "indefinite": jnp.full((64, 64), 2.0) - jnp.eye(64),
    }[kind]
    assert_same(gptq(w, hessian, scale_of(w), sweep), to_nearest(w, sweep))


@pytest.mark.parametrize("scale", [2.0**-103 / 2688, 1e-20, 1e20])
def test_zero_hessian_keeps_signs_of_subnormal_weights(scale):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32)) * 2e-38, jnp.float32)
    nearest = to_nearest(w, global_scale=jnp.float32(scale))
    assert_same(gptq(w, jnp.zeros((32, 32)), jnp.float32(scale), largest), nearest)


@each_order
def test_dead_channels_change_nothing_else(order):
    w, hessian = draw(8, 64)
    dead = np.arange(16, 32)
    hessian = hessian.at[dead].set(0.0).at[:, dead].set(0.0)
    scale = scale_of(w)
    found = gptq(w, hessian, scale, largest, order=order)
    nearest = to_nearest(w)
    np.testing.assert_array_equal(found.values[:, dead], nearest[0][:, dead])
    live = np.delete(np.arange(64), dead)
    assert np.any(found.values[:, live] != nearest[0][:, live])
    alone = gptq(w[:, live], hessian[np.ix_(live, live)], scale, largest, order=order)
    np.testing.assert_array_equal(found.values[:, live], alone.values)


def test_importance_is_the_damped_diagonal():
    seen = []

    def choose(blocks, global_scale, axis, importance):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), importance)
        return largest(blocks, global_scale, axis, importance)

    w, hessian = draw(3, 37)
    hessian = hessian.at[5].set(0.0).at[:, 5].set(0.0)
    jax.block_until_ready(gptq(w, hessian, scale_of(w), choose, damping=0.5, order=Order.ACTIVATION))
    jax.effects_barrier()
    assert [x.shape for x in seen] == [(1, 3, 16)]
    energy = np.diag(hessian)
    wanted = energy + 0.5 * energy.sum() / 36
    importance = seen[0].reshape(-1)
    np.testing.assert_allclose(importance[:37] / importance[5], wanted / wanted[5], rtol=1e-6)
    np.testing.assert_array_equal(importance[37:], 0)


@pytest.mark.parametrize(("channels", "order"), [(1, Order.STATIC), (40, Order.STATIC), (57, Order.ACTIVATION)])
def test_ragged_contraction_as_if_padded_by_hand(channels, order):
    w, hessian = draw(8, channels)
    padding = -channels % 16
    wide = jnp.pad(w, ((0, 0), (0, padding)))
    scale = scale_of(w)
    found = gptq(w, hessian, scale, sweep, order=order)
    assert found.values.shape == (8, channels + padding) and found.scales.shape == (8, (channels + padding) // 16)
    assert found.values.dtype == found.scales.dtype == jnp.uint8
    assert_same(found, gptq(wide, jnp.pad(hessian, (0, padding)), scale, sweep, order=order))
    np.testing.assert_array_equal(found.values[:, channels:], 0)


def test_two_channels_that_always_agree():
    """Only the sum of their weights matters, so the second makes up for the first: 3.4 becomes 3 + 0.5, not 3 + 0."""
    w = jnp.zeros((1, 16)).at[0, :3].set(jnp.array([3.2, 0.2, 6.0]))
    hessian = jnp.zeros((16, 16)).at[:2, :2].set(1.0).at[2, 2].set(1.0)
    scale = jnp.float32(1)
    nearest = dequantized(to_nearest(w, global_scale=scale), scale)
    found = dequantized(gptq(w, hessian, scale, largest), scale)
    np.testing.assert_array_equal(nearest[0, :3], [3, 0, 6])
    np.testing.assert_array_equal(found[0, :3], [3, 0.5, 6])


def test_order_of_visits():
    """The channel with more energy is rounded first; equal energies keep the stored order."""
    w = jnp.zeros((1, 16)).at[0, :3].set(jnp.array([0.2, 3.2, 6.0]))
    x = jnp.zeros((1, 16)).at[0, :2].set(jnp.array([1.0, 2.0]))
    scale = jnp.float32(1)
    for order, wanted in ((Order.STATIC, [0, 3, 6]), (Order.ACTIVATION, [0.5, 3, 6])):
        found = dequantized(gptq(w, x.T @ x, scale, largest, order=order), scale)
        np.testing.assert_array_equal(found[0, :3], wanted, err_msg=order.name)
    w, hessian = draw(8, 64)
    deviation = jnp.sqrt(jnp.diagonal(hessian))
    hessian = (hessian / deviation[:, None] / deviation[None, :]).at[jnp.arange(64), jnp.arange(64)].set(1.0)
    scale = scale_of(w)
    assert_same(gptq(w, hessian, scale, sweep, order=Order.ACTIVATION), gptq(w, hessian, scale, sweep))


@each_order
def test_rank_one_hessian(order):
    """Of a single token only `sum_k w_k x_k` matters, and each column corrects it as far as its grid goes.

    The last columns are zero, so nothing saturates there and the grid around the last target has steps of half a scale.
    """
    w = draw(8, 64)[0].at[:, 60:].set(0.0)
    x = np.sign(np.random.default_rng(1).normal(size=(1, 64))).astype(np.float32)
    scale = scale_of(w)
    encoded = gptq(w, jnp.asarray(x.T @ x), scale, largest, order=order, damping=1e-4)
    residual = (np.asarray(w) - dequantized(encoded, scale)) @ x[0]
    last = np.asarray(nvfp4.decode_scale(encoded.scales[:, -1]) * scale)
    assert np.all(np.abs(residual) < 0.26 * last)
    assert np.any(np.abs((np.asarray(w) - dequantized(to_nearest(w), scale)) @ x[0]) > last)


@each_order
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**30])
def test_powers_of_two_on_the_hessian_change_nothing(factor, order):
    w, hessian = draw(8, 64)
    scale = scale_of(w)
    found = gptq(w, hessian * factor, scale, sweep, order=order)
    assert_same(found, gptq(w, hessian, scale, sweep, order=order))


def test_batch_order_of_the_sum():
    w, _ = draw(16, 128)
    mixing = np.random.default_rng(2).normal(size=(128, 128))
    batches = [(np.random.default_rng(i).normal(size=(64, 128)) @ mixing).astype(np.float32) for i in range(8)]
    scale = scale_of(w)
    reference = sum(b.astype(np.float64).T @ b for b in batches)
    objectives = []
    for ordered in (batches, batches[::-1]):
        hessian = functools.reduce(np.add, [b.T @ b for b in ordered])
        objectives.append(relative_objective(w, dequantized(gptq(w, hessian, scale, largest), scale), reference))
    assert objectives[0] == pytest.approx(objectives[1], rel=1e-5)


@pytest.mark.parametrize("block", [16, 48, 1024])
def test_block_changes_only_rounding(block):
    w, hessian = draw(8, 144)
    scale = scale_of(w)
    found, wanted = (
        relative_objective(w, dequantized(gptq(w, hessian, scale, largest, **kwargs), scale), hessian)
        for kwargs in ({"block": block}, {})
    )
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_weights_as_their_float32_values(dtype):
    w, hessian = draw(8, 64)
    narrow = w.astype(dtype)
    scale = scale_of(narrow)
    assert_same(gptq(narrow, hessian, scale, sweep), gptq(narrow.astype(jnp.float32), hessian, scale, sweep))


@pytest.mark.parametrize(("rows", "order"), [(1, Order.STATIC), (3, Order.ACTIVATION)])
def test_rows_by_themselves(rows, order):
    w, hessian = draw(27, 112)
    scale = scale_of(w)
    parts = [gptq(w[i : i + rows], hessian, scale, sweep, order=order) for i in range(0, len(w), rows)]
    joined = [np.concatenate(part) for part in zip(*parts, strict=True)]
    assert_same(joined, gptq(w, hessian, scale, sweep, order=order))


def test_rows_split_over_devices():
    w, hessian = draw(40, 80)
    scale = scale_of(w)
    mesh = jax.make_mesh((8,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    local = functools.partial(gptq, choose_scales=sweep)
    split = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(jax.P("tp"), jax.P(), jax.P()), out_specs=jax.P("tp")))
    assert_same(split(w, hessian, scale), local(w, hessian, scale))


@each_order
def test_experts_and_rows_split_over_devices(order):
    drawn = [draw(16, 48, seed=i) for i in range(4)]
    w, hessian = (jnp.stack(x) for x in zip(*drawn, strict=True))
    hessian = hessian.at[1].set(0.0)
    scale = jnp.stack([scale_of(x) for x in w])
    mesh = jax.make_mesh((2, 4), ("ep", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = (jax.P("ep", "tp"), jax.P("ep"), jax.P("ep"))
    local = jax.vmap(functools.partial(gptq, choose_scales=sweep, order=order))
    split = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P("ep", "tp")))
    assert_same(split(w, hessian, scale), local(w, hessian, scale))


@each_order
def test_experts_get_what_they_get_alone(order):
    drawn = [draw(8, 64, seed=i) for i in range(3)]
    w, hessian = (jnp.stack(x) for x in zip(*drawn, strict=True))
    hessian = hessian.at[1].set(0.0).at[2, 0, 0].set(jnp.nan)
    scale = jnp.stack([scale_of(x) for x in w])
    call = functools.partial(gptq, choose_scales=sweep, order=order)
    together = jax.jit(jax.vmap(call))(w, hessian, scale)
    for i in range(3):
        assert_same([part[i] for part in together], call(w[i], hessian[i], scale[i]))


def test_traces_once_for_a_shape():
    traces = []

    def choose(blocks, *args):
        traces.append(blocks.shape)
        return largest(blocks, *args)

    for seed in range(3):
        w, hessian = draw(4, 48, seed=seed)
        gptq(w, hessian, scale_of(w), choose)
    assert traces == [(4, 3, 16)]


def test_synthetic_layer():
    """One seed, fewer rows. The loop of Model-Optimizer 0.47, given these scales, has the same two static figures."""
    layer = synthetic.layer(1, outputs=128)
    w, hessian, scale = jnp.asarray(layer.w), jnp.asarray(layer.hessian), scale_of(layer.w)
    moments = layer.test.T @ layer.test
    found = {"nearest": relative_objective(layer.w, dequantized(to_nearest(w), scale), moments)}
    for choose, order in ((largest, Order.STATIC), (sweep, Order.STATIC), (sweep, Order.ACTIVATION)):
        q = dequantized(gptq(w, hessian, scale, choose, order=order), scale)
        found[f"{choose.__name__} {order.value}"] = relative_objective(layer.w, q, moments)
    assert found == pytest.approx(
        {"nearest": 0.00955, "largest static": 0.00566, "sweep static": 0.00173, "sweep activation": 0.00156},
        rel=0.01,
    )


@jax.jit
def nearest_with(w, scales, global_scale):
    """Codes of `w` rounded to nearest with the E4M3 codes `scales`."""
    blocks = w.reshape(len(w), -1, 16)
    return nvfp4.encode_values(blocks, nvfp4.decode_scale(scales)[..., None], global_scale).reshape(w.shape)


@each_order
@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_nearest_with_the_same_scales(seed, order):
    layer = synthetic.layer(seed, channels=256, outputs=64, tokens=1024, outliers=4)
    w, hessian, scale = jnp.asarray(layer.w), jnp.asarray(layer.hessian), scale_of(layer.w)
    encoded = gptq(w, hessian, scale, sweep, order=order)
    nearest = dequantized((nearest_with(w, encoded.scales, scale), encoded.scales), scale)
    found = dequantized(encoded, scale)
    assert relative_objective(w, found, hessian) < 0.8 * relative_objective(w, nearest, hessian)
    assert layer.output_error(found) < 0.9 * layer.output_error(nearest)


def wrong_scales(blocks, global_scale, axis, importance):
    return largest(blocks, global_scale, axis, importance)[..., 0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w": jnp.ones((2, 4, 32))}, ValueError, r"w of shape \(2, 4, 32\): wanted \[N, K\]"),
        ({"w": jnp.ones((4, 32), jnp.int32)}, TypeError, "an array of dtype int32: wanted one of float32"),
        ({"hessian": jnp.eye(31)}, ValueError, r"hessian of shape \(31, 31\) .*: wanted \(32, 32\)"),
        ({"hessian": jnp.ones((2, 32, 32))}, ValueError, r"hessian of shape \(2, 32, 32\) .*: wanted \(32, 32\)"),
        ({"hessian": jnp.eye(32, dtype=jnp.bfloat16)}, TypeError, "hessian of dtype bfloat16: wanted float32"),
        ({"global_scale": jnp.ones(1)}, ValueError, r"global_scale of shape \(1,\) .*: wanted a float32 scalar"),
        ({"global_scale": jnp.bfloat16(1)}, ValueError, "global_scale .* dtype bfloat16: wanted a float32 scalar"),
        (
            {"choose_scales": wrong_scales},
            ValueError,
            r"choose_scales returned uint8 \(4, 2\) .*: wanted uint8 \(4, 2, 1",
        ),
        ({"damping": 0.0}, ValueError, "damping=0.0: wanted a positive number"),
        ({"damping": float("nan")}, ValueError, "damping=nan: wanted a positive number"),
        ({"block": 24}, ValueError, "block=24: wanted a positive multiple of 16"),
        ({"block": 0}, ValueError, "block=0: wanted a positive multiple of 16"),
    ],
)
def test_errors(change, error, message):
    arguments = {"w": jnp.ones((4, 32)), "hessian": jnp.eye(32), "global_scale": jnp.float32(1)}
    with pytest.raises(error, match=message):
        gptq(**{**arguments, "choose_scales": largest, **change})
