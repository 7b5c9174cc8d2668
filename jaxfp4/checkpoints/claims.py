"""Who is writing an unfinished directory: a lock that ends with its process, by which what was left over is known."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

_HOST_DIGITS = 4
_UNCLAIMED = ".new"


def new_token() -> str:
    """8 hexadecimal digits: the first half stands for this host, the rest is random."""
    return _host() + secrets.token_hex(2)


def partial_directory(out_dir: Path, token: str) -> Path:
    """The path of the unfinished directory beside `out_dir`."""
    return out_dir.absolute().parent / f".{out_dir.name}.{token}.partial"


@contextlib.contextmanager
def claimed(partial: Path) -> Iterator[None]:
    """Makes the directory, which is locked while the block runs, whatever it is renamed to; nothing is removed after.

    It has its name only once it is locked, so that one that is not locked was left by a process that has died. Where
    the file system has no locks, or on Windows, it has none, and nobody can tell.
    """
    unclaimed = partial.with_name(partial.name + _UNCLAIMED)
    unclaimed.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(unclaimed))
            unclaimed.rename(partial)
        except BaseException:
            unclaimed.rmdir()
            raise
        yield


def remove_left_over(out_dir: Path) -> None:
    """Removes unfinished directories of `out_dir` whose writers on this host have died; never one that is in use.

    Those of other hosts stay, as their locks may not be seen here.
    """
    of_this = re.compile(re.escape(f".{out_dir.name}.{_host()}") + r"[0-9a-f]{4}\.partial")
    for path in out_dir.absolute().parent.iterdir():
        if of_this.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError), _locked(path) as is_locked:
                if is_locked:
                    shutil.rmtree(path)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Locks the directory until the block ends or the process does; whether it could."""
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except OSError:
            is_locked = False
        yield is_locked
    finally:
        os.close(descriptor)


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:_HOST_DIGITS]
