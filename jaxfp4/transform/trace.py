"""A model's function as a jaxpr whose first inputs are the leaves of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxfp4.formats import path_string
from jaxfp4.tensors import QuantizedWeight
from jaxfp4.tensors.memory import abstract
from jaxfp4.transform import jaxprs

ApplyFn = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Leaves:
    """A parameter tree taken apart. Leaves are arrays, abstract arrays or `QuantizedWeight`s."""

    paths: tuple[str, ...]
    values: tuple[Any, ...]
    treedef: jax.tree_util.PyTreeDef

    def rebuilt(self, values: Sequence[Any]) -> Any:
        """A tree of the same structure with other leaves."""
        return jax.tree.unflatten(self.treedef, values)


def leaves_of(params: Any) -> Leaves:
    """The leaves of a parameter tree with their paths; a `QuantizedWeight` is one leaf.

    Raises ValueError if two leaves have the same path or there are none.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: isinstance(x, QuantizedWeight))
    paths = tuple(path_string(keys) for keys, _ in flat)
    if not paths:
        raise ValueError("params holds no arrays: wanted a pytree of parameters, such as from_flax(module) returns")
    repeated = sorted({path for path in paths if paths.count(path) > 1})
    if repeated:
        raise ValueError(f"params has several leaves at {repeated[0]!r}: wanted one; rename a key that holds '/'")
    return Leaves(paths, tuple(value for _, value in flat), treedef)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced function: its jaxpr takes the leaves, then the flattened arguments."""

    body: jaxprs.Body
    out_tree: jax.tree_util.PyTreeDef


def trace(apply_fn: ApplyFn, leaves: Leaves, args: tuple[Any, ...]) -> Traced:
    """Traces `apply_fn(params, *args)` abstractly; nothing is computed."""

    def flat_fn(values: list[Any], args: tuple[Any, ...]) -> Any:
        return apply_fn(leaves.rebuilt(values), *args)

    avals = [_dense(value) for value in leaves.values]
    closed, outputs = jax.make_jaxpr(flat_fn, return_shape=True)(avals, args)
    return Traced(jaxprs.body_of(closed), jax.tree.structure(outputs))


def _dense(value: Any) -> Any:
    """What stands for a leaf: of a quantized one the type of the array that it replaces, with its sharding."""
    if isinstance(value, QuantizedWeight):
        return jax.eval_shape(lambda tensor: tensor.dequantize(), value.weight)
    return abstract(value)
