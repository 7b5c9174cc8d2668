"""What each operation asks of the channel scales of its operands, and which its results have.

A rule returns the scalings of an equation's results, or None where the operands must have no factors at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal

from jaxfp4.transform import channel_names
from jaxfp4.transform.channel_names import REARRANGING, varies, with_rank
from jaxfp4.transform.channel_scaling import UNSCALED, Constraints, Scaling, is_scaled
from jaxfp4.transform.channel_variables import Names
from jaxfp4.transform.jaxprs import PASS_THROUGH, shape_of

_NO_PARAMETER = "is scaled by no parameter"

Results = list[Scaling] | None
Rule = Callable[[Constraints, JaxprEqn, Sequence[Scaling]], Results]


# Operations with one operand that has factors.


def _pass_through(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    """The operands, unless they are rounded to integers or to a small range."""
    name = eqn.primitive.name
    if name == "convert_element_type" and not _is_wide(eqn.params["new_dtype"]):
        return None
    if name == "reduce_precision" and eqn.params["exponent_bits"] < jnp.finfo(jnp.float16).nexp:
        return None
    return list(operands)


def _is_wide(dtype: jax.typing.DTypeLike) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.dtype(dtype).itemsize >= 2


def _rearranging(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    """The names at the elements' new places."""
    columns = [REARRANGING[eqn.primitive.name](eqn, names) for names in operands[0].factors]
    results = []
    for i in range(len(eqn.outvars)):
        row = [names for column in columns if (names := column[i]) is not None]
        if len(row) < len(columns):
            return None
        results.append(dataclasses.replace(operands[0], factors=tuple(row)))
    return results


