"""The abstract walk: where parameters meet activations, along which axes, and what feeds and follows each contraction.

Every value of the jaxpr gets an `Origin`, computed from those of an equation's operands. Facts about other contractions
are sets of their numbers, kept as bits of an integer.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

from jaxfp4.transform import jaxprs
from jaxfp4.transform.contractions import CONTRACTIONS, contraction_with, weight_operand
from jaxfp4.transform.labels import NONE, Labels, propagate_labels, site_labels
from jaxfp4.transform.views import AxisRoles, Resolve, View, axis_roles, localize, propagate, whole


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    `root` is equal for values that differ only by casts and reshapes. `sites` are the weight contractions upstream,
    `direct` those with no other in between; `scores` the activation-activation contractions since then, `attended`
    those of them that an exponential followed, `context` whether such scores were contracted with another activation.
    """

    root: int
    view: View | None = None
    from_inputs: bool = False
    parameters: int = 0
    via: str = ""
    sites: int = 0
    direct: int = 0
    scores: int = 0
    attended: int = 0
    context: bool = False
    loops: int = 0
    is_comparison: bool = False
    labels: Labels = ()


@dataclasses.dataclass(frozen=True)
class Site:
    """One contraction of a parameter with an activation."""

    number: int
    leaf: int
    roles: AxisRoles
    activation: Origin
    view: View
    path: jaxprs.EqnPath = ()


@dataclasses.dataclass
class Findings:
    """What the walk has collected so far."""

    sites: list[Site] = dataclasses.field(default_factory=list)
    obstacles: dict[int, str] = dataclasses.field(default_factory=dict)
    """Why a parameter cannot be quantized, by leaf number."""
    last_seen: dict[int, str] = dataclasses.field(default_factory=dict)
    """The operation in which a parameter was last seen as itself, by leaf number."""
    tables: dict[int, int] = dataclasses.field(default_factory=dict)
    """Parameters whose rows are looked up by index, and how many rows they have."""
    ordered: int = 0
    """Sites whose result decides an order or a choice."""
    feeds: dict[int, int] = dataclasses.field(default_factory=dict)
    """For each activation-activation contraction, the sites that feed it."""
    attention: int = 0
    """Activation-activation contractions that are attention scores or their product with the values."""
    loops_of_axis: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    """The scan that runs over an axis of a parameter, by leaf and axis."""
    batched_outputs: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    """Output axes, by leaf and axis, along which a later contraction has separate weights."""
    outputs: int = 0
    """Sites whose result reaches the model's outputs with no other site in between."""
    marks: dict[jaxprs.EqnPath, tuple[str, int]] = dataclasses.field(default_factory=dict)
    """By equation, the name of a marked value and the sites that it comes from with no other in between."""


Env = dict[Var, Origin]


def analyze(body: jaxprs.Body, shapes: Sequence[tuple[int, ...]]) -> Findings:
    """Walks a jaxpr whose first `len(shapes)` inputs are parameters of these shapes and whose others are data."""
    walk = _Walk(list(shapes))
    origins = [walk.fresh(view=whole(leaf, shape)) for leaf, shape in enumerate(shapes)]
    origins += [walk.fresh(from_inputs=True) for _ in body.jaxpr.invars[len(shapes) :]]
    results = walk.run(body, origins)
    walk.findings.outputs = functools.reduce(operator.or_, (o.direct for o in results), 0)
    return walk.findings


