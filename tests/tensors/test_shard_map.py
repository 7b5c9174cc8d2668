"""Inside a user's own shard_map the functions reduce over the mesh axes that the shards vary on."""

import jax
import numpy as np
import pytest
from golden_data import assert_same_bits
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxfp4.tensors import block_amax, fake_quantize, global_amax, quantize
from jaxfp4.tensors.quantize import fake_quantize_with_scale
from tensors.logical import (
    expected_block_amax,
    expected_per_expert,
    expected_quantized,
    expected_values,
)
from tensors.meshes import mesh, put

W = np.random.default_rng(0).standard_normal((4, 64, 8)).astype(np.float32)
W[3] *= 5

CHECKED = pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no vma"])


def on_mesh(name, kind, spec, check_vma, function, **options):
    """`function` of the shards of `W`, its outputs put together along `spec`; scalars must be equal everywhere."""
    on = mesh(name, kind)
    w = put(W, on, spec)
    arrays = jax.eval_shape(function, W)
    out_specs = jax.tree.map(lambda a: spec if a.ndim else P(), arrays)
    inside = jax.shard_map(function, mesh=on, in_specs=spec, out_specs=out_specs, check_vma=check_vma, **options)
    return jax.jit(inside)(w)


def everything(w, names=None):
    """As arrays: the static sizes of an `NVFP4Tensor` made of a shard are the shard's."""
    amax = global_amax(w, axis_names=names)
    q = quantize(w, 1, global_amax=amax if names else None)
    return (q.packed, q.scales, q.global_scale), fake_quantize(w, 1, global_amax=amax), block_amax(w, 1), amax


def assert_everything(result):
    codes, fake, blocks, amax = result
    for part, expected in zip(codes, expected_quantized(W, 1), strict=True):
        assert_same_bits(np.asarray(part).view(expected.dtype), expected)
    assert_same_bits(fake, expected_values(W, 1))
    assert_same_bits(blocks, expected_block_amax(W, 1))
    assert_same_bits(amax, np.abs(W).max())


@CHECKED
@pytest.mark.parametrize(
    ("name", "kind", "spec"),
    [
        ("tp4 ep2", AxisType.Auto, P("ep", "tp")),
        ("tp4 ep2", AxisType.Explicit, P(None, "tp")),
        ("dp2 tp2 ep2", AxisType.Auto, P("ep", ("dp", "tp"))),
    ],
    ids=str,
)
def test_same_bytes_inside(name, kind, spec, check_vma):
    """Also where the array does not vary over some of the axes."""
    assert_everything(on_mesh(name, kind, spec, check_vma, everything))


def test_axis_names_may_be_given_and_may_include_some_that_the_array_does_not_vary_on():
    result = on_mesh("tp4 ep2", AxisType.Auto, P(None, "tp"), True, lambda w: everything(w, ("ep", "tp")))
    assert_everything(result)


@pytest.mark.parametrize("manual", [{"tp"}, {"ep", "tp"}], ids=sorted)
def test_partial_manual(manual):
    """Only some axes are manual; the compiler splits over the others."""
    spec = P(*(name if name in manual else None for name in ("ep", "tp")))
    assert_everything(on_mesh("dp2 tp2 ep2", AxisType.Auto, spec, True, everything, axis_names=manual))


@CHECKED
def test_one_amax_per_expert(check_vma):
    """Experts are split over ep, so only tp is reduced over."""

    def per_expert(w):
        q = quantize(w, 1, global_amax=global_amax(w, keep_axes=(0,), axis_names=("tp",)))
        return q.packed, q.scales, q.global_scale

    on, spec = mesh("tp4 ep2"), P("ep", "tp")
    inside = jax.shard_map(per_expert, mesh=on, in_specs=spec, out_specs=(spec, spec, P("ep")), check_vma=check_vma)
    for part, expected in zip(jax.jit(inside)(put(W, on, spec)), expected_per_expert(W, 1), strict=True):
        assert_same_bits(np.asarray(part).view(expected.dtype), expected)


@CHECKED
def test_keep_axes_needs_axis_names(check_vma):
    message = (
        r"keep_axes=\(0,\) inside a shard_map over \('tp', 'ep'\): wanted axis_names, the mesh axes that split the "
        r"other dimensions; for experts split over 'ep' pass axis_names=\('tp',\)"
    )
    with pytest.raises(ValueError, match=message):
        on_mesh("tp4 ep2", AxisType.Auto, P("ep", "tp"), check_vma, lambda w: global_amax(w, keep_axes=(0,)))


@CHECKED
def test_axis_names_that_the_mesh_does_not_have_are_refused(check_vma):
    """Ignored, they would leave each shard its own value, which nothing notices without check_vma."""
    message = r"axis_names=\('tq',\) inside a shard_map: wanted axes of its mesh, \('tp', 'ep'\)"
    with pytest.raises(ValueError, match=message):
        on_mesh("tp4 ep2", AxisType.Auto, P("ep", "tp"), check_vma, lambda w: global_amax(w, axis_names=("tq",)))


@CHECKED
@pytest.mark.parametrize(
    "function",
    [
        lambda w: quantize(w, 1).packed,
        lambda w: fake_quantize(w, 1),
        lambda w: fake_quantize_with_scale(w, 1, np.float32(0.1)),
        lambda w: block_amax(w, 1),
    ],
    ids=["quantize", "fake_quantize", "fake_quantize_with_scale", "block_amax"],
)
def test_shards_that_cut_blocks_are_refused(function, check_vma):
    """Eight values on each device: padding them to blocks would give bytes that depend on the layout."""
    message = (
        r"a shard with 8 values along the contraction, inside a shard_map over \('tp',\): wanted a multiple of 16, "
        r"or blocks would depend on the layout; split another dimension"
    )
    with pytest.raises(ValueError, match=message):
        on_mesh("tp8", AxisType.Auto, P(None, "tp"), check_vma, function)
