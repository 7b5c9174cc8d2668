"""Counts over codes and scales against plain numpy, and what names and dtypes say of modules."""

import numpy as np
import pytest
import reference
from checkpoint_files import Files

from jaxfp4.checkpoints import open_checkpoint
from jaxfp4.checkpoints.verification.block_statistics import block_statistics, merged
from jaxfp4.checkpoints.verification.quantized_modules import multiplier, take_inventory
from jaxfp4.checkpoints.verification.verify_values import statistics_of


def random_weight(n, k, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
    codes[rng.random((n, k // 2)) < 0.6] &= 0x99  # magnitudes 0 and 0.5
    codes[rng.random(n) < 0.2] = 0x80
    return codes, rng.integers(0, 256, (n, k // 16), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(1, 16), (7, 48), (70, 8192)])  # the last spans more than one piece
def test_statistics_equal_plain_counts(shape):
    codes, scales = random_weight(*shape)
    found = block_statistics(codes, scales, count_codes=True)
    magnitudes = np.stack([codes & 7, codes >> 4 & 7], -1).reshape(-1, 16)
    largest, flat = magnitudes.max(-1), scales.reshape(-1)
    assert found.code_counts.tolist() == np.bincount(magnitudes.reshape(-1), minlength=8).tolist()
    assert found.scale_counts.tolist() == np.bincount(flat, minlength=256).tolist()
    assert (found.dead, found.blocks) == (np.sum(largest == 0), flat.size)
    assert found.lost == np.sum((flat & 0x7F == 0) & (largest > 0))
    assert found.largest_below_six == np.sum((largest > 0) & (largest < 7))
    assert found.largest_below_four == np.sum((largest > 0) & (largest < 6))
    values = flat.view("V1").view(reference.ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert (found.nan, found.negative) == (np.isnan(values).sum(), np.sum(values < 0))
    assert found.subnormal == np.sum((values > 0) & (values < 2**-6))
    assert (found.saturated, found.negative_zero) == (np.sum(values == 448), np.sum(flat == 0x80))
    assert found.largest_scale == max(values[values > 0], default=0)
    p = np.bincount(magnitudes.reshape(-1)) / magnitudes.size
    np.testing.assert_allclose(found.code_entropy, -(p[p > 0] * np.log2(p[p > 0])).sum(), rtol=1e-12, atol=1e-15)
    fast = block_statistics(codes, scales)
    assert fast.code_counts is None and np.isnan(fast.code_entropy)
    counts = ("dead", "lost", "largest_below_six", "largest_below_four", "blocks")
    assert [getattr(fast, name) for name in counts] == [getattr(found, name) for name in counts]


def test_statistics_of_two_weights_together():
    codes, scales = random_weight(20, 64)
    parts = [block_statistics(codes[part], scales[part], count_codes=True) for part in (slice(7), slice(7, 20))]
    whole, found = block_statistics(codes, scales, count_codes=True), merged(*parts)
    assert found.code_counts.tolist() == whole.code_counts.tolist()
    assert (found.dead, found.lost, found.largest_below_six) == (whole.dead, whole.lost, whole.largest_below_six)
    assert merged(parts[0], block_statistics(codes, scales)).code_counts is None


def test_modules_by_their_tensors(tmp_path):
    e4m3 = reference.ml_dtypes.float8_e4m3fn
    codes, scales, one = np.zeros((8, 16), np.uint8), np.ones((8, 2), e4m3), np.float32(1)
    tensors = {
        "ours.weight": codes,
        "ours.weight_scale": scales,
        "ours.weight_scale_2": np.asarray(np.float32(0.25)),
        "ours.bias": np.ones(8, np.float32),
        "theirs.weight_packed": codes,
        "theirs.weight_scale": scales,
        "theirs.weight_global_scale": np.full(1, 4, np.float32),
        "theirs.input_global_scale": np.zeros(1, np.float32),
        "fp8.weight": np.ones((8, 32), e4m3),
        "fp8.weight_scale": np.asarray(one),
        "fp8.input_scale": np.asarray(one),
        "mxfp4.weight": codes,
        "mxfp4.weight_scale": np.ones((8, 1), np.uint8),
        "int4.weight_packed": np.ones((8, 4), np.int32),
        "router.weight": np.ones((4, 32), np.float16),
        "experts.gate_up_proj": np.ones((2, 32, 16), np.float16),
        "experts.down_proj": np.zeros((2, 8, 16), np.uint8),
        "experts.down_proj_weight_scale": np.ones((2, 8, 2), e4m3),
        "experts.down_proj_weight_scale_2": np.asarray(one),
        "norm.weight": np.ones(32, np.float32),
        "attn.k_scale": np.asarray(one),
    }
    checkpoint = open_checkpoint(Files({n: np.asarray(v) for n, v in tensors.items()}, {}).write(tmp_path))
    found = take_inventory(checkpoint)
    assert {name: (m.file_format, m.scheme, m.has_values) for name, m in found.quantized.items()} == {
        "ours": ("modelopt", "W4A16", True),
        "theirs": ("compressed-tensors", "W4A4", True),
    }
    assert {name: module.scheme for name, module in found.plain.items()} == {
        "fp8": "FP8",
        "mxfp4": "MXFP4",
        "int4.weight_packed": "int32",
        "router": "f16",
        "experts.gate_up_proj": "f16",
        "experts.down_proj": "NVFP4 stack",
    }
    stack = found.plain["experts.down_proj"]
    assert (stack.shape, stack.nbytes) == ((2, 8, 32), 2 * 8 * 16 + 2 * 8 * 2 + 4)
    assert list(found.cache_scales) == ["attn.k_scale"]
    assert found.quantized["ours"].others == ("bias",)
    theirs = found.quantized["theirs"]
    assert multiplier(checkpoint, theirs, theirs.global_scale) == 0.25
    assert multiplier(checkpoint, theirs, theirs.input_scale) == np.inf
    with pytest.raises(ValueError, match="x: has no packed codes or no block scales; wanted both; skip it"):
        statistics_of(checkpoint, type(theirs)("x", "modelopt", None, None, None, None, None, ()))
