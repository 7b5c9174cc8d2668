"""A model to quantize on meshes: dense layers that `tp` splits and stacks of experts that `ep` and `tp` split."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxfp4
from jaxfp4.commands.bench_kernels.sizes import DTYPE, STANDARD_DEVIATION
from jaxfp4.commands.bench_model.drawing import drawn, waves

RECIPE = "nvfp4_weight_only"

_SPECS = {
    "q": PartitionSpec(None, "tp"),
    "k": PartitionSpec(None, "tp"),
    "v": PartitionSpec(None, "tp"),
    "o": PartitionSpec("tp", None),
    "gate": PartitionSpec(None, "tp"),
    "up": PartitionSpec(None, "tp"),
    "down": PartitionSpec("tp", None),
    "expert_gate": PartitionSpec("ep", None, "tp"),
    "expert_up": PartitionSpec("ep", None, "tp"),
    "expert_down": PartitionSpec("ep", "tp", None),
}

Parameters = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Layers:
    """The sizes of what one device holds. Whatever the mesh, each device has as much of each weight."""

    layers: int
    hidden: int
    queries: int
    keys: int
    intermediate: int
    experts: int
    expert_width: int

    def shapes(self, tp: int, ep: int) -> dict[str, tuple[int, ...]]:
        """The logical shapes of one layer's weights on a mesh: widths grow with `tp`, the number of experts with `ep`.

        >>> Layers(1, 64, 32, 16, 48, 2, 16).shapes(2, 4)["expert_down"]
        (8, 32, 64)
        """
        hidden, experts, width = self.hidden, self.experts * ep, self.expert_width * tp
        queries, keys, intermediate = self.queries * tp, self.keys * tp, self.intermediate * tp
        return {
            "q": (hidden, queries),
            "k": (hidden, keys),
            "v": (hidden, keys),
            "o": (queries, hidden),
            "gate": (hidden, intermediate),
            "up": (hidden, intermediate),
            "down": (intermediate, hidden),
            "expert_gate": (experts, hidden, width),
            "expert_up": (experts, hidden, width),
            "expert_down": (experts, width, hidden),
        }

    @property
    def weights(self) -> int:
        """How many weights there are."""
        return self.layers * len(_SPECS)

    @property
    def bytes_per_device(self) -> int:
        """Of the unquantized parameters."""
        return self.layers * sum(map(math.prod, self.shapes(1, 1).values())) * jnp.dtype(DTYPE).itemsize

    def drawn(self, mesh: Mesh) -> Parameters:
        """Irregular parameters, each device its own part."""
        return [
            {
                name: drawn(waves, seed, shape, sharding)
                for seed, (name, shape, sharding) in enumerate(self.places(mesh), layer * len(_SPECS))
            }
            for layer in range(self.layers)
        ]

    def placed(self, values: Parameters, mesh: Mesh) -> Parameters:
        """Parameters that are the same on every mesh, split over this one."""
        return [{name: jax.device_put(layer[name], place) for name, _, place in self.places(mesh)} for layer in values]

    def plan(self, params: Parameters) -> jaxfp4.Plan:
        """How they are to be quantized."""
        return jaxfp4.plan(apply_fn, params, jax.ShapeDtypeStruct((16, self.hidden), DTYPE), recipe=RECIPE)

    def places(self, mesh: Mesh) -> Iterator[tuple[str, tuple[int, ...], NamedSharding]]:
        """The names, logical shapes and shardings of one layer's weights on a mesh."""
        for name, shape in self.shapes(mesh.shape["tp"], mesh.shape["ep"]).items():
            yield name, shape, NamedSharding(mesh, _SPECS[name])


FULL = Layers(layers=8, hidden=8192, queries=2048, keys=512, intermediate=7168, experts=16, expert_width=768)
"""About what one of eight devices holds of a model of a few hundred billion parameters: weights of 8 to 200 MB."""
TINY = Layers(layers=2, hidden=64, queries=64, keys=64, intermediate=64, experts=8, expert_width=64)
LOGICAL = Layers(layers=2, hidden=256, queries=256, keys=256, intermediate=256, experts=8, expert_width=256)
"""The model of which digests are taken. Up to eight devices split it in whole blocks, or in blocks cut nowhere."""


def apply_fn(params: Parameters, x: Array) -> Array:
    """The function whose contractions are planned; it is never run."""
    for w in params:
        x = ((x @ w["q"]) * jnp.mean((x @ w["k"]) * (x @ w["v"]))) @ w["o"]
        x = ((x @ w["gate"]) * (x @ w["up"])) @ w["down"]
        inner = jnp.einsum("td,edf->etf", x, w["expert_gate"]) * jnp.einsum("td,edf->etf", x, w["expert_up"])
        x = jnp.sum(jnp.einsum("etf,efd->etd", inner, w["expert_down"]), 0)
    return x


def logical_values(layers: Layers, seed: int = 0) -> Parameters:
    """Parameters from numpy, the same on every machine: heavy tails, a block of zeros and a large expert in each layer.

    An amax taken over part of a weight would show in the digest.
    """
    rng = np.random.default_rng(seed)
    params = []
    for _ in range(layers.layers):
        layer = {}
        for name, shape in layers.shapes(1, 1).items():
            w = STANDARD_DEVIATION * rng.standard_normal(shape, np.float32) ** 3
            w[..., :16, 0] = 0
            w[-1] *= 4
            layer[name] = w.astype(ml_dtypes.bfloat16)
        params.append(layer)
    return params
