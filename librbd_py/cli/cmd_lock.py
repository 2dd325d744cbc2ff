"""`rbdpy lock ...`: the advisory locks that people take by hand."""

from __future__ import annotations

import sys
from typing import Any

from librbd_py.cli.arguments import FORMAT, IMAGE
from librbd_py.cli.cmd_meta import needed
from librbd_py.cli.failure import Failure, code_of, reason
from librbd_py.cli.output import Rows, Section, Table
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, failing, failures

LOCK_ID = "lock-id:unique lock id"


@verb("lock list", "Show locks held on an image.", *IMAGE, *FORMAT, spec=("image-spec",), alias="lock ls")
def lock_list(session: Session) -> None:
    spec = session.spec()
    session.layout()
    with session.image(spec, read_only=True) as image, failing("listing locks failed"):
        held: Any = image.list_lockers() or {"lockers": []}
    lockers = held["lockers"]
    if not session.plain:
        rows = [
            Section("lock", {"id": cookie, "locker": locker, "address": address}) for locker, cookie, address in lockers
        ]
        session.show(Rows("locks", rows))
        return
    if not lockers:
        return
    one, kind = len(lockers) == 1, "exclusive" if held["exclusive"] else "shared"
    print(f"There {'is' if one else 'are'} {len(lockers)} {kind} lock{'' if one else 's'} on this image.")
    if not held["exclusive"]:
        print(f"Lock tag: {held['tag']}")
    table = Table(("Locker", "left"), ("ID", "left"), ("Address", "left"))
    for locker, cookie, address in lockers:
        table.add(locker, cookie, address)
    sys.stdout.write(table.text())


@verb("lock add", "Take a lock on an image.", *IMAGE, "shared", spec=("image-spec", LOCK_ID))
def lock_add(session: Session) -> None:
    spec, cookie = session.spec(), needed(session, "lock id")
    tag = session.option("shared")
    with session.image(spec) as image:
        try:
            if tag is None:
                image.lock_exclusive(cookie)
            else:
                image.lock_shared(cookie, tag)
        except failures() as error:
            if code_of(error) in (16, 17):
                other = "" if tag is None else " with a different tag"
                text = f"rbd: lock is already held by someone else{other}"
            else:
                text = f"rbd: taking lock failed: {reason(error)}"
            raise Failure(text, code_of(error)) from None


@verb(
    "lock remove",
    "Release a lock on an image.",
    *IMAGE,
    spec=("image-spec", LOCK_ID, "locker:locker client"),
    alias="lock rm",
)
def lock_remove(session: Session) -> None:
    spec, cookie = session.spec(), needed(session, "lock id")
    locker = needed(session, "locker")
    with session.image(spec) as image, failing("releasing lock failed"):
        image.break_lock(locker, cookie)
