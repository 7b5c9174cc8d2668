"""Parameters seen through casts, transposes, reshapes and slices: which of their axes a value still has, and where.

A `View` follows one parameter from the model's input to a contraction. Each dimension of the viewed array is a product
of `Factor`s, pieces of parameter axes, so a contraction over dimensions can be read as one over parameter axes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn

from jaxfp4.transform.jaxprs import PASS_THROUGH, Atom, shape_of

BROADCAST = -1
"""The axis of a factor that the parameter does not have."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """A piece of a parameter axis: the entries at distance `stride` of each other, `size` of them."""

    axis: int
    size: int
    stride: int = 1
    index_dimension: int | None = None
    """If the entries were picked by an index array: which of its dimensions this is."""

    def split(self, major: int) -> tuple[Factor, Factor]:
        """Two factors, the first of size `major`, which divides the size."""
        minor = self.size // major
        return dataclasses.replace(self, size=major, stride=self.stride * minor), dataclasses.replace(self, size=minor)


Dimension = tuple[Factor, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """Parameter number `leaf` as an array whose dimensions are `dimensions`.

    `starts` gives, for axes that were sliced or indexed, the first entry that is left: an integer, a traced scalar, an
    index array (with a last dimension of size 1), or None where it is not known. Axes in `scanned` were consumed by an
    enclosing scan; along those in `gathered` an index array picked entries.
    """

    leaf: int
    dimensions: tuple[Dimension, ...]
    starts: Mapping[int, Any] = dataclasses.field(default_factory=dict)
    scanned: tuple[int, ...] = ()
    gathered: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the viewed array."""
        return tuple(math.prod(f.size for f in d) for d in self.dimensions)

    def step_into_scan(self) -> View | None:
        """The view inside a scan over the leading dimension; None if that is no whole parameter axis.

        A leading dimension of size 1 belongs to no axis, so none is marked as scanned.
        """
        leading = self.dimensions[0]
        if not leading:
            return dataclasses.replace(self, dimensions=self.dimensions[1:])
        if len(leading) != 1 or leading[0].axis == BROADCAST or leading[0].axis in self.starts:
            return None
        if any(f.axis == leading[0].axis for d in self.dimensions[1:] for f in d):
            return None
        return dataclasses.replace(self, dimensions=self.dimensions[1:], scanned=(*self.scanned, leading[0].axis))


def whole(leaf: int, shape: Sequence[int]) -> View:
    """The parameter itself."""
    return View(leaf, tuple((Factor(a, n),) if n != 1 else () for a, n in enumerate(shape)))


Resolve = Callable[[Atom], Any]
"""The value of an operand, or None where values are not known."""


def propagate(eqn: JaxprEqn, views: Sequence[View | None], resolve: Resolve) -> list[View | None]:
    """The views that the results of an equation are, given those of its operands; None for what is no view."""
    name = eqn.primitive.name
    if name in PASS_THROUGH:
        return list(views)
    view = views[0] if views else None
    rule = _RULES.get(name)
    if view is None or rule is None or any(v is not None for v in views[1:]):
        return [None] * len(eqn.outvars)
    result = rule(eqn, view, resolve)
    return result if isinstance(result, list) else [result]


def _transpose(eqn: JaxprEqn, view: View, resolve: Resolve) -> View:
    return dataclasses.replace(view, dimensions=tuple(view.dimensions[i] for i in eqn.params["permutation"]))


def _squeeze(eqn: JaxprEqn, view: View, resolve: Resolve) -> View:
    dropped = eqn.params["dimensions"]
    return dataclasses.replace(view, dimensions=tuple(d for i, d in enumerate(view.dimensions) if i not in dropped))


def _expand(eqn: JaxprEqn, view: View, resolve: Resolve) -> View:
    dimensions = list(view.dimensions)
    for i in sorted(eqn.params["dimensions"]):
        dimensions.insert(i, ())
    return dataclasses.replace(view, dimensions=tuple(dimensions))


