"""Calibration with all experts: statistics of every expert from every token, outputs of the normal routing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxfp4.models.decoder import Decoder, ExpertsFn, routed_experts


def with_all_experts(experts_fn: ExpertsFn = routed_experts) -> ExpertsFn:
    """`experts_fn`, which besides its result computes the experts once more, every row through every one of them.

    The second result is dropped: what the model computes is bit for bit what it computes without. But its contractions
    are in the model's jaxpr, so that calibration sees their activations too.
    """

    def observing(x: Array, probabilities: Array, experts: Array, gate: Array, up: Array, down: Array) -> Array:
        count = gate.shape[0]
        everyone = jnp.broadcast_to(jnp.arange(count, dtype=experts.dtype), (x.shape[0], count))
        output = experts_fn(x, probabilities, experts, gate, up, down)
        experts_fn(x, jnp.full(everyone.shape, 1 / count, probabilities.dtype), everyone, gate, up, down)
        return output

    return observing


def all_experts(model: Decoder) -> tuple[Callable[..., Any], Any]:
    """`(apply_fn, params)` as `from_flax` gives them, of a function to calibrate with: all experts see all tokens.

    An expert that the router sends no token, or few, then gets statistics of its own. `apply_fn` returns the same
    logits bit for bit, and a plan of the function of `from_flax` is one for it too: quantize and run with that.
    An absolute maximum is at least that of normal routing. Sums, as of second moments, count a token twice for the
    experts that it was routed to, so these matter more to an algorithm. Costs experts / experts per token more
    computation in the experts, and memory for all rows of all experts of a layer: take smaller batches.

    Raises TypeError for anything but a `Decoder`, ValueError for one without experts.
    """
    if not isinstance(model, Decoder):
        raise TypeError(
            f"all_experts: found a {type(model).__name__}: wanted a jaxfp4.models.Decoder; in a model of your own call "
            "the experts as with_all_experts does"
        )
    if not model.config.num_experts:
        raise ValueError("all_experts: the model has no experts: wanted a mixture of experts; use from_flax")
    graph, *states = nnx.split(model, nnx.Param, ...)
    params, rest = states
    experts_fn = with_all_experts()

    def apply_fn(params: Any, tokens: Array) -> Array:
        return nnx.merge(graph, params, rest).with_routing(tokens, experts_fn)[0]

    return apply_fn, params
