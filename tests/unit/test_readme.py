"""Laws of README and docs: both languages show the same commands, figures and links, and everything that a page names exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from mpidp.__main__ import COMMANDS
from mpidp.config.command_line import from_args
from mpidp.config.schema import fields_of
from mpidp.errors import EXIT_CODES

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("README.md", "README.zh.md")
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.S | re.M)
INDENTED = re.compile(r"^    (.*)$", re.M)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
SECTIONS = "|".join(sorted({key.partition(".")[0] for key, _, _ in fields_of()}))
SETTING = re.compile(rf"(?<![\w./-])(?:--)?((?:{SECTIONS})\.[a-z_]+)\b(?!\.)(?!/)")
FILES = ("toml", "md", "py", "jsonl", "json", "sbatch")
COMMAND = re.compile(
    r"(?<![\w/.-])(?:python -m ((?:mpidp|data_tools)\.[a-z_]+)|python ((?:examples|benchmarks)/\w+\.py)"
    r"|(?:python -m )?mpidp ([a-z]+))(?![\w.:])(.*)"
)


def read(name: str) -> str:
    return (ROOT / name).read_text()


def prose(name: str) -> str:
    return FENCED.sub("", read(name))


def shown(name: str) -> list[str]:
    """The lines of a page's blocks, and what stands in backquotes."""
    page, text = read(name).replace("\\\n", " "), prose(name).replace("\\\n", " ")
    return [*"".join(FENCED.findall(page)).splitlines(), *INDENTED.findall(text), *INLINE.findall(text)]


def commands(name: str) -> list[tuple[str, list[str]]]:
    """(module or program, arguments) of every command in a block or in backquotes. Comments and pipes are no arguments."""
    found = []
    for line in shown(name):
        if match := COMMAND.search(line):
            words = shlex.split(match[4], comments=True)
            words = words[: words.index("|")] if "|" in words else words
            assert not match[3] or match[3] in COMMANDS, f"mpidp {match[3]}: no such command"
            found.append((match[1] or match[2] or COMMANDS[match[3]][0], words))
    return found


def test_both_show_the_same_blocks_in_the_same_order() -> None:
    ours, theirs = (FENCED.findall(read(name)) for name in NAMES)
    assert len(ours) > 4 and ours == theirs


def test_both_have_the_same_figures_names_settings_and_links() -> None:
    """Compared by section: numbers of two digits or more, text in backquotes, file names, links. Neither language lags behind."""
    kinds = (r"(?<![\w.,/-])\d[\d.,/]*\d", r"`[^`]+`", r"[\w/-]+/[\w.-]+\.(?:md|py|png|sbatch)\b", LINK.pattern)
    ours, theirs = (re.split(r"^## ", prose(name), flags=re.M) for name in NAMES)
    assert len(ours) == len(theirs)
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        one, other = (text.replace("README.zh.md", "README.md") if index == 0 else text for text in (one, other))
        for kind in kinds:
            assert sorted(re.findall(kind, one, re.A)) == sorted(re.findall(kind, other, re.A)), one.splitlines()[0]
        for mark in ("\n|", "\n- ", "\n\n**"):
            assert one.count(mark) == other.count(mark), (mark, one.splitlines()[0])


def test_readme_is_short() -> None:
    for name in NAMES:
        assert len(read(name).splitlines()) <= 150, name


def test_readme_links_every_page_that_it_names() -> None:
    for name in NAMES:
        links = set(LINK.findall(read(name)))
        named = set(re.findall(r"\bdocs/[\w/.-]+\.md\b", read(name), re.A))
        assert len(named) > 15 and named <= links, named - links


def test_the_index_lists_every_page() -> None:
    links = set(LINK.findall(read("docs/index.md")))
    assert {Path(page).name for page in PAGES} - {"index.md"} <= links, "docs/index.md lacks a page"


@pytest.mark.parametrize("name", [*NAMES, *PAGES])
def test_every_link_leads_to_a_file(name: str) -> None:
    links = [link for link in LINK.findall(read(name)) if "://" not in link]
    assert not [link for link in links if not (ROOT / name).parent.joinpath(link).exists()]


@pytest.mark.parametrize("name", NAMES)
def test_every_file_that_is_named_exists(name: str) -> None:
    homes = "docs|jobs|examples|mpidp|data_tools|benchmarks|tests"
    named = set(re.findall(rf"(?<![\w./-])(?:{homes})/[\w./-]*[\w/]|\b[A-Za-z.]+\.md\b(?<!/)", read(name), re.A))
    inner = {path for path in named if "/" in path or path.isupper() or path.startswith("README")}
    assert len(inner) > 15
    assert not [path for path in inner if not (ROOT / path).exists()]


@pytest.mark.parametrize("name", [*NAMES, *PAGES])
def test_every_module_target_and_option_that_is_named_exists(name: str) -> None:
    found = commands(name)
    modules = {module for module, _ in found if "/" not in module}
    assert not [module for module in modules if importlib.util.find_spec(module) is None]
    assert not [program for program, _ in found if "/" in program and not (ROOT / program).exists()]
    targets = {word for line in shown(name) for word in re.findall(r"^make ([a-z][a-z0-9-]*)", line)}
    known = set(re.findall(r"^([a-z][a-z0-9-]*):", read("Makefile"), re.M))
    assert targets <= known, targets - known
    code = "".join(path.read_text() for folder in ("mpidp", "data_tools", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
    options = {word.partition("=")[0] for _, words in found for word in words if re.match(r"--[a-z-]+(=|$)", word)}
    assert not [word for word in options - {"--help"} if f'"{word}"' not in code and f'("{word[2:]}"' not in code]


@pytest.mark.parametrize("name", NAMES)
def test_readme_shows_every_command(name: str) -> None:
    assert {module for module, _ in COMMANDS.values()} <= {module for module, _ in commands(name)}
    assert {"train", "test", "setup"} <= {word for line in shown(name) for word in re.findall(r"^make ([a-z]+)", line)}


@pytest.mark.parametrize("name", ["docs/commands.md", "docs/runs.md"])
def test_the_tables_of_exit_codes_are_complete(name: str) -> None:
    table = read(name).partition("## Exit codes")[2].partition("##")[0]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)] == list(EXIT_CODES)


@pytest.mark.parametrize("name", [*NAMES, *PAGES])
def test_every_setting_that_is_named_is_one(name: str) -> None:
    known = {key for key, _, _ in fields_of()}
    text = read(name) if name in NAMES else " ".join(re.findall(r"--\S+", read(name)))
    named = {key for key in SETTING.findall(text) if key.rpartition(".")[2] not in FILES}
    assert named <= known, named - known


@pytest.mark.parametrize("name", [NAMES[0], "docs/choosing.md", "docs/commands.md", "docs/determinism.md", "docs/runs.md"])
def test_every_training_command_has_settings_that_go_together(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The reader's own configuration (my.toml) is empty here: all its settings are the defaults."""
    (tmp_path / "my.toml").write_text("")
    (tmp_path / "jobs").symlink_to(ROOT / "jobs")
    monkeypatch.chdir(tmp_path)
    training = [words for module, words in commands(name) if module == "mpidp.train" and "--help" not in words]
    assert training
    for words in training:
        from_args([word for word in words if word != "--dry-run"])
