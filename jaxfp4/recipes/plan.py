"""A recipe applied to a model: for every weight what happens to it, and why."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxfp4.formats.errors import leaf as naming_leaf
from jaxfp4.recipes.methods import MAX_CALIBRATION, ChannelScaling, Method
from jaxfp4.recipes.presets import get
from jaxfp4.recipes.recipe import ExpertScale, Recipe, Rule, Scheme
from jaxfp4.tensors.blocks import normalize_axes
from jaxfp4.tensors.mesh import replicated_beside
from jaxfp4.transform.folding import Fold, Folding, Side, find_folds
from jaxfp4.transform.histogram import LogHistogram
from jaxfp4.transform.marks import Mark, MarkedMaximum, amax_name, find_marks
from jaxfp4.transform.statistics import (
    AbsoluteMaximum,
    ChannelMaximum,
    ChannelSum,
    MomentForm,
    SecondMoments,
    State,
    Statistic,
    Statistics,
)
from jaxfp4.transform.trace import ApplyFn, leaves_of, trace
from jaxfp4.transform.weights import Role, Weight, find_weights

_WITH_ACTIVATIONS = (Scheme.W4A4, Scheme.W8A8)


@dataclasses.dataclass(frozen=True)
class PlannedWeight:
    """A weight with the scheme decided for it, and why it has none."""

    weight: Weight
    scheme: Scheme
    reason: str = ""
    method: Method = MAX_CALIBRATION
    cached: tuple[str, ...] = ()
    """"keys", "values" or both, if they are the weight's result and the recipe quantizes the key-value cache."""

    @property
    def path(self) -> str:
        """Where the weight is in the parameter tree."""
        return self.weight.path

    @property
    def quantized(self) -> bool:
        """Whether the weight becomes NVFP4 or FP8."""
        return self.scheme is not Scheme.NONE

    @property
    def is_fp8(self) -> bool:
        """Whether it becomes FP8."""
        return self.scheme is Scheme.W8A8

    @property
    def channels(self) -> int:
        """The length of the contraction."""
        return math.prod(self.weight.sizes(self.weight.contracted))


