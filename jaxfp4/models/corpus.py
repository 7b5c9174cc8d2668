"""A corpus that needs no download: the Python standard library's own source text, one byte a token.

The files are those of the running interpreter, without site-packages, tests and generated text (code page tables,
help topics, build settings: near copies of each other would flatter a held-out figure). Which of them are held out is
decided by the SHA-256 of the path inside the library, so a file is on the same side under every Python version (its
text still differs a little between versions, and so do figures measured on it).
"""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

#: One file in this many is held out.
HELD_OUT_EVERY = 16
#: Goes before every file's text: the sign that a new file starts.
FILE_START = b"\0"

_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"})
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_GENERATED_PREFIX = "_sysconfigdata"


def source_files(root: Path | None = None, *, with_tests: bool = False) -> tuple[tuple[str, Path], ...]:
    """``(path inside the library, file)`` of every source file of the corpus, sorted by the first.

    Args:
        root: the library's folder; by default the running interpreter's.
        with_tests: whether the library's own test folders count (many installations have none).

    Raises:
        ValueError: there is no Python source under it (an interpreter installed without the library's source).
    """
    base = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    skipped = _SKIPPED_FOLDERS if with_tests else _SKIPPED_FOLDERS | _TEST_FOLDERS
    files = []
    for file in base.rglob("*.py"):
        relative = file.relative_to(base)
        if skipped.isdisjoint(relative.parts[:-1]) and not file.name.startswith(_GENERATED_PREFIX):
            files.append((relative.as_posix(), file))
    if not files:
        raise ValueError(
            f"corpus: no Python source (*.py) under {base}; the corpus is the standard library's own text, "
            "so use an interpreter that was installed with it"
        )
    return tuple(sorted(files))


def is_held_out(relative_path: str) -> bool:
    """Whether the file at this path inside the library (with ``/``) is never trained on."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_EVERY == 0


def training_bytes(root: Path | None = None, *, with_tests: bool = False) -> bytes:
    """The text of all files that are not held out, each after a `FILE_START`. Arguments, errors: `source_files`."""
    return _text(root, held_out=False, with_tests=with_tests)


def heldout_bytes(root: Path | None = None) -> bytes:
    """The text of the held-out files, each after a `FILE_START`. Errors as `source_files`."""
    return _text(root, held_out=True, with_tests=False)


@functools.lru_cache(maxsize=4)
def _text(root: Path | None, *, held_out: bool, with_tests: bool) -> bytes:
    files = source_files(root, with_tests=with_tests)
    return b"".join(FILE_START + file.read_bytes() for name, file in files if is_held_out(name) == held_out)


def heldout_batches(count: int, batch: int, length: int, root: Path | None = None) -> list[NDArray[np.int32]]:
    """`count` arrays of int32 tokens ``[batch, length]``, windows spread evenly over the held-out text.

    The same arguments give the same windows. Each batch spreads over the whole text, so a few batches already
    represent it.

    Raises:
        ValueError: an argument is below 1, or the text is shorter than a window.
    """
    return _windows("held-out", heldout_bytes(root), count, batch, length)


def calibration_batches(count: int, batch: int, length: int, root: Path | None = None) -> list[NDArray[np.int32]]:
    """As `heldout_batches`, over the training text."""
    return _windows("training", training_bytes(root), count, batch, length)


def _windows(name: str, text: bytes, count: int, batch: int, length: int) -> list[NDArray[np.int32]]:
    for argument, value in (("count", count), ("batch", batch), ("length", length)):
        if value < 1:
            raise ValueError(f"corpus: {argument} is {value}, wanted at least 1")
    if len(text) < length:
        raise ValueError(f"corpus: the {name} text has {len(text)} bytes, wanted at least one window of {length}")
    starts = _even_starts(len(text) - length, count * batch)
    tokens = np.frombuffer(text, np.uint8)
    windows = np.stack([tokens[start : start + length] for start in starts]).astype(np.int32)
    return list(windows.reshape(batch, count, length).swapaxes(0, 1))


def _even_starts(last: int, count: int) -> Sequence[int]:
    """`count` integers from 0 to `last`, evenly spaced."""
    return [last * i // max(count - 1, 1) for i in range(count)]
