"""The same bytes on an accelerator as on the CPU: `pytest -m gpu -n 0`, on a machine that has one."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp4
from jaxfp4.algorithms.encoders import encoder_for
from jaxfp4.checkpoints.streaming.slab_quantizer import SlabQuantizer
from jaxfp4.recipes import FourOverSix, Method, Mse
from jaxfp4.tensors import quantize_fp8, quantize_unchecked

from . import models

pytestmark = pytest.mark.gpu

EXACT = (
    "nvfp4",
    "nvfp4_mse",
    "nvfp4_four_over_six",
    "nvfp4_mixed_fp8",
    "nvfp4_weighted_mse",
    "nvfp4_hadamard",
    "nvfp4_act_headroom",
    "nvfp4_act_mse",
)
"""Decided by integers, by exact maxima or by sums in one order: equal bytes from equal statistics."""
SUMS = ("nvfp4_local_hessian", "nvfp4_gptq", "nvfp4_gptq_max", "nvfp4_smoothquant_gptq", "nvfp4_awq")
"""Sums of floats in the order of the backend: a near tie may fall otherwise."""


def on(device, tree):
    return jax.device_put(tree, device)


@functools.cache
def job(recipe):
    """Parameters, plan and statistics, all from the CPU."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        params = on(cpu, models.draw())
        batches = on(cpu, models.batches(2))
        plan = jaxfp4.plan(models.scanned, params, batches[0], recipe=recipe)
        stats = jaxfp4.calibrate(models.scanned, params, batches, plan, progress=False)
        return params, batches, plan, stats, jaxfp4.quantize_params(params, plan, stats)


@pytest.mark.parametrize("recipe", EXACT)
def test_same_digest_from_the_same_statistics(recipe):
    params, _, plan, stats, wanted = job(recipe)
    device = jax.devices()[0]
    found = jaxfp4.quantize_params(on(device, params), plan, on(device, stats))
    platforms = {d.platform for leaf in jax.tree.leaves(found) for d in leaf.devices()}
    assert platforms == {device.platform}
    assert jaxfp4.digest(found, inputs=True) == jaxfp4.digest(wanted, inputs=True)


