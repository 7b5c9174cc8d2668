"""What a weight does in the model is found from dataflow, whatever its name."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxfp4.recipes import Role, plan

D, F, E, V, T = 32, 16, 4, 50, 6
TOKENS = jnp.arange(T)


def _draw(**shapes):
    return {k: jnp.ones(s) for k, s in shapes.items()}


def attention(p, x, heads=2):
    q, k, v = ((x @ p[n]).reshape(T, heads, -1) for n in "qkv")
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k), axis=-1)
    return jnp.einsum("hts,shd->thd", weights, v).reshape(T, -1) @ p["o"]


def einsum_attention(p, x):
    q, k, v = (jnp.einsum("td,dhk->thk", x, p[n].reshape(D, 2, 16)) for n in "qkv")
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k), axis=-1)
    return jnp.einsum("hts,shd,hdm->tm", weights, v, p["o"].reshape(2, 16, D))


def builtin_attention(p, x):
    q, k, v = ((x @ p[n]).reshape(1, T, 2, -1) for n in "qkv")
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(T, -1) @ p["o"]


def mlp(p, x):
    return jax.nn.silu(x @ p["gate"]) * (x @ p["up"]) @ p["down"]


def experts(p, x):
    chance = jax.nn.softmax(x @ p["chooser"])
    value, index = lax.top_k(chance, 2)
    mix = (jax.nn.one_hot(index, E) * value[..., None]).sum(1)
    hidden = jax.nn.silu(jnp.einsum("td,edf->etf", x, p["gate"])) * jnp.einsum("td,edf->etf", x, p["up"])
    return jnp.einsum("etd,te->td", jnp.einsum("etf,efd->etd", hidden, p["down"]), mix)


ATTENTION = dict.fromkeys("qkvo", (D, D))
MLP = {"gate": (D, F), "up": (D, F), "down": (F, D)}
EXPERTS = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D), "chooser": (D, E)}
EXPERT_ROLES = dict.fromkeys(("gate", "up", "down"), Role.EXPERT) | {"chooser": Role.ROUTER}


@pytest.mark.parametrize(
    "block, shapes, roles",
    [
        (attention, ATTENTION, dict.fromkeys("qkvo", Role.ATTENTION)),
        (einsum_attention, ATTENTION, dict.fromkeys("qkvo", Role.ATTENTION)),
        (builtin_attention, ATTENTION, dict.fromkeys("qkvo", Role.ATTENTION)),
        (mlp, MLP, dict.fromkeys(MLP, Role.LINEAR)),
        (experts, EXPERTS, EXPERT_ROLES),
    ],
)
@pytest.mark.parametrize("loop", [False, True], ids=["once", "scanned"])
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_roles(block, shapes, roles, loop, tied):
    def apply(p, tokens):
        x = p["embed"][tokens]
        if loop:
            x = lax.scan(lambda c, layer: (c + jax.checkpoint(block)(layer, c), None), x, p["block"])[0]
        else:
            x = x + block(p["block"], x)
        return x @ (p["embed"].T if tied else p["out"])

    params = _draw(embed=(V, D)) | ({} if tied else _draw(out=(D, V)))
    params["block"] = _draw(**{k: (3, *s) if loop else s for k, s in shapes.items()})
    result = plan(apply, params, TOKENS)
    found = {e.path: e.weight.role for e in result.entries}
    assert found == {"embed": Role.EMBEDDING} | ({} if tied else {"out": Role.HEAD}) | {
        f"block/{k}": role for k, role in roles.items()
    }
    kept = {Role.EMBEDDING, Role.HEAD, Role.ROUTER}
    assert {e.path for e in result.quantized} == {path for path, role in found.items() if role not in kept}


def test_head_by_name():
    """Without an embedding table among the parameters the head is known by its name."""
    params = _draw(w=(D, D)) | {"lm_head": _draw(kernel=(D, V))}
    result = plan(lambda p, x: jnp.tanh(x @ p["w"]) @ p["lm_head"]["kernel"], params, jnp.ones((T, D)))
    assert {e.path: e.weight.role for e in result.entries} == {"w": Role.LINEAR, "lm_head/kernel": Role.HEAD}


def test_embedding_by_one_hot():
    def apply(p, tokens):
        return jax.nn.one_hot(tokens, V) @ p["table"] @ p["w"]

    result = plan(apply, _draw(table=(V, D), w=(D, F)), TOKENS)
    assert {e.path: e.weight.role for e in result.entries} == {"table": Role.EMBEDDING, "w": Role.LINEAR}


@pytest.mark.parametrize("choose", [jnp.argmax, lambda x, axis: jnp.argsort(x, axis)[:, -1]], ids=["argmax", "sort"])
def test_router_that_gathers_expert_weights(choose):
    def apply(p, x):
        chosen = choose(x @ p["chooser"], axis=-1)
        return jnp.einsum("td,tdf->tf", x, p["up"][chosen])

    result = plan(apply, _draw(chooser=(D, E), up=(E, D, F)), jnp.ones((T, D)))
    assert {e.path: e.weight.role for e in result.entries} == {"chooser": Role.ROUTER, "up": Role.EXPERT}


def test_parameters_in_lists():
    """Layers in a python list are named by number, and are siblings only within a layer."""

    def apply(p, x):
        for layer in p["layers"]:
            x = x + mlp(layer, x)
        return x

    result = plan(apply, {"layers": [_draw(**MLP) for _ in range(2)]}, jnp.ones((T, D)))
    assert {e.path: e.weight.siblings for e in result.quantized} == {
        f"layers/{i}/{k}": (f"layers/{i}/down",) if k == "down" else (f"layers/{i}/gate", f"layers/{i}/up")
        for i in range(2)
        for k in MLP
    }


def test_a_batch_of_heads_is_no_stack_of_experts():
    def apply(p, x):
        q, k, v = (jnp.einsum("td,hdk->htk", x, p[n]) for n in "qkv")
        mixed = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v
        return jnp.einsum("htk,hkd->htd", mixed, p["o"]).sum(0)

    result = plan(apply, _draw(q=(2, D, 16), k=(2, D, 16), v=(2, D, 16), o=(2, 16, D)), jnp.ones((T, D)))
    assert {e.weight.role for e in result.entries} == {Role.ATTENTION}
    assert {e.weight.expert_axes for e in result.entries} == {()}
