"""Small models, one for each way in which a parameter reaches its contraction, and what the walk must find in them.

With whole numbers as data every sum is exact, so the amaxes written here by hand hold to the last bit.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxfp4.recipes import Recipe, Role, Rule, Scheme

EVERYTHING = Recipe("everything", (Rule(Scheme.W4A4, roles=frozenset(Role)),))

D, F, E, L, T = 32, 16, 4, 3, 6
"""Model width, inner width, experts, layers, tokens."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What the walk finds of one weight."""

    contracted: tuple[int, ...]
    layers: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    siblings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """`apply(params, *args)` with parameters of `shapes`; `amaxes` computes in numpy what each weight meets."""

    apply: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    found: dict[str, Found]
    amaxes: Callable[..., dict[str, Any]]
    x: tuple[int, ...] = (T, D)
    more_args: tuple[Any, ...] = ()

    def params(self, whole_numbers: bool = False) -> dict[str, jax.Array]:
        rng = np.random.default_rng(7)
        return {k: jnp.asarray(_draw(rng, s, whole_numbers, 2), jnp.float32) for k, s in self.shapes.items()}

    def args(self, whole_numbers: bool = False, seed: int = 8) -> tuple[Any, ...]:
        rng = np.random.default_rng(seed)
        return (jnp.asarray(_draw(rng, self.x, whole_numbers, 9), jnp.float32), *self.more_args)


def _draw(rng: np.random.Generator, shape: tuple[int, ...], whole_numbers: bool, limit: int) -> np.ndarray:
    return rng.integers(1 - limit, limit, shape) if whole_numbers else rng.normal(size=shape) / 4


CASES: dict[str, Case] = {}


def amax(x: Any, axes: tuple[int, ...] | None = None) -> Any:
    """The largest magnitude over all axes, or over these."""
    return np.abs(np.asarray(x, np.float32)).max(axes)


def view(name, shape, apply, contracted, x=(T, D), more_args=()):
    """One weight `w`, not stacked, that meets the model's input: `apply(w, x)`."""
    CASES[name] = Case(
        lambda p, x, *more: apply(p["w"], x, *more),
        {"w": shape},
        {"w": Found(contracted, siblings=("w",))},
        lambda p, x, *more: {"w": amax(x)},
        x,
        more_args,
    )


# A weight seen through casts and changes of shape.

view("plain", (D, F), lambda w, x: x @ w, (0,))
view("cast", (D, F), lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), (0,))
view("transpose", (F, D), lambda w, x: x @ w.T, (1,))
view("weight on the left", (F, D), lambda w, x: w @ x.T, (1,))
view("weight on the left, transposed", (D, F), lambda w, x: w.T @ x.T, (0,))
view("reshape splits output", (D, F), lambda w, x: jnp.einsum("td,dhk->thk", x, w.reshape(D, 4, 4)), (0,))
view(
    "reshape splits contraction",
    (D, F),
    lambda w, x: jnp.einsum("tab,abf->tf", x.reshape(T, 4, 8), w.reshape(4, 8, F)),
    (0,),
)
view("reshape merges contraction", (4, 8, F), lambda w, x: x @ w.reshape(D, F), (0, 1))
view("reshape merges output", (D, 4, 4), lambda w, x: x @ w.reshape(D, F), (0,))
view("two axes", (4, 8, F), lambda w, x: jnp.einsum("thk,hkf->tf", x, w), (0, 1), (T, 4, 8))
view(
    "two axes, other order",
    (4, 8, F),
    lambda w, x: lax.dot_general(x, w, (((2, 1), (1, 0)), ((), ()))),
    (0, 1),
    (T, 4, 8),
)
view(
    "two axes, permuted activation",
    (4, 8, F),
    lambda w, x: lax.dot_general(x, w, (((0, 2), (1, 0)), ((), ()))),
    (0, 1),
    (8, T, 4),
)
view("two axes apart", (4, F, 8), lambda w, x: jnp.einsum("thk,hfk->tf", x, w), (0, 2), (T, 4, 8))
view("head_dim 24", (D, 2, 24), lambda w, x: jnp.einsum("td,dhk->thk", x, w), (0,))
view("head_dim 24 contracted", (2, 24, F), lambda w, x: jnp.einsum("thk,hkf->tf", x, w), (0, 1), (T, 2, 24))
view("squeeze", (1, D, F), lambda w, x: x @ jnp.squeeze(w, 0), (1,))
view("expand_dims", (D, F), lambda w, x: jnp.einsum("btd,bdf->btf", x[None], w[None]), (0,))
view(
    "broadcast batch",
    (D, F),
    lambda w, x: jnp.einsum("btd,bdf->btf", x, jnp.broadcast_to(w, (3, D, F))),
    (0,),
    (3, T, D),
)
view("optimization_barrier", (D, F), lambda w, x: x @ lax.optimization_barrier((w, x))[0], (0,))
view("checkpoint_name", (D, F), lambda w, x: x @ checkpoint_name(w, "w"), (0,))
view("reduce_precision", (D, F), lambda w, x: x @ lax.reduce_precision(w, 8, 7), (0,))
view("length-1 stack", (1, D, D), lambda w, x: lax.scan(lambda c, p: (c @ p, None), x, w)[0], (1,))


