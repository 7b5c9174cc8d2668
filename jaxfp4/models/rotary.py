"""Rotary position embedding, and the rules by which it is stretched to sequences longer than those trained on.

A rule changes the frequencies, some also scale the rotated vectors. `SCALINGS` maps the `rope_type` of a
``config.json`` to the rule; its fields are the keys of the table there. The arithmetic is transformers', in float32 in
the same order, on the host: a trace holds the frequencies as constants.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from jaxfp4.models.checks import boolean, positive_integer, positive_number, shown, unsupported

Frequencies = NDArray[np.float32]


class Rotation(NamedTuple):
    """Pair i turns by ``position * frequencies[i]``; the result is multiplied with `magnitude`."""

    frequencies: Frequencies
    magnitude: float = 1.0


@dataclasses.dataclass(frozen=True)
class Linear:
    """Every frequency divided by `factor`."""

    factor: float

    def rotation(self, theta: float, head_dim: int, time: int, max_positions: int) -> Rotation:
        """The rotation of a sequence of `time` tokens."""
        return Rotation(plain_frequencies(theta, head_dim) / np.float32(self.factor))


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """A larger base for sequences longer than `max_position_embeddings`, by the sequence's own length (NTK)."""

    factor: float

    def rotation(self, theta: float, head_dim: int, time: int, max_positions: int) -> Rotation:
        """The rotation of a sequence of `time` tokens."""
        stretch = self.factor * max(time, max_positions) / max_positions - (self.factor - 1)
        return Rotation(plain_frequencies(theta * stretch ** (head_dim / (head_dim - 2)), head_dim))


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Low frequencies divided by `factor`, high ones kept, those between interpolated by their wavelength."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"model config: high_freq_factor is {self.high_freq_factor}, wanted more than low_freq_factor, which "
                f"is {self.low_freq_factor}"
            )

    def rotation(self, theta: float, head_dim: int, time: int, max_positions: int) -> Rotation:
        """The rotation of a sequence of `time` tokens."""
        low, high, trained = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        plain = plain_frequencies(theta, head_dim)
        wavelength = np.float32(2 * math.pi) / plain
        divided = plain / np.float32(self.factor)
        smooth = (np.float32(trained) / wavelength - np.float32(low)) / np.float32(high - low)
        between = (1 - smooth) * plain / np.float32(self.factor) + smooth * plain
        return Rotation(
            np.where(wavelength > trained / low, divided, np.where(wavelength < trained / high, plain, between))
        )


@dataclasses.dataclass(frozen=True)
class Yarn:
    """As `Llama3`, interpolated along the pairs, and the rotated vectors scaled (YaRN).

    The magnitude is `attention_factor` if given; else with ``m(s) = 0.1 * s * log(factor) + 1``, 1 for a factor up to
    1, it is ``m(mscale) / m(mscale_all_dim)`` if both are given and not 0, and otherwise ``m(1)``.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def rotation(self, theta: float, head_dim: int, time: int, max_positions: int) -> Rotation:
        """The rotation of a sequence of `time` tokens."""
        powers = _powers(theta, head_dim)
        divided = np.float32(1) / (np.float32(self.factor) * powers)
        start, end = self._ramp(theta, head_dim)
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(start)) / np.float32(end - start)
        kept = 1 - np.clip(ramp, 0, 1)
        return Rotation(divided * (1 - kept) + np.float32(1) / powers * kept, self._magnitude())

    def _ramp(self, theta: float, head_dim: int) -> tuple[float, float]:
        """The pairs between which the division by `factor` sets in: where so many turns fit into the length."""
        trained = self.original_max_position_embeddings
        low, high = (
            head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        start, end = max(low, 0), min(high, head_dim - 1)
        return start, end + 0.001 if start == end else end

    def _magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._m(self.mscale) / self._m(self.mscale_all_dim)
        return self._m(1.0)

    def _m(self, scale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * scale * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True)
class LongRope:
    """Each frequency divided by its own factor, of the long set for sequences longer than trained on (LongRoPE).

    The magnitude is `attention_factor` if given, else ``sqrt(1 + log(factor) / log(original length))``, 1 for a factor
    up to 1.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None

    def rotation(self, theta: float, head_dim: int, time: int, max_positions: int) -> Rotation:
        """The rotation of a sequence of `time` tokens."""
        trained = self.original_max_position_embeddings
        divisors = np.asarray(self.long_factor if time > trained else self.short_factor, np.float32)
        magnitude = self.attention_factor
        if magnitude is None:
            magnitude = 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(trained))
        return Rotation(np.float32(1) / (divisors * _powers(theta, head_dim)), magnitude)


