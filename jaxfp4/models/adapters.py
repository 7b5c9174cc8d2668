"""Flax modules as pure functions of a parameter tree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax import linen, nnx


def from_flax(module: Any, variables: Mapping[str, Any] | None = None) -> tuple[Callable[..., Any], Any]:
    """`(apply_fn, params)` such that `apply_fn(params, *args)` is what the module computes on `args`.

    For an NNX module `params` is the `nnx.State` of its `nnx.Param`s; other state (statistics, random streams,
    caches) is kept as it is now, and what a call changes in it is dropped. For a Linen module `variables` are needed
    and `params` is `variables["params"]`; other collections are kept. Put an NNX module with dropout into `eval()`
    mode first.

    Raises TypeError for anything else, ValueError where `variables` are missing or not wanted.

    >>> import jax, jax.numpy as jnp
    >>> apply_fn, params = from_flax(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    >>> apply_fn(params, jnp.ones((3, 4))).shape
    (3, 2)
    """
    if isinstance(module, nnx.Module):
        if variables is not None:
            raise ValueError(
                "variables given with an NNX module: wanted none, as the module holds them; leave them out"
            )
        return _from_nnx(module)
    if isinstance(module, linen.Module):
        if variables is None or "params" not in variables:
            found = "none" if variables is None else f"the collections {sorted(variables)}"
            raise ValueError(
                f"variables: found {found}: wanted those of the Linen module with 'params'; pass module.init(...)"
            )
        return _from_linen(module, variables)
    raise TypeError(
        f"module is a {type(module).__name__}: wanted an nnx.Module or a linen.Module; any pure function "
        "of (params, *args) needs no from_flax"
    )


def _from_nnx(module: nnx.Module) -> tuple[Callable[..., Any], Any]:
    graph, *states = nnx.split(module, nnx.Param, ...)
    params, rest = states

    def apply_fn(params: Any, *args: Any) -> Any:
        return nnx.merge(graph, params, rest)(*args)

    return apply_fn, params


def _from_linen(module: linen.Module, variables: Mapping[str, Any]) -> tuple[Callable[..., Any], Any]:
    others = {name: collection for name, collection in variables.items() if name != "params"}

    def apply_fn(params: Any, *args: Any) -> Any:
        return module.apply({"params": params, **others}, *args)

    return apply_fn, variables["params"]
