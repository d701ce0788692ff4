"""The command `zoo`: show, train, run, convert, test and time models. Errors are one line; `--debug` shows more.

Each module here has some of the commands: its `add` gives them to the parser, each with the function that runs it.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import zoo
from zoo.cli import checkpoints, evaluation, kernels, models, training
from zoo.errors import unknown_name


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest command where the command is unknown."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line; `run` of what it parses is the command's function, which takes just that."""
    parser = _Parser(prog="zoo", description="Sequence architectures as first-class Hugging Face models.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--version", action="version", version=f"sequence-zoo {zoo.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for module in (models, training, evaluation, checkpoints, kernels):
        module.add(commands)
    parser.set_defaults(known_commands=tuple(commands.choices))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, 1 after an error, or 130 after Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words  # wherever it stands
    words = [word for word in words if word != "--debug"]
    try:
        parser = build_parser()
        command = next((word for word in words if not word.startswith("-")), None)
        if command is not None and command not in parser.get_default("known_commands"):
            raise unknown_name("command", command, parser.get_default("known_commands"))
        parsed, left = parser.parse_known_args(words)
        if any(word.startswith("-") or "=" not in word or "assignments" not in parsed for word in left):
            raise ValueError(f"unrecognized arguments: {' '.join(left)} (see zoo --help)")
        if left:  # argparse takes words of one kind up to the first option, and no more of them behind it
            parsed.assignments += left
        parsed.run(parsed)
    except KeyboardInterrupt:
        print("zoo: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if debug:
            raise
        print(f"zoo: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
