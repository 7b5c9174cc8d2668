"""`jaxfp4 verify`: what serving engines would make of a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxfp4.checkpoints.verification.findings import Finding, FoldedFinding, Severity, fold, has_errors
from jaxfp4.checkpoints.verification.verify import verify_checkpoint
from jaxfp4.commands.errors import CommandError
from jaxfp4.commands.output_files import check_output, write_json

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}


def run_verify(
    directory: Path, *, tensor_parallel: str | None = None, json_file: Path | None = None, console: Console
) -> int:
    """Prints the findings, worst first, and a summary; the exit status is 1 if there is an error among them, else 0.

    `tensor_parallel` is a list such as `2,8`. CommandError, ValueError or OSError for bad input.
    """
    check_output("--json", json_file)
    findings = verify_checkpoint(directory, tensor_parallel=parse_sizes(tensor_parallel))
    folded = fold(findings)
    for severity in Severity:
        rows = [entry for entry in folded if entry.shown.severity is severity]
        if rows:
            console.print(findings_table(severity, rows))
    console.print(escape(summary(directory, findings)), soft_wrap=True)
    if json_file is not None:
        write_json(json_file, as_json(directory, findings))
    return int(has_errors(findings))


def parse_sizes(text: str | None) -> tuple[int, ...]:
    """`2,8` as numbers.

    >>> parse_sizes("2,8"), parse_sizes(None)
    ((2, 8), ())
    """
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdecimal() and int(part) > 0):
            raise CommandError(f"--tp {text}: found {part!r}; wanted positive numbers such as 2,8; correct the list")
    return tuple(int(part) for part in parts)


def findings_table(severity: Severity, rows: Sequence[FoldedFinding]) -> Table:
    """The findings of one severity."""
    style = _STYLES[severity]
    table = Table(title=f"{severity}s", title_justify="left", title_style=style, show_lines=True)
    for name, ratio in (("where", 3), ("found", 4), ("what engines do", 4), ("fix", 3)):
        table.add_column(name, overflow="fold", ratio=ratio)
    for row in rows:
        shown, more = row.shown, f"\nand {row.others} more" if row.others else ""
        where = f"{shown.check}\n{shown.subject}{more}"
        table.add_row(*map(escape, (where, shown.found, shown.engines, shown.fix)))
    return table


def summary(directory: Path, findings: Sequence[Finding]) -> str:
    """One line."""
    counts = [sum(finding.severity is severity for finding in findings) for severity in Severity]
    words = ", ".join(
        f"{count} {severity}{'' if count == 1 else 's'}" for count, severity in zip(counts, Severity, strict=True)
    )
    return f"{directory}: {words}"


def as_json(directory: Path, findings: Sequence[Finding]) -> dict[str, Any]:
    """Every finding, none folded."""
    entries = [dataclasses.asdict(finding) for finding in findings]
    for entry in entries:
        del entry["amount"]
    return {"directory": str(directory), "findings": entries}