def _broadcast(eqn: JaxprEqn, view: View, resolve: Resolve) -> View | None:
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    dimensions: list[Dimension] = [(Factor(BROADCAST, n),) if n != 1 else () for n in shape]
    for place, dimension in zip(places, view.dimensions, strict=True):
        if dimension:
            dimensions[place] = dimension
    return dataclasses.replace(view, dimensions=tuple(dimensions))


def _reshape(eqn: JaxprEqn, view: View, resolve: Resolve) -> View | None:
    if eqn.params.get("dimensions") is not None:
        return None
    dimensions = regroup([f for d in view.dimensions for f in d], shape_of(eqn.outvars[0]))
    return None if dimensions is None else dataclasses.replace(view, dimensions=dimensions)


def regroup(factors: Sequence[Factor], shape: Sequence[int]) -> tuple[Dimension, ...] | None:
    """Factors, first slowest, distributed over the dimensions of `shape`; None if one would be cut unevenly."""
    remaining = list(factors)
    dimensions: list[Dimension] = []
    for size in shape:
        dimension: list[Factor] = []
        while size > 1:
            factor = remaining.pop(0)
            common = math.gcd(factor.size, size)
            if common != factor.size:
                if common != size:
                    return None
                factor, rest = factor.split(common)
                remaining.insert(0, rest)
            dimension.append(factor)
            size //= common
        dimensions.append(tuple(dimension))
    return tuple(dimensions)


def _slice(eqn: JaxprEqn, view: View, resolve: Resolve) -> View | None:
    if eqn.params["strides"] is not None and any(stride != 1 for stride in eqn.params["strides"]):
        return None
    starts = eqn.params["start_indices"]
    sizes = [stop - start for start, stop in zip(starts, eqn.params["limit_indices"], strict=True)]
    return narrow(view, starts, sizes)


def _dynamic_slice(eqn: JaxprEqn, view: View, resolve: Resolve) -> View | None:
    return narrow(view, [resolve(atom) for atom in eqn.invars[1:]], eqn.params["slice_sizes"])


def _split(eqn: JaxprEqn, view: View, resolve: Resolve) -> list[View | None]:
    axis, results, start = eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        starts = [start if d == axis else 0 for d in range(len(view.dimensions))]
        sizes = [size if d == axis else n for d, n in enumerate(view.shape)]
        results.append(narrow(view, starts, sizes))
        start += size
    return results


def _unstack(eqn: JaxprEqn, view: View, resolve: Resolve) -> list[View | None]:
    axis, results = eqn.params["axis"], []
    for start in range(view.shape[axis]):
        starts = [start if d == axis else 0 for d in range(len(view.dimensions))]
        sizes = [1 if d == axis else n for d, n in enumerate(view.shape)]
        entry = narrow(view, starts, sizes)
        if entry is not None:
            kept = tuple(dimension for d, dimension in enumerate(entry.dimensions) if d != axis)
            entry = dataclasses.replace(entry, dimensions=kept)
        results.append(entry)
    return results


def narrow(view: View, starts: Sequence[Any], sizes: Sequence[int]) -> View | None:
    """The view of a contiguous slice; None if it cuts a dimension that is no single, still whole parameter axis."""
    dimensions, moved = [], dict(view.starts)
    for dimension, before, start, size in zip(view.dimensions, view.shape, starts, sizes, strict=True):
        if size == before:
            dimensions.append(dimension)
            continue
        if len(dimension) != 1 or dimension[0].stride != 1 or dimension[0].index_dimension is not None:
            return None
        axis = dimension[0].axis
        if axis in moved or any(f.axis == axis for d in view.dimensions if d is not dimension for f in d):
            return None
        if axis != BROADCAST:
            moved[axis] = start
        dimensions.append((dataclasses.replace(dimension[0], size=size),) if size != 1 else ())
    return dataclasses.replace(view, dimensions=tuple(dimensions), starts=moved)


