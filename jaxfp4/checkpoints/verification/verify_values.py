"""Checks of the values: scales that are no usable numbers, saturated and dead blocks, absurd magnitudes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from jaxfp4.checkpoints.configs import COMPRESSED_TENSORS
from jaxfp4.checkpoints.safetensors_file import Checkpoint
from jaxfp4.checkpoints.stored import FP8_INPUT_SCALE, FP8_SCALE, joined
from jaxfp4.checkpoints.verification.block_statistics import BlockStatistics, block_statistics
from jaxfp4.checkpoints.verification.findings import Finding, Rule, Severity
from jaxfp4.checkpoints.verification.quantized_modules import F32, Inventory, QuantizedModule, StoredTensor, multiplier
from jaxfp4.formats import E2M1
from jaxfp4.formats.nvfp4 import TENSOR_DIVISOR

SATURATED_SHARE = 0.05
DEAD_SHARE, DEAD_NOTE_SHARE = 0.25, 0.01
BELOW_FOUR_SHARE, BELOW_SIX_SHARE = 0.05, 0.75
LARGEST_WEIGHT, LARGEST_INPUT = 1e3, 1e6

_EXPORT_AGAIN = "quantize this weight again"

SCALAR = Rule(
    "unusable-scale",
    Severity.ERROR,
    "every product with it is zero, infinite or NaN; an input scale of zero or NaN breaks the layer (vLLM #45320)",
    "calibrate with data that reaches this module, and export again",
)
NAN_SCALE = Rule(
    "nan-block-scale", Severity.ERROR, "16 weights for each, and every output that they enter, are NaN", _EXPORT_AGAIN
)
NEGATIVE_SCALE = Rule(
    "negative-block-scale",
    Severity.ERROR,
    "FP4 matrix instructions take block scales as unsigned; dequantizing kernels flip the signs of 16 weights",
    _EXPORT_AGAIN,
)
NEGATIVE_ZERO_SCALE = Rule(
    "negative-zero-block-scale",
    Severity.WARNING,
    "decodes to zeros; FP4 matrix instructions take block scales as unsigned",
    _EXPORT_AGAIN,
)
LOST_BLOCKS = Rule(
    "zero-block-scale",
    Severity.WARNING,
    "every engine reads these blocks as zeros, whatever their codes say",
    "quantize again with block scales of at least 2^-9",
)
ALL_SATURATED = Rule(
    "all-block-scales-saturated",
    Severity.WARNING,
    "computed as stored; the global scale was too small, and what exceeded it was cut off",
    "quantize again with the global scale amax / 2688 of the whole tensor",
)
SATURATED = Rule(
    "saturated-blocks",
    Severity.WARNING,
    ALL_SATURATED.engines.replace("was too small", "is probably too small"),
    ALL_SATURATED.fix,
)
SUBNORMAL = Rule(
    "subnormal-block-scales",
    Severity.WARNING,
    "computed as stored; block scales below 2^-6 have 1 to 3 significant bits in place of 4",
    "quantize again with a global scale near amax / 2688",
)
DEAD_TENSOR = Rule(
    "dead-tensor", Severity.WARNING, "the module gives zeros in every engine", "check the original weight"
)
DEAD_BLOCKS = Rule(
    "dead-blocks",
    Severity.WARNING,
    "computed as stored; small weights beside a large global scale round to zero",
    "check the original weight, and share the global scale with fewer modules",
)
FEW_DEAD_BLOCKS = Rule("dead-blocks", Severity.NOTE, DEAD_BLOCKS.engines, DEAD_BLOCKS.fix)
WASTED = Rule(
    "wasted-block-scales",
    Severity.WARNING,
    "computed as stored, less accurately: the codes use less than half of the range that their scale gives them",
    "choose each block's scale so that its largest code is 6 or 4",
)
BELOW_SIX = Rule(
    "blocks-below-six",
    Severity.NOTE,
    "computed as stored; usual for scales chosen by error or for four-over-six, not for max calibration",
    "nothing, if the scales were chosen by error",
)
RECIPROCAL_WEIGHT = Rule(
    "reciprocal-global-scale",
    Severity.ERROR,
    "computed as stored: outputs of absurd size, then infinities (compare modular #6600)",
    "store amax / 2688 as weight_scale_2 in Model-Optimizer's format, 2688 / amax as weight_global_scale in "
    "compressed-tensors",
)
RECIPROCAL_INPUT = Rule(
    "reciprocal-input-scale",
    Severity.WARNING,
    "activations are divided by it: nearly all of them round to zero in W4A4 kernels",
    "store amax / 2688 as input_scale in Model-Optimizer's format, 2688 / amax as input_global_scale in "
    "compressed-tensors",
)


def check_values(checkpoint: Checkpoint, inventory: Inventory) -> Iterator[Finding]:
    """All findings about values, one weight after the other, read in pieces."""
    for module in inventory.quantized.values():
        yield from _scalars(checkpoint, module)
        if module.has_values:
            statistics = statistics_of(checkpoint, module)
            yield from _block_scales(module.name, statistics)
            yield from _codes(module.name, statistics)
            yield from _magnitude(checkpoint, module, statistics)
    names = frozenset(checkpoint.names())
    for plain in inventory.plain.values():
        if plain.scheme == "FP8":
            yield from _fp8_scales(checkpoint, names, plain.name)


def _fp8_scales(checkpoint: Checkpoint, names: frozenset[str], module: str) -> Iterator[Finding]:
    """Of an FP8 weight with one scale, in both formats a multiplier."""
    for name in (joined(module, FP8_SCALE), joined(module, FP8_INPUT_SCALE)):
        if name in names and checkpoint.info(name) in ((F32, ()), (F32, (1,))):
            stored = float(checkpoint.tensor(name).reshape(()))
            if not _is_usable(stored):
                yield SCALAR.at(name, f"{stored:g}: wanted a positive, finite number")


def statistics_of(checkpoint: Checkpoint, module: QuantizedModule, *, count_codes: bool = False) -> BlockStatistics:
    """Of a module that `has_values`."""
    if module.codes is None or module.block_scales is None:
        raise ValueError(f"{module.name}: has no packed codes or no block scales; wanted both; skip it")
    codes, scales = checkpoint.tensor(module.codes.name), checkpoint.tensor(module.block_scales.name)
    return block_statistics(codes, scales.view(np.uint8), count_codes=count_codes)


def usable_multiplier(checkpoint: Checkpoint, module: QuantizedModule, tensor: StoredTensor | None) -> float | None:
    """What the scale multiplies by; None if there is none, or none that is one positive, finite float32."""
    if tensor is None or not tensor.is_scalar or tensor.dtype != F32:
        return None
    value = multiplier(checkpoint, module, tensor)
    return value if _is_usable(value) else None


def _is_usable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _scalars(checkpoint: Checkpoint, module: QuantizedModule) -> Iterator[Finding]:
    for tensor in (module.global_scale, module.input_scale):
        if tensor is None or not tensor.is_scalar or tensor.dtype != F32:
            continue
        stored = float(checkpoint.tensor(tensor.name).reshape(()))
        if not (_is_usable(stored) and _is_usable(multiplier(checkpoint, module, tensor))):
            yield SCALAR.at(tensor.name, f"{stored:g}: wanted a positive, finite number with a finite reciprocal")
    limit = usable_multiplier(checkpoint, module, module.input_scale)
    if limit is not None and module.input_scale and limit * TENSOR_DIVISOR > LARGEST_INPUT:
        yield RECIPROCAL_INPUT.at(
            module.input_scale.name,
            f"{_stored(module, limit)} stands for activations up to {limit * TENSOR_DIVISOR:.3g}; its reciprocal for "
            f"{TENSOR_DIVISOR / limit:.3g}",
            limit,
        )


def _block_scales(name: str, statistics: BlockStatistics) -> Iterator[Finding]:
    blocks = statistics.blocks

    def of(count: int) -> str:
        return f"{count} of {blocks} block scales ({count / blocks:.3g})"

    if statistics.nan:
        yield NAN_SCALE.at(name, f"{of(statistics.nan)} are NaN", statistics.nan)
    if statistics.negative:
        yield NEGATIVE_SCALE.at(name, f"{of(statistics.negative)} are negative", statistics.negative)
    if statistics.negative_zero:
        yield NEGATIVE_ZERO_SCALE.at(name, f"{of(statistics.negative_zero)} are -0", statistics.negative_zero)
    if statistics.lost:
        yield LOST_BLOCKS.at(name, f"{of(statistics.lost)} are zero above codes that are not", statistics.lost)
    if statistics.saturated == blocks:
        if blocks > 1:
            yield ALL_SATURATED.at(name, f"all {blocks} block scales are 448, the largest", blocks)
    elif statistics.saturated > SATURATED_SHARE * blocks:
        share = statistics.saturated / blocks
        yield SATURATED.at(name, f"{of(statistics.saturated)} are 448, the largest", share)
    if statistics.subnormal == blocks:
        yield SUBNORMAL.at(name, f"all {blocks} block scales are below 2^-6, the largest {statistics.largest_scale:g}")


def _codes(name: str, statistics: BlockStatistics) -> Iterator[Finding]:
    blocks, dead, live = statistics.blocks, statistics.dead, statistics.live
    if not live:
        yield DEAD_TENSOR.at(name, f"all {16 * blocks} codes are zero")
        return
    if dead > DEAD_NOTE_SHARE * blocks:
        rule = DEAD_BLOCKS if dead > DEAD_SHARE * blocks else FEW_DEAD_BLOCKS
        yield rule.at(name, f"{dead} of {blocks} blocks ({dead / blocks:.3g}) have only zero codes", dead / blocks)
    for rule, count, share, limit in (
        (WASTED, statistics.largest_below_four, BELOW_FOUR_SHARE, 4),
        (BELOW_SIX, statistics.largest_below_six, BELOW_SIX_SHARE, 6),
    ):
        if count > share * live:
            found = f"the largest code is below {limit} in {count} of {live} blocks that are not zero"
            yield rule.at(name, f"{found} ({count / live:.3g})", count / live)
            return


def _magnitude(checkpoint: Checkpoint, module: QuantizedModule, statistics: BlockStatistics) -> Iterator[Finding]:
    scale = usable_multiplier(checkpoint, module, module.global_scale)
    if scale is None or module.global_scale is None or not statistics.live:
        return
    reach = E2M1.max * statistics.largest_scale
    if scale * reach > LARGEST_WEIGHT and reach / scale < scale * reach:
        yield RECIPROCAL_WEIGHT.at(
            module.global_scale.name,
            f"{_stored(module, scale)} makes weights up to {scale * reach:.3g}; its reciprocal up to "
            f"{reach / scale:.3g}",
            scale,
        )


def _stored(module: QuantizedModule, scale: float) -> str:
    """The number in the file."""
    return f"{1 / scale:.4g}, a divisor," if module.file_format == COMPRESSED_TENSORS else f"{scale:.4g}, a multiplier,"
