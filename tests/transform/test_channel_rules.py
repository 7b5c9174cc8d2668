"""Through which operations channel scales pass, and what is said where they do not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from jaxfp4.transform import channel_names, channel_walk
from jaxfp4.transform.channel_names import reshaped
from jaxfp4.transform.channel_variables import Variables
from jaxfp4.transform.folding import apply_fold, find_folds
from jaxfp4.transform.trace import leaves_of

T, D, F = 6, 8, 12
X = jnp.asarray(np.random.default_rng(0).normal(size=(T, D)), jnp.float32)


def draw(**shapes):
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def folding_of(apply, params, *args):
    return find_folds(apply, leaves_of(params), args or (X,))


def assert_unchanged(apply, params, fold, *args):
    """Powers of two as scales change nothing at all."""
    s = jnp.asarray(2.0 ** np.random.default_rng(2).integers(-2, 3, fold.shape), jnp.float32)
    leaves = leaves_of(params)
    arrays = apply_fold(dict(enumerate(leaves.values)), fold, s)
    after = apply(leaves.rebuilt([arrays[i] for i in range(len(arrays))]), *(args or (X,)))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(apply(params, *(args or (X,)))), strict=True):
        np.testing.assert_array_equal(a, b)


# Between two weights: `op(x @ up) @ down`.


def _with_vjp():
    @jax.custom_vjp
    def twice(x):
        return x * 2

    twice.defvjp(lambda x: (x * 2, None), lambda _, g: (g * 2,))
    return twice


def _scattered(h):
    return jnp.zeros((2 * T, F)).at[jnp.arange(T) * 2].add(h)[jnp.arange(T) * 2]


def _gated_loop(h):
    return lax.scan(lambda c, row: (c, row * 2), 0.0, h)[1]


def _long_loop(h):
    return lax.scan(lambda c, row: (c + 1.0, row * 2), 0.0, jnp.tile(h, (100, 1)))[1][:T]


PASSING = {
    "relu": jax.nn.relu,
    "leaky relu": jax.nn.leaky_relu,
    "abs": jnp.abs,
    "neg": lambda h: -h,
    "times a constant": lambda h: h * jnp.arange(1.0, F + 1),
    "divided by a constant": lambda h: h / 3,
    "times a row's number": lambda h: h * jnp.arange(T, dtype=h.dtype)[:, None],
    "plus zero": lambda h: h + 0.0,
    "plus zeros": lambda h: h + jnp.zeros((T, F)),
    "casts": lambda h: h.astype(jnp.bfloat16).astype(jnp.float32),
    "transposes": lambda h: h.T.reshape(3, 4, T).transpose(2, 0, 1).reshape(T, F),
    "permuted channels": lambda h: h[:, ::-1],
    "halves swapped": lambda h: jnp.concatenate(jnp.split(h, 2, axis=1)[::-1], axis=1),
    "rolled channels": lambda h: jnp.roll(h, 5, axis=1),
    "unstacked": lambda h: jnp.stack([h[:, i] for i in range(F)], axis=1),
    "rows by number": lambda h: h[jnp.array([3, 3, 1, 0, 5, 2])],
    "taken rows": lambda h: jnp.take(h, jnp.array([3, 3, 1, 0, 5, 2]), axis=0),
    "a row at a traced place": lambda h: h + lax.dynamic_slice_in_dim(h, h.shape[0] - jnp.int32(2), 1),
    "a slice of a copy": lambda h: lax.dynamic_slice(jnp.concatenate([h, h], 1), (0, 3), (T, F)),
    "padded rows": lambda h: jnp.pad(h, ((1, 0), (0, 0)))[:-1],
    "shifted rows": lambda h: jnp.concatenate([jnp.zeros((1, F)), h[:-1]]),
    "scattered rows": _scattered,
    "updated rows": lambda h: lax.dynamic_update_slice(jnp.zeros((2 * T, F)), h, (2, 0))[:T],
    "masked": lambda h: jnp.where(jnp.arange(F) > 3, h, 0.0),
    "the larger of both signs": lambda h: jnp.maximum(h, -h * 2),
    "minus the mean of the rows": lambda h: h - h.mean(0),
    "minus the largest row": lambda h: h - h.max(0),
    "mixed rows": lambda h: jnp.eye(T)[::-1] @ h,
    "one-hot rows": lambda h: jnp.einsum("te,tf->ef", jax.nn.one_hot(jnp.arange(T), T), h),
    "jit": jax.jit(lambda h: h * 2),
    "remat": jax.checkpoint(lambda h: h * 2),
    "custom_vjp": _with_vjp(),
    "cond": lambda h: lax.cond(X[0, 0] > 0, lambda: h * 2, lambda: h[::-1]),
    "rows of a scan": _gated_loop,
    "rows of a long scan": _long_loop,
    "constant of a while": lambda h: lax.while_loop(lambda c: c < 3, lambda c: c + 1, 0) * h,
    "optimization_barrier": lambda h: lax.optimization_barrier((h, X))[0],
}


@pytest.mark.parametrize("name", PASSING)
def test_operations_that_scales_pass(name):
    def apply(p, x):
        return PASSING[name](x @ p["up"]) @ p["down"]

    params = draw(up=(D, F), down=(F, D))
    (fold,) = folding_of(apply, params).folds
    assert [side.path for side in (*fold.producers, *fold.consumers)] == ["up", "down"]
    assert fold.shape == (F,)
    assert_unchanged(apply, params, fold)


def _by_kernel(h):
    def kernel(h_ref, out_ref):
        out_ref[...] = h_ref[...] * 2

    return pl.pallas_call(kernel, jax.ShapeDtypeStruct(h.shape, h.dtype), interpret=True)(h)


def _by_shard(h):
    mesh = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Auto,))
    return jax.shard_map(lambda h: h * 2, mesh=mesh, in_specs=PartitionSpec("tp"), out_specs=PartitionSpec("tp"))(h)


STOPPING = {
    "gelu": (jax.nn.gelu, "goes into 'integer_pow'"),
    "exact gelu": (lambda h: jax.nn.gelu(h, approximate=False), "goes into 'erfc'"),
    "silu": (jax.nn.silu, "goes into 'logistic'"),
    "tanh": (jnp.tanh, "goes into 'tanh'"),
    "square": (jnp.square, "goes into 'square'"),
    "times itself": (lambda h: h * h, "meets something unscaled in a contraction"),
    "clip": (lambda h: jnp.clip(h, -1, 1), "is chosen from beside something unscaled"),
    "relu above one": (lambda h: jnp.maximum(h, 1.0), "is chosen from beside something unscaled"),
    "plus one": (lambda h: h + 1, "is added to something unscaled"),
    "plus the input": (lambda h: h + jnp.tile(X, 2)[:, :F], "is added to something unscaled"),
    "chosen beside the input": (
        lambda h: jnp.where(X[:, :1] > 0, h, jnp.tile(X, 2)[:, :F]),
        "is chosen from beside something unscaled",
    ),
    "compared": (lambda h: h * (h > 1), "goes into 'gt'"),
    "sorted": (lambda h: jnp.sort(h, axis=1), "goes into 'sort'"),
    "summed": (lambda h: h / h.sum(1, keepdims=True), "goes into 'reduce_sum' along its channels"),
    "largest": (lambda h: h - h.max(1, keepdims=True), "goes into 'reduce_max' along its channels"),
    "cumulated": (lambda h: jnp.cumsum(h, axis=1), "goes into 'cumsum'"),
    "with itself": (lambda h: (h @ h.T) @ h, "meets something unscaled in a contraction"),
    "cast to integers": (lambda h: h.astype(jnp.int8).astype(jnp.float32), "goes into 'convert_element_type'"),
    "cast to eight bits": (
        lambda h: h.astype(jnp.float8_e4m3fn).astype(jnp.float32),
        "goes into 'convert_element_type'",
    ),
    "rounded to eight bits": (lambda h: lax.reduce_precision(h, 4, 3), "goes into 'reduce_precision'"),
    "written into ones": (lambda h: jnp.ones((T, F)).at[::2].set(h[::2]), "is written into something unscaled"),
    "a function of some rows": (lambda h: h.at[jnp.array([0, 3])].apply(jnp.sin), "goes into 'scatter'"),
    "padded with ones": (lambda h: jnp.pad(h, ((1, 0), (0, 0)), constant_values=1)[:-1], "goes into 'pad'"),
    "moved by padding": (lambda h: jnp.pad(h, ((0, 0), (1, 0)))[:, :-1], "goes into 'pad'"),
    "filled": (
        lambda h: h.at[jnp.arange(T) + 1].get(mode="fill", fill_value=1.0),
        "goes into 'gather'",
    ),
    "carried": (lambda h: lax.fori_loop(0, 3, lambda _, c: c * 2, h), "is carried through a loop"),
    "carried by while": (
        lambda h: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2), (0, h))[1],
        "is carried through a loop",
    ),
    "made in a while": (
        lambda h: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + h), (0, jnp.zeros((T, F))))[1],
        "is carried through a loop",
    ),
    "ends a while": (
        lambda h: h + lax.while_loop(lambda c: (c < 3) & (h[0, 0] > 0), lambda c: c + 1.0, 0.0),
        "decides when a loop ends",
    ),
    "accumulated": (lambda h: lax.scan(lambda c, _: (c + h, None), h, length=2)[0], "is carried through a loop"),
    "as an index": (lambda h: h[jnp.argmax(h, axis=0)][:T], "goes into 'argmax'"),
    "decides a branch": (lambda h: lax.cond((h > 1).any(), lambda: h, lambda: h * 2), "goes into 'gt'"),
    "one of two branches": (
        lambda h: lax.cond(X[0, 0] > 0, lambda: h, lambda: h + 1),
        "is added to something unscaled",
    ),
    "beside a branch": (
        lambda h: lax.cond(X[0, 0] > 0, lambda: h, lambda: jnp.ones((T, F))),
        "is chosen by a condition",
    ),
    "pallas": (_by_kernel, "goes into 'pallas_call'"),
    "shard_map": (_by_shard, "goes into 'shard_map'"),
}


@pytest.mark.parametrize("name", STOPPING)
def test_operations_that_scales_do_not_pass(name):
    op, reason = STOPPING[name]
    folding = folding_of(lambda p, x: op(x @ p["up"]) @ p["down"], draw(up=(D, F), down=(F, D)))
    assert not folding.folds
    assert folding.why_not("down") == f"its activation {reason}"


@pytest.mark.parametrize(
    "op, reason",
    [
        (lambda h: jnp.concatenate([h[:, 3:], h[:, :3]], 1), "goes into 'concatenate'"),
        (lambda h: jnp.stack([h[:, ::2], h[:, 1::2]], 1).reshape(T, F), "goes into 'stack'"),
        (lambda h: h.reshape(T, 3, 4).swapaxes(1, 2).reshape(T, F), "goes into 'reshape'"),
        (lambda h: jnp.tile(h, 2)[:, :F], "goes into 'tile'"),
        (lambda h: lax.scan(lambda c, column: (c, column * 2), 0.0, h.T)[1].T, "is collected by a loop"),
    ],
)
def test_arrays_of_names_stay_small(op, reason, monkeypatch):
    def apply(p, x):
        return op(x @ p["up"]) @ p["down"]

    params = draw(up=(D, F), down=(F, D))
    (fold,) = folding_of(apply, params).folds
    assert_unchanged(apply, params, fold)
    monkeypatch.setattr(channel_names, "LARGEST", F - 1)
    folding = folding_of(apply, params)
    assert not folding.folds
    assert folding.why_not("down") == f"its activation {reason}"


def test_a_scan_with_too_many_different_steps(monkeypatch):
    def apply(p, x):
        return lax.scan(lambda c, w: (c, jax.nn.relu(x @ w[0]) @ w[1]), 0.0, (p["up"], p["down"]))[1]

    params = draw(up=(3, D, F), down=(3, F, D))
    assert [fold.shape for fold in folding_of(apply, params).folds]
    monkeypatch.setattr(channel_walk, "MOST_STEPS", 2)
    folding = folding_of(apply, params)
    assert not folding.folds
    assert folding.why_not("down") == "its activation goes into 'scan'"


# Whole models without folds, or without one of them.


def rms(x, scale=1.0):
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def rotary_attention(p, x, normalised=False):
    h = rms(x, p["norm"])
    q, k, v = (h @ p[n] for n in "qkv")
    if normalised:
        q, k = rms(q, p["q_norm"]), rms(k, p["k_norm"])
    angle = jnp.arange(T)[:, None] * jnp.array([1.0, 0.1, 0.01, 0.001])

    def rotated(y):
        a, b = jnp.split(y, 2, axis=1)
        return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], 1)

    return jax.nn.softmax(rotated(q) @ rotated(k).T) @ v @ p["o"]


@pytest.mark.parametrize("normalised", [False, True])
def test_queries_and_keys_produce_no_activation_of_a_weight(normalised):
    params = draw(norm=(D,), q=(D, D), k=(D, D), v=(D, D), o=(D, D), q_norm=(D,), k_norm=(D,))
    folds = folding_of(lambda p, x: rotary_attention(p, x, normalised), params).folds
    found = [([s.path for s in fold.producers], [s.path for s in fold.consumers]) for fold in folds]
    assert (
        found == [(["norm"], ["k", "q", "v"]), (["v"], ["o"])]
        or found
        == [
            (["norm"], ["k", "q", "v"]),
            (["v"], ["o"]),
        ][::-1]
    )


def residual(p, x):
    x = x + jnp.tanh(rms(x) @ p["a"]) @ p["b"]
    return rms(x) @ p["c"]


def two_uses(p, x):
    h = rms(x, p["s"])
    return h @ p["a"], jnp.exp(h)


def looped(p, x):
    h = rms(x, p["s"])
    return h @ p["a"] + lax.fori_loop(0, 2, lambda i, c: jnp.tanh(c), h)


def tied(p, x):
    return rms(p["table"][jnp.argmax(x, 1)], p["s"]) @ p["table"].T


def tied_directly(p, x):
    """The table both makes the activation and reads it."""
    return p["table"][jnp.argmax(x, 1)] @ p["table"].T


def one_norm_for_all_layers(p, x):
    return lax.scan(lambda c, w: (jnp.tanh(rms(c, p["s"]) @ w), None), x, p["w"])[0]


def layers_by_number(p, x):
    return lax.fori_loop(0, 3, lambda i, c: jnp.tanh(rms(c, p["s"][i]) @ p["w"][i]), x)


def norms_apart(p, x):
    for i in range(3):
        x = jnp.tanh(rms(x, p[f"s{i}"]) @ p["w"][i])
    return x


def other_channels_by_layer(p, x):
    for i in range(2):
        x = jnp.tanh(jnp.roll(rms(x, p["s"][i]), i, axis=1) @ p["w"][i])
    return x


def both_ways(p, x):
    h = rms(x)
    return (h * p["s"]) @ p["a"], (h / p["s"]) @ p["b"]


def halves(p, x):
    """One half is multiplied by the parameter, the other divided."""
    left, right = jnp.split(rms(x), 2, axis=1)
    first, second = jnp.split(p["s"], 2)
    return jnp.concatenate([left * first, right / second + p["b"]], 1) @ p["a"]


def compared(p, x):
    """The quotient of two channels lets them have the same scale only, and they may be any."""
    h = rms(x, p["s"])
    first, second = jnp.argsort(x[0])[:2]
    return h @ p["a"], h[:, first] / h[:, second]


WITHOUT_FOLD = {
    "residual stream": (
        residual,
        {"a": (D, F), "b": (F, D), "c": (D, F)},
        "c",
        "its activation is added to something unscaled",
    ),
    "one plus the scale": (
        lambda p, x: rms(x, 1 + p["s"]) @ p["a"],
        {"s": (D,), "a": (D, F)},
        "a",
        "its activation is added to something unscaled",
    ),
    "another use": (two_uses, {"s": (D,), "a": (D, F)}, "a", "its activation goes into 'exp'"),
    "also returned": (
        lambda p, x: ((h := rms(x, p["s"])) @ p["a"], h),
        {"s": (D,), "a": (D, F)},
        "a",
        "its activation is an output of the model",
    ),
    "carried through a loop": (looped, {"s": (D,), "a": (D, D)}, "a", "its activation is carried through a loop"),
    "tied embedding": (
        tied,
        {"table": (20, D), "s": (D,)},
        "table",
        "its activation goes into 'reduce_sum' along its channels",
    ),
    "tied embedding without norm": (
        tied_directly,
        {"table": (20, D)},
        "table",
        "its activation meets something unscaled in a contraction",
    ),
    "used for itself": (
        lambda p, x: jax.nn.relu(x @ p["w"]) @ p["w"],
        {"w": (D, D)},
        "w",
        "is scaled by no parameter",
    ),
    "one norm for all layers": (
        one_norm_for_all_layers,
        {"s": (D,), "w": (3, D, D)},
        "w",
        "its layers are not stacked as those of other parameters of its activation are",
    ),
    "norms apart": (
        norms_apart,
        {"s0": (D,), "s1": (D,), "s2": (D,), "w": (3, D, D)},
        "w",
        "its layers are not stacked as those of other parameters of its activation are",
    ),
    "layers by number": (layers_by_number, {"s": (3, D), "w": (3, D, D)}, "w", "layers"),
    "other channels in each layer": (
        other_channels_by_layer,
        {"s": (2, D), "w": (2, D, D)},
        "w",
        "the channels of its activation are not the same in all layers",
    ),
    "all channels alike": (
        lambda p, x: jnp.broadcast_to((x @ p["a"]).max(1, keepdims=True), (T, F)) @ p["b"],
        {"a": (D, F), "b": (F, D)},
        "b",
        "goes into 'reduce_max' along its channels",
    ),
    "channels picked by number": (
        lambda p, x: jnp.stack([(x @ p["a"])[:, i] for i in jnp.argsort(x[0])[:4]], 1) @ p["b"],
        {"a": (D, F), "b": (4, D)},
        "b",
        "its activation is scaled by no parameter",
    ),
    "channels compared by number": (
        compared,
        {"s": (D,), "a": (D, F)},
        "a",
        "all channels of its activation would have one scale",
    ),
    "half multiplied and half divided": (
        halves,
        {"s": (D,), "b": (D // 2,), "a": (D, F)},
        "a",
        "a parameter of its activation would be both multiplied and divided",
    ),
    "multiplied and divided": (
        both_ways,
        {"s": (D,), "a": (D, F), "b": (D, F)},
        "a",
        "no parameter can be divided to scale its activation",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_FOLD)
def test_models_without_fold(name):
    apply, shapes, path, reason = WITHOUT_FOLD[name]
    folding = folding_of(apply, draw(**shapes))
    assert not folding.folds
    assert reason in folding.why_not(path)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.int8])
def test_parameters_of_other_dtypes_have_no_scales(dtype):
    def apply(p, x):
        return jax.nn.relu(x @ p["up"].astype(jnp.float32)) @ p["down"].astype(jnp.float32)

    params = draw(up=(D, F), down=(F, D))
    assert folding_of(apply, params).folds
    assert not folding_of(apply, params | {"down": params["down"].astype(dtype)}).folds
    assert not folding_of(apply, params | {"up": params["up"].astype(dtype)}).folds


def test_of_two_possible_producers_one_is_scaled():
    """`a * b` may be divided in either factor, but not in both."""

    def apply(p, x):
        return (x @ p["a"]) * (x @ p["b"]) @ p["down"]

    params = draw(a=(D, F), b=(D, F), down=(F, D))
    (fold,) = folding_of(apply, params).folds
    assert [side.path for side in fold.producers] == ["b"]
    assert_unchanged(apply, params, fold)


def test_one_consumer_of_two_activations():
    """Channels from two producers lie one after the other."""

    def apply(p, x):
        return jax.nn.relu(jnp.concatenate([x @ p["a"], x @ p["b"]], 1)) @ p["down"]

    params = draw(a=(D, F), b=(D, 4), down=(F + 4, D))
    (fold,) = folding_of(apply, params).folds
    assert fold.shape == (F + 4,)
    assert [side.index.tolist() for side in fold.producers] == [list(range(F)), list(range(F, F + 4))]
    assert_unchanged(apply, params, fold)


def test_part_of_an_activation():
    """Channels that have no scale stay as they are on both sides."""

    def apply(p, x):
        return jnp.concatenate([x[:, :3], jax.nn.relu(x @ p["a"])], 1) @ p["down"]

    params = draw(a=(D, F), down=(3 + F, D))
    (fold,) = folding_of(apply, params).folds
    assert fold.consumers[0].index.tolist() == [-1] * 3 + list(range(F))
    assert_unchanged(apply, params, fold)


# The parts.


def test_variables_are_equal_or_reciprocal():
    known = Variables(6)
    known.equate(np.array([1, 3]), np.array([2, -4]), "first")
    assert known.current(np.array([1, 2, 3, 4, -4, 5, 0])).tolist() == [1, 1, 3, -3, 3, 5, 0]
    known.equate(np.array([2]), np.array([4]), "second")
    assert known.current(np.array([1, 2, 3, 4])).tolist() == [1, 1, -1, 1]


def test_a_variable_that_is_its_own_reciprocal_is_fixed():
    known = Variables(3)
    known.equate(np.array([1]), np.array([2]), "first")
    known.equate(np.array([1]), np.array([-2]), "second")
    assert known.current(np.array([1, 2, 3])).tolist() == [0, 0, 3]
    assert known.reason(np.array([3])) == ""
    assert known.reason(np.array([3, 2])) == "second"


def test_what_is_equal_to_a_fixed_variable_is_fixed_for_its_reason():
    known = Variables(5)
    known.fix(np.array([2]), "first")
    known.equate(np.array([3, 4, 0]), np.array([2, 5, 5]), "second")
    assert known.current(np.arange(6)).tolist() == [0, 1, 0, 0, 0, 0]
    assert [known.reason(np.array([i])) for i in (2, 3, 4, 5)] == ["first", "first", "second", "second"]


def test_many_variables_equal_to_one():
    """One against all, in either order, and all against their neighbours."""
    names = np.arange(1, 1001)
    for left, right in ((names, np.array([500])), (np.array([1000]), names), (names[1:], names[:-1])):
        known = Variables(1000)
        known.equate(left, right, "")
        assert known.current(names).tolist() == [1] * 1000


@pytest.mark.parametrize(
    "before, after",
    [
        ((6,), (2, 3)),
        ((2, 3), (6,)),
        ((4, 6), (4, 2, 3)),
        ((4, 6), (2, 2, 6)),
        ((4, 6), (3, 8)),
        ((1, 6, 1), (6,)),
        ((6,), (1, 6, 1)),
        ((2, 1, 3), (2, 3)),
        ((), (1, 1)),
        ((1, 1), ()),
        ((1,), (1,)),
    ],
)
def test_reshaped_names(before, after):
    names = np.arange(np.prod(before, dtype=int)).reshape(before)
    np.testing.assert_array_equal(np.broadcast_to(reshaped(names, before, after), after), names.reshape(after))


def test_reshaping_makes_nothing_large():
    names = np.arange(8).reshape(1, 1, 8)
    assert reshaped(names, (1 << 20, 1 << 20, 8), (1 << 40, 8)).shape == (1, 8)
    assert reshaped(names, (1 << 20, 1 << 20, 8), (1 << 43,)) is None
