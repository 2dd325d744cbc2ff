"""Random programs of plain operations with snapshots, the same on every run, and what they answer.

Snapshot ids differ between clusters, so programs and answers speak of the first, second ... snapshot that was made.
"""

from __future__ import annotations

import errno
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from librbd_py.store import api, executor
from librbd_py.store.api import NOSNAP, SnapContext


@dataclass(frozen=True)
class Write:
    oid: str
    ops: tuple[Any, ...]
    stale: bool = False  # with the snap context of one snapshot ago


@dataclass(frozen=True)
class Rollback:
    oid: str
    snap: int  # number of the snapshot


@dataclass(frozen=True)
class Read:
    oid: str
    ops: tuple[Any, ...]
    snap: int = -1  # -1: HEAD


@dataclass(frozen=True)
class Snap:
    pass


@dataclass(frozen=True)
class ListSnaps:
    oid: str


Step = Write | Rollback | Read | Snap | ListSnaps
EPISODES = 12
LENGTH = 120
OIDS = ["one", "two"]


def _offset(r: random.Random) -> int:
    return r.choice([0, 0, 1, 100, 4096, 5000])


def _bytes(r: random.Random) -> bytes:
    return bytes([r.randrange(1, 256)]) * r.choice([0, 1, 10, 100, 4096])


def _key(r: random.Random) -> bytes:
    return r.choice([b"a", b"ab", b"b", b"\0\xff", b"c\0"])


def _name(r: random.Random) -> str:
    return r.choice(["x", "y"])


def _write_op(r: random.Random) -> Any:
    return r.choice(
        [
            lambda: api.Create(r.random() < 0.3),
            lambda: api.Write(_offset(r), _bytes(r) or b"z"),
            lambda: api.Write(_offset(r), _bytes(r) or b"z"),
            lambda: api.WriteFull(_bytes(r) or b"z"),
            lambda: api.Append(_bytes(r)),
            lambda: api.WriteSame(_offset(r), r.choice([0, 2, 6, 7]), b"ab"),
            lambda: api.Zero(_offset(r), r.choice([1, 50, 4096, 10000])),
            lambda: api.Truncate(r.choice([0, 1, 50, 4096, 6000])),
            lambda: api.Remove(),
            lambda: api.SetXattr(_name(r), _bytes(r)[:20]),
            lambda: api.RmXattr(_name(r)),
            lambda: api.OmapSet({_key(r): _bytes(r)[:20] for _ in range(r.randrange(3))}),
            lambda: api.OmapRmKeys([_key(r) for _ in range(r.randrange(1, 3))]),
            lambda: api.OmapRmRange(*sorted([_key(r), _key(r)])),
            lambda: api.OmapClear(),
            lambda: api.SetAllocHint(4096, 4096),
        ]
    )()


def _check_op(r: random.Random) -> Any:
    return r.choice(
        [
            lambda: api.AssertExists(),
            lambda: api.CmpXattr(_name(r), r.choice([b"", b"\x01"]), r.choice(["eq", "ne", "gt", "ge", "lt", "le"])),
            lambda: api.OmapCmp({_key(r): (r.choice([b"", b"\x80"]), r.choice(["eq", "lt", "gt", "ne"]))}),
        ]
    )()


def _read_op(r: random.Random) -> Any:
    return r.choice(
        [
            lambda: api.Read(_offset(r), r.choice([1, 50, 10000])),
            lambda: api.Stat(),
            lambda: api.GetXattr(_name(r)),
            lambda: api.GetXattrs(),
            lambda: api.OmapGetVals(r.choice([b"", b"a", b"ab"]), r.choice([b"", b"a"]), r.choice([0, 1, 2, 1000])),
            lambda: api.OmapGetKeys(r.choice([b"", b"a"]), r.choice([1, 1000])),
            lambda: api.OmapGetByKeys([_key(r), _key(r)]),
            lambda: api.CmpExt(_offset(r), r.choice([bytes(5), _bytes(r) or b"\0"])),
            lambda: _check_op(r),
        ]
    )()


def steps(episode: int) -> Iterator[Step]:
    r = random.Random(episode)
    snaps = 0
    for _ in range(LENGTH):
        oid = r.choice(OIDS)
        roll = r.random()
        if roll < 0.07:
            snaps += 1
            yield Snap()
        elif roll < 0.12 and snaps:
            yield Rollback(oid, r.randrange(snaps))
        elif roll < 0.16:
            yield ListSnaps(oid)
        elif roll < 0.45:
            snap = r.randrange(-1, snaps) if r.random() < 0.6 else -1
            ops = [_read_op(r) for _ in range(r.randrange(1, 4))]
            alone = [op for op in ops if isinstance(op, api.GetXattr)]
            yield Read(oid, tuple(alone[:1] or ops), snap)
        else:
            ops = [_write_op(r) for _ in range(r.randrange(1, 4))]
            if any(isinstance(op, api.Remove) for op in ops):
                # An OSD keeps a record of a removed object with snapshots, and trips over it in odd lists.
                ops = [api.AssertExists(), api.Remove(), *[op for op in ops if isinstance(op, api.SetXattr)][:1]]
            elif r.random() < 0.2:
                ops[:0] = [api.AssertExists(), _check_op(r)]
            yield Write(oid, tuple(ops), r.random() < 0.1)


def _digest(value: object) -> str:
    text = repr(value)
    return text if len(text) < 40 else hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(row: Any) -> Any:
    if isinstance(row, api.ObjectStat):
        return row.size
    return dict(sorted(row.items())) if isinstance(row, dict) else row


class Player:
    """Runs one program in an empty pool."""

    def __init__(self, io: api.ObjectContext) -> None:
        self.io = io
        self.snaps: list[int] = []

    def run(self, step: Step) -> str:
        try:
            return self._run(step)
        except OSError as e:
            return errno.errorcode.get(e.errno or 0, str(e.errno))

    def _context(self, count: int) -> SnapContext:
        ids = tuple(reversed(self.snaps[:count]))
        return SnapContext(ids[0] if ids else 0, ids)

    def _run(self, step: Step) -> str:
        match step:
            case Snap():
                self.snaps.append(self.io.snap_create())
                return "snap"
            case Rollback():
                self.io.write(step.oid, [api.Rollback(self.snaps[step.snap])], self._context(len(self.snaps)))
                return self._state(step.oid)
            case Write():
                self.io.write(step.oid, step.ops, self._context(len(self.snaps) - int(step.stale)))
                return self._state(step.oid)
            case Read():
                snap = NOSNAP if step.snap < 0 else self.snaps[step.snap]
                rows = self.io.read(step.oid, step.ops, snap)
                return _digest([_plain(row) for row in rows])
            case ListSnaps():
                return self._list_snaps(step.oid)
        raise AssertionError(step)

    def _list_snaps(self, oid: str) -> str:
        held = self.io.read(oid, [api.ListSnaps()])[0]
        numbers = {snap: number for number, snap in enumerate(self.snaps)}
        rows = [
            ("head", row.size)
            if row.clone_id == NOSNAP
            else (numbers[row.clone_id], tuple(numbers[snap] for snap in row.snaps), row.size, row.overlap)
            for row in held.clones
        ]
        return _digest(rows)

    def _state(self, oid: str) -> str:
        try:
            return _digest([_plain(row) for row in self.io.read(oid, [api.Read(), api.GetXattrs(), api.OmapGetVals()])])
        except OSError as e:
            return f"then {errno.errorcode.get(e.errno or 0, str(e.errno))}"


def mentions_writes(step: Step) -> bool:
    return isinstance(step, Write) and executor.has_writes(step.ops)
