"""What a check of a checkpoint found, as data."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence


class Severity(enum.StrEnum):
    """How bad a finding is; the first is the worst."""

    ERROR = "error"
    """An engine refuses the checkpoint or computes wrong numbers."""

    WARNING = "warning"
    """Slower, less accurate, or for some engines only."""

    NOTE = "note"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One defect at one place."""

    severity: Severity
    check: str
    """The name of the check, such as `fused-global-scale`."""

    subject: str
    """The module, tensor or file."""

    found: str
    """What is there, with numbers."""

    engines: str
    """What vLLM, SGLang or TensorRT-LLM do with it."""

    fix: str
    amount: float = 0.0
    """How far off; among findings that are shown as one, the largest is shown."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A kind of finding: all but the place and what is there."""

    check: str
    severity: Severity
    engines: str
    fix: str

    def at(self, subject: str, found: str, amount: float = 0.0) -> Finding:
        """The finding at one place."""
        return Finding(self.severity, self.check, subject, found, self.engines, self.fix, amount)


@dataclasses.dataclass(frozen=True)
class FoldedFinding:
    """Findings of one rule: the one with the largest amount, the first of those that tie, and how many others."""

    shown: Finding
    others: int


def fold(findings: Iterable[Finding]) -> list[FoldedFinding]:
    """Findings that differ only in their place as one, the worst severity first, else in the order they came.

    >>> rule = Rule("nan-block-scale", Severity.ERROR, "garbage", "export again")
    >>> [(entry.shown.subject, entry.others) for entry in fold([rule.at("a", "1 NaN", 1), rule.at("b", "9 NaN", 9)])]
    [('b', 1)]
    """
    groups: dict[tuple[Severity, str, str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.check, finding.engines, finding.fix), []).append(finding)
    folded = [FoldedFinding(max(group, key=lambda one: one.amount), len(group) - 1) for group in groups.values()]
    return sorted(folded, key=lambda entry: list(Severity).index(entry.shown.severity))


def has_errors(findings: Sequence[Finding]) -> bool:
    """Whether any finding is an error."""
    return any(finding.severity is Severity.ERROR for finding in findings)
