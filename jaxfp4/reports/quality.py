"""What quantization changes in a language model's predictions: its loss, their KL divergence, the top tokens."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from jaxfp4.tensors.pacing import paced

Logits = Callable[[Any, Array], Array]
"""`(params, tokens [batch, time]) -> logits [batch, time, vocabulary]`."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """Held-out batches with the logits of the model in full precision, to compare quantized models with.

    Logits are kept in the dtype that the model gives them: vocabulary times its bytes for each token.
    """

    tokens: tuple[Array, ...]
    """int32 `[batch, time]`."""
    logits: tuple[Array, ...]
    """`[batch, time, vocabulary]` each."""


@dataclasses.dataclass(frozen=True)
class OutputQuality:
    """Predictions of a quantized model beside those in full precision, for every token but the first of each row.

    A logit that is NaN, or infinite and positive, makes all means and quantiles NaN. A token to which the quantized
    model gives no probability makes its bits infinite; any of the vocabulary that the full model expects, the KL.
    """

    tokens: int
    """How many tokens were predicted."""
    bits: float
    """Mean of `-log2 q(token)`: bits per token, and per byte if the tokens are bytes."""
    reference_bits: float
    """The same in full precision."""
    loss_standard_error: float
    """Of `loss`: `std / sqrt(n)` of its means over n batches, which count alike. NaN for a single batch."""
    mean_kl: float
    """Mean of `KL(p || q) = sum(p * log(p / q))` in nats per token, p in full precision, q quantized; at least 0."""
    kl_standard_error: float
    """Of `mean_kl`, over batches as that of `loss`."""
    median_kl: float
    percentile_99_kl: float
    """The least KL that 99 % of the tokens do not exceed."""
    same_top: float
    """The share of tokens, 0 to 1, where both find the same one most probable; the first of those that tie."""

    @property
    def loss(self) -> float:
        """Bits per token more than in full precision; negative if the quantized model predicts better."""
        return self.bits - self.reference_bits


def reference_logits(apply_fn: Logits, params: Any, batches: Iterable[NDArray[np.int32]]) -> Reference:
    """The logits in full precision of int32 batches `[batch, time]`, time at least 2.

    Raises ValueError if there is no batch, one has fewer than two columns, or the logits do not fit it.
    """
    jitted = paced(jax.jit(apply_fn))
    tokens = tuple(jnp.asarray(batch) for batch in batches)
    if not tokens:
        raise ValueError("batches is empty: wanted at least one array of tokens [batch, time]")
    for batch in tokens:
        if batch.ndim != 2 or batch.shape[1] < 2 or not batch.size:
            raise ValueError(f"a batch has shape {batch.shape}: wanted [batch, time] with time at least 2")
    logits = tuple(jitted(params, batch) for batch in tokens)
    for batch, found in zip(tokens, logits, strict=True):
        if found.ndim != 3 or found.shape[:2] != batch.shape:
            raise ValueError(
                f"apply_fn gives {found.shape} for tokens {batch.shape}: wanted logits [batch, time, vocabulary]"
            )
    return Reference(tokens, logits)


def output_quality(quantized_fn: Logits, qparams: Any, reference: Reference) -> OutputQuality:
    """Compares the model with the reference in one pass; one compilation for each function and shape of a batch."""
    pairs = zip(reference.tokens, reference.logits, strict=True)
    found = [jax.device_get(_compared(quantized_fn, qparams, tokens, logits)) for tokens, logits in pairs]
    bits, reference_bits, kl, same = (np.concatenate([part[i].ravel() for part in found]) for i in range(4))
    median, percentile_99 = np.quantile(kl, (0.5, 0.99), method="inverted_cdf").tolist()
    return OutputQuality(
        tokens=bits.size,
        bits=_mean(bits),
        reference_bits=_mean(reference_bits),
        loss_standard_error=_standard_error([_mean(part[0]) - _mean(part[1]) for part in found]),
        mean_kl=_mean(kl),
        kl_standard_error=_standard_error([_mean(part[2]) for part in found]),
        median_kl=median,
        percentile_99_kl=percentile_99,
        same_top=_mean(same),
    )


@functools.partial(jax.jit, static_argnums=0)
def _compared(quantized_fn: Logits, qparams: Any, tokens: Array, logits: Array) -> tuple[Array, Array, Array, Array]:
    """For each token `[batch, time - 1]`: its bits quantized and in full precision, KL in nats, whether the top agrees.

    The last is 1 or 0, or NaN where the KL is.
    """
    p = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    q = jax.nn.log_softmax(quantized_fn(qparams, tokens)[:, :-1].astype(jnp.float32), axis=-1)
    # What the full model excludes adds nothing, whatever q is. The sum can fall below 0 by rounding alone.
    kl = jnp.maximum(jnp.sum(jnp.where(p == -jnp.inf, 0, jnp.exp(p) * (p - q)), axis=-1), 0)
    same = jnp.where(jnp.isnan(kl), jnp.nan, jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1))
    at_token = tokens[:, 1:, None]
    bits = [-jnp.take_along_axis(side, at_token, axis=-1)[..., 0] / math.log(2) for side in (q, p)]
    return bits[0], bits[1], kl, same


def _mean(values: NDArray[np.float32]) -> float:
    return float(np.mean(values, dtype=np.float64))


def _standard_error(means: list[float]) -> float:
    if len(means) < 2 or not all(map(math.isfinite, means)):
        return math.nan
    return float(np.std(means, ddof=1)) / math.sqrt(len(means))
