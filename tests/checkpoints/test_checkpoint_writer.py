"""The safetensors files that are written, and the directory around them."""

import errno
import fcntl
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from golden_models import mesh
from jax.sharding import NamedSharding, PartitionSpec

import jaxfp4.checkpoints.pending
from jaxfp4.checkpoints import open_checkpoint
from jaxfp4.checkpoints.pending import PendingTensor, fetch
from jaxfp4.checkpoints.safetensors_file import DTYPES
from jaxfp4.checkpoints.writer import new_directory, write_tensors


def pending(name, values):
    return PendingTensor(name, values.dtype, values.shape, lambda: values)


def some_tensors():
    rng = np.random.default_rng(0)
    return {
        f"t.{name}.{shape}": rng.integers(0, 2, shape).astype(dtype)
        for name, dtype in DTYPES.items()
        for shape in [(), (0, 3), (3, 5)]
    }


def test_every_dtype_and_shape_reads_back(tmp_path):
    tensors = some_tensors()
    write_tensors(tmp_path, [pending(name, values) for name, values in tensors.items()])
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint.names()) == sorted(tensors)
    for name, values in tensors.items():
        read = checkpoint.tensor(name)
        assert (read.dtype, read.shape, read.tobytes()) == (values.dtype, values.shape, values.tobytes())


def test_the_file_equals_that_of_the_safetensors_library(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = ["F64", "I64", "F32", "I32", "BF16", "F16", "I16", "U8", "I8", "BOOL", "U16", "U32", "U64"]
    tensors = {
        f"{prefix}.{name}": rng.integers(0, 2, (3, 2)).astype(DTYPES[name])
        for name in dtypes
        for prefix in ("é", "a", "b")
    }
    write_tensors(tmp_path, [pending(name, values) for name, values in tensors.items()])
    assert (tmp_path / "model.safetensors").read_bytes() == safetensors.numpy.save(tensors, {"format": "pt"})


def test_shards_hold_at_most_the_limit_and_have_an_index(tmp_path):
    tensors = {f"m.{i:02d}.weight": np.full((4, i + 1), i, np.float32) for i in range(10)}
    write_tensors(tmp_path, [pending(name, values) for name, values in reversed(tensors.items())], max_shard_bytes=130)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert index["metadata"]["total_size"] == sum(values.nbytes for values in tensors.values())
    sizes = {file: [tensors[n].nbytes for n, f in index["weight_map"].items() if f == file] for file in files}
    assert all(sum(size) <= 130 or len(size) == 1 for size in sizes.values())
    assert list(index["weight_map"]) == sorted(tensors)
    checkpoint = open_checkpoint(tmp_path)
    for name, values in tensors.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), values)


def test_a_limit_that_everything_fits_in_gives_one_file(tmp_path):
    write_tensors(tmp_path, [pending("a", np.zeros(4, np.float32))], max_shard_bytes=16)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_tensors_are_fetched_one_at_a_time(tmp_path):
    alive, most = set(), 0

    class Tracked(np.ndarray):
        def __del__(self):
            alive.discard(id(self))

    def fetcher():
        nonlocal most
        values = np.zeros((8, 8), np.float32).view(Tracked)
        alive.add(id(values))
        most = max(most, len(alive))
        return values

    write_tensors(tmp_path, [PendingTensor(str(i), np.dtype(np.float32), (8, 8), fetcher) for i in range(5)])
    assert most == 1


def test_a_tensor_that_breaks_its_announcement_is_refused(tmp_path):
    tensor = PendingTensor("a.weight", np.dtype(np.float32), (2,), lambda: np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"'a.weight' came as float32 \(3,\): wanted float32 \(2,\), as announced"):
        write_tensors(tmp_path, [tensor])


