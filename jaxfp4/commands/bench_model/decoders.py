"""The decoders that are calibrated and quantized, with random parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from jaxfp4.commands.bench_model.drawing import drawn, normal, ones
from jaxfp4.models import DecoderConfig, from_flax, parameter_shapes, shardings
from jaxfp4.models.hf_layout import assemble


@dataclasses.dataclass(frozen=True)
class DecoderSize:
    """A decoder, and the batch that it is calibrated on."""

    config: DecoderConfig
    batch: int
    length: int

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(map(math.prod, parameter_shapes(self.config).values()))

    def tokens(self) -> Array:
        """int32 `[batch, length]`."""
        drawn = np.random.default_rng(0).integers(self.config.vocab_size, size=(self.batch, self.length))
        return jnp.asarray(drawn, jnp.int32)

    def function_and_parameters(self, mesh: Mesh | None = None) -> tuple[Callable[..., Any], Any]:
        """`(apply_fn, params)` in bfloat16, on the first device or split over a mesh. Norms are ones.

        Large parameters are drawn first, so that what drawing takes does not show in the peak of memory.
        """
        places, shapes = self._places(mesh), parameter_shapes(self.config)
        order = sorted(shapes, key=lambda path: -math.prod(shapes[path]))
        values = {
            path: jax.block_until_ready(_parameter(i, shapes[path], places[path])) for i, path in enumerate(order)
        }
        return from_flax(assemble(self.config, values))

    def _places(self, mesh: Mesh | None) -> dict[str, Any]:
        if mesh is not None:
            return dict(shardings(self.config, mesh))
        return dict.fromkeys(parameter_shapes(self.config), SingleDeviceSharding(jax.devices()[0]))


FULL = DecoderSize(
    DecoderConfig(
        model_type="llama",
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    batch=4,
    length=1024,
)
"""1.1 billion parameters."""
TINY = DecoderSize(
    DecoderConfig(
        model_type="llama",
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=64,
    ),
    batch=2,
    length=16,
)


def _parameter(seed: int, shape: tuple[int, ...], place: Sharding) -> Array:
    return drawn(ones if len(shape) == 1 else normal, seed, shape, place)
