"""Programs on several CPU devices are waited for.

A device of jaxlib 0.10's CPU client has 32 places for programs in flight, and whoever wants one more waits for it on a
thread of the pool that runs the programs. On several devices, as many as there are cores or more, these threads are
then missing in a collective of an earlier program: nothing goes on, and after 40 s XLA aborts the process. Leaving
many programs in flight is what happens in a loop over weights, so no function of this package leaves one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax import Array

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def paced(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`function`, that returns once its result is computed if that lies on several CPU devices.

    Results that are traced, on one device or on accelerators are returned as they are. `__wrapped__` does not wait.
    """

    @functools.wraps(function)
    def waiting(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        result = function(*args, **kwargs)
        if any(map(_is_on_several_cpus, jax.tree.leaves(result))):
            jax.block_until_ready(result)
        return result

    return waiting


def _is_on_several_cpus(x: object) -> bool:
    if not isinstance(x, Array) or isinstance(x, jax.core.Tracer):
        return False
    devices: set[Any] = x.sharding.device_set
    return len(devices) > 1 and next(iter(devices)).platform == "cpu"