def _gather(eqn: JaxprEqn, view: View, resolve: Resolve) -> View | None:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    indexed = numbers.start_index_map
    if len(indexed) != 1 or numbers.collapsed_slice_dims != indexed or numbers.operand_batching_dims:
        return None
    (axis_place,) = indexed
    kept = [d for d in range(len(view.dimensions)) if d != axis_place]
    factors = view.dimensions[axis_place]
    if any(sizes[d] != view.shape[d] for d in kept) or len(factors) != 1 or factors[0].axis in view.starts:
        return None
    indices_shape = shape_of(eqn.invars[1])[:-1]
    picked = iter(
        (Factor(factors[0].axis, n, index_dimension=i),) if n != 1 else () for i, n in enumerate(indices_shape)
    )
    rest = iter(view.dimensions[d] for d in kept)
    rank = len(shape_of(eqn.outvars[0]))
    dimensions = tuple(next(rest) if d in numbers.offset_dims else next(picked) for d in range(rank))
    starts = {**view.starts, factors[0].axis: resolve(eqn.invars[1])}
    gathered = (*view.gathered, factors[0].axis) if indices_shape else view.gathered
    return dataclasses.replace(view, dimensions=dimensions, starts=starts, gathered=gathered)


_RULES: Mapping[str, Callable[[JaxprEqn, View, Resolve], View | list[View | None] | None]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "gather": _gather,
    "unstack": _unstack,
}


def localize(view: View, shape: Sequence[int]) -> View | None:
    """The view of a shard with this shape; None if a dimension holds a part of an axis, or a split one several."""
    if any(factor.axis in view.starts for dimension in view.dimensions for factor in dimension):
        return None
    dimensions = list(view.dimensions)
    for d, (dimension, size) in enumerate(zip(view.dimensions, shape, strict=True)):
        if math.prod(f.size for f in dimension) == size:
            continue
        if len(dimension) != 1:
            return None
        dimensions[d] = (dataclasses.replace(dimension[0], size=size),)
    return dataclasses.replace(view, dimensions=tuple(dimensions))


@dataclasses.dataclass(frozen=True)
class AxisRoles:
    """What a contraction does with the axes of a parameter; all in increasing order."""

    contracted: tuple[int, ...]
    output: tuple[int, ...]
    stacked: tuple[int, ...]
    """Axes along which the parameter is a stack of separate weights: batched, indexed, or scanned over."""


def axis_roles(view: View, contracted: Sequence[int], batched: Sequence[int], shape: Sequence[int]) -> AxisRoles | str:
    """The roles of a parameter's axes for given contracted and batch dimensions of the view, or why there are none.

    `shape` is the parameter's. Its axes of size 1 are never stacked.
    """
    places = dict.fromkeys(contracted, "contracted") | dict.fromkeys(batched, "batched")
    roles: dict[int, set[str]] = {}
    for d, dimension in enumerate(view.dimensions):
        for factor in dimension:
            role = "batched" if factor.index_dimension is not None else places.get(d, "output")
            roles.setdefault(factor.axis, set()).add(role)
    broadcast = roles.pop(BROADCAST, set())
    if "contracted" in broadcast:
        return "it is broadcast along its contraction"
    for axis, found in roles.items():
        if len(found) > 1:
            return f"its axis {axis} is split between {' and '.join(sorted(found))} dimensions"
    by_role = {
        role: tuple(a for a in sorted(roles) if role in roles[a]) for role in ("contracted", "output", "batched")
    }
    if not by_role["contracted"]:
        return "no axis of it is contracted"
    long_axes = {a for a, n in enumerate(shape) if n > 1}
    stacked = long_axes - set(by_role["contracted"]) - set(by_role["output"])
    return AxisRoles(by_role["contracted"], by_role["output"], tuple(sorted(stacked)))


def contraction_order(view: View, contracted: Sequence[int]) -> list[int]:
    """Positions in `contracted`, ordered as the parameter's own axes are, slowest first."""

    def key(position: int) -> tuple[int, int]:
        factors = view.dimensions[contracted[position]]
        return (factors[0].axis, -factors[0].stride) if factors else (-1, 0)

    return sorted(range(len(contracted)), key=key)


def is_concrete(start: Any) -> bool:
    """Whether a start is a number known while tracing."""
    return isinstance(start, (int, np.integer))
