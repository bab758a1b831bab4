"""Laws of the files that users copy: every recipe in jobs/ is a valid configuration, and the container's definition names what
the package needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpidp.config.command_line import from_args
from mpidp.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(set((ROOT / "jobs").glob("*.toml")) - {ROOT / "jobs" / "quickstart.toml"})


@pytest.mark.parametrize("recipe", RECIPES, ids=[path.name for path in RECIPES])
def test_a_recipe_is_valid_and_says_how_to_run_it(recipe: Path) -> None:
    config, text = from_args([str(recipe)]), recipe.read_text()
    assert config.run.dir != Config().run.dir and config.data.path != Config().data.path
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert any(f"mpidp train jobs/{recipe.name}" in line for line in comments)
    assert f"jobs/{recipe.name}" in (ROOT / "docs" / "runs.md").read_text()


def test_the_container_copies_what_the_package_needs() -> None:
    """In %files, Apptainer takes one source and one destination per line."""
    section, copies = "", {}
    for line in (ROOT / "jobs" / "apptainer.def").read_text().splitlines():
        if line.startswith("%"):
            section = line.split()[0]
        elif section == "%files" and line.strip():
            source, destination = line.split()
            copies[source] = destination
    assert all((ROOT / source).exists() for source in copies)
    assert set(copies) == {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "mpidp", "data_tools"}
    for source, destination in copies.items():
        assert destination in ("/opt/mpidp/", f"/opt/mpidp/{source}") and (not (ROOT / source).is_dir() or destination[-1] != "/")
