"""A program: quantizes layers that wait in a memory and prints figures in bytes and seconds as JSON."""

import json
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax
from jax.sharding import SingleDeviceSharding

import jaxfp4

LAYERS, SIZE = 24, 4096


def scanned(params, x):
    return lax.scan(lambda x, w: (x + jax.nn.relu(x @ w), None), x, params["w"])[0]


def listed(params, x):
    for w in params["w"]:
        x = x + jax.nn.relu(x @ w)
    return x


def main(form: str, recipe: str, memory_kind: str) -> None:
    device = jax.devices()[0]
    place = SingleDeviceSharding(device, memory_kind=memory_kind)
    rng = np.random.default_rng(0)
    one = (rng.normal(size=(SIZE, SIZE)) / SIZE).astype(ml_dtypes.bfloat16)
    layers = [np.roll(one, i, 0) for i in range(LAYERS)]
    params = {"w": jax.device_put(np.stack(layers) if form == "scanned" else layers, place)}
    jax.block_until_ready(params)
    batches = [jnp.asarray(rng.normal(size=(512, SIZE)), jnp.bfloat16) for _ in range(4)]
    apply = {"scanned": scanned, "listed": listed}[form]
    plan = jaxfp4.plan(apply, params, batches[0], recipe=recipe)
    before = device.memory_stats()
    start = time.perf_counter()
    qparams = jax.block_until_ready(jaxfp4.quantize_sequentially(apply, params, batches, plan, progress=False))
    seconds = time.perf_counter() - start
    after = device.memory_stats()
    figures = {
        "parameters": LAYERS * one.nbytes,
        "layer": one.nbytes,
        "before": before["bytes_in_use"],
        "peak_before": before["peak_bytes_in_use"],
        "peak": after["peak_bytes_in_use"],
        "after": after["bytes_in_use"],
        "quantized": sum(x.nbytes for x in jax.tree.leaves(qparams)),
        "seconds": seconds,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
