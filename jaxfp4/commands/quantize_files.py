"""`jaxfp4 quantize --weight-only`: any directory of safetensors in, an NVFP4 checkpoint out, no model code needed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from jaxfp4.checkpoints.streaming.file_plan import FilePlan, method_of, plan_files
from jaxfp4.checkpoints.streaming.file_quantization import DEFAULT_SHARD_BYTES, quantize_planned
from jaxfp4.checkpoints.streaming.resume import partial_path

_EXAMPLES = 3


def quantize_files(
    model_dir: Path,
    out_dir: Path,
    *,
    recipe: str = "nvfp4_weight_only",
    file_format: str = "modelopt",
    max_shard_bytes: int | None = DEFAULT_SHARD_BYTES,
    exclude: Sequence[str] = (),
    console: Console,
) -> None:
    """Quantizes the linear layers of the directory's safetensors files and prints what was left and why.

    Raises ValueError or OSError for bad input; `out_dir` is then not there. After Ctrl-C or a kill the same command
    goes on where it was.
    """
    method_of(recipe)
    plan = plan_files(model_dir, exclude)
    console.print(_table(plan))
    start = time.monotonic()
    total = sum(tensor.nbytes for tensor in plan.source.tensors.values())
    read = 0
    try:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task(decimal(total), total=total)

            def advance(count: int) -> None:
                nonlocal read
                read += count
                bar.advance(task, count)

            quantize_planned(
                plan,
                out_dir,
                recipe=recipe,
                file_format=file_format,
                max_shard_bytes=max_shard_bytes,
                say=console.print,
                progress=advance,
            )
    except KeyboardInterrupt:
        console.print(f"interrupted; what is finished is in {partial_path(out_dir)}: the same command goes on there")
        raise
    seconds = time.monotonic() - start
    written = sum(path.stat().st_size for path in out_dir.rglob("*") if path.is_file())
    console.print(
        f"{len(plan.quantized)} weights quantized, {decimal(total)} to {decimal(written)}; {decimal(read)} in "
        f"{seconds:.1f} s ({read / 1e6 / seconds:.0f} MB/s)\nwritten to {out_dir}"
    )


def _table(plan: FilePlan) -> Table:
    """What is quantized, and by reason what is left."""
    table = Table(title=f"{len(plan.quantized)} of {len(plan.source.tensors)} tensors are quantized")
    for heading in ("tensors", "size", "what happens", "such as"):
        table.add_column(heading, justify="right" if heading in ("tensors", "size") else "left", overflow="fold")
    rows: dict[str, list[str]] = defaultdict(list)
    for tensor in plan.quantized:
        rows["quantized"].append(tensor.name)
    for name, reason in plan.left.items():
        rows[f"left: {reason}"].append(name)
    for what, names in rows.items():
        size = sum(plan.source.tensors[name].nbytes for name in names)
        more = f", .. {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
        # Of stacks of experts all are named: they are most of a model, and the user has to know.
        shown = names if "experts" in what else names[:_EXAMPLES]
        examples = ", ".join(shown) + ("" if shown is names else more)
        table.add_row(str(len(names)), decimal(size), escape(what), escape(examples))
    return table