# Calls.


@jax.custom_jvp
def _with_jvp(x, w):
    return jnp.tanh(x) @ w


_with_jvp.defjvp(lambda primals, tangents: (_with_jvp(*primals), tangents[0] @ primals[1]))


@jax.custom_vjp
def _with_vjp(x, w):
    return x @ w


_with_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

_save_dots = jax.checkpoint_policies.dots_saveable

view("jit", (D, F), lambda w, x: jax.jit(lambda x, w: x @ w)(x, w), (0,))
view("jit in jit", (D, F), lambda w, x: jax.jit(lambda x, w: jax.jit(jnp.matmul)(x, w))(x, w), (0,))
view(
    "jit that returns the weight",
    (F, D),
    lambda w, x: x @ jax.jit(lambda w: w.T.astype(jnp.bfloat16))(w).astype(x.dtype),
    (1,),
)
view("checkpoint", (D, F), lambda w, x: jax.checkpoint(lambda w: x @ w)(w), (0,))
view(
    "checkpoint with policy", (D, F), lambda w, x: jax.checkpoint(lambda w: jnp.tanh(x @ w), policy=_save_dots)(w), (0,)
)
view("checkpoint that returns the weight", (F, D), lambda w, x: x @ jax.checkpoint(lambda w: w.T)(w), (1,))
view("custom_vjp", (D, F), lambda w, x: _with_vjp(x, w), (0,))

CASES["custom_jvp"] = Case(
    lambda p, x: _with_jvp(x, p["w"]),
    {"w": (D, F)},
    {"w": Found((0,), siblings=("w",))},
    lambda p, x: {"w": np.asarray(jnp.abs(jnp.tanh(x)).max())},
)


# One of a stack of experts.


def one_expert(name, apply, number=1, shape=(E, D, F), axis=0, contracted=(1,), more_args=()):
    """`apply(w, x)` contracts the model's input with entry `number` of the stack `w`."""

    def amaxes(p, x, *more):
        expected = np.zeros(shape[axis], np.float32)
        expected[number] = amax(x)
        return {"w": expected}

    stack = {"experts": (axis,)} if apply.__name__ != "layer" else {"layers": (axis,)}
    CASES[name] = Case(
        lambda p, x, *more: apply(p["w"], x, *more),
        {"w": shape},
        {"w": Found(contracted, siblings=("w",), **stack)},
        amaxes,
        more_args=more_args,
    )


def _layer(apply):
    """Marks a case whose index is no sign of experts: a position from outside is taken for a layer."""

    def layer(w, x, *more):
        return apply(w, x, *more)

    return layer


