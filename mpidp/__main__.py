"""`mpidp COMMAND ...` and `python -m mpidp COMMAND ...` start a command. Only the module of
this command is imported."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from types import ModuleType

from mpidp import __version__
from mpidp.errors import EXIT_CODES, UsageError
from mpidp.runtime.command import run_entry
from mpidp.runtime.environment import launcher_rank

COMMANDS = {  # name of the command: (module, what the command does)
    "prepare": ("data_tools.prepare", "convert text to shards of tokens"),
    "inspect": ("data_tools.inspect", "show the sizes of shards and the beginning of their text"),
    "verify": ("data_tools.verify", "check every checksum and every token id of shards"),
    "convert": ("data_tools.convert", "convert between shards and other formats of token data"),
    "train": ("mpidp.train", "train a model, or resume a run"),
    "evaluate": ("mpidp.evaluate", "compute the loss, multiple-choice accuracy, or the metrics of lm-eval tasks"),
    "generate": ("mpidp.generate", "generate text"),
    "chat": ("mpidp.chat", "talk with a model on the terminal, or answer a file of chats"),
    "export": ("mpidp.export", "write a model as a Hugging Face folder or a .gguf file"),
    "plan": ("mpidp.plan", "predict the training time for numbers of ranks, methods or meshes"),
    "replay": ("mpidp.replay", "recompute steps of a run and compare the results with its log"),
    "report": ("mpidp.report", "write one HTML page about runs"),
    "doctor": ("mpidp.doctor", "check the launch, the machines and the folders"),
}


def help_text() -> str:
    """Return the help text, with the list of commands and the table of exit codes. Pure."""
    return "\n".join([
        "usage: [mpirun -np N] mpidp COMMAND [ARGUMENTS]      or: python -m mpidp COMMAND [ARGUMENTS]", "",
        "Train Transformer language models over MPI. In the default mode, the weights do not depend on the number of ranks.", "",
        "commands (`mpidp COMMAND --help` lists the options of a command):",
        *(f"  {name:<10} {about}" for name, (_, about) in COMMANDS.items()), "",
        "options:",
        "  -h, --help  show this text",
        "  --version   show the version", "",
        "exit codes:",
        *(f"  {code:<3} {meaning}" for code, meaning in EXIT_CODES.items()), "",
        "MPIDP_LOG=debug, info (default), warning or error selects the messages that are printed.",
    ])


def module_of(command: str) -> ModuleType:
    """Import and return the module whose main() runs a command. If the command is a package, its module is PACKAGE.__main__.
    Independent."""
    name, _ = COMMANDS[command]
    spec = importlib.util.find_spec(name)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return importlib.import_module(f"{name}.__main__" if is_package else name)


def main() -> None:
    """Start the command that the first argument names. Collective over COMM_WORLD if this command is collective."""
    if not sys.argv[1:]:
        raise UsageError(f"no command is given: choose one of {', '.join(COMMANDS)} (see mpidp --help)")
    command = sys.argv[1]
    if command in ("-h", "--help", "help", "--version"):
        if launcher_rank() == 0:
            print(f"mpidp {__version__}" if command == "--version" else help_text())
        return
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.0)[0]
        raise UsageError(f"there is no command {command!r}; did you mean {nearest!r}? (mpidp --help lists the commands)")
    sys.argv[:2] = [f"mpidp {command}"]
    module_of(command).main()


def run() -> None:
    """Start a command, and exit with its exit code. The installed script `mpidp` calls this function."""
    run_entry(main)


if __name__ == "__main__":
    run()
