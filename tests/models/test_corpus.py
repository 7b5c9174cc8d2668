"""The corpus: which files, which side each is on, and windows that do not depend on chance."""

import numpy as np
import pytest

from jaxfp4.models import calibration_batches, heldout_batches, heldout_bytes, training_bytes
from jaxfp4.models.corpus import FILE_START, is_held_out, source_files


@pytest.fixture
def library(tmp_path):
    """Forty little files, and some that do not count."""
    for i in range(40):
        (tmp_path / "pkg").mkdir(exist_ok=True)
        (tmp_path / "pkg" / f"module_{i}.py").write_text(f"# file {i}\n" * 10)
    for name in (
        "site-packages/a.py",
        "dist-packages/a.py",
        "pkg/__pycache__/b.py",
        "encodings/c.py",
        "pydoc_data/topics.py",
        "_sysconfigdata__linux.py",
        "notes.txt",
        "test/test_a.py",
        "pkg/tests/test_b.py",
        "idlelib/idle_test/test_c.py",
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("never")
    return tmp_path


def test_which_files(library):
    names = [name for name, _ in source_files(library)]
    assert names == sorted(f"pkg/module_{i}.py" for i in range(40))


def test_test_folders_on_request(library):
    names = {name for name, _ in source_files(library, with_tests=True)}
    assert {"test/test_a.py", "pkg/tests/test_b.py", "idlelib/idle_test/test_c.py"} <= names
    assert len(names) == 43


def test_the_two_sides_are_complementary(library):
    held, training = heldout_bytes(library), training_bytes(library)
    assert b"never" not in held + training
    for name, file in source_files(library):
        text = FILE_START + file.read_bytes()
        assert (text in held, text in training) == (is_held_out(name), not is_held_out(name))
    assert len(held) + len(training) == sum(1 + file.stat().st_size for _, file in source_files(library))


def test_the_side_depends_on_the_path_alone():
    assert [
        name for name in ("ast.py", "random.py", "os.py", "json/decoder.py", "argparse.py") if is_held_out(name)
    ] == [
        "ast.py",
        "random.py",
    ]


def test_this_interpreter_has_a_corpus():
    held, training = heldout_bytes(), training_bytes()
    assert len(training) > 5_000_000
    assert 0.02 < len(held) / len(training) < 0.12


@pytest.mark.parametrize(("batches", "text"), [(heldout_batches, heldout_bytes), (calibration_batches, training_bytes)])
def test_windows(batches, text, library):
    first, again = batches(3, 4, 20, library), batches(3, 4, 20, library)
    assert len(first) == 3
    for one, other in zip(first, again, strict=True):
        assert (one.shape, one.dtype) == ((4, 20), np.int32)
        np.testing.assert_array_equal(one, other)
        for row in one:
            assert bytes(row.astype(np.uint8)) in text(library)
    np.testing.assert_array_equal(first[0][0], list(text(library)[:20]))
    np.testing.assert_array_equal(first[2][3], list(text(library)[-20:]))


def test_each_batch_spreads_over_the_text(library):
    text = heldout_bytes(library)
    starts = [text.index(bytes(row.astype(np.uint8))) for row in heldout_batches(2, 4, 60, library)[1]]
    assert starts == sorted(starts)
    assert starts[-1] - starts[0] > len(text) // 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 20), "corpus: count is 0, wanted at least 1"),
        ((3, -1, 20), "corpus: batch is -1, wanted at least 1"),
        ((3, 4, 0), "corpus: length is 0, wanted at least 1"),
        ((1, 1, 10**6), "corpus: the held-out text has [0-9]+ bytes, wanted at least one window of 1000000"),
    ],
)
def test_bad_windows(library, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        heldout_batches(*arguments, library)


def test_a_library_without_source(tmp_path):
    with pytest.raises(ValueError, match=r"^corpus: no Python source \(\*.py\) under .*; the corpus is the standard"):
        training_bytes(tmp_path)
