"""What a check found: a verdict, the words, how to mend it; and the table of all. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpidp.runtime.environment import numbers

VERDICTS = ("ok", "skipped", "note", "warning", "wrong")  # ever worse; `wrong` makes the command fail
WIDTH = 130
MOST_LINES = 8  # of a list within a finding


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    verdict: str
    words: str
    fix: str = ""


def worst(findings: Sequence[Finding]) -> Finding:
    """The first of the worst. Pure."""
    return max(findings, key=lambda finding: VERDICTS.index(finding.verdict))


def could_not(what: str, error: Exception) -> Finding:
    """Of a check that failed. Pure."""
    return Finding(what, "warning", f"could not be checked: {error!r}")


def attempt(what: str, check: Callable[..., Finding | list[Finding]], *given: object) -> list[Finding]:
    """What the check finds; that it failed is a finding too. Independent."""
    try:
        found = check(*given)
    except Exception as error:
        found = could_not(what, error)
    return found if isinstance(found, list) else [found]


def table(findings: Sequence[Finding]) -> str:
    """A line each, and below it how to mend it. Pure."""
    name = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines += _wrapped(f"{finding.verdict:<8} {finding.what:<{name}}  ", finding.words)
        lines += _wrapped(" " * (name + 11) + "-> ", finding.fix)
    return "\n".join(lines)


def _wrapped(start: str, words: str) -> list[str]:
    lines: list[str] = []
    wrapper = textwrap.TextWrapper(WIDTH - len(start), break_long_words=False, break_on_hyphens=False)
    for row in words.splitlines():
        lines += wrapper.wrap(row)
    return [(" " * len(start) if i else start) + line for i, line in enumerate(lines)]


def listed(lines: Sequence[str]) -> str:
    """The first of them, one a line. Pure."""
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return "\n".join([*lines[:MOST_LINES], *more])


def size(number: float) -> str:
    """Bytes in a unit that people read. Pure."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.{0 if number >= 100 else 3}{'f' if number >= 100 else 'g'}} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"


def ranks(found: Sequence[int]) -> str:
    """rank 0, or ranks 0-3. Pure."""
    return f"rank{'s' * (len(found) > 1)} {numbers(found)}"


def where(found: Sequence[tuple[int, str]]) -> str:
    """ranks 0-1 on n1, n2: of (rank, host). Pure."""
    hosts = list(dict.fromkeys(host for _, host in found))
    return f"{ranks([rank for rank, _ in found])} on {', '.join(hosts[:4])}{' ...' * (len(hosts) > 4)}"