RotaryScaling = Linear | Dynamic | Llama3 | Yarn | LongRope

#: `rope_type` -> the rule; "default" is no rule.
SCALINGS: Mapping[str, type[RotaryScaling]] = {
    "linear": Linear,
    "dynamic": Dynamic,
    "llama3": Llama3,
    "yarn": Yarn,
    "longrope": LongRope,
}


def _powers(theta: float, head_dim: int) -> Frequencies:
    """``theta ** (2 i / head_dim)``."""
    return np.power(np.float32(theta), np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))


def plain_frequencies(theta: float, head_dim: int) -> Frequencies:
    """``theta ** (-2 i / head_dim)`` for each of the ``head_dim / 2`` pairs.

    >>> plain_frequencies(100.0, 4)
    array([1. , 0.1], dtype=float32)
    """
    return np.float32(1) / _powers(theta, head_dim)


def rotate(x: Array, rotation: Rotation) -> Array:
    """Rotates each head of `x` ``[batch, time, heads, head_dim]`` by its position; element i pairs with i + head_dim/2.

    Pair i at position t turns by ``t * frequencies[i]``; both are multiplied with the magnitude. Computed in float32,
    returned in the type of `x`.
    """
    positions = jnp.arange(x.shape[1], dtype=jnp.float32)
    angle = positions[:, None] * jnp.asarray(rotation.frequencies)[None, :]
    cos, sin = (f(angle)[None, :, None, :] for f in (jnp.cos, jnp.sin))
    if rotation.magnitude != 1:
        cos, sin = cos * rotation.magnitude, sin * rotation.magnitude
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rotary_from_hf(config: Mapping[str, Any], default_theta: float) -> tuple[float, RotaryScaling | None]:
    """The base, and the rule if there is one, of a parsed ``config.json``.

    Both spellings are read, `rope_scaling` beside `rope_theta` and `rope_parameters` (transformers 5). A config may
    hold both if they say the same.

    Raises:
        ValueError: an unknown rule, a key that the rule does not have or lacks, a value out of range, or spellings that
            contradict each other.
    """
    found = {key: config.get(key) or {} for key in ("rope_scaling", "rope_parameters")}
    read = {key: _table(config, key, table, default_theta) for key, table in found.items() if table}
    if not read:
        return positive_number("rope_theta", config.get("rope_theta", default_theta)), None
    first, *others = read.values()
    if any(other != first for other in others):
        raise ValueError(
            f"model config: rope_scaling is {shown(found['rope_scaling'])}, but rope_parameters is "
            f"{shown(found['rope_parameters'])}; wanted one of them, or the same in both"
        )
    return first