def _unchanged(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    return [Scaling(operands[0].factors)]


def _reduction(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    """A sum or an extreme value, through which only a common factor passes."""
    axes, reason = tuple(eqn.params["axes"]), f"goes into {eqn.primitive.name!r} along its channels"
    return [known.product(known.common(names, axes, reason).squeeze(axes) for names in operands[0].factors)]


def _dynamic_slice(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    """A slice; where its start is not known, any may be meant."""
    shape, sizes = shape_of(eqn.invars[0]), eqn.params["slice_sizes"]
    unknown, ranges = [], []
    for d, (start, length, size) in enumerate(zip(eqn.invars[1:], shape, sizes, strict=True)):
        first = min(max(int(start.val), 0), length - size) if isinstance(start, Literal) else 0
        ranges.append(slice(first, first + size))
        if size < length and not isinstance(start, Literal):
            unknown.append(d)
    factors = (channel_names.cut(known.tied(names, unknown), ranges) for names in operands[0].factors)
    return [dataclasses.replace(operands[0], factors=tuple(factors))]


def _gather(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    """Dimensions taken whole keep their names; along the others any element may be meant."""
    numbers, shape = eqn.params["dimension_numbers"], shape_of(eqn.invars[0])
    fill = eqn.params["fill_value"]
    if operands[1].factors or not (fill is None or fill == 0 or np.isnan(fill)):
        return None
    partial = {d for d, size in enumerate(eqn.params["slice_sizes"]) if size != shape[d]}
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [d for d in range(len(shape)) if d not in dropped]
    factors = []
    for names in operands[0].factors:
        names = known.tied(names, partial | dropped)
        sizes = [1] * len(shape_of(eqn.outvars[0]))
        for place, d in zip(numbers.offset_dims, kept, strict=True):
            sizes[place] = names.shape[d]
        factors.append(names.reshape(sizes))
    return [dataclasses.replace(operands[0], factors=tuple(factors))]


def _padding(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    """Zeros put around and between; they do not move channels."""
    padded = [d for d, widths in enumerate(eqn.params["padding_config"]) if any(widths)]
    if not operands[1].is_zero or any(varies(names, padded) for names in operands[0].factors):
        return None
    return [Scaling(operands[0].factors)]


# Operations with several.


def _multiplication(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    rank = len(shape_of(eqn.outvars[0]))
    return [known.product(with_rank(names, rank) for o in operands for names in o.factors)]


def _division(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    inverse = Scaling(tuple(-names for names in operands[1].factors))
    return _multiplication(known, eqn, [operands[0], inverse])


def _sum(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    """A sum, or a choice of one of the operands for each element: all must have the same factors."""
    verb = "is added to" if eqn.primitive.name in ("add", "add_any", "sub") else "is chosen from beside"
    return [known.alike(operands, len(shape_of(eqn.outvars[0])), f"{verb} something unscaled")]


def _selection(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    """As a sum of all but the choosing operand."""
    return None if operands[0].factors else _sum(known, eqn, operands[1:])


def _comparison(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    """Comparing with zero sees only signs, which positive factors keep."""
    return [UNSCALED] if any(o.is_zero for o in operands) else None


def _concatenation(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    """Every element keeps its own factors."""
    dimension = eqn.params["dimension"]
    sizes = [shape_of(v)[dimension] for v in eqn.invars]
    joined = known.joined(operands, sizes, dimension, len(shape_of(eqn.outvars[0])))
    return None if joined is None else [joined]


def _stack(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    """As a concatenation along a new dimension."""
    axis = eqn.params["axis"]
    expanded = [
        dataclasses.replace(o, factors=tuple(np.expand_dims(names, axis) for names in o.factors)) for o in operands
    ]
    joined = known.joined(expanded, [1] * len(operands), axis, len(shape_of(eqn.outvars[0])))
    return None if joined is None else [joined]


_WRITTEN = "is written into something unscaled"


def _dynamic_update_slice(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    """Both arrays may be found anywhere along the dimensions that the update does not fill."""
    shape, part = shape_of(eqn.invars[0]), shape_of(eqn.invars[1])
    unknown = [d for d, n in enumerate(part) if n != shape[d]]
    both = [
        dataclasses.replace(o, factors=tuple(known.tied(names, unknown) for names in o.factors)) for o in operands[:2]
    ]
    return [known.alike(both, len(shape), _WRITTEN)]


def _scatter(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    """As a dynamic update: the names of the update, placed along the dimensions that it fills."""
    numbers, shape, part = eqn.params["dimension_numbers"], shape_of(eqn.invars[0]), shape_of(eqn.invars[2])
    applies_function = eqn.primitive.name == "scatter" and eqn.params["update_jaxpr"] is not None
    if operands[1].factors or applies_function:
        return None
    dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    windows = zip((d for d in range(len(shape)) if d not in dropped), numbers.update_window_dims, strict=True)
    filled = {d: w for d, w in windows if part[w] == shape[d]}
    into = (known.tied(names, set(range(len(shape))) - filled.keys()) for names in operands[0].factors)
    factors = []
    for names in operands[2].factors:
        names = known.tied(names, set(range(len(part))) - {*filled.values()})
        factors.append(names.reshape([names.shape[filled[d]] if d in filled else 1 for d in range(len(shape))]))
    target = dataclasses.replace(operands[0], factors=tuple(into))
    return [known.alike([target, dataclasses.replace(operands[2], factors=tuple(factors))], len(shape), _WRITTEN)]


# Contractions.


def _dot_general(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    return [_contraction(known, eqn, eqn.params["dimension_numbers"], operands)]


def _ragged_dot(known: Constraints, eqn: JaxprEqn, operands: Sequence[Scaling]) -> Results:
    """A contraction of rows with the weight of their group, for which all weights have the same factors."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (left, _), (left_batch, _) = numbers.dot_dimension_numbers
    groups, ragged = tuple(numbers.rhs_group_dimensions), numbers.lhs_ragged_dimensions
    if is_scaled(operands[2:]) or len(groups) != 1 or {*ragged} & {*left, *left_batch}:
        return None
    shared = dataclasses.replace(operands[1], factors=tuple(known.tied(n, groups) for n in operands[1].factors))
    return [_contraction(known, eqn, numbers.dot_dimension_numbers, [operands[0], shared], groups)]


_DotNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def _contraction(
    known: Constraints,
    eqn: JaxprEqn,
    numbers: _DotNumbers,
    operands: Sequence[Scaling],
    groups: tuple[int, ...] = (),
) -> Scaling:
    """The result's scaling. `groups` are dimensions of the right operand, of size 1 in names, that it does not have."""
    (left, right), (left_batch, right_batch) = numbers
    shared = len(left_batch) + len(left)
    free = len(shape_of(eqn.invars[0])) - shared, len(shape_of(eqn.invars[1])) - shared - len(groups)
    lefts = (_in_order(names, (*left_batch, *left)) for names in operands[0].factors)
    rights = (_in_order(names, (*right_batch, *right), groups) for names in operands[1].factors)
    # Both in one frame: batch, contracted, free dimensions of the left operand, free ones of the right.
    frames = [
        [names.reshape((*names.shape, *[1] * free[1])) for names in lefts],
        [names.reshape((*names.shape[:shared], *[1] * free[0], *names.shape[shared:])) for names in rights],
    ]
    contracted = tuple(range(len(left_batch), shared))
    _cancel(known, frames, contracted, operands)
    kept = [names for frame in frames for names in known.simplified(frame) if not varies(names, contracted)]
    return known.product(names.squeeze(contracted) for names in kept)


def _in_order(names: Names, leading: Sequence[int], dropped: Sequence[int] = ()) -> Names:
    """Names with some dimensions in front, the others after them, but for some of size 1."""
    rest = [d for d in range(names.ndim) if d not in leading and d not in dropped]
    return names.transpose([*leading, *rest, *dropped]).reshape([names.shape[d] for d in (*leading, *rest)])


def _cancel(
    known: Constraints, frames: Sequence[Sequence[Names]], contracted: Sequence[int], operands: Sequence[Scaling]
) -> None:
    """Makes the factors that change along a contraction reciprocal to each other, or fixes them."""
    reason = "meets something unscaled in a contraction"
    left, right = ([n for n in known.simplified(frame) if varies(n, contracted)] for frame in frames)
    if left and right:
        known.equal(left, [-names for names in right], reason)
        return
    for names, value, other in ((left, operands[0], operands[1]), (right, operands[1], operands[0])):
        # A weight's own factors are there for the sake of the activation's.
        blame = (known.obstacle(other) or _NO_PARAMETER) if value.is_parameter else reason
        known.fix([Scaling(tuple(names))], blame)


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(PASS_THROUGH, _pass_through),
    **dict.fromkeys(REARRANGING, _rearranging),
    **dict.fromkeys(("neg", "abs"), _unchanged),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min"), _reduction),
    **dict.fromkeys(("add", "add_any", "sub", "max", "min"), _sum),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), _comparison),
    **dict.fromkeys(("scatter", "scatter-add"), _scatter),
    "mul": _multiplication,
    "div": _division,
    "select_n": _selection,
    "concatenate": _concatenation,
    "stack": _stack,
    "pad": _padding,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
}
"""By the name of the primitive. An operation without a rule may do anything with its operands' elements."""
