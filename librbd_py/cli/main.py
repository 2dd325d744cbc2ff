"""`rbdpy`: verb for verb the `rbd` command, plus serving exports and checking a store."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from librbd_py.cli.arguments import option_of, parse, split_globals, words_of
from librbd_py.cli.failure import Failure
from librbd_py.cli.registry import Command, Verb, find
from librbd_py.cli.session import Session


def program() -> str:
    """What usage calls it: `rbd` when that name leads here, so that scripts find what they look for."""
    return "rbd" if os.path.basename(sys.argv[0]) == "rbd" else "rbdpy"


def unknown(words: list[str]) -> NoReturn:
    from librbd_py.cli.usage import overview

    print(overview(program()), end="", flush=True)
    raise Failure(f"error: unknown option '{' '.join(words)}'\n")


def help_of(words: list[str]) -> str:
    from librbd_py.cli import usage

    if not words:
        return usage.overview(program())
    found = find(words)
    if found is None:
        unknown(words)
    made, called = found
    return usage.of_verb(made, called, program()) if isinstance(made, Verb) else usage.of_command(made, program())


def run(argv: list[str]) -> None:
    if "run" in argv[:-1]:  # what follows are the program's own arguments
        at = argv.index("run")
        rest, found, overrides = split_globals(argv[:at])
        if not rest:
            from librbd_py.cli.cmd_run import run_program

            run_program(store_of(found), overrides, argv[at + 1 :])
            return
    arguments, found, overrides = split_globals(argv)
    if argv and argv[0] in ("--version", "-v"):
        from importlib.metadata import version

        print(f"rbdpy {version('librbd-py')}")
        return
    words = words_of(arguments)
    if words[:1] == ["completion"]:
        from librbd_py.cli import completion

        print(completion.script(), end="")
        return
    if not words or words[0] == "help" or "--help" in arguments or "-h" in arguments:
        # as rbd: --help shows the commands; ours shows the one that was meant
        print(help_of(words[words[:1] == ["help"] :]), end="")
        return
    match = find(words)
    if match is None:
        unknown(words)
    made, called = match
    session = _session(made, len(called), arguments, found, overrides)
    try:
        made.run(session)
        sys.stdout.flush()
    finally:
        session.close()


def _session(
    made: Verb | Command, skip: int, arguments: list[str], found: dict[str, str], overrides: dict[str, str]
) -> Session:
    if isinstance(made, Command):
        from librbd_py.cli import extra

        rest = _without(arguments, made.words, skip)
        if made.words == ("vm", "boot") and "name" in found:  # the VM's, not the client's
            rest += ["--name", found.pop("name")]
        session = Session(store_of(found), overrides=overrides)
        session.take(extra.parse(made, rest, program()))
        return session
    keys = [option_of(key) for key in (*made.options, *made.more)]
    given, words = parse(arguments, keys, skip, made.most)
    if "name" in given and not (given.get("nbd") or given.get("vhost-user")):
        found["name"] = given.pop("name")
    return Session(store_of(found), given, words, overrides)


def _without(arguments: list[str], command: tuple[str, ...], skip: int) -> list[str]:
    """The arguments without the words of the command itself."""
    rest = list(arguments)
    for word in command[:skip]:
        if word in rest:
            rest.remove(word)
    return rest


def quote(text: str, safe: str = "/") -> str:
    """Percent-encoded, as `urllib.parse.quote` does: which is imported only for what needs it."""
    if all((char.isalnum() and char.isascii()) or char in "_.-~" or char in safe for char in text):
        return text
    from urllib import parse

    return parse.quote(text, safe)


def store_of(found: dict[str, str]) -> str | None:
    """The store's URL, with what was said of the cluster in it: a daemon takes it as it is. None: the default."""
    if not found:
        return None
    conf = found.get("conf", "")
    store = found.get("store") or (f"ceph:{quote(conf)}" if conf else None)
    user = found.get("id") or found.get("name", "").removeprefix("client.")
    words = {"user": user, "mon_host": found.get("mon", "")}
    words |= {option: found.get(option, "") for option in ("keyring", "keyfile")}
    said = "&".join(f"{option}={quote(value, safe='/:,')}" for option, value in words.items() if value)
    # Who names a monitor means a cluster; everything else a script may say whatever the store is.
    url = store or os.environ.get("RBDPY_STORE") or ("ceph" if words["mon_host"] or os.environ.get("CEPH_CONF") else "")
    if said and url.partition("?")[0].partition(":")[0] == "ceph":
        return url + ("&" if "?" in url else "?") + said
    return store


def main(argv: list[str] | None = None) -> int:
    """Exit status as `rbd`'s: 0, the errno of a failed operation, or 1 for a command line it does not understand."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        run(arguments)
    except Failure as failure:
        sys.stdout.flush()
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
    except Exception as error:
        from librbd_py.cli.failure import code_of, reason
        from librbd_py.cli.session import failures

        if not isinstance(error, failures()):
            raise
        print(f"rbd: {reason(error)}", file=sys.stderr)  # where a verb expects nothing to fail: damaged records
        return code_of(error) & 0xFF
    return 0


if __name__ == "__main__":
    sys.exit(main())
