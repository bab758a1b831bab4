"""Import packages of requirements.txt in tests, or skip the test."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest


def needed(module: str, package: str = "") -> Any:
    """Import a module, or skip the test with the reason. package: its name in requirements.txt, if it differs. Independent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0].replace("_", "-")
        recorded = Path(sys.prefix, "not_installed.json")
        failed = json.loads(recorded.read_text()) if recorded.exists() else {}
        reasons = [reason for line, reason in failed.items() if line.partition("==")[0] == package]
        pytest.skip(f"{package}: {reasons[0]}" if reasons else f"{package}: {error} (`make programs` installs it)")
