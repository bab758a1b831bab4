"""constraints.txt pins every package of a new environment, with the version that is installed there."""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_PINNED = {"mpidp", "pip", "setuptools", "wheel"}
OF_TORCH = ("nvidia-", "cuda-", "triton")  # the CUDA build of torch requires exact versions of them


def normal(name: str) -> str:
    """Return the name in the form in which PyPI compares names. Pure."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Return the versions by package name from constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), [line for line in lines if "==" not in line]
    return {normal(line.partition("==")[0]): line.partition("==")[2] for line in lines}


def test_lines_are_sorted_and_unique() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    names = [normal(line.partition("==")[0]) for line in lines]
    assert names == sorted(set(names))


@pytest.mark.skipif(Path(sys.prefix).name != ".venv", reason="this is not the environment that make sets up (.venv)")
def test_what_is_installed_is_what_is_pinned() -> None:
    installed = {normal(one.name): one.version.partition("+")[0] for one in distributions() if one.name}  # torch: 2.13.0+cpu
    pinned = pins()
    missing = [f"{name}=={version}" for name, version in sorted(installed.items())
               if name not in NOT_PINNED and not name.startswith(OF_TORCH) and pinned.get(name) != version]
    assert not missing, "constraints.txt has no such line:\n" + "\n".join(missing)
