"""Channel scales folded into parameters: which folds are found, and that no fold that is found changes a model."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from algorithms import models as layered
from flax import linen, nnx
from interop.models import MODELS as FLAX_MODELS
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxfp4.models import Decoder, DecoderConfig, from_flax
from jaxfp4.models.builtin import load_builtin
from jaxfp4.transform.folding import Fold, Folding, apply_fold, find_folds
from jaxfp4.transform.trace import leaves_of
from jaxfp4.transform.weights import find_weights

from . import random_programs

T, D, F, E, L = 6, 8, 12, 4, 3


class Model(NamedTuple):
    apply: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]

    def folding(self) -> Folding:
        return find_folds(self.apply, leaves_of(self.params), self.args)

    def outputs(self, arrays: dict[int, jax.Array] | None = None) -> list[jax.Array]:
        leaves = leaves_of(self.params)
        arrays = dict(enumerate(leaves.values)) if arrays is None else arrays
        return jax.tree.leaves(jax.jit(self.apply)(leaves.rebuilt([arrays[i] for i in sorted(arrays)]), *self.args))

    def arrays(self) -> dict[int, jax.Array]:
        return dict(enumerate(leaves_of(self.params).values))


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def model(apply, **shapes) -> Model:
    """`apply(p, x)` on parameters of these shapes and x of `[T, D]`."""
    params = {name: draw(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    return Model(apply, params, (draw((T, D), 99),))


def filled(params):
    """Random values for a tree of shapes."""
    leaves, treedef = jax.tree.flatten(params)
    return jax.tree.unflatten(treedef, [draw(x.shape, i).astype(x.dtype) for i, x in enumerate(leaves)])


def nnx_model(build, *args) -> Model:
    apply, params = from_flax(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    return Model(apply, filled(params), args)


def linen_model(module, *args) -> Model:
    apply, params = from_flax(module, jax.eval_shape(module.init, jax.random.key(0), *args))
    return Model(apply, filled(params), args)


def flax_model(name) -> Model:
    built = FLAX_MODELS[name][1]()
    return Model(*from_flax(built.module, built.variables), built.args)


def random_scale(fold: Fold, seed=0, powers_of_two=False) -> jax.Array:
    rng = np.random.default_rng(seed)
    exponents = rng.integers(-1, 2, fold.shape) if powers_of_two else rng.uniform(-1, 1, fold.shape)
    return jnp.asarray(2.0**exponents, jnp.float32)


def difference(left, right) -> float:
    """The largest over the outputs, relative to the largest value of each."""
    return max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in zip(left, right, strict=True))


def sides(folding: Folding) -> list[tuple[str, str]]:
    """Paths of each fold, producers and consumers."""
    return [(" ".join(s.path for s in f.producers), " ".join(s.path for s in f.consumers)) for f in folding.folds]


def rms(x, scale=1.0):
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


# Models, and the folds that they have.


def mlp(p, x):
    return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"] + p["last"]


def gated(p, x):
    return jax.nn.silu(x @ p["gate"]) * (x @ p["up"]) @ p["down"]


def fused_gated(p, x):
    gate, up = jnp.split(x @ p["both"], 2, axis=-1)
    return jax.nn.silu(gate) * up @ p["down"]


def stacked_gated(p, x):
    gate, up = jnp.einsum("td,sdf->stf", x, p["both"])
    return jax.nn.silu(gate) * up @ p["down"]


def fused_attention(p, x, heads=2, groups=2):
    """Grouped heads, queries, keys and values in one weight."""
    q, k, v = jnp.split(rms(x, p["norm"]) @ p["qkv"], (8, 12), axis=-1)
    q, k, v = q.reshape(T, heads, groups, 2), k.reshape(T, heads, 2), v.reshape(T, heads, 2)
    weights = jax.nn.softmax(jnp.einsum("thgd,shd->hgts", q, k))
    return x + jnp.einsum("hgts,shd->thgd", weights, v).reshape(T, -1) @ p["o"]


def repeated_attention(p, x):
    """Grouped heads, with keys and values repeated for each query head."""
    q = (x @ p["q"]).reshape(T, 4, 2)
    k, v = (jnp.repeat((x @ p[n]).reshape(T, 2, 2), 2, axis=1) for n in "kv")
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k))
    return jnp.einsum("hts,shd->thd", weights, v).reshape(T, -1) @ p["o"]


def dispatched(p, x):
    """Experts with room for every token, which are scattered to them and gathered back, biases included."""
    h = rms(x, p["norm"])
    chance = jax.nn.softmax(h @ p["router"])
    chosen = jnp.argmax(chance, -1)
    buffers = jnp.zeros((E, T, D)).at[chosen, jnp.arange(T)].set(h)
    inner = jax.nn.silu(jnp.einsum("ecd,edf->ecf", buffers, p["gate"])) * (
        jnp.einsum("ecd,edf->ecf", buffers, p["up"]) + p["bias"][:, None]
    )
    return x + jnp.einsum("ecf,efd->ecd", inner, p["down"])[chosen, jnp.arange(T)] * chance.max(-1, keepdims=True)


def norm_in_scan(p, x):
    """Layers whose scales have the layer axis last and whose weights have it in the middle."""
    stacked = {"norm": p["norm"].T, "w": jnp.moveaxis(p["w"], 1, 0)}
    return lax.scan(lambda c, layer: (c + jnp.tanh(rms(c, layer["norm"]) @ layer["w"]), None), x, stacked)[0]


class Dense(linen.Module):
    @linen.compact
    def __call__(self, x):
        h = linen.LayerNorm(name="norm")(x)
        return x + linen.Dense(D, name="down")(linen.relu(linen.Dense(F, name="up")(h)))


class Norm(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.left, self.right = nnx.Linear(D, F, rngs=rngs), nnx.Linear(D, F, use_bias=False, rngs=rngs)

    def __call__(self, x):
        h = self.norm(x)
        return jnp.tanh(self.left(h)), self.right(h)


def decoder(model_type, **more) -> Model:
    config = {
        "model_type": model_type,
        "vocab_size": 24,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        **more,
    }
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 24, (2, 5)), jnp.int32)
    return nnx_model(lambda rngs: Decoder(DecoderConfig.from_hf(config), rngs=rngs), tokens)


LLAMA = functools.partial(decoder, "llama")
QWEN3_MOE = functools.partial(
    decoder, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True
)


def decoder_folds(i, mlp):
    at = f"layers/{i}/attention/"
    return [
        (f"layers/{i}/input_norm/scale", " ".join(f"{at}{n}_proj/kernel" for n in "kqv")),
        (f"{at}v_proj/kernel", f"{at}o_proj/kernel"),
        *(tuple(" ".join(f"layers/{i}/{p}" for p in side.split()) for side in fold) for fold in mlp),
    ]


GATED = [
    ("mlp/up_proj/kernel", "mlp/down_proj/kernel"),
    ("post_attention_norm/scale", "mlp/gate_proj/kernel mlp/up_proj/kernel"),
]
MIXTURE = [
    ("mlp/experts/up_proj", "mlp/experts/down_proj"),
    ("post_attention_norm/scale", "mlp/experts/gate_proj mlp/experts/up_proj mlp/router/kernel"),
]
HEAD = [("norm/scale", "lm_head/kernel")]


def layered_model(apply, params) -> Model:
    return Model(apply, jax.tree.map(jnp.asarray, params), (layered.batches(1)[0],))


STACKED = [("layers/up", "layers/down"), ("layers/v", "layers/o")]
APART = [(f"layers/{i}/{a}", f"layers/{i}/{b}") for i in range(layered.L) for a, b in (("up", "down"), ("v", "o"))]

MODELS: dict[str, tuple[Callable[[], Model], list[tuple[str, str]]]] = {
    "plain MLP": (
        lambda: model(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"], up=(D, F), down=(F, D)),
        [("up", "down")],
    ),
    "MLP with bias": (lambda: model(mlp, up=(D, F), bias=(F,), down=(F, D), last=(D,)), [("bias up", "down")]),
    "gated MLP": (lambda: model(gated, gate=(D, F), up=(D, F), down=(F, D)), [("up", "down")]),
    "fused gate and up": (lambda: model(fused_gated, both=(D, 2 * F), down=(F, D)), [("both", "down")]),
    "stacked gate and up": (lambda: model(stacked_gated, both=(2, D, F), down=(F, D)), [("both", "down")]),
    "RMSNorm": (
        lambda: model(lambda p, x: [rms(x, p["s"]) @ p[n] for n in "ab"], s=(D,), a=(D, F), b=(D, F)),
        [("s", "a b")],
    ),
    "fused attention": (
        lambda: model(fused_attention, norm=(D,), qkv=(D, 16), o=(8, D)),
        [("qkv", "o"), ("norm", "qkv")],
    ),
    "repeated heads": (lambda: model(repeated_attention, q=(D, 8), k=(D, 4), v=(D, 4), o=(8, D)), [("v", "o")]),
    "dispatched experts": (
        lambda: model(dispatched, norm=(D,), router=(D, E), gate=(E, D, F), up=(E, D, F), bias=(E, F), down=(E, F, D)),
        [("bias up", "down"), ("norm", "gate router up")],
    ),
    "layer axes at different places": (lambda: model(norm_in_scan, norm=(D, L), w=(D, L, D)), [("norm", "w")]),
    "Linen": (
        lambda: linen_model(Dense(), draw((T, D))),
        [("up/bias up/kernel", "down/kernel"), ("norm/bias norm/scale", "up/kernel")],
    ),
    "NNX": (lambda: nnx_model(Norm, draw((T, D))), [("norm/bias norm/scale", "left/kernel right/kernel")]),
    "scanned layers": (lambda: layered_model(layered.scanned, layered.draw()), STACKED),
    "sliced layers": (lambda: layered_model(layered.sliced, layered.draw()), STACKED),
    "unrolled layers": (lambda: layered_model(layered.unrolled, layered.apart(layered.draw())), APART),
    "decoder": (LLAMA, [*decoder_folds(0, GATED), *decoder_folds(1, GATED), *HEAD]),
    "decoder of experts": (QWEN3_MOE, [*decoder_folds(0, MIXTURE), *decoder_folds(1, MIXTURE), *HEAD]),
    "nnx.MultiHeadAttention": (
        functools.partial(flax_model, "nnx_attention"),
        [("value/bias value/kernel", "out/kernel")],
    ),
    "nnx.scan": (functools.partial(flax_model, "nnx_scan"), [("blocks/norm/scale", "blocks/up/kernel")]),
    "nn.scan": (
        functools.partial(flax_model, "linen_scan"),
        [
            ("blocks/attn_norm/scale", "blocks/attn/key/kernel blocks/attn/query/kernel blocks/attn/value/kernel"),
            ("blocks/attn/value/kernel", "blocks/attn/out/kernel"),
            ("blocks/up/kernel", "blocks/down/kernel"),
            ("blocks/mlp_norm/scale", "blocks/gate/kernel blocks/up/kernel"),
        ],
    ),
}


@functools.cache
def built(name: str) -> tuple[Model, Folding]:
    found = MODELS[name][0]()
    return found, found.folding()


each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_which_folds_are_found(name):
    assert sorted(sides(built(name)[1])) == sorted(MODELS[name][1])


@each_model
def test_folds_leave_the_outputs(name):
    """Powers of two commute with every rounding; others move outputs by roundings only."""
    found, folding = built(name)
    for powers_of_two in (True, False):
        arrays = found.arrays()
        for i, fold in enumerate(folding.folds):
            arrays = apply_fold(arrays, fold, random_scale(fold, i, powers_of_two))
        moved = difference(found.outputs(arrays), found.outputs())
        assert moved == 0 if powers_of_two else moved < 1e-5


@each_model
def test_a_wrong_fold_is_seen(name):
    """What the test above would see if one parameter of a fold had been left out."""
    found, folding = built(name)
    before = found.outputs()
    fold = folding.folds[-1]
    arrays = apply_fold(found.arrays(), fold, random_scale(fold))
    for side in (*fold.producers, *fold.consumers):
        forgotten = arrays | {side.leaf: found.arrays()[side.leaf]}
        assert difference(found.outputs(forgotten), before) > 1e-4


@each_model
def test_every_parameter_has_a_reason_or_a_fold(name):
    found, folding = built(name)
    consumers = {side.path for fold in folding.folds for side in fold.consumers}
    assert {path for path, reason in folding.reasons.items() if not reason} == consumers
    assert set(folding.reasons) == set(leaves_of(found.params).paths)


def test_the_channels_of_a_fold():
    """Query heads of a group share the channels of their value head; parts of a fused weight are left alone."""
    folds = {fold.consumers[0].path: fold for fold in built("fused attention")[1].folds}
    norm, values = folds["qkv"], folds["o"]
    assert (values.shape, norm.shape) == ((4,), (D,))
    assert values.consumers[0].index.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert values.producers[0].index.tolist() == [-1] * 12 + [0, 1, 2, 3]
    assert (norm.consumers[0].axes, norm.consumers[0].index.tolist()) == ((0,), list(range(D)))


def test_the_axes_of_a_fold():
    (fold,) = built("layer axes at different places")[1].folds
    assert (fold.layers, fold.channels) == ((L,), D)
    (norm,), (weight,) = fold.producers, fold.consumers
    assert (norm.axes, norm.layer_axes) == ((0,), (1,))
    assert (weight.axes, weight.layer_axes) == ((0,), (1,))
    _, values = built("scanned layers")[1].folds
    (o,) = values.consumers
    assert (values.shape, o.axes, o.layer_axes) == ((layered.L, layered.D), (1, 2), (0,))
    assert o.index.tolist() == np.arange(layered.D).reshape(layered.HEADS, 16).tolist()


def test_experts_share_their_scales():
    folds = {f.consumers[0].path: f for f in built("dispatched experts")[1].folds}
    bias, up = folds["down"].producers
    assert folds["down"].shape == (F,)
    assert up.axes == (2,) and bias.axes == (0, 1)
    assert bias.index.tolist() == [list(range(F))] * E


def test_abstract_parameters_and_arguments():
    found = LLAMA()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (found.params, found.args))
    leaves = leaves_of(abstract[0])
    weights = find_weights(found.apply, leaves, abstract[1])
    assert sides(find_folds(found.apply, leaves, abstract[1], weights)) == sides(built("decoder")[1])


def test_the_builtin_model():
    apply, params = from_flax(load_builtin())
    folding = find_folds(apply, leaves_of(params), (jnp.zeros((1, 8), jnp.int32),))
    assert sorted(sides(folding)) == sorted([*(f for i in range(4) for f in decoder_folds(i, MIXTURE)), *HEAD])


@pytest.mark.parametrize("seed", range(60))
def test_random_programs(seed):
    """Whatever a program does with its parameters, its folds leave its outputs as they are, bit for bit."""
    apply, params, x = random_programs.draw(seed)
    found = Model(apply, params, (x,))
    before = apply(params, x)
    for i, fold in enumerate(found.folding().folds):
        arrays = apply_fold(found.arrays(), fold, random_scale(fold, i, powers_of_two=True))
        after = apply(leaves_of(params).rebuilt(list(arrays.values())), x)
        for a, b in zip(after, before, strict=True):
            np.testing.assert_array_equal(a, b)


def test_random_programs_have_folds():
    found = [Model(apply, params, (x,)).folding() for apply, params, x in map(random_programs.draw, range(60))]
    assert sum(len(folding.folds) for folding in found) > 20


# Applying a fold.


def expected_arrays(found: Model, fold: Fold, s) -> dict[int, np.ndarray]:
    """What `apply_fold` computes, for a fold without layers of a model whose sides have one axis each."""
    arrays = {leaf: np.asarray(array) for leaf, array in found.arrays().items()}
    for sides_, factors in ((fold.producers, np.float32(1) / np.asarray(s)), (fold.consumers, np.asarray(s))):
        for side in sides_:
            picked = np.append(factors, np.float32(1))[side.index]
            shape = [n if a in side.axes else 1 for a, n in enumerate(arrays[side.leaf].shape)]
            arrays[side.leaf] = arrays[side.leaf] * picked.reshape(shape)
    return arrays


@pytest.mark.parametrize("name", ["MLP with bias", "fused attention", "decoder"])
def test_apply_fold_in_numpy(name):
    found, folding = built(name)
    for fold in folding.folds:
        s = random_scale(fold)
        after, expected = apply_fold(found.arrays(), fold, s), expected_arrays(found, fold, s)
        assert sorted(after) == sorted(expected)
        for leaf, array in after.items():
            np.testing.assert_array_equal(array, expected[leaf])


def test_apply_fold_rounds_once_to_the_dtype():
    found, folding = built("gated MLP")
    (fold,) = folding.folds
    narrow = {leaf: array.astype(jnp.bfloat16) for leaf, array in found.arrays().items()}
    wide = {leaf: array.astype(jnp.float32) for leaf, array in narrow.items()}
    s = random_scale(fold)
    after = apply_fold(narrow, fold, s)
    for leaf, array in apply_fold(wide, fold, s).items():
        assert after[leaf].dtype == jnp.bfloat16
        np.testing.assert_array_equal(after[leaf], array.astype(jnp.bfloat16))


def test_apply_fold_is_pure_and_can_be_traced():
    found, folding = built("scanned layers")
    fold = folding.folds[0]
    arrays, s = found.arrays(), random_scale(fold)
    before = {leaf: np.asarray(array) for leaf, array in arrays.items()}
    eager = apply_fold(arrays, fold, s)
    traced = jax.jit(lambda arrays, s: apply_fold(arrays, fold, s))(arrays, s)
    changed = {side.leaf for side in (*fold.producers, *fold.consumers)}
    for leaf, array in arrays.items():
        np.testing.assert_array_equal(array, before[leaf])
        np.testing.assert_array_equal(eager[leaf], traced[leaf])
        assert (eager[leaf] is array) == (leaf not in changed)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("traced", [False, True])
def test_apply_fold_keeps_shardings(kind, traced):
    found, folding = built("plain MLP")
    (fold,) = folding.folds
    mesh = jax.make_mesh((4, 2), ("tp", "dp"), axis_types=(kind, kind))
    specs = {"up": PartitionSpec("dp", "tp"), "down": PartitionSpec("tp")}
    placed = {name: jax.device_put(found.params[name], NamedSharding(mesh, spec)) for name, spec in specs.items()}
    arrays = dict(enumerate(leaves_of(placed).values))
    rescale = functools.partial(apply_fold, fold=fold, s=random_scale(fold))
    with jax.set_mesh(mesh):
        after = jax.jit(rescale)(arrays) if traced else rescale(arrays)
    expected = rescale(found.arrays())
    for leaf, array in after.items():
        assert array.sharding.is_equivalent_to(arrays[leaf].sharding, array.ndim)
        np.testing.assert_array_equal(array, expected[leaf])


def test_apply_fold_refuses_other_shapes():
    found, folding = built("scanned layers")
    with pytest.raises(ValueError, match=r"s has shape \(32,\), wanted \(2, 32\): \(\*layers, channels\) of the fold"):
        apply_fold(found.arrays(), folding.folds[0], jnp.ones(layered.F))


def test_apply_fold_needs_all_parameters():
    found, folding = built("plain MLP")
    (fold,) = folding.folds
    arrays = {leaf: a for leaf, a in found.arrays().items() if leaf != fold.consumers[0].leaf}
    with pytest.raises(
        ValueError, match="arrays lacks 'down', wanted every parameter of the fold; pass it by leaf number"
    ):
        apply_fold(arrays, fold, random_scale(fold))


def test_why_not_wants_a_path_of_a_parameter():
    folding = built("plain MLP")[1]
    assert folding.why_not("down") == ""
    assert folding.why_not("up") == "its activation is scaled by no parameter"
    with pytest.raises(
        ValueError, match=r"path: found 'sideways', wanted that of a parameter; see the keys of \.reasons"
    ):
        folding.why_not("sideways")
