"""Histograms of block amaxes against numpy's, bit for bit on every layout."""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import P, lax
from jax.sharding import AxisType, NamedSharding
from strict_jax import backend as backend

from jaxfp4.algorithms import make_calibrate_fn, observed
from jaxfp4.recipes import MaxActivations, Method, PercentileActivations, Recipe, Rule, Scheme, plan
from jaxfp4.transform.histogram import BINS, LogHistogram, bins_of, carried, centres, edges, merged
from jaxfp4.transform.statistics import Sample

D, F, E, T, L = 64, 32, 4, 8, 3
RECIPE = Recipe("histogram", (Rule(Scheme.W4A4, method=Method(activations=PercentileActivations())),))


def draw(*shape: int, seed: int = 0) -> jax.Array:
    """Values over many octaves."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * np.exp2(rng.integers(-30, 30, shape[:-1])[..., None]), jnp.float32)


X, XE = draw(T, D), draw(E, T, D, seed=1)


def reference(x) -> np.ndarray:
    """Counts over blocks of 16 along the last axis, by float64 comparisons with the edges."""
    x = np.asarray(x).astype(np.float64)
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 16)])
    amax = np.abs(x.reshape(-1, 16)).max(1)
    amax = amax[np.isfinite(amax) & (amax > 0)]
    place = np.searchsorted(edges().astype(np.float64), amax, side="right") - 1
    return np.bincount(np.clip(place, 0, BINS - 1), minlength=BINS)


def counts(state) -> np.ndarray:
    state = np.asarray(state).astype(np.int64)
    assert (state[..., 0] < 2**16).all()
    return state[..., 0] + 2**16 * state[..., 1]


def test_edges_are_correctly_rounded():
    """Against decimal arithmetic: the least float32 not below 2 ** (-40 + 5 i / 32)."""
    with localcontext() as context:
        context.prec = 60
        for i, edge in enumerate(edges()):
            exact = Decimal(2) ** (Decimal(5 * i - 1280) / 32)
            # A power of two is exact only up to the precision of the decimal logarithm.
            assert Decimal(float(edge)) >= exact * (1 - Decimal(10) ** -50)
            assert Decimal(float(np.nextafter(edge, np.float32(0)))) < exact
    assert (centres() > edges()[:-1]).all()
    assert (centres() < edges()[1:]).all()


def test_edges_and_their_neighbours(backend):
    inner = edges()[1:-1]
    np.testing.assert_array_equal(jax.jit(bins_of)(inner), np.arange(1, BINS))
    np.testing.assert_array_equal(jax.jit(bins_of)(np.nextafter(inner, np.float32(0))), np.arange(BINS - 1))


def test_every_bfloat16(backend):
    x = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)
    with np.errstate(invalid="ignore"):
        wide = np.abs(x.astype(np.float64))
    place = np.clip(np.searchsorted(edges().astype(np.float64), wide, side="right") - 1, 0, BINS - 1)
    expected = np.where((wide > 0) & np.isfinite(wide), place, BINS)
    np.testing.assert_array_equal(jax.jit(lambda x: bins_of(x.astype(jnp.float32)))(x), expected)


@pytest.mark.parametrize("special", [0.0, -0.0, np.nan, np.inf, -np.inf])
def test_values_that_belong_to_no_bin(special, backend):
    assert bins_of(jnp.float32(special)) == BINS


@pytest.mark.parametrize("value, bin", [(1e-45, 0), (2.0**-41, 0), (2.0**40, BINS - 1), (3e38, BINS - 1)])
def test_values_beyond_the_ends(value, bin, backend):
    assert bins_of(jnp.float32(value)) == bin


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("length", [D, 40])
def test_counts_of_a_sample(dtype, length):
    """Blocks that are not full are padded with zeros."""
    x = X[:, :length].astype(dtype)
    np.testing.assert_array_equal(counts(LogHistogram().observe(Sample(x, (), (1,)))), reference(x))


def test_contraction_over_two_dimensions():
    """Blocks run along both, in the order of the weight's axes."""
    x = draw(T, 4, 24)
    found = LogHistogram().observe(Sample(x, (), (2, 1)))
    np.testing.assert_array_equal(counts(found), reference(jnp.swapaxes(x, 1, 2).reshape(T, 96)))


def test_kept_dimensions():
    found = LogHistogram().observe(Sample(XE, (0,), (2,)))
    np.testing.assert_array_equal(counts(found), [reference(x) for x in XE])


def test_zero_and_non_finite_blocks_are_not_counted():
    x = X.at[0, :16].set(0).at[1, 3].set(np.nan).at[2, 20].set(np.inf)
    assert counts(LogHistogram().observe(Sample(x, (), (1,)))).sum() == T * D // 16 - 3


