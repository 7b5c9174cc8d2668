"""What serving engines would make of an NVFP4 checkpoint, found without any model code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from jaxfp4.checkpoints.verification.declarations import declarations
from jaxfp4.checkpoints.verification.findings import Finding
from jaxfp4.checkpoints.verification.quantized_modules import take_inventory
from jaxfp4.checkpoints.verification.verify_config import check_config
from jaxfp4.checkpoints.verification.verify_fields import check_fields
from jaxfp4.checkpoints.verification.verify_files import check_directory, open_leniently, read_configs
from jaxfp4.checkpoints.verification.verify_groups import check_groups
from jaxfp4.checkpoints.verification.verify_layout import check_layout
from jaxfp4.checkpoints.verification.verify_values import check_values


def verify_checkpoint(directory: str | os.PathLike[str], *, tensor_parallel: int | Sequence[int] = ()) -> list[Finding]:
    """Checks a checkpoint in Model-Optimizer's or the compressed-tensors format, whoever wrote it.

    Looked at are the files and their index; dtypes, shapes and alignment of the tensors; the configuration, by itself
    and against the tensors; every block scale and code; and the scales that modules must share because engines fuse
    them. A broken file is a finding like any other, and the rest is still checked. Values are read in pieces.

    Args:
        directory: with safetensors files, and normally config.json.
        tensor_parallel: the numbers of ranks that it is to be served with; a contraction that they cannot split is
            then an error. Without any, 2, 4 and 8 are tried, and it is a warning.

    Raises:
        FileNotFoundError: there is no such directory, or no safetensors file in it.
        ValueError: `tensor_parallel` holds something else than positive integers.
    """
    sizes = _sizes(tensor_parallel)
    path = Path(directory)
    checkpoint, findings = open_leniently(path)
    config_file, modelopt_file, broken = read_configs(path)
    config = config_file or {}
    findings += broken
    findings += check_directory(path)
    inventory = take_inventory(checkpoint)
    found = declarations(config, modelopt_file)
    if config_file is not None or modelopt_file is not None:
        findings += check_fields(config, found)
    findings += check_config(inventory, config, found)
    findings += check_layout(inventory, sizes)
    findings += check_groups(checkpoint, inventory)
    findings += check_values(checkpoint, inventory)
    return findings


def _sizes(tensor_parallel: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (tensor_parallel,) if isinstance(tensor_parallel, int) else tuple(tensor_parallel)
    for size in sizes:
        if type(size) is not int or size < 1:
            raise ValueError(
                f"tensor_parallel holds {size!r}: wanted positive integers such as 8; give the numbers of ranks"
            )
    return sizes
