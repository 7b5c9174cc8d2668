"""Errors that say which leaf of a parameter tree they are about, and how such a leaf is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax

_WRAPPER_FIELDS = ("value", "raw_value")


class LeafError(ValueError):
    """A value error about one leaf; the message begins with the leaf's path."""


@contextmanager
def leaf(path: str) -> Iterator[None]:
    """Prefixes `path` to the message of a ValueError raised inside.

    >>> with leaf("layers/0/kernel"):
    ...     raise ValueError("holds NaN")
    Traceback (most recent call last):
        ...
    jaxfp4.formats.errors.LeafError: layers/0/kernel: holds NaN
    """
    try:
        yield
    except LeafError:
        raise
    except ValueError as error:
        raise LeafError(f"{path}: {error}") from error


def path_string(keys: tuple[object, ...]) -> str:
    """A jax key path as names joined by '/', without the fields of Flax's boxes around the array.

    >>> import jax
    >>> [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path({"a": [1.0, 2.0]})]
    ['a/0', 'a/1']
    """
    while keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name in _WRAPPER_FIELDS:
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")
