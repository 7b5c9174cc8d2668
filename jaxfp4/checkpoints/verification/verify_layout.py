"""Checks of the tensors' presence, dtypes and shapes; reads no values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxfp4.checkpoints.configs import COMPRESSED_TENSORS
from jaxfp4.checkpoints.stored import SUFFIXES, split_name
from jaxfp4.checkpoints.verification.findings import Finding, Rule, Severity
from jaxfp4.checkpoints.verification.quantized_modules import (
    E4M3,
    F32,
    U8,
    Inventory,
    QuantizedModule,
    StoredTensor,
    expert_of,
)
from jaxfp4.formats import BLOCK_SIZE

USUAL_TENSOR_PARALLEL = (2, 4, 8)
_GEMM_MULTIPLE = 32
_TRTLLM_GEN_ROWS = 128
_SGLANG_MOE_MULTIPLE = 256

# Engines split the contraction of these over tensor-parallel ranks, and the rows of the others.
_ROW_PARALLEL = ("o_proj", "out_proj", "down_proj", "w2", "dense_4h_to_h", "fc2")

# These hold several parts that other checkpoints store as modules of their own.
_FUSED_ON_DISK = ("qkv_proj", "gate_up_proj")

_EXPORT_AGAIN = "export the checkpoint again"

INCOMPLETE = Rule(
    "incomplete-weight",
    Severity.ERROR,
    "every engine needs packed codes, block scales and global scale; loading fails, or leaves a parameter unset",
    _EXPORT_AGAIN,
)
DTYPE = Rule(
    "dtype",
    Severity.ERROR,
    "TensorRT-LLM asserts E4M3 block scales; vLLM and SGLang copy into parameters of the wanted dtype",
    _EXPORT_AGAIN,
)
SHAPE = Rule(
    "shape",
    Severity.ERROR,
    "vLLM, SGLang and TensorRT-LLM load codes [N, K/2], block scales [N, K/16] and one value for each scalar",
    _EXPORT_AGAIN + " with separate two-dimensional weights, experts too",
)
BLOCK_MULTIPLE = Rule(
    "contraction-multiple",
    Severity.ERROR,
    "vLLM and SGLang raise for a contraction that is no multiple of 16, TensorRT-LLM asserts",
    "leave this module unquantized and list it as excluded",
)
PRE_SCALE = Rule(
    "pre-quant-scale",
    Severity.ERROR,
    "vLLM and SGLang refuse NVFP4_AWQ and NVFP4_SVD and apply no such tensor to the input",
    "fold it into the layer in front and export as plain NVFP4",
)
SPLIT_ASKED = Rule(
    "tensor-parallel-split",
    Severity.ERROR,
    "the engine cannot split the blocks of 16 over that many ranks and fails (vLLM #49949)",
    "serve with fewer tensor-parallel ranks, or leave this module unquantized",
)
SPLIT_USUAL = Rule(
    "tensor-parallel-split",
    Severity.WARNING,
    SPLIT_ASKED.engines,
    SPLIT_ASKED.fix,
)
ROWS = Rule(
    "rows-multiple",
    Severity.WARNING,
    "TensorRT-LLM's generated kernels want a multiple of 128 rows (vLLM #46879); other kernels serve it",
    "choose a CUTLASS or FlashInfer kernel, or leave the module unquantized",
)
GEMM = Rule(
    "gemm-multiple",
    Severity.NOTE,
    "CUTLASS and FlashInfer want N and K in multiples of 32 for each rank; vLLM and SGLang pad at load",
    "nothing; it costs some memory and speed",
)
SGLANG_MOE = Rule(
    "expert-contraction-multiple",
    Severity.NOTE,
    "an older MoE path of SGLang asserts K/16 % 16 == 0, so K % 256 == 0",
    "use a newer SGLang",
)
ON_DISK = Rule(
    "fused-on-disk",
    Severity.WARNING,
    "SGLang #29151: a single scale for a weight that is fused in the file filled only the first part's slot",
    "use an engine version that fills all slots, or export the parts as modules of their own",
)


def check_layout(inventory: Inventory, tensor_parallel: Sequence[int]) -> Iterator[Finding]:
    """All findings about the tensors' headers. `tensor_parallel`: the sizes asked for; without any the usual ones."""
    for module in inventory.quantized.values():
        yield from _parts(module)
        yield from _shapes(module)
        yield from _alignment(module, tensor_parallel)


