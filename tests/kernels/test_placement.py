"""Which arrays kernels take, and kernels under shard_map, jit and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp4
from jaxfp4.tensors import accelerated
from jaxfp4.tensors.blocks import Blocking

from .arrays import hostile


def mesh_of(devices, kind=AxisType.Auto):
    return jax.make_mesh((1, len(devices)), ("ep", "tp"), axis_types=(kind,) * 2, devices=devices)


def through_kernels(w, global_scale):
    """All kernels on a shard, blocks along its first axis."""
    blocking = Blocking(w.shape, (0,))
    geometry = accelerated.geometry_of(blocking, global_scale)
    packed, scales = accelerated.quantize(w, global_scale, blocking, geometry, accelerated.MAX)
    scales = jax.lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)
    values = accelerated.dequantize(packed, scales, global_scale, blocking, geometry, np.dtype(w.dtype))
    simulated = accelerated.fake_quantize(w, global_scale, blocking, geometry)
    return packed, scales, values, simulated, accelerated.block_amax(w, blocking)


@pytest.mark.parametrize("spec", [P("tp"), P(None, "tp"), P()], ids=str)
def test_kernels_have_types_under_shard_map(spec):
    mesh = mesh_of(jax.devices("cpu")[:4])
    sharded = jax.shard_map(through_kernels, mesh=mesh, in_specs=(spec, P()), out_specs=(spec,) * 5)
    arguments = jax.ShapeDtypeStruct((128, 64), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.float32)
    results = jax.eval_shape(sharded, *arguments)
    assert [r.shape for r in results] == [(64, 64), (8, 64), (128, 64), (128, 64), (8, 64)]
    if jax.__version__.startswith("0.10"):  # newer versions lower kernels only beside a GPU
        text = jax.jit(sharded).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("__gpu$xla.gpu.triton") == 4


def test_without_a_gpu_no_kernel_is_traced():
    if any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("this machine has a GPU")
    assert not accelerated.can_run(jnp.ones((16, 16)))
    assert "pallas_call" not in str(jax.make_jaxpr(jaxfp4.quantize)(jnp.ones((32, 32))))


@pytest.mark.parametrize(
    "shape, axis, scale, wanted",
    [
        ((64, 48), (0,), (), (1, 4, 48)),
        ((64, 48), (1,), (), (1, 192, 1)),
        ((5, 64, 48), (1,), (5, 1, 1), (5, 4, 48)),
        ((5, 64, 48), (2,), (5, 1, 1), (5, 192, 1)),
        ((2, 5, 64, 48), (2,), (2, 5, 1, 1), (10, 4, 48)),
        ((3, 8, 40), (1, 2), (3, 1, 1), (3, 20, 1)),
        ((64, 48), (0,), (1, 48), None),
        ((5, 64, 3), (1,), (1, 1, 3), None),
    ],
)
def test_geometries(shape, axis, scale, wanted):
    geometry = accelerated.geometry_of(Blocking(shape, axis), jnp.ones(scale))
    found = None if geometry is None else (geometry.outer, geometry.blocks, geometry.inner)
    assert found == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("spec", [P("tp"), P(None, "tp"), P()], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_sharded_arrays_on_gpus_have_the_bytes_of_the_cpu(axis, spec, kind):
    gpus, cpu = [d for d in jax.devices() if d.platform == "gpu"], jax.devices("cpu")[0]
    x = hostile("normal", (512, 512), jnp.bfloat16)
    there = jax.device_put(x, NamedSharding(mesh_of(gpus, kind), spec))
    with jax.default_device(cpu):
        wanted = jaxfp4.quantize(jnp.asarray(x), axis)
        simulated = jaxfp4.fake_quantize(jnp.asarray(x), axis)
    with jax.set_mesh(mesh_of(gpus, kind)):
        found = jaxfp4.quantize(there, axis)
        np.testing.assert_array_equal(np.asarray(found.packed), np.asarray(wanted.packed))
        np.testing.assert_array_equal(np.asarray(found.dequantize()), np.asarray(wanted.dequantize()))
        again = np.asarray(jaxfp4.fake_quantize(there, axis))
        np.testing.assert_array_equal(again.view(np.uint16), np.asarray(simulated).view(np.uint16))
        jaxfp4.block_amax(there, axis)


@pytest.mark.gpu
def test_experts_under_jit_vmap_and_by_hand_agree_on_a_gpu():
    x = jnp.asarray(hostile("heavy", (4 * 64, 96), jnp.bfloat16)).reshape(4, 64, 96)
    whole = jaxfp4.quantize(x, 1, global_amax=jaxfp4.global_amax(x, keep_axes=(0,)))
    mapped = jax.jit(jax.vmap(functools.partial(jaxfp4.quantize, axis=0)))(x)
    np.testing.assert_array_equal(whole.packed, mapped.packed)
    for i, one in enumerate(x):
        np.testing.assert_array_equal(jaxfp4.quantize(one, 0).packed, whole.packed[i])
