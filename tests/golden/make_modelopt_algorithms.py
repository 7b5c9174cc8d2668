"""Writes `modelopt_algorithms.npz`: what Model-Optimizer's calibration algorithms make of small arrays, on the CPU.

Run in an environment of its own with torch, nvidia-modelopt 0.47.0 and requests, which it imports, from any folder:

    python tests/golden/make_modelopt_algorithms.py

Every number of the result is computed by Model-Optimizer: the calibrators `NVFP4MSECalibrator` (126 FP8 scales, also
with the error of `local_hessian`) and `MseCalibrator` (with the preset of four-over-six), `update_hessian` and
`GPTQHelper.update_weights`, and the E4M3 cast, quantization and dequantization of `NVFP4QTensor`. One thing is put in
between: the fake quantization that calibrators and GPTQ call. Model-Optimizer's own for static NVFP4,
`static_blockwise_fp4_fake_quant`, enters `torch.cuda.device` and starts a Triton kernel, so nothing runs on a CPU;
`StaticQuantizer` below does the same with the functions that write checkpoints, which run everywhere.
"""

from pathlib import Path

import modelopt
import numpy as np
import torch
from modelopt.torch.quantization.calib import MseCalibrator, NVFP4MSECalibrator
from modelopt.torch.quantization.model_calib import _LocalHessianAccumulator
from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor
from modelopt.torch.quantization.utils.calib_utils import GPTQHelper, update_hessian

VERSION = "0.47.0"
OUT = Path(__file__).parent / "modelopt_algorithms.npz"
BLOCK = 16


class StaticQuantizer(torch.nn.Module):
    """Rounds to NVFP4 under given block amaxes, the global scale `amax / (6 * fp8_max)`."""

    def __init__(self, w, fp8_max=448.0):
        super().__init__()
        self.global_amax, self.fp8_max = w.abs().max(), fp8_max
        self.amax = w.reshape(-1, BLOCK).abs().amax(1, keepdim=True)
        self.is_enabled = False  # of the activation, as which it serves nowhere

    def codes(self, w, amax=None):
        """Packed codes, E4M3 block scales and the global scale of `w` `[.., K]`."""
        amax = self.amax if amax is None else amax
        scale = amax.reshape(*w.shape[:-1], -1) / 6.0
        scale = torch.where(scale == 0, 1.0, scale)
        scales = NVFP4QTensor._cast_per_block_scale_to_fp8(scale, self.global_amax / 6.0, self.fp8_max)
        scale_2 = self.global_amax / (6.0 * self.fp8_max)
        return NVFP4QTensor.quantize(w.clone(), BLOCK, scales, scale_2)

    def forward(self, w, amax=None):
        tensor, scales, scale_2 = self.codes(w, amax)
        return tensor.dequantize(torch.float32, scale=scales, double_scale=scale_2, block_sizes={-1: BLOCK})


def bytes_of(quantizer, w, amax=None):
    tensor, scales, scale_2 = quantizer.codes(w, amax)
    return {
        "packed": tensor._quantized_data.numpy(),
        "scales": scales.view(torch.uint8).numpy(),
        "scale_2": scale_2.numpy(),
    }


def scale_sweep(w, error_func=None):
    """`mse` with `fp8_scale_sweep`: block amaxes `[blocks, 1]`."""
    quantizer = StaticQuantizer(w)
    calibrator = NVFP4MSECalibrator(
        amax=quantizer.amax,
        global_amax=quantizer.global_amax,
        axis=0,
        quant_func=quantizer,
        error_func=error_func,
    )
    calibrator.collect(w.reshape(-1, BLOCK))
    return quantizer, calibrator.compute_amax()


def four_over_six(w):
    """The preset `nvfp4_four_over_six`: multipliers 1.0 and 1.5."""
    quantizer = StaticQuantizer(w, fp8_max=256.0)
    calibrator = MseCalibrator(
        amax=quantizer.amax, axis=0, start_multiplier=1.0, stop_multiplier=1.5, step_size=0.5, quant_func=quantizer
    )
    calibrator.collect(w.reshape(-1, BLOCK))
    return quantizer, calibrator.compute_amax()


def gptq(w, hessian, amax=None):
    """`GPTQHelper.update_weights` with the block scales of max calibration, or those of `amax`; the rounded weights."""
    module = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    module.weight.data = w.clone()
    module.weight_quantizer = StaticQuantizer(w)
    if amax is not None:
        module.weight_quantizer.amax = amax
    helper = GPTQHelper(module, "layer")
    helper.hessian = hessian.clone()
    with torch.no_grad():
        helper.update_weights(block_size=64, perc_damp=0.01)
        if not torch.equal(module.weight_quantizer(module.weight.data), module.weight.data):
            raise SystemExit("the weights that GPTQ rounded are no values of their own scales")
        return module.weight_quantizer, module.weight.data


def weights():
    """Arrays `[N, K]` by name; those in bfloat16 as float32 values."""
    rng = np.random.default_rng(47)
    shape = (16, 192)
    drawn = {
        "normal_f32": rng.normal(size=shape),
        "student_f32": rng.standard_t(3, size=shape),
        "uniform_f32": rng.uniform(-1, 1, size=shape),
        "normal_bf16": rng.normal(size=shape) * 0.02,
        "ties_bf16": rng.integers(-24, 25, size=shape) / 8,
        "sparse_bf16": rng.normal(size=shape) * np.exp2(rng.integers(-16, 1, size=(16, 12))).repeat(16, 1),
    }
    drawn["sparse_bf16"][3, 32:48] = 0
    for name, values in drawn.items():
        w = torch.tensor(values, dtype=torch.bfloat16 if name.endswith("bf16") else torch.float32)
        yield name, w.float()


def layer():
    """A weight `[24, 96]` and 160 correlated tokens with a few large channels."""
    rng = np.random.default_rng(48)
    mixing = rng.normal(size=(96, 96)) / 10 + np.eye(96)
    x = rng.normal(size=(160, 96)) @ mixing * np.exp(rng.normal(size=96))
    return torch.tensor(rng.standard_t(8, size=(24, 96)), dtype=torch.float32), torch.tensor(x, dtype=torch.float32)


def main():
    if modelopt.__version__ != VERSION:
        raise SystemExit(f"nvidia-modelopt {modelopt.__version__}: wanted {VERSION}")
    arrays = {}

    def write(case, values):
        arrays.update({f"{case}.{name}": value for name, value in values.items()})

    for name, w in weights():
        arrays[f"{name}.w"] = w.numpy()
        for algorithm, run in (("mse", scale_sweep), ("four_over_six", four_over_six)):
            quantizer, amax = run(w)
            write(f"{name}.{algorithm}", bytes_of(quantizer, w, amax))
    w, x = layer()
    hessian, _ = update_hessian(x, torch.zeros(96, 96), 0)
    arrays["layer.w"], arrays["layer.hessian"] = w.numpy(), hessian.numpy()
    accumulator = _LocalHessianAccumulator(*w.shape, BLOCK)
    accumulator.accumulate(x)
    quantizer, amax = scale_sweep(w, accumulator.build_error_func())
    write("layer.local_hessian", bytes_of(quantizer, w, amax))
    for name, scales in (("gptq", None), ("gptq_mse", scale_sweep(w)[1])):
        quantizer, rounded = gptq(w, hessian, scales)
        write(f"layer.{name}", bytes_of(quantizer, rounded))
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT}: {len(arrays)} arrays, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
