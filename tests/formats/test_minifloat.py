"""The formats as data, against ml_dtypes and the published tables."""

import ml_dtypes
import numpy as np
import pytest
from golden_data import assert_same_bits

from jaxfp4.formats import BLOCK_SIZE, E2M1, E4M3

ML_DTYPES = {"E2M1": ml_dtypes.float4_e2m1fn, "E4M3": ml_dtypes.float8_e4m3fn}


@pytest.mark.parametrize("fmt", [E2M1, E4M3], ids=lambda fmt: fmt.name)
def test_every_code_decodes_as_in_ml_dtypes(fmt):
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    expected = codes.view(ML_DTYPES[fmt.name]).astype(np.float64)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(fmt.values), ~number)
    assert_same_bits(fmt.values[number], expected[number])


@pytest.mark.parametrize("fmt", [E2M1, E4M3], ids=lambda fmt: fmt.name)
def test_properties_equal_finfo(fmt):
    info = ml_dtypes.finfo(ML_DTYPES[fmt.name])
    assert fmt.bits == info.bits
    assert (fmt.exponent_bits, fmt.mantissa_bits) == (info.nexp, info.nmant)
    assert fmt.max == float(info.max)
    assert fmt.smallest_normal == float(info.smallest_normal)
    assert fmt.smallest == float(info.smallest_subnormal)


def test_constants_of_the_specifications():
    """OCP MX v1.0, table 5; OCP FP8 v1.0, table 1; NVFP4's block."""
    assert E2M1.magnitudes.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (E4M3.max, E4M3.smallest, E4M3.smallest_normal) == (448, 2**-9, 2**-6)
    assert (E2M1.sign_mask, E4M3.sign_mask, BLOCK_SIZE) == (8, 128, 16)


@pytest.mark.parametrize("fmt", [E2M1, E4M3], ids=lambda fmt: fmt.name)
def test_magnitudes_increase_so_codes_compare_as_values(fmt):
    assert (np.diff(fmt.magnitudes) > 0).all()
    assert len(fmt.magnitudes) == 2 ** (fmt.bits - 1) - fmt.has_nan
