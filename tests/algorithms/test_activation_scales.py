"""Global amaxes of activations against numpy on the values themselves, and the input scales that follow."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from strict_jax import backend as backend
from strict_jax import strict_promotion as strict_promotion

import jaxfp4
from jaxfp4.algorithms import calibrate, input_scales, observed
from jaxfp4.algorithms.activation_scales import activation_amax
from jaxfp4.formats import LeafError
from jaxfp4.recipes import (
    Awq,
    HeadroomActivations,
    MaxActivations,
    Method,
    MseActivations,
    PercentileActivations,
    Recipe,
    Rule,
    Scheme,
    SmoothQuant,
    plan,
)
from jaxfp4.transform.histogram import BINS, LogHistogram, bins_of, centres, merged
from jaxfp4.transform.statistics import Sample

from . import models

METHODS = {
    "max": MaxActivations(),
    "percentile": PercentileActivations(99.5),
    "headroom": HeadroomActivations(),
    "mse": MseActivations(),
}
MERGED = {name: method for name, method in METHODS.items() if method.histogram}


def chosen(method, x) -> np.ndarray:
    """The global amax for an array of activations `[rows, channels]`."""
    x = jnp.asarray(x, jnp.float32)
    histogram = LogHistogram().observe(Sample(x, (), (1,)))
    return np.asarray(activation_amax(method, jnp.abs(x).max(), histogram))


def amaxes(x) -> np.ndarray:
    """Of blocks, each at the centre of its bin, increasing."""
    amax = np.abs(np.asarray(x, np.float32)).reshape(-1, 16).max(1)
    return np.sort(centres()[np.asarray(bins_of(jnp.asarray(amax[amax > 0])))])


def percentile_of(values: np.ndarray, percentile: float) -> np.ndarray:
    """The least of the sorted values that at most `1 - percentile / 100` of them exceed."""
    above = np.array([(values > v).mean() for v in values])
    return values[above <= 1 - percentile / 100 + 1e-9].min()


def draw(name: str, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (256, 128)
    x = {
        "normal": lambda: rng.normal(size=shape),
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "t2": lambda: rng.standard_t(2, shape),
        "squared relu": lambda: np.maximum(rng.normal(size=shape), 0) ** 2,
        "half zero": lambda: rng.normal(size=shape) * (rng.random(shape) < 0.03),
        "lognormal tokens": lambda: rng.normal(size=shape) * np.exp(3 * rng.normal(size=(shape[0], 1))),
        "wide tokens": lambda: rng.normal(size=shape) * np.exp(5 * rng.normal(size=(shape[0], 1))),
        "few huge": lambda: rng.normal(size=shape) * np.where(np.arange(shape[0]) < 3, 1e6, 1)[:, None],
    }[name]()
    return x.astype(np.float32)


DISTRIBUTIONS = (
    "normal", "uniform", "t2", "squared relu", "half zero", "lognormal tokens", "wide tokens", "few huge",
)  # fmt: skip


@pytest.mark.parametrize("percentile", [1, 90, 99.99])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_percentile(name, percentile):
    x = draw(name)
    expected = min(percentile_of(amaxes(x), percentile), np.abs(x).max())
    assert chosen(PercentileActivations(percentile), x) == expected


def test_percentile_is_of_blocks_and_near_numpys():
    x = draw("normal")
    blocks = np.abs(x).reshape(-1, 16).max(1)
    assert chosen(PercentileActivations(90), x) == pytest.approx(np.percentile(blocks, 90), rel=0.06)
    assert np.percentile(np.abs(x), 90) < 0.7 * np.percentile(blocks, 90)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("method", [PercentileActivations(100), HeadroomActivations(rho=1, upper_percentile=100)])
def test_percentile_of_100_is_the_largest_magnitude(method, name):
    x = draw(name)
    assert chosen(method, x) == np.abs(x).max()


@pytest.mark.parametrize("rho", [1, 1024, 16384])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_headroom(name, rho):
    """Model-Optimizer's rule, written out."""
    blocks = amaxes(draw(name))
    upper = percentile_of(blocks, 99.99)
    anchor = percentile_of(blocks[blocks * 1e6 >= upper], 1)
    assert chosen(HeadroomActivations(rho=rho), draw(name)) == max(np.float32(rho) * anchor, upper)


def test_headroom_of_equal_values():
    """Model-Optimizer's own test: all .5 and rho 1024 give 512."""
    assert chosen(HeadroomActivations(rho=1024), np.full((256, 64), 0.5)) == pytest.approx(512, rel=0.06)