@dataclasses.dataclass(frozen=True)
class ActiveFold:
    """A fold whose scales a method chooses, and the quantized weights that the choice is made for."""

    fold: Fold
    scaling: ChannelScaling
    consumers: tuple[tuple[PlannedWeight, Side], ...]


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What happens to each weight of a model. `print(plan)` is a table."""

    recipe: Recipe
    entries: tuple[PlannedWeight, ...]
    folding: Folding | None = dataclasses.field(default=None, compare=False)
    """Where channel scales can be folded, if a method has any."""
    folding_digest: str = ""
    """What tells plans apart whose foldings differ; arrays in them cannot be compared as a whole."""

    @functools.cached_property
    def by_path(self) -> Mapping[str, PlannedWeight]:
        """The entries by path."""
        return {entry.path: entry for entry in self.entries}

    @property
    def quantized(self) -> tuple[PlannedWeight, ...]:
        """The entries that become NVFP4 or FP8, in the order of the tree."""
        return tuple(entry for entry in self.entries if entry.quantized)

    @functools.cached_property
    def folds(self) -> tuple[ActiveFold, ...]:
        """The folds that a method uses, in the order of the tree."""
        found = [] if self.folding is None else [self._active(fold) for fold in self.folding.folds]
        return tuple(fold for fold in found if fold is not None)

    def _active(self, fold: Fold) -> ActiveFold | None:
        sides = [(self.by_path[side.path], side) for side in fold.consumers if side.path in self.by_path]
        consumers = tuple((entry, side) for entry, side in sides if entry.quantized)
        scaling = next((e.method.channels for e, _ in consumers if e.method.channels is not None), None)
        fits = all(_fits(entry.weight, side) for entry, side in consumers)
        return ActiveFold(fold, scaling, consumers) if scaling is not None and fits else None

    @functools.cached_property
    def unscaled(self) -> Mapping[str, str]:
        """By path, why the channels of a weight whose method scales channels are left as they are."""
        scaled = {entry.path for active in self.folds for entry, _ in active.consumers}
        wanted = [e.path for e in self.quantized if e.method.channels is not None and e.path not in scaled]
        reasons = {} if self.folding is None else self.folding.reasons
        return {path: reasons.get(path) or "its layers or channels are laid out in another way" for path in wanted}

    @functools.cached_property
    def statistics(self) -> Mapping[str, Statistic]:
        """By path, what calibration collects of the activation that a weight meets; empty for weight-only max.

        `amax` for the scale of W4A4 activations, and what the method of the weight wants. Siblings with the same stacks
        meet the same activation, so the first of them collects the second moments for all.
        """
        found = {entry.path: self._statistics_of(entry) for entry in self.quantized}
        return {path: Statistics(parts) for path, parts in found.items() if parts}

    def _statistics_of(self, entry: PlannedWeight) -> tuple[tuple[str, Statistic], ...]:
        parts: list[tuple[str, Statistic]] = []
        channels = entry.channels
        if entry.scheme in _WITH_ACTIVATIONS:
            parts.append(("amax", AbsoluteMaximum()))
            if entry.method.activations.histogram:
                parts.append(("histogram", LogHistogram()))
        if any(entry is consumer for active in self.folds for consumer, _ in active.consumers):
            parts.append(("channel_amax", ChannelMaximum(channels)))
            parts.append(("channel_sum", ChannelSum(channels)))
        alike = self._sharing_moments(entry)
        form = max((e.method.moments for e in alike), key=lambda f: f.value)
        if form is not MomentForm.NONE and alike[0] is entry:
            parts.append(("moments", SecondMoments(channels, form)))
        parts += [(amax_name(kind), MarkedMaximum()) for kind in entry.cached]
        return tuple(parts)

    def _sharing_moments(self, entry: PlannedWeight) -> tuple[PlannedWeight, ...]:
        """The siblings, this entry included, whose second moments are the same array."""
        stack = entry.weight.sizes(entry.weight.stack_axes)
        return tuple(e for e in self.siblings(entry) if e.weight.sizes(e.weight.stack_axes) == stack)

    def moments_source(self, entry: PlannedWeight) -> tuple[str, MomentForm]:
        """The path whose statistics hold the entry's second moments, and in which form."""
        alike = self._sharing_moments(entry)
        return alike[0].path, max((e.method.moments for e in alike), key=lambda f: f.value)

    @property
    def observed(self) -> tuple[PlannedWeight, ...]:
        """The entries whose activation must be calibrated."""
        return tuple(entry for entry in self.quantized if entry.path in self.statistics)

    @property
    def with_input_scale(self) -> tuple[PlannedWeight, ...]:
        """The entries whose activation is quantized too."""
        return tuple(entry for entry in self.quantized if entry.scheme in _WITH_ACTIVATIONS)

    def init_stats(self, params: Any = None) -> dict[str, State]:
        """Statistics before the first batch: by path and name, arrays over the stack axes of the weight.

        With `params` they are placed on the mesh of these parameters, as the statistics after a batch are; a jitted
        function of them then compiles once and not once for each placement.
        """
        stats = {e.path: self.statistics[e.path].init(e.weight.sizes(e.weight.stack_axes)) for e in self.observed}
        return stats if params is None else replicated_beside(stats, params)

    def siblings(self, entry: PlannedWeight) -> tuple[PlannedWeight, ...]:
        """The entries of one format, this one included, that read the same activation and so share their scales."""
        others = (self.by_path[path] for path in entry.weight.siblings)
        return tuple(other for other in others if other.quantized and other.is_fp8 == entry.is_fp8)

    def global_scale_axes(self, entry: PlannedWeight) -> tuple[int, ...]:
        """The axes along which a weight has separate global scales."""
        weight = entry.weight
        return weight.stack_axes if self.recipe.expert_scale is ExpertScale.EXPERT else weight.layer_axes

    def __str__(self) -> str:
        table = _table(self)
        console = Console(file=io.StringIO(), width=200, color_system=None, force_jupyter=False)
        console.print(table)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        return "\n".join(line.rstrip() for line in text.splitlines())

    def __rich__(self) -> Table:
        return _table(self)

    __repr__ = __str__