one_expert("static slice", lambda w, x: x @ w[1])
one_expert("static slice, last", lambda w, x: x @ w[-1], 3)
one_expert("static slice of axis 1", lambda w, x: x @ w[:, 2], 2, (D, E, F), 1, (0,))
one_expert("lax.slice and reshape", lambda w, x: x @ lax.slice_in_dim(w, 2, 3).reshape(D, F), 2)
one_expert("lax.split", lambda w, x: x @ lax.split(w, (1, 1, 2))[1][0])
one_expert("lax.index_in_dim", lambda w, x: x @ lax.index_in_dim(w, 3, keepdims=False), 3)
one_expert(
    "dynamic_slice",
    _layer(lambda w, x, i: x @ lax.dynamic_slice(w, (i, 0, 0), (1, D, F))[0]),
    2,
    more_args=(jnp.int32(2),),
)
one_expert(
    "dynamic_index_in_dim",
    _layer(lambda w, x, i: x @ lax.dynamic_index_in_dim(w, i, keepdims=False)),
    2,
    more_args=(jnp.int32(2),),
)
one_expert("gather, scalar", _layer(lambda w, x, i: x @ w[i]), 3, more_args=(jnp.int32(3),))
one_expert("gather, negative scalar", _layer(lambda w, x, i: x @ w[i]), 3, more_args=(jnp.int32(-1),))
one_expert("take, scalar", _layer(lambda w, x, i: x @ jnp.take(w, i, axis=0)), 0, more_args=(jnp.int32(0),))

_ROUTES = jnp.array([0, 2, 2, 0, 0, 2], jnp.int32)


def _by_route(p, x, *more):
    """Each token's amax, at the expert it goes to."""
    expected = np.zeros(E, np.float32)
    np.maximum.at(expected, np.asarray(_ROUTES), np.abs(np.asarray(x)).max(-1))
    return {"w": expected}


def stack(name, apply, found=None, shapes=None, amaxes=_by_route, x=(T, D), more_args=()):
    """A stack of experts `w`, or whatever is stated."""
    shapes = shapes or {"w": (E, D, F)}
    found = found or {"w": Found((1,), experts=(0,), siblings=("w",))}
    CASES[name] = Case(apply, shapes, found, amaxes, x, more_args)


stack("gather, vector", lambda p, x, r: jnp.einsum("td,tdf->tf", x, p["w"][r]), more_args=(_ROUTES,))
stack("take, vector", lambda p, x, r: jnp.einsum("td,tdf->tf", x, jnp.take(p["w"], r, axis=0)), more_args=(_ROUTES,))
stack("gather, constant vector", lambda p, x: jnp.einsum("td,tdf->tf", x, p["w"][np.asarray(_ROUTES)]))
stack(
    "gather, matrix",
    lambda p, x, r: jnp.einsum("abd,abdf->abf", x.reshape(2, 3, D), p["w"][r.reshape(2, 3)]),
    more_args=(_ROUTES,),
)
stack(
    "gather, matrix read transposed",
    lambda p, x, r: jnp.einsum("abd,badf->abf", x.reshape(2, 3, D), p["w"][r.reshape(2, 3).T]),
    more_args=(_ROUTES,),
)

# Experts in contractions of their own.


def _each(p, x):
    """Every expert meets every token."""
    return {"w": np.full(E, amax(x))}


stack(
    "experts as batch",
    lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"]),
    amaxes=lambda p, x: {"w": amax(x, (1, 2))},
    x=(E, T, D),
)
stack(
    "experts as second batch",
    lambda p, x: jnp.einsum("bted,edf->btef", x, p["w"]),
    amaxes=lambda p, x: {"w": amax(x, (0, 1, 3))},
    x=(2, T, E, D),
)
stack(
    "experts in the middle",
    lambda p, x: jnp.einsum("etd,def->etf", x, p["w"]),
    {"w": Found((0,), experts=(1,), siblings=("w",))},
    {"w": (D, E, F)},
    lambda p, x: {"w": amax(x, (1, 2))},
    (E, T, D),
)
stack(
    "two expert axes",
    lambda p, x: jnp.einsum("getd,gedf->getf", x, p["w"]),
    {"w": Found((2,), experts=(0, 1), siblings=("w",))},
    {"w": (2, 3, D, F)},
    lambda p, x: {"w": amax(x, (2, 3))},
    (2, 3, T, D),
)
stack(
    "two expert axes merged",
    lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"].reshape(6, D, F)),
    {"w": Found((2,), experts=(0, 1), siblings=("w",))},
    {"w": (2, 3, D, F)},
    lambda p, x: {"w": amax(x, (1, 2)).reshape(2, 3)},
    (6, T, D),
)
stack(
    "two expert axes, activation the other way",
    lambda p, x: jnp.einsum("egtd,gedf->getf", x, p["w"]),
    {"w": Found((2,), experts=(0, 1), siblings=("w",))},
    {"w": (2, 3, D, F)},
    lambda p, x: {"w": amax(x, (2, 3)).T},
    (3, 2, T, D),
)
stack(
    "slice of experts",
    lambda p, x: jnp.einsum("etd,edf->etf", x, p["w"][1:3]),
    amaxes=lambda p, x: {"w": np.array([0, *amax(x, (1, 2)), 0], np.float32)},
    x=(2, T, D),
)


