"""The promise: the same bytes on every layout, and the layout kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxfp4.tensors import block_amax, fake_quantize, global_amax, quantize
from tensors.logical import (
    assert_quantized,
    expected_block_amax,
    expected_per_expert,
    expected_quantized,
    expected_values,
)
from tensors.meshes import MESHES, mesh, put

# [experts, contraction, outputs]; four blocks along the contraction. The zero block, the tiny one and the large expert
# make a wrong amax visible anywhere.
W = np.random.default_rng(0).standard_normal((8, 64, 16)).astype(np.float32)
W[1, 16:32, 3], W[2, :, 1], W[5] = 0, W[2, :, 1] * 1e-6, W[5] * 7
WHOLE_STACK = expected_quantized(W, 1)
PER_EXPERT = expected_per_expert(W, 1)

ALIGNED = [
    ("tp8", P()),
    ("tp8", P(None, None, "tp")),
    ("ep8", P("ep")),
    ("tp4 ep2", P("ep", "tp")),
    ("tp4 ep2", P("ep", None, "tp")),
    ("tp2 ep4", P("ep", "tp", None)),
    ("tp2 ep4", P(None, "ep", "tp")),
    ("tp1 ep8", P("ep", "tp")),
    ("dp2 tp2 ep2", P("ep", "tp")),
    ("dp2 tp2 ep2", P(("dp", "ep"), None, "tp")),
    ("dp2 tp2 ep2", P("dp", ("tp", "ep"))),
]
CUTTING = [
    ("tp8", P(None, "tp")),
    ("tp4 ep2", P(None, ("ep", "tp"))),
    ("dp2 tp2 ep2", P(None, ("tp", "ep", "dp"))),
    ("tp1 ep8", P("tp", "ep")),
]
BOTH_KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)


@pytest.mark.parametrize("where", ALIGNED + CUTTING, ids=str)
def test_eager_quantize_on_auto_meshes(where):
    name, spec = where
    w = put(W, mesh(name), spec)
    q = quantize(w, 1)
    assert_quantized(q, WHOLE_STACK)
    if where in ALIGNED:
        assert q.packed.sharding == q.scales.sharding == w.sharding
    else:
        assert q.packed.sharding == q.scales.sharding


@pytest.mark.parametrize("where", ALIGNED[2:9:2] + ALIGNED[9:] + CUTTING[:3], ids=str)
def test_jitted_quantize_on_explicit_meshes(where):
    name, spec = where
    w = put(W, mesh(name, AxisType.Explicit), spec)
    q = jax.jit(quantize, static_argnums=1)(w, 1)
    assert_quantized(q, WHOLE_STACK)
    if where in ALIGNED:
        whole_spec = P(*spec, *[None] * (3 - len(spec)))
        assert q.packed.sharding.spec == q.scales.sharding.spec == jax.typeof(w).sharding.spec == whole_spec


@pytest.mark.parametrize("where", [ALIGNED[3], CUTTING[1]], ids=str)
def test_eager_on_explicit_meshes_and_jitted_on_auto_meshes(where):
    name, spec = where
    w = put(W, mesh(name, AxisType.Explicit), spec)
    assert_quantized(quantize(w, 1), WHOLE_STACK)
    w = put(W, mesh(name, AxisType.Auto), spec)
    assert_quantized(jax.jit(quantize, static_argnums=1)(w, 1), WHOLE_STACK)


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        (ALIGNED[2], AxisType.Auto),
        (ALIGNED[3], AxisType.Auto),
        (ALIGNED[3], AxisType.Explicit),
        (ALIGNED[9], AxisType.Auto),
        (CUTTING[1], AxisType.Explicit),
    ],
    ids=str,
)
def test_one_global_amax_per_expert(where, kind):
    name, spec = where
    w = put(W, mesh(name, kind), spec)
    amax = global_amax(w, keep_axes=(0,))
    assert_same_bits(amax, np.abs(W).max((1, 2), keepdims=True))
    q = quantize(w, 1, global_amax=amax)
    assert_quantized(q, PER_EXPERT)
    assert amax.sharding.spec[:1] == q.global_scale.sharding.spec[:1] == P(spec[0])[:1]


@pytest.mark.parametrize("where", ALIGNED + CUTTING, ids=str)
def test_reductions(where):
    name, spec = where
    w = put(W, mesh(name), spec)
    assert_same_bits(global_amax(w), np.abs(W).max())
    assert_same_bits(block_amax(w, 1), expected_block_amax(W, 1))


@BOTH_KINDS
@pytest.mark.parametrize("where", [CUTTING[0]], ids=str)
def test_fake_quantize_and_dequantize(where, kind):
    name, spec = where
    values = expected_values(W, 1)
    w = put(W, mesh(name, kind), spec)
    fake = fake_quantize(w, 1)
    assert_same_bits(fake, values)
    assert fake.sharding.is_equivalent_to(w.sharding, 3)
    assert_same_bits(quantize(w, 1).dequantize(), values)
    assert_same_bits(jax.jit(fake_quantize, static_argnums=1)(w, 1), values)


@BOTH_KINDS
def test_dequantize_where_each_device_has_one_block(kind):
    """Of two mesh axes along the contraction, so that neither may be taken for that of the values in a block."""
    w = np.random.default_rng(1).standard_normal((2, 128)).astype(np.float32)
    q = quantize(put(w, mesh("tp1 ep8", kind), P(None, ("ep", "tp"))), 1)
    values = q.dequantize()
    assert_same_bits(values, expected_values(w, 1))
    assert values.sharding == q.packed.sharding


@BOTH_KINDS
def test_gradient_is_sharded_as_the_array(kind):
    on = mesh("tp4 ep2", kind)
    with jax.set_mesh(on):
        w, factor = put(W, on, P("ep", "tp")), put(-2 * W, on, P("ep", "tp"))
        gradient = jax.jit(jax.grad(lambda w, factor: jnp.sum(fake_quantize(w, 1) * factor)))(w, factor)
        assert_same_bits(gradient, -2 * W)
        if kind == AxisType.Explicit:
            assert gradient.sharding.is_equivalent_to(w.sharding, 3)


@BOTH_KINDS
def test_vmap_over_split_experts(kind):
    """Every expert is a tensor of its own; on Explicit axes vmap takes the expert axis away from the inner mesh."""
    w = put(W, mesh("tp4 ep2", kind), P("ep", "tp"))
    q = jax.jit(jax.vmap(lambda w: quantize(w, 0)))(w)
    assert_quantized(q, (*PER_EXPERT[:2], PER_EXPERT[2].reshape(-1)))


@BOTH_KINDS
def test_under_set_mesh_an_array_on_one_device_is_quantized_too(kind):
    with jax.set_mesh(mesh("tp4 ep2", kind)):
        assert_quantized(quantize(W, 1), WHOLE_STACK)


def test_a_merged_contraction_splits_over_its_first_axis():
    """`[heads, head_dim, model]` contracted over the first two, heads split so that each device has whole blocks."""
    w = np.random.default_rng(1).standard_normal((16, 8, 6)).astype(np.float32)
    expected = expected_quantized(w, (0, 1))
    for spec, packed_spec in ((P(("tp", "ep")), P(("tp", "ep"))), (P(None, "tp", "ep"), None)):
        q = quantize(put(w, mesh("tp4 ep2"), spec), (0, 1))
        assert_quantized(q, expected)
        assert packed_spec is None or q.packed.sharding.spec == packed_spec
    assert_same_bits(q.dequantize(), quantize(w, (0, 1)).dequantize())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_on_one_shard_are_errors(bad):
    w = W.copy()
    w[7, 63, 15] = bad
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        quantize(put(w, mesh("tp4 ep2"), P("ep", "tp")), 1)
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        quantize(put(w, mesh("tp4 ep2"), P("ep", "tp")), 1, global_amax=1.0)


@st.composite
def layouts(draw):
    """A mesh, an array whose dimensions its axes divide, a spec, and the contraction."""
    name = draw(st.sampled_from(sorted(MESHES)))
    dimensions = draw(st.integers(1, 3))
    axes = [[] for _ in range(dimensions)]
    for mesh_axis in draw(st.permutations(sorted(MESHES[name]))):
        at = draw(st.integers(0, dimensions))
        if at < dimensions:
            axes[at].append(mesh_axis)
    pieces = [int(np.prod([MESHES[name][a] for a in group], initial=1)) for group in axes]
    shape = tuple(n * draw(st.sampled_from([1, 2, 3, 8, 16])) for n in pieces)
    contraction = draw(st.lists(st.integers(0, dimensions - 1), min_size=1, max_size=2, unique=True))
    spec = P(*(tuple(group) if len(group) > 1 else (group[0] if group else None) for group in axes))
    return name, draw(st.sampled_from([AxisType.Auto, AxisType.Explicit])), shape, spec, tuple(contraction)


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(layouts(), st.booleans())
def test_any_shape_on_any_mesh(layout, jitted):
    name, kind, shape, spec, contraction = layout
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    placed = put(w, mesh(name, kind), spec)
    q = jax.jit(quantize, static_argnums=1)(placed, contraction) if jitted else quantize(placed, contraction)
    assert_quantized(q, expected_quantized(w, contraction))
    assert q.shape == shape
