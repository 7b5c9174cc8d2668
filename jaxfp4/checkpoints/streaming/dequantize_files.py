"""Rewrites a quantized checkpoint as an unquantized one, with the values that its codes stand for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxfp4.checkpoints.configs import CONFIG_FILE
from jaxfp4.checkpoints.decoding import SCALE_VALUES, decoded_blocks
from jaxfp4.checkpoints.stored import StoredCheckpoint, StoredFP8, StoredWeight, joined, open_quantized
from jaxfp4.checkpoints.streaming.convert import CACHE_SCALES, checked_modules, rewrite, without_quantization
from jaxfp4.checkpoints.streaming.file_quantization import DEFAULT_SHARD_BYTES, Say, pieces_of
from jaxfp4.checkpoints.streaming.shard_files import NewFile, NewTensor
from jaxfp4.checkpoints.streaming.tensor_source import TensorSource, open_source

DENSE = "bfloat16"
"""What stands for this among the names of formats."""

_BF16 = np.dtype(ml_dtypes.bfloat16)
_PIECE_VALUES = 1 << 18


def dequantize_files(
    in_dir: Path,
    out_dir: Path,
    *,
    max_shard_bytes: int | None = DEFAULT_SHARD_BYTES,
    say: Say = lambda line: None,
) -> None:
    """Writes the NVFP4 checkpoint in `in_dir`, of either format, to the new directory `out_dir` in bfloat16, streamed.

    Each quantized weight becomes `MODULE.weight` bfloat16 `[N, K]`, `(block scale * global scale) * code` in float32
    rounded once; FP8 weights likewise. Other tensors are copied byte for byte, scales of inputs and of the key-value
    cache left out; config.json says nothing of quantization any more. Any reader of the original checkpoint reads the
    result and computes what the quantized weights give with unquantized activations (W4A16).

    An interrupted run goes on when it is started again, as `resumable_directory` says.

    Raises:
        ValueError: no NVFP4 checkpoint; a broken file; a `pre_quant_scale` or another quantization beside NVFP4 and
            FP8.
        OSError: `out_dir` exists or cannot be written, or a source file cannot be read.
    """
    stored, source = open_quantized(in_dir), open_source(in_dir)
    checked_modules(stored, source, DENSE)
    rewrite(
        source,
        out_dir,
        list(_tensors(stored, source)),
        _write_dense,
        {CONFIG_FILE: without_quantization(stored.config)},
        file_format=DENSE,
        max_shard_bytes=max_shard_bytes,
        say=say,
    )


def _write_dense(file: NewFile, tensor: NewTensor) -> None:
    for begin, values in _dense(tensor.origin):
        file.write(tensor.name, begin * _BF16.itemsize, values)


def _tensors(stored: StoredCheckpoint, source: TensorSource) -> Iterator[NewTensor]:
    weights: dict[str, StoredWeight | StoredFP8] = {module: stored.weight(module) for module in stored.modules}
    weights |= {module: stored.fp8_weight(module) for module in stored.fp8_modules}
    for module in sorted(weights):
        yield NewTensor(joined(module, "weight"), _BF16, weights[module].shape, weights[module])
    for name in sorted(stored.plain - stored.fp8_parts(stored.fp8_modules)):
        tensor = source.tensors[name]
        if not (name.rpartition(".")[2] in CACHE_SCALES and tensor.shape in ((), (1,))):
            yield NewTensor(name, tensor.dtype, tensor.shape, tensor)


def _dense(weight: StoredWeight | StoredFP8) -> Iterator[tuple[int, np.ndarray]]:
    """`(first value, values)` of pieces of whole rows."""
    rows, length = weight.shape
    for begin, end in pieces_of(rows, max(1, _PIECE_VALUES // max(length, 1))):
        part = slice(begin, end)
        if isinstance(weight, StoredWeight):
            values = decoded_blocks(weight.packed[part], weight.scales[part], weight.global_scale)
        else:
            values = SCALE_VALUES.take(weight.values[part].view(np.uint8)) * weight.scale
        yield begin * length, values.astype(_BF16)
