"""What to quantize and how, as data."""

from __future__ import annotations

import dataclasses
import enum
import fnmatch
from collections.abc import Sequence

from jaxfp4.recipes.kv_cache import KvCache
from jaxfp4.recipes.methods import MAX_CALIBRATION, Method
from jaxfp4.transform.weights import Role, Weight

QUANTIZED_BY_DEFAULT = frozenset({Role.ATTENTION, Role.EXPERT, Role.LINEAR})
"""Serving engines expect routers, embeddings and the output head in full precision."""


class Scheme(enum.Enum):
    """The precision of a weight and its activation."""

    W4A4 = "W4A4"
    """Weight and activation in NVFP4, the activation's global scale calibrated."""
    W4A16 = "W4A16"
    """Weight in NVFP4, activation as it is."""
    W8A8 = "W8A8"
    """Weight and activation in FP8 (E4M3), each with one scale, the activation's calibrated."""
    NONE = "none"
    """Neither is quantized."""


class ExpertScale(enum.Enum):
    """Over what a stacked expert weight's global scale is taken. Both are the same on every mesh."""

    STACK = "stack"
    """One for the whole stack."""
    EXPERT = "expert"
    """One for each expert."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which weights a scheme is for: those whose path matches one of `include`, none of `exclude`, and whose role fits.

    Patterns are shell globs over the whole path, `*` also across '/'. `roles=None` stands for attention, expert and
    other linear weights; routers, embeddings and the head must be named. `axis` states the contraction of weights that
    the model passes to something the walk does not see into; they can only be W4A16.
    """

    scheme: Scheme
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    roles: frozenset[Role] | None = None
    axis: int | tuple[int, ...] | None = None
    method: Method = MAX_CALIBRATION
    """How codes and scales are chosen."""

    def __post_init__(self) -> None:
        if self.scheme is Scheme.W8A8 and self.method != MAX_CALIBRATION:
            raise ValueError(
                f"a rule for {self.scheme.value} has method={self.method}: wanted max calibration, the only one for "
                "FP8; leave method out"
            )

    def matches_path(self, path: str) -> bool:
        """Whether the patterns choose this path."""
        return _any_match(self.include, path) and not _any_match(self.exclude, path)

    def matches(self, weight: Weight) -> bool:
        """Whether the rule is for this weight."""
        if not self.matches_path(weight.path):
            return False
        if self.axis is not None:
            return True
        return weight.role in (QUANTIZED_BY_DEFAULT if self.roles is None else self.roles)


def _any_match(patterns: Sequence[str], path: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules in order, the first that matches a weight decides; a weight that none matches stays as it is.

    >>> Recipe("mine", (Rule(Scheme.NONE, include=("layers/0/*",)), Rule(Scheme.W4A4))).name
    'mine'
    """

    name: str
    rules: tuple[Rule, ...]
    expert_scale: ExpertScale = ExpertScale.STACK
    kv_cache: KvCache | None = None
    """Whether and how keys and values are quantized."""

    def with_expert_scale(self, expert_scale: str | ExpertScale) -> Recipe:
        """The recipe with another scope of the experts' global scales: `"stack"` or `"expert"`."""
        try:
            return dataclasses.replace(self, expert_scale=ExpertScale(expert_scale))
        except ValueError:
            wanted = " or ".join(repr(e.value) for e in ExpertScale)
            raise ValueError(f"expert_scale={expert_scale!r}: wanted {wanted}") from None
