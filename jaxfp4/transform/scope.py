"""Evaluating the equations of a jaxpr in order, with hooks at contractions of planned weights and at marked values."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import Array
from jax.extend.core import JaxprEqn, Literal

from jaxfp4.transform import jaxprs
from jaxfp4.transform.contractions import contraction_with, weight_operand
from jaxfp4.transform.jaxprs import EqnPath
from jaxfp4.transform.marks import Mark, observe_mark
from jaxfp4.transform.reach import contracted_in_equation, returned_by_call
from jaxfp4.transform.sites import Meeting, Tracked
from jaxfp4.transform.statistics import State, Statistic
from jaxfp4.transform.views import axis_roles, propagate

Value = Array | Tracked
Observations = dict[int, State]


def original_activation(meeting: Meeting) -> Array:
    """The activation as the model computed it."""
    return meeting.activation


def original_value(mark: Mark, weight: Tracked, value: Array) -> Array:
    """The marked value as the model computed it."""
    return value


def original_product(meeting: Meeting, activation: Array, eqn: JaxprEqn) -> Array | None:
    """None: the product as the model computed it."""
    return None


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What to do where a planned weight meets an activation, and where a value that it makes is marked."""

    replace_activation: Callable[[Meeting], Array] = original_activation
    """The activation to contract with in place of the original."""

    multiply: Callable[[Meeting, Array, JaxprEqn], Array | None] = original_product
    """The result of the contraction with the activation that the hook before has put in; None to contract arrays."""

    statistics: Mapping[int, Statistic] = dataclasses.field(default_factory=dict)
    """By leaf, what to observe of the original activations that the weight meets."""

    marks: Mapping[EqnPath, Mark] = dataclasses.field(default_factory=dict)
    """The marked values."""

    replace_marked: Callable[[Mark, Tracked, Array], Array] = original_value
    """The value to go on with in place of a marked one."""

    @functools.cached_property
    def around_marks(self) -> frozenset[EqnPath]:
        """The equations with marked values inside."""
        return frozenset(path[:n] for path in self.marks for n in range(1, len(path)))


