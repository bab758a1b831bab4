"""`mpidp COMMAND`, the options that commands share, and the logger."""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mpidp
from mpidp import __main__ as top
from mpidp import errors
from mpidp.config.schema import Config
from mpidp.errors import EXIT_CODES, MpidpError, UsageError
from mpidp.runtime import log as logs
from mpidp.runtime.command import Parser
from mpidp.runtime.options import add_json, add_ranks, rank_count, rank_counts
from mpidp.train import read_options

ROOT = Path(__file__).resolve().parents[2]


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["mpidp", *words])
    top.main()


def help_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, *words, "--help")
    assert ended.value.code in (None, 0)
    return capsys.readouterr().out


def test_help_lists_commands_and_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, "--help")
    text = capsys.readouterr().out
    paths = [path for folder in ("mpidp", "data_tools") for pattern in ("*.py", "*/__main__.py")
             for path in (ROOT / folder).glob(pattern) if "def main() -> None" in path.read_text()]
    files = {path.parent.stem if path.stem == "__main__" else path.stem for path in paths}
    assert set(top.COMMANDS) == files - {"mpidp"}
    for name, (_, about) in top.COMMANDS.items():
        assert f"  {name:<10} {about}\n" in text
        assert callable(top.module_of(name).main)
    for code, meaning in EXIT_CODES.items():
        assert f"  {code:<3} {meaning}\n" in text


def test_the_documentation_shows_the_same_table_of_exit_codes() -> None:
    page = (ROOT / "docs/commands.md").read_text().partition("## Exit codes")[2].replace("`", "")
    assert dict(re.findall(r"^\| (\d+) \| (.*) \|$", page, re.M)) == {str(code): text for code, text in EXIT_CODES.items()}


def test_the_table_has_the_exit_code_of_every_error() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MpidpError)]
    assert len(kinds) > 4 and {kind.exit_code for kind in kinds} | {0, errors.HANG_EXIT_CODE} == set(EXIT_CODES)


@pytest.mark.parametrize("name", top.COMMANDS)
def test_every_command_has_help_under_the_name_that_was_typed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"mpidp {name}" in help_of(monkeypatch, capsys, name).splitlines()[0]


def test_version_and_wrong_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    call(monkeypatch, "--version")
    assert capsys.readouterr().out == f"mpidp {mpidp.__version__}\n"
    for word, nearest in (("trian", "train"), ("eval", "evaluate"), ("prep", "prepare"), ("--hlep", "replay")):
        with pytest.raises(UsageError, match=f"there is no command '{word}'") as raised:
            call(monkeypatch, word)
        assert word == "--hlep" or f"did you mean '{nearest}'?" in str(raised.value)
    with pytest.raises(UsageError, match="choose one of prepare, inspect,"):
        call(monkeypatch)