def test_headroom_keeps_what_is_far_above_the_anchor():
    """Model-Optimizer's own test: one block of 100 among values of .001 and rho 1 give 100."""
    x = np.full((256, 64), 1e-3)
    x[0, :16] = 100
    assert chosen(HeadroomActivations(rho=1, upper_percentile=100), x) == 100
    assert chosen(HeadroomActivations(rho=1), x) == pytest.approx(100, rel=0.06)


def relative_error(x: np.ndarray, amax: float) -> float:
    """The mean over blocks of the squared error over the squared amax, measured with the quantizer itself."""
    blocks = x.reshape(-1, 16).astype(np.float64)
    error = blocks - np.asarray(jaxfp4.fake_quantize(x, global_amax=amax)).reshape(-1, 16)
    peak = np.abs(blocks).max(1)
    return float(np.mean((error**2).sum(1)[peak > 0] / peak[peak > 0] ** 2))


@pytest.mark.parametrize("name", [n for n in DISTRIBUTIONS if n != "uniform"])
def test_mse_against_brute_force(name):
    """Within 1% of the best of 120 global amaxes, a quarter octave apart. On normal data that is max calibration."""
    x = draw(name)
    amax = float(np.abs(x).max())
    found = relative_error(x, chosen(MseActivations(), x))
    best = min(relative_error(x, amax * 2 ** (-i / 4)) for i in range(-4, 116))
    print(f"{name}: max {relative_error(x, amax):.5f} mse {found:.5f} brute force {best:.5f}")
    assert found <= 1.01 * best


@pytest.mark.parametrize("name, gain", [("wide tokens", 0.2), ("few huge", 0.75), ("lognormal tokens", 0.2)])
def test_mse_gains_over_max_where_the_range_is_wide(name, gain):
    x = draw(name)
    assert relative_error(x, chosen(MseActivations(), x)) < (1 - gain) * relative_error(x, np.abs(x).max())


@pytest.mark.parametrize("name", ["normal", "uniform", "t2"])
def test_mse_is_max_where_all_blocks_fit(name):
    x = draw(name)
    assert chosen(MseActivations(), x) == np.abs(x).max()


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("factor", [2**17, 2**30, 2**33 + 2**20])
def test_long_calibrations(name, factor):
    """Counts beyond 32 bits choose as the same shares of a short calibration do."""
    x = draw("wide tokens")
    histogram = LogHistogram().observe(Sample(jnp.asarray(x), (), (1,)))
    counts = np.asarray(histogram[:, 0]).astype(np.int64) * factor
    parts = jnp.asarray(np.stack([counts % 2**16, counts >> 16], -1).astype(np.uint32))
    assert activation_amax(MERGED[name], jnp.abs(x).max(), parts) == chosen(MERGED[name], x)


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("amax", [0.0, np.nan, np.inf])
def test_amaxes_that_are_zero_or_not_finite_stay(name, amax):
    empty = LogHistogram().init(())
    np.testing.assert_array_equal(activation_amax(MERGED[name], jnp.float32(amax), empty), np.float32(amax))