class Scope:
    """One level of nesting. Its environment lives in `inline`; `observations` gathers what its contractions saw."""

    def __init__(self, hooks: Hooks, rebuilders: Mapping[str, Rebuild], path: EqnPath = ()):
        self.hooks = hooks
        self.observations: Observations = {}
        self._rebuilders = rebuilders
        self._path = path
        self._contracted: dict[EqnPath, Tracked] = {}
        self._dequantized: dict[int, tuple[Any, Array]] = {}

    def inner(
        self, body: jaxprs.Body, inputs: Sequence[Value], branch: EqnPath = (), *, same_values: bool = False
    ) -> tuple[list[Array], Observations]:
        """The results and observations of a body in a new scope.

        `branch` tells it apart from other bodies of the same equation. With `same_values` it is evaluated once on the
        values of this scope, whose weights it knows.
        """
        scope = Scope(self.hooks, self._rebuilders, (*self._path, *branch))
        scope._contracted.update(self._contracted if same_values else {})
        results = scope.inline(body, inputs)
        return [as_array(value) for value in results], scope.observations

    def inline(self, body: jaxprs.Body, inputs: Sequence[Value]) -> list[Value]:
        """Evaluates the equations in order in this scope; results may be tracked weights."""
        around, numbers = self._path, itertools.count()

        def numbered(eqn: JaxprEqn, operands: list[Value]) -> Sequence[Value]:
            self._path = (*around, next(numbers))
            return self.equation(eqn, operands)

        results = jaxprs.run_body(body, inputs, numbered)
        self._path = around
        return results

    def equation(self, eqn: JaxprEqn, operands: list[Value]) -> Sequence[Value]:
        """The results of one equation; bound as it is unless it concerns a planned weight or a marked value."""
        views = [v.view if isinstance(v, Tracked) else None for v in operands]
        if self._path in self.hooks.marks:
            return self.marked(eqn, self.array(operands[0]))
        marks_inside = self._path in self.hooks.around_marks
        if all(view is None for view in views) and not marks_inside:
            return jaxprs.bind(eqn, operands)
        name = eqn.primitive.name
        returned = returned_by_call(eqn, views)
        if returned or marks_inside or contracted_in_equation(eqn, views):
            if name in self._rebuilders and not returned:
                return self._rebuilders[name](self, eqn, operands)
            return self.inline(jaxprs.body_of(eqn.params[jaxprs.CALLS[name]]), operands)
        weight = weight_operand(eqn, views)
        if weight is not None:
            return self.contraction(eqn, operands, weight)
        return self.ordinary(eqn, operands)

    def ordinary(self, eqn: JaxprEqn, operands: list[Value]) -> Sequence[Value]:
        """Binds the equation; results that are views of a weight stay tracked."""
        arrays = [self.array(v) for v in operands]

        def resolve(atom: jaxprs.Atom) -> Any:
            return atom.val if isinstance(atom, Literal) else arrays[list(eqn.invars).index(atom)]

        tracked = {v.view.leaf: v for v in operands if isinstance(v, Tracked)}
        views = propagate(eqn, [v.view if isinstance(v, Tracked) else None for v in operands], resolve)
        return [
            result if view is None else dataclasses.replace(tracked[view.leaf], value=result, view=view)
            for result, view in zip(jaxprs.bind(eqn, arrays), views, strict=True)
        ]

    def contraction(self, eqn: JaxprEqn, operands: list[Value], weight: int) -> list[Array]:
        """A contraction of a tracked weight, hooks applied if it is one that can be quantized."""
        tracked, contraction = operands[weight], contraction_with(eqn, weight)
        others = {i: self.array(v) for i, v in enumerate(operands) if i != weight}
        if isinstance(tracked, Tracked) and not isinstance(contraction, str):
            roles = axis_roles(tracked.view, contraction.weight_contracted, contraction.weight_stacked, ())
            if not isinstance(roles, str):
                groups = others.get(2)
                meeting = Meeting(tracked, contraction, others[1 - weight], groups)
                self._contracted[self._path] = tracked
                if meeting.leaf in self.hooks.statistics:
                    self.absorb({meeting.leaf: meeting.observe(self.hooks.statistics[meeting.leaf])})
                others[1 - weight] = self.hooks.replace_activation(meeting)
                product = self.hooks.multiply(meeting, others[1 - weight], eqn)
                if product is not None:
                    return [product]
        others[weight] = self.array(tracked)
        return jaxprs.bind(eqn, [others[i] for i in range(len(operands))])

    def marked(self, eqn: JaxprEqn, value: Array) -> list[Array]:
        """A marked value, observed and replaced."""
        mark = self.hooks.marks[self._path]
        weight = self._contracted.get(mark.site)
        if weight is None:
            raise ValueError(
                f"the value marked {eqn.params['name']!r} is made in another loop, branch or shard_map than it is "
                "marked in: wanted checkpoint_name beside the product with the weight; move it there"
            )
        if mark.leaf in self.hooks.statistics:
            self.absorb({mark.leaf: observe_mark(self.hooks.statistics[mark.leaf], mark, weight, value)})
        return jaxprs.bind(eqn, [self.hooks.replace_marked(mark, weight, value)])

    def array(self, value: Value) -> Array:
        """The value as an array. A quantized weight is dequantized once in a scope, however often it is sliced."""
        if not isinstance(value, Tracked):
            return value
        key = id(value.value)
        if key not in self._dequantized:
            # Keeping the weight beside its values keeps its id from being given to another.
            self._dequantized[key] = (value.value, value.array())
        return self._dequantized[key][1]

    def absorb(self, observations: Observations) -> None:
        """Merges observations into this scope's."""
        for leaf, observed in observations.items():
            before = self.observations.get(leaf)
            if before is not None:
                observed = self.hooks.statistics[leaf].merge(before, observed)
            self.observations[leaf] = observed


Rebuild = Callable[[Scope, JaxprEqn, list[Value]], Sequence[Value]]


def as_array(value: Value) -> Array:
    """The value itself; a tracked weight is dequantized if it must be."""
    return value.array() if isinstance(value, Tracked) else value
