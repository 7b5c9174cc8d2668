"""What the weights of a checkpoint look like: precision, scales, saturation, codes and, beside the original, error."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jaxfp4.checkpoints.configs import read_config
from jaxfp4.checkpoints.decoding import SCALE_VALUES, decoded_blocks
from jaxfp4.checkpoints.safetensors_file import Checkpoint, open_checkpoint
from jaxfp4.checkpoints.verification.block_statistics import BlockStatistics
from jaxfp4.checkpoints.verification.declarations import declarations
from jaxfp4.checkpoints.verification.quantized_modules import (
    E4M3,
    Inventory,
    PlainModule,
    QuantizedModule,
    StoredTensor,
    multiplier,
    take_inventory,
)
from jaxfp4.checkpoints.verification.verify_files import read_configs
from jaxfp4.checkpoints.verification.verify_values import statistics_of
from jaxfp4.formats.nvfp4 import TENSOR_DIVISOR
from jaxfp4.reports.original_weights import changed_vectors, original_weight

_PIECE_VALUES = 1 << 16
_BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """One weight of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    scheme: str
    """`W4A4`, `W4A16`, `FP8`, `bf16`, .."""

    nbytes: int
    """Bytes of the weight with all its scales."""

    global_scale: float | None = None
    """The multiplier, in either format."""

    input_scale: float | None = None
    statistics: BlockStatistics | None = None
    signal: float | None = None
    """`sum(w**2)` of the original, if it was compared."""

    noise: float | None = None
    """`sum((w - q)**2)`."""

    @property
    def values(self) -> int:
        """How many weights."""
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Bits stored for each weight, scales included."""
        return 8 * self.nbytes / self.values if self.values else math.nan

    @property
    def amax(self) -> float | None:
        """`2688 * global_scale`: the largest weight that the scales can reach."""
        return None if self.global_scale is None else TENSOR_DIVISOR * self.global_scale

    @property
    def signal_to_noise(self) -> float | None:
        """`10 * log10(signal / noise)` in decibels, see `decibels`; None if it was not compared."""
        return None if self.signal is None or self.noise is None else decibels(self.signal, self.noise)


@dataclasses.dataclass(frozen=True)
class CheckpointReport:
    """All weights of a checkpoint, and the whole of it."""

    weights: tuple[WeightReport, ...]
    file_format: str
    """`modelopt`, `compressed-tensors`, or `mixed` names of tensors."""

    producer: str | None
    cache: str | None
    """The format of the key-value cache, if it is quantized."""

    nbytes: int
    """Bytes of all tensors."""

    values: int
    """Weights and other parameters, scales not counted."""

    not_compared: int | None
    """NVFP4 weights without a counterpart in the original; None if there was no original."""

    changed: tuple[str, ...] = ()
    """Norms and biases with other values than in the original, as AWQ and SmoothQuant leave them."""

    @property
    def bits(self) -> float:
        """Average bits for each parameter."""
        return 8 * self.nbytes / self.values if self.values else math.nan

    @property
    def compression(self) -> float:
        """Bytes of all parameters in 16 bits over the bytes of the checkpoint."""
        return 2 * self.values / self.nbytes if self.nbytes else math.nan

    @property
    def quantized_values(self) -> int:
        """Weights in NVFP4."""
        return sum(weight.values for weight in self.weights if weight.statistics is not None)


def decibels(signal: float, noise: float) -> float:
    """`10 * log10(signal / noise)`; infinite for no noise, NaN for no signal, as in `WeightQuality`.

    >>> decibels(100.0, 1.0)
    20.0
    """
    return math.nan if signal == 0 else math.inf if noise == 0 else 10 * math.log10(signal / noise)


def inspect_checkpoint(
    directory: str | os.PathLike[str], *, original: str | os.PathLike[str] | None = None
) -> CheckpointReport:
    """Reads every NVFP4 weight once, in pieces, and the headers of all other tensors.

    Args:
        directory: a checkpoint in Model-Optimizer's or the compressed-tensors format.
        original: the directory it was quantized from, in a floating point format of 16 bits or more; experts one by
            one or in stacks, see `original_weight`. NVFP4 weights are compared, and FP8 weights with one scale or one
            for each row.

    Raises:
        FileNotFoundError: a directory or one of its files is missing.
        ValueError: a file is broken; there is no NVFP4 weight; no weight, or one of another shape, is in the original.
    """
    path = Path(directory)
    checkpoint = open_checkpoint(path)
    config = read_config(path)
    inventory = take_inventory(checkpoint)
    if not any(module.has_values for module in inventory.quantized.values()):
        raise ValueError(f"{path}: no NVFP4 weight among {len(checkpoint.names())} tensors; wanted a quantized model")
    source = None if original is None else open_checkpoint(Path(original))
    weights = [_quantized(checkpoint, module, source) for module in inventory.quantized.values()]
    not_compared = None
    if source is not None:
        not_compared = sum(weight.signal is None for weight in weights)
        if not_compared == len(weights):
            raise ValueError(
                f"{source.directory}: has none of the {len(weights)} quantized weights, such as "
                f"{weights[0].name + '.weight'!r}; wanted the checkpoint that was quantized, with the same names"
            )
    weights += [_plain(checkpoint, module, source) for module in inventory.plain.values()]
    formats = {module.file_format for module in inventory.quantized.values()}
    found = declarations(config, read_configs(path)[1])
    nbytes, rest = _totals(checkpoint, inventory)
    return CheckpointReport(
        tuple(weights),
        formats.pop() if len(formats) == 1 else "mixed",
        next((name for one in found if (name := _producer(one.content)) is not None), None),
        next((one.cache for one in found if one.cache is not None), None),
        nbytes,
        sum(weight.values for weight in weights) + rest,
        not_compared,
        () if source is None else changed_vectors(checkpoint, source),
    )


def _quantized(checkpoint: Checkpoint, module: QuantizedModule, source: Checkpoint | None) -> WeightReport:
    nbytes = sum(tensor.nbytes for tensor in module.tensors)
    shape = module.shape or (module.codes.shape if module.codes else ())
    global_scale = _scale(checkpoint, module, module.global_scale)
    report = WeightReport(
        module.name, shape, module.scheme, nbytes, global_scale, _scale(checkpoint, module, module.input_scale)
    )
    if not module.has_values:
        return report
    report = dataclasses.replace(report, statistics=statistics_of(checkpoint, module, count_codes=True))
    w = None if source is None else original_weight(source, module.name, module.shape)
    if w is None or global_scale is None or module.codes is None or module.block_scales is None:
        return report
    codes, scales = checkpoint.tensor(module.codes.name), checkpoint.tensor(module.block_scales.name)
    signal, noise = energies(w, codes, scales, np.float32(global_scale))
    return dataclasses.replace(report, signal=signal, noise=noise)


def _scale(checkpoint: Checkpoint, module: QuantizedModule, tensor: StoredTensor | None) -> float | None:
    return multiplier(checkpoint, module, tensor) if tensor is not None and tensor.is_scalar else None


def energies(
    w: NDArray[Any], codes: NDArray[np.uint8], scales: NDArray[Any], global_scale: np.float32
) -> tuple[float, float]:
    """`sum(w**2)` and `sum((w - q)**2)`, where `q = (block scale * global scale) * code` in float32.

    `w` `[N, K]` of a floating dtype, `codes` uint8 `[N, K/2]`, `scales` E4M3 `[N, K/16]`. Rows are taken in pieces of
    about 65,536 values, which stay in the processor's cache; sums within a piece are float32, over pieces float64.
    """
    return _energies(w, lambda part: decoded_blocks(codes[part], scales[part], global_scale))


def _energies(w: NDArray[Any], decoded: Callable[[slice], NDArray[np.float32]]) -> tuple[float, float]:
    rows = max(1, _PIECE_VALUES // w.shape[1])
    signal = noise = 0.0
    with np.errstate(all="ignore"):
        for start in range(0, len(w), rows):
            part = slice(start, start + rows)
            wide = np.ascontiguousarray(_float32(w[part]))
            q = decoded(part).reshape(wide.shape)
            np.subtract(wide, q, out=q)
            signal += _square(wide)
            noise += _square(q)
    return signal, noise


def _float32(values: NDArray[Any]) -> NDArray[np.float32]:
    if values.dtype == _BF16:  # several times as fast as a cast of ml_dtypes
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _square(values: NDArray[np.float32]) -> float:
    flat = values.reshape(-1)
    return float(np.dot(flat, flat))


def _plain(checkpoint: Checkpoint, module: PlainModule, source: Checkpoint | None) -> WeightReport:
    report = WeightReport(module.name, module.shape, module.scheme, module.nbytes)
    scale = None if source is None else _fp8_scale(checkpoint, module)
    w = None if source is None or scale is None else original_weight(source, module.name, module.shape)
    if w is None or scale is None:
        return report
    values = checkpoint.tensor(module.tensor.name).view(np.uint8)
    signal, noise = _energies(w, lambda part: SCALE_VALUES.take(values[part]) * scale[part])
    return dataclasses.replace(report, signal=signal, noise=noise)


def _fp8_scale(checkpoint: Checkpoint, module: PlainModule) -> NDArray[np.float32] | None:
    """The multipliers `[N, 1]` of a matrix in E4M3; None for anything else, such as scales of tiles."""
    name = f"{module.tensor.name}_scale"
    if module.tensor.dtype != E4M3 or len(module.shape) != 2 or name not in checkpoint.names():
        return None
    rows = module.shape[0]
    dtype, shape = checkpoint.info(name)
    if dtype not in (np.dtype(np.float32), _BF16) or shape not in ((), (1,), (rows,), (rows, 1)) or not rows:
        return None
    return np.broadcast_to(_float32(checkpoint.tensor(name)).reshape(-1, 1), (rows, 1))


def _totals(checkpoint: Checkpoint, inventory: Inventory) -> tuple[int, int]:
    """Bytes of all tensors, and the number of values that are no part of a weight or scale."""
    of_weights = {tensor.name for module in inventory.quantized.values() for tensor in module.tensors}
    of_weights |= {module.tensor.name for module in inventory.plain.values()}
    nbytes = rest = 0
    for name in checkpoint.names():
        tensor = StoredTensor(name, *checkpoint.info(name))
        nbytes += tensor.nbytes
        is_scale = name.rpartition(".")[2].endswith(("_scale", "_scale_inv", "_scale_2"))
        if name not in of_weights and not is_scale:
            rest += math.prod(tensor.shape)
    return nbytes, rest


def _producer(content: Mapping[str, Any]) -> str | None:
    producer = content.get("producer")
    if isinstance(producer, dict) and isinstance(producer.get("name"), str):
        return f"{producer['name']} {producer.get('version', '')}".strip()
    version = content.get("version")
    return f"compressed-tensors {version}" if isinstance(version, str) else None