@pytest.mark.parametrize("name", MERGED)
def test_stacks_and_backends(name, backend):
    """Each entry of a stack by itself, jitted or not, with the bits of the CPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        xs = [draw(n) for n in DISTRIBUTIONS]
        expected = np.array([chosen(MERGED[name], x) for x in xs])
    stack = jnp.stack([LogHistogram().observe(Sample(jnp.asarray(x), (), (1,))) for x in xs])
    amax = jnp.stack([jnp.abs(x).max() for x in xs])
    np.testing.assert_array_equal(activation_amax(MERGED[name], amax, stack), expected)
    jitted = jax.jit(lambda a, h: activation_amax(MERGED[name], a, h))
    np.testing.assert_array_equal(jitted(amax.reshape(2, -1), stack.reshape(2, -1, BINS, 2)).ravel(), expected)


# In plans.


def recipe(method) -> Recipe:
    return Recipe("mine", (Rule(Scheme.W4A4, method=Method(activations=method)),))


def with_histogram(amax, count=1) -> dict:
    """Statistics of `count` blocks with these amaxes `[*stack, blocks]`."""
    amax = jnp.asarray(amax, jnp.float32)
    rows = jnp.repeat(amax, 16, -1)
    kept = tuple(range(amax.ndim - 1))
    histogram = LogHistogram().observe(Sample(rows[..., None, :], kept, (amax.ndim,)))
    return {"amax": amax.max(-1), "histogram": histogram * jnp.uint32(count)}


def dense(p, x):
    return jax.nn.relu(x @ p["a"] + x @ p["b"]) @ p["c"]


DENSE = {"a": jnp.ones((32, 16)), "b": jnp.ones((32, 16)), "c": jnp.ones((16, 16))}
X = jnp.asarray(draw("t2")[:8, :32])


@pytest.mark.parametrize("name", METHODS)
def test_input_scales(name):
    """The chosen amax over 2688, equal for siblings."""
    result = plan(dense, DENSE, X, recipe=recipe(METHODS[name]))
    stats = calibrate(dense, DENSE, [X, X * 3], result, progress=False)
    scales = input_scales(result, stats)
    both = np.concatenate([np.asarray(X), np.asarray(X * 3)])
    assert scales["a"] == scales["b"] == np.float32(chosen(METHODS[name], both)) / np.float32(2688)
    jitted = jax.jit(lambda s: input_scales(result, s))(stats)
    jax.tree.map(np.testing.assert_array_equal, jitted, scales)


def test_siblings_of_different_methods_share_the_largest():
    rules = (
        Rule(Scheme.W4A4, include=("a",), method=Method(activations=PercentileActivations(50))),
        Rule(Scheme.W4A4),
    )
    result = plan(dense, DENSE, X, recipe=Recipe("mixed", rules))
    stats = calibrate(dense, DENSE, [X], result, progress=False)
    assert set(stats["a"]) == {"amax", "histogram"}
    assert set(stats["b"]) == {"amax"}
    scales = input_scales(result, stats)
    assert scales["a"] == scales["b"] == np.abs(X).max() / np.float32(2688)


def test_experts_of_a_layer_share_their_blocks():
    """Layers keep theirs apart. Of four experts with eight blocks each, one in 32 is above the 96th percentile."""

    def apply(p, x):
        return jax.lax.scan(lambda c, w: (jnp.einsum("etd,edf->etf", c, w), None), x, p["w"])[0]

    params, x = {"w": jnp.ones((2, 4, 128, 128))}, jnp.ones((4, 1, 128))
    result = plan(apply, params, x, recipe=recipe(PercentileActivations(96)))
    assert result.by_path["w"].weight.layer_axes == (0,)
    assert result.by_path["w"].weight.expert_axes == (1,)
    blocks = np.ones((2, 4, 8), np.float32)
    blocks[0, 2, 5] = 50
    blocks[1] = 8
    blocks[1, 1, :2] = 32
    scales = input_scales(result, {"w": with_histogram(blocks)})
    expected = centres()[np.asarray(bins_of(jnp.array([1.0, 32.0])))]
    np.testing.assert_array_equal(scales["w"], np.minimum(expected, [50, 32]).astype(np.float32) / np.float32(2688))


@functools.cache
def language_model(form: str):
    """A plan and statistics with histograms."""
    apply = getattr(models, form)
    params = models.apart(models.draw()) if form == "unrolled" else models.draw()
    result = plan(apply, params, models.batches(1)[0], recipe=recipe(PercentileActivations()))
    return result, calibrate(apply, params, models.batches(1), result, progress=False)


@pytest.mark.parametrize("name", MERGED)
def test_layers_of_a_scan_have_their_own_scales(name):
    """Each layer's scale is that of its own blocks, over experts and siblings."""
    result, stats = language_model("scanned")
    scales = input_scales(dataclasses.replace(result, entries=with_activations(result.entries, MERGED[name])), stats)
    for path, layers in (("layers/q", None), ("layers/gate", 1)):
        for i in range(models.L):
            amax, histogram = (stats[path][part][i] for part in ("amax", "histogram"))
            if layers:
                amax, histogram = amax.max(), merged(histogram, [0])
            expected = activation_amax(MERGED[name], amax, histogram) / np.float32(2688)
            np.testing.assert_allclose(scales[path][i], expected, rtol=1e-6)


def with_activations(entries, activations):
    return tuple(dataclasses.replace(e, method=Method(activations=activations)) for e in entries)


def test_histograms_of_a_scan_are_those_of_layers_apart():
    """Up to the few blocks that the rounding of another forward pass moves over an edge."""
    _, stacked = language_model("scanned")
    _, apart = language_model("unrolled")
    for name in models.QUANTIZED:
        whole = np.asarray(stacked[f"layers/{name}"]["histogram"][..., 0]).astype(int)
        each = np.stack([apart[f"layers/{i}/{name}"]["histogram"][..., 0] for i in range(models.L)]).astype(int)
        assert whole.sum() == each.sum() > 0
        assert np.abs(whole - each).sum() <= 0.01 * whole.sum(), name


