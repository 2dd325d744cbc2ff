"""argparse for the commands that `rbd` does not have, with `rbd`'s words for what is wrong and its exit status 1."""

from __future__ import annotations

import argparse
from typing import NoReturn

from librbd_py.cli.failure import Failure
from librbd_py.cli.registry import Command


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            first = message.removeprefix("unrecognized arguments: ").split()[0]
            message = f"unrecognised option '{first}'" if first.startswith("-") else "too many arguments"
        elif message.startswith("argument "):
            option = message.removeprefix("argument ").split(":")[0].split("/")[-1]
            if "expected one argument" in message:
                message = f"the required argument for option '{option}' is missing"
            else:
                message = f"the argument for option '{option}' is invalid"
        raise Failure(f"rbd: {message}")


def parser_of(command: Command, program: str) -> Parser:
    name = f"{program} " + " ".join(command.words)
    parser = Parser(prog=name, description=command.help, add_help=False, allow_abbrev=True)
    parser.add_argument("specs", nargs="*", metavar=" ".join(f"<{spec}>" for spec in command.specs) or "none")
    parser.set_defaults(format="plain", pretty_format=False)
    for add in command.options:
        add(parser)
    return parser


def parse(command: Command, words: list[str], program: str) -> argparse.Namespace:
    """Failure for a command line it does not understand."""
    options = parser_of(command, program).parse_intermixed_args(words)
    if len(options.specs) > len(command.specs) and not command.many:
        raise Failure("rbd: too many arguments")
    return options