def _gated(p, x):
    gate = jnp.einsum("td,edf->etf", x, p["gate"])
    up = jnp.einsum("td,edf->etf", x, p["up"])
    return jnp.einsum("etf,efd->etd", jax.nn.relu(gate) * up, p["down"]).sum(0)


def _gated_amaxes(p, x):
    gate, up = (np.einsum("td,edf->etf", x, p[k]) for k in ("gate", "up"))
    inner = np.maximum(gate, 0) * up
    return {"gate": np.full(E, amax(x)), "up": np.full(E, amax(x)), "down": np.abs(inner).max((1, 2))}


_GATED = {
    "gate": Found((1,), experts=(0,), siblings=("gate", "up")),
    "up": Found((1,), experts=(0,), siblings=("gate", "up")),
    "down": Found((1,), experts=(0,), siblings=("down",)),
}
_GATED_SHAPES = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
stack("experts as output", _gated, _GATED, _GATED_SHAPES, _gated_amaxes)


def _gated_unrolled(p, x):
    return sum(jax.nn.relu(x @ p["gate"][e]) * (x @ p["up"][e]) @ p["down"][e] for e in range(E))


def _gated_scanned(p, x):
    def step(total, expert):
        return total + jax.nn.relu(x @ expert["gate"]) * (x @ expert["up"]) @ expert["down"], None

    return lax.scan(step, jnp.zeros_like(x), p)[0]


stack("experts in a python loop", _gated_unrolled, _GATED, _GATED_SHAPES, _gated_amaxes)
stack("experts in a scan", _gated_scanned, _GATED, _GATED_SHAPES, _gated_amaxes)
stack(
    "experts under vmap",
    lambda p, x: jax.vmap(lambda w, x: x @ w)(p["w"], x),
    amaxes=lambda p, x: {"w": amax(x, (1, 2))},
    x=(E, T, D),
)

# ragged_dot.


def _ragged_amaxes(sizes):
    def amaxes(p, x, *more):
        ends = np.cumsum(sizes)
        rows = [np.asarray(x)[end - n : end] for end, n in zip(ends, sizes, strict=True)]
        return {"w": np.array([np.abs(r).max(initial=0) for r in rows], np.float32)}

    return amaxes


for _name, _sizes in {
    "ragged_dot": (1, 2, 1, 2),
    "ragged_dot, empty groups": (0, 4, 0, 2),
    "ragged_dot, rows behind the last group": (1, 0, 2, 1),
    "ragged_dot, no rows at all in groups": (0, 0, 0, 0),
}.items():
    stack(
        _name,
        lambda p, x, s: lax.ragged_dot(x, p["w"], s),
        amaxes=_ragged_amaxes(_sizes),
        more_args=(jnp.array(_sizes, jnp.int32),),
    )


# Stacked layers.

_LAYERED = {"w": Found((1,), layers=(0,), siblings=("w",))}
_LAYERED_SHAPES = {"w": (L, D, D)}


def _halved(x):
    return x * 0.5


def _layer_amaxes(order=range(L), get=lambda w, i: w[i]):
    def amaxes(p, x, *more):
        c, seen = np.asarray(x), {}
        for i in order:
            seen[i] = amax(c)
            c = c @ np.asarray(get(p["w"], i)) * np.float32(0.5)
        return {"w": np.array([seen.get(i, 0) for i in range(L)], np.float32)}

    return amaxes


def layered(name, apply, order=range(L), shapes=None, found=None, get=lambda w, i: w[i], more_args=()):
    """Layers `c = c @ w[i] / 2`."""
    stack(
        name,
        lambda p, x, *more: apply(p["w"], x, *more),
        found or _LAYERED,
        shapes or _LAYERED_SHAPES,
        _layer_amaxes(order, get),
        more_args=more_args,
    )


