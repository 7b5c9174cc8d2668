"""`NVFP4Tensor` as a pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_data import assert_same_bits
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfp4.tensors import NVFP4Tensor, QuantizedWeight, global_amax, quantize
from tensors.logical import expected_values

W = np.random.default_rng(0).standard_normal((3, 32, 6)).astype(np.float32)


def assert_same_tensors(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_same_bits(np.asarray(a).view(f"u{a.dtype.itemsize}"), np.asarray(b).view(f"u{b.dtype.itemsize}"))


@pytest.fixture(scope="module")
def tensor():
    return quantize(W, 1)


@pytest.fixture(scope="module")
def per_expert():
    return quantize(W, 1, global_amax=global_amax(W, keep_axes=(0,)))


def test_shape_dtypes_bytes_and_repr(tensor):
    assert (tensor.shape, tensor.ndim, tensor.dtype, tensor.axes, tensor.sizes) == (
        (3, 32, 6),
        3,
        np.float32,
        (-2,),
        (32,),
    )
    assert [part.dtype.name for part in jax.tree.leaves(tensor)] == ["uint8", "float8_e4m3fn", "float32"]
    assert [part.shape for part in jax.tree.leaves(tensor)] == [(3, 16, 6), (3, 2, 6), ()]
    assert tensor.nbytes == 3 * 16 * 6 + 3 * 2 * 6 + 4
    assert repr(tensor) == "NVFP4Tensor(shape=(3, 32, 6), axis=-2, dtype=float32, 4.56 bits/value)"


def test_repr_of_several_axes_and_of_trees_of_something_else(tensor):
    assert repr(quantize(np.ones((2, 8, 4), np.float32), (0, 1))).startswith(
        "NVFP4Tensor(shape=(2, 8, 4), axis=(-3, -2),"
    )
    shapes = jax.tree.map(lambda part: part.shape, tensor)
    assert repr(shapes) == "NVFP4Tensor(packed=(3, 16, 6), scales=(3, 2, 6), global_scale=())"


def test_leaves_have_names(tensor):
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tensor)]
    assert paths == [".packed", ".scales", ".global_scale"]


def test_tree_map_keeps_what_is_static(tensor):
    copied = jax.tree.map(jnp.copy, tensor)
    assert isinstance(copied, NVFP4Tensor)
    assert_same_tensors(copied, tensor)


def test_dequantize_casts_last(tensor):
    values = expected_values(W, 1)
    assert_same_bits(tensor.dequantize(), values)
    assert_same_bits(tensor.dequantize(jnp.bfloat16), values.astype(jnp.bfloat16))
    assert_same_bits(tensor.dequantize("float16"), values.astype(np.float16))
    assert quantize(W.astype(np.float16), 1).dequantize().dtype == np.float16


def test_through_jit_as_argument_and_result(tensor):
    assert_same_tensors(jax.jit(lambda t: t)(tensor), tensor)
    assert_same_bits(jax.jit(lambda t: t.dequantize())(tensor), tensor.dequantize())
    assert_same_tensors(jax.jit(lambda w: quantize(w, 1))(W), tensor)


def test_eval_shape_matches(tensor):
    abstract = jax.eval_shape(lambda w: quantize(w, 1), jax.ShapeDtypeStruct(W.shape, W.dtype))
    assert jax.tree.structure(abstract) == jax.tree.structure(tensor)
    assert jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), abstract, tensor) == jax.tree.map(
        lambda _: True, tensor
    )
    assert repr(abstract) == repr(tensor)
    assert jax.eval_shape(lambda t: t.dequantize(), abstract).shape == W.shape


def test_vmap_over_experts_equals_one_global_amax_per_expert(per_expert):
    mapped = jax.vmap(lambda w: quantize(w, 0))(W)
    assert (mapped.shape, mapped.axes) == (W.shape, per_expert.axes)
    assert mapped.global_scale.shape == (3,)
    for field in ("packed", "scales"):
        assert_same_tensors(getattr(mapped, field), getattr(per_expert, field))
    assert_same_bits(mapped.dequantize(), per_expert.dequantize())
    assert_same_bits(jax.vmap(NVFP4Tensor.dequantize)(mapped), per_expert.dequantize())


@pytest.mark.parametrize("axes", [0, (0, 1)], ids=str)
def test_scan_over_stacked_layers(axes):
    """Slices of a stack are tensors of their own: static axes count from the end."""
    w = W.reshape(3, 4, 8, 6) if axes == (0, 1) else W
    stacked = jax.vmap(lambda w: quantize(w, axes))(w)

    def body(carry, layer):
        assert layer.shape == w.shape[1:]
        return carry, layer.dequantize()

    _, values = jax.lax.scan(body, None, stacked)
    for layer, value in zip(w, values, strict=True):
        assert_same_bits(value, quantize(layer, axes).dequantize())


def test_device_put_with_a_tree_of_shardings(per_expert):
    mesh = jax.make_mesh((3,), ("ep",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:3])
    shardings = jax.tree.map(lambda part: NamedSharding(mesh, P("ep")), per_expert)
    placed = jax.device_put(per_expert, shardings)
    assert all(part.sharding.spec == P("ep") for part in jax.tree.leaves(placed))
    assert_same_tensors(placed, per_expert)
    assert_same_bits(placed.dequantize(), per_expert.dequantize())
    assert "NamedSharding" in repr(shardings)


def test_inside_an_nnx_param(tensor):
    class Layer(nnx.Module):
        def __init__(self, weight):
            self.weight = nnx.Param(weight)

        def __call__(self, x):
            return x @ self.weight.get_value().dequantize()

    x = np.ones((3, 2, 32), np.float32)
    layer = Layer(tensor)
    expected = x @ np.asarray(tensor.dequantize())
    np.testing.assert_allclose(nnx.jit(lambda layer, x: layer(x))(layer, x), expected, rtol=1e-5, atol=1e-5)
    graph, state = nnx.split(layer)
    assert len(jax.tree.leaves(state)) == 3
    assert_same_tensors(nnx.merge(graph, state).weight.get_value(), tensor)


def test_quantized_weight_is_a_pytree_and_absent_parts_are_no_leaves(tensor):
    assert len(jax.tree.leaves(QuantizedWeight(tensor))) == 3
    weight = jax.jit(lambda w: w)(QuantizedWeight(tensor, jnp.float32(0.5), jnp.ones(32)))
    assert_same_tensors(weight.weight, tensor)
    assert weight.input_scale == 0.5 and weight.pre_scale.shape == (32,)


def test_it_cannot_be_changed_in_place(tensor):
    with pytest.raises(AttributeError, match="cannot assign to field"):
        tensor.packed = None