def rotary_to_hf(theta: float, scaling: RotaryScaling | None) -> dict[str, Any]:
    """`rope_theta`, `rope_parameters` and, if there is a rule, `rope_scaling`: what transformers 4 and 5 read.

    >>> rotary_to_hf(10000.0, None)
    {'rope_theta': 10000.0, 'rope_parameters': {'rope_theta': 10000.0, 'rope_type': 'default'}}
    """
    if scaling is None:
        return {"rope_theta": theta, "rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
    (rope_type,) = (name for name, rule in SCALINGS.items() if isinstance(scaling, rule))
    table: dict[str, Any] = {"rope_type": rope_type}
    for key, value in dataclasses.asdict(scaling).items():
        if value is not None:
            table[key] = list(value) if isinstance(value, tuple) else value
    return {"rope_theta": theta, "rope_parameters": {"rope_theta": theta, **table}, "rope_scaling": table}


def _table(config: Mapping[str, Any], key: str, found: Any, default_theta: float) -> tuple[float, RotaryScaling | None]:
    """What one of the two tables says."""
    if not isinstance(found, Mapping):
        raise ValueError(unsupported(key, found, "a table with rope_type"))
    table = dict(found)
    types = [table.pop(name) for name in ("rope_type", "type") if name in table] or ["default"]
    if len(types) == 2 and types[0] != types[1]:
        raise ValueError(f"model config: {key} has rope_type {types[0]!r} but type {types[1]!r}; wanted one of them")
    theta = _theta(config, key, table.pop("rope_theta", None), default_theta)
    partial = table.pop("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ValueError(unsupported(f"{key}.partial_rotary_factor", partial, "1.0"))
    if types[0] == "default":
        if table:
            raise ValueError(
                unsupported(f"{key}.{min(table)}", table[min(table)], "with rope_type 'default', only rope_theta")
            )
        return theta, None
    rule = SCALINGS.get(types[0]) if isinstance(types[0], str) else None
    if rule is None:
        raise ValueError(unsupported(f"{key}.rope_type", types[0], ", ".join(["default", *SCALINGS])))
    _fill_in(config, table, rule)
    scaling = rule(**_values(key, types[0], rule, table))
    if isinstance(scaling, (Yarn, LongRope)) and min(theta, scaling.original_max_position_embeddings) <= 1:
        raise ValueError(
            f"model config: rope_type {types[0]!r} with rope_theta {theta} and original_max_position_embeddings "
            f"{scaling.original_max_position_embeddings}, wanted both above 1"
        )
    return theta, scaling


def _theta(config: Mapping[str, Any], key: str, inside: Any, default: float) -> float:
    """The base: that in the table, or that beside it, or the family's."""
    beside = config.get("rope_theta")
    if inside is not None and beside is not None and inside != beside:
        raise ValueError(
            f"model config: {key}.rope_theta is {shown(inside)}, but rope_theta beside it is {shown(beside)}; wanted "
            "one value"
        )
    given = [value for value in (inside, beside) if value is not None]
    return positive_number("rope_theta", given[0] if given else default)


def _fill_in(config: Mapping[str, Any], table: dict[str, Any], rule: type[RotaryScaling]) -> None:
    """What transformers takes from elsewhere: the trained length, and a factor that is null from both lengths."""
    names = {field.name for field in dataclasses.fields(rule)}
    if "original_max_position_embeddings" not in names:
        return
    longest = positive_integer("max_position_embeddings", config.get("max_position_embeddings"))
    outside = config.get("original_max_position_embeddings")
    trained = outside if outside is not None else table.get("original_max_position_embeddings", longest)
    inside = table.setdefault("original_max_position_embeddings", trained)
    if inside != trained:
        raise ValueError(
            f"model config: original_max_position_embeddings is {shown(trained)}, but in the rotary table "
            f"{shown(inside)}; wanted one value"
        )
    by_lengths = (rule is Yarn and "factor" in table) or rule is LongRope
    if by_lengths and table.get("factor") is None:
        table["factor"] = longest / positive_integer("original_max_position_embeddings", trained)


def _values(key: str, rope_type: str, rule: type[RotaryScaling], table: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a rule; null counts as missing but for a switch, which transformers takes as false."""
    fields = {field.name: field for field in dataclasses.fields(rule)}
    if unknown := sorted(set(table) - set(fields)):
        raise ValueError(
            unsupported(f"{key}.{unknown[0]}", table[unknown[0]], f"with rope_type {rope_type!r}, {', '.join(fields)}")
        )
    values = {}
    for name, field in fields.items():
        value = table.get(name)
        if value is not None or (name in table and isinstance(field.default, bool)):
            values[name] = _PARSERS.get(name, positive_number)(f"{key}.{name}", value)
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"model config: {key}.{name} is missing; rope_type {rope_type!r} needs it")
    return values


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list):
        raise ValueError(f"model config: {name} is {shown(value)}, wanted a list of positive numbers")
    return tuple(positive_number(name, number) for number in value)


def _number(name: str, value: Any) -> float:
    """A scale that is left out if 0."""
    return 0.0 if value == 0 and not isinstance(value, bool) else positive_number(name, value)


_PARSERS: Mapping[str, Callable[[str, Any], Any]] = {
    "original_max_position_embeddings": positive_integer,
    "truncate": boolean,
    "mscale": _number,
    "mscale_all_dim": _number,
    "short_factor": _numbers,
    "long_factor": _numbers,
}
