"""Installs requirements.txt into the environment of this interpreter: `.venv-programs/bin/python tests/programs/install.py`.

A package that cannot be installed, for example because it has no wheel for this Python, does not stop the others. Its name and
pip's reason are written to not_installed.json in the environment, and its tests are skipped (packages.py).
This file uses the standard library only.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
NOT_INSTALLED = Path(sys.prefix, "not_installed.json")
CONSTRAINTS = Path(sys.prefix, "constraints.txt")  # keeps the torch, numpy and transformers of .venv
PIP = (
    sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--prefer-binary",
    "--constraint", str(CONSTRAINTS),
)
# These are installed without what they require: libraries of clouds, and versions of numpy, torch and transformers that differ
# from those of .venv. The few packages that they need are in requirements.txt.
ALONE = ("aiobotocore", "boto3", "botocore", "jmespath", "litdata", "mosaicml-streaming", "moto", "s3fs", "s3transfer")
LIMIT_SECONDS = 300.0  # of one call of pip: a package without a wheel may compile


def lines() -> list[str]:
    """Return the requirements, without comments. Independent."""
    return [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]


def constraints() -> str:
    """Return constraints.txt without the packages that requirements.txt pins to another version. Independent."""
    pinned = {line.partition("==")[0].lower() for line in lines()}
    kept = (ROOT / "constraints.txt").read_text().splitlines()
    return "".join(f"{line}\n" for line in kept if line.partition("==")[0].lower() not in pinned)


def pip(*words: str) -> str:
    """Install these packages. Return pip's reason if it fails, else an empty string. Independent."""
    try:
        done = subprocess.run([*PIP, *words], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"pip did not end within {LIMIT_SECONDS:.0f} s"
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    return "" if done.returncode == 0 else (errors or [f"pip: exit code {done.returncode}"])[-1]


def main() -> None:
    CONSTRAINTS.write_text(constraints())
    alone = [line for line in lines() if line.partition("==")[0] in ALONE]
    others = [line for line in lines() if line not in alone]
    failed = {}
    for group, words in ((others, ()), (alone, ("--no-deps",))):
        if group and pip(*words, *group):
            failed |= {line: reason for line in group if (reason := pip(*words, line))}
    NOT_INSTALLED.write_text(json.dumps(failed, indent=2) + "\n")
    for line, reason in failed.items():
        print(f"{line} is not installed, and its tests will be skipped: {reason}")


if __name__ == "__main__":
    main()
