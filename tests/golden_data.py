"""The golden NVFP4 cases that Model-Optimizer wrote, and comparing bit for bit."""

from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

SHARED = Path(__file__).parents[2] / "shared" / "golden"
OWN_COPY = Path(__file__).parent / "golden"

DTYPES = {"f32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16), "f16": np.dtype(np.float16)}


class GoldenCase(NamedTuple):
    """Float32 weights `[N, K]`, exact in `dtype`, and the bytes made of them in blocks along the last axis."""

    name: str
    w: np.ndarray
    packed: np.ndarray
    scales: np.ndarray
    scale_2: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        """The dtype that the name ends in."""
        return DTYPES[self.name.rsplit("_", 1)[1]]


def golden_file(name: str) -> Path:
    """The file in ../shared/golden, or, where that folder is absent, in the smaller copy beside the tests."""
    return SHARED / name if (SHARED / name).exists() else OWN_COPY / name


def nvfp4_cases(path: Path | None = None) -> list[GoldenCase]:
    """All cases of `modelopt_nvfp4.npz`. The copy beside the tests keeps 24 rows of each, with its largest value."""
    with np.load(path or golden_file("modelopt_nvfp4.npz")) as data:
        names = sorted({key.rsplit(".", 1)[0] for key in data})
        return [GoldenCase(name, *(data[f"{name}.{field}"] for field in GoldenCase._fields[1:])) for name in names]


def assert_same_bits(actual: object, expected: object) -> None:
    """Same shape, dtype and bits: tells -0.0 from 0.0 and one NaN from another."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    bits = f"u{expected.dtype.itemsize}"
    different = np.atleast_1d(actual.view(bits) != expected.view(bits))
    if different.any():
        at = np.argwhere(different)[0]
        values = np.atleast_1d(actual)[tuple(at)], np.atleast_1d(expected)[tuple(at)]
        raise AssertionError(
            f"{different.sum()} of {different.size} differ, first at {at}: {values[0]!r} != {values[1]!r}"
        )
