"""Layer 1: `NVFP4Tensor`, quantization and reductions on sharded arrays. Knows no model."""

from jaxfp4.tensors.fp8_tensor import FP8Tensor as FP8Tensor
from jaxfp4.tensors.fp8_tensor import quantize_fp8 as quantize_fp8
from jaxfp4.tensors.nvfp4_tensor import NVFP4Tensor as NVFP4Tensor
from jaxfp4.tensors.nvfp4_tensor import QuantizedTensor as QuantizedTensor
from jaxfp4.tensors.nvfp4_tensor import QuantizedWeight as QuantizedWeight
from jaxfp4.tensors.quantize import fake_quantize as fake_quantize
from jaxfp4.tensors.quantize import quantize as quantize
from jaxfp4.tensors.quantize import quantize_unchecked as quantize_unchecked
from jaxfp4.tensors.reductions import block_amax as block_amax
from jaxfp4.tensors.reductions import global_amax as global_amax