@pytest.mark.parametrize("name", MERGED)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_equal_on_meshes(name, kind):
    """Bit for bit for the same activations, however they and the weights are split."""

    def apply(p, x):
        return x @ p["w"]

    params, x = {"w": jnp.ones((128, 32))}, jnp.asarray(draw("wide tokens"))
    result = plan(apply, params, x, recipe=recipe(MERGED[name]))
    expected = input_scales(result, observed(apply, result)(params, x)[1])["w"]
    mesh = jax.make_mesh((2, 4), ("tp", "ep"), axis_types=(kind, kind))
    for spec in (P("ep"), P(("tp", "ep")), P("ep", None)):
        with jax.set_mesh(mesh):
            split = jax.device_put(x, NamedSharding(mesh, spec))
            weight = {"w": jax.device_put(params["w"], NamedSharding(mesh, P(None, "tp" if spec[0] == "ep" else None)))}
            _, stats = jax.jit(observed(apply, result))(weight, split)
            np.testing.assert_array_equal(input_scales(result, stats)["w"], expected)


@pytest.mark.parametrize("name", MERGED)
def test_activations_that_are_all_zero(name):
    result = plan(dense, DENSE, X, recipe=recipe(MERGED[name]))
    stats = result.init_stats() | {"a": with_histogram([1.0]), "b": with_histogram([1.0])}
    with pytest.raises(LeafError, match=r"^c: its activations were all zero in calibration: wanted some data"):
        input_scales(result, stats)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_activations(bad):
    """The amax beside the histogram shows them."""
    result = plan(dense, DENSE, X, recipe=recipe(HeadroomActivations()))
    with pytest.raises(LeafError, match=r"^a: its activations hold NaN or Inf: wanted finite calibration data"):
        calibrate(dense, DENSE, [X.at[0, 0].set(bad)], result, progress=False)


def test_one_calibration_serves_recipes_that_need_less():
    with_blocks, plain = (plan(dense, DENSE, X, recipe=recipe(METHODS[n])) for n in ("mse", "max"))
    stats = calibrate(dense, DENSE, [X], with_blocks, progress=False)
    assert input_scales(plain, stats)["a"] == np.abs(X).max() / np.float32(2688)
    with pytest.raises(LeafError, match=r"^a: statistics 'histogram' of shape nothing: wanted \(512, 2\)"):
        input_scales(with_blocks, {path: {"amax": s["amax"]} for path, s in stats.items()})


@pytest.mark.parametrize(
    "preset, method",
    [
        ("nvfp4_act_headroom", HeadroomActivations(1.0, 99.99, 16384)),
        ("nvfp4_act_percentile", PercentileActivations(99.99)),
        ("nvfp4_act_mse", MseActivations()),
    ],
)
def test_presets(preset, method):
    entry = plan(dense, DENSE, X, recipe=preset).by_path["a"]
    assert (entry.scheme, entry.method.activations) == (Scheme.W4A4, method)
    assert preset.replace("nvfp4_", "nvfp4_weight_only_") not in jaxfp4.recipes.names()


ERRORS = {
    "percentile": (lambda: PercentileActivations(0), r"PercentileActivations\(percentile=0\): wanted more than 0 and"),
    "above 100": (lambda: PercentileActivations(100.5), r"percentile=100.5\): wanted more than 0 and at most 100; 100"),
    "nan": (lambda: PercentileActivations(float("nan")), r"percentile=nan\): wanted more than 0"),
    "anchor": (lambda: HeadroomActivations(anchor_percentile=-1), r"anchor_percentile=-1\): wanted more than 0"),
    "upper": (lambda: HeadroomActivations(upper_percentile=101), r"upper_percentile=101\): wanted more than 0"),
    "rho": (
        lambda: HeadroomActivations(rho=0),
        r"HeadroomActivations\(rho=0\): wanted more than 0 and less than 28672",
    ),
    "large rho": (lambda: HeadroomActivations(rho=28672), r"\(rho=28672\): wanted more than 0 and less than 28672"),
    "smoothquant": (
        lambda: Method(channels=SmoothQuant(), activations=MseActivations()),
        r"channels=SmoothQuant\(alpha=0.5\), activations=MseActivations\(\)\): wanted MaxActivations\(\) with channels",
    ),
    "awq": (lambda: Method(channels=Awq(), activations=PercentileActivations()), r"wanted MaxActivations\(\) with"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    make, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        make()
