"""Random op lists on the embedded store and on the store in memory: same results, same errnos, same content."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from librbd_py.store.api import (
    NOSNAP,
    SNAPDIR,
    Append,
    AssertExists,
    CmpExt,
    CmpXattr,
    Create,
    Exec,
    GetXattr,
    GetXattrs,
    ListSnaps,
    ListWatchers,
    ObjectContext,
    ObjectStat,
    OmapClear,
    OmapCmp,
    OmapGetByKeys,
    OmapGetKeys,
    OmapGetVals,
    OmapRmKeys,
    OmapRmRange,
    OmapSet,
    Read,
    Remove,
    RmXattr,
    Rollback,
    SetAllocHint,
    SetXattr,
    SnapContext,
    SnapSet,
    SparseRead,
    Stat,
    Truncate,
    Write,
    WriteFull,
    WriteSame,
    Zero,
)
from librbd_py.store.embedded import EmbeddedStore, check
from librbd_py.store.memory import MemoryStore

STEPS = 400
ORDER = 16
OBJECTS = ["a", "b", f"rbd_data.image.{3:016x}", f"rbd_data.image.{4:016x}"]
KEYS = [b"", b"k", b"k1", b"k2", b"\xff", b"z" * 50]
NAMES = ["x", "y", "lock.l"]


_KEY_OPS = (SetXattr, RmXattr, OmapSet, OmapRmKeys, OmapRmRange, OmapClear)


def _write_ops(rng: random.Random, snaps: Sequence[int], data_object: bool) -> list[Any]:
    def place() -> int:
        return rng.choice([0, 1, 4096, rng.randrange(60_000)])

    def data() -> bytes:
        return rng.randbytes(rng.choice([0, 1, 100, 4096]))

    choices = [
        lambda: Write(place(), data()),
        lambda: Write(place(), data()),
        lambda: WriteFull(data()),
        lambda: Append(rng.randbytes(7)),
        lambda: WriteSame(place(), 40, rng.randbytes(rng.choice([1, 8, 7]))),
        lambda: Zero(place(), rng.randrange(20_000)),
        lambda: Truncate(place()),
        lambda: Create(rng.random() < 0.5),
        lambda: Remove(),
        lambda: SetXattr(rng.choice(NAMES), data()[:50]),
        lambda: RmXattr(rng.choice(NAMES)),
        lambda: OmapSet({rng.choice(KEYS): data()[:50] for _ in range(rng.randrange(3))}),
        lambda: OmapRmKeys([rng.choice(KEYS)]),
        lambda: OmapRmRange(rng.choice(KEYS), rng.choice(KEYS)),
        lambda: OmapClear(),
        lambda: SetAllocHint(1 << 22, 1 << 22),
        lambda: AssertExists(),
        lambda: CmpXattr(rng.choice(NAMES), b"", rng.choice(["eq", "ne", "gt"])),
        lambda: OmapCmp({rng.choice(KEYS): (b"", rng.choice(["eq", "ne", "bad"]))}),
        lambda: CmpExt(place(), bytes(rng.randrange(5))),
        lambda: Rollback(rng.choice([*snaps, 1])),
        lambda: Exec("rbd", "copyup", data()),
        lambda: Exec("lock", "get_info", b"\x01\x01\x05\0\0\0\x01\0\0\0l"),
        lambda: Read(place(), 10),
        lambda: Stat(),
    ]
    ops = [rng.choice(choices)() for _ in range(rng.choice([1, 1, 1, 2, 3]))]
    # Attributes and keys of data objects are not kept for snapshots: nobody puts any there.
    return [op for op in ops if not (data_object and isinstance(op, _KEY_OPS))]


def _read_ops() -> list[Any]:
    return [
        Read(),
        SparseRead(0, 1 << 17),
        Stat(),
        GetXattrs(),
        OmapGetVals(b"", b"k", 2),
        OmapGetKeys(b"k"),
        OmapGetByKeys(KEYS),
        ListWatchers(),
    ]


def _run(io: ObjectContext, oid: str, ops: list[Any], **how: Any) -> Any:
    try:
        if "snapc" in how:
            return [_comparable(r) for r in io.write(oid, ops, how["snapc"])]
        return [_comparable(r) for r in io.read(oid, ops, how["snap"])]
    except OSError as error:
        return error.errno


def _comparable(result: Any) -> Any:
    """Times differ; how finely holes are known does, too."""
    if isinstance(result, ObjectStat):
        return result.size
    if isinstance(result, SnapSet):
        return [(clone.clone_id, clone.snaps, clone.size) for clone in result.clones]
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], bytes):
        out = bytearray(1 << 17)
        at = 0
        for offset, length in result[0]:
            out[offset : offset + length] = result[1][at : at + length]
            at += length
        return bytes(out)
    return result


@pytest.mark.parametrize("seed", range(3))
def test_random_programs_have_the_same_outcome(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    prefix = b"\x0e\0\0\0rbd_data.image"
    create = struct.pack("<QBQ", 100 << ORDER, ORDER, 0) + prefix
    snaps: list[int] = []
    with EmbeddedStore(tmp_path / "store", create=True) as embedded, MemoryStore() as memory:
        memory.pool_create("rbd")
        stores = [embedded.open("rbd", "ns"), memory.open("rbd", "ns")]
        for io in stores:
            io.write("rbd_header.image", [Create(), Exec("rbd", "create", create)])
        for number in range(STEPS):
            oid = rng.choice(OBJECTS)
            data_object = oid.startswith("rbd_data")
            ops = _write_ops(rng, snaps, data_object)
            snapc = SnapContext(max(snaps, default=0), tuple(sorted(snaps, reverse=True)))
            one, two = (_run(io, oid, ops, snapc=snapc) for io in stores)
            assert one == two, (number, oid, ops, snapc)
            if rng.random() < 0.05:
                (fresh,) = {io.snap_create() for io in stores}
                snaps.append(fresh)
            if snaps and rng.random() < 0.04:
                gone = snaps.pop(rng.randrange(len(snaps)))
                for io in stores:
                    io.snap_remove(gone)
            for snap in [NOSNAP, *snaps]:
                one, two = (_run(io, oid, _read_ops(), snap=snap) for io in stores)
                assert one == two, (number, oid, ops, snap)
            for reads in ([GetXattr("x")], [ListSnaps()]):
                one, two = (_run(io, oid, reads, snap=SNAPDIR) for io in stores)
                assert one == two, (number, oid, ops, reads)
        assert sorted(stores[0].objects()) == sorted(stores[1].objects())
    assert [f for f in check.check(tmp_path / "store") if f.severity == "error"] == []
