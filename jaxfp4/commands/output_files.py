"""Files that a command writes beside its output on the console: whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxfp4.commands.errors import CommandError


def check_output(option: str, path: Path | None) -> None:
    """CommandError unless a file can be made there, so that long work is not done in vain."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise CommandError(f"{option} {path}: wanted a file in a directory that exists; create it or name another")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path beside `path`, then renames it to `path`; if it raises, nothing is left."""
    partial = path.parent / f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}"
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_json(path: Path, content: Any) -> None:
    """`content`, which holds no NaN, as indented JSON."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
