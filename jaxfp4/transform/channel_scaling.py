"""Values with unknown channel scales, and what must hold of the scales for the values to be combined."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

from jaxfp4.transform import channel_names
from jaxfp4.transform.channel_names import LARGEST, compressed, varies, with_rank
from jaxfp4.transform.channel_variables import Names, Variables


@dataclasses.dataclass(frozen=True)
class Scaling:
    """By what the elements of a value are multiplied: by the product of the factors that each array names."""

    factors: tuple[Names, ...] = ()
    is_zero: bool = False
    """Whether all elements are known to be zero, which any factor leaves alone."""
    is_parameter: bool = False
    """Whether it is computed from parameters alone."""
    obstacle: str = ""
    """Why a value has no factors, as a sentence about it without its subject."""


UNSCALED = Scaling()


def is_scaled(values: Iterable[Scaling]) -> bool:
    """Whether any of these values has factors."""
    return any(value.factors for value in values)


class Constraints:
    """What is known of the variables, in terms of values. Each method only ever adds to it."""

    def __init__(self, variables: Variables):
        self.variables = variables

    def fix(self, values: Iterable[Scaling], reason: str) -> None:
        """Leaves values without factors."""
        for value in values:
            for names in value.factors:
                self.variables.fix(names, reason)

    def obstacle(self, value: Scaling) -> str:
        """Why a value has no factors; empty if it has some, or never had."""
        reasons = (self.variables.reason(names) for names in reversed(value.factors))
        return next(filter(None, reasons), value.obstacle)

    def simplified(self, factors: Iterable[Names]) -> list[Names]:
        """The same product, without factors that are one or cancel, each as small an array as may be."""
        kept: list[Names] = []
        for names in factors:
            names = compressed(self.variables.current(names))
            inverse = next((i for i, other in enumerate(kept) if np.array_equal(other, -names)), None)
            if inverse is not None:
                kept.pop(inverse)
            elif names.any():
                kept.append(names)
        return kept

    def product(self, factors: Iterable[Names]) -> Scaling:
        """The scaling by these factors."""
        return Scaling(tuple(self.simplified(factors)))

    def equal(self, left: Sequence[Names], right: Sequence[Names], reason: str) -> None:
        """Makes two products equal. Of several factors that the other side has not, all but the last are fixed."""
        left, right = self.simplified(left), self.simplified(right)
        for names in tuple(left):
            same = next((i for i, other in enumerate(right) if np.array_equal(names, other)), None)
            if same is not None:
                right.pop(same)
                left = [other for other in left if other is not names]
        if left and right:
            pair = left.pop(), right.pop()
            if math.prod(np.broadcast_shapes(pair[0].shape, pair[1].shape)) <= LARGEST:
                self.variables.equate(*pair, reason)
            else:
                left += pair
        for names in left + right:
            self.variables.fix(names, reason)

    def alike(self, values: Sequence[Scaling], rank: int, reason: str) -> Scaling:
        """The scaling of several values after they have been given the same factors; zeros have any."""
        lists = [[with_rank(names, rank) for names in v.factors] for v in values if not v.is_zero]
        for other in lists[1:]:
            self.equal(lists[0], other, reason)
        return self.product(lists[0]) if lists else Scaling(is_zero=True)

    def common(self, names: Names, dimensions: Sequence[int], reason: str) -> Names:
        """One entry along some dimensions; variables that change there are fixed."""
        names = self.variables.current(names)
        first = channel_names.first_along(names, dimensions)
        changing = (names != first).any(tuple(dimensions), keepdims=True)
        self.variables.fix(names[np.broadcast_to(changing, names.shape)], reason)
        return self.variables.current(first)

    def tied(self, names: Names, dimensions: Iterable[int]) -> Names:
        """One entry along some dimensions, to which all others are made equal: elements are picked there by number."""
        first = channel_names.first_along(names, tuple(dimensions))
        if first.size < names.size:
            self.variables.equate(names, first, "is picked by number along its channels")
        return first

    def joined(self, values: Sequence[Scaling], sizes: Sequence[int], dimension: int, rank: int) -> Scaling | None:
        """The scaling of values of this rank put together along a dimension; None if it has too many names."""
        lists = [self.simplified(v.factors) for v in values]
        nonzero = [names for names, v in zip(lists, values, strict=True) if not v.is_zero]
        moves = any(varies(names, (dimension,)) for value in nonzero for names in value)
        if nonzero and not moves and all(_same(names, nonzero[0]) for names in nonzero):
            return self.product(nonzero[0])
        none = np.zeros((1,) * rank, np.int64)
        factors = []
        for i in range(max(map(len, lists))):
            parts = [names[i] if i < len(names) else none for names in lists]
            together = channel_names.concatenated(parts, sizes, dimension)
            if together is None:
                return None
            factors.append(together)
        return self.product(factors)


def _same(left: Sequence[Names], right: Sequence[Names]) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left, right))
