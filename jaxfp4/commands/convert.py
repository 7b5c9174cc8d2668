"""`jaxfp4 convert`: an NVFP4 checkpoint in the other of the two formats, or unquantized again."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from jaxfp4.checkpoints.streaming.convert import convert
from jaxfp4.checkpoints.streaming.dequantize_files import DENSE, dequantize_files
from jaxfp4.checkpoints.streaming.file_quantization import DEFAULT_SHARD_BYTES
from jaxfp4.checkpoints.streaming.resume import partial_path


def convert_directory(
    in_dir: Path,
    out_dir: Path,
    *,
    file_format: str,
    max_shard_bytes: int | None = DEFAULT_SHARD_BYTES,
    console: Console,
) -> None:
    """Converts and prints where to.

    Raises ValueError or OSError for bad input; `out_dir` is then not there. After Ctrl-C or a kill the same command
    goes on where it was.
    """
    start = time.monotonic()
    try:
        if file_format == DENSE:
            dequantize_files(in_dir, out_dir, max_shard_bytes=max_shard_bytes, say=console.print)
        else:
            convert(in_dir, out_dir, file_format=file_format, max_shard_bytes=max_shard_bytes, say=console.print)
    except KeyboardInterrupt:
        console.print(f"interrupted; what is finished is in {partial_path(out_dir)}: the same command goes on there")
        raise
    console.print(f"{in_dir} converted to {file_format} in {time.monotonic() - start:.1f} s\nwritten to {out_dir}")
