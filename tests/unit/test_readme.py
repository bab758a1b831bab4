"""Laws of the README: both languages show the same commands and figures, and whatever they name is there."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from mpidp.config.command_line import from_args
from mpidp.config.schema import fields_of

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("README.md", "README.zh.md")
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.S | re.M)
SECTIONS = "|".join(sorted({key.partition(".")[0] for key, _, _ in fields_of()}))
SETTING = re.compile(rf"(?<![\w./-])(?:--)?((?:{SECTIONS})\.[a-z_]+)\b(?!\.)(?!/)")
FILES = ("toml", "md", "py", "jsonl", "json", "sbatch")
COMMAND = re.compile(r"(?<!\w)python (?:-m ((?:mpidp|data_tools)\.\w+)|((?:examples|benchmarks)/\w+\.py))(.*)")


def read(name: str) -> str:
    return (ROOT / name).read_text()


def prose(name: str) -> str:
    return FENCED.sub("", read(name))


def commands(name: str) -> list[tuple[str, list[str]]]:
    """(module or program, its arguments) of every command in a block: what stands behind # or a pipe is no argument."""
    found = []
    for block in FENCED.findall(read(name)):
        for line in block.replace("\\\n", " ").splitlines():
            if match := COMMAND.search(line):
                said = shlex.split(match[3], comments=True)
                found.append((match[1] or match[2], said[: said.index("|")] if "|" in said else said))
    return found


def test_both_show_the_same_blocks_in_the_same_order() -> None:
    ours, theirs = (FENCED.findall(read(name)) for name in NAMES)
    assert len(ours) > 10 and ours == theirs


def test_both_tell_the_same_figures_names_and_settings() -> None:
    """Numbers of two figures or more, what stands in backquotes, and files, by section: so neither language lags behind."""
    kinds = (r"(?<![\w.,/-])\d[\d.,/]*\d", r"`[^`]+`", r"[\w/-]+/[\w.-]+\.(?:md|py|png|sbatch)\b")
    ours, theirs = (re.split(r"^## ", prose(name), flags=re.M) for name in NAMES)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for kind in kinds:
            assert sorted(re.findall(kind, one, re.A)) == sorted(re.findall(kind, other, re.A)), one.splitlines()[0]
        for mark in ("\n|", "\n\n**", "]("):
            assert one.count(mark) == other.count(mark), (mark, one.splitlines()[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_is_there(name: str) -> None:
    homes = "docs|jobs|examples|mpidp|data_tools|benchmarks|tests"
    said = set(re.findall(rf"(?<![\w./-])(?:{homes})/[\w./-]*[\w/]|\b[A-Za-z.]+\.md\b(?<!/)", read(name), re.A))
    linked = set(re.findall(r"\]\(([^)#]+)\)", read(name)))
    inner = {path for path in said if "/" in path or path.isupper() or path.startswith("README")}
    assert len(inner) > 20
    assert not [path for path in inner | linked if not (ROOT / path).exists()]


@pytest.mark.parametrize("name", NAMES)
def test_every_module_target_and_option_that_is_named_is_there(name: str) -> None:
    text = read(name)
    modules = set(re.findall(r"python -m ((?:mpidp|data_tools)\.\w+)", text))
    assert len(modules) > 8 and not [module for module in modules if importlib.util.find_spec(module) is None]
    targets = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.M))
    known = set(re.findall(r"^([a-z][a-z-]*):", read("Makefile"), re.M))
    assert targets and targets <= known, targets - known
    code = "".join(path.read_text() for folder in ("mpidp", "data_tools") for path in (ROOT / folder).rglob("*.py"))
    options = {word.partition("=")[0] for _, said in commands(name) for word in said if re.match(r"--[a-z-]+(=|$)", word)}
    assert len(options) > 10
    assert not [word for word in options - {"--help"} if f'"{word}"' not in code and f'("{word[2:]}"' not in code]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_that_is_named_is_one(name: str) -> None:
    known = {key for key, _, _ in fields_of()}
    said = {key for key in SETTING.findall(read(name)) if key.rpartition(".")[2] not in FILES}
    assert len(said) > 20 and said <= known, said - known


def test_every_training_command_has_settings_that_go_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of a configuration of the reader's own (my.toml) are the defaults here."""
    (tmp_path / "my.toml").write_text("")
    monkeypatch.chdir(tmp_path)
    training = [said for module, said in commands(NAMES[0]) if module == "mpidp.train" and "--help" not in said]
    assert len(training) > 5
    for said in training:
        from_args([word for word in said if word != "--dry-run"])
