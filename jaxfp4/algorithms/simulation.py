"""A model's function with the plan's numerics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxfp4.algorithms.inputs import leaves_for, marks_for, tracked_inputs
from jaxfp4.algorithms.packed_product import packed_product
from jaxfp4.recipes.plan import Plan, Scheme
from jaxfp4.tensors.cache_rounding import fake_quantize_cache
from jaxfp4.tensors.fp8_tensor import fake_quantize_fp8
from jaxfp4.tensors.mesh import on_one_device
from jaxfp4.tensors.quantize import fake_quantize, fake_quantize_with_scale
from jaxfp4.transform.evaluate import evaluate
from jaxfp4.transform.marks import Mark
from jaxfp4.transform.scope import Hooks, original_product
from jaxfp4.transform.sites import Meeting, Tracked, along
from jaxfp4.transform.trace import ApplyFn, trace


def quantized(apply_fn: ApplyFn, plan: Plan) -> Callable[..., Any]:
    """A jitted `(qparams, *args) -> outputs`: `apply_fn` with quantized weights and, for W4A4 and W8A8, activations.

    Weights are dequantized where they are contracted, layer by layer in a scan. Activations are quantized along the
    contraction with the calibrated input scale and dequantized before the product, with a straight-through gradient;
    without input scale a weight takes the amax of the activation at hand. Keys and values are quantized where they
    are marked, as the recipe's `kv_cache` says. Nothing else changes.

    On an NVIDIA GPU a large NVFP4 weight that meets few rows is read as it is packed, if all arrays are known to be on
    one device: `jaxfp4.kernels.matmul.packed_matmul`, which does not round the weight to the parameter's dtype.
    Derivatives are those with the dequantized weight.
    """
    schemes = {entry.weight.leaf: entry.scheme for entry in plan.quantized}

    def replace_activation(meeting: Meeting) -> Array:
        activation, scale = _pre_scaled(meeting), meeting.weight.scale("input_scale")
        if schemes[meeting.leaf] is Scheme.W4A4:
            return quantize_activation(meeting, activation, scale)
        if schemes[meeting.leaf] is Scheme.W8A8:
            return fake_quantize_fp8(meeting.rotated(activation), scale)
        return meeting.rotated(activation)

    @functools.partial(jax.jit, static_argnums=0)
    def run(one_device: bool, qparams: Any, *args: Any) -> Any:
        leaves = leaves_for(plan, qparams)
        traced = trace(apply_fn, leaves, args)
        inputs = [*tracked_inputs(plan, leaves, plan.quantized), *jax.tree.leaves(args)]
        hooks = Hooks(
            replace_activation=replace_activation,
            multiply=packed_product if one_device else original_product,
            marks=marks_for(plan, leaves, traced.body),
            replace_marked=functools.partial(_quantize_marked, plan),
        )
        results, _ = evaluate(traced.body, inputs, hooks)
        return jax.tree.unflatten(traced.out_tree, results)

    def quantized_fn(qparams: Any, *args: Any) -> Any:
        return run(on_one_device((qparams, args)), qparams, *args)

    return quantized_fn


def _quantize_marked(plan: Plan, mark: Mark, weight: Tracked, value: Array) -> Array:
    """Keys or values as the cache gives them back."""
    cache = plan.recipe.kv_cache
    return value if cache is None else fake_quantize_cache(value, weight.scale(mark.part), cache.format)


def _pre_scaled(meeting: Meeting) -> Array:
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
