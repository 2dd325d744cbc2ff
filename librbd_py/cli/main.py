"""`rbdpy`: verb for verb the `rbd` command, plus serving exports and checking a store."""

from __future__ import annotations

import argparse
import os
import sys
from typing import NoReturn
from urllib.parse import quote

from librbd_py.cli.registry import COMMANDS, Command
from librbd_py.cli.session import Failure, Session

VALUE_GLOBALS = {
    "--store": "store",
    "--conf": "conf",
    "-c": "conf",
    "--cluster": "cluster",
    "--id": "id",
    "--name": "id",
    "-n": "id",
    "--user": "id",
    "--mon_host": "mon",
    "-m": "mon",
    "--keyring": "keyring",
    "-k": "keyring",
    "--keyfile": "keyfile",
    "-K": "keyfile",
}


def load_commands() -> None:
    """Imports the modules that register commands. Late, so that `--version` and completion need no data plane."""
    from librbd_py.cli import (
        cmd_data,
        cmd_devcluster,
        cmd_export,
        cmd_image,
        cmd_libvirt,
        cmd_lock_owner,
        cmd_meta,
        cmd_snap,
        cmd_store,
        cmd_store_copy,
    )

    del cmd_data, cmd_devcluster, cmd_export, cmd_image, cmd_libvirt, cmd_lock_owner, cmd_meta, cmd_snap, cmd_store
    del cmd_store_copy


class Parser(argparse.ArgumentParser):
    """argparse with `rbd`'s words for what is wrong, and its exit status 1."""

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


def primary() -> list[Command]:
    return [command for words, command in sorted(COMMANDS.items()) if words == command.words]


def overview() -> str:
    lines = ["usage: rbdpy [--store STORE] <command> ...", "", "Command-line interface for managing RBD images.", ""]
    lines += ["Positional arguments:", "  <command>"]
    for command in primary():
        alias = "".join(f" ({' '.join(words)})" for words in command.aliases)
        name = " ".join(command.words) + alias
        lines.append(f"    {name:<33} {command.help}")
    lines += [
        "",
        "Optional arguments:",
        "  --store arg                         embedded:/path, a plain path, ceph:/path/to/ceph.conf?user=NAME",
        "                                      or memory:name [default: $RBDPY_STORE or /var/lib/rbdpy]",
        "  -c, --conf arg                      a Ceph cluster's configuration, as --store ceph:arg",
        "  --id arg                            client id (without 'client.' prefix)",
        "",
        "See 'rbdpy help <command>' for help on a specific command.",
    ]
    return "\n".join(lines)


def parser_of(command: Command) -> Parser:
    name = "rbdpy " + " ".join(command.words)
    parser = Parser(prog=name, description=command.help, add_help=False, allow_abbrev=True)
    parser.add_argument("specs", nargs="*", metavar=" ".join(f"<{spec}>" for spec in command.specs) or "none")
    parser.set_defaults(format="plain", pretty_format=False)
    for add in command.options:
        add(parser)
    return parser


def split_globals(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Options that any command takes, wherever they stand, and the rest. Failure when a value is missing."""
    rest: list[str] = []
    found: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if word == "--":
            rest += [word, *words]
        elif name in VALUE_GLOBALS and not (name == "--name" and "export" in rest):
            if not equals:
                following = next(words, None)
                if following is None:
                    raise Failure(f"rbd: the required argument for option '{name}' is missing")
                value = following
            found[VALUE_GLOBALS[name]] = value
        else:
            rest.append(word)
    return rest, found


def find(words: list[str]) -> tuple[Command | None, list[str]]:
    """The longest command that `words` begin with (options may stand before it), and the remaining words."""
    before: list[str] = []
    while words and words[0].startswith("-") and words[0] != "--":
        before.append(words[0])
        takes_value = "=" not in words[0] and words[0] in (
            "-p",
            "--pool",
            "--image",
            "--snap",
            "--namespace",
            "--format",
        )
        if takes_value and len(words) > 1:
            before.append(words[1])
            words = words[1:]
        words = words[1:]
    for length in (3, 2, 1):
        command = COMMANDS.get(tuple(words[:length])) if len(words) >= length else None
        if command:
            return command, before + words[length:]
    return None, words


def unknown(words: list[str]) -> NoReturn:
    groups = {command[0] for command in COMMANDS if len(command) > 1}
    shown = " ".join(words[:2]) if words[0] in groups else words[0]
    raise Failure(f"error: unknown option '{shown}'\n\n{overview()}")


def run(argv: list[str]) -> None:
    words, found = split_globals(argv)
    if words == ["--version"] or words == ["-v"]:
        from importlib.metadata import version

        print(f"rbdpy {version('librbd-py')}")
        return
    if words[:1] == ["completion"]:
        from librbd_py.cli import completion

        print(completion.script(), end="")
        return
    load_commands()
    if words and words[0] in ("help", "--help", "-h"):
        command = find(words[1:])[0]
        if words[1:] and command is None:
            unknown(words[1:])
        print(parser_of(command).format_help() if command else overview())
        return
    if not words:
        raise Failure(overview())
    command, rest = find(words)
    if command is None:
        unknown(words)
    if "--help" in rest or "-h" in rest:
        print(parser_of(command).format_help())
        return
    options = parser_of(command).parse_intermixed_args(rest)
    if len(options.specs) > len(command.specs) and not command.many:
        raise Failure("rbd: too many arguments")
    options.store = store_of(found)
    session = Session(options)
    try:
        command.run(session)
        sys.stdout.flush()
    finally:
        session.close()


def store_of(found: dict[str, str]) -> str | None:
    """The store's URL, with what was said of the cluster in it: a daemon takes it as it is. None: the default."""
    conf = found.get("conf", "")
    store = found.get("store") or (f"ceph:{quote(conf)}" if conf else None)
    words = {"user": found.get("id", ""), "mon_host": found.get("mon", "")}
    words |= {option: found.get(option, "") for option in ("keyring", "keyfile")}
    said = "&".join(f"{option}={quote(value, safe='/:,')}" for option, value in words.items() if value)
    url = store or os.environ.get("RBDPY_STORE", "")
    if said and url.partition("?")[0].partition(":")[0] == "ceph":
        return url + ("&" if "?" in url else "?") + said
    return store


def main(argv: list[str] | None = None) -> int:
    """Exit status as `rbd`'s: 0, the errno of a failed operation, or 1 for a command line it does not understand."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        run(arguments)
    except Failure as failure:
        if str(failure):
            print(failure, file=sys.stderr)
        return failure.code & 0xFF
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to say to a closed pipe
        return 141
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        print(f"rbd: {error.strerror or error}", file=sys.stderr)
        return error.errno or 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
