"""Which output axes of which weights the dimensions of an activation come from.

An expert weight that meets every token, `einsum("td,edf->etf")`, shows its expert axis only later, where the result is
batched with another stack of experts. Labels carry that axis there.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import JaxprEqn

from jaxfp4.transform import jaxprs
from jaxfp4.transform.contractions import Contraction
from jaxfp4.transform.views import View

Label = frozenset[tuple[int, int]]
"""Pairs of a leaf and one of its axes."""

Labels = tuple[Label, ...]
"""One for each dimension; empty where nothing is known."""

NONE: Label = frozenset()


def propagate_labels(eqn: JaxprEqn, operands: Sequence[Labels]) -> Labels:
    """The labels of an equation's first result, for equations that are no contraction."""
    name, shape = eqn.primitive.name, jaxprs.shape_of(eqn.outvars[0])
    if name == "transpose":
        return tuple(operands[0][i] for i in eqn.params["permutation"])
    if name == "squeeze":
        return tuple(label for d, label in enumerate(operands[0]) if d not in eqn.params["dimensions"])
    if name == "broadcast_in_dim":
        placed = dict(zip(eqn.params["broadcast_dimensions"], operands[0], strict=True))
        return tuple(placed.get(d, NONE) for d in range(len(shape)))
    if name == "reshape":
        return _reshaped(jaxprs.shape_of(eqn.invars[0]), shape, operands[0])
    if any(jaxprs.shape_of(v) not in (shape, ()) for v in eqn.invars):
        return (NONE,) * len(shape)
    full = [labels for labels in operands if len(labels) == len(shape)]
    return tuple(frozenset().union(*(labels[d] for labels in full)) for d in range(len(shape)))


def _reshaped(before: Sequence[int], after: Sequence[int], labels: Labels) -> Labels:
    """Leading and trailing dimensions that a reshape leaves alone keep their labels."""
    result = [NONE] * len(after)
    for step in (1, -1):
        places = zip(list(enumerate(before))[::step], list(enumerate(after))[::step], strict=False)
        for (i, old), (j, new) in places:
            if old != new:
                break
            result[j] = labels[i]
    return tuple(result)


def site_labels(contraction: Contraction, view: View, activation: Labels, rank: int) -> Labels:
    """The labels of a weight's contraction: batch dimensions, then the free ones of the left and the right operand."""
    used = {a for _, a in (*contraction.contracted, *contraction.batched)}
    free_activation = [label for d, label in enumerate(activation) if d not in used]
    inner = {*contraction.weight_contracted, *contraction.weight_stacked}
    free_weight = [
        frozenset((view.leaf, f.axis) for f in dimension) if len(dimension) == 1 else NONE
        for d, dimension in enumerate(view.dimensions)
        if d not in inner
    ]
    batch = [activation[a] for _, a in contraction.batched]
    sides = [free_weight, free_activation] if contraction.weight == 0 else [free_activation, free_weight]
    labels = (*batch, *sides[0], *sides[1])
    return labels if len(labels) == rank else (NONE,) * rank
