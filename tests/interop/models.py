"""Small models with random weights, written by others or of Flax's own layers, which the transform takes unchanged.

`MODELS` maps a name to `(package, constructor)`; `package` is the import to skip on, None where Flax alone is enough.
A constructor imports what it needs and returns a `Model`. The pure function of an NNX model is
`graphdef, params = nnx.split(m.module)` and `lambda params, *args: nnx.merge(graphdef, params)(*args)`; that of a
Linen model (`m.variables` is not None) is `lambda variables, *args: m.module.apply(variables, *args)`. Whatever the
model returns, a tuple of logits and cache included, is kept.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BATCH, SEQ, VOCAB = 2, 8, 128
EMBED, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 128, 2, 4, 2, 16


class Model(NamedTuple):
    """A module in evaluation mode, concrete call arguments, and the variables where the module is a Linen one."""

    name: str
    module: Any
    args: tuple[Any, ...]
    variables: Any = None


def _randomised(tree: Any) -> Any:
    """Concrete leaves for a tree of shapes, from numpy, so that building a model compiles nothing.

    Weights are normal with deviation 0.1, biases too, norm scales near one, anything else zero or a random key.
    """
    rng = np.random.default_rng(0)

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.asarray(np.zeros(leaf.shape, leaf.dtype))
        names = jax.tree_util.keystr(path)
        centre = 1.0 if "scale" in names or (leaf.ndim == 1 and "bias" not in names) else 0.0
        return jnp.asarray((centre + 0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype))

    return jax.tree_util.tree_map_with_path(fill, tree)


def _nnx(name: str, build: Callable[[Any], Any], *args: Any) -> Model:
    """The NNX module that `build(rngs)` makes, with random parameters, in evaluation mode."""
    from flax import nnx

    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    module = nnx.merge(graphdef, _randomised(state))
    module.eval()
    return Model(name, module, args)


def _linen(name: str, module: Any, *args: Any) -> Model:
    """A Linen module with random variables of the shapes that its arguments give."""
    return Model(name, module, args, _randomised(jax.eval_shape(module.init, jax.random.key(0), *args)))


def _tokens() -> jax.Array:
    """[BATCH, SEQ] int32 tokens below VOCAB."""
    return jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (BATCH, SEQ), np.int32))


def _hidden(*shape: int) -> jax.Array:
    """Float32 activations, [BATCH, SEQ, EMBED] unless a shape is given."""
    return jnp.asarray(np.random.default_rng(2).standard_normal(shape or (BATCH, SEQ, EMBED), np.float32))


def _decoder_args() -> tuple[Any, ...]:
    """Tokens, positions, no cache, causal mask [BATCH, SEQ, SEQ]: what the tunix and Gemma decoders take."""
    positions = np.tile(np.arange(SEQ, dtype=np.int32), (BATCH, 1))
    mask = np.tile(np.tril(np.ones((SEQ, SEQ), np.bool_)), (BATCH, 1, 1))
    return _tokens(), jnp.asarray(positions), None, jnp.asarray(mask)


# google-tunix


@contextmanager
def _flax_option_kept() -> Iterator[None]:
    """Undo what importing a tunix model does to the process: it turns `flax_always_shard_variable` off.

    The models need it off while they are built without a mesh, since their parameters name mesh axes.
    """
    import flax

    before = flax.config.flax_always_shard_variable
    flax.config.update("flax_always_shard_variable", False)
    try:
        yield
    finally:
        flax.config.update("flax_always_shard_variable", before)


@_flax_option_kept()
def _llama3(name: str, *, remat: str = "NONE", **options: Any) -> Model:
    from tunix.models.llama3 import model

    config = model.ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCAB,
        embed_dim=EMBED,
        hidden_dim=MLP,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_kv_heads=KV_HEADS,
        rope_theta=10_000,
        norm_eps=1e-5,
        remat_config=model.RematConfig[remat],
        **options,
    )
    return _nnx(name, lambda rngs: model.Llama3(config, rngs=rngs), *_decoder_args())


def tunix_llama3() -> Model:
    """Llama3 with grouped-query attention and an untied output projection."""
    return _llama3("tunix_llama3")


def tunix_llama3_tied() -> Model:
    """Llama3 whose embedding is its output projection too (a gather and a transposed contraction of one parameter)."""
    return _llama3("tunix_llama3_tied", weight_tying=True)


def tunix_llama3_remat() -> Model:
    """Llama3 with `nnx.remat` around attention and MLP."""
    return _llama3("tunix_llama3_remat", remat="BLOCK")


@_flax_option_kept()
def _qwen3(name: str, **options: Any) -> Model:
    from tunix.models.qwen3 import model

    config = model.ModelConfig(
        num_layers=LAYERS,
        vocab_size=VOCAB,
        embed_dim=EMBED,
        hidden_dim=MLP,
        num_heads=HEADS,
        head_dim=2 * HEAD_DIM,
        num_kv_heads=KV_HEADS,
        rope_theta=10_000,
        norm_eps=1e-6,
        **options,
    )
    return _nnx(name, lambda rngs: model.Qwen3(config, rngs=rngs), *_decoder_args())


def tunix_qwen3() -> Model:
    """Dense Qwen3, all float32; head size 32, so that heads * head_dim is not the embedding size."""
    return _qwen3("tunix_qwen3")


def tunix_qwen3_bf16() -> Model:
    """Dense Qwen3, float32 parameters cast to bfloat16 before every contraction."""
    return _qwen3("tunix_qwen3_bf16", dtype=jnp.bfloat16)


def tunix_qwen3_moe() -> Model:
    """Qwen3 with 4 experts, top 2: `[E, D, F]` stacks sliced expert by expert in a Python loop."""
    return _qwen3("tunix_qwen3_moe", num_experts=4, num_experts_per_tok=2)


def tunix_qwen3_moe_bf16() -> Model:
    """Qwen3 with 8 experts, top 2, float32 parameters and bfloat16 computation (each slice is cast on its own)."""
    return _qwen3("tunix_qwen3_moe_bf16", num_experts=8, num_experts_per_tok=2, dtype=jnp.bfloat16)


@_flax_option_kept()
def _gemma4(name: str, **options: Any) -> Model:
    from tunix.models.gemma4 import model

    config = model.ModelConfig(
        num_layers=LAYERS,
        num_embed=VOCAB,
        embed_dim=EMBED,
        hidden_dim=MLP,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_kv_heads=KV_HEADS,
        global_key_size=2 * HEAD_DIM,
        sliding_window_size=4,
        attention_pattern=(model.AttentionType.LOCAL_SLIDING, model.AttentionType.GLOBAL),
        **options,
    )
    return _nnx(name, lambda rngs: model.Gemma4(config, rngs=rngs), *_decoder_args())


def tunix_gemma4() -> Model:
    """Dense Gemma 4: per-layer inputs, keys and values in one fused parameter `[2, K, D, H]`, tied embeddings."""
    return _gemma4("tunix_gemma4", per_layer_input_dim=32)


def tunix_gemma4_moe() -> Model:
    """Gemma 4 with 4 experts, top 2, beside a dense MLP: `ragged_dot`, gate and up in one `[E, 2, F, D]` parameter."""
    return _gemma4(
        "tunix_gemma4_moe",
        num_global_kv_heads=1,
        k_eq_v_global=True,
        enable_moe=True,
        num_experts=4,
        num_experts_per_tok=2,
        expert_dim=MLP,
        moe_dense_hidden_dim=MLP,
    )


# gemma (2.0.x, whose `gemma.transformer` is Linen; installed with --no-deps, since its requirements bring TensorFlow)


def gemma2() -> Model:
    """Gemma 2 in Linen: fused keys and values `[2, K, D, H]`, fused gate and up `[2, D, F]`, `lax.cond`, tied head."""
    from gemma import modules, transformer

    config = transformer.TransformerConfig(
        num_layers=LAYERS,
        num_embed=VOCAB,
        embed_dim=EMBED,
        hidden_dim=MLP,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_kv_heads=KV_HEADS,
        final_logit_softcap=30.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(modules.AttentionType.LOCAL_SLIDING, modules.AttentionType.GLOBAL),
        attn_logits_soft_cap=50.0,
        sliding_window_size=4,
    )
    return _linen("gemma2", transformer.Transformer(config), *_decoder_args())


# flax.nnx


def nnx_attention() -> Model:
    """`nnx.MultiHeadAttention` with biases, self-attention."""
    from flax import nnx

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.MultiHeadAttention(num_heads=HEADS, in_features=EMBED, decode=False, rngs=rngs)

    return _nnx("nnx_attention", build, _hidden())


def nnx_attention_bf16() -> Model:
    """`nnx.MultiHeadAttention` in bfloat16 over float32 parameters, normalised q and k, unused dropout state."""
    from flax import nnx

    def build(rngs: nnx.Rngs) -> nnx.Module:
        return nnx.MultiHeadAttention(
            num_heads=HEADS,
            in_features=EMBED,
            qkv_features=2 * EMBED,
            dtype=jnp.bfloat16,
            param_dtype=jnp.float32,
            dropout_rate=0.1,
            normalize_qk=True,
            decode=False,
            rngs=rngs,
        )

    return _nnx("nnx_attention_bf16", build, _hidden())


def nnx_mlp() -> Model:
    """Gated MLP of `nnx.Linear`, `nnx.LinearGeneral` (two output axes) and `nnx.Einsum` (contracting both of them)."""
    from flax import nnx

    class GatedMlp(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.gate = nnx.Linear(EMBED, MLP, rngs=rngs)
            self.up = nnx.LinearGeneral(EMBED, (HEADS, MLP // HEADS), rngs=rngs)
            self.down = nnx.Einsum("...hf,hfd->...d", (HEADS, MLP // HEADS, EMBED), (EMBED,), rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            up = self.up(x)
            return self.down(nnx.silu(self.gate(x)).reshape(up.shape) * up)

    return _nnx("nnx_mlp", GatedMlp, _hidden())


def nnx_mlp_bf16() -> Model:
    """`nnx.Linear` and `nnx.LinearGeneral` over two input axes, bfloat16 over float32 parameters, `nnx.LayerNorm`."""
    from flax import nnx

    class Mlp(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.LayerNorm(EMBED, dtype=jnp.bfloat16, rngs=rngs)
            self.up = nnx.Linear(EMBED, MLP, dtype=jnp.bfloat16, rngs=rngs)
            self.down = nnx.LinearGeneral(
                (HEADS, MLP // HEADS), EMBED, axis=(-2, -1), use_bias=False, dtype=jnp.bfloat16, rngs=rngs
            )

        def __call__(self, x: jax.Array) -> jax.Array:
            h = nnx.gelu(self.up(self.norm(x)))
            return x + self.down(h.reshape(*h.shape[:-1], HEADS, MLP // HEADS))

    return _nnx("nnx_mlp_bf16", Mlp, _hidden())


def nnx_experts() -> Model:
    """Experts as batch dimensions of `nnx.Einsum`: `ecd,edf->ecf`, gate, up and down, 4 experts."""
    from flax import nnx

    class Experts(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.gate = nnx.Einsum("ecd,edf->ecf", (4, EMBED, MLP), rngs=rngs)
            self.up = nnx.Einsum("ecd,edf->ecf", (4, EMBED, MLP), rngs=rngs)
            self.down = nnx.Einsum("ecf,efd->ecd", (4, MLP, EMBED), rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.down(nnx.silu(self.gate(x)) * self.up(x))

    return _nnx("nnx_experts", Experts, _hidden(4, SEQ, EMBED))


def nnx_unpacked() -> Model:
    """A parameter unpacked into two weights (`unstack`, or slices on old jax), one cut by `jnp.split`; ReLU."""
    from flax import nnx

    class Unpacked(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            init = nnx.initializers.lecun_normal()
            self.gate_up = nnx.Param(init(rngs.params(), (2, EMBED, MLP)))
            self.down = nnx.Param(init(rngs.params(), (MLP, 2 * EMBED)))

        def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            gate, up = self.gate_up[...]
            h = nnx.relu(x @ gate) * (x @ up)
            left, right = jnp.split(self.down[...], 2, axis=1)
            return h @ left, h @ right

    return _nnx("nnx_unpacked", Unpacked, _hidden())


def nnx_scan() -> Model:
    """Blocks made by `nnx.vmap` and run by `nnx.scan` over `nnx.remat`: every parameter has a leading layer axis."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.norm = nnx.RMSNorm(EMBED, rngs=rngs)
            self.up = nnx.Linear(EMBED, MLP, rngs=rngs)
            self.down = nnx.Linear(MLP, EMBED, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return x + self.down(nnx.gelu(self.up(self.norm(x))))

    class Stack(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            @nnx.split_rngs(splits=LAYERS)
            @nnx.vmap(in_axes=(0,), out_axes=0)
            def make(rngs: nnx.Rngs) -> Block:
                return Block(rngs)

            self.blocks = make(rngs)
            self.head = nnx.Linear(EMBED, VOCAB, use_bias=False, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            @nnx.remat
            def run(block: Block, x: jax.Array) -> jax.Array:
                return block(x)

            return self.head(run(self.blocks, x))

    return _nnx("nnx_scan", Stack, _hidden())


# flax.linen


def linen_attention() -> Model:
    """`nn.MultiHeadDotProductAttention`, self-attention, float32."""
    import flax.linen as nn

    return _linen("linen_attention", nn.MultiHeadDotProductAttention(num_heads=HEADS, qkv_features=EMBED), _hidden())


def linen_attention_bf16() -> Model:
    """Cross-attention `nn.MultiHeadDotProductAttention` in bfloat16 over float32 parameters: q reads another value."""
    import flax.linen as nn

    attention = nn.MultiHeadDotProductAttention(
        num_heads=HEADS, qkv_features=2 * EMBED, dtype=jnp.bfloat16, param_dtype=jnp.float32, use_bias=False
    )
    return _linen("linen_attention_bf16", attention, _hidden(), _hidden(BATCH, 2 * SEQ, EMBED))


def linen_mlp() -> Model:
    """Gated MLP of `nn.Dense` and `nn.DenseGeneral` (two output axes, then two input axes)."""
    import flax.linen as nn

    class GatedMlp(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            gate = nn.DenseGeneral((HEADS, MLP // HEADS), name="gate")(x)
            up = nn.Dense(MLP, use_bias=False, name="up")(x)
            h = nn.silu(gate) * up.reshape(gate.shape)
            return nn.DenseGeneral(EMBED, axis=(-2, -1), name="down")(h)

    return _linen("linen_mlp", GatedMlp(), _hidden())


def linen_mlp_bf16() -> Model:
    """`nn.LayerNorm`, `nn.Dense` and `nn.DenseGeneral` in bfloat16 over float32 parameters."""
    import flax.linen as nn

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            y = nn.LayerNorm(dtype=jnp.bfloat16, name="norm")(x)
            h = nn.gelu(nn.Dense(MLP, dtype=jnp.bfloat16, name="up")(y)).reshape(*x.shape[:-1], HEADS, MLP // HEADS)
            return x + nn.DenseGeneral(EMBED, axis=(-2, -1), dtype=jnp.bfloat16, name="down")(h)

    return _linen("linen_mlp_bf16", Mlp(), _hidden())


def linen_scan() -> Model:
    """A language model with `nn.scan(nn.remat(Block))`: attention and MLP parameters stacked over layers, tied head."""
    import flax.linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
            y = nn.RMSNorm(name="attn_norm")(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, use_bias=False, name="attn")(y, mask=mask)
            y = nn.RMSNorm(name="mlp_norm")(x)
            h = nn.silu(nn.Dense(MLP, use_bias=False, name="gate")(y)) * nn.Dense(MLP, use_bias=False, name="up")(y)
            return x + nn.Dense(EMBED, use_bias=False, name="down")(h), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, tokens: jax.Array) -> jax.Array:
            embed = nn.Embed(VOCAB, EMBED, name="embed")
            blocks = nn.scan(
                nn.remat(Block, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=LAYERS,
            )(name="blocks")
            x, _ = blocks(embed(tokens), nn.make_causal_mask(tokens))
            return embed.attend(nn.RMSNorm(name="norm")(x))

    return _linen("linen_scan", Stack(), _tokens())


def linen_partitioned() -> Model:
    """Parameters boxed in `nn.Partitioned` by `nn.with_partitioning`; the variables keep their boxes."""
    import flax.linen as nn

    init = nn.initializers.lecun_normal()

    class Sharded(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            column, row = nn.with_partitioning(init, (None, "tp")), nn.with_partitioning(init, ("tp", None))
            gate = nn.Dense(MLP, use_bias=False, kernel_init=column, name="gate")(x)
            up = nn.Dense(MLP, use_bias=False, kernel_init=column, name="up")(x)
            down = self.param("down", row, (MLP, EMBED))
            return (nn.silu(gate) * up) @ down

    return _linen("linen_partitioned", Sharded(), _hidden())


def linen_vit() -> Model:
    """A vision transformer: `nn.Conv` patch embedding, position embedding, one encoder block, bfloat16 computation."""
    import flax.linen as nn

    class Vit(nn.Module):
        @nn.compact
        def __call__(self, images: jax.Array) -> jax.Array:
            x = nn.Conv(EMBED, (4, 4), strides=(4, 4), padding="VALID", dtype=jnp.bfloat16, name="patches")(images)
            x = x.reshape(x.shape[0], -1, EMBED)
            x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], EMBED)).astype(x.dtype)
            y = nn.LayerNorm(dtype=jnp.bfloat16, name="norm")(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, dtype=jnp.bfloat16, name="attn")(y)
            h = nn.gelu(nn.Dense(MLP, dtype=jnp.bfloat16, name="up")(x))
            x = x + nn.Dense(EMBED, dtype=jnp.bfloat16, name="down")(h)
            return nn.Dense(10, name="head")(x.mean(axis=1))

    return _linen("linen_vit", Vit(), _hidden(BATCH, 16, 16, 3))


MODELS: dict[str, tuple[str | None, Callable[[], Model]]] = {
    "tunix_llama3": ("tunix", tunix_llama3),
    "tunix_llama3_tied": ("tunix", tunix_llama3_tied),
    "tunix_llama3_remat": ("tunix", tunix_llama3_remat),
    "tunix_qwen3": ("tunix", tunix_qwen3),
    "tunix_qwen3_bf16": ("tunix", tunix_qwen3_bf16),
    "tunix_qwen3_moe": ("tunix", tunix_qwen3_moe),
    "tunix_qwen3_moe_bf16": ("tunix", tunix_qwen3_moe_bf16),
    "tunix_gemma4": ("tunix", tunix_gemma4),
    "tunix_gemma4_moe": ("tunix", tunix_gemma4_moe),
    "gemma2": ("gemma", gemma2),
    "nnx_attention": (None, nnx_attention),
    "nnx_attention_bf16": (None, nnx_attention_bf16),
    "nnx_mlp": (None, nnx_mlp),
    "nnx_mlp_bf16": (None, nnx_mlp_bf16),
    "nnx_experts": (None, nnx_experts),
    "nnx_unpacked": (None, nnx_unpacked),
    "nnx_scan": (None, nnx_scan),
    "linen_attention": (None, linen_attention),
    "linen_attention_bf16": (None, linen_attention_bf16),
    "linen_mlp": (None, linen_mlp),
    "linen_mlp_bf16": (None, linen_mlp_bf16),
    "linen_scan": (None, linen_scan),
    "linen_partitioned": (None, linen_partitioned),
    "linen_vit": (None, linen_vit),
}
