"""Trains the built-in model: ``python -m jaxfp4.models.train --steps N --out DIR`` (needs optax).

AdamW with a cosine schedule on next-byte prediction over the standard library's source text, plus a load-balancing
loss that keeps all experts in use. Master weights and moments are float32, the computation bfloat16, what is saved
bfloat16. The corpus lives on the device and a hundred steps run as one compiled scan, so the host does nothing but
print. The figure printed along the way is the held-out bits per byte of the bfloat16 weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from rich.console import Console
from rich.progress import Progress

from jaxfp4.models import corpus
from jaxfp4.models.builtin import bits_per_byte
from jaxfp4.models.config import DecoderConfig
from jaxfp4.models.decoder import Decoder, ExpertsFn
from jaxfp4.models.hf_layout import save_decoder

#: The configuration of the built-in model. With tp = 8 a device keeps 16 of an expert's 128 inner channels: one block.
CONFIG = DecoderConfig(
    model_type="qwen3_moe",
    vocab_size=256,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=256,
    qk_norm=True,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    norm_topk_prob=True,
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run depends on besides the corpus. `warmup` is in steps; `dropout` is of the experts' summed output."""

    batch: int = 256
    length: int = 256
    chunk: int = 100
    peak_rate: float = 4e-3
    final_rate: float = 2e-5
    warmup: int = 300
    weight_decay: float = 0.1
    balance: float = 0.01
    dropout: float = 0.0
    seed: int = 0


class TrainState(NamedTuple):
    """Float32 parameters, the optimizer's state, steps done."""

    params: Any
    optimizer: Any
    step: Array


def dense_experts(x: Array, probabilities: Array, experts: Array, gate: Array, up: Array, down: Array) -> Array:
    """The same sums as `routed_experts`, with every row through every expert and the unused products weighted by zero.

    On a GPU a few large matrix products beat many ragged ones at this model's size.
    """
    count, hidden, width = gate.shape
    rows = x.shape[0]
    one_hot = jax.nn.one_hot(experts, count, dtype=x.dtype)
    combine = jnp.einsum("nk,nke->ne", probabilities, one_hot)

    def product(weight: Array) -> Array:
        return (x @ weight.transpose(1, 0, 2).reshape(hidden, count * width)).reshape(rows, count, width)

    inner = jax.nn.silu(product(gate)) * product(up) * combine[:, :, None]
    return inner.reshape(rows, count * width) @ down.reshape(count * width, hidden)


def with_dropout(experts_fn: ExpertsFn, rate: float, key: Array) -> ExpertsFn:
    """`experts_fn`, each element of its result dropped at `rate` (in 256ths), the rest scaled up; a mask per layer."""
    keys = iter(jax.random.split(key, CONFIG.num_hidden_layers))
    dropped = round(rate * 256)

    def dropping(x: Array, *rest: Array) -> Array:
        output = experts_fn(x, *rest)
        kept = jax.random.bits(next(keys), output.shape, jnp.uint8) >= dropped
        return jnp.where(kept, output * (256 / (256 - dropped)), 0).astype(output.dtype)

    return dropping if dropped else experts_fn


def balance_loss(routing: Sequence[Array], k: int) -> Array:
    """Mean over layers of ``E * sum_e(share of rows sent to e * mean probability of e)``; 1 when balanced.

    The auxiliary loss of the Switch Transformer.
    """
    losses = []
    for probabilities in routing:
        count = probabilities.shape[-1]
        _, chosen = jax.lax.top_k(probabilities, k)
        share = jnp.mean(jax.nn.one_hot(chosen, count, dtype=jnp.float32), axis=(0, 1))
        losses.append(count * jnp.sum(share * jnp.mean(probabilities, axis=0)))
    return jnp.mean(jnp.stack(losses))


def learning_rate(step: Array, total: Array, settings: Settings) -> Array:
    """Linear warm-up to `peak_rate`, then a cosine to `final_rate` at step `total`."""
    warm = jnp.minimum(step / settings.warmup, 1.0)
    progress = jnp.clip((step - settings.warmup) / jnp.maximum(total - settings.warmup, 1), 0.0, 1.0)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return warm * (settings.final_rate + (settings.peak_rate - settings.final_rate) * cosine)


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW without its learning rate, which `train_chunk` applies; only matrices decay."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.98),
        optax.add_decayed_weights(settings.weight_decay, mask=lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)),
    )


