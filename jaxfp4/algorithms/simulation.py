"""A model's function with the plan's numerics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
from jax import Array
from jax.extend.core import JaxprEqn

from jaxfp4.algorithms.activation_rounding import pre_scaled, quantize_activation
from jaxfp4.algorithms.inputs import leaves_for, marks_for, tracked_inputs
from jaxfp4.algorithms.packed_product import packed_product
from jaxfp4.algorithms.scaled_product import multiply_fp4, scaled_product
from jaxfp4.recipes.plan import Plan, Scheme
from jaxfp4.tensors.cache_rounding import fake_quantize_cache
from jaxfp4.tensors.fp8_tensor import fake_quantize_fp8
from jaxfp4.tensors.mesh import sole_devices
from jaxfp4.tensors.pacing import paced
from jaxfp4.transform.evaluate import evaluate
from jaxfp4.transform.marks import Mark
from jaxfp4.transform.scope import Hooks, original_product
from jaxfp4.transform.sites import Meeting, Tracked
from jaxfp4.transform.trace import ApplyFn, trace

Multiply = Callable[[Meeting, Array, JaxprEqn], Array | None]
"""The hook `multiply` of `jaxfp4.transform.scope.Hooks`."""


def quantized(apply_fn: ApplyFn, plan: Plan) -> Callable[..., Any]:
    """A jitted `(qparams, *args) -> outputs`: `apply_fn` with quantized weights and, for W4A4 and W8A8, activations.

    Weights are dequantized where they are contracted, layer by layer in a scan. Activations are quantized along the
    contraction with the calibrated input scale and dequantized before the product, with a straight-through gradient;
    without input scale a weight takes the amax of the activation at hand. Keys and values are quantized where they
    are marked, as the recipe's `kv_cache` says. Nothing else changes.

    On an NVIDIA GPU a large NVFP4 weight that meets few rows is read as it is packed, if all arrays are known to be on
    one device: `jaxfp4.kernels.matmul.packed_matmul`, which does not round the weight to the parameter's dtype. On one
    whose tensor cores multiply FP4, W4A4 products are of the codes themselves, with calibrated input scales:
    `jaxfp4.algorithms.scaled_product.scaled_matmul`. Derivatives are those with the dequantized weight.
    """
    schemes = {entry.weight.leaf: entry.scheme for entry in plan.quantized}

    def by_codes(meeting: Meeting, activation: Array, eqn: JaxprEqn) -> Array | None:
        product = scaled_product(meeting, eqn) if schemes[meeting.leaf] is Scheme.W4A4 else None
        return packed_product(meeting, activation, eqn) if product is None else product

    def multiply_on(devices: Collection[jax.Device]) -> Multiply:
        if not devices:
            return original_product
        return by_codes if multiply_fp4(devices) else packed_product

    return simulation(apply_fn, plan, multiply_on)


def simulation(
    apply_fn: ApplyFn, plan: Plan, multiply_on: Callable[[Collection[jax.Device]], Multiply]
) -> Callable[..., Any]:
    """As `quantized`, with a choice of how to multiply: on one of some devices, or, if there are none, on a mesh."""
    schemes = {entry.weight.leaf: entry.scheme for entry in plan.quantized}

    def replace_activation(meeting: Meeting) -> Array:
        activation, scale = pre_scaled(meeting), meeting.weight.scale("input_scale")
        if schemes[meeting.leaf] is Scheme.W4A4:
            return quantize_activation(meeting, activation, scale)
        if schemes[meeting.leaf] is Scheme.W8A8:
            return fake_quantize_fp8(meeting.rotated(activation), scale)
        return meeting.rotated(activation)

    @paced
    @functools.partial(jax.jit, static_argnums=0)
    def run(multiply: Multiply, qparams: Any, *args: Any) -> Any:
        leaves = leaves_for(plan, qparams)
        traced = trace(apply_fn, leaves, args)
        inputs = [*tracked_inputs(plan, leaves, plan.quantized), *jax.tree.leaves(args)]
        hooks = Hooks(
            replace_activation=replace_activation,
            multiply=multiply,
            marks=marks_for(plan, leaves, traced.body),
            replace_marked=functools.partial(_quantize_marked, plan),
        )
        results, _ = evaluate(traced.body, inputs, hooks)
        return jax.tree.unflatten(traced.out_tree, results)

    def quantized_fn(qparams: Any, *args: Any) -> Any:
        return run(multiply_on(sole_devices((qparams, args))), qparams, *args)

    return quantized_fn


def _quantize_marked(plan: Plan, mark: Mark, weight: Tracked, value: Array) -> Array:
    """Keys or values as the cache gives them back."""
    cache = plan.recipe.kv_cache
    return value if cache is None else fake_quantize_cache(value, weight.scale(mark.part), cache.format)
