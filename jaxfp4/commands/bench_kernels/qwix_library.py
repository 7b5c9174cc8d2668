"""qwix, whose NVFP4 has E4M3 block scales and no global scale."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxfp4.commands.bench_kernels.libraries import Rival, versions
from jaxfp4.commands.bench_kernels.parts import Parts
from jaxfp4.commands.bench_kernels.sizes import DTYPE
from jaxfp4.commands.bench_kernels.timing import Clock, Timing
from jaxfp4.formats import nvfp4

PACKAGES = ("qwix",)


class Qwix:
    """`qwix.quantize` and `qwix.dequantize`, jitted."""

    name = "qwix"

    def __init__(self) -> None:
        self._qwix: Any = importlib.import_module("qwix")
        self.versions = versions(["qwix"])

    def begin(self, operations: Collection[str]) -> None:
        """Nothing: its functions are compiled at their first call, in little time."""

    def rivals(self, operation: str) -> Sequence[Rival]:
        """Quantization and dequantization along either axis."""
        stem, axis = operation.removesuffix("_leading"), -2 if operation.endswith("_leading") else -1
        if stem == "quantize":
            return (Rival("quantize", _first, self._quantize(axis), _scales, _NOTE),)
        if stem == "fake_quantize":
            return (Rival("dequantize(quantize)", _first, self._fake_quantize(axis), _values, _NOTE),)
        if stem == "dequantize":
            note = "codes not packed; the global scale already in float32 block scales"
            return (Rival("dequantize", self._tensor(axis), self._dequantize(), _values, note),)
        return ()

    def time(self, call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], clock: Clock) -> Timing:
        """As our own functions are."""
        return clock.time(call, arguments)

    def wait(self, result: Any) -> Any:
        """The result once it is there."""
        return jax.block_until_ready(result)

    def _encode(self, x: Array, axis: int) -> Any:
        return self._qwix.quantize(
            x,
            "nvfp4",
            channelwise_axes=[a for a in range(x.ndim) if a != x.ndim + axis],
            tiled_axes={x.ndim + axis: 16},
        )

    def _quantize(self, axis: int) -> Callable[[Array], Any]:
        return jax.jit(lambda x: self._encode(x, axis))

    def _fake_quantize(self, axis: int) -> Callable[[Array], Any]:
        return jax.jit(lambda x: self._qwix.dequantize(self._encode(x, axis)))

    def _dequantize(self) -> Callable[[Any], Array]:
        return jax.jit(lambda tensor: self._qwix.dequantize(tensor).astype(DTYPE))

    def _tensor(self, axis: int) -> Callable[..., tuple[Any, ...]]:
        """Its own tensor of our codes and scales."""

        @jax.jit
        def prepare(packed: Array, scales: Array, global_scale: Array) -> tuple[Any, ...]:
            codes = nvfp4.decode_values(nvfp4.unpack(packed, axis)).astype(jnp.float4_e2m1fn)
            return (self._qwix.QArray(codes, scales.astype(jnp.float32) * global_scale, None, "nvfp4"),)

        return prepare


_NOTE = "no global scale: small weights get subnormal block scales; codes not packed"


def _first(x: Array, *others: Array) -> tuple[Array]:
    return (x,)


def _values(result: Any) -> Parts:
    return {"values": result}


def _scales(result: Any) -> Parts:
    return {"scales": result.scale.astype(jnp.float8_e4m3fn)}
