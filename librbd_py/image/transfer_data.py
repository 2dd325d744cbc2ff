"""The data objects of an image, carried to another store with every version that snapshots see, and compared there.

An object is written as it came to be: its oldest version first, each under the snap context of its time. So the other
store makes the same clones for the same snapshots, under its own snapshot ids.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from librbd_py.format import object_map as fm
from librbd_py.format.names import data_object, parse_data_object
from librbd_py.format.values import dataclass
from librbd_py.store.api import (
    NOSNAP,
    SNAPDIR,
    Create,
    ListSnaps,
    ObjectContext,
    Op,
    Read,
    Remove,
    SetAllocHint,
    SnapContext,
    SnapSet,
    Truncate,
    Write,
    Zero,
)

from . import object_map
from .map_check import version_at
from .objects import ignoring
from .progress import Progress, report

FEW = 1 << 14  # objects that are asked for one by one rather than found in a list of the pool
PIECE = 16 << 10  # bytes that are written or left alone together
WORKERS = 4  # objects at once: at most two versions of each are in memory


@dataclass(frozen=True)
class Objects:
    """The data objects of one image in one store."""

    ctx: ObjectContext
    prefix: str
    order: int

    def oid(self, number: int) -> str:
        return data_object(self.prefix, number)

    def snapset(self, number: int) -> SnapSet | None:
        """None: no version of it exists."""
        with ignoring(errno.ENOENT):
            found: SnapSet = self.ctx.read(self.oid(number), [ListSnaps()], SNAPDIR)[0]
            return found
        return None

    def content(self, number: int, snap_id: int) -> bytes | None:
        """None: it does not exist there."""
        with ignoring(errno.ENOENT):
            data: bytes = self.ctx.read(self.oid(number), [Read()], snap_id)[0]
            return data
        return None

    def heads(self, count: int) -> Sequence[int]:
        """Numbers below `count` under which there may be an object in HEAD. A few are tried one by one; for many, all
        of the pool is listed. Those that only snapshots need go with these."""
        if count <= FEW:
            return range(count)
        found = (parse_data_object(oid) for oid in self.ctx.objects() if oid.startswith(f"{self.prefix}."))
        return sorted(row[1] for row in found if row is not None and row[0] == self.prefix)


def each(
    work: Callable[[int], object], numbers: Sequence[int], step: Callable[[int], object] = lambda done: None
) -> None:
    """`work(number)` for all, some at once; `step(how many are done)` in between may raise to end it. The first
    failure ends it; what was begun is waited for."""
    with ThreadPoolExecutor(WORKERS, "rbdpy-copy") as pool:
        left, waiting, done = iter(numbers), set[Future[object]](), 0
        try:
            while True:
                for number in itertools.islice(left, 2 * WORKERS - len(waiting)):
                    waiting.add(pool.submit(work, number))
                if not waiting:
                    return
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                done += len(finished)
                step(done)
        finally:
            for future in waiting:
                future.cancel()


# --- differences


def runs(old: bytes, new: bytes) -> Iterator[tuple[int, int]]:
    """(offset, length) where `new` differs from `old`, which ends in zeros: whole pieces, neighbours joined."""
    begin: int | None = None
    for at in range(0, len(new), PIECE):
        piece = new[at : at + PIECE]
        if old[at : at + PIECE].ljust(len(piece), b"\0")[: len(piece)] != piece:
            begin = at if begin is None else begin
        elif begin is not None:
            yield begin, at - begin
            begin = None
    if begin is not None:
        yield begin, len(new) - begin


def change(old: bytes | None, new: bytes | None, hint: int) -> list[Op]:
    """What turns one version of an object into the next; `hint`: bytes of a full object. Never empty, also when both
    are equal: that they are two versions is part of what is carried."""
    if new is None:
        return [Remove()]
    ops: list[Op] = []
    end = 0  # how long the object is by then
    if old is None:
        ops += [SetAllocHint(hint, hint), Create()]
    else:
        end = len(old)
        if len(new) < end:
            ops.append(Truncate(len(new)))
            end = len(new)
    for offset, length in runs((old or b"")[:end], new):
        data = new[offset : offset + length]
        if data.strip(b"\0"):
            ops.append(Write(offset, data))
            end = max(end, offset + length)
        else:  # inside the old version, or it would be no difference
            ops.append(Zero(offset, min(length, end - offset)))
            # A Zero that reaches the end of the object cuts it there.
            end = offset if offset + length >= end else end
    if end < len(new) or not ops:
        ops.append(Truncate(len(new)))
    return ops


# --- copying


def snap_context(older: Sequence[int]) -> SnapContext:
    """Of a write that came after these snapshots, in ascending order."""
    return SnapContext(older[-1], tuple(reversed(older))) if older else SnapContext()


class Carrier:
    """`snaps`: ids of the image's snapshots at the source -> at the destination, ascending in both."""

    def __init__(self, source: Objects, dest: Objects, snaps: Mapping[int, int]) -> None:
        self.source = source
        self.dest = dest
        self.order = [*snaps, NOSNAP]
        self.there = [*snaps.values(), NOSNAP]

    def versions(self, snapset: SnapSet | None, ids: Sequence[int]) -> list[int]:
        """For each snapshot and HEAD: the position of the first that sees the same version; -1: nothing."""
        found = [None if snapset is None else version_at(snapset, snap_id) for snap_id in ids]
        return [-1 if version is None else found.index(version) for version in found]

    def copy(self, number: int) -> None:
        snapset = self.source.snapset(number)
        if snapset is None:
            return
        before, old = -1, None
        for at, version in enumerate(self.versions(snapset, self.order)):
            if version == before:
                continue
            new = None
            if version >= 0:
                new = self.source.content(number, self.order[at])
                if new is None:
                    raise OSError(errno.EAGAIN, f"{self.source.oid(number)} changed while it was copied")
            snapc = snap_context(self.there[:at])
            self.dest.ctx.write(self.dest.oid(number), change(old, new, 1 << self.dest.order), snapc)
            before, old = version, new

    def compare(self, number: int) -> None:
        """EIO where the two sides differ: in what exists, in which snapshots share a version, in any byte."""
        here = self.versions(self.source.snapset(number), self.order)
        there = self.versions(self.dest.snapset(number), self.there)
        name = self.dest.oid(number)
        if here != there:
            raise OSError(errno.EIO, f"{name} has the versions {there} at the destination, {here} at the source")
        for at, version in enumerate(here):
            if version == at and self.source.content(number, self.order[at]) != self.dest.content(
                number, self.there[at]
            ):
                raise OSError(errno.EIO, f"{name} has other content at the destination")

    def run(self, numbers: Sequence[int], progress: Progress | None) -> None:
        """Copies, then reads both sides again and compares."""
        total = 2 * len(numbers)
        each(self.copy, numbers, lambda done: report(progress, done, total))
        each(self.compare, numbers, lambda done: report(progress, len(numbers) + done, total))


def existing(states: Sequence[bytearray] | None, count: int) -> list[int]:
    """Numbers of the objects that may exist: what any of the maps knows of, all when there is no trustworthy map for
    each version."""
    if states is None:
        return list(range(count))
    known = {number for some in states for number, state in enumerate(some) if state != fm.NONEXISTENT}
    return sorted(number for number in known if number < count)


# --- object maps


def carry_map(source: tuple[ObjectContext, str, int], dest: tuple[ObjectContext, str, int]) -> None:
    """One object map, (context, image id, snapshot id or NOSNAP) each, and compares it. No map at the source: none."""
    try:
        states = object_map.load(*source)
    except OSError as failure:
        if failure.errno != errno.ENOENT:
            raise
        return
    object_map.save(*dest, states)
    read = object_map.load(*dest)
    # A store that derives maps from what exists may know of an object that the source's map does not name.
    known = all(a == b or (a == fm.NONEXISTENT and b == fm.EXISTS) for a, b in zip(states, read, strict=False))
    if len(states) != len(read) or not known:
        raise OSError(errno.EIO, f"object map of image {dest[1]} reads differently at the destination")