@pytest.fixture(params=["tp", "both"])
def mesh(request):
    """Over two or four devices, "both" of two being `tp` = 1 and `ep` = 2; skipped where there is one."""
    count = min(4, 1 << (jax.device_count().bit_length() - 1))
    if count < 2:
        pytest.skip(f"wanted several devices, found {jax.device_count()}")
    sizes = {"tp": (count, 1), "both": (count // 2, 2)}[request.param]
    return jax.make_mesh(sizes, ("tp", "ep"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count])


def split(params, mesh):
    """Stacked layers over the mesh."""

    def put(w, spec=()):
        return jax.device_put(np.asarray(w), NamedSharding(mesh, P(*spec)))

    layers = {name: put(w, (None, *models.SPECS[name])) for name, w in params["layers"].items()}
    return {name: layers if name == "layers" else put(w) for name, w in params.items()}


@pytest.mark.parametrize("recipe", EXACT[:5])
def test_same_digest_on_meshes_of_all_devices(recipe, mesh):
    params, _, plan, stats, wanted = job(recipe)
    stats = jax.tree.map(lambda s: jax.device_put(np.asarray(s), NamedSharding(mesh, P())), stats)
    expected = jaxfp4.digest(wanted, inputs=True)
    found = jaxfp4.quantize_params(split(params, mesh), plan, stats)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(jaxfp4.weights(found)["layers/q"].weight)} == {mesh.size}
    assert jaxfp4.digest(found, inputs=True) == expected
    donated = jaxfp4.quantize_params(split(params, mesh), plan, stats, donate=True)
    assert jaxfp4.digest(donated, inputs=True) == expected


def test_calibration_on_a_mesh_of_all_devices(mesh):
    params, batches, plan, stats, _ = job("nvfp4")
    batches = [jax.device_put(np.asarray(batch), NamedSharding(mesh, P())) for batch in batches]
    with jax.default_matmul_precision("highest"):
        found = jaxfp4.calibrate(models.scanned, split(params, mesh), batches, plan, progress=False)
    assert set(found) == set(stats)
    for path, states in stats.items():
        np.testing.assert_allclose(np.asarray(found[path]["amax"]), np.asarray(states["amax"]), rtol=1e-3)


@pytest.fixture(params=["one device", "all devices"])
def mesh_or_one(request):
    """Shardings in a memory for parameters with stacked layers or layers apart, and how many devices they are on."""
    count = 1 if request.param == "one device" else 1 << (min(4, jax.device_count()).bit_length() - 1)
    if request.param == "all devices" and count < 2:
        pytest.skip(f"wanted several devices, found {jax.device_count()}")
    made = jax.make_mesh((count, 1), ("tp", "ep"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count])

    def place(params, memory_kind):
        def of(path, w):
            spec = models.SPECS.get(path[-1].key, P())
            stacked = w.ndim > len(models.SHAPES.get(path[-1].key, w.shape))
            return NamedSharding(made, P(None, *spec) if stacked else spec, memory_kind=memory_kind)

        return jax.tree_util.tree_map_with_path(of, params)

    return place, count


@pytest.mark.parametrize("recipe", SUMS)
def test_few_codes_move_where_floats_are_summed(recipe):
    params, _, plan, stats, wanted = job(recipe)
    device = jax.devices()[0]
    found = jaxfp4.weights(jaxfp4.quantize_params(on(device, params), plan, on(device, stats)))
    moved = total = 0
    for path, weight in jaxfp4.weights(wanted).items():
        one, other = (np.asarray(w.weight.packed) for w in (weight, found[path]))
        moved += int(np.sum((one & 15) != (other & 15)) + np.sum((one >> 4) != (other >> 4)))
        total += 2 * one.size
    assert moved / total < 1e-3


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_gptq"])
def test_layer_by_layer(recipe):
    """Layers in a scan, each calibrated on the quantized ones before it: other sums, so few codes and scales move.

    Products in full float32: where activations differ by 1e-4, as in TF32, a fifth of GPTQ's later codes move on a CPU
    too.
    """
    params, batches, plan, _, _ = job(recipe)
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    with jax.default_device(cpu):
        wanted = jaxfp4.weights(jaxfp4.quantize_sequentially(models.scanned, params, batches, plan, progress=False))
    arguments = on(device, (params, batches))
    with jax.default_matmul_precision("highest"):
        found = jaxfp4.weights(jaxfp4.quantize_sequentially(models.scanned, *arguments, plan, progress=False))
    assert found.keys() == wanted.keys()
    for path, weight in found.items():
        codes, others = (np.asarray(w.weight.packed) for w in (weight, wanted[path]))
        assert np.mean(codes != others) < 0.02, path
        np.testing.assert_allclose(weight.input_scale, wanted[path].input_scale, rtol=2e-2)


@pytest.mark.parametrize("form", ["scanned", "listed"])
def test_layers_in_host_memory_are_brought_one_by_one(form):
    """A process of its own, as the peak is that of a process."""
    program = Path(__file__).with_name("larger_than_the_device.py")
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, str(program), form, "nvfp4", "pinned_host"]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = json.loads(output.splitlines()[-1])
    added = found["peak"] - max(found["before"], found["peak_before"])
    # Quantized layers of a stack are there once more while they are put together.
    quantized = found["quantized"] * (2 if form == "scanned" else 1)
    assert added < quantized + 4 * found["layer"] < 0.8 * found["parameters"]


