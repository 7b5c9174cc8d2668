"""Unknown channel scales, and what is known of them: equal, reciprocal to each other, or fixed to one.

Each variable is the logarithm of one positive factor. Arrays of integers name them: `i` is variable i, `-i` its
negative (the reciprocal factor) and 0 is zero (the factor one). Constraints are only ever added, so whatever has once
been made equal stays equal.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Names = NDArray[np.int64]


class Variables:
    """A union-find over `count` variables with signs; of two that are equal the smaller number stands for both."""

    def __init__(self, count: int):
        self._parent: Names = np.arange(count + 1)
        self._reason = np.zeros(count + 1, np.int64)
        """Zero for a free variable; else which of the texts says why it is fixed. Only a root's counts."""
        self._texts = [""]

    def _roots(self, names: Names) -> Names:
        found = names
        while True:
            following = np.sign(found) * self._parent[np.abs(found)]
            if np.array_equal(following, found):
                break
            found = following
        self._parent[np.abs(names)] = np.sign(names) * found
        return found

    def current(self, names: Names) -> Names:
        """The variables that stand for these; 0 for those that are fixed."""
        roots = self._roots(names)
        return np.where(self._reason[np.abs(roots)] > 0, 0, roots)

    def fix(self, names: Names, reason: str) -> None:
        """Makes variables zero. The reason of those that are already stays."""
        roots = np.abs(self._roots(names))
        free = roots[(roots > 0) & (self._reason[roots] == 0)]
        if free.size:
            self._reason[free] = self._number(reason)

    def equate(self, left: Names, right: Names, reason: str) -> None:
        """Makes two broadcastable arrays equal. `reason` is for variables that only zero can satisfy."""
        left, right = (side.ravel() for side in np.broadcast_arrays(left, right))
        while True:
            left, right = self._roots(left), self._roots(right)
            differ = left != right
            left, right = left[differ], right[differ]
            forced = (left == 0) | (right == 0) | (left == -right)
            self.fix(np.concatenate([left[forced], right[forced]]), reason)
            left, right = left[~forced], right[~forced]
            if not left.size:
                return
            self._hook(left, right)

    def _hook(self, left: Names, right: Names) -> None:
        """Puts the larger root of each pair under the smaller one; of several, under the smallest."""
        swapped = np.abs(left) > np.abs(right)
        low, high = np.where(swapped, right, left), np.where(swapped, left, right)
        # Of assignments to one place the last counts.
        order = np.argsort(-np.abs(low), kind="stable")
        low, high = low[order], high[order]
        self._parent[np.abs(high)] = np.sign(high) * low
        open_reason = self._reason[np.abs(low)] == 0
        np.maximum.at(self._reason, np.abs(low[open_reason]), self._reason[np.abs(high[open_reason])])

    def reason(self, names: Names) -> str:
        """Why the first fixed one of these variables is fixed; empty if all are free."""
        numbers = self._reason[np.abs(self._roots(names.ravel()))]
        fixed = numbers[numbers > 0]
        return self._texts[fixed[0]] if fixed.size else ""

    def _number(self, reason: str) -> int:
        if reason not in self._texts:
            self._texts.append(reason)
        return self._texts.index(reason)
