"""Other libraries, timed if they are installed."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from jaxfp4.commands.bench_kernels.parts import Parts
from jaxfp4.commands.bench_kernels.timing import Clock, Timing


@dataclasses.dataclass(frozen=True)
class Rival:
    """A function of another library that does what an operation does."""

    function: str
    """Its name there."""
    prepare: Callable[..., tuple[Any, ...]]
    """Its arguments from those of ours: the same buffers, or what its layout needs; not timed."""
    call: Callable[..., Any]
    parts: Callable[[Any], Parts]
    """Its result as parts in the layout of ours; what it does not give is left out."""
    note: str = ""
    """How its work differs from ours."""
    wanted: float = 0.999
    """The share of equal entries from which the results count as the same."""
    once: bool = False
    """Whether it takes so long that it is timed once, with no call before."""


class Library(Protocol):
    """What a library is asked."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        ...

    @property
    def versions(self) -> dict[str, str]:
        """Those of its packages."""
        ...

    def begin(self, operations: Collection[str]) -> None:
        """Told which operations will be asked for, before anything else."""
        ...

    def rivals(self, operation: str) -> Sequence[Rival]:
        """What it has for an operation."""
        ...

    def time(self, call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], clock: Clock) -> Timing:
        """How long a function of it takes."""
        ...

    def wait(self, result: Any) -> Any:
        """The result once it is there."""
        ...


def installed(packages: Sequence[str]) -> bool:
    """Whether all of these can be imported.

    >>> installed(["jax"]), installed(["jax", "no_such_package"])
    (True, False)
    """
    return all(importlib.util.find_spec(package) is not None for package in packages)


def versions(distributions: Sequence[str]) -> dict[str, str]:
    """Of installed distributions; without those that carry no metadata."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
