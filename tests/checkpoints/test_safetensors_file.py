"""The safetensors reader: what the library writes is read back, and no broken header gets past the checks."""

import json
import re
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxfp4.checkpoints.safetensors_file import DTYPES, MAX_HEADER_BYTES, SafetensorsFile, open_checkpoint


def write(path, header, data=b""):
    """A file with this header (an object, or the raw bytes) and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", sorted(set(DTYPES) - {"F8_E8M0"}))
def test_reads_what_the_library_writes(tmp_path, dtype):
    bits = np.random.default_rng(0).integers(0, 2 if dtype == "BOOL" else 256, (3, 5, 8), np.uint8)
    value = bits.view(DTYPES[dtype])
    save_file({"a": value, "empty": value[:0], "scalar": np.array(value[0, 0, 0])}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.names()) == {"a", "empty", "scalar"}
    assert file.info("a") == (value.dtype, value.shape)
    assert file.info("scalar")[1] == ()
    assert file.tensor("empty").shape == (0, *value.shape[1:])
    np.testing.assert_array_equal(file.tensor("a").view(np.uint8), bits)


def test_dtype_table_has_the_sizes_that_the_names_say():
    for name, dtype in DTYPES.items():
        digits = "8" if name.startswith("F8") or name == "BOOL" else re.sub(r"\D", "", name)
        assert dtype.itemsize * 8 == int(digits)
    assert DTYPES["F8_E8M0"] == ml_dtypes.float8_e8m0fnu


def test_tensors_are_read_only_views_of_the_mapped_file(tmp_path):
    save_file({"a": np.arange(6, dtype=np.float32)}, tmp_path / "x.safetensors")
    tensor = SafetensorsFile(tmp_path / "x.safetensors").tensor("a")
    assert isinstance(tensor, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tensor[0] = 1


def test_tensors_may_begin_at_odd_bytes(tmp_path):
    header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (2,), (1, 9))}
    data = b"\7" + np.array([1.5, -2], np.float32).tobytes()
    file = SafetensorsFile(write(tmp_path / "x.safetensors", header, data))
    np.testing.assert_array_equal(file.tensor("b"), [1.5, -2])


def test_metadata(tmp_path):
    save_file({"a": np.zeros(1)}, tmp_path / "x.safetensors", metadata={"format": "pt", "by": "test"})
    assert SafetensorsFile(tmp_path / "x.safetensors").metadata == {"format": "pt", "by": "test"}
    save_file({"a": np.zeros(1)}, tmp_path / "y.safetensors")
    assert SafetensorsFile(tmp_path / "y.safetensors").metadata == {}


def test_a_file_without_tensors(tmp_path):
    assert SafetensorsFile(write(tmp_path / "x.safetensors", {})).names() == ()


def test_an_unknown_name(tmp_path):
    file = SafetensorsFile(write(tmp_path / "x.safetensors", {"a": entry()}, bytes(8)))
    for method in (file.tensor, file.info):
        with pytest.raises(KeyError, match=r"x.safetensors: there is no tensor 'b'; the file has 1 others"):
            method("b")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x.safetensors: there is no such file; wanted a safetensors file$"):
        SafetensorsFile(tmp_path / "x.safetensors")


BAD_ENTRIES = {
    "not an object": (3, "tensor 'a' is described by 3, wanted an object of dtype, shape and data_offsets"),
    "extra key": (entry() | {"x": 1}, "tensor 'a' is described by {"),
    "missing key": ({"dtype": "F32"}, "tensor 'a' is described by {'dtype': 'F32'}, wanted an object of"),
    "dtype": (entry("F4"), "tensor 'a' has dtype 'F4', wanted one of BOOL, U8,"),
    "dtype not text": (entry(["F32"]), "tensor 'a' has dtype ['F32'], wanted one of"),
    "negative size": (entry(shape=(-2,)), "tensor 'a' has shape [-2], wanted at most 64 non-negative integers"),
    "size true": (entry(shape=(2, True)), "tensor 'a' has shape [2, True], wanted at most 64 non-negative integers"),
    "size float": (entry(shape=(2.0,)), "tensor 'a' has shape [2.0], wanted at most 64"),
    "many dimensions": (entry(shape=(1,) * 65), "tensor 'a' has shape [1, 1, 1,"),
    "shape text": (entry() | {"shape": "2"}, "tensor 'a' has shape '2', wanted at most 64"),
    "three offsets": (entry(offsets=(0, 4, 8)), "tensor 'a' has data_offsets [0, 4, 8], wanted [begin, end] with"),
    "offsets swapped": (entry(offsets=(8, 0)), "tensor 'a' has data_offsets [8, 0], wanted [begin, end] with"),
    "offset negative": (entry(offsets=(-8, 0)), "tensor 'a' has data_offsets [-8, 0], wanted [begin, end]"),
    "bytes do not match": (entry(shape=(3,)), "tensor 'a' spans 8 bytes, wanted 12 for F32 of shape [3]"),
    "huge": (entry(shape=(2**62, 2**62)), "tensor 'a' spans 8 bytes, wanted 850705917302346158"),
    "size beyond all": (entry(shape=(0, 2**63), offsets=(0, 0)), "tensor 'a' has shape [0, 9223372036854775808], wan"),
    "beyond the end": (entry(shape=(3,), offsets=(0, 12)), "tensor 'a' ends at byte 12 of the data, which has 8; the"),
    "gap": (entry(shape=(1,), offsets=(4, 8)), "tensor 'a' leaves a gap before it: it begins at byte 4, wanted 0"),
    "rest": (entry(shape=(1,), offsets=(0, 4)), "the tensors take 4 bytes, but 8 follow the header"),
}


@pytest.mark.parametrize(("bad", "message"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_bad_entry(tmp_path, bad, message):
    path = write(tmp_path / "x.safetensors", {"a": bad}, bytes(8))
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: {message}")) as raised:
        SafetensorsFile(path)
    assert "\n" not in str(raised.value)


def test_a_name_that_is_no_text(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a\ud800": entry()}, bytes(8))
    with pytest.raises(ValueError, match=r"x.safetensors: tensor 'a\\ud800' has a name with half a character \(a lone"):
        SafetensorsFile(path)


def test_overlap(tmp_path):
    path = write(tmp_path / "x.safetensors", {"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12))
    with pytest.raises(ValueError, match=r"tensor 'b' overlaps the tensor before it: it begins at byte 4, wanted 8$"):
        SafetensorsFile(path)


BAD_HEADERS = {
    "empty file": (b"", "the file has 0 bytes, wanted at least the 8 of the header's length"),
    "short": (bytes(7), "the file has 7 bytes, wanted at least the 8"),
    "header cut": (struct.pack("<Q", 100) + b"{}", "the header's length is 100 bytes, but 2 follow; the file is trunc"),
    "header too long": (
        struct.pack("<Q", 2**63),
        f"the header's length is {2**63} bytes, wanted at most {MAX_HEADER_BYTES}",
    ),
    "no JSON": (struct.pack("<Q", 2) + b"{x", "the header is no valid JSON (Expecting property name"),
    "no text": (struct.pack("<Q", 2) + b"\xff\xfe", "the header is no valid JSON ('utf-8' codec"),
    "deep": (struct.pack("<Q", 100000) + b"[" * 100000, "the header is no valid JSON (maximum recursion depth"),
    "long number": (
        struct.pack("<Q", 5007) + b'{"a": ' + b"9" * 5000 + b"}",
        "the header is no valid JSON (Exceeds the limit",
    ),
    "list": (struct.pack("<Q", 2) + b"[]", "the header is a JSON list, wanted an object"),
    "twice": (struct.pack("<Q", 15) + b'{"a":1, "a": 2}', "the header is no valid JSON (the key 'a' is there twice)"),
    "metadata": (
        struct.pack("<Q", 27) + b'{"__metadata__": {"a": 1} }',
        "__metadata__ is {'a': 1}, wanted an object of strings",
    ),
    "pickle": (b"\x80\x04\x95" + bytes(40), "the header's length is"),
}


@pytest.mark.parametrize(("content", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_header(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}: {message}")) as raised:
        SafetensorsFile(path)
    assert "\n" not in str(raised.value)


@given(cut=st.integers(0, 500), position=st.integers(0, 500), byte=st.integers(0, 255))
def test_a_damaged_file_is_refused_or_still_consistent(tmp_path_factory, cut, position, byte):
    """Whatever a cut and a changed byte do, the reader raises its own errors or serves tensors of the right size."""
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    write(path, {"a": entry(), "b": entry("BF16", (3, 2), (8, 20))}, bytes(20))
    data = bytearray(path.read_bytes())
    data[position % len(data)] = byte
    path.write_bytes(data[: max(len(data) - cut, 0)] if cut < 100 else data)
    try:
        file = SafetensorsFile(path)
    except ValueError as error:
        assert str(error).startswith(str(path))
        return
    for name in file.names():
        dtype, shape = file.info(name)
        tensor = file.tensor(name)
        assert (tensor.dtype, tensor.shape) == (dtype, shape)


# --- folders


def two_shards(folder, weight_map=None):
    save_file({"a": np.arange(2.0)}, folder / "one.safetensors", metadata={"format": "pt"})
    save_file({"b": np.arange(3.0), "c": np.arange(4.0)}, folder / "two.safetensors")
    right = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    index = {"metadata": {"total_size": 72}, "weight_map": right if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_one_file(tmp_path):
    save_file({"a": np.arange(2.0)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.names(), checkpoint.metadata) == (("a",), {"format": "pt"})
    assert checkpoint.info("a") == (np.dtype(np.float64), (2,))


def test_shards(tmp_path):
    checkpoint = open_checkpoint(str(two_shards(tmp_path)))
    assert sorted(checkpoint.names()) == ["a", "b", "c"]
    assert checkpoint.metadata == {"format": "pt"}
    np.testing.assert_array_equal(checkpoint.tensor("c"), np.arange(4.0))
    with pytest.raises(KeyError, match="there is no tensor 'd'; the checkpoint has 3 others"):
        checkpoint.tensor("d")


BAD_INDEX = {
    "missing": ({"a": "two.safetensors"}, "tensor 'a' is said to be in two.safetensors, which does not have it"),
    "unlisted": (
        {"a": "one.safetensors", "b": "two.safetensors"},
        "tensor 'c' is in two.safetensors, but the index does not place it there",
    ),
    "outside": (
        {"a": "../one.safetensors"},
        "tensor 'a' is placed in '../one.safetensors', wanted the name of a .safetensors file of the folder",
    ),
    "absolute": ({"a": "/tmp/one.safetensors"}, "tensor 'a' is placed in '/tmp/one.safetensors', wanted the name"),
    "drive": ({"a": "c:one.safetensors"}, "tensor 'a' is placed in 'c:one.safetensors', wanted the name"),
    "backslash": ({"a": "..\\one.safetensors"}, "tensor 'a' is placed in '..\\\\one.safetensors', wanted the name"),
    "other kind": ({"a": "pytorch_model.bin"}, "tensor 'a' is placed in 'pytorch_model.bin', wanted the name of a"),
    "no text": ({"a": 1}, "tensor 'a' is placed in 1, wanted the name of a .safetensors file"),
    "empty": ({}, "weight_map is {}, wanted an object from tensor names to file names"),
    "list": ([], "weight_map is [], wanted an object from tensor names to file names"),
}


@pytest.mark.parametrize(("weight_map", "message"), BAD_INDEX.values(), ids=BAD_INDEX)
def test_bad_index(tmp_path, weight_map, message):
    two_shards(tmp_path, weight_map)
    with pytest.raises(ValueError, match=re.escape(f"model.safetensors.index.json: {message}")):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no valid JSON (Expecting property name"), ("[1]", "weight_map is None, wanted an object from tensor")],
)
def test_broken_index(tmp_path, text, message):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"model.safetensors.index.json: {message}")):
        open_checkpoint(tmp_path)


def test_a_missing_shard(tmp_path):
    (two_shards(tmp_path) / "two.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"two.safetensors: there is no such file"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    two_shards(tmp_path)
    save_file({"a": np.arange(2.0), "c": np.arange(4.0)}, tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match=r"tensor 'c' is in one.safetensors, but the index does not place it there"):
        open_checkpoint(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: there is no such directory; wanted a checkpoint folder"):
        open_checkpoint(tmp_path / "absent")


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is neither model.safetensors nor .*; wanted one of them"):
        open_checkpoint(tmp_path)
