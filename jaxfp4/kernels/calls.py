"""The one place that calls Pallas."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from jax.experimental import pallas
from jax.experimental.pallas import triton


def call(
    kernel: Callable[..., None], *, warps: int, stages: int = 2, interpret: bool, **options: Any
) -> Callable[..., Any]:
    """`pallas.pallas_call` of a Triton kernel.

    From version 0.11 JAX warns of each that Triton will leave Pallas. Users of this package can do nothing about it,
    and where they turn warnings into errors it must not fail: every kernel has plain JAX behind it.
    """
    if not interpret:
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    parameters = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pallas.pallas_call(kernel, compiler_params=parameters, interpret=interpret, **options)
