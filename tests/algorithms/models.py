"""A small language model over every kind of weight, with its layers stacked for a scan or apart."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxfp4.models import Decoder, DecoderConfig

D, F, E, V, L = 64, 32, 8, 50, 2
HEADS = 4

SHAPES = {
    "q": (D, D),
    "k": (D, HEADS, 16),
    "v": (D, HEADS, 16),
    "o": (HEADS, 16, D),
    "router": (D, E),
    "gate": (E, D, F),
    "up": (E, D, F),
    "down": (E, F, D),
}
SPECS = {
    "q": P(None, "tp"),
    "k": P(None, "tp"),
    "v": P(None, "tp"),
    "o": P("tp"),
    "router": P(),
    "gate": P("ep", None, "tp"),
    "up": P("ep", None, "tp"),
    "down": P("ep", "tp"),
}
"""How a layer is split over the mesh axes `tp` and `ep`."""

QUANTIZED = tuple(n for n in SHAPES if n != "router")


def attention(p, x):
    h = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    q = (h @ p["q"]).reshape(*x.shape[:-1], HEADS, 16)
    k, v = (jnp.einsum("btd,dhk->bthk", h, p[n]) for n in "kv")
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 4)
    return jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", weights, v), p["o"])


def experts(p, x):
    """The best expert of each token, computed for all."""
    h = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    chance = jax.nn.softmax(h @ p["router"])
    taken = jax.nn.one_hot(jnp.argmax(chance, -1), E) * chance.max(-1, keepdims=True)
    inputs = jnp.einsum("btd,bte->ebtd", h, (taken > 0).astype(h.dtype))
    hidden = jax.nn.silu(jnp.einsum("ebtd,edf->ebtf", inputs, p["gate"])) * jnp.einsum(
        "ebtd,edf->ebtf", inputs, p["up"]
    )
    return jnp.einsum("ebtd,bte->btd", jnp.einsum("ebtf,efd->ebtd", hidden, p["down"]), taken)


def block(p, x):
    x = x + attention(p, x)
    return x + experts(p, x)


def scanned(params, tokens):
    """Layers stacked along axis 0."""
    x = params["embed"][tokens]
    x = lax.scan(lambda c, p: (jax.checkpoint(block)(p, c), None), x, params["layers"])[0]
    return x @ params["head"]


def unrolled(params, tokens):
    """Layers in a list."""
    x = params["embed"][tokens]
    for layer in params["layers"]:
        x = block(layer, x)
    return x @ params["head"]


def sliced(params, tokens):
    """Layers stacked along axis 0 and taken out one after the other."""
    x = params["embed"][tokens]
    for i in range(L):
        x = block(jax.tree.map(lambda w, i=i: w[i], params["layers"]), x)
    return x @ params["head"]


def draw(dtype=np.float32) -> dict:
    """Parameters with stacked layers, normal, of different magnitudes in each."""
    rng = np.random.default_rng(0)
    sizes = np.linspace(0.05, 0.1, L)
    layers = {n: rng.normal(size=(L, *s)) * sizes.reshape(L, *[1] * len(s)) for n, s in SHAPES.items()}
    params = {"embed": rng.normal(size=(V, D)), "head": rng.normal(size=(D, V)) / 8, "layers": layers}
    return jax.tree.map(lambda w: w.astype(dtype), params)


def apart(params: dict) -> dict:
    """The same parameters with layers in a list."""
    return params | {"layers": [jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(L)]}


def batches(count: int = 3) -> list[jax.Array]:
    return [jnp.asarray(np.random.default_rng(i).integers(0, V, (4, 8)), jnp.int32) for i in range(count)]


def drawn_decoder(config: DecoderConfig, **types) -> Decoder:
    """The built-in decoder with normal kernels of variance 1 / inputs, drawn by numpy: its own draws are compiled."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **types)))

    def values(path, leaf):
        if path[-1] in ("scale", "bias"):
            return jnp.full(leaf.shape, float(path[-1] == "scale"), leaf.dtype)
        rng = np.random.default_rng(len(drawn))
        inputs = leaf.shape[-1] if path[-1] == "embedding" else leaf.shape[-2]
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(inputs), leaf.dtype)

    drawn = []
    for path, variable in nnx.to_flat_state(shapes):
        drawn.append((path, variable.replace(values(path, variable.get_value()))))
    return nnx.merge(graph, nnx.from_flat_state(drawn))
