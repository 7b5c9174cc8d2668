"""Weights of a plan that one compiled program can quantize several of."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax import Array

from jaxfp4.algorithms.encoders import encoder_for
from jaxfp4.recipes.plan import Plan, PlannedWeight
from jaxfp4.tensors.blocks import normalize_axes
from jaxfp4.tensors.nvfp4_tensor import NVFP4Tensor
from jaxfp4.tensors.together import Order, Placed, placed, quantize_together
from jaxfp4.transform.statistics import MomentForm

GROUPS_AT_ONCE = 8
"""Groups of siblings in one program, such as queries, keys and values of eight layers: enough that launching costs
little beside the work, few enough that compiling does not."""

Group = tuple[PlannedWeight, ...]


class Quantized(NamedTuple):
    """Weights by path, and whether all that came from one program are finite, to be read without waiting in between."""

    tensors: dict[str, NVFP4Tensor]
    finite: list[tuple[tuple[str, ...], Array]]


def quantized_together(plan: Plan, groups: Iterable[Group], arrays: Mapping[str, Array]) -> Quantized:
    """Those of the groups of siblings whose methods and places allow it.

    The others need statistics or a rotation, are FP8, traced, on devices of their own, or cut into parts of blocks.
    """
    alike: dict[tuple[Placed, ...], list[Group]] = {}
    for group in groups:
        signature = _signature(plan, group, arrays)
        if signature is not None:
            alike.setdefault(signature, []).append(group)
    result = Quantized({}, [])
    for signature, members in alike.items():
        for chunk in _chunks(members, GROUPS_AT_ONCE):
            tensors, finite = quantize_together([tuple(arrays[e.path] for e in group) for group in chunk], signature)
            for group, found in zip(chunk, tensors, strict=True):
                for entry, tensor in zip(group, found, strict=True):
                    dtype = np.dtype(entry.weight.dtype)
                    result.tensors[entry.path] = (
                        tensor if tensor.dtype == dtype else dataclasses.replace(tensor, dtype=dtype)
                    )
            result.finite.append((tuple(entry.path for group in chunk for entry in group), finite))
    return result


def _chunks(groups: Sequence[Group], most: int) -> list[Sequence[Group]]:
    """In order, in as few parts as can be and of at most two sizes, each of which is compiled.

    >>> [len(chunk) for chunk in _chunks(range(18), 8)]
    [6, 6, 6]
    """
    count = -(-len(groups) // most)
    bounds = [round(i * len(groups) / count) for i in range(count + 1)]
    return [groups[start:end] for start, end in itertools.pairwise(bounds)]


def _signature(plan: Plan, group: Group, arrays: Mapping[str, Array]) -> tuple[Placed, ...] | None:
    orders = _orders(plan, group)
    return None if orders is None else placed([arrays[entry.path] for entry in group], orders)


def _orders(plan: Plan, group: Group) -> list[Order] | None:
    methods = [entry.method for entry in group]
    forms = {form for method in methods for form in (method.scales.moments, method.rounding.moments)}
    if forms != {MomentForm.NONE} or any(entry.is_fp8 for entry in group):
        return None
    if any(method.rotation is not None for method in methods):
        return None
    divisor = min(method.scales.divisor for method in methods)
    return [
        Order(
            normalize_axes(entry.weight.contracted, len(entry.weight.shape)),
            tuple(plan.global_scale_axes(entry)),
            divisor,
            _encoder(entry.method),
        )
        for entry in group
    ]


_encoder = functools.cache(encoder_for)
