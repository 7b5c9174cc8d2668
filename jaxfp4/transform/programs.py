"""Parts of a jaxpr that are compiled once for all parts of the same form, as the layers of a model are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from jaxfp4.transform import jaxprs

_DERIVATIVES = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
"""Calls with functions for derivatives, made anew by each trace, that evaluating does not call."""


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Equations in order, the values that they start from and those that are wanted of them.

    Programs are equal if they differ in the names of variables only, so that one is computed by what was compiled for
    the other. Functions and constants inside equations are compared by identity.
    """

    eqns: tuple[JaxprEqn, ...]
    results: tuple[jaxprs.Atom, ...]

    @functools.cached_property
    def inputs(self) -> tuple[Var, ...]:
        """The variables that no equation makes, in the order of their first use."""
        made = {v for eqn in self.eqns for v in eqn.outvars}
        used = (*(a for eqn in self.eqns for a in eqn.invars), *self.results)
        return tuple(dict.fromkeys(a for a in used if not isinstance(a, Literal) and a not in made))

    def __call__(self, values: Sequence[Any]) -> list[Any]:
        """The results, from the values of the inputs."""
        return jaxprs.run(self.eqns, dict(zip(self.inputs, values, strict=True)), self.results, jaxprs.bind)

    @functools.cached_property
    def form(self) -> Hashable:
        """What tells programs apart; equations are kept, so that identities stay."""
        return _form(self.inputs, self.eqns, self.results)

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.form)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Program):
            return NotImplemented
        return self is other or (self._hash == other._hash and self.form == other.form)


def _form(inputs: Sequence[Var], eqns: Sequence[JaxprEqn], results: Sequence[jaxprs.Atom]) -> Hashable:
    numbers: dict[Var, int] = {v: i for i, v in enumerate(inputs)}
    steps: list[Hashable] = [tuple(v.aval for v in inputs)]
    for eqn in eqns:
        operands = tuple(_operand(atom, numbers) for atom in eqn.invars)
        numbers.update((v, len(numbers) + i) for i, v in enumerate(eqn.outvars))
        steps.append((eqn.primitive, _parameters(eqn), operands, tuple(v.aval for v in eqn.outvars)))
    return (*steps, tuple(_operand(atom, numbers) for atom in results))


def _operand(atom: jaxprs.Atom, numbers: Mapping[Var, int]) -> Hashable:
    return (atom.aval, _parameter(atom.val)) if isinstance(atom, Literal) else numbers[atom]


def _parameters(eqn: JaxprEqn) -> Hashable:
    name = eqn.primitive.name
    names = [jaxprs.CALLS[name]] if name in _DERIVATIVES else sorted(eqn.params)
    return tuple((n, _parameter(eqn.params[n])) for n in names)


def _parameter(value: Any) -> Hashable:
    if isinstance(value, (ClosedJaxpr, Jaxpr)):
        body = jaxprs.body_of(value)
        inner = body.jaxpr
        return tuple(map(id, body.consts)), _form((*inner.constvars, *inner.invars), inner.eqns, inner.outvars)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_parameter, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype, value.shape, value.tobytes()
    # Equal numbers may differ: 0.0 and -0.0, 1 and True.
    if isinstance(value, (bool, int, float, complex)):
        return type(value), repr(value)
    return value if isinstance(value, Hashable) and _has_hash(value) else id(value)


def _has_hash(value: Hashable) -> bool:
    """Whether a value that says it can be hashed, such as a tuple of lists, really can."""
    try:
        hash(value)
    except TypeError:
        return False
    return True
