"""Meshes named on the command line, with virtual CPU devices where there is no accelerator."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import jax
from jax.sharding import AxisType, Mesh

from jaxfp4.commands.errors import CommandError


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Axis names with their sizes, as in `tp=4,ep=2`."""

    axes: tuple[tuple[str, int], ...]

    @property
    def devices(self) -> int:
        """How many devices the mesh takes."""
        return math.prod(size for _, size in self.axes)

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in self.axes) or "one device"

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """Reads `tp=4,ep=2`.

        >>> MeshShape.parse("tp=4,ep=2").devices
        8
        """
        axes = []
        for part in text.split(","):
            name, _, size = part.partition("=")
            if not name.strip() or not size.strip().isdecimal() or int(size) < 1:
                raise CommandError(f"--mesh {text}: found {part!r}; wanted axis=size pairs such as tp=4,ep=2")
            axes.append((name.strip(), int(size)))
        if len({name for name, _ in axes}) != len(axes):
            raise CommandError(f"--mesh {text}: an axis is named twice; wanted each once, such as tp=4,ep=2")
        return cls(tuple(axes))


def make_mesh(shape: MeshShape) -> Mesh:
    """A mesh of Auto axes over the first devices. CommandError if there are too few."""
    devices = jax.devices()
    if len(devices) < shape.devices:
        raise CommandError(
            f"--mesh {shape}: needs {shape.devices} devices, found {len(devices)} {devices[0].platform} device(s); "
            "choose a smaller mesh"
        )
    names = tuple(name for name, _ in shape.axes)
    sizes = tuple(size for _, size in shape.axes)
    auto = (AxisType.Auto,) * len(names)
    return jax.make_mesh(sizes, names, axis_types=auto, devices=devices[: shape.devices])


def use_virtual_cpu_devices(count: int, *, cpu_only: bool = False) -> None:
    """Makes JAX show `count` CPU devices; an accelerator is used all the same, unless `cpu_only`.

    Has no effect once JAX has started its devices; `make_mesh` then says if they are too few.
    """
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count)
    if cpu_only:
        jax.config.update("jax_platforms", "cpu")
