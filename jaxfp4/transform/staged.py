"""A jaxpr evaluated stage by stage, where some of its inputs change between the stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeGuard

from jax.extend.core import JaxprEqn, Literal, Var

from jaxfp4.transform import jaxprs
from jaxfp4.transform.programs import Program


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage is for."""

    settles: tuple[int, ...]
    """The inputs, by number, that have other values after the stage than before."""

    results: tuple[int, ...]
    """The results, by number, that are wanted with the values before."""


class Staged:
    """A jaxpr, some of whose inputs are data and the others parameters that one stage after the other settles.

    A stage begins at the first equation in which data meet a parameter that it or a later stage settles. What was made
    of data before depends on settled parameters only, so it is carried from stage to stage; what is made of parameters
    alone is made again where it is used. Results that no stage wants are the function's own. An equation in front of
    the cut from which none of them follows, as of a statistic, is evaluated in the stage that wants its result.
    """

    def __init__(self, body: jaxprs.Body, data: Collection[int], stages: Sequence[Stage]):
        """From the numbers of the inputs that are data."""
        invars = body.jaxpr.invars
        self.results: tuple[jaxprs.Atom, ...] = tuple(body.jaxpr.outvars)
        self.stages = tuple(stages)
        self.consts = dict(zip(body.jaxpr.constvars, body.consts, strict=True))
        self.parameters = {v: i for i, v in enumerate(invars) if i not in data}
        """The inputs that are not data, with their numbers."""
        self.data = tuple(v for i, v in enumerate(invars) if i in data)
        self._eqns = _needed(body.jaxpr.eqns, self.results)
        self._programs: dict[tuple[int | None, ...], Program] = {}
        staged = {i for stage in stages for i in stage.results}
        own = [atom for i, atom in enumerate(self.results) if i not in staged]
        self._own = {id(eqn) for eqn in _needed(self._eqns, own)}
        sources = {v: frozenset({i}) for i, v in enumerate(invars) if i not in data}
        first_use, of_data = _meetings(self._eqns, sources, self.data)
        carried: list[tuple[Var, ...]] = []
        cut = len(self._eqns)
        after: tuple[Var, ...] = ()
        for stage in reversed(self.stages):
            cut = min([cut, *(first_use[i] for i in stage.settles if i in first_use)])
            after = self._before(cut, [*(self.results[i] for i in stage.results), *after], of_data)
            carried.append(after)
        self.carried = tuple(reversed(carried))
        """For each stage, the values made of data that it and later ones start from."""

    def _before(self, cut: int, wanted: Sequence[jaxprs.Atom], of_data: Collection[Var]) -> tuple[Var, ...]:
        """The values made of data in front of a cut from which the wanted ones follow."""
        in_front = {id(eqn) for eqn in self._eqns[:cut]} & self._own
        late = [eqn for eqn in _needed(self._eqns, wanted) if id(eqn) not in in_front]
        made = {v for eqn in late for v in eqn.outvars}
        used = dict.fromkeys(atom for atom in (*wanted, *(a for eqn in late for a in eqn.invars)) if _is_variable(atom))
        return tuple(v for v in used if v in of_data and v not in made)

    def advance(self, start: int | None, number: int) -> Program:
        """What computes the values that a stage starts from, from those of another stage or from the data."""
        known = self.data if start is None else self.carried[start]
        return self._program((start, number), self.carried[number], known)

    def observe(self, number: int) -> Program:
        """What computes the results of a stage from the values that it starts from."""
        wanted = [self.results[i] for i in self.stages[number].results]
        return self._program((number,), wanted, self.carried[number])

    def _program(self, key: tuple[int | None, ...], wanted: Sequence[jaxprs.Atom], known: Collection[Var]) -> Program:
        if key not in self._programs:
            self._programs[key] = Program(tuple(_needed(self._eqns, wanted, known)), tuple(wanted))
        return self._programs[key]


def _is_variable(atom: jaxprs.Atom) -> TypeGuard[Var]:
    return not isinstance(atom, Literal)


def _needed(eqns: Sequence[JaxprEqn], wanted: Iterable[jaxprs.Atom], known: Collection[Var] = ()) -> list[JaxprEqn]:
    """The equations from which the wanted values follow, in order."""
    missing = {atom for atom in wanted if _is_variable(atom) and atom not in known}
    found = []
    for eqn in reversed(eqns):
        if any(v in missing for v in eqn.outvars):
            found.append(eqn)
            missing.update(atom for atom in eqn.invars if _is_variable(atom) and atom not in known)
    return found[::-1]


def _meetings(
    eqns: Sequence[JaxprEqn], sources: Mapping[Var, frozenset[int]], data: Iterable[Var]
) -> tuple[dict[int, int], set[Var]]:
    """The first equation in which data meet each parameter, by their numbers, and all that is made of data.

    `sources` are the parameters by variable.
    """
    first_use: dict[int, int] = {}
    made_of, of_data = dict(sources), set(data)
    for number, eqn in enumerate(eqns):
        operands = [atom for atom in eqn.invars if _is_variable(atom)]
        used = frozenset().union(*(made_of.get(v, frozenset()) for v in operands))
        if any(v in of_data for v in operands):
            of_data.update(eqn.outvars)
            for i in used:
                first_use.setdefault(i, number)
        else:
            made_of.update(dict.fromkeys(eqn.outvars, used))
    return first_use, of_data
