"""The weights of a model: what the walk found, put into words."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from jaxfp4.tensors.reductions import SUPPORTED_DTYPES
from jaxfp4.transform.analysis import Findings, Origin, Site, analyze
from jaxfp4.transform.trace import ApplyFn, Leaves, trace
from jaxfp4.transform.views import is_concrete


class Role(enum.Enum):
    """What a weight does in the model, by dataflow."""

    ATTENTION = "attention"
    """It makes queries, keys or values, or reads what attention returned."""
    EXPERT = "expert"
    """A stack of experts' weights."""
    LINEAR = "linear"
    """Any other matrix product."""
    ROUTER = "router"
    """Its result chooses: it goes into a top-k, a sort or an argmax."""
    EMBEDDING = "embedding"
    """Its rows are looked up by index."""
    HEAD = "head"
    """It makes the outputs, one for each row of an embedding table, or is called `lm_head`."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter of two dimensions or more. Axes are the parameter's own, increasing."""

    leaf: int
    path: str
    shape: tuple[int, ...]
    dtype: str
    contracted: tuple[int, ...] = ()
    layer_axes: tuple[int, ...] = ()
    """Axes that stack the weights of successive layers."""
    expert_axes: tuple[int, ...] = ()
    """Axes that stack the weights of experts."""
    role: Role | None = None
    siblings: tuple[str, ...] = ()
    """Paths of all weights that read the same activation, this one included."""
    first_use: int = -1
    """Its place among all weights in the order in which the model first uses them; -1 if it does not."""
    obstacle: str = ""
    """Why it cannot be quantized with its activation; empty if it can."""

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """Layer and expert axes together."""
        return tuple(sorted(self.layer_axes + self.expert_axes))

    def sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Sizes along some axes."""
        return tuple(self.shape[a] for a in axes)


def find_weights(apply_fn: ApplyFn, leaves: Leaves, args: tuple[Any, ...]) -> tuple[Weight, ...]:
    """The parameters of two or more dimensions of `apply_fn(params, *args)`, found by one abstract trace."""
    shapes = [tuple(value.shape) for value in leaves.values]
    findings = analyze(trace(apply_fn, leaves, args).body, shapes)
    weights = [
        _weight(leaf, path, value, [s for s in findings.sites if s.leaf == leaf], findings)
        for leaf, (path, value) in enumerate(zip(leaves.paths, leaves.values, strict=True))
        if len(value.shape) >= 2
    ]
    return tuple(_with_siblings(weights, findings.sites))


def _weight(leaf: int, path: str, value: Any, sites: list[Site], findings: Findings) -> Weight:
    bare = Weight(leaf, path, tuple(value.shape), value.dtype.name)
    obstacle = _obstacle(bare, sites, findings)
    if not sites:
        role = Role.EMBEDDING if leaf in findings.tables else None
        return dataclasses.replace(bare, role=role, obstacle=obstacle)
    roles = sites[0].roles
    layers = tuple(a for a in roles.stacked if _is_layer_axis(a, sites, findings))
    batched = [a for a in roles.output if (leaf, a) in findings.batched_outputs]
    experts = tuple(sorted({*roles.stacked, *batched} - set(layers)))
    weight = dataclasses.replace(
        bare,
        contracted=roles.contracted,
        layer_axes=layers,
        expert_axes=experts,
        obstacle=obstacle,
        first_use=sites[0].number,
    )
    role = _role(weight, sites, findings)
    if role is not Role.EXPERT:
        # A batch of heads is no stack of experts: it has one scale, and no head is without tokens.
        weight = dataclasses.replace(weight, expert_axes=())
    return dataclasses.replace(weight, role=role)


def _obstacle(weight: Weight, sites: list[Site], findings: Findings) -> str:
    if weight.dtype not in SUPPORTED_DTYPES:
        return f"its dtype is {weight.dtype}"
    if weight.leaf in findings.obstacles:
        return findings.obstacles[weight.leaf]
    if not sites:
        last = findings.last_seen.get(weight.leaf)
        return "the model does not use it" if last is None else f"it goes into {last!r}, not into a contraction"
    if len({(s.roles.contracted, s.roles.stacked) for s in sites}) > 1:
        return "it is contracted along different axes in different places"
    return ""


def _is_layer_axis(axis: int, sites: list[Site], findings: Findings) -> bool:
    """Whether entries along a stack axis belong to successive layers: one's activation depends on another's result."""
    mine = sum(1 << s.number for s in sites)
    for site in sites:
        if axis in site.view.gathered:
            continue
        loop = findings.loops_of_axis.get((site.leaf, axis)) if axis in site.view.scanned else None
        if loop is not None:
            if site.activation.loops & loop:
                return True
            continue
        start = site.view.starts.get(axis)
        if isinstance(start, Origin):
            if site.activation.loops & start.loops or not (start.loops or start.sites):
                return True
        elif is_concrete(start) and site.activation.sites & mine & ~(1 << site.number):
            return True
    return False


def _role(weight: Weight, sites: list[Site], findings: Findings) -> Role:
    numbers = sum(1 << s.number for s in sites)
    is_table = weight.leaf in findings.tables and not any(s.view.gathered for s in sites)
    if is_table or any(s.activation.is_comparison for s in sites):
        return Role.EMBEDDING
    if numbers & findings.ordered and not numbers & findings.outputs:
        return Role.ROUTER
    outputs = [n for a, n in enumerate(weight.shape) if a not in (*weight.contracted, *weight.stack_axes)]
    is_vocabulary = len(outputs) == 1 and outputs[0] in findings.tables.values()
    if "lm_head" in weight.path.split("/") or (numbers & findings.outputs and is_vocabulary):
        return Role.HEAD
    feeds = any(findings.attention & product and direct & numbers for product, direct in findings.feeds.items())
    if feeds or any(s.activation.context for s in sites):
        return Role.ATTENTION
    return Role.EXPERT if weight.expert_axes else Role.LINEAR


def _with_siblings(weights: list[Weight], sites: list[Site]) -> list[Weight]:
    """Weights that read the same activation and are stacked alike, named to each other."""
    roots: dict[int, set[int]] = {}
    for site in sites:
        roots.setdefault(site.activation.root, set()).add(site.leaf)
    by_leaf = {w.leaf: w for w in weights}
    parent = {w.leaf: w.leaf for w in weights}

    def find(leaf: int) -> int:
        while parent[leaf] != leaf:
            leaf = parent[leaf]
        return leaf

    for leaves in roots.values():
        alike: dict[tuple[Any, ...], int] = {}
        for leaf in sorted(leaves):
            w = by_leaf[leaf]
            kind = (w.sizes(w.layer_axes), w.sizes(w.expert_axes))
            parent[find(leaf)] = find(alike.setdefault(kind, leaf))
    return [
        dataclasses.replace(w, siblings=tuple(o.path for o in weights if find(o.leaf) == find(w.leaf))) for w in weights
    ]
