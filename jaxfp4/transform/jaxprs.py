"""What differs between JAX versions in the jaxprs that the walk reads; everything else here is version-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import Array
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

Atom = Var | Literal

EqnPath = tuple[int, ...]
"""Where an equation is: its number in its jaxpr, behind the numbers of the equations around it."""

MARK = "name"
"""The primitive of `jax.ad_checkpoint.checkpoint_name`."""


def shape_of(atom: Atom) -> tuple[int, ...]:
    """The shape of an operand; tokens and the like have none."""
    aval = atom.aval
    return aval.shape if isinstance(aval, jax.core.ShapedArray) else ()


@dataclasses.dataclass(frozen=True)
class Body:
    """A sub-jaxpr with its constants."""

    jaxpr: Jaxpr
    consts: Sequence[Array]


def body_of(jaxpr: ClosedJaxpr | Jaxpr) -> Body:
    """A sub-jaxpr parameter, closed in older versions of JAX, as one type."""
    if isinstance(jaxpr, ClosedJaxpr):
        return Body(jaxpr.jaxpr, jaxpr.consts)
    return Body(jaxpr, ())


@dataclasses.dataclass(frozen=True)
class ScanParts:
    """How many operands of a scan are constants, carried and scanned over."""

    consts: int
    carry: int
    xs: int


def scan_parts(eqn: JaxprEqn) -> ScanParts:
    """The operand counts of a scan; JAX 0.11 moved them into a tree of the inputs."""
    if "num_consts" in eqn.params:
        consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
        return ScanParts(consts, carry, len(eqn.invars) - consts - carry)
    return ScanParts(*(len(part) for part in eqn.params["ft_in"].unpack()))


CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}
"""Primitives that call one sub-jaxpr with their operands as they are, and the parameter that holds it."""

REMAT = ("remat2", "checkpoint")

PASS_THROUGH = frozenset(
    {
        "convert_element_type",
        "copy",
        "copy_p",
        "name",
        "optimization_barrier",
        "pcast",
        "pvary",
        "reduce_precision",
        "reshard",
        "mesh_cast",
        "sharding_constraint",
        "stop_gradient",
    }
)
"""Primitives whose n-th result is their n-th operand with the same shape and, up to rounding, the same values."""

RESHAPING = frozenset({"broadcast_in_dim", "expand_dims", "reshape", "squeeze", "transpose"})
"""Primitives with one result that holds the same values as their first operand in another shape."""

ORDERING = frozenset({"approx_top_k", "argmax", "argmin", "sort", "top_k"})
"""Primitives that choose by comparing values, as a router does."""


def run(
    eqns: Sequence[JaxprEqn],
    inputs: Mapping[Var, Any],
    results: Sequence[Atom],
    rule: Callable[[JaxprEqn, list[Any]], Sequence[Any]],
) -> list[Any]:
    """The values of `results`: from those of variables, by what `rule` makes of each equation and its operands."""
    env = dict(inputs)

    def read(atom: Atom) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    for eqn in eqns:
        env.update(zip(eqn.outvars, rule(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in results]


def run_body(body: Body, inputs: Sequence[Any], rule: Callable[[JaxprEqn, list[Any]], Sequence[Any]]) -> list[Any]:
    """The same of a sub-jaxpr and the values of its inputs."""
    constants = zip(body.jaxpr.constvars, body.consts, strict=True)
    values = {**dict(constants), **dict(zip(body.jaxpr.invars, inputs, strict=True))}
    return run(body.jaxpr.eqns, values, body.jaxpr.outvars, rule)


def bind(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation, evaluated as it is."""
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]
