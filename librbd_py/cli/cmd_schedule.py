"""`trash purge schedule`: on Ceph the manager's module rbd_support keeps and runs it, as for `rbd`; elsewhere the pools
keep it, and `trash purge schedule run` runs it."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from librbd_py.cli.arguments import FORMAT, POOL
from librbd_py.cli.failure import Failure, code_of, reason
from librbd_py.cli.output import Rows, Section, Table
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, failing, failures

if TYPE_CHECKING:
    from librbd_py.image.purge_schedule import Item

_INTERVAL = "interval:schedule interval"
_START = "[start-time]:schedule start time"
_COMMAND = "rbd trash purge schedule "


def _level(session: Session) -> tuple[str, str]:
    """Pool and namespace, which may be said together. Failure (22): a namespace without a pool."""
    pool, namespace = session.given.get("pool", ""), session.given.get("namespace", "")
    if "/" in pool and not namespace:
        pool, _, namespace = pool.partition("/")
    if namespace and not pool:
        pool = "rbd"
    return pool, namespace


def _on_ceph(session: Session) -> bool:
    from librbd_py.store.rados import RadosStore

    return isinstance(session.cluster.store, RadosStore)


def _ask(session: Session, verb: str, **words: str) -> str:
    """What the manager answers; its words and errno when it refuses."""
    pool, namespace = _level(session)
    spec = "" if not pool else f"{pool}/" + (f"{namespace}/" if namespace else "")
    command = json.dumps({"prefix": _COMMAND + verb, "level_spec": spec, **words})
    try:
        code, out, status = session.cluster.mgr_command(command, b"")
    except failures() as error:
        raise Failure(f"rbd: {reason(error)}", code_of(error)) from None
    if code < 0:
        said = f": {status.strip()}" if status else ""
        raise Failure(f"rbd: {_COMMAND}{verb} failed: {reason(-code)}{said}", -code)
    return out.decode() if isinstance(out, bytes) else out


def _words(session: Session) -> dict[str, str]:
    interval, start = session.word(), session.word()
    return ({"interval": interval} if interval else {}) | ({"start_time": start} if start else {})


def _item(words: dict[str, str]) -> Item:
    from librbd_py.image.purge_schedule import Item

    return Item.parse(words["interval"], words.get("start_time", ""))


@verb("trash purge schedule add", "Add trash purge schedule.", *POOL, spec=(_INTERVAL, _START))
def add(session: Session) -> None:
    words = _words(session)
    if not words:
        raise Failure("rbd: missing 'interval' argument", 22)
    if _on_ceph(session):
        _ask(session, "add", **words)
        return
    from librbd_py.image import purge_schedule

    with failing("add schedule failed"):
        purge_schedule.change(session.cluster.store, *_level(session), _item(words), None)


@verb(
    "trash purge schedule remove",
    "Remove trash purge schedule.",
    *POOL,
    spec=("[interval]:schedule interval", _START),
    alias="trash purge schedule rm",
)
def remove(session: Session) -> None:
    words = _words(session)
    if _on_ceph(session):
        _ask(session, "remove", **words)
        return
    from librbd_py.image import purge_schedule

    with failing("remove schedule failed"):
        item = _item(words) if words else None
        purge_schedule.change(session.cluster.store, *_level(session), None, item)


@verb(
    "trash purge schedule list",
    "List trash purge schedule.",
    *POOL,
    "recursive",
    *FORMAT,
    alias="trash purge schedule ls",
)
def list_schedules(session: Session) -> None:
    session.layout()
    deep = bool(session.option("recursive"))
    rows: list[tuple[str, str, list[dict[str, str]]]] = []
    if _on_ceph(session):
        found = json.loads(_ask(session, "list") or "{}")
        pool, namespace = _level(session)
        asked = (pool or "-", namespace or "-")
        for entry in found.values():
            parts = [*entry["name"].split("/"), "", ""]
            where = (parts[0] or "-", parts[1] or "-")
            if deep or where == asked:
                rows.append((*where, entry["schedule"]))
    else:
        from librbd_py.image import purge_schedule

        with failing("list schedule failed"):
            listed = purge_schedule.listed(session.cluster.store, *_level(session), deep)
            rows = [(pool, space, [item.row() for item in items]) for pool, space, items in listed]
    if deep:
        _show_all(session, rows)
        return
    if not rows:
        raise Failure("", 2)
    items = rows[0][2]
    if session.plain:
        print("\n".join(_text(item) for item in items))
        return
    session.show(Rows("items", [Section("item", dict(item)) for item in items]))


def _text(item: dict[str, Any]) -> str:
    return f"every {item['interval']}" + (f" starting at {item['start_time']}" if item.get("start_time") else "")


def _show_all(session: Session, rows: list[tuple[str, str, list[dict[str, str]]]]) -> None:
    if not session.plain:
        shown = Rows("schedules")
        for pool, space, items in rows:
            listed = Rows("items", [Section("item", dict(item)) for item in items])
            shown.append(Section("schedule", {"pool": pool, "namespace": space, "items": listed}))
        session.show(shown)
        return
    if rows:
        table = Table(("POOL", "left"), ("NAMESPACE", "left"), ("SCHEDULE", "left"))
        for pool, space, items in rows:
            table.add(pool, space, ", ".join(_text(item) for item in items))
        sys.stdout.write(table.text())


@verb("trash purge schedule status", "Show trash purge schedule status.", *POOL, *FORMAT)
def status(session: Session) -> None:
    session.layout()
    rows: list[tuple[str, str, str]] = []
    if _on_ceph(session):
        for row in json.loads(_ask(session, "status"))["scheduled"]:
            rows.append((row["pool_name"], row["namespace"], row["schedule_time"]))
    else:
        from librbd_py.image import purge_schedule

        with failing("status failed"):
            for when, pool, space in purge_schedule.upcoming(session.cluster.store, *_level(session)):
                rows.append((pool, space, f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M:%S}"))
    if not session.plain:
        names = ("pool", "namespace", "schedule_time")
        items = [Section("item", dict(zip(names, row, strict=True))) for row in rows]
        session.show(Rows("scheduled", items))
        return
    table = Table(("POOL", "left"), ("NAMESPACE", "left"), ("SCHEDULE TIME", "left"))
    for row in rows:
        table.add(*row)
    sys.stdout.write(table.text())


@verb("trash purge schedule run", "Purge what schedules of this store say is due (a timer's job).")
def run(session: Session) -> None:
    if _on_ceph(session):
        raise Failure("rbd: the cluster's manager runs the schedules", 95)
    from librbd_py.image import purge_schedule

    with failing("trash purge failed"):
        done = purge_schedule.run(session.cluster.store)
    code = 0
    for pool, space, result in done:
        where = f"{pool}/{space}" if space else pool
        print(f"{where}: {'purged' if not result else reason(result)}")
        code = code or result
    if code:
        raise Failure("", code)
