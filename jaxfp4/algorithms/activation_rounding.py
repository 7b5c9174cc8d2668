"""The activation of a contraction as it is before and after its quantization."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxfp4.tensors.quantize import fake_quantize, fake_quantize_with_scale
from jaxfp4.transform.sites import Meeting, along


def pre_scaled(meeting: Meeting) -> Array:
    """The activation with its channels multiplied by the weight's `pre_scale`, in its own dtype."""
    pre_scale, activation = meeting.weight.scale("pre_scale"), meeting.activation
    if pre_scale is None:
        return activation
    dimensions = meeting.activation_dimensions
    shape = [activation.shape[d] for d in dimensions]
    order = sorted(range(len(shape)), key=lambda i: dimensions[i])
    factors = jnp.transpose(pre_scale.reshape(shape), order)
    others = [d for d in range(activation.ndim) if d not in dimensions]
    return (activation * jax.lax.expand_dims(factors, others)).astype(activation.dtype)


def quantize_activation(meeting: Meeting, x: Array, scale: Array | None) -> Array:
    """An activation of a meeting rotated as the weight is and fake-quantized, in the weight's order of axes."""
    dimensions, rotation = meeting.activation_dimensions, meeting.weight.rotation
    if scale is None:
        return along(meeting.rotated(x), dimensions, fake_quantize)
    with_scale = functools.partial(fake_quantize_with_scale, global_scale=scale, rotation=rotation)
    return along(x, dimensions, with_scale)
