"""The model that comes with the package: a byte-level mixture of experts, trained on the standard library's text.

It is small (3.7 MB in bfloat16) and `jaxfp4.models.train` made it: four layers, eight experts of which two run for each
byte, every sharded width split over 8 devices in whole blocks. On the held-out text of Python 3.11 and 3.12 it needs
1.28 bits per byte (`bits_per_byte` over ``heldout_batches(8, 128, 256)``); single bytes need about 4.6.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from numpy.typing import NDArray

from jaxfp4.models.config import DecoderConfig
from jaxfp4.models.decoder import Decoder
from jaxfp4.models.hf_layout import load_decoder

#: The built-in checkpoint, in the Hugging Face layout.
BUILTIN_DIRECTORY = Path(__file__).parent / "data"


def builtin_config() -> DecoderConfig:
    """The configuration of the built-in model, read from the ``config.json`` in the package."""
    return DecoderConfig.from_hf(json.loads((BUILTIN_DIRECTORY / "config.json").read_text(encoding="utf-8")))


def load_builtin(mesh: Mesh | None = None) -> Decoder:
    """The built-in model in bfloat16: on the default device, or sharded over `mesh` as `load_decoder` does."""
    return load_decoder(BUILTIN_DIRECTORY, mesh=mesh)


def bits_per_byte(apply_fn: Callable[[Any, Array], Array], params: Any, batches: Iterable[NDArray[np.int32]]) -> float:
    """How many bits a byte-level model needs for each byte of `batches` but the first of every row.

    ``mean(-log2 softmax(logits)[t, token[t + 1]])``; 8 for a uniform guess, about 4.5 for source text under the
    frequencies of single bytes. A logit that is NaN makes the result NaN.

    Args:
        apply_fn: ``(params, tokens [batch, time]) -> logits [batch, time, vocabulary]``; compiled once per function
            and shape. params: its first argument. batches: int32 arrays ``[batch, time]`` with at least two columns.

    Raises:
        ValueError: there is no batch, or a batch has fewer than two columns.
    """
    nats, count = 0.0, 0
    for tokens in batches:
        if tokens.ndim != 2 or tokens.shape[1] < 2:
            raise ValueError(
                f"bits_per_byte: a batch has shape {tokens.shape}, wanted [batch, time] with time at least 2"
            )
        nats += float(_summed_nll(apply_fn, params, tokens))
        count += tokens.shape[0] * (tokens.shape[1] - 1)
    if count == 0:
        raise ValueError("bits_per_byte: batches is empty, wanted at least one array of tokens")
    return nats / count / math.log(2)


@functools.partial(jax.jit, static_argnums=0)
def _summed_nll(apply_fn: Callable[[Any, Array], Array], params: Any, tokens: Array) -> Array:
    """Sum of the negative log-likelihoods, in nats, of every token but the first of each row."""
    log_probabilities = jax.nn.log_softmax(apply_fn(params, tokens)[:, :-1].astype(jnp.float32), axis=-1)
    return -jnp.sum(jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1))
