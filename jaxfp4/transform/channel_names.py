"""Arrays of variable names under the operations that rearrange a value's elements.

An array that names a variable for every element of a value has the value's rank, and size 1 along the dimensions where
the names do not change, so that nothing of the size of an activation is ever made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jax.extend.core import JaxprEqn

from jaxfp4.transform.channel_variables import Names
from jaxfp4.transform.jaxprs import shape_of

LARGEST = 1 << 22
"""No array of names has more entries."""


def with_rank(names: Names, rank: int) -> Names:
    """The names of a scalar as an array of that rank; others have it already."""
    return names.reshape((1,) * rank) if names.ndim == 0 else names


def compressed(names: Names) -> Names:
    """Size 1 along each dimension on which the names do not depend."""
    for d in range(names.ndim):
        first = np.take(names, [0], axis=d)
        if names.shape[d] > 1 and (names == first).all():
            names = first
    return names


def varies(names: Names, dimensions: Sequence[int]) -> bool:
    """Whether a compressed array depends on one of these dimensions."""
    return any(names.shape[d] > 1 for d in dimensions)


def first_along(names: Names, dimensions: Sequence[int]) -> Names:
    """The first entry along some dimensions, which are kept."""
    return names[tuple(slice(0, 1) if d in dimensions else slice(None) for d in range(names.ndim))]


def cut(names: Names, ranges: Sequence[slice]) -> Names:
    """A slice; dimensions of size 1 stay as they are."""
    return names[tuple(slice(None) if n == 1 else r for n, r in zip(names.shape, ranges, strict=True))]


def reshaped(names: Names, before: Sequence[int], after: Sequence[int]) -> Names | None:
    """The names of a value reshaped from `before` to `after`; None if there would be too many."""
    expanded, target = [], []
    for old, new in _common_groups(before, after):
        if all(names.shape[d] == 1 for d in old):
            expanded += [1] * len(old)
            target += [1] * len(new)
        else:
            expanded += [before[d] for d in old]
            target += [after[d] for d in new]
    if math.prod(expanded) > LARGEST:
        return None
    return np.broadcast_to(names, expanded).reshape(target)


def _common_groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions, as short as possible, that hold as many elements before as after a reshape."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [i][: len(before) - i], [j][: len(after) - j]
        i, j = i + len(old), j + len(new)
        while (olds := math.prod(before[d] for d in old)) != (news := math.prod(after[d] for d in new)):
            if olds < news:
                old.append(i)
                i += 1
            else:
                new.append(j)
                j += 1
        groups.append((old, new))
    return groups


Rule = Callable[[JaxprEqn, Names], list[Names | None]]
"""From an equation and its first operand's names to its results'; None where there are none."""


def _transpose(eqn: JaxprEqn, names: Names) -> list[Names | None]:
    return [names.transpose(eqn.params["permutation"])]


def _squeeze(eqn: JaxprEqn, names: Names) -> list[Names | None]:
    return [names.squeeze(tuple(eqn.params["dimensions"]))]


def _expand_dims(eqn: JaxprEqn, names: Names) -> list[Names | None]:
    return [np.expand_dims(names, tuple(eqn.params["dimensions"]))]


def _broadcast(eqn: JaxprEqn, names: Names) -> list[Names | None]:
    sizes = [1] * len(eqn.params["shape"])
    for place, size in zip(eqn.params["broadcast_dimensions"], names.shape, strict=True):
        sizes[place] = size
    return [names.reshape(sizes)]


def _reshape(eqn: JaxprEqn, names: Names) -> list[Names | None]:
    if eqn.params.get("dimensions") is not None:
        return [None]
    return [reshaped(names, shape_of(eqn.invars[0]), shape_of(eqn.outvars[0]))]


def _slice(eqn: JaxprEqn, names: Names) -> list[Names | None]:
    strides = eqn.params["strides"] or (1,) * names.ndim
    bounds = zip(eqn.params["start_indices"], eqn.params["limit_indices"], strides, strict=True)
    return [cut(names, [slice(*bound) for bound in bounds])]


def _split(eqn: JaxprEqn, names: Names) -> list[Names | None]:
    ends = np.cumsum(eqn.params["sizes"])
    return [
        _cut_along(names, eqn.params["axis"], end - n, end) for n, end in zip(eqn.params["sizes"], ends, strict=True)
    ]


def _unstack(eqn: JaxprEqn, names: Names) -> list[Names | None]:
    axis = eqn.params["axis"]
    return [_cut_along(names, axis, i, i + 1).squeeze(axis) for i in range(len(eqn.outvars))]


def _cut_along(names: Names, axis: int, start: int, stop: int) -> Names:
    return cut(names, [slice(start, stop) if d == axis else slice(None) for d in range(names.ndim)])


def _reverse(eqn: JaxprEqn, names: Names) -> list[Names | None]:
    return [np.flip(names, tuple(eqn.params["dimensions"]))]


def _tile(eqn: JaxprEqn, names: Names) -> list[Names | None]:
    repeats = [r if n > 1 else 1 for n, r in zip(names.shape, eqn.params["reps"], strict=True)]
    return [np.tile(names, repeats) if names.size * math.prod(repeats) <= LARGEST else None]


REARRANGING: Mapping[str, Rule] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "unstack": _unstack,
    "rev": _reverse,
    "tile": _tile,
}
"""Primitives whose results hold elements of their first operand at places that the equation states."""


def concatenated(parts: Sequence[Names], sizes: Sequence[int], dimension: int) -> Names | None:
    """The names of values of these sizes put together along a dimension; None if there would be too many."""
    others = np.broadcast_shapes(*(_without(part.shape, dimension) for part in parts))
    if math.prod(others) * sum(sizes) > LARGEST:
        return None
    full = [
        np.broadcast_to(part, (*others[:dimension], size, *others[dimension + 1 :]))
        for part, size in zip(parts, sizes, strict=True)
    ]
    return np.concatenate(full, dimension)


def _without(shape: Sequence[int], dimension: int) -> tuple[int, ...]:
    return tuple(1 if d == dimension else n for d, n in enumerate(shape))