def loss_fn(params: Any, tokens: Array, key: Array, graph: Any, settings: Settings) -> tuple[Array, Array]:
    """``(loss with the balance term, next-byte loss in nats)`` of tokens ``[batch, time]``; `key` draws the dropout."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    model = nnx.merge(graph, half)
    # Products with one-hot rows, since the gradient of a gather adds thousands of times into the same few rows (on
    # an H200: 11 ms a step instead of 230).
    one_hot = jax.nn.one_hot(tokens, model.config.vocab_size, dtype=jnp.bfloat16)
    embedded = one_hot @ model.embed.embedding[...]
    logits, routing = model.from_embeddings(embedded, with_dropout(dense_experts, settings.dropout, key))
    nll = jnp.mean(optax.softmax_cross_entropy(logits[:, :-1], one_hot[:, 1:].astype(jnp.float32)))
    return nll + settings.balance * balance_loss(routing, model.config.num_experts_per_tok), nll


@functools.partial(jax.jit, static_argnames=("graph", "settings"), donate_argnums=0)
def train_chunk(
    state: TrainState, text: Array, key: Array, total: Array, *, graph: Any, settings: Settings
) -> tuple[TrainState, Array]:
    """`settings.chunk` steps on random windows of `text` (uint8): the state, and the mean next-byte loss in nats."""
    optimizer = make_optimizer(settings)

    def step(state: TrainState, key: Array) -> tuple[TrainState, Array]:
        window_key, dropout_key = jax.random.split(key)
        starts = jax.random.randint(window_key, (settings.batch, 1), 0, text.shape[0] - settings.length + 1)
        tokens = text[starts + jnp.arange(settings.length)].astype(jnp.int32)
        (_, nll), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state.params, tokens, dropout_key, graph, settings
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        rate = learning_rate(state.step, total, settings)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        return TrainState(params, optimizer_state, state.step + 1), nll

    state, losses = jax.lax.scan(step, state, jax.random.split(key, settings.chunk))
    return state, jnp.mean(losses)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _initial_state(config: DecoderConfig, settings: Settings) -> TrainState:
    params = nnx.state(Decoder(config, rngs=nnx.Rngs(settings.seed)), nnx.Param)
    return TrainState(params, make_optimizer(settings).init(params), jnp.zeros((), jnp.int32))


class Trainer:
    """A model in training: its state on the device, and how to advance, measure and save it."""

    def __init__(self, config: DecoderConfig, settings: Settings, text: bytes, heldout: Sequence[Any]):
        self.settings = settings
        self.graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param)
        self.state = _initial_state(config, settings)
        self.text = jnp.asarray(np.frombuffer(text, np.uint8))
        self.heldout = heldout
        self.key = jax.random.key(settings.seed)

    def advance(self, total: int) -> float:
        """Runs one chunk of a run of `total` steps; returns its mean training loss in bits per byte."""
        self.key, key = jax.random.split(self.key)
        self.state, loss = train_chunk(
            self.state, self.text, key, jnp.asarray(total, jnp.int32), graph=self.graph, settings=self.settings
        )
        return float(loss) / float(np.log(2))

    def rounded(self) -> Any:
        """The parameters in bfloat16."""
        return jax.tree.map(lambda p: p.astype(jnp.bfloat16), self.state.params)

    def heldout_bits(self) -> float:
        """Held-out bits per byte of the bfloat16 parameters."""
        return bits_per_byte(self._apply, self.rounded(), self.heldout)

    @functools.cached_property
    def _apply(self) -> Any:
        return lambda params, tokens: nnx.merge(self.graph, params).with_routing(tokens, dense_experts)[0]

    def save(self, directory: Path) -> None:
        """Writes the bfloat16 model in the Hugging Face layout."""
        save_decoder(nnx.merge(self.graph, self.rounded()), directory)


def train(trainer: Trainer, *, steps: int | None, seconds: float | None, out: Path, report_every: int) -> None:
    """Trains for `steps`, or for about `seconds` of compute once compiled; saves at every report and at the end."""
    chunk = trainer.settings.chunk
    total = steps if steps is not None else 10**9
    done = 0
    started = time.monotonic()
    with Progress(console=Console(width=110)) as progress:
        task = progress.add_task("training", total=total)
        while done < total:
            training_bits = trainer.advance(total)
            done += chunk
            if done == chunk:  # the first chunk compiles: start the clock after it
                started = time.monotonic()
            if seconds is not None and done == 3 * chunk:  # the rate is known now: fix the length of the schedule
                total = 3 * chunk + int(seconds / ((time.monotonic() - started) / 2)) * chunk
                progress.update(task, total=total)
            progress.update(task, completed=done)
            if done % (report_every * chunk) == 0 or done >= total:
                elapsed = time.monotonic() - started
                trainer.save(out)
                progress.console.print(
                    f"step {done}/{total}  {elapsed:.0f} s  training {training_bits:.4f}  "
                    f"held-out {trainer.heldout_bits():.4f} bits per byte"
                )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; ``--help`` explains it."""
    parser = argparse.ArgumentParser(prog="python -m jaxfp4.models.train", description=__doc__.split("\n")[0])
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, help="optimizer steps (rounded up to whole chunks)")
    length.add_argument("--seconds", type=float, help="train for about this long instead, compilation not counted")
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json and model.safetensors")
    parser.add_argument("--source", type=Path, action="append", help="a standard library's folder (may repeat)")
    parser.add_argument("--with-tests", action="store_true", help="train on the library's own test folders as well")
    parser.add_argument("--report-every", type=int, default=10, help="chunks between two reports")
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help=f"default {field.default}")
    parsed = parser.parse_args(arguments)
    settings = Settings(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(Settings)})
    roots = parsed.source or [None]
    text = b"".join(corpus.training_bytes(root, with_tests=parsed.with_tests) for root in roots)
    heldout = corpus.heldout_batches(count=8, batch=128, length=settings.length, root=roots[0])
    print(
        f"{len(text)} training bytes, {len(corpus.heldout_bytes(roots[0]))} held out, on {jax.devices()[0]}", flush=True
    )
    trainer = Trainer(CONFIG, settings, text, heldout)
    train(trainer, steps=parsed.steps, seconds=parsed.seconds, out=parsed.out, report_every=parsed.report_every)


if __name__ == "__main__":
    main()
