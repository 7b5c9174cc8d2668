"""Meshes of the eight virtual devices, and weights placed on them."""

import re

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

MESHES = {
    "tp8": {"tp": 8},
    "ep8": {"ep": 8},
    "tp4 ep2": {"tp": 4, "ep": 2},
    "tp2 ep4": {"tp": 2, "ep": 4},
    "tp1 ep8": {"tp": 1, "ep": 8},
    "dp2 tp2 ep2": {"dp": 2, "tp": 2, "ep": 2},
}


def mesh(name: str, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    axes = MESHES[name]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes))


def put(w: np.ndarray, on: jax.sharding.Mesh, spec: P) -> jax.Array:
    return jax.device_put(w, NamedSharding(on, spec))


COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast|reduce-scatter)"
    r"(?:-start)?\("
)


def collectives(compiled: jax.stages.Compiled) -> list[str]:
    """The names of all communication in a compiled program."""
    return sorted(COLLECTIVE.findall(compiled.as_text()))