def test_only_the_module_of_the_command_is_imported() -> None:
    code = (
        "import sys; sys.argv[1:] = ['report', '--help']\n"
        "from mpidp import __main__\n"
        "try: __main__.main()\n"
        "except SystemExit: pass\n"
        "found = {'torch', 'mpi4py', 'numpy', 'mpidp.train', 'mpidp.plan', 'data_tools'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0 and "mpidp report" in child.stdout, child.stderr


SHARED = {  # option: the commands that have it
    "--data": {"evaluate", "replay", "doctor"},
    "--tokenizer": {"prepare", "convert", "evaluate", "generate", "chat"},
    "--out": {"prepare", "convert", "evaluate", "generate", "chat", "export", "report"},
    "--json": {"evaluate", "replay", "plan ranks", "plan methods", "plan mesh", "doctor"},
    "--ranks": {"plan ranks", "plan methods", "plan mesh"},
}


def test_a_shared_option_has_one_meaning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    json = "print one line of JSON to standard output, and everything else to standard error"
    meanings = {"--data": "folder of shards ", "--json": json, "--ranks": "number of MPI ranks", "--tokenizer": "tokenizer.json"}
    commands = [name for name in top.COMMANDS if name != "plan"] + ["plan ranks", "plan methods", "plan mesh"]
    lines = {name: help_of(monkeypatch, capsys, *name.split()).splitlines() for name in commands}
    for option, owners in SHARED.items():
        having = {name: line for name in commands for line in lines[name] if line.startswith(f"  {option} ")}
        assert set(having) == owners, option
        assert all(meanings.get(option, '') in line for line in having.values()), having


def test_numbers_of_ranks() -> None:
    assert rank_counts("4") == [4] and rank_counts("1, 2,4") == [1, 2, 4] and rank_counts("16k,1e3") == [16000, 1000]
    assert rank_count("64") == 64
    for wrong in ("", "0", "-1", "1.5", "2,0", "2,", "two", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="give whole numbers of at least 1"):
            rank_counts(wrong)
    for wrong in ("2,4", "0", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="give one whole number of at least 1"):
            rank_count(wrong)
    parser = Parser(prog="x")
    add_ranks(parser, "those measured", several=True)
    add_json(parser)
    assert parser.parse_args(["--ranks", "1,2"]).ranks == [1, 2]
    with pytest.raises(UsageError, match=r"--ranks: '0': give whole numbers .* \(see x --help\)"):
        parser.parse_args(["--ranks=0"])


OLD = [  # module, old spelling, what the note names, attributes of the options
    ("mpidp.generate", ["run", "--data", "shards"], "--tokenizer", {"tokenizer": "shards"}),
    ("mpidp.evaluate", ["run", "--text", "t", "--data", "shards"], "--tokenizer", {"tokenizer": "shards", "data": None}),
    ("mpidp.evaluate", ["run", "--choices", "c", "--data", "shards"], "--tokenizer", {"tokenizer": "shards", "data": None}),
    ("mpidp.export", ["run", "hf"], "--out", {"run": "run", "out": "hf"}),
    ("mpidp.export", ["run", "--format", "hf", "out"], "--out", {"run": "run", "out": "out"}),
    ("data_tools.convert", ["--to", "megatron", "shards", "there/mine"], "--out", {"out": "there/mine"}),
    ("data_tools.convert", ["--from", "megatron", "mine", "--tokenizer", "byte", "back"], "--out", {"out": "back"}),
]


@pytest.mark.parametrize(("module", "words", "new", "wanted"), OLD)
def test_old_spellings_work_and_name_the_new_one(
    module: str, words: list[str], new: str, wanted: dict[str, str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    options = importlib.import_module(module).read_options(words)
    assert {key: getattr(options, key) for key in wanted} == wanted
    note = capsys.readouterr().err
    assert note.count("\n") == 1 and note.startswith("note: ") and f"use {'RUN ' * (module == 'mpidp.export')}{new}" in note


NEW = [
    ("mpidp.generate", ["run", "--tokenizer", "shards"]), ("mpidp.evaluate", ["run", "--text", "t", "--tokenizer", "shards"]),
    ("mpidp.evaluate", ["run", "--data", "shards"]), ("mpidp.export", ["run", "--out", "hf"]),
    ("data_tools.convert", ["--to", "megatron", "shards", "--out", "there/mine"]),
]


@pytest.mark.parametrize(("module", "words"), NEW)
def test_new_spellings_need_no_note(module: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module(module).read_options(words)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("module", "words", "why"), [
    ("mpidp.export", ["run"], "--out DIR"), ("mpidp.export", ["run", "a", "--out", "b"], "once, with --out"),
    ("data_tools.convert", ["--to", "megatron", "shards"], "--out PATH"),
    ("mpidp.evaluate", ["run", "--tokenizer", "t"], "--tokenizer works only with --text, --choices or --tasks"),
    ("mpidp.train", ["--dry-run=1"], "dry-run"), ("mpidp.train", ["--dry"], "--dry has no value"),
    ("mpidp.train", ["a.toml", "b.toml"], "a.toml: "),
])
def test_wrong_words(module: str, words: list[str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        importlib.import_module(module).read_options(words)


def test_settings_of_train_in_any_order(tmp_path: Path) -> None:
    from mpidp.train import read_options

    (tmp_path / "c.toml").write_text("[train]\nsteps = 7\n")
    orders = [
        ["--train.save_every", "-1", "c.toml", "--optim.lr=1e-4"],
        ["c.toml", "--dry-run", "--optim.lr", "1e-4", "--train.save_every=-1"],
    ]
    for words in orders:
        options, config = read_options([str(tmp_path / word) if word == "c.toml" else word for word in words])
        assert (config.train.steps, config.train.save_every, config.optim.lr) == (7, -1, 1e-4)
        assert options.dry_run == ("--dry-run" in words)


def test_messages_follow_mpidp_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {"debug": "di", "info": "i", "": "i", "WARNING": "", "error": ""}
    for level, letters in shown.items():
        monkeypatch.setenv(logs.VARIABLE, level)
        logs.set_level()
        logs.log.debug("%s", "d")
        logs.log.info("i")
        logs.log.warning("w %d", 1)
        logs.log.error("e")
        printed = capsys.readouterr()
        assert printed.out.replace("\n", "") == letters, level
        assert printed.err == ("e\n" if level == "error" else "w 1\ne\n")
    monkeypatch.setenv(logs.VARIABLE, "warn")
    with pytest.raises(UsageError, match=r"MPIDP_LOG=warn is not one of debug, info, warning, error; did you mean 'warning'\?"):
        logs.set_level()
    monkeypatch.undo()
    logs.set_level()
    assert logs.log.level == logging.INFO


def test_the_settings_that_differ_from_the_defaults() -> None:
    from mpidp.training.run_summary import changed_settings

    config = Config().with_values(train={"steps": 9, "noise_every": 0}, mesh={"sequence": True}, data={"path": "my shards"})
    wanted = "settings that differ from the defaults: 'data.path=my shards' train.steps=9 mesh.sequence=true"
    assert sorted(changed_settings(config)) == sorted(wanted)
    assert changed_settings(Config()) == "settings that differ from the defaults: none"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_parser_knows_the_version(rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m mpidp.train --version` as `mpidp --version`; under mpirun once."""
    monkeypatch.setenv("PMI_RANK", rank)
    with pytest.raises(SystemExit) as ended:
        read_options(["--version"])
    assert not ended.value.code and capsys.readouterr().out == f"mpidp {mpidp.__version__}\n" * (rank == "0")


def test_paths_of_options_begin_at_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only paths, by their metavar: a prompt stays as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser()
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("more", metavar="FILE", nargs="*", type=Path)
    parser.add_argument("--out", metavar="FILE.png", default="~/plot.png")
    parser.add_argument("--prompt", metavar="TEXT")
    found = parser.parse_args(["~/a", "~/b", "c", "--prompt=~/$HOME"])
    assert vars(found) == {"run": "/home/me/a", "more": [Path("/home/me/b"), Path("c")], "out": "/home/me/plot.png",
                           "prompt": "~/$HOME"}
    with pytest.raises(UsageError, match=r"--out=\$HOME/x: \$HOME is not expanded here"):
        parser.parse_args(["a", "--out=$HOME/x"])
