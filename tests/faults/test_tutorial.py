"""Run docs/tutorial.md as a reader does: every ```bash and ```python block, in order, in one folder, under MPICH.

| the page shows | expected | checked |
|---|---|---|
| a block | exit code 0 | bash -eo pipefail, python |
| ```text under it | each line is printed, in this order; figures and the model's answers may differ | the block's output |
| weights_sha256 | equal where the page's are equal, different where they differ | printed hashes |
| answers before and after the fine-tune | much better after it | printed accuracies |
| report.html | one file with charts of all runs | its bytes |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.faults.commands import ROOT, Shell

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HASH = re.compile(r"\b[0-9a-f]{64}\b")
FIGURE = re.compile(r"(?<!exit code )(?<!\d)\d[\d.,]*(e[+-]\d+)?")
ANSWER = re.compile(r"^assistant: an? (exception|module|special method)$")  # the model learns from texts of the Python version
START = {"bash": ["bash", "-eo", "pipefail", "-c"], "python": ["python", "-c"]}


@dataclass
class Block:
    """The commands of a block and the output that the page shows: lines, with `...` for omitted ones."""

    kind: str
    typed: str
    shown: list[str]


def blocks(page: str) -> list[Block]:
    found: list[Block] = []
    for kind, content in FENCE.findall(page):
        if kind in START:
            found.append(Block(kind, content, []))
        elif kind == "text":
            assert found and not found[-1].shown, f"output of which block? {content}"
            found[-1].shown = [line.rstrip() for line in content.splitlines() if line.strip() not in ("", "...")]
        else:
            assert kind == "sample", f"a block that nothing is done with: ```{kind}"  # generated text
    return found


def alike(line: str) -> str:
    """Return a line without figures, alignment and the model's answer. Pure."""
    return " ".join(FIGURE.sub("#", HASH.sub("HASH", ANSWER.sub("assistant: ANSWER", line))).split())


def seen(shown: list[str], said: str) -> list[str]:
    """Return the printed lines that correspond to the shown ones. Fails at the first missing line."""
    lines, found, at = said.splitlines(), [], 0
    for wanted in shown:
        while at < len(lines) and alike(lines[at]) != alike(wanted):
            at += 1
        assert at < len(lines), f"after {found[-1:]} the page shows\n  {wanted}\nand this was said:\n{said}"
        found.append(lines[at])
        at += 1
    return found


def test_the_tutorial(tmp_path: Path) -> None:
    page, shell = blocks((ROOT / "docs" / "tutorial.md").read_text()), Shell(tmp_path, "mpich")
    assert {block.kind for block in page} == set(START) and len(page) > 10
    hashes: set[tuple[str, str]] = set()
    told: list[str] = []
    for block in page:
        quiet = "chats.jsonl" in block.typed or "mpidp generate" in block.typed
        assert block.shown or quiet, f"what does it print?\n{block.typed}"
        ended = shell.start_command([*START[block.kind], block.typed]).wait(200)
        assert ended.code == 0, f"{block.typed}\n{ended}"
        assert "Traceback" not in ended.said, ended
        lines = seen(block.shown, ended.said)
        hashes |= set(zip(HASH.findall("\n".join(block.shown)), HASH.findall("\n".join(lines)), strict=True))
        told += lines
    assert len(hashes) == len({a for a, _ in hashes}) == len({b for _, b in hashes}) > 1, hashes
    before, after = (float(a) for line in told for a in re.findall(r"accuracy ([\d.]+)", line))
    assert before + 0.2 < after > 0.7, (before, after)
    report = (tmp_path / "report.html").read_text()
    assert "<svg" in report and all(f"runs/{run}" in report for run in ("manual", "stopped", "answers"))
