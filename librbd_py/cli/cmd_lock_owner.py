"""`rbdpy lock why` and `rbdpy lock take`: who holds an image, and taking its lock safely. `rbd` has neither."""

from __future__ import annotations

import argparse
import time
from typing import Any

from librbd_py.cli.output import Rows, Section
from librbd_py.cli.registry import command, with_format, with_image
from librbd_py.cli.session import Failure, Session, code_of, failing
from librbd_py.format.who import NEVER, Answer
from librbd_py.image import ownership
from librbd_py.image.ownership import Owner, Ownership, Watching


def with_take(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force",
        action="store_true",
        help="fence an owner that refuses or does not answer (embedded store: kills its process)",
    )
    parser.add_argument(
        "--timeout", type=float, default=ownership.TAKE_SECONDS, help="how long to ask, in seconds [default: 60]"
    )


@command(
    "lock why", "Show who owns an image's lock and what a take-over would do.", with_image, with_format,
    specs=("image-spec",),
)  # fmt: skip
def lock_why(session: Session) -> None:
    spec = session.spec()
    with session.image(spec, read_only=True) as image, failing("looking at the lock failed"):
        found = ownership.look(image.handle)
        name, number = spec.text(), image.handle.id
    if session.plain:
        print("\n".join(plain(name, number, found)))
    else:
        session.show(section(name, number, found))


@command(
    "lock take", "Take an image's lock from its owner, and leave it free.", with_image, with_take,
    specs=("image-spec",),
)  # fmt: skip
def lock_take(session: Session) -> None:
    options = session.options
    if not options.timeout > 0:
        raise Failure("rbd: the timeout must be positive", 22)
    with session.image(session.spec()) as image:
        try:
            ownership.take(
                image.handle, lambda step: print(step, flush=True), force=options.force, timeout=options.timeout
            )
        except OSError as error:
            hint = " (--force fences it)" if error.errno in (30, 110) and not options.force else ""
            raise Failure(f"rbd: taking the lock failed: {error.strerror}{hint}", code_of(error)) from None


# --- for people


def age(milliseconds: int) -> str:
    """`0.4 s`, `12 s`, `3 min`, `5.2 h`, `12 days`."""
    seconds = milliseconds / 1000
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.0f} days"


def plain(name: str, number: str, found: Ownership) -> list[str]:
    lines = [f"image:      {name} (id {number})"]
    owner = found.owner
    if owner is None:
        lines.append("owner:      nobody")
    else:
        lines += _owner_lines(owner)
    for watching in found.others:
        lines.append(f"also there: client.{watching.gid} at {watching.address}: {_described(watching)}")
    lines.append(f"take-over:  {found.sentence}")
    return lines


def _owner_lines(owner: Owner) -> list[str]:
    lines = [f"owner:      {owner.client} at {owner.address}, cookie {_printable(owner.cookie)}"]
    answer, watching = owner.answer, owner.watching
    if answer is not None:
        lines.append(f"process:    {ownership.named(answer)}")
        lines += [f"{key + ':':<11} {value}" for key, value in answer.about.items()]
    elif owner.process is not None:
        lines.append(f"process:    pid {owner.process.pid} on this machine")
    elif watching is not None and watching.answered:
        lines.append("process:    not a client of rbdpy: it does not say who it is")
    silence = owner.process.silence if owner.process is not None else None
    if watching is None:
        lines.append("watch:      gone" + (f"; silent for {age(int(silence * 1000))}" if silence is not None else ""))
    else:
        since = f" for {age(answer.watch_age)}" if answer is not None and answer.watch_age != NEVER else ""
        lines.append(f"watch:      there{since}" + ("" if watching.answered else ", but nobody answers"))
    if answer is not None:
        lines += _answer_lines(answer)
    until = owner.blocklisted
    fenced = "no" if until is None else f"yes, for {age(int((until - time.time()) * 1000))} more"
    lines.append(f"fenced:     {fenced}")
    return lines


def _answer_lines(answer: Answer) -> list[str]:
    held = f" for {age(answer.lock_age)}" if answer.lock_age != NEVER else ""
    last = f"{answer.io_kind} {age(answer.io_age)} ago" if answer.io_age != NEVER else "none"
    lines = [f"lock:       held{held}, policy {answer.policy} ({answer.state})"]
    lines.append(f"last I/O:   {last}; {answer.in_flight} in flight, {answer.parked} parked")
    for who in answer.waiting:
        lines.append(f"waiting:    client.{who.gid}, asked {age(who.age)} ago")
    return lines


def _described(watching: Watching) -> str:
    answer = watching.answer
    if answer is not None:
        about = "".join(f", {key} {value}" for key, value in answer.about.items())
        return ("stand-by, " if answer.stand_by else "") + ownership.named(answer) + about
    where = "" if watching.process is None else f", pid {watching.process.pid} on this machine"
    return ("not a client of rbdpy" if watching.answered else "does not answer") + where


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


# --- for programs


def section(name: str, number: str, found: Ownership) -> Section:
    shown = Section("ownership", {"image": name, "id": number})
    owner = found.owner
    if owner is not None:
        held = Section(
            "owner",
            {
                "client": owner.client,
                "address": owner.address,
                "cookie": _printable(owner.cookie),
                "watch": "gone" if owner.watching is None else "there" if owner.watching.answered else "silent",
                "blocklisted": _yes(owner.blocklisted is not None),
            },
        )
        if owner.process is not None:
            held["pid"] = owner.process.pid
        if owner.offered_to is not None:
            held["offered_to"] = owner.offered_to
        if owner.answer is not None:
            held |= _answer(owner.answer)
        shown["owner"] = held
    rows = []
    for watching in found.others:
        row = Section("watcher", {"client": f"client.{watching.gid}", "address": watching.address})
        row["answered"] = _yes(watching.answered)
        if watching.process is not None:
            row["pid"] = watching.process.pid
        rows.append(Section("watcher", row | (_answer(watching.answer) if watching.answer is not None else {})))
    shown["watchers"] = Rows("watchers", rows)
    shown["take_over"] = Section("take_over", {"outcome": found.outcome.value, "text": found.sentence})
    return shown


def _answer(answer: Answer) -> dict[str, Any]:
    """Ages in seconds; what never was is left out."""
    ages = {"watch_age": answer.watch_age, "lock_age": answer.lock_age, "last_io_age": answer.io_age}
    about = [Section("fact", {"key": key, "value": value}) for key, value in answer.about.items()]
    waiting = [Section("peer", {"client": f"client.{who.gid}", "asked": who.age / 1000}) for who in answer.waiting]
    return {
        "host": answer.host,
        "pid": answer.pid,
        "program": answer.program,
        "state": answer.state,
        "policy": answer.policy,
        "stand_by": _yes(answer.stand_by),
        **{key: value / 1000 for key, value in ages.items() if value != NEVER},
        "last_io": answer.io_kind,
        "in_flight": answer.in_flight,
        "parked": answer.parked,
        "about": Rows("about", about),
        "waiting": Rows("waiting", waiting),
    }


def _yes(value: bool) -> str:
    return "true" if value else "false"