SPECS = [(None, None, None), ("ep", None, "tp"), ("tp", "ep", None), (None, ("tp", "ep"), None), ("ep", "tp", None)]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_fetch_gives_any_slice_in_any_order_from_any_sharding(monkeypatch, spec, on_device):
    if on_device:  # the way for accelerators: slice there, copy the slice
        monkeypatch.setattr(jaxfp4.checkpoints.pending, "_in_host_memory", lambda piece: False)
    values = np.arange(4 * 8 * 12, dtype=np.float32).reshape(4, 8, 12).astype(ml_dtypes.float8_e4m3fn)
    array = jax.device_put(values, NamedSharding(mesh(tp=4, ep=2), PartitionSpec(*spec)))
    for index, order in [
        ((), (0, 1, 2)),
        ((), (2, 0, 1)),
        ((3,), (1, 0)),
        ((0,), (0, 1)),
        ((2, 5), (0,)),
        ((1, 7, 9), ()),
    ]:
        wanted = np.asarray(values[index]).transpose(order).copy(order="C")
        for source in (array, values):
            found = fetch(source, index, order)
            assert found.flags.c_contiguous
            assert (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())


def test_fetch_leaves_no_copy_cached_with_the_array(monkeypatch):
    monkeypatch.setattr(jaxfp4.checkpoints.pending, "_in_host_memory", lambda piece: False)
    array = jax.device_put(jnp.arange(32.0), NamedSharding(mesh(tp=8), PartitionSpec("tp")))
    fetch(array, (), (0,))
    arrays = [array, *(shard.data for shard in array.addressable_shards)]
    assert all(a._npy_value is None for a in arrays)


