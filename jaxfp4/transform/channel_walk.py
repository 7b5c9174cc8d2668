"""The abstract walk that finds by which factors parameters may be rescaled without changing what a model computes.

Every parameter starts with an unknown positive factor for each of its channels. The walk carries these factors through
the jaxpr, as names of variables for the elements of each value, and notes what must hold: the terms of a sum have equal
factors, those along a contraction cancel, and what goes into an operation that does not commute with positive factors
has none. Any factors that satisfy all of it leave the model's outputs as they were, up to rounding. It asks for more
than is needed where that is simpler: an operation without a rule fixes everything that goes into it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from jaxfp4.transform import jaxprs
from jaxfp4.transform.channel_names import REARRANGING, compressed, varies
from jaxfp4.transform.channel_rules import RULES
from jaxfp4.transform.channel_scaling import UNSCALED, Constraints, Scaling, is_scaled
from jaxfp4.transform.channel_variables import Variables

MOST_STEPS = 512
"""A longer scan, whose steps have factors of their own, is not followed."""

_CARRIED = "is carried through a loop"


def constrain(body: jaxprs.Body, parameters: Sequence[Scaling], variables: Variables) -> None:
    """Constrains `variables` until they leave the results of a jaxpr unchanged, whose first inputs are `parameters`."""
    walk = _Walk(Constraints(variables))
    data = [UNSCALED] * (len(body.jaxpr.invars) - len(parameters))
    walk.known.fix(walk.run(body, [*parameters, *data]), "is an output of the model")


class _Walk:
    """Evaluates jaxprs on scalings."""

    def __init__(self, known: Constraints):
        self.known = known

    def run(self, body: jaxprs.Body, inputs: Sequence[Scaling]) -> list[Scaling]:
        """The scalings of a jaxpr's results."""
        env: dict[Var, Scaling] = dict.fromkeys(body.jaxpr.constvars, UNSCALED)
        env.update(zip(body.jaxpr.invars, inputs, strict=True))
        for eqn in body.jaxpr.eqns:
            results = self.equation(eqn, [_read(env, atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, results, strict=True))
        return [_read(env, atom) for atom in body.jaxpr.outvars]

    def equation(self, eqn: JaxprEqn, operands: list[Scaling]) -> list[Scaling]:
        """The scalings of an equation's results."""
        name = eqn.primitive.name
        if name in jaxprs.CALLS:
            return self.run(jaxprs.body_of(eqn.params[jaxprs.CALLS[name]]), operands)
        results: list[Scaling] | None
        if not is_scaled(operands):
            results = _zeros(eqn, operands)
        elif name in self._structured:
            results = self._structured[name](self, eqn, operands)
        else:
            results = RULES[name](self.known, eqn, operands) if name in RULES else None
        if results is None:
            self.known.fix(operands, f"goes into {name!r}")
            results = [UNSCALED] * len(eqn.outvars)
        obstacle = self.obstacle(eqn, operands)
        from_parameters = any(o.is_parameter for o in operands) and all(
            o.is_parameter or isinstance(atom, Literal) for atom, o in zip(eqn.invars, operands, strict=True)
        )
        return [
            dataclasses.replace(r, is_parameter=from_parameters, obstacle="" if r.factors else r.obstacle or obstacle)
            for r in results
        ]

    def obstacle(self, eqn: JaxprEqn, operands: Sequence[Scaling]) -> str:
        """Why a result has no factors: the reason of a parameter, or of the largest operand, which has its channels."""
        sizes = [math.prod(jaxprs.shape_of(atom)) for atom in eqn.invars]
        largest = [o for o, n in zip(operands, sizes, strict=True) if n == max(sizes)]
        candidates = [o for o in operands if o.is_parameter] + largest + [o for o in operands if o.factors]
        return next(filter(None, map(self.known.obstacle, candidates)), "")

    # Equations with jaxprs inside.

    def scan(self, eqn: JaxprEqn, operands: list[Scaling]) -> list[Scaling] | None:
        """Step by step where steps have factors of their own, else one for all. What is carried has none."""
        parts = jaxprs.scan_parts(eqn)
        consts, carry = operands[: parts.consts], operands[parts.consts : parts.consts + parts.carry]
        xs = [
            dataclasses.replace(o, factors=tuple(map(compressed, o.factors)))
            for o in operands[parts.consts + parts.carry :]
        ]
        differ = any(varies(names, (0,)) for o in xs for names in o.factors)
        if differ and eqn.params["length"] > MOST_STEPS:
            return None
        carried = [self.carried(o) for o in carry]
        steps = []
        for step in range(eqn.params["length"] if differ else 1):
            inputs = [*consts, *carried, *(_entry(o, step) for o in xs)]
            results = self.run(jaxprs.body_of(eqn.params["jaxpr"]), inputs)
            self.known.fix(results[: parts.carry], _CARRIED)
            steps.append(results[parts.carry :])
        stacked = zip(zip(*steps, strict=True), eqn.outvars[parts.carry :], strict=True)
        return carried + [self.stacked(values, len(jaxprs.shape_of(v))) for values, v in stacked]

    def carried(self, value: Scaling) -> Scaling:
        """The value in a loop, and behind it."""
        self.known.fix([value], _CARRIED)
        return Scaling(obstacle=_CARRIED)

    def stacked(self, values: Sequence[Scaling], rank: int) -> Scaling:
        """The results of a scan's steps in one array of this rank; a single one is that of all steps."""
        values = [dataclasses.replace(v, factors=tuple(names[None] for names in v.factors)) for v in values]
        joined = self.known.joined(values, [1] * len(values), 0, rank)
        if joined is None:
            self.known.fix(values, "is collected by a loop")
        return joined or UNSCALED

    def while_loop(self, eqn: JaxprEqn, operands: list[Scaling]) -> list[Scaling]:
        """The body, once for all steps; neither what is carried nor what the condition sees has factors."""
        conditions, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        self.known.fix(operands[:conditions], "decides when a loop ends")
        carried = [self.carried(o) for o in operands[conditions + consts :]]
        inputs = [*operands[conditions : conditions + consts], *carried]
        self.known.fix(self.run(jaxprs.body_of(eqn.params["body_jaxpr"]), inputs), _CARRIED)
        return carried

    def cond(self, eqn: JaxprEqn, operands: list[Scaling]) -> list[Scaling] | None:
        """All branches, whose results must have the same factors."""
        if operands[0].factors:
            return None
        branches = [self.run(jaxprs.body_of(branch), operands[1:]) for branch in eqn.params["branches"]]
        results = zip(zip(*branches, strict=True), eqn.outvars, strict=True)
        return [self.known.alike(r, len(jaxprs.shape_of(v)), "is chosen by a condition") for r, v in results]

    _structured: Mapping[str, Callable[[_Walk, JaxprEqn, list[Scaling]], list[Scaling] | None]] = {
        "scan": scan,
        "while": while_loop,
        "cond": cond,
    }


def _read(env: Mapping[Var, Scaling], atom: jaxprs.Atom) -> Scaling:
    if isinstance(atom, Literal):
        return Scaling(is_zero=bool(np.all(np.asarray(atom.val) == 0)))
    # A value without elements asks for nothing.
    return UNSCALED if 0 in jaxprs.shape_of(atom) else env[atom]


def _zeros(eqn: JaxprEqn, operands: Sequence[Scaling]) -> list[Scaling]:
    """Results of an equation whose operands have no factors, known to be zero where the equation copies zeros."""
    name = eqn.primitive.name
    if name in jaxprs.PASS_THROUGH:
        return list(operands)
    is_zero = name in REARRANGING and operands[0].is_zero
    return [Scaling(is_zero=is_zero)] * len(eqn.outvars)


def _entry(value: Scaling, step: int) -> Scaling:
    """One entry along the leading dimension."""
    factors = (names[min(step, len(names) - 1)] for names in value.factors)
    return dataclasses.replace(value, factors=tuple(factors))
