"""Reads NVFP4 checkpoints, of either format, into a tree of arrays on any mesh."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxfp4.checkpoints.load_params import load_params
from jaxfp4.checkpoints.names import TensorName
from jaxfp4.checkpoints.placement import Placed, Placement, Shardings, place
from jaxfp4.checkpoints.stored import StoredFP8, StoredWeight, joined, open_quantized
from jaxfp4.recipes.plan import Plan
from jaxfp4.tensors import FP8Tensor, NVFP4Tensor, QuantizedWeight


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    shardings: Shardings = None,
    params: Any = None,
    plan: Plan | None = None,
    names: Mapping[str, str | TensorName] | None = None,
) -> Any:
    """Reads the checkpoint in the directory `path`, in Model-Optimizer's or the compressed-tensors format.

    The result is a nested dict whose keys are the components of the tensor names, so a leaf's path with '/' replaced by
    '.' is its name: `tree["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"]`. A quantized module's `weight` is a
    `QuantizedWeight`: an `NVFP4Tensor` of shape `[N, K]` with contraction axis -1, `input_scale` float32 `[]` or None,
    and `pre_scale` `[K]` if the file has a `pre_quant_scale`; FP8 weights with one scale are `QuantizedWeight`s of an
    `FP8Tensor`. Its dtype is what config.json calls `dtype` or
    `torch_dtype`; without that, or with another than float32, bfloat16 and float16, it is float32. All other tensors,
    `k_scale` and `v_scale` too, are plain arrays as stored; those with 64-bit numbers stay numpy arrays unless JAX has
    x64 enabled.

    With `params` and `plan` the result is the tree of `params` instead, as `quantize_params` returned it before the
    export: each weight in the parameter's own axis order, experts and layers stacked again, keys' and values' scales
    beside their weights, other arrays in the dtypes of `params`. Scales of a key-value cache that the plan does not
    quantize are left out, and a warning in the log names the first; of the others the amax is 448 times what is stored,
    for NVFP4 too. `jaxfp4.quantized(apply_fn, plan)` then runs on the packed weights.

    The format is what config.json calls `quant_method`, and without that follows from the names of the tensors.
    compressed-tensors stores reciprocals `d` of the scales. Read is the float32 whose reciprocal is `d`, of two the one
    that a bfloat16 or float16 amax gives; where there is none, float32 1/d. Exporting what was read gives the same
    files, but in this last case `d` may change by its last bit.

    Args:
        path: a directory with `model.safetensors`, or shards and their index, and config.json.
        shardings: None for the default device; a sharding for everything, where arrays that it does not fit (too few
            dimensions, not divisible, or blocks of 16 cut) are replicated over its mesh; or a mapping from a leaf's
            path, components joined by '/', to the sharding of that array, for a `QuantizedWeight` of the logical weight
            `[N, K]` (block scales follow, scalars are replicated). Leaves that are not mentioned go to the default
            device. Each device reads only its slice of the memory-mapped file. With `params`, paths and shapes are
            those of `params`, and what is not mentioned goes where its leaf of `params` is, if that has a
            `NamedSharding`.
        params: arrays or `jax.ShapeDtypeStruct`s, the parameters that `plan` was made for; their values are not read.
        plan: what `jaxfp4.plan` returned for `params`.
        names: as for `export_checkpoint`, path of a leaf of `params` -> checkpoint module.

    Raises:
        FileNotFoundError: the directory, its tensors or one of its files is missing.
        ValueError: a file is broken; the checkpoint is in neither format; a tensor of a quantized weight is missing, or
            has the wrong dtype or shape; a mapping in `shardings` names a path that is not there, or does not fit; one
            of `params` and `plan` without the other, or they and the checkpoint do not belong together.
        TypeError: `shardings` holds something else.
    """
    stored = open_quantized(pathlib.Path(path))
    if (params is None) != (plan is None) or (params is None and names is not None):
        given = [word for word, value in (("params", params), ("plan", plan), ("names", names)) if value is not None]
        raise ValueError(
            f"load_checkpoint was given {' and '.join(given)} only: wanted params and plan together, and names only "
            "with them; pass the parameters (shapes will do) and the plan made for them"
        )
    if plan is not None:
        return load_params(stored, params, plan, names or {}, shardings)
    placement = Placement(shardings)
    tree: dict[str, Any] = {}
    for module in sorted(stored.modules):
        name = joined(module, "weight")
        weight = _weight(stored.weight(module), placement.of(_path(name)), stored.weight_dtype)
        _insert(tree, stored.directory, name, weight)
    for module in sorted(stored.fp8_modules):
        name = joined(module, "weight")
        weight = _fp8(stored.fp8_weight(module), placement.of(_path(name)), stored.weight_dtype)
        _insert(tree, stored.directory, name, weight)
    for name in sorted(stored.plain - stored.fp8_parts(stored.fp8_modules)):
        _insert(tree, stored.directory, name, place(stored.tensors.tensor(name), placement.of(_path(name))))
    placement.refuse_unused()
    return tree


def _weight(stored: StoredWeight, placed: Placed, dtype: np.dtype) -> QuantizedWeight:
    """The weight `[N, K]` on its devices, scalars on all of them."""
    placed = placed.fit_weight(stored.shape)
    beside = placed.replicated()
    weight = NVFP4Tensor(
        place(stored.packed, placed),
        place(stored.scales, placed),
        place(np.asarray(stored.global_scale), beside),
        (-1,),
        (stored.shape[1],),
        dtype,
    )
    input_scale = None if stored.input_scale is None else place(np.asarray(stored.input_scale), beside)
    pre_scale = None if stored.pre_scale is None else place(stored.pre_scale, beside)
    return QuantizedWeight(weight, input_scale, pre_scale)


def _fp8(stored: StoredFP8, placed: Placed, dtype: np.dtype) -> QuantizedWeight:
    beside = placed.fit(stored.shape).replicated()
    weight = FP8Tensor(place(stored.values, placed), place(np.asarray(stored.scale), beside), (-1,), dtype)
    return QuantizedWeight(
        weight, None if stored.input_scale is None else place(np.asarray(stored.input_scale), beside)
    )


def _path(name: str) -> str:
    return name.replace(".", "/")


def _insert(tree: dict[str, Any], directory: pathlib.Path, name: str, value: Any) -> None:
    *parents, last = name.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ValueError(
                f"{directory}: tensor {name!r} lies below another tensor: wanted names that form a tree; rename it"
            )
    if last in node:
        raise ValueError(
            f"{directory}: tensor {name!r} is there twice, or above others: wanted names that form a tree; rename it"
        )
    node[last] = value
