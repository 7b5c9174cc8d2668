"""Model-Optimizer's calibration algorithms on the same small arrays, as `golden/make_modelopt_algorithms.py` ran them.

Where the algorithm is the same, so are the bytes. Model-Optimizer adds squared errors in float32 and goes by the first
of equal sums; ours are exact. No block of these arrays lies so near a tie that it matters, not even those of multiples
of 1/8. A block of zeros has error 0 under every scale, and each keeps its own: ours 1.0.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from golden_data import OWN_COPY
from reference import dequantize_last_axis

from jaxfp4.algorithms.encoders import encoder_for
from jaxfp4.algorithms.local_hessian import DAMPING
from jaxfp4.recipes import FourOverSix, Gptq, LocalHessian, Max, Method, Mse, Order, WeightedMse
from jaxfp4.tensors import quantize_unchecked

ARRAYS = ("normal_f32", "student_f32", "uniform_f32", "normal_bf16", "ties_bf16", "sparse_bf16")
SAME_RANGE = 6 * 448


@functools.cache
def golden() -> dict[str, np.ndarray]:
    with np.load(OWN_COPY / "modelopt_algorithms.npz") as data:
        return dict(data)


def theirs(case: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed codes, E4M3 bytes and the global scale."""
    return tuple(golden()[f"{case}.{part}"] for part in ("packed", "scales", "scale_2"))


def ours(w: np.ndarray, method: Method, divisor: int, moments: np.ndarray | None = None):
    """As `theirs`; `moments` `[R, 1, K]`."""
    q = quantize_unchecked(jnp.asarray(w), 1, divisor=divisor, encoder=encoder_for(method), moments=moments)
    return np.asarray(q.packed), np.asarray(q.scales).view(np.uint8), np.asarray(q.global_scale)


def squares(w: np.ndarray, quantized) -> np.ndarray:
    """Sums of squared errors of blocks, in float64."""
    error = w.astype(np.float64) - dequantize_last_axis(*quantized)
    return np.square(error).reshape(len(w), -1, 16).sum(-1)


def output_error(w: np.ndarray, quantized, hessian: np.ndarray) -> float:
    """`tr((w - q) H (w - q)^T) / tr(w H w^T)` in float64."""
    w, hessian = w.astype(np.float64), hessian.astype(np.float64)
    error = w - dequantize_last_axis(*quantized)
    return float(np.sum(error @ hessian * error) / np.sum(w @ hessian * w))


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize(
    "algorithm, method, divisor",
    [("mse", Method(Mse()), SAME_RANGE), ("four_over_six", Method(FourOverSix()), FourOverSix.divisor)],
)
def test_block_scales_are_the_same_bytes(name, algorithm, method, divisor):
    w = golden()[f"{name}.w"]
    wanted, found = theirs(f"{name}.{algorithm}"), ours(w, method, divisor)
    np.testing.assert_array_equal(found[2].view(np.uint32), wanted[2].view(np.uint32))
    np.testing.assert_array_equal(found[0], wanted[0])
    live = np.abs(w).reshape(len(w), -1, 16).max(-1) > 0
    np.testing.assert_array_equal(found[1][live], wanted[1][live])
    assert np.count_nonzero(~live) == (name == "sparse_bf16")
    assert np.all(squares(w, found) <= squares(w, wanted))


@pytest.mark.parametrize(
    "name, most", [("normal_f32", 0.98), ("student_f32", 0.99), ("uniform_f32", 0.81), ("ties_bf16", 0.79)]
)
def test_headroom_makes_mse_better_than_theirs(name, most):
    """Model-Optimizer's sweep keeps the range of 448, so its largest blocks cannot take a larger scale; ours can."""
    w = golden()[f"{name}.w"]
    gain = squares(w, ours(w, Method(Mse()), Mse.divisor)).sum() / squares(w, theirs(f"{name}.mse")).sum()
    assert gain < most


def layer() -> tuple[np.ndarray, np.ndarray]:
    return golden()["layer.w"], golden()["layer.hessian"]


@pytest.mark.parametrize("name, scales", [("gptq", Max()), ("gptq_mse", Mse())])
def test_gptq_in_stored_order_gives_the_same_weights(name, scales):
    """Their columns run as they lie; ours do so with `Order.STATIC`. The error that is fed back differs by rounding.

    Values are compared and not codes: theirs are packed from the rounded weights, where -0.0 has lost its sign.
    """
    w, hessian = layer()
    method = Method(scales, Gptq(order=Order.STATIC))
    wanted, found = theirs(f"layer.{name}"), ours(w, method, SAME_RANGE, hessian[:, None, :])
    np.testing.assert_array_equal(found[1], wanted[1])
    np.testing.assert_array_equal(dequantize_last_axis(*found), dequantize_last_axis(*wanted))


@pytest.mark.parametrize("scales, most", [(Max(), 0.52), (Mse(), 0.43), (WeightedMse(), 0.26)])
def test_gptq_in_order_of_activation_has_less_output_error_than_theirs(scales, most):
    """Theirs has no other order, and block scales of max calibration only."""
    w, hessian = layer()
    found = output_error(w, ours(w, Method(scales, Gptq()), scales.divisor, hessian[:, None, :]), hessian)
    assert found < most * output_error(w, theirs("layer.gptq"), hessian)


def test_local_hessian_is_no_worse_than_theirs_in_its_objective():
    """Ours adds a hundredth of the mean diagonal to each block's Hessian, theirs nothing."""
    w, hessian = layer()
    tiles = np.stack([hessian[i : i + 16, i : i + 16] for i in range(0, 96, 16)])
    moments = jnp.asarray(tiles.reshape(96, 16).T[:, None, :])
    wanted, found = theirs("layer.local_hessian"), ours(w, Method(LocalHessian()), SAME_RANGE, moments)
    damping = DAMPING * np.trace(tiles, axis1=1, axis2=2) / 16
    damped = tiles + damping[:, None, None] * np.eye(16)

    def errors(quantized, matrices) -> np.ndarray:
        error = (w.astype(np.float64) - dequantize_last_axis(*quantized)).reshape(len(w), 6, 16)
        return np.einsum("nbi,bij,nbj->nb", error, matrices.astype(np.float64), error)

    assert np.all(errors(found, damped) <= errors(wanted, damped) * (1 + 1e-5))
    assert 0 < np.mean(found[1] != wanted[1]) < 0.1
    assert errors(found, tiles).sum() < 1.02 * errors(wanted, tiles).sum()
