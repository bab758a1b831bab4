"""Results of checks, and the table that shows them. A result has a verdict, a text, and a fix, which says what the user can do.
Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpidp.runtime.environment import numbers

VERDICTS = ("ok", "skipped", "note", "warning", "wrong")  # in ascending order of severity; `wrong` makes the command fail
WIDTH = 130
MOST_LINES = 8  # maximum number of lines of a list within a result


@dataclass(frozen=True)
class CheckResult:
    """One row of the table. The field names are the keys of --json."""

    what: str  # name of the check
    verdict: str  # one of VERDICTS
    words: str  # what was found
    fix: str = ""  # how to correct the problem


def worst(results: Sequence[CheckResult]) -> CheckResult:
    """Return the most severe result. If several results are equally severe, return the first of them. Pure."""
    return max(results, key=lambda result: VERDICTS.index(result.verdict))


def failed_check(what: str, error: Exception) -> CheckResult:
    """Return a warning that the check `what` raised an exception. Pure."""
    return CheckResult(what, "warning", f"could not be checked: {error!r}")


def run_check(what: str, check: Callable[..., CheckResult | list[CheckResult]], *given: object) -> list[CheckResult]:
    """Call check(*given), and return its results. If the check raises an exception, return a warning. `what`: the name of the
    check. Independent."""
    try:
        found = check(*given)
    except Exception as error:
        found = failed_check(what, error)
    return found if isinstance(found, list) else [found]


def table(results: Sequence[CheckResult]) -> str:
    """Format the results as a table. Each result has a row, and its fix is below this row. Pure."""
    name = max(len(result.what) for result in results)
    lines = []
    for result in results:
        lines += _wrapped(f"{result.verdict:<8} {result.what:<{name}}  ", result.words)
        lines += _wrapped(" " * (name + 11) + "-> ", result.fix)
    return "\n".join(lines)


def _wrapped(start: str, text: str) -> list[str]:
    lines: list[str] = []
    wrapper = textwrap.TextWrapper(WIDTH - len(start), break_long_words=False, break_on_hyphens=False)
    for row in text.splitlines():
        lines += wrapper.wrap(row)
    return [(" " * len(start) if i else start) + line for i, line in enumerate(lines)]


def listed(lines: Sequence[str]) -> str:
    """Join the first MOST_LINES lines. If there are more lines, add "and N more". Pure."""
    more = [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []
    return "\n".join([*lines[:MOST_LINES], *more])


def size(number: float) -> str:
    """Format a number of bytes as text, for example "1.5 MiB". Pure."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.{0 if number >= 100 else 3}{'f' if number >= 100 else 'g'}} {unit}"
        number /= 1024
    return f"{number:,.1f} GiB"


def ranks(found: Sequence[int]) -> str:
    """Format ranks as text, for example "rank 0" or "ranks 0-3". Pure."""
    return f"rank{'s' * (len(found) > 1)} {numbers(found)}"


def where(found: Sequence[tuple[int, str]]) -> str:
    """Format (rank, host) pairs as text, for example "ranks 0-1 on n1, n2". Pure."""
    hosts = list(dict.fromkeys(host for _, host in found))
    return f"{ranks([rank for rank, _ in found])} on {', '.join(hosts[:4])}{' ...' * (len(hosts) > 4)}"
