"""Which planned weights are contracted inside a sub-jaxpr, found from views alone."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import JaxprEqn, Literal, Var

from jaxfp4.transform import jaxprs
from jaxfp4.transform.contractions import weight_operand
from jaxfp4.transform.views import View, localize, propagate

Views = Sequence[View | None]


def contracted_in_body(body: jaxprs.Body, views: Views) -> set[int]:
    """The leaves among `views`, those of the body's inputs, that some equation in it contracts."""
    return _walk(body, views)[0]


def contracted_in_equation(eqn: JaxprEqn, views: Views) -> set[int]:
    """The leaves among `views`, those of the operands, that are contracted in a jaxpr inside the equation."""
    return _enter(eqn, views)[0]


def returned_by_call(eqn: JaxprEqn, views: Views) -> bool:
    """Whether the equation is a call that hands on a view of a weight, as `jnp.take` and other jitted functions do."""
    return eqn.primitive.name in jaxprs.CALLS and any(view is not None for view in _enter(eqn, views)[1])


def _walk(body: jaxprs.Body, views: Views) -> tuple[set[int], list[View | None]]:
    """The contracted leaves, and the views of the results."""
    env: dict[Var, View | None] = dict.fromkeys(body.jaxpr.constvars)
    env.update(zip(body.jaxpr.invars, views, strict=True))
    found: set[int] = set()
    for eqn in body.jaxpr.eqns:
        operands = [None if isinstance(atom, Literal) else env[atom] for atom in eqn.invars]
        if all(view is None for view in operands):
            env.update(dict.fromkeys(eqn.outvars))
            continue
        inside, results = _enter(eqn, operands)
        weight = weight_operand(eqn, operands)
        view = None if weight is None else operands[weight]
        found |= inside if view is None else {view.leaf}
        env.update(zip(eqn.outvars, results, strict=True))
    return found, [None if isinstance(atom, Literal) else env[atom] for atom in body.jaxpr.outvars]


def _enter(eqn: JaxprEqn, views: Views) -> tuple[set[int], list[View | None]]:
    """The leaves contracted inside an equation, and the views that its results are."""
    name, params = eqn.primitive.name, eqn.params
    nothing: list[View | None] = [None] * len(eqn.outvars)
    if name in jaxprs.CALLS:
        return _walk(jaxprs.body_of(params[jaxprs.CALLS[name]]), views)
    if name == "cond":
        return set().union(*(contracted_in_body(jaxprs.body_of(b), views[1:]) for b in params["branches"])), nothing
    if name == "while":
        conditions, consts = params["cond_nconsts"], params["body_nconsts"]
        carry = [None] * (len(views) - conditions - consts)
        body = jaxprs.body_of(params["body_jaxpr"])
        return contracted_in_body(body, [*views[conditions : conditions + consts], *carry]), nothing
    if name == "scan":
        parts = jaxprs.scan_parts(eqn)
        xs = [view and view.step_into_scan() for view in views[parts.consts + parts.carry :]]
        body = jaxprs.body_of(params["jaxpr"])
        return contracted_in_body(body, [*views[: parts.consts], *[None] * parts.carry, *xs]), nothing
    if name == "shard_map":
        body = jaxprs.body_of(params["jaxpr"])
        shapes = [jaxprs.shape_of(v) for v in body.jaxpr.invars]
        local = [view and localize(view, shape) for view, shape in zip(views, shapes, strict=True)]
        return contracted_in_body(body, local), nothing
    return set(), propagate(eqn, views, lambda atom: None)