def _step(c, w):
    return _halved(c @ w), None


def _fori(w, x):
    return lax.fori_loop(0, L, lambda i, c: _halved(c @ w[i]), x)


def _fori_static_slice(w, x):
    return lax.fori_loop(0, L, lambda i, c: _halved(c @ lax.dynamic_index_in_dim(w, i, keepdims=False)), x)


def _while(w, x, n):
    return lax.while_loop(lambda s: s[0] < n, lambda s: (s[0] + 1, _halved(s[1] @ w[s[0]])), (0, x))[1]


def _scan_of_index(w, x):
    return lax.scan(lambda c, i: (_halved(c @ w[i]), None), x, jnp.arange(L))[0]


def _python_loop(w, x):
    for i in range(L):
        x = _halved(x @ w[i])
    return x


layered("scan", lambda w, x: lax.scan(_step, x, w)[0])
layered("scan, reversed", lambda w, x: lax.scan(_step, x, w, reverse=True)[0], range(L)[::-1])
layered("scan, unrolled", lambda w, x: lax.scan(_step, x, w, unroll=2)[0])
layered("scan of a remat", lambda w, x: lax.scan(jax.checkpoint(_step), x, w)[0])
layered("scan of a cast stack", lambda w, x: lax.scan(_step, x, w.astype(jnp.bfloat16).astype(jnp.float32))[0])
layered(
    "scan over axis 1",
    lambda w, x: lax.scan(_step, x, jnp.moveaxis(w, 1, 0))[0],
    shapes={"w": (D, L, D)},
    found={"w": Found((0,), layers=(1,), siblings=("w",))},
    get=lambda w, i: w[:, i],
)
layered(
    "scan over axis 2",
    lambda w, x: lax.scan(_step, x, jnp.moveaxis(w, 2, 0))[0],
    shapes={"w": (D, D, L)},
    found={"w": Found((0,), layers=(2,), siblings=("w",))},
    get=lambda w, i: w[..., i],
)
layered("scan over indices", _scan_of_index)
layered("fori_loop", _fori)
layered("fori_loop, dynamic_index_in_dim", _fori_static_slice)
layered("while_loop", _while, more_args=(jnp.int32(L),))
layered("while_loop that stops early", _while, range(2), more_args=(jnp.int32(2),))
layered("python loop", _python_loop)
layered(
    "python loop, backwards",
    lambda w, x: functools.reduce(lambda c, i: _halved(c @ w[i]), range(L)[::-1], x),
    range(L)[::-1],
)


def _nested_scan(p, x):
    return lax.scan(lambda c, group: (lax.scan(_step, c, group)[0], None), x, p["w"])[0]


def _nested_amaxes(p, x):
    flat = {"w": np.asarray(p["w"]).reshape(4, D, D)}
    c, seen = np.asarray(x), []
    for i in range(4):
        seen.append(amax(c))
        c = c @ flat["w"][i] * np.float32(0.5)
    return {"w": np.array(seen, np.float32).reshape(2, 2)}


stack(
    "nested scan", _nested_scan, {"w": Found((2,), layers=(0, 1), siblings=("w",))}, {"w": (2, 2, D, D)}, _nested_amaxes
)


def _moe_layers(moe):
    def apply(p, x):
        return lax.scan(lambda c, layer: (c + moe(layer, c), None), x, p)[0]

    return apply


def _moe_layers_amaxes(p, x):
    c, seen = np.asarray(x), []
    for i in range(2):
        layer = {k: np.asarray(v)[i] for k, v in p.items()}
        seen.append(_gated_amaxes(layer, c))
        c = c + np.asarray(_gated(layer, c))
    return {k: np.stack([s[k] for s in seen]) for k in p}


for _name, _moe in {"batched": _gated, "scanned": _gated_scanned, "unrolled": _gated_unrolled}.items():
    stack(
        f"layers of {_name} experts",
        _moe_layers(_moe),
        {k: Found((2,), layers=(0,), experts=(1,), siblings=f.siblings) for k, f in _GATED.items()},
        {k: (2, *s) for k, s in _GATED_SHAPES.items()},
        _moe_layers_amaxes,
    )