def plan(
    apply_fn: ApplyFn,
    params: Any,
    *args: Any,
    recipe: str | Recipe = "nvfp4",
    expert_scale: str | ExpertScale | None = None,
) -> Plan:
    """Finds the weights of `apply_fn(params, *args)` by an abstract trace and decides what to quantize.

    Nothing is computed: `params` and `args` may hold `jax.ShapeDtypeStruct`s. Weights are the parameters that are
    contracted with something computed from `args`, seen through casts, reshapes, slices, loops and sharding. Weights
    contracted with the same value are siblings and will share one global amax and one input scale. `expert_scale`
    overrides the recipe's: `"stack"` for one global scale for all experts of a weight, `"expert"` for one each.

    Raises ValueError if a rule of the recipe matches no weight, or if one matches a weight that cannot be quantized as
    it asks and names it by more than `*`.

    >>> import jax.numpy as jnp
    >>> w = {"kernel": jnp.ones((32, 8))}
    >>> plan(lambda params, x: x @ params["kernel"], w, jnp.ones((4, 32))).quantized[0].path
    'kernel'
    """
    recipe = get(recipe)
    if expert_scale is not None:
        recipe = recipe.with_expert_scale(expert_scale)
    leaves = leaves_of(params)
    weights = find_weights(apply_fn, leaves, args)
    _refuse_unmatched_rules(recipe, weights)
    entries = tuple(_decide(recipe, weight) for weight in weights)
    scales_channels = any(entry.method.channels is not None for entry in entries)
    if recipe.kv_cache is not None:
        if scales_channels:
            raise ValueError(
                f"recipe {recipe.name!r}: kv_cache with {next(e.method for e in entries if e.method.channels)}: wanted "
                "a method without channels, as keys and values are calibrated before channels are scaled"
            )
        kinds = recipe.kv_cache.kinds
        marks = find_marks(trace(apply_fn, leaves, args).body, leaves.paths, kinds)
        entries = tuple(_with_cached(entry, marks.values()) for entry in entries)
    folding = find_folds(apply_fn, leaves, args, weights) if scales_channels else None
    result = Plan(recipe, entries, folding, "" if folding is None else digest_of_folding(folding))
    if not result.quantized:
        raise ValueError(f"recipe {recipe.name!r} leaves nothing to quantize:\n{result}")
    return result


def _decide(recipe: Recipe, weight: Weight) -> PlannedWeight:
    rule = next((rule for rule in recipe.rules if rule.matches(weight)), None)
    if rule is None:
        return PlannedWeight(weight, Scheme.NONE, _why_left(weight))
    if rule.scheme is Scheme.NONE:
        return PlannedWeight(weight, Scheme.NONE, "left by a rule")
    if rule.axis is not None:
        return _with_stated_axis(weight, rule, rule.axis)
    if weight.obstacle:
        if rule.include != ("*",):
            raise ValueError(
                f"{weight.path}: a rule asks for {rule.scheme.value}, but {weight.obstacle}; exclude it, or state its "
                "contraction with Rule(Scheme.W4A16, axis=...)"
            )
        return PlannedWeight(weight, Scheme.NONE, weight.obstacle)
    return PlannedWeight(weight, rule.scheme, method=rule.method)


def _with_cached(entry: PlannedWeight, marks: Iterable[Mark]) -> PlannedWeight:
    """The entry with what of its result a key-value cache holds."""
    cached = tuple(sorted({mark.kind for mark in marks if mark.leaf == entry.weight.leaf}))
    if cached and not entry.quantized:
        raise ValueError(
            f"{entry.path}: it makes {' and '.join(cached)} for a quantized key-value cache but is kept "
            f"({entry.reason}): wanted it quantized, as their scales are kept beside it; add a rule for it, or leave "
            "kv_cache out"
        )
    return dataclasses.replace(entry, cached=cached)


def _why_left(weight: Weight) -> str:
    if weight.obstacle and weight.role is not Role.EMBEDDING:
        return weight.obstacle
    return "no rule is for it" if weight.role is None else f"{weight.role.value}: no rule is for it"


def digest_of_folding(folding: Folding) -> str:
    """SHA-256 in hexadecimal over all sides of all folds, equal for equal foldings."""
    sides = [side for fold in folding.folds for side in (*fold.producers, *fold.consumers)]
    text = repr([(side.leaf, side.axes, side.layer_axes, side.index.tolist()) for side in sides])
    return hashlib.sha256(text.encode()).hexdigest()


def _fits(weight: Weight, side: Side) -> bool:
    """Whether a fold sees the weight's layers and contraction as the weight's own statistics do."""
    long_axes = tuple(a for a in weight.contracted if weight.shape[a] > 1)
    return side.layer_axes == weight.layer_axes and side.axes == long_axes


