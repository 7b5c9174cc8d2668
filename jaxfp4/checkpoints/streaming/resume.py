"""A directory that is written over several runs: beside its target until it is whole, with a journal of the job."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxfp4.checkpoints.writer import refuse_existing, sync, write_json

JOURNAL = "jaxfp4-journal.json"
UNFINISHED = ".unfinished"
"""What follows the name of a file that is being written."""


def partial_path(out_dir: Path) -> Path:
    """The directory in which `out_dir` is made."""
    return out_dir.absolute().parent / f".{out_dir.name}.partial"


def file_identity(path: Path) -> list[int]:
    """`[bytes, modification time in ns]` of a source file, by which a resumed job knows it again."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


@contextlib.contextmanager
def resumable_directory(out_dir: Path, job: Mapping[str, Any], say: Callable[[str], None]) -> Iterator[Path]:
    """`.NAME.partial` beside `out_dir`, renamed to it when the block ends.

    `job`, a JSON object, is everything that the result follows from; it is the journal. If the directory is there from
    an earlier run of the same job, the files in it count: each must have been completed by `finished_file`. If it is
    there from another job it is emptied; `say` gets a line in both cases.

    A kill or Ctrl-C leaves the directory, and so does an OSError (a full disk) once a file was finished; any other
    error removes it. `out_dir` itself is untouched until the rename.

    Raises:
        FileExistsError: `out_dir` exists, or `.NAME.partial` is not what a run has left.
        FileNotFoundError: the parent of `out_dir` does not exist.
        OSError: another process is writing this directory, or writing failed; the message says what is left.
    """
    refuse_existing(out_dir)
    partial = partial_path(out_dir)
    lock = _locked(partial, out_dir)
    try:
        found = _journal(partial)
        try:
            _prepare(partial, found, job, say)
            yield partial
            sync(partial)
            refuse_existing(out_dir)
            partial.rename(out_dir)
            # Only now: a kill in between leaves a whole directory with one file too many.
            (out_dir / JOURNAL).unlink()
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except OSError as error:
            left = _what_is_left(partial)
            if error.errno is None:
                raise
            raise _explained(error, out_dir, left) from error
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)
    sync(out_dir.absolute().parent)


@contextlib.contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """A path to write to; when the block ends the file there is brought to the disk and gets its name."""
    unfinished = path.with_name(path.name + UNFINISHED)
    yield unfinished
    sync(unfinished)
    unfinished.rename(path)


def _locked(partial: Path, out_dir: Path) -> int:
    """A descriptor of the directory, which is made if need be, locked until it is closed or the process ends."""
    if partial.is_symlink() or (os.path.lexists(partial) and not partial.is_dir()):
        raise FileExistsError(f"{partial} is no directory: wanted to write {out_dir.name!r} there; remove it")
    try:
        partial.mkdir(exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise OSError(f"{out_dir}: writing failed: {error.strerror} ({partial}); name another directory") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise OSError(f"{partial}: another process is writing it: wanted one at a time; wait for it to end") from error
    return descriptor


def _prepare(partial: Path, found: Any, job: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Makes the directory one of this job: with its journal and, of other files, only finished ones of this job."""
    job = json.loads(json.dumps(job))
    if found == job:
        for path in partial.glob("*" + UNFINISHED):
            path.unlink()
        shards = [path for path in partial.iterdir() if path.name != JOURNAL]
        say(f"{partial.name}: going on behind {len(shards)} finished files")
        return
    if found is not None:
        say(f"{partial.name}: from another job ({_difference(found, job)}); starting anew")
    for path in partial.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    with finished_file(partial / JOURNAL) as path:
        write_json(path, job)


def _journal(partial: Path) -> Any:
    """The journal's content, None if the directory is empty but for an unfinished journal."""
    rest = {path.name for path in partial.iterdir()} - {JOURNAL + UNFINISHED}
    if not rest:
        return None
    try:
        return json.loads((partial / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise FileExistsError(
            f"{partial}: holds files but no readable {JOURNAL}: wanted what an interrupted run has left; remove it"
        ) from None


def _difference(found: Any, job: Mapping[str, Any]) -> str:
    if not isinstance(found, dict):
        return "its journal is no object"
    for key in sorted({*found, *job}):
        if found.get(key) != job.get(key):
            return f"other {key}"
    return "another journal"


def _what_is_left(partial: Path) -> str:
    """Says what is left; the directory is removed unless a file of tensors in it is finished."""
    finished = [path for path in partial.glob("*.safetensors") if path.is_file()]
    if finished:
        return f"{len(finished)} finished files are kept in {partial.name} for the same command to go on"
    shutil.rmtree(partial, ignore_errors=True)
    return "nothing was left behind"


def _explained(error: OSError, out_dir: Path, left: str) -> OSError:
    """The error as one line."""
    where = os.path.basename(error.filename or "").removesuffix(UNFINISHED)
    place = f" ({where})" if where else ""
    return type(error)(
        f"{out_dir}: writing failed: {error.strerror}{place}; {left}; make room or name another directory"
    )