# Experts in front of layers: the scan runs over the second axis of the stack.


def _experts_before_layers(p, x):
    return lax.scan(lambda c, w: (_halved(jnp.einsum("etd,edf->etf", c, w)), None), x, jnp.moveaxis(p["w"], 1, 0))[0]


def _experts_before_layers_amaxes(p, x):
    c, seen = np.asarray(x), []
    for i in range(L):
        seen.append(amax(c, (1, 2)))
        c = np.einsum("etd,edf->etf", c, np.asarray(p["w"])[:, i]) * np.float32(0.5)
    return {"w": np.stack(seen, 1)}


stack(
    "experts in front of layers",
    _experts_before_layers,
    {"w": Found((2,), layers=(1,), experts=(0,), siblings=("w",))},
    {"w": (E, L, D, D)},
    _experts_before_layers_amaxes,
    (E, T, D),
)

# Branches.


def _branch_amaxes(taken):
    return lambda p, x, i: {"w": amax(x) if taken else np.float32(0)}


for _taken in (True, False):
    stack(
        f"cond, {'taken' if _taken else 'not taken'}",
        lambda p, x, i: lax.cond(i > 0, lambda w, x: x @ w, lambda w, x: x[:, :F] * 2, p["w"], x),
        {"w": Found((0,), siblings=("w",))},
        {"w": (D, F)},
        _branch_amaxes(_taken),
        more_args=(jnp.int32(_taken),),
    )

for _chosen in range(3):
    stack(
        f"switch, branch {_chosen}",
        lambda p, x, i: lax.switch(
            i, [lambda: x @ p["a"], lambda: (x * 2) @ p["b"], lambda: x @ (p["a"] + 0 * p["c"]) @ p["d"]]
        ),
        {"b": Found((0,), siblings=("b",)), "d": Found((0,), siblings=("d",))},
        {"a": (D, F), "b": (D, F), "c": (D, F), "d": (F, F)},
        lambda p, x, i: {"b": amax(x) * 2 * (i == 1), "d": (i == 2) * amax(np.asarray(x) @ np.asarray(p["a"]))},
        more_args=(_chosen,),
    )

# Several weights, and weights used more than once.


def _shared_input(p, x):
    h = (x * 2).astype(jnp.bfloat16)
    q = h @ p["q"].astype(h.dtype)
    k = jnp.einsum("abd,dhk->abhk", h.reshape(2, 3, D), p["k"].astype(h.dtype))
    v = p["v"].astype(jnp.float32).T @ h.astype(jnp.float32).T
    return q, k, v, (x * 2) @ p["other"]


stack(
    "siblings",
    _shared_input,
    {
        **{k: Found((0,), siblings=("k", "q", "v")) for k in ("q", "k", "v")},
        "other": Found((0,), siblings=("other",)),
    },
    {"q": (D, F), "k": (D, 2, 8), "v": (D, F), "other": (D, F)},
    lambda p, x: dict.fromkeys("qkv", amax(x) * 2) | {"other": amax(x) * 2},
)
stack(
    "used twice",
    lambda p, x: (x @ p["w"]) * 0.5 @ p["w"],
    {"w": Found((0,), siblings=("w",))},
    {"w": (D, D)},
    lambda p, x: {"w": max(amax(x), amax(np.asarray(x) @ np.asarray(p["w"]) * np.float32(0.5)))},
)
stack(
    "shared by all steps of a scan",
    lambda p, x: lax.scan(lambda c, _: (_halved(c @ p["w"]), None), x, length=L)[0],
    {"w": Found((0,), siblings=("w",))},
    {"w": (D, D)},
    lambda p, x: {"w": _layer_amaxes()({"w": [p["w"]] * L}, x)["w"].max()},
)
stack(
    "scanned over and used outside",
    lambda p, x: lax.scan(_step, x @ p["w"][2], p["w"])[0],
    _LAYERED,
    _LAYERED_SHAPES,
    lambda p, x: {
        "w": np.maximum(
            _layer_amaxes()(p, np.asarray(x) @ np.asarray(p["w"][2]))["w"], np.array([0, 0, amax(x)], np.float32)
        )
    },
)
