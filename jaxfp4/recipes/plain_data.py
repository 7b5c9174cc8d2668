"""Dataclasses as plain data, as JSON holds it, and back; their type annotations are the schema."""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WORDS = {int: "an integer", str: "a string", bool: "true or false", float: "a number"}


def to_data(value: Any) -> Any:
    """A frozen dataclass of dataclasses, enums, tuples, frozensets, mappings, integer arrays and scalars as plain data.

    A dataclass is a dict of its fields with its name as `"class"`, an enum its value, sets and arrays are lists.

    >>> to_data(np.arange(3))
    [0, 1, 2]
    """
    if isinstance(value, enum.Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: to_data(entry) for key, entry in value.items()}
    if isinstance(value, tuple):
        return [to_data(entry) for entry in value]
    if isinstance(value, frozenset):
        return sorted(to_data(entry) for entry in value)
    return int(value) if isinstance(value, np.integer) else value


def from_data(data: Any, kind: Any, where: str) -> Any:
    """What `to_data` gave `data` for, as a value of the type annotation `kind`.

    Fields that have defaults may be missing. Raises ValueError where a value is missing, unknown or not of its kind;
    the message begins with the place below `where`, as in `plan.entries[3].weight.shape`.

    >>> from_data([1, "x"], tuple[int, ...], "sizes")
    Traceback (most recent call last):
        ...
    ValueError: sizes[1]: found 'x': wanted an integer
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _union(data, arguments, where)
    if origin is tuple:
        return tuple(_list(data, list(arguments), where))
    if origin is frozenset:
        return frozenset(_list(data, [arguments[0], ...], where))
    if origin in (np.ndarray, NDArray):  # the latter is an alias of its own from NumPy 2.5 on
        return _integers(data, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        refuse_unless(isinstance(data, dict), data, "an object", where)
        return {key: from_data(entry, arguments[1], f"{where}[{key!r}]") for key, entry in data.items()}
    if is_dataclass(kind):
        return _dataclass(data, kind, where)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        values = [member.value for member in kind]
        refuse_unless(data in values, data, " or ".join(map(repr, values)), where)
        return kind(data)
    refuse_unless(_is_plain(data, kind), data, _WORDS[kind], where)
    return data


def refuse_unless(fits: bool, found: Any, wanted: str, where: str) -> None:
    """ValueError that shows what was found, shortened, unless it fits."""
    if not fits:
        text = repr(found)
        text = text if len(text) <= 60 else f"{text[:60]}..."
        raise ValueError(f"{where}: found {text}: wanted {wanted}")


def _is_plain(data: Any, kind: type) -> bool:
    """Whether it is a number or string of this type; an integer is a number too, true and false are neither."""
    if isinstance(data, bool) and kind is not bool:
        return False
    return isinstance(data, (int, float) if kind is float else kind)


def _union(data: Any, kinds: tuple[Any, ...], where: str) -> Any:
    """Dataclasses are told apart by their names, all else by its type."""
    named: dict[str, Any] = {kind.__name__: kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)}
    if isinstance(data, dict) and named:
        name: Any = data.get("class")
        refuse_unless(name in [*named], name, f"one of {', '.join(named)}", f"{where}.class")
        return from_data(data, named[name], where)
    if data is None and type(None) in kinds:
        return None
    others = [kind for kind in kinds if kind is not type(None) and not is_dataclass(kind)]
    refuse_unless(bool(others), data, "an object", where)
    lists = [kind for kind in others if typing.get_origin(kind) in (tuple, frozenset)]
    plain = [kind for kind in others if kind in _WORDS and _is_plain(data, kind)]
    chosen = lists if isinstance(data, list) else plain
    return from_data(data, (chosen or others)[0], where)


def _list(data: Any, kinds: list[Any], where: str) -> list[Any]:
    """A list with an entry for each of `kinds`, or of any length where the second of them is `...`."""
    refuse_unless(isinstance(data, list), data, "a list", where)
    if len(kinds) == 2 and kinds[1] is ...:
        kinds = [kinds[0]] * len(data)
    refuse_unless(len(data) == len(kinds), data, f"{len(kinds)} values", where)
    return [from_data(entry, kind, f"{where}[{i}]") for i, (entry, kind) in enumerate(zip(data, kinds, strict=True))]


def _integers(data: Any, where: str) -> np.ndarray:
    try:
        array = np.asarray(data)
    except ValueError:
        array = np.empty(0)
    refuse_unless(array.dtype == np.int64, data, "integers in lists of equal lengths", where)
    return array


def _dataclass(data: Any, kind: Any, where: str) -> Any:
    refuse_unless(isinstance(data, dict) and data.get("class") == kind.__name__, data, kind.__name__, where)
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(data) - {"class"} - set(fields))
    refuse_unless(not unknown, unknown, f"only {', '.join(fields)}", where)
    needed = [f.name for f in fields.values() if dataclasses.MISSING is f.default is f.default_factory]
    missing = [name for name in needed if name not in data]
    refuse_unless(not missing, sorted(data), f"{', '.join(missing)} too", where)
    values = {name: from_data(data[name], hints[name], f"{where}.{name}") for name in fields if name in data}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
