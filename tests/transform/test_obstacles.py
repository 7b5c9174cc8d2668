"""Parameters that cannot be quantized: the plan says why, by path."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType

from jaxfp4.recipes import Plan, plan

D, F, E, T = 32, 16, 4, 6
X = jnp.ones((T, D))


def _double(w):
    def kernel(w_ref, out_ref):
        out_ref[...] = w_ref[...] * 2

    return pl.pallas_call(kernel, jax.ShapeDtypeStruct(w.shape, w.dtype), interpret=True)(w)


def _carried(w, x):
    return lax.scan(lambda c, _: ((c[0] @ c[1], c[1].T), None), (x, w), length=2)[0][0]


def _carried_while(w, x):
    return lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] @ s[2], s[2].T), (0, x, w))[1]


def _scanned_and_whole(w, x):
    return lax.scan(lambda c, v: (c @ v + x @ w[0], None), x, w)[0]


def _part_of_a_stack(w, x):
    return lax.scan(lambda c, v: (c @ v, None), x, w[:2])[0]


def _strip_in_shard_map(w, x):
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        lambda w, x: jnp.einsum("td,edf->etf", x, w), mesh=mesh, in_specs=(jax.P("tp"), jax.P()), out_specs=jax.P("tp")
    )(w[1:3], x)


def _split_in_shard_map(w, x):
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        lambda w, x: x @ w, mesh=mesh, in_specs=(jax.P(None, "tp"), jax.P()), out_specs=jax.P(None, "tp")
    )(w.reshape(D, F), x)


def _returned_by_shard_map(w, x):
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,))
    return x @ jax.shard_map(lambda w: w.T, mesh=mesh, in_specs=jax.P("tp"), out_specs=jax.P(None, "tp"))(w)


def _convolution(w, x):
    return lax.conv_general_dilated(x[None], w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))


PART = "a shard_map takes a part of one of its axes, or splits merged ones"
THROUGH = "it reaches its contraction through "
OTHER = "it is contracted with another parameter or a constant"

OBSTACLES = {
    "elementwise": ((D, F), lambda w, x: x @ (w * 2), THROUGH + "'mul'"),
    "elementwise after a slice": ((E, D, F), lambda w, x: x @ jnp.tanh(w[1]), THROUGH + "'tanh'"),
    "elementwise in one of two places": ((D, D), lambda w, x: x @ w + x @ -w, THROUGH + "'neg'"),
    "outer product": ((D, F), lambda w, x: x[:, :, None] * w, "it goes into 'mul', not into a contraction"),
    "convolution": ((3, D, F), _convolution, "it is contracted by a convolution, which NVFP4 engines do not run"),
    "pallas_call": ((D, F), lambda w, x: x @ _double(w), THROUGH + "'pallas_call'"),
    "carried by a scan": ((D, D), _carried, "it is carried through a loop"),
    "carried by a while_loop": ((D, D), _carried_while, "it is carried through a loop"),
    "scanned over and used whole": ((2, D, D), _scanned_and_whole, "a scan that runs over it also uses it whole"),
    "part of a stack scanned over": ((3, D, D), _part_of_a_stack, "a scan runs over a part of one of its axes"),
    "conflicting axes": (
        (D, D),
        lambda w, x: x @ w + x @ w.T,
        "it is contracted along different axes in different places",
    ),
    "unused": ((D, F), lambda w, x: x, "the model does not use it"),
    "used only in shape": ((D, F), lambda w, x: x[:, : w.shape[1]], "the model does not use it"),
    "constant": ((D, F), lambda w, x: x @ (jnp.ones((D, D)) @ w), OTHER),
    "itself": ((D, F), lambda w, x: x @ (w @ w.T), OTHER),
    "broadcast": ((1, F), lambda w, x: x @ jnp.broadcast_to(w, (D, F)), "it is broadcast along its contraction"),
    "no contraction": ((D, F), lambda w, x: jnp.einsum("td,kf->tdkf", x, w), "no axis of it is contracted"),
    "axis split": (
        (E * D, F),
        lambda w, x: jnp.einsum("etd,edf->etf", jnp.broadcast_to(x, (E, T, D)), w.reshape(E, D, F)),
        "its axis 0 is split between batched and contracted dimensions",
    ),
    "ragged, other way round": (
        (T, D),
        lambda w, x: lax.ragged_dot(w, jnp.broadcast_to(x.T, (E, D, T)), jnp.array([1, 2, 1, 2], jnp.int32)),
        "it meets a ragged contraction in a way other than one weight for each group of rows",
    ),
    "chosen by a cond": (
        (E, D, F),
        lambda w, x: x @ lax.cond(x.sum() > 0, lambda: w[0], lambda: w[1]),
        THROUGH + "'cond'",
    ),
    "strided slice": ((2 * D, F), lambda w, x: x @ w[::2], THROUGH + "'slice'"),
    "slice of a slice": ((E, D, F), lambda w, x: x @ w[1:3][0], THROUGH + "'slice'"),
    "reshape across axes": ((24, 64), lambda w, x: x @ w.reshape(D, 48), THROUGH + "'reshape'"),
    "concatenated": ((D, F), lambda w, x: x @ jnp.concatenate([w, w], 1), THROUGH + "'concatenate'"),
    "result of a scan": (
        (2, F, D),
        lambda w, x: x @ lax.scan(lambda c, v: (c, v.T), 0, w)[1][0],
        THROUGH + "'scan'",
    ),
    "part into a shard_map": ((E, D, F), _strip_in_shard_map, PART),
    "merged axes split by a shard_map": ((D, 4, 4), _split_in_shard_map, PART),
    "returned by a shard_map": ((F, D), _returned_by_shard_map, THROUGH + "'shard_map'"),
}


def planned(shape: tuple[int, ...], apply, dtype=jnp.float32) -> Plan:
    """The plan of a model that has a good weight beside the one in question."""
    params = {"bad": jnp.ones(shape, dtype), "good": jnp.ones((D, F))}
    return plan(lambda p, x: (apply(p["bad"], x), x @ p["good"]), params, X)


@pytest.mark.parametrize("name", OBSTACLES)
def test_reason(name):
    shape, apply, reason = OBSTACLES[name]
    result = planned(shape, apply)
    assert [e.path for e in result.quantized] == ["good"]
    assert result.by_path["bad"].reason == reason
    assert f"kept: {reason}" in str(result)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int8, jnp.float8_e4m3fn])
def test_dtype(dtype):
    result = planned((D, F), lambda w, x: x @ w.astype(x.dtype), dtype)
    assert result.by_path["bad"].reason == f"its dtype is {jnp.dtype(dtype).name}"


def test_low_rank_addition():
    params = {"w": jnp.ones((D, F)), "a": jnp.ones((D, 4)), "b": jnp.ones((4, F)), "good": jnp.ones((D, F))}
    result = plan(lambda p, x: (x @ (p["w"] + p["a"] @ p["b"]), x @ p["good"]), params, X)
    assert {e.path: e.reason for e in result.entries} == {
        "a": OTHER,
        "b": OTHER,
        "good": "",
        "w": THROUGH + "'add'",
    }


def test_vectors_and_scalars_are_not_listed():
    params = {"w": jnp.ones((D, F)), "scale": jnp.ones(D), "bias": jnp.ones(())}
    result = plan(lambda p, x: (x * p["scale"]) @ p["w"] + p["bias"], params, X)
    assert [e.path for e in result.entries] == ["w"]
