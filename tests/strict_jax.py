"""Strict JAX, and the devices that the arithmetic is tested on."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion() -> Iterator[None]:
    """No implicit dtype or rank promotion, as users may demand of the code."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on the CPU and, under `-m gpu`, on the GPU; there is an error, not a skip, if there is none."""
    device = jax.devices(request.param)[0]
    assert device.platform == request.param
    with jax.default_device(device):
        yield request.param