def test_the_directory_appears_when_all_is_written(tmp_path):
    out = tmp_path / "out"
    with new_directory(out) as partial:
        (partial / "file").write_text("x")
        assert not out.exists()
        assert partial.parent == tmp_path
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "file").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ValueError])
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(error, match="stop"), new_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        raise error("stop")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_file_or_dangling_link_is_refused(tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("directory", "file", "link"):
        with (
            pytest.raises(
                FileExistsError, match=f"{name} exists already: wanted a directory to create; remove it or name"
            ),
            new_directory(tmp_path / name),
        ):
            pass
    assert (tmp_path / "file").read_text() == "kept"


def test_a_missing_parent_is_refused(tmp_path):
    with (
        pytest.raises(
            FileNotFoundError, match="none is no directory: wanted an existing one to create 'out' in; create it"
        ),
        new_directory(tmp_path / "none" / "out"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OSError, match=r"out: writing failed: Directory not empty"), new_directory(out) as partial:
        (partial / "file").write_text("new")
        out.mkdir()
        (out / "file").write_text("old")
    assert (out / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_gives_one_line_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with (
            pytest.raises(
                OSError, match=r"out: writing failed: File too large .*; nothing was left behind; make room"
            ) as caught,
            new_directory(tmp_path / "out") as partial,
        ):
            write_tensors(partial, [pending("a", np.zeros(4096, np.float32))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_os_error_without_a_number_passes_through(tmp_path):
    with pytest.raises(OSError, match=r"^no number$"), new_directory(tmp_path / "out"):
        raise OSError("no number")
    assert list(tmp_path.iterdir()) == []


WRITER = """
import os, pathlib, signal, sys
from jaxfp4.checkpoints.writer import new_directory
with new_directory(pathlib.Path(sys.argv[1])) as partial:
    (partial / "model.safetensors").write_bytes(b"half")
    print(partial.name, flush=True)
    sys.stdin.read() if sys.argv[2] == "wait" else os.kill(os.getpid(), signal.SIGKILL)
"""


def start_writer(out, until):
    """A process that writes `out` and stops halfway: to be killed, or until its standard input is closed."""
    command = [sys.executable, "-c", WRITER, str(out), until]
    return subprocess.Popen(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_what_a_killed_process_leaves_is_removed_by_the_next_and_what_is_in_use_is_not(tmp_path):
    with start_writer(tmp_path / "out", "killed") as killed:
        left = killed.communicate(timeout=60)[0].strip()
    assert killed.returncode == -signal.SIGKILL
    with start_writer(tmp_path / "other", "wait") as writing:
        _check_left_over(tmp_path, left, writing.stdout.readline().strip())
        writing.communicate(timeout=60)
    assert writing.returncode == 0
    assert (tmp_path / "other/model.safetensors").read_bytes() == b"half"


def _check_left_over(tmp_path, left, used):
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([left, used])
    foreign = ".out." + f"{int(left[5:9], 16) ^ 1:04x}" + "abcd.partial"  # as of another host
    similar = [f"{left}.tar", f"x{left}", left.replace(".out.", ".out2.")]
    for name in (foreign, *similar):
        (tmp_path / name).mkdir()
    (tmp_path / f"{left[:9]}0000.partial").write_text("a file")
    (tmp_path / f"{left[:9]}0001.partial").symlink_to(tmp_path / foreign)
    kept = {p.name for p in tmp_path.iterdir()} - {left}
    with pytest.raises(RuntimeError, match="stop"), new_directory(tmp_path / "other"):
        raise RuntimeError("stop")
    assert {p.name for p in tmp_path.iterdir()} == kept | {left}
    with new_directory(tmp_path / "out") as partial:
        assert {p.name for p in tmp_path.iterdir()} == kept | {partial.name}
    assert {p.name for p in tmp_path.iterdir()} == kept | {"out"}


def test_a_partial_that_cannot_be_locked_is_left(tmp_path, monkeypatch):
    """On a file system without locks nobody can tell whether it is in use."""
    with new_directory(tmp_path / "out") as partial:
        (tmp_path / partial.name).with_name(left := partial.name[:9] + "0123.partial").mkdir()

    def refused(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with new_directory(tmp_path / "out2"):
        pass
    shutil.rmtree(tmp_path / "out")
    with new_directory(tmp_path / "out"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [left, "out", "out2"]
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out")
    with new_directory(tmp_path / "out"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out2"]


def test_without_permission_one_line_is_given_and_nothing_is_left():
    """As another user where the tests run as root, whom nothing is forbidden."""
    program = """
import os, pathlib, sys
from jaxfp4.checkpoints import open_checkpoint
from jaxfp4.checkpoints.streaming.resume import resumable_directory
from jaxfp4.checkpoints.writer import new_directory
locked = pathlib.Path(sys.argv[1])
if os.geteuid() == 0:
    os.setegid(65534)
    os.seteuid(65534)
attempts = (
    lambda: new_directory(locked / "out").__enter__(),
    lambda: resumable_directory(locked / "out", {}, print).__enter__(),
    lambda: open_checkpoint(locked),
)
for attempt in attempts:
    try:
        attempt()
    except OSError as error:
        print(error)
"""
    with tempfile.TemporaryDirectory() as directory:
        if os.geteuid() == 0 and not all(parent.stat().st_mode & 0o001 for parent in pathlib.Path(directory).parents):
            pytest.skip(f"other users may not enter {directory}")
        locked = pathlib.Path(directory)
        (locked / "model.safetensors").write_bytes(bytes(8))
        (locked / "model.safetensors").chmod(0)
        locked.chmod(0o555)
        command = [sys.executable, "-c", program, str(locked)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        wanted = (
            rf"{locked}/out: writing failed: Permission denied \(\.out\..*\); nothing was left behind; make room or .*",
            rf"{locked}/out: writing failed: Permission denied \({locked}/\.out\.partial\); name another directory",
            rf"\[Errno 13\] Permission denied: .{locked}/model\.safetensors.",
        )
        for line, pattern in zip(done.stdout.splitlines(), wanted, strict=True):
            assert re.fullmatch(pattern, line)
        assert [path.name for path in locked.iterdir()] == ["model.safetensors"]
        locked.chmod(0o755)
