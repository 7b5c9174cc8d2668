"""The reference decoder: RMSNorm, rotary attention with grouped key/value heads, gated MLP or top-k experts (flax NNX).

It computes what transformers' Llama, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE compute. Parameters are named and
laid out for JAX: a linear kernel is ``[in, out]``, the experts of a layer are one stack ``[experts, in, out]``. Their
paths (``layers/0/attention/q_proj/kernel``) are what plans, partition specs and the checkpoint layout speak of.

It runs on one device or with parameters sharded over a mesh of Auto axes; the compiler places the collectives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.typing import DTypeLike

from jaxfp4.models.config import DecoderConfig
from jaxfp4.models.rotary import rotate

#: (x [N, D], probabilities [N, k], experts [N, k], gate [E, D, F], up [E, D, F], down [E, F, D]) -> [N, D]
ExpertsFn = Callable[[Array, Array, Array, Array, Array, Array], Array]

_KERNEL_INIT = nnx.initializers.lecun_normal()
_STACK_INIT = nnx.initializers.lecun_normal(batch_axis=(0,))


class Linear(nnx.Module):
    """``x @ kernel``, with a `bias` ``x @ kernel + bias``, in the type of `x`. Kernel ``[in, out]``, bias ``[out]``."""

    def __init__(
        self, features_in: int, features_out: int, *, bias: bool = False, param_dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.kernel = nnx.Param(_KERNEL_INIT(rngs.params(), (features_in, features_out), param_dtype))
        if bias:
            self.bias = nnx.Param(jnp.zeros((features_out,), param_dtype))
        self.has_bias = bias

    def __call__(self, x: Array) -> Array:
        product = x @ self.kernel[...].astype(x.dtype)
        return product + self.bias[...].astype(x.dtype) if self.has_bias else product


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, in float32, returned in the type of `x`."""

    def __init__(self, features: int, eps: float, *, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        normalised = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normalised * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class Embedding(nnx.Module):
    """A row per token. Table ``[vocabulary, features]``."""

    def __init__(self, vocabulary: int, features: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.normal(features**-0.5)
        self.embedding = nnx.Param(init(rngs.params(), (vocabulary, features), param_dtype))

    def __call__(self, tokens: Array) -> Array:
        return self.embedding[...][tokens]


class Attention(nnx.Module):
    """Causal attention; each key/value head serves ``num_attention_heads / num_key_value_heads`` query heads.

    A token sees itself and what comes before it, in a layer with a sliding window only the last ``window`` of these.
    """

    def __init__(self, config: DecoderConfig, layer: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        make = functools.partial(Linear, param_dtype=param_dtype, rngs=rngs)
        self.q_proj = make(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = make(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = make(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = make(queries, config.hidden_size, bias=config.attention_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, param_dtype=param_dtype)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, param_dtype=param_dtype)
        self.config = config
        self.window = config.window(layer)

    def __call__(self, x: Array) -> Array:
        batch, time, _ = x.shape
        head_dim, kv_heads = self.config.head_dim, self.config.num_key_value_heads
        query = self.q_proj(x).reshape(batch, time, -1, head_dim)
        key = self.k_proj(x).reshape(batch, time, kv_heads, head_dim)
        value = self.v_proj(x).reshape(batch, time, kv_heads, head_dim)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        rotation = self.config.rotation(time)
        query, key = rotate(query, rotation), rotate(key, rotation)
        # The names by which a recipe's `kv_cache` finds them.
        key, value = checkpoint_name(key, "keys"), checkpoint_name(value, "values")
        query = query.reshape(batch, time, kv_heads, -1, head_dim)
        scores = jnp.einsum("btkgd,bskd->bkgts", query, key, preferred_element_type=jnp.float32) * head_dim**-0.5
        weights = jax.nn.softmax(jnp.where(self._visible(time), scores, -jnp.inf), axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bkgts,bskd->btkgd", weights, value)
        return self.o_proj(mixed.reshape(batch, time, -1))

    def _visible(self, time: int) -> Array:
        """``[time, time]``: whether a token (row) sees another (column)."""
        causal = jnp.tril(jnp.ones((time, time), bool))
        return causal if self.window is None or self.window >= time else jnp.triu(causal, 1 - self.window)


class GatedMLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: DecoderConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        width, hidden = config.intermediate_size, config.hidden_size
        make = functools.partial(Linear, bias=config.mlp_bias, param_dtype=param_dtype, rngs=rngs)
        self.gate_proj = make(hidden, width)
        self.up_proj = make(hidden, width)
        self.down_proj = make(width, hidden)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def routed_experts(x: Array, probabilities: Array, experts: Array, gate: Array, up: Array, down: Array) -> Array:
    """Each row of `x` through the gated MLPs of its own k experts, summed with its routing probabilities.

    The ``N * k`` (row, expert) pairs are sorted by expert, so that `jax.lax.ragged_dot` multiplies every expert's
    weight with the rows routed to it and no others. An expert without rows contributes nothing.

    Args:
        x: ``[N, D]``.
        probabilities: ``[N, k]``, in the type of `x`.
        experts: ``[N, k]`` integers below ``E``.
        gate, up: ``[E, D, F]``.
        down: ``[E, F, D]``.

    Returns:
        ``[N, D]``, in the type of `x`.
    """
    rows, k = experts.shape
    flat = experts.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=gate.shape[0]).astype(jnp.int32)
    routed = x[order // k]
    hidden = jax.nn.silu(jax.lax.ragged_dot(routed, gate, sizes)) * jax.lax.ragged_dot(routed, up, sizes)
    output = jax.lax.ragged_dot(hidden, down, sizes)
    unsorted = output[jnp.argsort(order)].reshape(rows, k, -1)
    return jnp.sum(unsorted * probabilities[:, :, None], axis=1)


class Experts(nnx.Module):
    """The stacked weights of a layer's experts: gate and up ``[E, D, F]``, down ``[E, F, D]``."""

    def __init__(self, config: DecoderConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        count, hidden, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nnx.Param(_STACK_INIT(rngs.params(), (count, hidden, width), param_dtype))
        self.up_proj = nnx.Param(_STACK_INIT(rngs.params(), (count, hidden, width), param_dtype))
        self.down_proj = nnx.Param(_STACK_INIT(rngs.params(), (count, width, hidden), param_dtype))


class MixtureOfExperts(nnx.Module):
    """Top-k experts: float32 softmax over all, the k largest kept and, if the config says so, made to sum to one."""

    def __init__(self, config: DecoderConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.router = Linear(config.hidden_size, config.num_experts, param_dtype=param_dtype, rngs=rngs)
        self.experts = Experts(config, param_dtype=param_dtype, rngs=rngs)
        self.config = config

    def route(self, x: Array, experts_fn: ExpertsFn) -> tuple[Array, Array]:
        """``([N, D] output, [N, E] float32 routing probabilities)`` of the rows `x` ``[N, D]``."""
        probabilities = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        kept, chosen = jax.lax.top_k(probabilities, self.config.num_experts_per_tok)
        if self.config.norm_topk_prob:
            kept = kept / jnp.sum(kept, axis=-1, keepdims=True)
        weights = (self.experts.gate_proj, self.experts.up_proj, self.experts.down_proj)
        gate, up, down = (weight[...].astype(x.dtype) for weight in weights)
        return experts_fn(x, kept.astype(x.dtype), chosen, gate, up, down), probabilities


class DecoderLayer(nnx.Module):
    """Attention, then MLP or experts, each on the RMS-normalised residual stream and added back to it."""

    def __init__(self, config: DecoderConfig, layer: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.attention = Attention(config, layer, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        mlp_class = MixtureOfExperts if config.is_moe_layer(layer) else GatedMLP
        self.mlp: GatedMLP | MixtureOfExperts = mlp_class(config, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array, experts_fn: ExpertsFn) -> tuple[Array, Array | None]:
        x = x + self.attention(self.input_norm(x))
        normalised = self.post_attention_norm(x)
        if isinstance(self.mlp, GatedMLP):
            return x + self.mlp(normalised), None
        output, probabilities = self.mlp.route(normalised.reshape(-1, x.shape[-1]), experts_fn)
        return x + output.reshape(x.shape), probabilities


class Decoder(nnx.Module):
    """A causal language model: ``model(tokens int32 [batch, time]) -> logits float32 [batch, time, vocabulary]``.

    Tokens outside the vocabulary follow JAX's gather rule (clamped); positions start at 0 in every row; there is no
    padding mask. Where the rotation depends on the length of a sequence, it is that of the rows at hand.

    Args:
        config: the sizes.
        param_dtype: type of the (random) parameters made here.
        dtype: type of the computation; by default that of the embedding table at the call. Norms, rotation, softmax and
            routing probabilities are float32 whatever it is.
        rngs: where the random initial parameters come from.

    Raises:
        ValueError: at a call, if the parameters are on a mesh with Explicit axes.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike | None = None,
        rngs: nnx.Rngs,
    ):
        self.embed = Embedding(config.vocab_size, config.hidden_size, param_dtype=param_dtype, rngs=rngs)
        self.layers = nnx.List(
            [DecoderLayer(config, i, param_dtype=param_dtype, rngs=rngs) for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype

    def __call__(self, tokens: Array) -> Array:
        return self.with_routing(tokens)[0]

    def with_routing(self, tokens: Array, experts_fn: ExpertsFn = routed_experts) -> tuple[Array, tuple[Array, ...]]:
        """The logits, and the float32 routing probabilities ``[batch * time, experts]`` of each layer that has experts.

        `experts_fn` computes the experts; `routed_experts` says what it must return.
        """
        _refuse_explicit_axes(self.embed.embedding[...])
        return self.from_embeddings(self.embed(tokens), experts_fn)

    def from_embeddings(self, x: Array, experts_fn: ExpertsFn = routed_experts) -> tuple[Array, tuple[Array, ...]]:
        """As `with_routing`, from the rows ``[batch, time, hidden]`` that the embedding table has for the tokens."""
        if self.dtype is not None:
            x = x.astype(self.dtype)
        routing = []
        for layer in self.layers:
            x, probabilities = layer(x, experts_fn)
            if probabilities is not None:
                routing.append(probabilities)
        x = self.norm(x)
        logits = x @ self.embed.embedding[...].astype(x.dtype).T if self.config.tie_word_embeddings else self.lm_head(x)
        return logits.astype(jnp.float32), tuple(routing)


def _refuse_explicit_axes(table: Array) -> None:
    """Row-parallel products are ambiguous on Explicit axes; say so before JAX says it about some product."""
    mesh = jax.typeof(table).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"decoder: the parameters are on a mesh with Explicit axes ({', '.join(mesh.axis_names)}), wanted Auto "
            "axes; make it with jax.make_mesh(sizes, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))"
        )
