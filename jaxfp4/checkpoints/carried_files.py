"""The files of a checkpoint directory that are neither weights nor written anew, such as the tokenizer's."""

from __future__ import annotations

import shutil
from pathlib import Path

from jaxfp4.checkpoints.configs import CONFIG_FILE, MODELOPT_FILE
from jaxfp4.checkpoints.streaming.resume import JOURNAL, finished_file

_WEIGHTS = frozenset(
    (
        *(".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".onnx_data"),
        *(".gguf", ".ot", ".npz", ".npy", ".tflite", ".mlmodel", ".tmp", ".incomplete", ".lock"),
    )
)
_INDEX = ".index.json"
_LARGEST_DIRECTORY = 16 << 20


def carried_files(directory: Path) -> tuple[Path, ...]:
    """The files to carry along, as paths relative to the directory, sorted.

    Not among them: config.json and hf_quant_config.json, weights of any format (pickles among them) and their indices,
    hidden files, links that leave the directory other than to the blobs of the download cache it lies in, and
    directories below, except plain ones: no directories or weights in them and at most 16 MiB. FileNotFoundError if
    there is no such directory.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: there is no such directory; wanted the original checkpoint; correct it")
    found = []
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            found += _plain_directory(path, directory)
        elif path.name not in (CONFIG_FILE, MODELOPT_FILE) and _is_carried(path, directory):
            found.append(path)
    return tuple(sorted(path.relative_to(directory) for path in found))


def copy_files(directory: Path, files: tuple[Path, ...], target: Path) -> None:
    """Copies the contents of files, given relative to the directory, to another one."""
    for file in files:
        (target / file).parent.mkdir(exist_ok=True)
        with finished_file(target / file) as path:
            shutil.copyfile(directory / file, path)


def _plain_directory(path: Path, directory: Path) -> list[Path]:
    entries = list(path.iterdir())
    if any(entry.is_dir() or not _is_carried(entry, directory) for entry in entries):
        return []
    return entries if sum(entry.stat().st_size for entry in entries) <= _LARGEST_DIRECTORY else []


def _is_carried(path: Path, directory: Path) -> bool:
    hidden = path.name.startswith(".") or path.name == JOURNAL
    weights = path.suffix.lower() in _WEIGHTS or path.name.endswith(_INDEX)
    return not hidden and not weights and path.is_file() and _stays_inside(path, directory)


def _stays_inside(path: Path, directory: Path) -> bool:
    """Whether the file, links followed, is in the directory or a blob of a cache `blobs/, snapshots/REVISION/`."""
    target, home = path.resolve(), directory.resolve()
    return target.is_relative_to(home) or target.parent == home.parent.parent / "blobs"
