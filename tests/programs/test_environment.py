"""The environment of other programs has the packages of requirements.txt, and the torch of .venv."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.programs import install
from tests.unit.test_constraints import normal, pins

HERE = Path(sys.prefix).name == ".venv-programs"


def test_requirements_are_pinned_and_sorted() -> None:
    lines = install.lines()
    assert all(re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.]+", line) for line in lines)
    names = [line.partition("==")[0].lower() for line in lines]
    assert names == sorted(set(names))


@pytest.mark.skipif(not HERE, reason="this is not the environment of `make programs`")
def test_what_is_installed_is_what_is_pinned() -> None:
    failed = json.loads(install.NOT_INSTALLED.read_text())
    for line in install.lines():
        name, _, wanted = line.partition("==")
        try:
            assert version(name.partition("[")[0]).partition("+")[0] == wanted, line
        except PackageNotFoundError:
            assert line in failed, f"{line} is neither installed nor in {install.NOT_INSTALLED}"


@pytest.mark.skipif(not HERE, reason="this is not the environment of `make programs`")
def test_no_package_brings_cuda_or_another_torch() -> None:
    own = [one.name for one in distributions(path=[path for path in sys.path if path.startswith(sys.prefix)])]
    assert [name for name in own if name.startswith(("torch", "nvidia-c", "cuda-", "triton", "transformers"))] == []


def test_every_extra_can_be_installed_with_constraints() -> None:
    """The pins satisfy what the packages of all extras require, as far as these packages are installed here."""
    extras = tomllib.loads((install.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pinned, wrong, seen = pins(), [], set()
    left = [(f"extra {extra}", line) for extra, lines in extras.items() for line in lines]
    while left:
        by, line = left.pop()
        one = Requirement(line)
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        name = normal(one.name)
        if name in pinned and not one.specifier.contains(pinned[name], prereleases=True):
            wrong.append(f"{by} requires {line}, but constraints.txt pins {pinned[name]}")
        if name not in seen:
            seen.add(name)
            try:
                left += [(name, each) for each in requires(name) or ()]
            except PackageNotFoundError:
                continue
    assert not wrong, "\n".join(wrong)