def _parts(module: QuantizedModule) -> Iterator[Finding]:
    suffixes = SUFFIXES[module.file_format]
    wanted = {
        suffixes.packed: (module.codes, U8),
        suffixes.scales: (module.block_scales, E4M3),
        suffixes.global_scale: (module.global_scale, F32),
    }
    missing = [last for last, (tensor, _) in wanted.items() if tensor is None]
    if missing:
        there = [split_name(tensor.name)[1] for tensor in module.tensors]
        yield INCOMPLETE.at(module.name, f"no {' and no '.join(missing)} beside {', '.join(there)}", len(missing))
    for tensor, dtype in [*wanted.values(), (module.input_scale, F32)]:
        if tensor is not None and tensor.dtype != dtype:
            yield DTYPE.at(tensor.name, f"{tensor}: wanted {dtype.name}")
    extra = [last for last in module.others if last.startswith("svdquant_lora")]
    if module.pre_scale is not None or extra:
        names = ([split_name(module.pre_scale.name)[1]] if module.pre_scale else []) + extra
        yield PRE_SCALE.at(module.name, f"has {', '.join(names)}")


def _shapes(module: QuantizedModule) -> Iterator[Finding]:
    for scalar in (module.global_scale, module.input_scale):
        if scalar is not None and not scalar.is_scalar:
            yield SHAPE.at(scalar.name, f"{scalar}: wanted one value, shape {_scalar_shape(module)}")
    if module.codes is None:
        return
    if module.shape is None:
        yield SHAPE.at(module.codes.name, f"{module.codes}: wanted two dimensions")
        return
    n, k = module.shape
    if k % BLOCK_SIZE or not n * k:
        yield BLOCK_MULTIPLE.at(module.codes.name, f"weight [{n}, {k}]: wanted K a positive multiple of {BLOCK_SIZE}")
    elif module.block_scales is not None and module.block_scales.shape != (n, k // BLOCK_SIZE):
        yield SHAPE.at(
            module.block_scales.name,
            f"{module.block_scales} beside codes {list(module.codes.shape)}: wanted [{n}, {k // BLOCK_SIZE}]"
            + _guess(module.block_scales, n, k),
        )


def _guess(scales: StoredTensor, n: int, k: int) -> str:
    if scales.shape == (k // BLOCK_SIZE, n):
        return "; it is transposed"
    if scales.shape == (n, k // 32):
        return "; it has blocks of 32, as W4A8_NVFP4_FP8"
    padded = (-(-n // 128) * 128, -(-(k // BLOCK_SIZE) // 4) * 4)
    return "; it is padded for a kernel, and perhaps swizzled" if scales.shape == padded else ""


def _scalar_shape(module: QuantizedModule) -> str:
    return "[1]" if module.file_format == COMPRESSED_TENSORS else "[]"


def _alignment(module: QuantizedModule, tensor_parallel: Sequence[int]) -> Iterator[Finding]:
    if module.shape is None or module.shape[1] % BLOCK_SIZE:
        return
    n, k = module.shape
    last = split_name(module.name)[1]
    if last in _ROW_PARALLEL:
        cut = [size for size in tensor_parallel or USUAL_TENSOR_PARALLEL if k % size or k // size % BLOCK_SIZE]
        if cut:
            parts = ", ".join(f"{k / size:g} values a rank at {size} ranks" for size in cut)
            rule = SPLIT_ASKED if tensor_parallel else SPLIT_USUAL
            yield rule.at(module.name, f"K = {k}: {parts}; wanted a multiple of 16")
    if n % _TRTLLM_GEN_ROWS:
        yield ROWS.at(module.name, f"N = {n}, which is {n % _TRTLLM_GEN_ROWS} over a multiple of {_TRTLLM_GEN_ROWS}")
    if n % _GEMM_MULTIPLE or k % _GEMM_MULTIPLE:
        yield GEMM.at(module.name, f"weight [{n}, {k}]")
    if expert_of(module.name) is not None and k % _SGLANG_MOE_MULTIPLE:
        yield SGLANG_MOE.at(module.name, f"K = {k}")
    if last in _FUSED_ON_DISK and module.global_scale is not None:
        yield ON_DISK.at(module.name, f"one {split_name(module.global_scale.name)[1]} for the whole of it")
