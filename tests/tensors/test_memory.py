"""Arrays in host memory, and layers of stacked arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxfp4.tensors.memory import Layer, abstract, beside, brought, in_host_memory, in_memory, on_devices, stacks_of

X = np.arange(3 * 8 * 16, dtype=np.float32).reshape(3, 8, 16)


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("tp", "ep"), axis_types=(kind,) * 2)


def put(spec, memory_kind, kind=AxisType.Auto):
    return jax.device_put(X, NamedSharding(mesh(kind), spec, memory_kind=memory_kind))


def test_on_devices_keeps_shardings():
    host, near = put(P(None, "tp", "ep"), "pinned_host"), put(P(None, "tp", "ep"), "device")
    assert in_host_memory(host) and not in_host_memory(near)
    tree = on_devices({"host": host, "near": near, "numpy": X, "number": 1.5})
    assert tree["host"].sharding == near.sharding and not in_host_memory(tree["host"])
    np.testing.assert_array_equal(tree["host"], X)
    assert tree["near"] is near and tree["numpy"] is X and tree["number"] == 1.5
    back = beside(tree["host"], host)
    assert in_host_memory(back) and back.sharding == host.sharding
    assert beside(near, near) is near


@pytest.mark.parametrize("memory_kind", ["device", "pinned_host"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("spec", [P(), P(None, "tp"), P(None, "tp", "ep"), P(None, None, ("ep", "tp"))], ids=str)
@pytest.mark.parametrize("index", [{0: 2}, {2: 5}, {0: 1, 2: 3}], ids=str)
def test_layers(memory_kind, kind, spec, index):
    """Also where the stack is split by layers."""
    stack = put(spec, memory_kind, kind)
    layer = Layer(stack, index)
    found, wanted = brought(layer), abstract(layer)
    np.testing.assert_array_equal(found, X[layer.place])
    assert not in_host_memory(found) and found.sharding.device_set == stack.sharding.device_set
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)


def test_a_layer_keeps_how_it_is_split():
    layer = brought(Layer(put(P(None, "tp", "ep"), "pinned_host"), {0: 1}))
    assert layer.sharding.spec == P("tp", "ep")


def test_one_device():
    device = jax.devices()[3]
    host = jax.device_put(X, SingleDeviceSharding(device, memory_kind="pinned_host"))
    for value, wanted in ((host, X), (Layer(host, {1: 7}), X[:, 7])):
        found = brought(value)
        np.testing.assert_array_equal(found, wanted)
        assert found.devices() == {device} and not in_host_memory(found)
        assert abstract(value).shape == wanted.shape
    assert in_memory(None, "pinned_host") == SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")


def test_numpy():
    np.testing.assert_array_equal(brought(Layer(X, {0: 1})), X[1])
    assert isinstance(brought(X), jax.Array)
    assert abstract(X.astype(np.float64)).dtype == jnp.asarray(X.astype(np.float64)).dtype
    assert abstract(Layer(X, {0: 1})).shape == X.shape[1:]
    layer = Layer(X, {0: 1})
    assert stacks_of({"a": layer, "b": 1})["a"] is X


def test_tracers_are_not_in_host_memory():
    jax.make_jaxpr(lambda x: x if in_host_memory(x) else x * 2)(X)
    weak = jnp.full((2, 2), 1.0)
    assert abstract(Layer(weak, {0: 0})).weak_type == jax.typeof(weak[0]).weak_type