def test_no_tokens():
    assert counts(LogHistogram().observe(Sample(X[:0], (), (1,)))).sum() == 0


def split(value: int) -> jax.Array:
    """A state with this count in each bin."""
    return jnp.broadcast_to(jnp.array([value % 2**16, value // 2**16], jnp.uint32), (BINS, 2))


@pytest.mark.parametrize("left, right", [(2**16 - 1, 1), (2**32 - 1, 2**32 - 1), (2**47, 2**47 - 1), (3 * 2**30, 5)])
def test_long_calibrations_lose_no_count(left, right):
    """Sums far beyond float32's integers and int32."""
    assert set(counts(LogHistogram().merge(split(left), split(right))).tolist()) == {left + right}


def test_merge_of_many_entries():
    stack = jnp.stack([split(2**40 + i) for i in range(5)])
    assert set(counts(merged(stack, [0])).tolist()) == {5 * 2**40 + 10}
    assert set(counts(carried(stack + stack))[4].tolist()) == {2 * 2**40 + 8}


# In models.


def matrix(p, x):
    return x @ p["w"]


def batched(p, x):
    return jnp.einsum("etd,edf->etf", x, p["w"])


def shared(p, x):
    return jnp.einsum("td,edf->etf", x, p["w"])


def scanned(p, x):
    return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["w"])[0]


def ragged(p, x):
    return lax.ragged_dot(x, p["w"], jnp.array([1, 0, 5, 2], jnp.int32))


def ragged_in_scan(p, x):
    """Rows of layers and experts, all in one stack `[L, E, D, D]`."""
    sizes = jnp.array([1, 0, 5, 2], jnp.int32)
    return lax.scan(lambda c, w: (jnp.tanh(lax.ragged_dot(c, w, sizes)), None), x, p["w"])[0]


def layer_inputs(step, w):
    """What each step of a loop over `w` sees, compiled as in a scan."""
    seen = lax.scan(lambda c, wi: (step(c, wi), c), X, w)[1]
    return np.asarray(jax.jit(lambda: seen)())


def states_in_scan(w):
    return lax.scan(lambda c, wi: (jnp.tanh(c @ wi), c), X, w)[1]


def states_in_ragged_scan(w):
    sizes = jnp.array([1, 0, 5, 2], jnp.int32)
    return lax.scan(lambda c, wi: (jnp.tanh(lax.ragged_dot(c, wi, sizes)), c), X, w)[1]


def by_rows(x):
    return [reference(x[:1]), reference(x[:0]), reference(x[1:6]), reference(x[6:])]


W, WE = draw(D, F) * 0 + 1, jnp.ones((E, D, F))
WL, WLE = draw(L, D, D, seed=3) * 2.0**-10, draw(L, E, D, D, seed=4) * 2.0**-10
MODELS = {
    "matrix": (matrix, W, X, lambda: reference(X)),
    "batched experts": (batched, WE, XE, lambda: [reference(x) for x in XE]),
    "experts that meet all": (shared, WE, X, lambda: reference(X)),
    "routed rows": (ragged, WE, X, lambda: by_rows(X)),
    "layers": (scanned, WL, X, lambda: [reference(x) for x in states_in_scan(WL)]),
    "routed rows in layers": (ragged_in_scan, WLE, X, lambda: [by_rows(x) for x in states_in_ragged_scan(WLE)]),
}


@pytest.mark.parametrize("name", MODELS)
def test_counts_in_models(name):
    apply, w, x, expected = MODELS[name]
    result = plan(apply, {"w": w}, x, recipe=RECIPE)
    _, stats = jax.jit(observed(apply, result))({"w": w}, x)
    np.testing.assert_array_equal(counts(stats["w"]["histogram"]), expected())


def test_only_where_the_method_asks():
    recipe = Recipe("plain", (Rule(Scheme.W4A4, method=Method(activations=MaxActivations())),))
    assert set(plan(matrix, {"w": W}, X, recipe=recipe).statistics["w"].init(())) == {"amax"}
    assert set(plan(matrix, {"w": W}, X, recipe=RECIPE).statistics["w"].init(())) == {"amax", "histogram"}
    weight_only = Recipe("weight only", (Rule(Scheme.W4A16, method=RECIPE.rules[0].method),))
    assert plan(matrix, {"w": W}, X, recipe=weight_only).statistics == {}


def test_order_of_batches():
    result = plan(matrix, {"w": W}, X, recipe=RECIPE)
    calibrate_fn = make_calibrate_fn(matrix, result)
    batches = [draw(T, D, seed=i) for i in range(3)]
    found = []
    for order in ([0, 1, 2], [2, 0, 1]):
        stats = result.init_stats()
        for i in order:
            stats = calibrate_fn({"w": W}, stats, batches[i])
        found.append(stats["w"]["histogram"])
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(counts(found[0]), reference(jnp.concatenate(batches)))


# On meshes.


def make_mesh(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("tp", "ep"), axis_types=(kind, kind))


LAYOUTS = {
    "tokens": ("matrix", P(None, "tp"), P("ep")),
    "contraction": ("matrix", P(None, "ep"), P(None, "tp")),
    "blocks cut": ("matrix", P(None, "tp"), P(None, ("tp", "ep"))),
    "experts": ("batched experts", P("ep", None, "tp"), P("ep")),
    "experts and tokens": ("batched experts", P("ep"), P("ep", "tp")),
    "experts that meet all": ("experts that meet all", P("ep", None, "tp"), P("tp")),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", LAYOUTS)
def test_equal_on_meshes(name, kind):
    model, spec, x_spec = LAYOUTS[name]
    apply, w, x, expected = MODELS[model]
    mesh = make_mesh(kind)
    if kind is AxisType.Explicit:
        # Products whose sharding is ambiguous on Explicit axes are not this test's matter.
        spec = P()
        apply = {
            "matrix": lambda p, x: jnp.einsum("td,df->tf", x, p["w"], out_sharding=P()),
            "batched experts": lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"], out_sharding=P()),
            "experts that meet all": lambda p, x: jnp.einsum("td,edf->etf", x, p["w"], out_sharding=P()),
        }[model]
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(w, NamedSharding(mesh, spec))}
        x = jax.device_put(x, NamedSharding(mesh, x_spec))
        result = plan(apply, params, x, recipe=RECIPE)
        _, stats = jax.jit(observed(apply, result))(params, x)
    np.testing.assert_array_equal(counts(stats["w"]["histogram"]), expected())


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("split", ["tokens", "contraction", "experts", "weight split", "ragged"])
def test_inside_a_shard_map(split, check_vma):
    body, w, spec, x, x_spec, out, expected = {
        "tokens": (matrix, W, P(), X, P("tp"), P("tp"), reference(X)),
        "contraction": (
            lambda p, x: lax.psum(x @ p["w"], "tp"), W, P("tp"), X, P(None, "tp"), P(), reference(X),
        ),
        "experts": (batched, WE, P("ep"), XE, P("ep", "tp"), P("ep", "tp"), [reference(x) for x in XE]),
        "weight split": (shared, WE, P("ep"), X, P(), P("ep"), reference(X)),
        "ragged": (
            lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2], jnp.int32)), WE, P("ep"), X, P("ep"), P("ep"),
            [reference(X[2 * i : 2 * i + 2]) for i in range(E)],
        ),
    }[split]  # fmt: skip
    mapped = jax.shard_map(
        body, mesh=make_mesh(AxisType.Auto), in_specs=({"w": spec}, x_spec), out_specs=out, check_vma=check_vma
    )
    result = plan(mapped, {"w": w}, x, recipe=RECIPE)
    _, stats = jax.jit(observed(mapped, result))({"w": w}, x)
    # Devices with the same activation count once where the types of values say which these are. They do not with
    # check_vma=False, nor for an axis that splits the weight's outputs: the activation is cast to vary over it too.
    repeats = {"weight split": 4} if check_vma else {"tokens": 4, "contraction": 4, "ragged": 2, "weight split": 8}
    np.testing.assert_array_equal(counts(stats["w"]["histogram"]), repeats.get(split, 1) * np.array(expected))


def test_split_experts_that_meet_the_same_tokens():
    """Every device has its own part of the stack, so each counts what it sees."""
    mesh = make_mesh(AxisType.Auto)

    def body(p, x):
        hidden = jnp.einsum("td,edf->etf", x, p["up"])
        return lax.psum(jnp.einsum("etf,efd->etd", hidden, p["down"]).sum(0), "ep")

    mapped = jax.shard_map(body, mesh=mesh, in_specs=({"up": P("ep"), "down": P("ep")}, P()), out_specs=P())
    params = {"up": WE, "down": jnp.ones((E, F, D))}
    result = plan(mapped, params, X, recipe=RECIPE)
    assert result.by_path["up"].weight.expert_axes == (0,)
    stats = jax.jit(observed(mapped, result))(params, X)[1]
    np.testing.assert_array_equal(counts(stats["up"]["histogram"]), np.broadcast_to(reference(X), (E, BINS)))
