"""The table of commands. A command is a function of a Session with its words, options and help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

from librbd_py.cli.session import Session

AddOptions = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True)
class Command:
    words: tuple[str, ...]
    help: str
    run: Callable[[Session], None]
    options: tuple[AddOptions, ...]
    specs: tuple[str, ...]  # names of the positional arguments, for usage
    aliases: tuple[tuple[str, ...], ...] = ()
    many: bool = False  # the last positional may repeat


COMMANDS: dict[tuple[str, ...], Command] = {}  # by words and by every alias


@dataclass
class _Pending:
    words: str
    help: str
    options: tuple[AddOptions, ...] = ()
    specs: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    many: bool = False
    extra: dict[str, str] = field(default_factory=dict)

    def __call__(self, run: Callable[[Session], None]) -> Callable[[Session], None]:
        words = tuple(self.words.split())
        aliases = tuple(tuple(alias.split()) for alias in self.aliases)
        made = Command(words, self.help, run, self.options, self.specs, aliases, self.many)
        for key in (words, *aliases):
            COMMANDS[key] = made
        return run


def command(
    words: str,
    help: str,
    *options: AddOptions,
    specs: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    many: bool = False,
) -> _Pending:
    """Decorator: registers `run` under `words` and `aliases`."""
    return _Pending(words, help, options, specs, aliases, many)


# --- options that several commands share


def with_image(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--pool", help="pool name")
    parser.add_argument("--namespace", help="namespace name")
    parser.add_argument("--image", help="image name")


def with_pool(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--pool", help="pool name")
    parser.add_argument("--namespace", help="namespace name")


def with_snap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--snap", help="snapshot name")


def with_image_id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-id", help="image id")


def with_dest(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dest-pool", help="destination pool name")
    parser.add_argument("--dest-namespace", help="destination namespace name")
    parser.add_argument("--dest", help="destination image name")


def with_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=("plain", "json", "xml"), default="plain", help="output format (plain, json, or xml)"
    )
    parser.add_argument("--pretty-format", action="store_true", help="pretty formatting (json and xml)")


def with_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-progress", action="store_true", help="disable progress output")


def with_create(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-format", choices=("2",), default="2", help="image format [default: 2]")
    parser.add_argument("--new-format", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--order", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--object-size", help="object size in B/K/M [4K <= object size <= 32M]")
    parser.add_argument("--image-feature", action="append", default=[], help="image features, by name")
    parser.add_argument("--image-shared", action="store_true", help="shared image: no exclusive lock")
    parser.add_argument("--stripe-unit", help="stripe unit in B/K/M")
    parser.add_argument("--stripe-count", type=int, help="stripe count")
    parser.add_argument("--data-pool", help="data pool")
