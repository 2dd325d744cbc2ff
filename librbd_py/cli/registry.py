"""The commands. A module registers its own when it is imported; `MODULES` says which one a first word needs, so that a
command loads only what it uses.

`verb` is for commands of `rbd`, read and explained as `rbd` does (`arguments`, `usage`); `command` is for what
`rbdpy` has on top, with argparse.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import argparse

    from librbd_py.cli.session import Session

AddOptions = Callable[["argparse.ArgumentParser"], None]
Run = Callable[["Session"], None]

# first word of a command -> modules of librbd_py.cli that may know it
MODULES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("list", "ls", "info", "status", "watch", "children"), ("cmd_list",)),
    **dict.fromkeys(("create", "clone", "copy", "cp", "deep", "remove", "rm", "rename", "mv"), ("cmd_image",)),
    **dict.fromkeys(("resize", "flatten", "sparsify", "object-map"), ("cmd_maintain",)),
    **dict.fromkeys(("diff", "disk-usage", "du"), ("cmd_data",)),
    **dict.fromkeys(("bench",), ("cmd_bench",)),
    **dict.fromkeys(("import", "import-diff", "export", "export-diff", "merge-diff"), ("cmd_stream",)),
    **dict.fromkeys(("image-meta", "feature"), ("cmd_meta",)),
    **dict.fromkeys(("lock",), ("cmd_lock", "cmd_lock_owner")),
    **dict.fromkeys(("namespace", "pool"), ("cmd_pool",)),
    **dict.fromkeys(("config",), ("cmd_config",)),
    **dict.fromkeys(("snap",), ("cmd_snap",)),
    **dict.fromkeys(("trash",), ("cmd_trash", "cmd_schedule")),
    **dict.fromkeys(("group",), ("cmd_group",)),
    **dict.fromkeys(("migration",), ("cmd_migration",)),
    **dict.fromkeys(("perf",), ("cmd_perf",)),
    **dict.fromkeys(("store",), ("cmd_store", "cmd_store_copy")),
    **dict.fromkeys(("devcluster",), ("cmd_devcluster",)),
    **dict.fromkeys(("libvirt",), ("cmd_libvirt",)),
    **dict.fromkeys(("run",), ("cmd_run",)),
    **dict.fromkeys(("host",), ("cmd_host",)),
    **dict.fromkeys(("backup",), ("cmd_backup",)),
    **dict.fromkeys(("source",), ("cmd_source",)),
    **dict.fromkeys(("vm",), ("cmd_vm",)),
}


class Verb(NamedTuple):
    words: tuple[str, ...]
    help: str
    run: Run
    options: tuple[str, ...]  # keys of arguments.option_of
    positional: tuple[str, ...]  # keys of usage.POSITIONAL, or `name:text`
    alias: tuple[str, ...] = ()
    notes: str = ""  # printed below the options
    shown: bool = True
    more: tuple[str, ...] = ()  # options of rbdpy on top of rbd's

    @property
    def most(self) -> int:
        """How many positional arguments it takes; -1: any number."""
        return -1 if self.positional and self.positional[-1].endswith("...") else len(self.positional)


class Command(NamedTuple):
    words: tuple[str, ...]
    help: str
    run: Run
    options: tuple[AddOptions, ...]
    specs: tuple[str, ...]  # names of the positional arguments, for usage
    aliases: tuple[tuple[str, ...], ...] = ()
    many: bool = False  # the last positional may repeat


COMMANDS: dict[tuple[str, ...], Verb | Command] = {}  # by words and by every alias


def verb(
    words: str,
    help: str,
    *options: str,
    spec: tuple[str, ...] = (),
    alias: str = "",
    notes: str = "",
    shown: bool = True,
    more: tuple[str, ...] = (),
) -> Callable[[Run], Run]:
    """Decorator: registers `run` as a command of `rbd`."""

    def register(run: Run) -> Run:
        made = Verb(tuple(words.split()), help, run, options, spec, tuple(alias.split()), notes, shown, more)
        COMMANDS[made.words] = made
        if alias:
            COMMANDS[made.alias] = made
        return run

    return register


def command(
    words: str,
    help: str,
    *options: AddOptions,
    specs: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    many: bool = False,
) -> Callable[[Run], Run]:
    """Decorator: registers `run` under `words` and `aliases`, with options that argparse reads."""

    def register(run: Run) -> Run:
        names = tuple(tuple(alias.split()) for alias in aliases)
        made = Command(tuple(words.split()), help, run, options, specs, names, many)
        for key in (made.words, *names):
            COMMANDS[key] = made
        return run

    return register


def load(word: str | None) -> None:
    """Imports the modules that commands beginning with `word` need; None: all."""
    names = MODULES.get(word, ()) if word is not None else sorted({n for group in MODULES.values() for n in group})
    for name in names:
        import_module(f"librbd_py.cli.{name}")


def find(words: list[str]) -> tuple[Verb | Command, tuple[str, ...]] | None:
    """The longest command that `words` begin with, and the words it was called by."""
    load(words[0])
    for length in (4, 3, 2, 1):
        key = tuple(words[:length])
        if len(key) == length and key in COMMANDS:
            return COMMANDS[key], key
    return None


def everything() -> list[Verb | Command]:
    load(None)
    return [made for words, made in sorted(COMMANDS.items()) if words == made.words]


# --- argparse options that several of rbdpy's own commands share


def with_image(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--pool", help="pool name")
    parser.add_argument("--namespace", help="namespace name")
    parser.add_argument("--image", help="image name")


def with_pool(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-p", "--pool", help="pool name")
    parser.add_argument("--namespace", help="namespace name")


def with_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format", choices=("plain", "json", "xml"), default="plain", help="output format (plain, json, or xml)"
    )
    parser.add_argument("--pretty-format", action="store_true", help="pretty formatting (json and xml)")


def with_progress(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-progress", action="store_true", help="disable progress output")
