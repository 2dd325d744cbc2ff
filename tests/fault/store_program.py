"""A program of changes to an embedded store, stopped at any of its steps, and what may be left then.

Each operation is acknowledged to the outside when it returned. After the stop the store must show exactly the state
before or after the operation that was under way, whatever files it touched.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from librbd_py.format import object_map
from librbd_py.store.api import (
    NOSNAP,
    Create,
    Exec,
    GetXattrs,
    ListSnaps,
    OmapGetVals,
    OmapSet,
    Read,
    Remove,
    SetXattr,
    SnapContext,
    Write,
    WriteFull,
)
from librbd_py.store.embedded import EmbeddedStore, check, steps

ORDER = 16
USER = b"\x01\x01\x04\x00\x00\x00" + bytes(4)  # namespace of a user's snapshot
_ID = struct.pack("<Q", 1)
HEADER, DATA, MAP = "rbd_header.abc", f"rbd_data.abc.{0:016x}", "rbd_object_map.abc"

Dump = dict[str, Any]


def _text(value: str) -> bytes:
    return struct.pack("<I", len(value)) + value.encode()


def _image(io: Any, image_id: str) -> None:
    create = struct.pack("<QBQ", 20 << ORDER, ORDER, 0) + _text(f"rbd_data.{image_id}")
    io.write(f"rbd_header.{image_id}", [Create(exclusive=True), Exec("rbd", "create", create)])


def operations(path: Path) -> list[tuple[str, Callable[[], object]]]:
    """Names starting with "data" change only the data of images."""
    held: dict[str, Any] = {}

    def create() -> None:
        held["store"] = EmbeddedStore(path, create=True)
        held["io"] = held["store"].open("rbd")

    def on(work: Callable[[Any], object]) -> Callable[[], object]:
        return lambda: work(held["io"])

    one = SnapContext(1, (1,))

    def other_pool() -> None:
        held["store"].pool_create("second")

    def fill_other_pool() -> None:
        io = held["store"].open("second")
        _image(io, "xyz")

    return [
        ("create the store", create),
        ("object", on(lambda io: io.write("o", [WriteFull(b"1" * 70_000), OmapSet({b"k": b"1"})]))),
        ("image", on(lambda io: _image(io, "abc"))),
        ("map", on(lambda io: io.write(MAP, [WriteFull(object_map.encode(bytes(20)))]))),
        ("data", on(lambda io: io.write(DATA, [WriteFull(b"a" * 5000)]))),
        ("attribute", on(lambda io: io.write(HEADER, [SetXattr("b", b"2")]))),
        ("snapshot id", on(lambda io: io.snap_create())),
        ("snapshot", on(lambda io: io.exec(HEADER, "rbd", "snapshot_add", _text("s") + _ID + USER))),
        ("data under a snapshot", on(lambda io: io.write(DATA, [Write(0, b"b" * 5000)], one))),
        ("object under a snapshot", on(lambda io: io.write("o", [WriteFull(b"2"), OmapSet({b"k": b"2"})], one))),
        ("map resize", on(lambda io: io.exec(MAP, "rbd", "object_map_resize", struct.pack("<QB", 40, 0)))),
        ("map snapshot", on(lambda io: io.exec(MAP, "rbd", "object_map_snap_add"))),
        ("snapshot off", on(lambda io: io.exec(HEADER, "rbd", "snapshot_remove", _ID))),
        ("snapshot id off", on(lambda io: io.snap_remove(1))),
        ("image off", on(lambda io: io.write(HEADER, [Remove()]))),
        ("map off", on(lambda io: io.write(MAP, [Remove()]))),
        ("image again", on(lambda io: _image(io, "abc"))),
        ("pool", other_pool),
        ("image in the pool", fill_other_pool),
        ("pool off", lambda: held["store"].pool_remove("second")),
        ("object off", on(lambda io: io.write("o", [Remove()]))),
        ("close", lambda: held["store"].close()),
    ]


def dump(path: Path) -> Dump | None:
    """Everything a client can see, opened anew. None: there is no store yet."""
    try:
        store = EmbeddedStore(path, create=(path / "store.json").exists())
    except FileNotFoundError:
        return None
    out: Dump = {}
    with store:
        for pool in store.pools():
            io = store.open(pool.pool_id)
            out[pool.name] = ""
            for oid in io.objects():
                data, attributes, (keys, _) = io.read(oid, [Read(), GetXattrs(), OmapGetVals()])
                # Values with the time in them differ from run to run.
                timeless = {k: b"" if b"timestamp" in k or k.startswith(b"snapshot_") else v for k, v in keys.items()}
                out[f"{pool.name}/{oid}"] = (data, attributes, timeless)
                snapset = io.read(oid, [ListSnaps()])[0]
                for clone in snapset.clones:
                    if clone.clone_id == NOSNAP:
                        continue
                    try:
                        out[f"{pool.name}/{oid}@{clone.snaps}"] = io.read(oid, [Read()], clone.clone_id)
                    except FileNotFoundError:
                        pass  # its snapshot is removed, and its user has still to clear up
    return out


def expected(path: Path) -> list[Dump | None]:
    """State i: after i operations."""
    states: list[Dump | None] = [None]
    for _, work in operations(path):
        work()
        states.append(dump(path))
    return states


def run_until(path: Path, stop_at: int, stop: Callable[[], object]) -> tuple[int, bool]:
    """Runs the program in a child that calls stop() at the given step. -> operations acknowledged, whether it ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            count = 0

            def hook(name: str) -> None:
                nonlocal count
                count += 1
                if count == stop_at:
                    stop()

            steps.hook = hook
            for _, work in operations(path):
                work()
                os.write(writer, b".")
            os._exit(0)
        finally:
            os._exit(70)
    os.close(writer)
    acknowledged = 0
    while data := os.read(reader, 100):
        acknowledged += len(data)
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, -9), f"step {stop_at}: {status}"
    return acknowledged, os.waitstatus_to_exitcode(status) == 0


def without_data(state: Dump | None) -> Dump | None:
    return None if state is None else {key: value for key, value in state.items() if "/rbd_data." not in key}


def verify(path: Path, acknowledged: int, states: list[Dump | None], *, power_cut: bool = False) -> None:
    """The state before or after the operation under way, and no trace of what was cut off."""
    names = [name for name, _ in operations(path)]
    found = dump(path)
    legal = states[acknowledged : acknowledged + 2]
    # The data of images is durable with the next change of metadata, as guests' writes are with their flush.
    loose = power_cut and any(name.startswith("data") for name in names[max(acknowledged - 1, 0) : acknowledged + 1])
    if loose:
        found, legal = without_data(found), [without_data(state) for state in legal]
    if found is None and acknowledged == 0:
        return
    if acknowledged == 0:
        legal = [states[1]]  # an open that was cut off is completed by the next
    under_way = names[acknowledged] if acknowledged < len(names) else "nothing"
    assert found in legal, f"{acknowledged} operations were acknowledged, {under_way!r} was under way"
    findings = [f for f in check.check(path, repair=True) if f.severity != "warning"]
    assert all(f.repaired and f.what == "left by a creation that was cut off" for f in findings), findings
    assert [f for f in check.check(path) if f.severity != "warning"] == [], under_way
