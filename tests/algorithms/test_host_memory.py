"""Parameters in host memory give what those in device memory give, and are on the devices a block at a time."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxfp4
from jaxfp4.reports import weight_quality
from jaxfp4.tensors.memory import in_host_memory

L, D = 6, 64
RNG = np.random.default_rng(0)
W = RNG.normal(size=(L, D, D)).astype(np.float32) / 8
SCALES = RNG.uniform(0.5, 2, size=(L, D)).astype(np.float32)
X = [jnp.asarray(RNG.normal(size=(24, D)) * np.exp(RNG.normal(size=D)), jnp.float32) for _ in range(2)]


def layer(x, p):
    normed = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["scale"]
    return x + jax.nn.relu(normed @ p["w"])


def listed(params, x):
    return functools.reduce(layer, params["layers"], x)


def scanned(params, x):
    return lax.scan(lambda x, p: (layer(x, p), None), x, params["layers"])[0]


def picked(params, x):
    """A loop that picks its layers by itself."""
    return lax.fori_loop(0, L, lambda i, x: layer(x, jax.tree.map(lambda w: w[i], params["layers"])), x)


MODELS = {"listed": listed, "scanned": scanned, "picked": picked}


def draw(name, memory_kind, place=lambda spec: None):
    def put(x, spec):
        sharding = place(spec) or SingleDeviceSharding(jax.devices()[0])
        return jax.device_put(x, sharding.with_memory_kind(memory_kind))

    if name == "listed":
        return {"layers": [{"w": put(W[i], P(None, "tp")), "scale": put(SCALES[i], P())} for i in range(L)]}
    return {"layers": {"w": put(W, P(None, None, "tp")), "scale": put(SCALES, P())}}


def job(name, params, recipe):
    apply = MODELS[name]
    plan = jaxfp4.plan(apply, params, X[0], recipe=recipe)
    stats = jaxfp4.calibrate(apply, params, X, plan, progress=False)
    return plan, stats, jaxfp4.quantize_params(params, plan, stats)


def on_mesh(spec):
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, spec)


@pytest.mark.parametrize(
    "recipe, place",
    [("nvfp4_gptq", lambda spec: None), ("nvfp4_smoothquant_gptq", on_mesh)],
    ids=["gptq, one device", "smoothquant, tp"],
)
@pytest.mark.parametrize("name", MODELS)
def test_same_result(name, recipe, place):
    near, far = draw(name, "device", place), draw(name, "pinned_host", place)
    _, stats, wanted = job(name, near, recipe)
    plan, found_stats, found = job(name, far, recipe)
    assert bool(plan.folds) == ("smoothquant" in recipe and name != "picked")
    for path, states in stats.items():
        for statistic, state in states.items():
            np.testing.assert_allclose(found_stats[path][statistic], state, rtol=1e-5, atol=1e-4)
    # From one calibration, so that sums in another order do not matter.
    assert jaxfp4.digest(jaxfp4.quantize_params(far, plan, stats), inputs=True) == jaxfp4.digest(wanted, inputs=True)
    leaves = jax.tree.leaves(found)
    assert not any(map(in_host_memory, leaves)) and all(map(in_host_memory, jax.tree.leaves(far)))
    assert {frozenset(x.devices()) for x in leaves} == {frozenset(x.devices()) for x in jax.tree.leaves(wanted)}


@pytest.mark.parametrize("name", MODELS)
def test_block_by_block(name):
    near, far = draw(name, "device"), draw(name, "pinned_host")
    plan = jaxfp4.plan(MODELS[name], far, X[0], recipe="nvfp4_gptq")
    one, other = (jaxfp4.quantize_sequentially(MODELS[name], p, X, plan, progress=False) for p in (near, far))
    assert jaxfp4.digest(one, inputs=True) == jaxfp4.digest(other, inputs=True)
    assert not any(map(in_host_memory, jax.tree.leaves(other)))


def test_numpy_arrays_are_brought_too():
    params = {"layers": {"w": W, "scale": SCALES}}
    plan = jaxfp4.plan(scanned, params, X[0], recipe="nvfp4_gptq")
    found = jaxfp4.quantize_sequentially(scanned, params, X, plan, progress=False)
    wanted = jaxfp4.quantize_sequentially(scanned, draw("scanned", "device"), X, plan, progress=False)
    assert jaxfp4.digest(found, inputs=True) == jaxfp4.digest(wanted, inputs=True)


def on_devices_now():
    return sum(x.nbytes for x in jax.live_arrays() if not in_host_memory(x))


@pytest.mark.parametrize("run", ["calibrate", "quantize_sequentially"])
@pytest.mark.parametrize("name", ["listed", "scanned"])
def test_devices_hold_two_layers_at_most(name, run):
    """The one that is observed, and the one before it, from which its input is computed."""
    params, batches = draw(name, "pinned_host"), [x[:2] for x in X]
    gc.collect()
    most = 0

    def look(x):
        nonlocal most
        most = max(most, on_devices_now())
        return x

    def apply(params, x):
        def watched(x, p):
            return jax.pure_callback(look, jax.ShapeDtypeStruct(x.shape, x.dtype), layer(x, p))

        if name == "listed":
            return functools.reduce(watched, params["layers"], x)
        return lax.scan(lambda x, p: (watched(x, p), None), x, params["layers"])[0]

    plan = jaxfp4.plan(apply, params, batches[0], recipe="nvfp4")
    before = on_devices_now()
    getattr(jaxfp4, run)(apply, params, batches, plan=plan, progress=False)
    packed = W.nbytes / 7 if run == "quantize_sequentially" else 0
    assert before < most < before + packed + 3 * W[0].nbytes < before + W.nbytes


def test_statistics_are_continued():
    far = draw("scanned", "pinned_host")
    plan = jaxfp4.plan(scanned, far, X[0], recipe="nvfp4_gptq")
    first = jaxfp4.calibrate(scanned, far, X[:1], plan, progress=False)
    both = jaxfp4.calibrate(scanned, far, X[1:], plan, stats=first, progress=False)
    wanted = jaxfp4.calibrate(scanned, far, X, plan, progress=False)
    for one, other in zip(jax.tree.leaves(both), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


def test_refuses_no_batches():
    far = draw("scanned", "pinned_host")
    plan = jaxfp4.plan(scanned, far, X[0])
    with pytest.raises(ValueError, match="batches is empty: wanted at least one batch of calibration data"):
        jaxfp4.calibrate(scanned, far, [], plan, progress=False)


def test_quality_of_weights():
    near, far = draw("scanned", "device"), draw("scanned", "pinned_host")
    plan = jaxfp4.plan(scanned, far, X[0], recipe="nvfp4_weight_only")
    qparams = jaxfp4.quantize_params(far, plan)
    assert weight_quality(far, qparams) == weight_quality(near, qparams)
