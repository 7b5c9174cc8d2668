"""Weak scaling of quantizing weights, and the digest of one model on every mesh."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

import jaxfp4
from jaxfp4.commands.bench_kernels.timing import Timing
from jaxfp4.commands.bench_model.layers import TINY, Layers, Parameters, logical_values
from jaxfp4.commands.errors import CommandError

EFFICIENCY_WANTED = 0.95


@dataclasses.dataclass(frozen=True)
class MeshTiming:
    """Quantizing the weights of a model on one mesh."""

    tp: int
    ep: int
    timing: Timing
    compile_seconds: float
    """The first call."""
    host: Timing
    """As many tiny weights on the same mesh: what the host and the launches cost."""

    @property
    def devices(self) -> int:
        """How many the mesh has."""
        return self.tp * self.ep


@dataclasses.dataclass(frozen=True)
class ScalingResult:
    """The same work for each device on meshes of one device and more."""

    layers: Layers
    meshes: tuple[MeshTiming, ...]
    """The first has one device."""

    def efficiency(self, mesh: MeshTiming) -> float:
        """The time on one device over that on all of a mesh; 1 if the others cost nothing."""
        return self.meshes[0].timing.median / mesh.timing.median


@dataclasses.dataclass(frozen=True)
class DigestResult:
    """The digest of one model wherever it was quantized."""

    by_place: dict[str, str]
    """The first is that of a single device."""

    @property
    def equal(self) -> bool:
        """Whether all are."""
        return len(set(self.by_place.values())) == 1


def device_counts(most: int) -> tuple[int, ...]:
    """Powers of two.

    >>> device_counts(6)
    (1, 2, 4)
    """
    return tuple(2**i for i in range(most.bit_length()))


def mesh_sizes(devices: int) -> tuple[tuple[int, int], ...]:
    """`(tp, ep)` of the meshes to look at: all of one, all of the other, and both alike or as nearly as can be.

    >>> mesh_sizes(1), mesh_sizes(2), mesh_sizes(4), mesh_sizes(8)
    (((1, 1),), ((2, 1), (1, 2)), ((4, 1), (1, 4), (2, 2)), ((8, 1), (1, 8), (4, 2)))
    """
    ep = 2 ** (int(math.log2(devices)) // 2)
    return tuple(dict.fromkeys([(devices, 1), (1, devices), (devices // ep, ep)]))


def mesh_of(tp: int, ep: int, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of Auto axes over the first of the devices."""
    auto = (AxisType.Auto,) * 2
    return jax.make_mesh((tp, ep), ("tp", "ep"), axis_types=auto, devices=devices[: tp * ep])


def measure_scaling(
    layers: Layers, devices: int, samples: int, measured: Callable[[MeshTiming], None]
) -> ScalingResult:
    """Times `quantize_params` on the meshes of 1, 2, 4, ... devices, compiled and with parameters that are there.

    `measured` is called with each as it is done: compiling for a mesh can take minutes.
    """
    meshes = []
    for tp, ep in [size for count in device_counts(devices) for size in mesh_sizes(count)]:
        meshes.append(_measured(layers, tp, ep, samples))
        measured(meshes[-1])
    return ScalingResult(layers, tuple(meshes))


def _measured(layers: Layers, tp: int, ep: int, samples: int) -> MeshTiming:
    mesh = mesh_of(tp, ep, jax.devices())
    _, host = _timed(dataclasses.replace(TINY, layers=layers.layers), mesh, samples)
    compile_seconds, timing = _timed(layers, mesh, samples)
    return MeshTiming(tp, ep, timing, compile_seconds, host)


def _timed(layers: Layers, mesh: Mesh, samples: int) -> tuple[float, Timing]:
    """Seconds of the first call and of later ones."""
    params = jax.block_until_ready(layers.drawn(mesh))
    plan = layers.plan(params)
    seconds = [_seconds(lambda: jaxfp4.quantize_params(params, plan)) for _ in range(samples + 2)]
    return seconds[0], Timing.of(seconds[2:])


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _cpu() -> jax.Device:
    try:
        return jax.devices("cpu")[0]
    except RuntimeError as error:
        raise CommandError(
            f"digest: wanted the CPU beside the accelerator, to compare with, found none ({error}); add cpu to "
            "JAX_PLATFORMS, or leave the variable unset"
        ) from None


def measure_digests(devices: int, layers: Layers) -> DigestResult:
    """Quantizes one model on one device, on every mesh and on the CPU of this process."""
    values = logical_values(layers)
    plan = layers.plan(jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), values))

    def digest_of(params: Parameters) -> str:
        return jaxfp4.digest(jaxfp4.quantize_params(params, plan))

    first, cpu = jax.devices()[0], _cpu()
    found = {f"{first.platform}, one device": digest_of(jax.device_put(values, first))}
    for tp, ep in [size for count in device_counts(devices) for size in mesh_sizes(count)]:
        mesh = mesh_of(tp, ep, jax.devices())
        found[f"{first.platform}, tp={tp} ep={ep}"] = digest_of(layers.placed(values, mesh))
    if first.platform != "cpu":
        found["cpu, one device"] = digest_of(jax.device_put(values, cpu))
    return DigestResult(found)
