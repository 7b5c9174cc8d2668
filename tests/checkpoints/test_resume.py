"""Interruptions and failures: the target is whole or absent, and the same command goes on where it was."""

import contextlib
import functools
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading

import pytest
from small_checkpoints import contents, random_weights, write_model

from jaxfp4.checkpoints.streaming import resume, shard_files
from jaxfp4.checkpoints.streaming.convert import convert
from jaxfp4.checkpoints.streaming.file_plan import plan_files
from jaxfp4.checkpoints.streaming.file_quantization import quantize_planned
from jaxfp4.checkpoints.streaming.resume import JOURNAL, finished_file, partial_path, resumable_directory
from jaxfp4.checkpoints.streaming.shard_files import background

SHARD_BYTES = 6000


def quantize(directory, out, **options):
    options = {"recipe": "nvfp4_weight_only", "file_format": "modelopt", "max_shard_bytes": SHARD_BYTES, **options}
    quantize_planned(plan_files(directory), out, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = write_model(tmp_path_factory.mktemp("model") / "in", random_weights(), shards=2)
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The files of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    quantize(model, out)
    files = contents(out)
    assert len([name for name in files if name.endswith(".safetensors")]) > 4
    return files


class Stop:
    """Raises at the n-th call of the functions that it stands before."""

    def __init__(self, monkeypatch, n, error):
        self.left, self.error = n, error
        for owner, name in (
            (shard_files.NewFile, "write"),
            (resume, "sync"),
            (shard_files, "write_json"),
            (type(partial_path(resume.Path("x"))), "rename"),
            (type(partial_path(resume.Path("x"))), "unlink"),
        ):
            monkeypatch.setattr(owner, name, self.before(getattr(owner, name)))

    def before(self, function):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                raise self.error
            return function(*args, **kwargs)

        return call


@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_interrupted_anywhere_it_goes_on_to_the_same_files(tmp_path, model, whole, first):
    """Every fourth moment from each of four starts: all of them, in four tests."""
    for number, n in enumerate(range(first, 10_000, 4)):
        out = tmp_path / f"out{number}"
        with pytest.MonkeyPatch.context() as patch:
            stop = Stop(patch, n, KeyboardInterrupt())
            with contextlib.suppress(KeyboardInterrupt):
                quantize(model, out)
        if stop.left > 0:
            break
        if out.exists():
            # Stopped behind the rename: whole, at most with the journal in it.
            found = contents(out)
            found.pop(JOURNAL, None)
            assert found == whole
            continue
        assert partial_path(out).is_dir()
        said = []
        quantize(model, out, say=said.append)
        assert contents(out) == whole
        assert not partial_path(out).exists()
        assert not said or said[0].startswith(f".{out.name}.partial: going on behind ")
    assert number > 10


def test_finished_files_are_not_written_again(tmp_path, model, whole, monkeypatch):
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, 60, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize(model, out)
    finished = {path.name: path.stat().st_mtime_ns for path in partial_path(out).glob("*.safetensors")}
    assert 0 < len(finished) < len([name for name in whole if name.endswith(".safetensors")])
    quantize(model, out)
    assert contents(out) == whole
    assert all((out / name).stat().st_mtime_ns == written for name, written in finished.items())


def interrupted(model, out, n=60, **options):
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, n, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quantize(model, out, **options)
    assert partial_path(out).is_dir() and not out.exists()


def test_other_options_start_anew(tmp_path, model, whole):
    interrupted(model, tmp_path / "out", recipe="nvfp4_weight_only_four_over_six")
    said = []
    quantize(model, tmp_path / "out", say=said.append)
    assert said == [".out.partial: from another job (other options); starting anew"]
    assert contents(tmp_path / "out") == whole


def test_changed_source_files_start_anew(tmp_path):
    tensors = random_weights()
    directory = write_model(tmp_path / "in", tensors)
    interrupted(directory, tmp_path / "out")
    status = (directory / "model.safetensors").stat()
    os.utime(directory / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    said = []
    quantize(directory, tmp_path / "out", say=said.append)
    assert said == [".out.partial: from another job (other source files); starting anew"]


def test_the_journal_is_small_and_says_what_the_job_is(tmp_path, model):
    interrupted(model, tmp_path / "out")
    text = (partial_path(tmp_path / "out") / JOURNAL).read_text()
    journal = json.loads(text)
    assert len(text) < 2000
    assert journal["command"] == "quantize" and journal["source"] == str(model)
    assert journal["options"]["recipe"] == "nvfp4_weight_only"
    assert set(journal["source files"]) == {"config.json", "part-0.safetensors", "part-1.safetensors", "tokenizer.json"}


SCRIPT = """
import os, pathlib, signal, sys, time
from jaxfp4.checkpoints.streaming.file_plan import plan_files
from jaxfp4.checkpoints.streaming.file_quantization import quantize_planned
from jaxfp4.checkpoints.streaming.tensor_source import Reader
values, calls = Reader.values, 0
def counting(self, *arguments):
    global calls
    calls += 1
    if calls == 15:
        print("now", flush=True)
        time.sleep(60)
    return values(self, *arguments)
Reader.values = counting
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell runs in the background
quantize_planned(plan_files(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]), recipe="nvfp4_weight_only",
                 file_format="modelopt", max_shard_bytes=int(sys.argv[3]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_a_killed_process_leaves_what_the_next_one_goes_on_with(tmp_path, model, whole, number):
    """Takes some seconds: a process of its own has to import JAX and compile."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, str(model), str(out), str(SHARD_BYTES)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"now\n"
        # While it lives no other process may write there.
        with pytest.raises(OSError, match=r"\.out\.partial: another process is writing it: wanted one at a time; wait"):
            quantize(model, out)
        process.send_signal(number)
        process.wait(30)
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial"]
    assert list(partial_path(out).glob("*.safetensors")) and list(partial_path(out).glob("*.unfinished"))
    said = []
    quantize(model, out, say=said.append)
    assert re.match(r"\.out\.partial: going on behind \d+ finished files$", said[0])
    assert contents(out) == whole


def test_an_existing_target_is_left_alone(tmp_path, model):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    with pytest.raises(FileExistsError, match=r"out exists already: wanted a directory to create; remove it or name"):
        quantize(model, tmp_path / "out")
    assert contents(tmp_path) == {"out/mine": b"mine"}


def test_a_target_that_appears_meanwhile_is_left_alone(tmp_path, model):
    out = tmp_path / "out"
    with pytest.raises(FileExistsError, match=r"out exists already"):
        quantize(model, out, progress=lambda count: out.mkdir(exist_ok=True))
    assert list(out.iterdir()) == []


def test_no_parent(tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r"absent is no directory: wanted an existing one to create 'out' in"):
        quantize(model, tmp_path / "absent/out")


@pytest.mark.parametrize("kind", ["files", "file", "link"])
def test_what_no_run_has_left_is_not_touched(tmp_path, model, kind):
    partial = partial_path(tmp_path / "out")
    if kind == "files":
        partial.mkdir()
        (partial / "mine").write_text("mine")
        message = r"\.out\.partial: holds files but no readable jaxfp4-journal.json: wanted what an interrupted run has"
    else:
        (tmp_path / "elsewhere").mkdir()
        partial.symlink_to(tmp_path / "elsewhere") if kind == "link" else partial.write_text("mine")
        message = r"\.out\.partial is no directory: wanted to write 'out' there; remove it"
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=message):
        quantize(model, tmp_path / "out")
    assert contents(tmp_path) == before


@pytest.fixture
def largest_file():
    """Sets the size at which writing a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_before_any_file_is_finished_leaves_nothing(tmp_path, model, largest_file):
    largest_file(3000)
    wanted = r"out: writing failed: File too large; nothing was left behind; make room or name another directory$"
    with pytest.raises(OSError, match=wanted):
        quantize(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_later_keeps_what_is_finished(tmp_path, model, whole):
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, 60, OSError(28, "No space left on device", "model-00003.safetensors.unfinished"))
        wanted = (
            r"out: writing failed: No space left on device \(model-00003.safetensors\); \d+ finished files are kept in "
            r"\.out\.partial for the same command to go on; make room or name another directory$"
        )
        with pytest.raises(OSError, match=wanted):
            quantize(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    quantize(model, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_too_little_room_is_told_beforehand(tmp_path, model, monkeypatch):
    status = os.statvfs(tmp_path)
    small = os.statvfs_result((status.f_bsize, 4096, 9, 9, 1, *tuple(status)[5:10]))
    monkeypatch.setattr(os, "statvfs", lambda path: small)
    with pytest.raises(OSError, match=r"out: needs 0\.00 GB, but 0\.00 GB are free: wanted room for all"):
        quantize(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written(tmp_path, model, monkeypatch):
    def refused(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(resume.Path, "mkdir", refused)
    with pytest.raises(OSError, match=r"out: writing failed: Permission denied \(.*\.out\.partial\); name another"):
        quantize(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_file_gets_its_name_when_it_is_finished(tmp_path):
    with pytest.raises(ZeroDivisionError), finished_file(tmp_path / "a") as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert not (tmp_path / "a").exists()
    with finished_file(tmp_path / "a") as path:
        path.write_text("whole")
    assert contents(tmp_path) == {"a": b"whole"}


def test_errors_of_the_input_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="no"), resumable_directory(tmp_path / "out", {}, lambda line: None) as path:
        (path / "a.safetensors").write_text("finished")
        raise ValueError("no")
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_goes_on_too(tmp_path, model, whole):
    quantize(model, tmp_path / "modelopt")
    options = {"file_format": "compressed-tensors", "max_shard_bytes": SHARD_BYTES}
    convert(tmp_path / "modelopt", tmp_path / "wanted", **options)
    with pytest.MonkeyPatch.context() as patch:
        Stop(patch, 60, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "modelopt", tmp_path / "out", **options)
    said = []
    convert(tmp_path / "modelopt", tmp_path / "out", **options, say=said.append)
    assert re.match(r"\.out\.partial: going on behind [1-9]\d* finished files$", said[0])
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


def test_what_runs_behind_is_in_order_few_at_a_time_and_its_errors_are_raised():
    done, running = [], threading.Event()
    with background(2) as start:
        for number in range(5):
            start(functools.partial(done.append, number))
    assert done == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match=r"^disk full$"), background(1) as start:
        start(functools.partial(_fail, OSError("disk full")))
        start(functools.partial(done.append, "later"))
    with pytest.raises(OSError, match=r"^disk full$"), background(2) as start:
        start(functools.partial(_fail, OSError("disk full")))
    with pytest.raises(KeyboardInterrupt), background(3) as start:
        start(functools.partial(running.wait, 0.2))
        start(functools.partial(done.append, "left out"))
        raise KeyboardInterrupt
    assert done == [0, 1, 2, 3, 4]


def _fail(error):
    raise error
