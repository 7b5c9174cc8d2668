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

    From version 0.11 JAX says of every one that Triton may go from Pallas one day. That is nothing to tell users of this
    package, whose GPU code has plain JAX behind it, nor a reason to fail where they turn warnings into errors.
    """
    if not interpret:
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    parameters = triton.CompilerParams(num_warps=warps, num_stages=stages)
    return pallas.pallas_call(kernel, compiler_params=parameters, interpret=interpret, **options)