class _Walk:
    """Evaluates jaxprs on origins. Mutable only through `findings` and two counters."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        self.shapes = shapes
        self.findings = Findings()
        self._roots = 0
        self._products = 0
        self._loops = 0
        self._path: jaxprs.EqnPath = ()

    def fresh(self, **facts: object) -> Origin:
        """An origin with a root of its own."""
        self._roots += 1
        return dataclasses.replace(Origin(self._roots), **facts)  # type: ignore[arg-type]

    def run(self, body: jaxprs.Body, inputs: Sequence[Origin], branch: jaxprs.EqnPath = ()) -> list[Origin]:
        """The origins of a jaxpr's results; `branch` tells it apart from others of the same equation."""
        around = self._path
        env: Env = {v: self.fresh() for v in body.jaxpr.constvars}
        env.update(zip(body.jaxpr.invars, inputs, strict=True))
        for number, eqn in enumerate(body.jaxpr.eqns):
            self._path = (*around, *branch, number)
            operands = [_labelled(self.read(env, atom), atom) for atom in eqn.invars]
            results = self.equation(eqn, operands)
            env.update(zip(eqn.outvars, results, strict=True))
        self._path = around
        return [self.read(env, atom) for atom in body.jaxpr.outvars]

    def read(self, env: Env, atom: jaxprs.Atom) -> Origin:
        """The origin of an operand; a literal has a new one."""
        return self.fresh() if isinstance(atom, Literal) else env[atom]

    def equation(self, eqn: JaxprEqn, operands: list[Origin]) -> list[Origin]:
        """The origins of an equation's results."""
        name = eqn.primitive.name
        if name in jaxprs.CALLS:
            return self.run(jaxprs.body_of(eqn.params[jaxprs.CALLS[name]]), operands)
        structured = self._structured.get(name)
        if structured is not None:
            return structured(self, eqn, operands)
        if name in CONTRACTIONS:
            return [self.contraction(eqn, operands)]
        return self.ordinary(eqn, operands)

    def ordinary(self, eqn: JaxprEqn, operands: list[Origin]) -> list[Origin]:
        """Results of an equation without a jaxpr inside that the walk enters."""
        name = eqn.primitive.name
        if name == jaxprs.MARK:
            self.findings.marks[self._path] = eqn.params["name"], operands[0].direct
        if name in jaxprs.PASS_THROUGH:
            return operands
        views = propagate(eqn, [o.view for o in operands], _index_resolver(eqn, operands))
        if name in jaxprs.ORDERING:
            self.findings.ordered |= _union(o.direct for o in operands)
        if name == "gather":
            self._note_table(eqn, operands)
        if all(view is None for view in views):
            operands = [self.lost(o, name) for o in operands]
        merged = self.merge(operands)
        if name in jaxprs.RESHAPING:
            merged = dataclasses.replace(merged, root=operands[0].root, is_comparison=operands[0].is_comparison)
        if name in ("exp", "exp2"):
            merged = dataclasses.replace(merged, attended=merged.attended | merged.scores)
        if name == "eq":
            merged = dataclasses.replace(merged, is_comparison=True)
        merged = dataclasses.replace(merged, labels=propagate_labels(eqn, [o.labels for o in operands]))
        results = [dataclasses.replace(merged, view=view) for view in views]
        return results if name in jaxprs.RESHAPING else [self.rerooted(r) for r in results]

    def rerooted(self, origin: Origin) -> Origin:
        """The same facts under a root of their own."""
        self._roots += 1
        return dataclasses.replace(origin, root=self._roots)

    def merge(self, origins: Iterable[Origin]) -> Origin:
        """The facts of a value computed from several."""
        origins = list(origins)
        return self.fresh(
            from_inputs=any(o.from_inputs for o in origins),
            parameters=_union(o.parameters for o in origins),
            via=next((o.via for o in origins if o.via), ""),
            sites=_union(o.sites for o in origins),
            direct=_union(o.direct for o in origins),
            scores=_union(o.scores for o in origins),
            attended=_union(o.attended for o in origins),
            context=any(o.context for o in origins),
            loops=_union(o.loops for o in origins),
        )

    def lost(self, origin: Origin, name: str) -> Origin:
        """The origin once an operation that is no view has been applied to a parameter."""
        if origin.view is None:
            return origin
        self.findings.last_seen[origin.view.leaf] = name
        return dataclasses.replace(origin, view=None, parameters=origin.parameters | 1 << origin.view.leaf, via=name)

    def _note_table(self, eqn: JaxprEqn, operands: list[Origin]) -> None:
        view = operands[0].view
        numbers = eqn.params["dimension_numbers"]
        if view is None or not operands[1].from_inputs or operands[1].sites:
            return
        for d in numbers.collapsed_slice_dims:
            if len(view.dimensions[d]) == 1:
                self.findings.tables[view.leaf] = self.shapes[view.leaf][view.dimensions[d][0].axis]

    # Contractions.

    def contraction(self, eqn: JaxprEqn, operands: list[Origin]) -> Origin:
        """The result of a contraction: a new site if one operand is a parameter and the other an activation."""
        views = [o.view for o in operands]
        weight = weight_operand(eqn, views)
        view = None if weight is None else views[weight]
        if weight is not None and view is not None and operands[1 - weight].from_inputs:
            return self.site(eqn, view, operands[1 - weight], weight)
        for view in views[:2]:
            if view is not None:
                self.obstruct([view.leaf], "it is contracted with another parameter or a constant")
        operands = [self.lost(o, eqn.primitive.name) for o in operands]
        merged = self.merge(operands)
        left, right = operands[:2]
        for derived, other in ((left, right), (right, left)):
            if derived.parameters and not derived.from_inputs and other.from_inputs:
                self.obstruct(_bits(derived.parameters), f"it reaches its contraction through {derived.via!r}")
        if not (left.from_inputs and right.from_inputs):
            return merged
        self._products += 1
        product = 1 << self._products
        self.findings.feeds[product] = left.direct | right.direct
        context = bool(left.attended or right.attended)
        if context:
            self.findings.attention |= product | left.attended | right.attended
        return dataclasses.replace(merged, scores=merged.scores | product, context=merged.context or context)

    def site(self, eqn: JaxprEqn, view: View, activation: Origin, weight: int) -> Origin:
        """The result of a parameter's contraction with an activation."""
        activation = self.lost(activation, "gather")
        contraction = contraction_with(eqn, weight)
        if isinstance(contraction, str):
            self.obstruct([view.leaf], contraction)
            return self.merge([activation])
        shape = self.shapes[view.leaf]
        roles = axis_roles(view, contraction.weight_contracted, contraction.weight_stacked, shape)
        if isinstance(roles, str):
            self.obstruct([view.leaf], roles)
            return self.merge([activation])
        number = len(self.findings.sites)
        self.findings.sites.append(Site(number, view.leaf, roles, activation, view, self._path))
        for _, dimension in contraction.batched:
            self.findings.batched_outputs |= activation.labels[dimension]
        return self.fresh(
            from_inputs=True,
            sites=activation.sites | 1 << number,
            direct=1 << number,
            loops=activation.loops,
            labels=site_labels(contraction, view, activation.labels, len(jaxprs.shape_of(eqn.outvars[0]))),
        )

    def obstruct(self, leaves: Iterable[int], reason: str) -> None:
        """Notes why parameters cannot be quantized; the first reason stays."""
        for leaf in leaves:
            self.findings.obstacles.setdefault(leaf, reason)

    # Equations with jaxprs inside.

    def scan(self, eqn: JaxprEqn, operands: list[Origin]) -> list[Origin]:
        """Consts as they are, the carry as something new, parameters in xs without the scanned axis."""
        parts = jaxprs.scan_parts(eqn)
        consts, carry = operands[: parts.consts], operands[parts.consts : parts.consts + parts.carry]
        self._loops += 1
        loop = 1 << self._loops
        carried = [self._carried(o, loop) for o in carry]
        xs = operands[parts.consts + parts.carry :]
        whole_too = {o.view.leaf for o in consts if o.view} & {o.view.leaf for o in xs if o.view}
        self.obstruct(whole_too, "a scan that runs over it also uses it whole")
        xs = [self._scanned(o, loop) for o in xs]
        results = self.run(jaxprs.body_of(eqn.params["jaxpr"]), [*consts, *carried, *xs])
        return [self.rerooted(self.lost(r, "scan")) for r in results]

    def _carried(self, origin: Origin, loop: int) -> Origin:
        if origin.view is not None and not origin.view.gathered:
            self.obstruct([origin.view.leaf], "it is carried through a loop")
        origin = self.lost(origin, "a loop's carry")
        return self.rerooted(dataclasses.replace(origin, from_inputs=True, loops=origin.loops | loop))

    def _scanned(self, origin: Origin, loop: int) -> Origin:
        if origin.view is None:
            return self.rerooted(origin)
        view = origin.view.step_into_scan()
        if view is None:
            self.obstruct([origin.view.leaf], "a scan runs over a part of one of its axes")
            return self.rerooted(self.lost(origin, "scan"))
        for axis in set(view.scanned) - set(origin.view.scanned):
            self.findings.loops_of_axis[view.leaf, axis] = loop
        return self.rerooted(dataclasses.replace(origin, view=view))

    def while_loop(self, eqn: JaxprEqn, operands: list[Origin]) -> list[Origin]:
        """The body's results; the condition holds no weight worth quantizing."""
        conditions, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        self._loops += 1
        carried = [self._carried(o, 1 << self._loops) for o in operands[conditions + consts :]]
        body_consts = operands[conditions : conditions + consts]
        results = self.run(jaxprs.body_of(eqn.params["body_jaxpr"]), [*body_consts, *carried])
        return [self.rerooted(self.lost(r, "while")) for r in results]

    def cond(self, eqn: JaxprEqn, operands: list[Origin]) -> list[Origin]:
        """Each result merged over the branches."""
        bodies = [jaxprs.body_of(branch) for branch in eqn.params["branches"]]
        branches = [self.run(body, operands[1:], (i,)) for i, body in enumerate(bodies)]
        return [self.merge(self.lost(r, "cond") for r in results) for results in zip(*branches, strict=True)]

    def shard_map(self, eqn: JaxprEqn, operands: list[Origin]) -> list[Origin]:
        """The body, which sees each operand's shard under the same view."""
        body = jaxprs.body_of(eqn.params["jaxpr"])
        shapes = [jaxprs.shape_of(v) for v in body.jaxpr.invars]
        results = self.run(body, [self._local(o, shape) for o, shape in zip(operands, shapes, strict=True)])
        return [self.lost(r, "shard_map") for r in results]

    def _local(self, origin: Origin, shape: tuple[int, ...]) -> Origin:
        if origin.view is None:
            return origin
        view = localize(origin.view, shape)
        if view is None:
            self.obstruct([origin.view.leaf], "a shard_map takes a part of one of its axes, or splits merged ones")
            return self.lost(origin, "shard_map")
        return dataclasses.replace(origin, view=view)

    _structured: Mapping[str, Callable[[_Walk, JaxprEqn, list[Origin]], list[Origin]]] = {
        "scan": scan,
        "while": while_loop,
        "cond": cond,
        "shard_map": shard_map,
    }


def _labelled(origin: Origin, atom: jaxprs.Atom) -> Origin:
    """The origin with as many labels as the value has dimensions; they are lost where an equation's kind is unknown."""
    rank = len(jaxprs.shape_of(atom))
    return origin if len(origin.labels) == rank else dataclasses.replace(origin, labels=(NONE,) * rank)


def _index_resolver(eqn: JaxprEqn, operands: Sequence[Origin]) -> Resolve:
    """A slice's start as an integer if it is written in the jaxpr, else as its origin."""

    def resolve(atom: jaxprs.Atom) -> int | Origin:
        if isinstance(atom, Literal) and np.ndim(atom.val) == 0:
            return int(atom.val)
        return operands[list(eqn.invars).index(atom)]

    return resolve


def _union(sets: Iterable[int]) -> int:
    return functools.reduce(operator.or_, sets, 0)


def _bits(numbers: int) -> list[int]:
    return [i for i in range(numbers.bit_length()) if numbers >> i & 1]