def _with_stated_axis(weight: Weight, rule: Rule, axis: int | tuple[int, ...]) -> PlannedWeight:
    """A weight whose contraction the rule states, because the walk does not see it."""
    with naming_leaf(weight.path):
        axes = normalize_axes(axis, len(weight.shape))
        if rule.scheme is not Scheme.W4A16:
            raise ValueError(
                f"a rule with axis={axis} asks for {rule.scheme.value}: wanted W4A16; nothing is known of "
                "its activation"
            )
        method = rule.method
        if method.moments is not MomentForm.NONE or method.channels is not None or method.rotation is not None:
            raise ValueError(
                f"a rule with axis={axis} asks for {method}: wanted a method that needs nothing of the activation, of "
                "which nothing is known; use Max, Mse or FourOverSix scales"
            )
    stated = dataclasses.replace(weight, contracted=axes, siblings=(weight.path,))
    return PlannedWeight(stated, rule.scheme, method=rule.method)


def _refuse_unmatched_rules(recipe: Recipe, weights: tuple[Weight, ...]) -> None:
    """ValueError for a rule, or an exclude pattern, that matches no weight: it is a mistake."""
    for rule in recipe.rules:
        if not any(rule.matches(w) for w in weights):
            roles = sorted({w.role.value for w in weights if rule.matches_path(w.path) and w.role is not None})
            obstacles = [f"{w.path}: {w.obstacle}" for w in weights if rule.matches_path(w.path) and w.obstacle]
            found = f"only weights with the roles {', '.join(roles)}" if roles else "no weight"
            found += f" ({obstacles[0]})" if obstacles else ""
            raise ValueError(
                f"recipe {recipe.name!r}: the rule for include={rule.include} exclude={rule.exclude} matches {found}; "
                f"wanted at least one that it quantizes. Paths are like {weights[0].path if weights else 'none'!r}"
            )
        for pattern in rule.exclude:
            if not any(Rule(rule.scheme, include=(pattern,)).matches_path(w.path) for w in weights):
                raise ValueError(
                    f"recipe {recipe.name!r}: exclude={pattern!r} matches no weight; wanted a pattern over whole paths "
                    f"like {weights[0].path if weights else 'none'!r}"
                )


def _table(plan: Plan) -> Table:
    table = Table(
        title=f"{plan.recipe.name}: {len(plan.quantized)} of {len(plan.entries)} weights", title_justify="left"
    )
    for column in ("path", "shape", "contraction", "stacked", "role", "siblings", "bits"):
        table.add_column(column, overflow="fold")
    for entry in plan.entries:
        weight = entry.weight
        contraction = " x ".join(str(weight.shape[a]) for a in weight.contracted)
        stacked = [f"{weight.shape[a]} layers" for a in weight.layer_axes]
        stacked += [f"{weight.shape[a]} experts" for a in weight.expert_axes]
        others = [other.path for other in plan.siblings(entry)] if entry.quantized else []
        cells = (
            weight.path,
            "x".join(map(str, weight.shape)),
            f"{contraction} (axis {', '.join(map(str, weight.contracted))})" if contraction else "",
            ", ".join(stacked),
            weight.role.value if weight.role else "",
            _shared(weight.path, others),
            _treatment(plan, entry) if entry.quantized else f"kept: {entry.reason}",
        )
        # As Text, so that brackets and colons in a path are no markup.
        table.add_row(*map(Text, cells))
    return table


def _treatment(plan: Plan, entry: PlannedWeight) -> str:
    """The scheme, the method where it is another than max, and why channels are not scaled."""
    cache = plan.recipe.kv_cache
    cached = [f"{kind} {cache.format.value}" for kind in entry.cached] if cache else []
    words = ", ".join(filter(None, [entry.scheme.value, str(entry.method), *cached]))
    return f"{words}; channels not scaled: {plan.unscaled[entry.path]}" if entry.path in plan.unscaled else words


def _shared(path: str, siblings: list[str]) -> str:
    """The siblings of a path without the beginning and end that all have in common."""
    if len(siblings) < 2:
        return ""
    parts = [p.split("/") for p in siblings]
    start = next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), 0)
    return ", ".join("/".join(p[start : start + 1]) for p in parts)


jax.tree_util.register_static(Plan)
