"""What the compiled programs communicate: nothing, or one number. Nothing is ever gathered."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxfp4.tensors import block_amax, fake_quantize, global_amax, quantize
from jaxfp4.tensors.blocks import Blocking
from jaxfp4.tensors.mesh import layout_of
from jaxfp4.tensors.nearest import FEW_BLOCKS
from jaxfp4.tensors.quantize import RoundToNearest, _fake_quantize_sharded, _quantize_sharded
from jaxfp4.tensors.reductions import _block_amax_sharded, _global_amax_sharded
from jaxfp4.tensors.together import Order, _programs, placed
from tensors.meshes import collectives, mesh, put

W = np.random.default_rng(0).standard_normal((8, 64, 16)).astype(np.float32)
LARGE = np.tile(W, (1, 4, 4))
"""So many blocks that borders between codes are looked up for them."""
BOTH_SIZES = pytest.mark.parametrize("array", [W, LARGE], ids=["few blocks", "many"])
BLOCKS = Blocking(W.shape, (1,))
BOTH_KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)


def test_both_ways_of_coding_are_looked_at():
    assert W.size // 16 < FEW_BLOCKS <= LARGE.size // 16


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def test_the_search_finds_a_gather_and_a_reduction():
    on = mesh("tp4 ep2")
    w = put(W, on, P("ep", "tp"))
    whole = NamedSharding(on, P())
    assert "all-gather" in collectives(compiled(lambda w: jax.lax.with_sharding_constraint(w, whole), w))
    assert "all-reduce" in collectives(compiled(lambda w: w.max(), w))


@pytest.mark.parametrize(
    ("kind", "spec"),
    [(AxisType.Explicit, P("ep", "tp")), (AxisType.Auto, P(None, "tp")), (AxisType.Auto, P(None, None, ("ep", "tp")))],
    ids=str,
)
@BOTH_SIZES
def test_jitted_functions(array, spec, kind):
    """Called inside a jit: the compiler places them on Auto axes, our shard_map on Explicit ones."""
    w = put(array, mesh("tp4 ep2", kind), spec)
    assert collectives(compiled(lambda w: block_amax(w, 1), w)) == []
    assert collectives(compiled(global_amax, w)) == ["all-reduce"]
    assert collectives(compiled(lambda w: quantize(w, 1), w)) == ["all-reduce"]
    assert collectives(compiled(lambda w: fake_quantize(w, 1), w)) == ["all-reduce"]


def test_on_auto_axes_inside_jit_the_compiler_may_reduce_each_split_dimension_in_turn():
    """XLA splits the maximum of a number over two dimensions in two (jax 0.10), so this is two all-reduces or one."""
    w = put(W, mesh("tp4 ep2"), P("ep", "tp"))
    found = collectives(compiled(lambda w: quantize(w, 1), w))
    assert set(found) == {"all-reduce"} and len(found) <= 2


@BOTH_KINDS
@BOTH_SIZES
def test_jitted_quantize_with_one_amax_per_expert_split_over_ep_only(array, kind):
    w = put(array, mesh("tp2 ep4", kind), P("ep"))
    assert collectives(compiled(lambda w: quantize(w, 1, global_amax=global_amax(w, keep_axes=(0,))), w)) == []


@BOTH_KINDS
def test_eager_functions(kind):
    """The jitted functions that they call: one all-reduce for the amax, and none for the bytes."""
    w = put(W, mesh("tp4 ep2", kind), P("ep", "tp"))
    layout = layout_of(w)
    amax = global_amax(w)
    assert collectives(_block_amax_sharded.__wrapped__.lower(w, BLOCKS, False, layout).compile()) == []
    assert collectives(_global_amax_sharded.__wrapped__.lower(w, (), layout).compile()) == ["all-reduce"]
    assert collectives(_fake_quantize_sharded.__wrapped__.lower(w, amax, BLOCKS, False, layout).compile()) == []
    arguments = w, amax, None, BLOCKS, 2688, RoundToNearest(), False, layout
    assert collectives(_quantize_sharded.__wrapped__.lower(*arguments).compile()) == []


@BOTH_KINDS
def test_eager_amax_per_expert_split_over_ep_only(kind):
    w = put(W, mesh("tp2 ep4", kind), P("ep"))
    assert collectives(_global_amax_sharded.__wrapped__.lower(w, (0,), layout_of(w)).compile()) == []
    w = put(W, mesh("tp2 ep4", kind), P("ep", "tp"))
    assert collectives(_global_amax_sharded.__wrapped__.lower(w, (0,), layout_of(w)).compile()) == ["all-reduce"]


@pytest.mark.parametrize(("keep", "wanted"), [((), 1), ((0,), 2)], ids=["one scale", "one for each expert"])
def test_one_reduction_for_many_weights(keep, wanted):
    """Two groups of siblings, one of them whole; split global scales need another to say whether all are finite."""
    on = mesh("tp4 ep2")
    group = (put(W, on, P("ep", None, "tp")), put(W, on, P("ep")))
    signature = placed(group, [Order((1,), keep, 2688, RoundToNearest())] * 2)
    assert collectives(_programs.__wrapped__.lower((group, group), signature).compile()) == ["all-reduce"] * wanted
