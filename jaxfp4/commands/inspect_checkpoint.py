"""`jaxfp4 inspect`: the weights of a checkpoint in a table."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from jaxfp4.commands.errors import CommandError
from jaxfp4.commands.output_files import check_output, write_json, write_whole
from jaxfp4.reports.checkpoint_report import inspect_checkpoint
from jaxfp4.reports.checkpoint_table import as_json, checkpoint_table, totals
from jaxfp4.reports.scale_picture import scale_picture


def run_inspect(
    directory: Path,
    *,
    original: Path | None = None,
    picture: Path | None = None,
    json_file: Path | None = None,
    every: bool = False,
    console: Console,
) -> int:
    """Prints the table and the totals, and writes what was asked for; the exit status is 0.

    CommandError, ValueError or OSError for bad input.
    """
    check_output("--json", json_file)
    check_output("--picture", picture)
    if picture is not None:
        _check_picture(picture)
    report = inspect_checkpoint(directory, original=original)
    console.print(checkpoint_table(report, every=every))
    for line in totals(report):
        console.print(escape(line), soft_wrap=True)
    if json_file is not None:
        write_json(json_file, as_json(report))
    if picture is not None:
        figure = scale_picture(report)
        write_whole(picture, lambda partial: figure.savefig(partial, dpi=150))
        console.print(escape(f"picture written to {picture}"), soft_wrap=True)
    return 0


def _check_picture(picture: Path) -> None:
    if picture.suffix.lower() != ".png":
        raise CommandError(f"--picture {picture}: wanted a name that ends in .png; rename it")
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError(
            f"--picture {picture}: matplotlib is not installed; wanted it for pictures; pip install 'jaxfp4[notebooks]'"
        )
