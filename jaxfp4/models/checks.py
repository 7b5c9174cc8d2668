"""Reading values out of a parsed ``config.json``: each check names the key, what was found and what is wanted."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

_LONGEST = 80


def shown(value: Any) -> str:
    """The value as Python writes it, cut to a line's part."""
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def unsupported(key: str, found: Any, wanted: str) -> str:
    """The message for a setting that is not computed here."""
    return f"model config: {key} is {shown(found)}, which is not supported; supported: {wanted}"


def required(config: Mapping[str, Any], key: str) -> Any:
    """The value of a key that must be there."""
    if key not in config:
        raise ValueError(
            f"model config: {key} is missing; a config.json of model_type {config['model_type']!r} needs it"
        )
    return config[key]


def positive_integer(name: str, value: Any, most: int = 2**31 - 1) -> int:
    """The value, if it is an integer from 1 to `most` (a JSON true is none)."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"model config: {name} is {shown(value)}, wanted a positive integer, at most {most}")
    return value


def positive_number(name: str, value: Any) -> float:
    """The value as a float, if it is a finite number above 0 (a JSON true is none)."""
    # An integer in JSON may be finite and yet beyond every float.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"model config: {name} is {shown(value)}, wanted a positive number")
    return float(value)


def boolean(name: str, value: Any) -> bool:
    """The value, if it is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"model config: {name} is {shown(value)}, wanted true or false")
    return value
