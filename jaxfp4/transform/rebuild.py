"""Loops, branches, remat and shard_map around bodies that hold contractions of planned weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec

from jaxfp4.tensors.mesh import AxisNames, varying_axes, varying_everywhere
from jaxfp4.transform import jaxprs
from jaxfp4.transform.reach import contracted_in_body
from jaxfp4.transform.scope import Observations, Rebuild, Scope, Value, as_array
from jaxfp4.transform.sites import Tracked
from jaxfp4.transform.statistics import State, Statistic
from jaxfp4.transform.views import localize


def remat(scope: Scope, eqn: JaxprEqn, operands: list[Value]) -> Sequence[Value]:
    """`jax.checkpoint` around the evaluated body."""
    body = jaxprs.body_of(eqn.params["jaxpr"])
    arrays, restore = _separate(operands)

    @functools.partial(jax.checkpoint, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    def evaluated(arrays: list[Any]) -> tuple[list[Array], Observations]:
        return scope.inner(body, restore(arrays), same_values=True)

    results, observations = evaluated(arrays)
    scope.absorb(observations)
    return results


def scan(scope: Scope, eqn: JaxprEqn, operands: list[Value]) -> Sequence[Value]:
    """`lax.scan` around the evaluated body. Statistics of weights scanned over come out stacked, others are carried.

    So are those of one layer where only that is observed.
    """
    parts, body = jaxprs.scan_parts(eqn), jaxprs.body_of(eqn.params["jaxpr"])
    consts = operands[: parts.consts]
    carry = [as_array(v) for v in operands[parts.consts : parts.consts + parts.carry]]
    outer = operands[parts.consts + parts.carry :]
    xs = [_scanned(v) for v in outer]
    arrays, restore = _separate(xs)
    scanned_axis = {
        v.view.leaf: v.view.scanned[-1]
        for v, before in zip(xs, outer, strict=True)
        if isinstance(v, Tracked) and isinstance(before, Tracked) and v.view.scanned != before.view.scanned
        if v.view.scanned[-1] in before.observed_stack
    }
    neutral = _neutral(scope, body, [*consts, *carry, *xs], without=scanned_axis)

    def step(state: tuple[list[Array], Observations], slices: list[Any]) -> Any:
        values, seen = state
        results, observations = scope.inner(body, [*consts, *values, *restore(slices)])
        stacked = {leaf: o for leaf, o in observations.items() if leaf in scanned_axis}
        return (results[: parts.carry], _merged(scope, seen, observations)), (results[parts.carry :], stacked)

    (values, seen), (ys, stacked) = lax.scan(
        step,
        (carry, neutral),
        arrays,
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    scope.absorb(seen)
    stacks = {v.view.leaf: sorted(v.observed_stack) for v in outer if isinstance(v, Tracked)}
    for leaf, observed in stacked.items():
        place = stacks[leaf].index(scanned_axis[leaf])
        scope.absorb({leaf: jax.tree.map(functools.partial(jnp.moveaxis, source=0, destination=place), observed)})
    return [*values, *ys]


def while_loop(scope: Scope, eqn: JaxprEqn, operands: list[Value]) -> Sequence[Value]:
    """`lax.while_loop` around the evaluated body, statistics carried."""
    conditions, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    condition, body = jaxprs.body_of(eqn.params["cond_jaxpr"]), jaxprs.body_of(eqn.params["body_jaxpr"])
    condition_consts = [as_array(v) for v in operands[:conditions]]
    body_consts = operands[conditions : conditions + consts]
    carry = [as_array(v) for v in operands[conditions + consts :]]
    neutral = _neutral(scope, body, [*body_consts, *carry])

    def step(state: tuple[list[Array], Observations]) -> tuple[list[Array], Observations]:
        results, observations = scope.inner(body, [*body_consts, *state[0]])
        return results, _merged(scope, state[1], observations)

    def proceed(state: tuple[list[Array], Observations]) -> Array:
        return scope.inner(condition, [*condition_consts, *state[0]], (-1,))[0][0]

    values, seen = lax.while_loop(proceed, step, (carry, neutral))
    scope.absorb(seen)
    return values


def cond(scope: Scope, eqn: JaxprEqn, operands: list[Value]) -> Sequence[Value]:
    """`lax.switch` around the evaluated branches; a branch that is not taken observes nothing."""
    bodies = [jaxprs.body_of(branch) for branch in eqn.params["branches"]]
    neutral: Observations = {}
    for body in bodies:
        neutral.update(_neutral(scope, body, operands[1:]))

    def branch(number: int, body: jaxprs.Body) -> Callable[[], tuple[list[Array], Observations]]:
        def evaluated() -> tuple[list[Array], Observations]:
            results, observations = scope.inner(body, operands[1:], (number,))
            return results, _merged(scope, neutral, observations)

        return evaluated

    index = as_array(operands[0]).astype(jnp.int32)
    results, observations = lax.switch(index, [branch(i, body) for i, body in enumerate(bodies)])
    scope.absorb(observations)
    return results


def shard_map(scope: Scope, eqn: JaxprEqn, operands: list[Value]) -> Sequence[Value]:
    """`jax.shard_map` around the evaluated body; statistics are merged over the mesh axes that split no stack."""
    body, params = jaxprs.body_of(eqn.params["jaxpr"]), eqn.params
    shapes = [jaxprs.shape_of(v) for v in body.jaxpr.invars]
    local = [_localized(v, *where) for v, *where in zip(operands, shapes, params["in_specs"], strict=True)]
    arrays, restore = _separate(local)
    in_specs = [
        (spec, {name: PartitionSpec() for name in v.scales}) if isinstance(v, Tracked) else spec
        for v, spec in zip(local, params["in_specs"], strict=True)
    ]
    splits = {
        v.view.leaf: _stack_spec(v, v.observed_stack, spec)
        for v, spec in zip(local, params["in_specs"], strict=True)
        if isinstance(v, Tracked)
    }
    observed = _neutral(scope, body, local)

    def evaluated(arrays: list[Any]) -> tuple[list[Array], Observations]:
        results, observations = scope.inner(body, restore(arrays))
        return results, {
            leaf: _merged_over_mesh(scope.hooks.statistics[leaf], observations[leaf], splits[leaf]) for leaf in observed
        }

    results, observations = jax.shard_map(
        evaluated,
        mesh=params["mesh"],
        in_specs=(in_specs,),
        out_specs=(list(params["out_specs"]), {leaf: splits[leaf] for leaf in observed}),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )(arrays)
    scope.absorb(observations)
    return results


REBUILDERS: Mapping[str, Rebuild] = {
    "cond": cond,
    "scan": scan,
    "shard_map": shard_map,
    "while": while_loop,
    **dict.fromkeys(jaxprs.REMAT, remat),
}


def _neutral(scope: Scope, body: jaxprs.Body, values: Sequence[Value], without: Iterable[int] = ()) -> Observations:
    """Neutral statistics of the weights that a body contracts and that are observed."""
    statistics = scope.hooks.statistics
    leaves = contracted_in_body(body, [v.view if isinstance(v, Tracked) else None for v in values])
    stacks = {v.view.leaf: v.observed_stack for v in values if isinstance(v, Tracked)}
    wanted = sorted((leaves & set(statistics)) - set(without))
    neutral = {k: statistics[k].init([stacks[k][a] for a in sorted(stacks[k])]) for k in wanted}
    return jax.tree.map(varying_everywhere, neutral)


def _merged(scope: Scope, seen: Observations, new: Observations) -> Observations:
    """`seen` with the new observations of the same weights merged in."""
    statistics = scope.hooks.statistics
    return {leaf: statistics[leaf].merge(state, new[leaf]) if leaf in new else state for leaf, state in seen.items()}


def _merged_over_mesh(statistic: Statistic, observed: State, split: PartitionSpec) -> State:
    """A statistic merged over all mesh axes on which it differs, except those that split its own axes."""
    own = _axis_names(split)
    varying = [n for state in jax.tree.leaves(observed) for n in varying_axes(state)]
    return statistic.merge_over_mesh(observed, tuple(n for n in dict.fromkeys(varying) if n not in own))


def _axis_names(spec: PartitionSpec) -> AxisNames:
    return tuple(n for entry in spec if entry for n in (entry if isinstance(entry, tuple) else (entry,)))


def _separate(values: Sequence[Value]) -> tuple[list[Any], Callable[[list[Any]], list[Value]]]:
    """The arrays in a list of values as pytrees, and how to put others in their place."""
    arrays = [(v.value, dict(v.scales)) if isinstance(v, Tracked) else v for v in values]

    def restore(arrays: list[Any]) -> list[Value]:
        return [
            dataclasses.replace(v, value=a[0], scales=a[1]) if isinstance(v, Tracked) else a
            for v, a in zip(values, arrays, strict=True)
        ]

    return arrays, restore


def _scanned(value: Value) -> Value:
    """What a scan's body sees of an operand, its arrays still with the scanned axis in front."""
    if not isinstance(value, Tracked):
        return value
    view = value.view.step_into_scan()
    if view is None:
        return value.array()
    length = value.view.shape[0]
    new_axes = [a for a in view.scanned if a not in value.view.scanned]
    layers = [a for a in value.layer_axes if a not in new_axes]
    scales = {
        name: jnp.moveaxis(s, value.layer_axes.index(new_axes[0]), 0)
        if len(layers) < len(value.layer_axes)
        else jnp.broadcast_to(s, (length, *s.shape))
        for name, s in value.scales.items()
    }
    # A packed weight is scanned packed if the scan runs over its own leading axis.
    whole = value.value if view.scanned == (0,) and value.packed_by_layer() else value.array()
    stack = {a: n for a, n in value.stack.items() if a not in new_axes}
    return dataclasses.replace(value, value=whole, view=view, stack=stack, layer_axes=tuple(layers), scales=scales)


def _localized(value: Value, shape: tuple[int, ...], spec: PartitionSpec) -> Value:
    """What a shard_map's body sees of an operand, its array still whole."""
    if not isinstance(value, Tracked):
        return value
    view = localize(value.view, shape)
    if view is None:
        return value.array()
    sizes = {f.axis: f.size for d in view.dimensions for f in d if len(d) == 1}
    stack = {a: sizes.get(a, n) for a, n in value.stack.items()}
    local = dataclasses.replace(value, value=value.array(), view=view, stack=stack)
    return dataclasses.replace(local, split=(*value.split, *_axis_names(_stack_spec(local, local.stack, spec))))


def _stack_spec(value: Tracked, stack: Iterable[int], spec: PartitionSpec) -> PartitionSpec:
    """How a statistic of the weight is split: along each of these stack axes as the dimension that holds it."""
    entries: dict[int, Any] = dict.fromkeys(stack)
    for dimension, entry in zip(value.view.dimensions, spec, strict=False):
        for factor in dimension:
            if factor.axis in entries:
                entries[factor.axis] = entry
    return PartitionSpec(*(entries[a] for a in sorted(entries)))
