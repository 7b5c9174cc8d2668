"""The functions behind a method's block scales and rounding."""

from __future__ import annotations

from collections.abc import Mapping

from jax import Array

from jaxfp4.algorithms.four_over_six import four_over_six_scales
from jaxfp4.algorithms.gptq_encoder import GptqEncoder
from jaxfp4.algorithms.local_hessian import hessian_table, local_hessian_scales
from jaxfp4.algorithms.mse import importance_table, mse_scales
from jaxfp4.kernels import hessian_search, search
from jaxfp4.recipes.methods import FourOverSix, Gptq, LocalHessian, Max, Method, Mse, WeightedMse
from jaxfp4.tensors.accelerated import MAX, Kernel
from jaxfp4.tensors.quantize import ChooseScales, Encoder, RoundToNearest, max_scales


def encoder_for(method: Method) -> Encoder:
    """The encoder that does what a method's scales and rounding say."""
    if isinstance(method.rounding, Gptq):
        # GPTQ gives its scales the importance of the channels itself, not the moments.
        weighted = isinstance(method.scales, WeightedMse)
        return GptqEncoder(mse_scales if weighted else _CHOICES[type(method.scales)], method.rounding)
    return RoundToNearest(_CHOICES[type(method.scales)], kernel=_KERNELS.get(type(method.scales)))


def _mse(blocks: Array, global_scale: Array, axis: int, moments: Array | None) -> Array:
    return mse_scales(blocks, global_scale, axis)


def _four_over_six(blocks: Array, global_scale: Array, axis: int, moments: Array | None) -> Array:
    return four_over_six_scales(blocks, global_scale, axis)


def _weighted_mse(blocks: Array, global_scale: Array, axis: int, moments: Array | None) -> Array:
    return mse_scales(blocks, global_scale, axis, None if moments is None else moments[0])


def _local_hessian(blocks: Array, global_scale: Array, axis: int, moments: Array | None) -> Array:
    if moments is None:
        return mse_scales(blocks, global_scale, axis)
    return local_hessian_scales(blocks, global_scale, axis, moments)


_CHOICES: Mapping[type, ChooseScales] = {
    Max: max_scales,
    Mse: _mse,
    FourOverSix: _four_over_six,
    WeightedMse: _weighted_mse,
    LocalHessian: _local_hessian,
}

_KERNELS: Mapping[type, Kernel] = {
    Max: MAX,
    Mse: Kernel(search.mse_scales, search.TUNING),
    FourOverSix: Kernel(search.four_over_six_scales, search.TUNING),
    WeightedMse: Kernel(search.weighted_mse_scales, search.TUNING, importance_table),
    LocalHessian: Kernel(hessian_search.local_hessian_scales, hessian_search.TUNING, hessian_table),
}
"""The same on a GPU, where there is a kernel."""
