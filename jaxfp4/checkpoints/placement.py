"""Onto which devices the arrays of a checkpoint go, each device reading only its own slice of the file."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxfp4.checkpoints.pending import row_major
from jaxfp4.formats import BLOCK_SIZE

Shardings = Sharding | Mapping[str, Sharding] | None


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where one leaf goes. `strict`: a sharding that does not fit is an error, otherwise the leaf is replicated."""

    path: str
    sharding: Sharding | None
    strict: bool = True

    def replicated(self) -> Placed:
        """For scalars beside a weight: on the same devices, whole on each."""
        if isinstance(self.sharding, NamedSharding):
            everywhere = NamedSharding(self.sharding.mesh, PartitionSpec(), memory_kind=self.sharding.memory_kind)
            return Placed(self.path, everywhere, self.strict)
        return self

    def fit(self, shape: tuple[int, ...], what: str = "the array") -> Placed:
        """This, if the sharding divides the shape; else ValueError if strict, replicated if not."""
        if self.sharding is None or _divides(self.sharding, shape):
            return self
        if self.strict:
            raise ValueError(
                f"shardings[{self.path!r}] is {self.sharding}, which does not divide {what} of shape {shape}: wanted "
                "equal whole parts; split another dimension"
            )
        return self.replicated()

    def fit_weight(self, shape: tuple[int, ...]) -> Placed:
        """As `fit` for a weight `[N, K]`, of which no block of 16 along K may be cut."""
        return self.fit(shape).fit((shape[0], shape[1] // BLOCK_SIZE), "the block scales")


def _divides(sharding: Sharding, shape: tuple[int, ...]) -> bool:
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):
        return False
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


class Placement:
    """The caller's `shardings` by path, and which of them were asked for.

    A mapping names leaves one by one, and those that it leaves out go where `otherwise` says; a single sharding is for
    everything that it fits. TypeError for anything but a `NamedSharding` or a `SingleDeviceSharding`.
    """

    def __init__(self, shardings: Shardings, otherwise: Mapping[str, Sharding] | None = None):
        for path, sharding in shardings.items() if isinstance(shardings, Mapping) else [("", shardings)]:
            if sharding is not None and not isinstance(sharding, NamedSharding | SingleDeviceSharding):
                where = f"shardings[{path!r}]" if path else "shardings"
                raise TypeError(
                    f"{where} is {sharding!r}: wanted a jax.sharding.NamedSharding or SingleDeviceSharding, or a "
                    "mapping of them by path"
                )
        self._shardings = shardings
        self._otherwise = otherwise or {}
        self._unused = set(shardings) if isinstance(shardings, Mapping) else set()

    def of(self, path: str) -> Placed:
        """Where the leaf at this path goes."""
        if isinstance(self._shardings, Mapping) and path in self._shardings:
            self._unused.discard(path)
            return Placed(path, self._shardings[path])
        if self._shardings is None or isinstance(self._shardings, Mapping):
            return Placed(path, self._otherwise.get(path))
        return Placed(path, self._shardings, strict=False)

    def refuse_unused(self) -> None:
        """ValueError if `shardings` names a path that was never asked for."""
        if self._unused:
            raise ValueError(
                f"shardings has {min(self._unused)!r}, which is no leaf: wanted paths such as 'model/norm/weight'; "
                "correct it"
            )


def place(values: np.ndarray, placed: Placed) -> Any:
    """The array on its devices, each reading its own slice; values that JAX would narrow stay on the host."""
    if jax.dtypes.canonicalize_dtype(values.dtype) != values.dtype:
        return np.array(values)
    return place_parts(values.shape, placed.fit(values.shape).sharding, lambda index: values[index])


def place_parts(
    shape: tuple[int, ...], sharding: Sharding | None, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array of which each device gets `read(index)` of its own part; without a sharding the default device all."""
    if sharding is None:
        return jnp.asarray(row_major(read(tuple(slice(None) for _ in shape))))
    return jax.make_array_from_callback(shape, sharding, lambda index: row_major(read(index or ())))
