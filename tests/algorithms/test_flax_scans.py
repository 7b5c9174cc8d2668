"""Flax's own scans over layers, quantized block by block, against the same layers in a list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxfp4
from jaxfp4.algorithms.inputs import leaves_for
from jaxfp4.algorithms.layers import layers_apart

L, D = 3, 64
X = [jnp.asarray(np.random.default_rng(i).normal(size=(16, D)), jnp.float32) for i in range(2)]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.Dense(96, name="up")(nn.RMSNorm(name="norm")(x))
        return x + nn.Dense(D, name="down")(nn.gelu(h)), None


class Linen(nn.Module):
    axis: int
    remat: bool

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        scan = nn.scan(block, variable_axes={"params": self.axis}, split_rngs={"params": True}, length=L)
        return scan(name="layers")(x, None)[0]


def linen(axis, remat):
    module = Linen(axis, remat)
    apply, params = jaxfp4.from_flax(module, module.init(jax.random.key(0), X[0]))
    layers = [jax.tree.map(lambda w, i=i: jnp.take(w, i, axis), params["layers"]) for i in range(L)]

    def one(x, p):
        return Block().apply({"params": p}, x, None)[0]

    return apply, params, layers, one, axis


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        self.up, self.down = nnx.Linear(D, 96, rngs=rngs), nnx.Linear(96, D, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Stacked(nnx.Module):
    def __init__(self, rngs, remat):
        self.layers = nnx.vmap(Layer, in_axes=(0,), out_axes=0)(rngs.split(L))
        self.remat = remat

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            call = nnx.remat(Layer.__call__) if self.remat else Layer.__call__
            return call(layer, x)

        return through(x, self.layers)


def of_nnx(remat):
    apply, params = jaxfp4.from_flax(Stacked(nnx.Rngs(0), remat))
    layers = [jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(L)]
    one, _ = jaxfp4.from_flax(Layer(nnx.Rngs(0)))
    return apply, params, layers, lambda x, p: one(p, x), 0


@pytest.mark.parametrize(
    "make, options",
    [(linen, (0, False)), (linen, (1, True)), (of_nnx, (False,)), (of_nnx, (True,))],
    ids=["linen", "linen, axis 1, remat", "nnx", "nnx, remat"],
)
def test_scans_are_lists_of_layers(make, options):
    apply, params, layers, one, axis = make(*options)

    def listed(params, x):
        for p in params["layers"]:
            x = one(x, p)
        return x

    plan = jaxfp4.plan(apply, params, X[0], recipe="nvfp4_gptq_max")
    model = layers_apart(apply, plan, leaves_for(plan, params), X)
    kernels = {e.weight.leaf for e in plan.quantized}
    assert len(kernels) == 2 and kernels <= model.split.axes.keys()
    found = jaxfp4.weights(jaxfp4.quantize_sequentially(apply, params, X, plan, progress=False))
    apart = jaxfp4.plan(listed, {"layers": layers}, X[0], recipe="nvfp4_gptq_max")
    wanted = jaxfp4.weights(
        jaxfp4.quantize_sequentially(listed, {"layers": layers}, X, apart, progress=False),
    )
    for path, weight in found.items():
        name = path.removeprefix("layers/")
        of_layers = [wanted[f"layers/{i}/{name}"] for i in range(L)]
        scales = np.stack([w.input_scale for w in of_layers])
        np.testing.assert_allclose(np.ravel(weight.input_scale), scales, rtol=1e-5)
        values = np.stack([w.weight.dequantize() for w in of_layers], axis)
        assert np.mean(np.asarray(weight.weight.dequantize()) != values) < 0.005
