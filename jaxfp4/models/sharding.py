"""Where a decoder's parameters live on a mesh: ``tp`` splits heads, MLP widths and vocabulary, ``ep`` splits experts.

Column-parallel kernels (queries, keys, values, gate, up, head) split their outputs, row-parallel ones (attention
output, down) their contraction, so a layer needs one all-reduce after attention and one after the MLP. A bias is
split with the outputs of its kernel. Norms, routers and the biases of row-parallel kernels are replicated.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxfp4.models.config import DecoderConfig
from jaxfp4.models.decoder import Decoder

TENSOR_AXIS = "tp"
EXPERT_AXIS = "ep"

_COLUMN = PartitionSpec(None, TENSOR_AXIS)
_ROW = PartitionSpec(TENSOR_AXIS, None)
_SPLIT = PartitionSpec(TENSOR_AXIS)
_SPECS: Mapping[str, PartitionSpec] = {
    "q_proj/kernel": _COLUMN,
    "k_proj/kernel": _COLUMN,
    "v_proj/kernel": _COLUMN,
    "o_proj/kernel": _ROW,
    "gate_proj/kernel": _COLUMN,
    "up_proj/kernel": _COLUMN,
    "down_proj/kernel": _ROW,
    "q_proj/bias": _SPLIT,
    "k_proj/bias": _SPLIT,
    "v_proj/bias": _SPLIT,
    "gate_proj/bias": _SPLIT,
    "up_proj/bias": _SPLIT,
    "experts/gate_proj": PartitionSpec(EXPERT_AXIS, None, TENSOR_AXIS),
    "experts/up_proj": PartitionSpec(EXPERT_AXIS, None, TENSOR_AXIS),
    "experts/down_proj": PartitionSpec(EXPERT_AXIS, TENSOR_AXIS, None),
    "router/kernel": PartitionSpec(),
    "embed/embedding": _ROW,
    "lm_head/kernel": _COLUMN,
}


@functools.lru_cache(maxsize=16)
def _shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    abstract = nnx.eval_shape(lambda: nnx.state(Decoder(config, rngs=nnx.Rngs(0)), nnx.Param))
    flat = nnx.to_pure_dict(abstract)
    leaves, _ = jax.tree_util.tree_flatten_with_path(flat)
    return {"/".join(str(key.key) for key in path): tuple(leaf.shape) for path, leaf in leaves}


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """``{path: shape}`` of every parameter of the decoder, found without allocating any."""
    return dict(_shapes(config))


def partition_specs(config: DecoderConfig) -> dict[str, PartitionSpec]:
    """``{path: PartitionSpec}`` over the axes ``tp`` and ``ep``, for every parameter of the decoder.

    A mesh without one of the axes needs the specs of `shardings`, which leaves that axis out.
    """
    specs = {}
    for path in _shapes(config):
        specs[path] = _SPECS.get("/".join(path.split("/")[-2:]), PartitionSpec())
    return specs


def shardings(config: DecoderConfig, mesh: Mesh) -> dict[str, NamedSharding]:
    """``{path: NamedSharding}``: `partition_specs` on `mesh`, without the axes that the mesh does not have.

    Raises:
        ValueError: an axis does not divide the dimension that it splits; the message names the parameter and both
            sizes.
    """
    shapes = _shapes(config)
    return {
        path: NamedSharding(mesh, _fit(path, shapes[path], spec, mesh))
        for path, spec in partition_specs(config).items()
    }


def _fit(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """`spec` without the axes that `mesh` lacks, each remaining one checked to divide its dimension."""
    axes = [axis if axis in mesh.shape else None for axis in spec]
    for dimension, axis in enumerate(axes):
        if axis is not None and shape[dimension] % mesh.shape[axis]:
            raise ValueError(
                f"mesh: axis {axis!r} has size {mesh.shape[axis]}, which does not divide dimension {dimension} (size "
                f"{shape[dimension]}) of {path}; use a size of {axis!r} that divides {shape[dimension]}"
            )
    return PartitionSpec(*axes)