@pytest.mark.parametrize("form", ["scanned", "apart"])
@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_smoothquant_gptq"])
def test_host_memory(recipe, form, mesh_or_one):
    """The same results from parameters in host memory, and as near to the CPU's as those in device memory are."""
    place, count = mesh_or_one
    apply, params = (
        (models.scanned, models.draw()) if form == "scanned" else (models.unrolled, models.apart(models.draw()))
    )
    near = jax.tree.map(jax.device_put, params, place(params, None))
    far = jax.tree.map(jax.device_put, params, place(params, "pinned_host"))
    batches = [jax.device_put(np.asarray(b), jax.tree.leaves(near)[0].sharding) for b in models.batches(2)]
    plan = jaxfp4.plan(apply, far, batches[0], recipe=recipe)
    with jax.default_matmul_precision("highest"):
        stats = [jaxfp4.calibrate(apply, p, batches, plan, progress=False) for p in (near, far)]
        by_blocks = [jaxfp4.quantize_sequentially(apply, p, batches, plan, progress=False) for p in (near, far)]
    for one, other in zip(*map(jax.tree.leaves, stats), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    one, other = (jaxfp4.quantize_params(p, plan, stats[0]) for p in (near, far))
    assert jaxfp4.digest(one, inputs=True) == jaxfp4.digest(other, inputs=True)
    for path, weight in jaxfp4.weights(by_blocks[0]).items():
        codes = [np.asarray(w.weight.packed) for w in (weight, jaxfp4.weights(by_blocks[1])[path])]
        assert np.mean(codes[0] != codes[1]) < 0.02, path
    assert {len(x.devices()) for x in jax.tree.leaves(by_blocks[1])} == {count}


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4_weight_only"])
def test_simulation_is_near_that_of_the_cpu(recipe):
    _, batches, plan, _, qparams = job(recipe)
    device = jax.devices()[0]
    run = jaxfp4.quantized(models.scanned, plan)
    wanted = np.asarray(run(qparams, batches[0]), np.float32)
    found = np.asarray(run(on(device, qparams), on(device, batches[0])), np.float32)
    assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)


def test_fp8_of_every_bfloat16():
    patterns = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    w = patterns[np.isfinite(patterns.astype(np.float32))].reshape(-1, 32)
    for amax in (np.float32(3e38), np.float32(1.7), np.float32(1e-20)):
        tensors = [
            quantize_fp8(on(d, jnp.asarray(w)), amax=on(d, amax)) for d in (jax.devices()[0], jax.devices("cpu")[0])
        ]
        one, other = (np.asarray(t.values).view(np.uint8) for t in tensors)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", [Method(), Method(Mse()), Method(FourOverSix())], ids=str)
def test_slabs_of_files(method):
    """What `quantize --weight-only` computes on the default device, against the quantizer of arrays on the CPU."""
    w = np.random.default_rng(0).standard_t(4, size=(64, 256)).astype(ml_dtypes.bfloat16)
    amax = float(np.abs(w.astype(np.float32)).max())
    slabs = SlabQuantizer.of(method)
    packed, scales = slabs.encode(w.reshape(-1), slabs.scaling(amax, w.dtype))
    cpu = jax.devices("cpu")[0]
    wanted = quantize_unchecked(on(cpu, w), -1, divisor=method.scales.divisor, encoder=encoder_for(method))
    np.testing.assert_array_equal(np.asarray(packed).reshape(-1)[: w.size // 2], np.asarray(wanted.packed).ravel())
    np.testing.assert_array_equal(
        np.asarray(scales).reshape(-1)[: w.size // 16], np.asarray(wanted.scales).view(np.uint8).ravel()
    )


def test_folding_changes_the_function_by_rounding_only():
    params, batches, plan, stats, _ = job("nvfp4_smoothquant_gptq")
    device = jax.devices()[0]
    wide = jax.tree.map(lambda w: w.astype(jnp.float32), on(device, params))
    folded = jaxfp4.fold_channel_scales(wide, plan, on(device, stats))
    with jax.default_matmul_precision("highest"):
        one, other = (jax.jit(models.scanned)(p, on(device, batches[0])) for p in (wide, folded))
    assert float(jnp.linalg.norm(one - other) / jnp.linalg.norm(one)) < 1e-5
