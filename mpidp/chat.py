"""Talks with a model on the terminal (`[mpirun -np N] python -m mpidp.chat RUN [--system TEXT]`), or answers a file of chats
(`[mpirun -np N] python -m mpidp.chat RUN --messages FILE --out FILE`)."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mpidp.inference.generation import generate, write_rows
from mpidp.runtime.command import Parser, begin, run_entry
from mpidp.runtime.options import (
    add_batch,
    add_compute,
    add_out,
    add_run,
    add_sampling,
    add_seq_len,
    add_tokenizer,
    check_sampling,
    program,
)

HELP = "/reset: forget the chat; /help: show this line; /quit, /exit or Ctrl-D: leave; Ctrl-C: stop the answer"


def main() -> None:
    """Answer a file of chats, or the messages that are read from standard input. Collective over COMM_WORLD."""
    options, world = begin(lambda: read_options(sys.argv[1:]))
    if options.messages is not None:
        write_rows(Path(options.out), [_with_answer(row) for row in generate(world, options)], world)
    else:
        talk(world, options)


def read_options(arguments: list[str]) -> argparse.Namespace:
    """Parse and check the command line. Raises UsageError if the command line is invalid. Pure."""
    parser = Parser(
        prog=program("mpidp.chat"), usage="[mpirun -np N] %(prog)s RUN [--messages FILE --out FILE] [options]",
        description="Talk with a model on the terminal, in its own chat template. Each line of standard input is a message. "
        f"{HELP}.",
    )
    add = parser.add_argument
    add_run(parser)
    add("--system", metavar="TEXT", help="the system message")
    add("--messages", metavar="FILE", help="answer a file of chats instead: rows with a list 'messages' of {role, content}, "
        "or rows of ShareGPT or Alpaca (.jsonl, .json, .parquet). The chats are divided among the ranks")
    add_out(parser, "with --messages: the file to write. Each row is a chat whose last message is the answer", "FILE")
    add_batch(parser, "chats of --messages")
    add_sampling(parser)
    add_seq_len(parser)
    add_tokenizer(parser)
    add_compute(parser)
    options = parser.parse_args(arguments)
    check_sampling(parser, options)
    if (options.messages is None) != (options.out is None):
        parser.error("--messages and --out must be given together")
    if options.messages is not None and options.system is not None:
        parser.error("--system cannot be combined with --messages. Write the system message into the rows")
    if options.seq_len < 0:
        parser.error(f"--seq-len {options.seq_len} must not be negative")
    if options.batch < 1 or options.tokens < 1:
        parser.error("--batch and --tokens must be at least 1")
    options.prompts, options.prompt, options.chat, options.special = options.messages, None, True, None
    return options


def _with_answer(row: dict[str, Any]) -> dict[str, Any]:
    from mpidp.inference.chats import messages_of

    answer = {"role": "assistant", "content": row.pop("text")}
    return row | {"messages": [*messages_of(row), answer]}


def talk(world: Any, options: argparse.Namespace) -> None:
    """Read messages from standard input of rank 0, and print each answer while it is generated. Return at the end of the
    input. Collective over world.

    Raises UsageError if the model has no chat template, or if there are more ranks than --tp times --pp. Raises DataError if a
    logit is not finite, and CheckpointError if the run has no valid checkpoint.
    """
    from mpidp.errors import UsageError
    from mpidp.inference.chats import template_of
    from mpidp.inference.conversation import Conversation
    from mpidp.inference.decode import continue_prompts
    from mpidp.inference.loading import open_model
    from mpidp.inference.sampling import Sampling, seed_of
    from mpidp.model.rowwise import by_rows
    from mpidp.runtime.world import polite_barrier, raise_together

    if world.size > options.tp * options.pp:
        raise UsageError.on_every_rank(
            f"a chat on the terminal uses only --tp times --pp ranks, but {world.size} ranks were started. Start "
            f"{options.tp * options.pp}, or give the chats in a file (--messages FILE --out FILE)"
        )
    reader, loaded, encoder = open_model(options, world, "tokens")
    conversation = None
    with raise_together(world):
        template = template_of(encoder.table, options.run, time.time())
        conversation = Conversation(template, encoder, reader.meta["config"]["model.seq_len"], options.tokens, options.system)
    if options.exact == "true":
        by_rows(loaded.model)
    sampling, screen, number = Sampling(options.temperature, options.top_k, options.top_p), Screen(world.rank == 0), 0
    screen.say(HELP)
    while True:
        turn = screen.next_turn(conversation) if world.rank == 0 else None
        polite_barrier(world)
        turn = world.bcast(turn)
        if turn is None:
            return
        with ctrl_c() as pressed:
            def interrupted(pressed: Callable[[], bool] = pressed) -> bool:
                return pressed() if world.size == 1 else bool(world.bcast(pressed()))

            ((_, answer),) = continue_prompts(
                loaded, encoder, {0: turn.ids}, sampling, turn.tokens, seed_of(options.seed, number), options.stop,
                screen.write if world.rank == 0 else None, interrupted,
            )
        number += 1
        conversation.answered(answer.text)
        full = answer.ended == "tokens" and turn.tokens < options.tokens
        screen.end(" (the context is full)" if full else " (stopped by --tokens)" if answer.ended == "tokens" else "")


class Screen:
    """The standard input and output of rank 0. Hints are shown only on a terminal. Problems are printed to standard error.
    Independent."""

    def __init__(self, shows: bool) -> None:
        """`shows`: whether this rank prints."""
        self._shows, self._hints = shows, shows and sys.stdin.isatty()
        if self._hints:
            with suppress(ImportError):
                import readline  # noqa: F401 - lets input() edit lines

    def next_turn(self, conversation: Any) -> Any:
        """Return the next Turn of the conversation, or None at the end of the input. Commands in the input, such as /reset, are
        executed."""
        from mpidp.errors import DataError

        while (text := self._line()) is not None:
            command = text.strip()
            if command in ("/exit", "/quit"):
                return None
            if command in ("/reset", "/help"):
                if command == "/reset":
                    conversation.reset()
                self.say("the chat is forgotten" if command == "/reset" else HELP)
            elif command:
                try:
                    turn = conversation.ask(text)
                except DataError as error:
                    print(f"mpidp: {error}", file=sys.stderr, flush=True)
                    continue
                if turn.left_out:
                    print(f"note: the first {turn.left_out} messages no longer fit into the context and are forgotten",
                          file=sys.stderr, flush=True)
                return turn
        return None

    def _line(self) -> str | None:
        while True:
            try:
                if self._hints:
                    return input("> ")
                line = sys.stdin.readline()
                return line.removesuffix("\n") if line else None
            except EOFError:
                print()
                return None
            except KeyboardInterrupt:  # on a terminal, Ctrl-C discards only this line
                if not self._hints:
                    return None
                print()
                self.say(HELP)

    def say(self, text: str) -> None:
        """Show a hint, but only on a terminal."""
        if self._hints:
            print(f"({text})", flush=True)

    def write(self, piece: str) -> None:
        """Print a piece of an answer."""
        print(piece, end="", flush=True)

    def end(self, why: str) -> None:
        """End the output of an answer. `why`: the reason for its end, which is shown only on a terminal."""
        if self._shows:
            print(why if self._hints else "", flush=True)


@contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """Return a context in which Ctrl-C (SIGINT) does not raise KeyboardInterrupt. The context yields a function that returns
    whether Ctrl-C was pressed. Independent."""
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    run_entry(main)
