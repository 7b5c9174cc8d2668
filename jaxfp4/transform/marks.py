"""Values marked with `jax.ad_checkpoint.checkpoint_name`, and the weights whose products they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxfp4.tensors.mesh import AxisNames, amax_over_mesh, varying_everywhere
from jaxfp4.transform import jaxprs
from jaxfp4.transform.analysis import Findings, analyze
from jaxfp4.transform.jaxprs import EqnPath
from jaxfp4.transform.sites import Tracked, observe_layer
from jaxfp4.transform.statistics import AbsoluteMaximum, Places, Sample, State, Statistic


@dataclasses.dataclass(frozen=True)
class Mark:
    """A marked value: what it is, and the contraction of a weight that makes it."""

    leaf: int
    kind: str
    site: EqnPath

    @property
    def part(self) -> str:
        """The name of its absolute maximum among the weight's statistics and scales."""
        return amax_name(self.kind)


def amax_name(kind: str) -> str:
    """What the absolute maximum of a kind of marked values is called."""
    return f"{kind}_amax"


def find_marks(body: jaxprs.Body, paths: Sequence[str], kinds: Mapping[str, str]) -> dict[EqnPath, Mark]:
    """The marked values of a jaxpr whose first inputs are the parameters at `paths`; `kinds` by the names of marks.

    ValueError for a name that marks nothing, or a value that is not made by one weight's contraction.
    """
    shapes = [jaxprs.shape_of(v) for v in body.jaxpr.invars[: len(paths)]]
    findings = analyze(body, shapes)
    for name in kinds:
        if name not in {found for found, _ in findings.marks.values()}:
            others = ", ".join(sorted({repr(found) for found, _ in findings.marks.values()})) or "none"
            raise ValueError(
                f"the model marks no value with the name {name!r} (names found: {others}): wanted one for the "
                f"key-value cache; write {name} = jax.ad_checkpoint.checkpoint_name({name}, {name!r}) in front of the "
                "attention"
            )
    return {
        path: _mark(findings, name, kinds[name], sites, paths)
        for path, (name, sites) in findings.marks.items()
        if name in kinds
    }


def _mark(findings: Findings, name: str, kind: str, sites: int, paths: Sequence[str]) -> Mark:
    makers = [site for site in findings.sites if sites >> site.number & 1]
    if len(makers) != 1:
        found = ", ".join(paths[site.leaf] for site in makers) or "no weight"
        raise ValueError(
            f"the value marked {name!r} is made by {found}: wanted the result of exactly one weight, and what follows "
            "it up to the attention; move checkpoint_name"
        )
    return Mark(makers[0].leaf, kind, makers[0].path)


@dataclasses.dataclass(frozen=True)
class MarkedMaximum:
    """The largest magnitude of a marked value that a weight makes, beside statistics of the activation it meets.

    Activations leave it as it is; `observe_mark` fills it.
    """

    def init(self, stack: Sequence[int]) -> Array:
        """Zeros: nothing seen."""
        return AbsoluteMaximum().init(stack)

    def observe(self, sample: Sample) -> Array:
        """Zeros, whatever the activation is."""
        return jnp.zeros([sample.activation.shape[d] for d in sample.kept], jnp.float32)

    def observe_at(self, state: Array, places: Places, sample: Sample) -> Array:
        """`state`, whatever the activation is."""
        return state

    def merge(self, left: Array, right: Array) -> Array:
        """The elementwise maximum."""
        return jnp.maximum(left, right)

    def merge_over_mesh(self, state: Array, names: AxisNames) -> Array:
        """`lax.pmax`, which keeps NaN."""
        return amax_over_mesh(state, names)


def observe_mark(statistic: Statistic, mark: Mark, weight: Tracked, value: Array) -> State:
    """The statistics of a weight with the maximum of one marked value, all else neutral.

    It is entered for the layer that the weight was taken from, or for all layers of a stack that made it together.
    """
    amax = AbsoluteMaximum().observe(Sample(value))

    def entered(weight: Tracked) -> State:
        axes = sorted(weight.stack)
        state = jax.tree.map(varying_everywhere, statistic.init([weight.stack[a] for a in axes]))
        starts = [weight.view.starts.get(axis, slice(None)) for axis in axes]
        part = state[mark.part]
        return {**state, mark.part: part.at[tuple(starts)].max(amax) if axes else jnp.maximum(part, amax)}

    return observe_layer(weight, statistic, entered)
