"""NVIDIA Model-Optimizer: its torch functions, and on a GPU its Triton kernels.

Its blocks lie along the last axis, so a weight contracted along the last but one is brought to it transposed, which is
not timed. Buffers are shared with JAX's by DLPack.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxfp4.commands.bench_kernels.libraries import Rival, versions
from jaxfp4.commands.bench_kernels.operations import damped
from jaxfp4.commands.bench_kernels.parts import Parts
from jaxfp4.commands.bench_kernels.timing import Clock, Timing

PACKAGES = ("modelopt", "torch")
BLOCK = 16
QUANTIZATION = "modelopt.torch.quantization"
KERNELS = "modelopt.torch.kernels.quantization.gemm"
USES_EXTENSION = {"fake_quantize", "fake_quantize_leading", "four_over_six", "local_hessian"}
USES_SWEEP = {"mse", "mse_leading"}
"""Operations for which it compiles its CUDA extension for FP8, or a Triton kernel with 126 steps written out."""
SEARCH_WANTED = 0.99
"""Float32 errors of two block scales may change places."""


class ModelOptimizer:
    """Functions of `modelopt.torch.quantization`."""

    name = "modelopt"

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._torch: Any = importlib.import_module("torch")
            importlib.import_module(QUANTIZATION)
            self._tensor: Any = importlib.import_module(f"{QUANTIZATION}.qtensor.nvfp4_tensor").NVFP4QTensor
            self._utils: Any = importlib.import_module(f"{QUANTIZATION}.utils")
            self._calibrators: Any = importlib.import_module(f"{QUANTIZATION}.calib.mse")
            self._kernels: Any = importlib.import_module(KERNELS)
        # Torch is asked for what JAX was: the same kind of device, and on a CPU all cores, as by default.
        self._on_gpu = jax.default_backend() == "gpu" and self._torch.cuda.is_available()
        self._torch.set_num_threads(os.cpu_count() or 1)
        self.versions = versions(["nvidia-modelopt", "torch", "triton"])
        self._building: dict[str, threading.Thread] = {}

    def begin(self, operations: Collection[str]) -> None:
        """Compiles what takes it a minute at its first use, on a GPU, while ours is compiled."""
        if not self._on_gpu:
            return
        for build, users in ((self._build_extension, USES_EXTENSION), (self._build_sweep, USES_SWEEP)):
            if users & set(operations):
                thread = threading.Thread(target=build, daemon=True)
                thread.start()
                self._building |= dict.fromkeys(users, thread)

    def _build_extension(self) -> None:
        # If it cannot be built, slower functions of torch do the same, and a warning says so.
        importlib.import_module(f"{QUANTIZATION}.extensions").get_cuda_ext_fp8(raise_if_failed=False)

    def _build_sweep(self) -> None:
        values = self._torch.ones((1 << 16, BLOCK), dtype=self._torch.bfloat16, device="cuda")
        self._kernels.nvfp4_fp8_scale_sweep(values, values[0, 0].float())

    def rivals(self, operation: str) -> Sequence[Rival]:
        """What it has for an operation; searches on a CPU go through its calibrators."""
        if operation in self._building:
            self._building[operation].join()
        leading = operation.endswith("_leading")
        make = self._makers().get(operation.removesuffix("_leading"))
        return () if make is None else make(_Layout(self._torch, leading))

    def time(self, call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], clock: Clock) -> Timing:
        """With CUDA events over batches of calls, or on a CPU call by call."""
        if not self._on_gpu:
            return clock.repeat(lambda given: call(*given), arguments)

        def batch(calls: int) -> float:
            start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for i in range(calls):
                call(*arguments[i % len(arguments)])
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000

        return clock.in_batches(batch)

    def wait(self, result: Any) -> Any:
        """The result once it is there."""
        if self._on_gpu:
            self._torch.cuda.synchronize()
        return result

    def _makers(self) -> dict[str, Callable[[_Layout], Sequence[Rival]]]:
        return {
            "global_amax": self._global_amax,
            "block_and_global_amax": self._amaxes,
            "quantize": self._quantize,
            "quantize_given_amax": self._quantize_given_amax,
            "fake_quantize": self._fake_quantize,
            "dequantize": self._dequantize,
            "mse": self._mse,
            "four_over_six": self._four_over_six,
            "local_hessian": self._local_hessian,
        }

    def _global_amax(self, layout: _Layout) -> Sequence[Rival]:
        parts = functools.partial(_single, "amax")
        return (Rival("reduce_amax", layout.weight, self._utils.reduce_amax, parts),)

    def _amaxes(self, layout: _Layout) -> Sequence[Rival]:
        def call(x: Any) -> tuple[Any, Any]:
            blocks = self._utils.reduce_block_amax(x, {-1: BLOCK})
            return blocks, self._utils.reduce_amax(blocks)

        def parts(result: Any) -> Parts:
            blocks, amax = (layout.back(part).astype(jnp.float32) for part in result)
            return {"block_amax": blocks, "amax": amax.reshape(())}

        return (Rival("reduce_block_amax, reduce_amax", layout.weight, call, parts),)

    def _quantize(self, layout: _Layout) -> Sequence[Rival]:
        call = functools.partial(self._tensor.quantize, block_size=BLOCK)
        return (Rival("NVFP4QTensor.quantize", layout.weight, call, layout.tensor),)

    def _quantize_given_amax(self, layout: _Layout) -> Sequence[Rival]:
        def call(x: Any, amax: Any) -> Any:
            return self._tensor.quantize(x, BLOCK, weights_scaling_factor_2=amax / 2688)

        return (Rival("NVFP4QTensor.quantize", layout.with_amax, call, layout.tensor),)

    def _fake_quantize(self, layout: _Layout) -> Sequence[Rival]:
        parts = functools.partial(_single, "values", back=layout.back)
        if not self._on_gpu:

            def call(x: Any, amax: Any) -> Any:
                return self._simulated(x, None, amax / 2688)

            return (Rival("NVFP4QTensor.quantize, dequantize", layout.with_amax, call, parts),)

        def with_blocks(x: Array, amax: Array) -> tuple[Any, ...]:
            w, top = layout.with_amax(x, amax)
            return w, self._utils.reduce_block_amax(w, {-1: BLOCK}).float(), top

        static = self._kernels.static_blockwise_fp4_fake_quant
        return (
            Rival("fp4_fake_quant_block", layout.with_amax, self._kernels.fp4_fake_quant_block, parts),
            Rival("static_blockwise_fp4_fake_quant", with_blocks, static, parts, "block amaxes given"),
        )

    def _dequantize(self, layout: _Layout) -> Sequence[Rival]:
        def prepare(packed: Array, scales: Array, global_scale: Array) -> tuple[Any, ...]:
            codes = layout.weight(packed)[0]
            block_scales = layout.weight(lax.bitcast_convert_type(scales, jnp.uint8))[0]
            shape = self._torch.Size((*codes.shape[:-1], 2 * codes.shape[-1]))
            tensor = self._tensor(shape, self._torch.bfloat16, codes)
            return tensor, block_scales.view(self._torch.float8_e4m3fn), layout.shared(global_scale)

        def call(tensor: Any, scales: Any, global_scale: Any) -> Any:
            return tensor.dequantize(scale=scales, double_scale=global_scale, block_sizes={-1: BLOCK})

        return (
            Rival("NVFP4QTensor.dequantize", prepare, call, functools.partial(_single, "values", back=layout.back)),
        )

    def _mse(self, layout: _Layout) -> Sequence[Rival]:
        if not self._on_gpu:
            return (self._calibrated(layout, "NVFP4MSECalibrator"),)
        sweep = self._kernels.nvfp4_fp8_scale_sweep

        def alone(x: Any, amax: Any) -> Any:
            return x, amax, sweep(x, amax)

        def with_codes(x: Any, amax: Any) -> Any:
            best = sweep(x, amax).reshape(*x.shape[:-1], -1)
            scales = self._bytes_for(best, amax / 2688)
            return self._tensor.quantize(x, BLOCK, scales, amax / 2688)

        return (
            Rival("nvfp4_fp8_scale_sweep", layout.with_amax, alone, self._best(layout), _NO_CODES, SEARCH_WANTED),
            Rival(
                "nvfp4_fp8_scale_sweep, NVFP4QTensor.quantize",
                layout.with_amax,
                with_codes,
                layout.tensor,
                wanted=SEARCH_WANTED,
            ),
        )

    def _local_hessian(self, layout: _Layout) -> Sequence[Rival]:
        def prepare(x: Array, amax: Array, moments: Array) -> tuple[Any, ...]:
            hessian = layout.shared(jnp.asarray(damped(np.asarray(moments)), jnp.float32))
            return *layout.with_amax(x, amax), hessian

        if not self._on_gpu:
            return (self._calibrated(layout, "NVFP4MSECalibrator, Hessian", prepare),)
        sweep = self._kernels.nvfp4_fp8_scale_sweep_hessian

        def call(x: Any, amax: Any, hessian: Any) -> Any:
            return x, amax, sweep(x.view(-1, BLOCK), amax, hessian)

        return (Rival("nvfp4_fp8_scale_sweep_hessian", prepare, call, self._best(layout), _NO_CODES, SEARCH_WANTED),)

    def _four_over_six(self, layout: _Layout) -> Sequence[Rival]:
        def call(x: Any, amax: Any) -> Any:
            blocks = x.reshape(-1, BLOCK)
            largest = self._utils.reduce_block_amax(blocks, {-1: BLOCK}).float()
            calibrator = self._calibrators.MseCalibrator(
                largest,
                0,
                step_size=0.5,
                start_multiplier=1.0,
                stop_multiplier=1.5,
                quant_func=self._simulator(amax, 1536),
            )
            calibrator.collect(blocks)
            return x, amax, calibrator.compute_amax()

        return (
            Rival("MseCalibrator, 4/6", layout.with_amax, call, self._best(layout, 1536), _NO_CODES, SEARCH_WANTED),
        )

    def _calibrated(
        self, layout: _Layout, function: str, prepare: Callable[..., tuple[Any, ...]] | None = None
    ) -> Rival:
        """The sweep of its calibrator, whose values under each candidate it has no CPU function for but this."""

        def call(x: Any, amax: Any, hessian: Any = None) -> Any:
            blocks = x.reshape(-1, BLOCK)

            def error(values: Any, nearest: Any) -> Any:
                d = (values - nearest).view(-1, len(hessian), BLOCK)
                loss = self._torch.einsum("cnb,nbd,cnd->cn", d, hessian, d).reshape(-1, 1)
                return loss.expand(-1, BLOCK)

            calibrator = self._calibrators.NVFP4MSECalibrator(
                self._utils.reduce_block_amax(blocks, {-1: BLOCK}).float(),
                amax,
                axis=0,
                quant_func=self._simulator(amax, 2688),
                error_func=None if hessian is None else error,
            )
            calibrator.collect(blocks)
            return x, amax, calibrator.compute_amax()

        note = "no codes; its quantizer needs Triton, so NVFP4QTensor makes the values of each of the 126 scales"
        return Rival(function, prepare or layout.with_amax, call, self._best(layout), note, SEARCH_WANTED, once=True)

    def _simulator(self, amax: Any, divisor: int) -> Callable[[Any, Any], Any]:
        """`(blocks, block amaxes) -> values`, for its calibrators."""
        if self._on_gpu:
            static = self._kernels.static_blockwise_fp4_fake_quant
            return lambda blocks, largest: static(blocks, largest, amax, True, divisor / 6)
        scale = amax / divisor
        return lambda blocks, largest: self._simulated(blocks, self._bytes_for(largest, scale), scale)

    def _simulated(self, x: Any, scales: Any, global_scale: Any) -> Any:
        tensor, scales, _ = self._tensor.quantize(x, BLOCK, scales, global_scale)
        return tensor.dequantize(scale=scales, double_scale=global_scale, block_sizes={-1: BLOCK})

    def _bytes_for(self, block_amax: Any, global_scale: Any) -> Any:
        return (block_amax / 6 / global_scale).clamp(2.0**-9, 448).to(self._torch.float8_e4m3fn)

    def _best(self, layout: _Layout, divisor: int = 2688) -> Callable[[Any], Parts]:
        """Block scales from the block amaxes that a search has chosen."""

        def parts(result: Any) -> Parts:
            x, amax, best = result
            scales = self._bytes_for(best.reshape(*x.shape[:-1], -1), amax / divisor)
            return {"scales": layout.back(scales.view(self._torch.uint8))}

        return parts


_NO_CODES = "block scales alone, no codes"


class _Layout:
    """Buffers of JAX as torch has them, and back."""

    def __init__(self, torch: Any, leading: bool) -> None:
        self._torch, self._leading = torch, leading

    def shared(self, x: Array) -> Any:
        """The same buffer."""
        return self._torch.from_dlpack(jax.block_until_ready(x))

    def weight(self, x: Array) -> tuple[Any]:
        """The same buffer, or a transposed copy."""
        shared = self.shared(x)
        return (shared.transpose(-1, -2).contiguous() if self._leading else shared,)

    def with_amax(self, x: Array, amax: Array) -> tuple[Any, Any]:
        """A weight and its global amax."""
        return self.weight(x)[0], self.shared(amax)

    def back(self, x: Any) -> Array:
        """As a JAX array, transposed back."""
        array = jnp.from_dlpack(x.contiguous())
        return jnp.swapaxes(array, -1, -2) if self._leading else array

    def tensor(self, result: Any) -> Parts:
        """The parts of an `NVFP4QTensor` with its scales."""
        tensor, scales, global_scale = result
        return {
            "packed": self.back(tensor._quantized_data),
            "scales": self.back(scales.view(self._torch.uint8)),
            "global_scale": jnp.from_dlpack(global_scale),
        }


def _single(name: str, result: Any, back: Callable[[Any], Array] = jnp.from_dlpack) -> Parts:
    array = back(result)
    return {name: array.astype(jnp.float32).reshape(()) if name == "amax" else array}
