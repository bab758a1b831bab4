"""The environment of other programs has the packages of requirements.txt, and the torch of .venv."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import pytest

from tests.programs import install

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
