"""One of two processes that export one tree together, three times: `python two_processes.py PORT PROCESS DIRECTORY`.

Into the folders `failing/out`, with a disk that is full on process 1, `existing/out`, and `good/out` of DIRECTORY. What
each export raised goes to `DIRECTORY/PROCESS.json`: `[type, message]` by folder, null if it raised nothing.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

PROCESSES, DEVICES = 2, 2
FOLDERS = ("failing", "existing", "good")


def tree(place):
    """Weights of every kind, put where `place(array, *spec)` says."""
    from jaxfp4.tensors import QuantizedWeight, quantize

    key = jax.random.key(0)
    draw = [
        jax.random.normal(k, shape)
        for k, shape in zip(jax.random.split(key, 4), [(64, 32)] * 2 + [(4, 64, 32)] * 2, strict=True)
    ]
    scale = jnp.float32(0.5)
    amaxes = jnp.max(jnp.abs(draw[3]), axis=(1, 2), keepdims=True)
    return {
        "columns": QuantizedWeight(quantize(place(draw[0], None, ("ep", "tp")), 0), place(scale)),
        "rows": QuantizedWeight(quantize(place(draw[1], ("ep", "tp")), 0), place(scale)),
        "experts": QuantizedWeight(quantize(place(draw[2], "ep", None, "tp"), 1)),
        "own_scales": QuantizedWeight(quantize(place(draw[3], "ep", "tp"), 1, global_amax=place(amaxes, "ep"))),
        "norm": place(jnp.arange(16.0), "tp"),
        "embedding": place(jnp.arange(64.0).reshape(8, 8), "ep"),
        "host": np.arange(6.0, dtype=np.float32),
    }


NAMES = {"experts": "layer.experts.{expert}.up", "own_scales": "layer.experts.{expert}.gate"}


def main(port, process, directory):
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, int(process))
    from jaxfp4.checkpoints import export_checkpoint

    mesh = jax.make_mesh((2, 2), ("ep", "tp"), axis_types=(AxisType.Auto,) * 2)

    def place(array, *spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    values, raised = tree(place), {}
    for folder in FOLDERS:
        failing = folder == "failing" and process == "1"
        exported = values | {"host": _Failing(values["host"])} if failing else values
        try:
            export_checkpoint(exported, Path(directory, folder, "out"), names=NAMES, config={"model_type": "x"})
            raised[folder] = None
        except OSError as error:
            raised[folder] = [type(error).__name__, str(error)]
    Path(directory, f"{process}.json").write_text(json.dumps(raised))


class _Failing(np.ndarray):
    """An array on one process whose disk is full."""

    def __new__(cls, values):
        return values.view(cls)

    def __getitem__(self, index):
        raise OSError(28, "No space left on device")


if __name__ == "__main__":
    main(*sys.argv[1:])
