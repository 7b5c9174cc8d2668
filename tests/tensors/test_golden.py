"""Byte for byte what Model-Optimizer wrote: 19 cases, and the vectors of numerics.md 5.2."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from golden_data import DTYPES, OWN_COPY, GoldenCase, assert_same_bits, golden_file, nvfp4_cases

from jaxfp4.tensors import fake_quantize, global_amax, quantize
from tensors.logical import assert_quantized

CASES = nvfp4_cases()
jitted_quantize = jax.jit(quantize, static_argnums=1)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def expected_bytes(case: GoldenCase) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return case.packed, case.scales, case.scale_2


def test_there_are_19_cases_with_ties_and_a_zero_block():
    assert len(CASES) == 19
    case = next(case for case in CASES if case.name == "outlier_f32")
    assert (np.abs(case.w).reshape(-1, 16).max(1) == 0).any()


@pytest.mark.parametrize(
    "path",
    sorted({golden_file("modelopt_nvfp4.npz"), OWN_COPY / "modelopt_nvfp4.npz"}),
    ids=lambda path: path.parent.name,
)
def test_the_numpy_reference_reproduces_them(path):
    """So that comparing with the reference elsewhere is comparing with Model-Optimizer."""
    cases = nvfp4_cases(path)
    assert len(cases) == 19
    for case in cases:
        packed, scales, scale_2 = reference.quantize_last_axis(case.w)
        assert_same_bits(packed, case.packed)
        assert_same_bits(scales, case.scales)
        assert_same_bits(scale_2, case.scale_2)


@each_case
def test_quantize(backend, case):
    """In float32 and in the named dtype, eager and jitted, and along axis 0 of the transpose."""
    for dtype in {np.dtype(np.float32), case.dtype}:
        w = jnp.asarray(case.w.astype(dtype))
        assert w.dtype == dtype
        assert next(iter(w.devices())).platform == backend
        assert_quantized(quantize(w, -1), expected_bytes(case))
        assert_quantized(jitted_quantize(w, 1), expected_bytes(case))
    transposed = quantize(jnp.asarray(case.w.T), 0)
    assert_quantized(transposed, (case.packed.T, case.scales.T, case.scale_2))


@each_case
def test_dequantize_and_fake_quantize(backend, case):
    values = reference.dequantize_last_axis(*expected_bytes(case))
    for dtype in {np.dtype(np.float32), case.dtype}:
        w = jnp.asarray(case.w.astype(dtype))
        q = quantize(w, -1)
        assert_same_bits(q.dequantize(), values.astype(dtype))
        assert_same_bits(q.dequantize(jnp.float32), values)
        assert_same_bits(fake_quantize(w), values.astype(dtype))


@pytest.mark.parametrize("suffix", DTYPES)
def test_experts_of_one_stack_each_with_their_own_scale(backend, suffix):
    """`[E, K, N]` contracted over axis 1, one global amax per expert."""
    cases = [case for case in CASES if case.name.endswith(f"_{suffix}") and not case.name.startswith("ramp")]
    w = jnp.asarray(np.stack([case.w.T for case in cases]).astype(DTYPES[suffix]))
    q = jitted_quantize(w, 1, global_amax=global_amax(w, keep_axes=(0,)))
    expected = (
        np.stack([case.packed.T for case in cases]),
        np.stack([case.scales.T for case in cases]),
        np.stack([case.scale_2 for case in cases]).reshape(-1, 1, 1),
    )
    assert_quantized(q, expected)
    for i, case in enumerate(cases):
        one = jax.tree.map(lambda part, i=i: part[i], q)
        assert_same_bits(one.dequantize(jnp.float32), reference.dequantize_last_axis(*expected_bytes(case)).T)


def fuzz_weights(mode: str, rng: np.random.Generator) -> np.ndarray:
    normal = rng.standard_normal((256, 256))
    match mode:
        case "normal":
            w = normal
        case "any bits":
            w = rng.integers(0, 2**32, (256, 256), dtype=np.uint32).view(np.float32)
            w = np.where(np.isfinite(w), w, np.float32(0))
        case "blocks of all sizes":
            w = normal * np.repeat(2.0 ** rng.uniform(-30, 0, (256, 16)), 16, 1)
        case "ties":
            w = rng.integers(-48, 49, (256, 256)) / 8 * 2.0 ** rng.integers(-20, 20)
        case "scaled ties":
            w = np.float32(rng.uniform(0.5, 2)) * rng.integers(-24, 25, (256, 256)).astype(np.float32)
        case "any range":
            w = normal * 2.0 ** rng.uniform(-90, 120)
        case "subnormals":
            w = normal.astype(np.float32)
            w[::2] *= np.float32(1e-40)
            w[1::4, ::3] = -1e-44
        case "heavy tails":
            w = normal**5
    return w.astype(np.float32)


FUZZ_MODES = (
    "normal", "any bits", "blocks of all sizes", "ties", "scaled ties", "any range", "subnormals", "heavy tails",
)  # fmt: skip


@pytest.mark.parametrize("mode", FUZZ_MODES)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_random_weights_equal_the_reference(backend, mode):
    """Also with a global amax given that is below or far above the largest value."""
    rng = np.random.default_rng(sum(mode.encode()))
    for factor in (None, 0.25, 1.3, 1e6):
        w = fuzz_weights(mode, rng)
        amax = np.abs(w).max() * np.float32(1 if factor is None else factor)
        amax = min(amax, np.finfo(np.float32).max)
        given = None if factor is None else jnp.float32(amax)
        expected = reference.quantize_last_axis(w, amax)
        q = quantize(jnp.asarray(w), 1, global_amax=given)
        assert_quantized(q, expected)
        assert_same_bits(q.dequantize(), reference.dequantize_last_axis(*expected))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_vector_g1(dtype):
    w = ((np.arange(64).reshape(2, 32) - 32) / 8).astype(dtype)
    q = quantize(w, 1)
    assert float(q.global_scale) == float.fromhex("0x1.861862p-10")
    assert np.asarray(q.scales).tobytes().hex() == "7e76757e"
    assert np.asarray(q.packed).tobytes().hex() == ("ffffffeeeeeeeeddffefeededdccab9a10224354656676775565666666767777")
    values = np.asarray(q.dequantize(jnp.float32)).astype(np.float64)
    assert values.sum() == pytest.approx(-4.1428568214178085, rel=1e-6)
    assert values.reshape(-1)[:7].tolist() == [-4, -4, -4, -4, -4, -4, -2.6666667461395264]
    sums = {"float32": -4.1428568214178085, "bfloat16": -4.1689453125, "float16": -4.1387939453125}
    assert np.asarray(q.dequantize()).astype(np.float64).sum() == pytest.approx(sums[dtype.name], rel=1e-6)


def test_vector_g2_zero_block():
    w = np.zeros((1, 32), np.float32)
    w[0, :16] = np.linspace(-1, 1, 16, dtype=np.float32)
    q = quantize(w, 1)
    assert float(q.global_scale) == float.fromhex("0x1.861862p-12")
    assert np.asarray(q.scales).tobytes().hex() == "7e38"
    assert np.asarray(q.packed).tobytes().hex() == "ffeecd9a21546677" + "00" * 8


def test_vector_g5_tiny_blocks():
    w = np.zeros((1, 48), np.float32)
    w[0, 0], w[0, 16:32], w[0, 32:] = 1, 1e-7, 1 / (448 * 512)
    q = quantize(w, 1)
    assert np.asarray(q.scales).tobytes().hex() == "7e0101"
    assert q.dequantize()[0, ::16].tolist() == [1.0, 0.0, 4.359654212748865e-06]


def test_vector_g6_block_amax_above_the_global_amax():
    q = quantize(np.full((1, 16), 4, np.float32), 1, global_amax=1.0)
    assert np.asarray(q.scales).tobytes().hex() == "7e"
    assert np.asarray(q.packed).tobytes().hex() == "77" * 8
    assert_same_bits(q.dequantize(), np.ones((1, 16), np.float32))


@functools.cache
def exhaustive_bfloat16() -> np.ndarray:
    """Every finite bfloat16 value but subnormal ones, in rows of 16 alike within a factor of two."""
    bits = np.arange(65536, dtype=np.uint16).view(DTYPES["bf16"])
    magnitude = np.abs(bits.astype(np.float32))
    return bits[np.isfinite(magnitude) & (magnitude >= 2.0**-126)].reshape(-1, 16)


@pytest.mark.parametrize("amax", [3.3895314e38, 448.0, 1.0, 0.3, 2.0**-80])
def test_every_bfloat16_value(backend, amax):
    """Through the whole quantizer, at several global scales; most blocks saturate or vanish, hundreds do neither."""
    w = exhaustive_bfloat16()
    q = quantize(jnp.asarray(w), 1, global_amax=jnp.float32(amax))
    expected = reference.quantize_last_axis(w, amax)
    assert_quantized(q, expected)
    values = reference.dequantize_last_axis(*expected)
    assert_same_bits(q.dequantize(jnp.float32), values)
    assert_same_bits(fake_quantize(jnp.asarray(w), global_amax=jnp.float32(amax)), values.astype(w.dtype))
