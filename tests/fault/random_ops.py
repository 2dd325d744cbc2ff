"""Random programs on images, and a model in memory of what they must do.

Two clients work on the same images; every step's effect is compared with the model, and the object map of the image it
touched with the objects that exist.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from librbd_py import rbd
from librbd_py.format import features as ft
from librbd_py.format.object_map import EXISTS, EXISTS_CLEAN
from librbd_py.image import map_check, object_map
from librbd_py.image.objects import exists
from librbd_py.store.api import ObjectContext

MAX_SIZE = 96 << 10  # bytes of an image
MAX_IMAGES, MAX_SNAPS = 5, 4
# (order, stripe unit, stripe count); None: not striped
SHAPES = ((12, None, None), (13, None, None), (14, None, None), (16, None, None), (13, 4096, 2), (14, 4096, 3))
FEATURES = (None, ft.LAYERING, ft.LAYERING | ft.EXCLUSIVE_LOCK, ft.DEFAULT & ~ft.DEEP_FLATTEN)


@dataclass
class Model:
    """One image as it should be."""

    head: bytearray
    snaps: dict[str, bytes] = field(default_factory=dict)
    protected: set[str] = field(default_factory=set)
    parent: tuple[str, str] | None = None  # image, snapshot: while this is its clone
    kept: set[str] = field(default_factory=set)  # images whose snapshots still need this one's trash
    trashed: dict[str, set[str]] = field(default_factory=dict)  # original name -> clones that keep it
    needs_parent: set[str] = field(default_factory=set)  # snapshots that hold on to the parent


class Wrong(AssertionError):
    pass


class Program:
    """`steps` random operations; `run` raises Wrong with the step that went wrong."""

    def __init__(self, contexts: list[ObjectContext], seed: int) -> None:
        self.contexts = contexts
        self.random = random.Random(seed)
        self.models: dict[str, Model] = {}
        self.open: dict[tuple[int, str], rbd.Image] = {}
        self.names = 0
        self.counts: Counter[str] = Counter()
        self.log: list[str] = []
        self.actions = {
            "write": 30,
            "read": 20,
            "write_zeroes": 10,
            "discard": 10,
            "compare_and_write": 4,
            "resize": 5,
            "snap_create": 5,
            "snap_remove": 4,
            "snap_read": 8,
            "snap_rename": 1,
            "rollback": 3,
            "protect": 1,
            "create": 1,
            "clone": 5,
            "flatten": 4,
            "remove": 2,
            "reopen": 3,
            "diff": 4,
            "copy": 1,
            "features": 1,
            "check_maps": 3,
        }

    # --- driving

    def run(self, steps: int) -> None:
        try:
            for step in range(steps):
                name = self.random.choices(list(self.actions), list(self.actions.values()))[0]
                if not self.models:
                    name = "create"
                try:
                    getattr(self, name)()
                except Wrong as wrong:
                    raise Wrong(f"step {step}: {wrong}\n" + "\n".join(self.log[-12:])) from None
                except Exception as failure:
                    tail = "\n".join(self.log[-12:])
                    raise Wrong(f"step {step}, {name}: {failure!r}\n{tail}") from failure
                self.counts[name] += 1
            for name in list(self.models):
                self.whole(name)
        finally:
            for image in self.open.values():
                image.close()

    def note(self, *words: object) -> None:
        self.log.append(" ".join(str(word) for word in words))
        del self.log[:-40]

    def pick(self) -> tuple[str, Model, rbd.Image]:
        name = self.random.choice(list(self.models))
        return name, self.models[name], self.image(name)

    def image(self, name: str, client: int | None = None) -> rbd.Image:
        """An open handle, mostly the first client's."""
        if client is None:
            client = 1 if len(self.contexts) > 1 and self.random.random() < 0.08 else 0
        key = (client, name)
        if key not in self.open:
            self.open[key] = rbd.Image(self.contexts[client], name)
        return self.open[key]

    def close(self, name: str) -> None:
        for client in range(len(self.contexts)):
            image = self.open.pop((client, name), None)
            if image is not None:
                image.close()

    def extent(self, size: int) -> tuple[int, int]:
        """Often aligned, often around edges of objects."""
        pick = self.random.random()
        if pick < 0.3:
            start = self.random.randrange(0, size, 512)
            length = self.random.choice((512, 1024, 4096, 8192))
        elif pick < 0.6:
            start = self.random.randrange(0, size, 4096)
            length = 4096 * self.random.randint(1, 6)
        elif pick < 0.75:
            grain = self.random.choice((4096, 8192, 16384, 65536))  # whole objects of some image
            start = self.random.randrange(0, size, grain)
            length = grain
        else:
            start = self.random.randrange(size)
            length = self.random.randint(1, 9000)
        return start, min(length, size - start)

    def data(self, length: int) -> bytes:
        if self.random.random() < 0.1:
            return bytes(length)
        return bytes([self.random.randint(1, 255)]) * length

    def same(self, what: str, found: bytes, wanted: bytes | bytearray) -> None:
        if found != wanted:
            at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), -1)
            raise Wrong(
                f"{what}: {len(found)} bytes for {len(wanted)}, first difference at {at}: "
                f"{found[at : at + 8].hex()} instead of {bytes(wanted[at : at + 8]).hex()}"
            )

    def whole(self, name: str) -> None:
        model, image = self.models[name], self.image(name, 0)
        if image.size() != len(model.head):
            raise Wrong(f"{name} has {image.size()} bytes instead of {len(model.head)}")
        if model.head:
            self.same(f"HEAD of {name}", image.read(0, len(model.head)), model.head)
        for snap, wanted in model.snaps.items():
            if wanted:
                image.set_snap(snap)
                found = image.read(0, len(wanted))
                image.set_snap(None)
                self.same(f"{name}@{snap}", found, wanted)

    def head_map(self, name: str, image: rbd.Image) -> None:
        """The HEAD object map says of every object whether it exists."""
        handle = image.handle
        header = handle.header
        if not header.has(ft.OBJECT_MAP) or header.flags & ft.FLAG_OBJECT_MAP_INVALID:
            return
        states = object_map.load(handle.ctx, handle.id)
        count = header.layout.objects(header.size)
        if len(states) != count:
            raise Wrong(f"{name}: object map of {len(states)} entries for {count} objects")
        for objno, state in enumerate(states):
            there = exists(handle.data_ctx, handle.objects.oid(objno))
            if there != (state in (EXISTS, EXISTS_CLEAN)):
                raise Wrong(f"{name}: object {objno} {'exists' if there else 'does not exist'}, its map says {state}")

    # --- data

    def write(self) -> None:
        name, model, image = self.pick()
        if not model.head:
            return
        offset, length = self.extent(len(model.head))
        data = self.data(length)
        self.note("write", name, offset, length, data[:1].hex())
        image.write(data, offset)
        model.head[offset : offset + length] = data
        self.after(name, image, offset, length)

    def write_zeroes(self) -> None:
        name, model, image = self.pick()
        if not model.head:
            return
        offset, length = self.extent(len(model.head))
        thick = self.random.random() < 0.2
        self.note("write_zeroes", name, offset, length, thick)
        image.write_zeroes(offset, length, rbd.RBD_WRITE_ZEROES_FLAG_THICK_PROVISION if thick else 0)
        model.head[offset : offset + length] = bytes(length)
        self.after(name, image, offset, length)

    def discard(self) -> None:
        name, model, image = self.pick()
        if not model.head:
            return
        offset, length = self.extent(len(model.head))
        self.note("discard", name, offset, length)
        image.discard(offset, length)
        found = image.read(offset, length)
        for at, (byte, old) in enumerate(zip(found, model.head[offset : offset + length], strict=True)):
            if byte not in (0, old):
                raise Wrong(f"discard of {name}: byte {offset + at} is {byte}, was {old}")
        model.head[offset : offset + length] = found
        self.after(name, image, offset, length)

    def compare_and_write(self) -> None:
        name, model, image = self.pick()
        if not model.head:
            return
        unit = image.stripe_unit()
        offset, length = self.extent(len(model.head))
        length = min(length, unit - offset % unit)
        expected = bytes(model.head[offset : offset + length])
        data = self.data(length)
        wrong = self.random.random() < 0.5
        if wrong:
            at = self.random.randrange(length)
            expected = expected[:at] + bytes([expected[at] ^ 0x55]) + expected[at + 1 :]
        self.note("compare_and_write", name, offset, length, wrong)
        found = image.compare_and_write(offset, expected, data)
        if found != (offset + at if wrong else None):
            raise Wrong(f"compare and write: {found}")
        if not wrong:
            model.head[offset : offset + length] = data
        self.after(name, image, offset, length)

    def after(self, name: str, image: rbd.Image, offset: int, length: int) -> None:
        model = self.models[name]
        start, end = max(0, offset - 600), min(len(model.head), offset + length + 600)
        self.same(f"{name} around {offset}~{length}", image.read(start, end - start), model.head[start:end])
        self.head_map(name, image)

    def read(self) -> None:
        name, model, image = self.pick()
        if model.head:
            offset, length = self.extent(len(model.head))
            self.note("read", name, offset, length)
            self.same(f"{name} {offset}~{length}", image.read(offset, length), model.head[offset : offset + length])

    def snap_read(self) -> None:
        name, model, _ = self.pick()
        if not model.snaps:
            return
        snap = self.random.choice(list(model.snaps))
        content = model.snaps[snap]
        if not content:
            return
        offset, length = self.extent(len(content))
        self.note("snap_read", name, snap, offset, length)
        client = self.random.randrange(len(self.contexts))
        with rbd.Image(self.contexts[client], name, snapshot=snap, read_only=True) as image:
            self.same(f"{name}@{snap} {offset}~{length}", image.read(offset, length), content[offset : offset + length])

    # --- shape

    def resize(self) -> None:
        name, model, image = self.pick()
        size = self.random.choice((0, 1, 4096, self.random.randrange(MAX_SIZE), self.random.randrange(512, MAX_SIZE)))
        self.note("resize", name, len(model.head), size)
        image.resize(size)
        if size < len(model.head):
            del model.head[size:]
        model.head.extend(bytes(size - len(model.head)))
        self.whole(name)
        self.head_map(name, image)

    def snap_create(self) -> None:
        name, model, image = self.pick()
        if len(model.snaps) >= MAX_SNAPS:
            return
        self.names += 1
        snap = f"s{self.names}"
        self.note("snap_create", name, snap)
        image.create_snap(snap)
        model.snaps[snap] = bytes(model.head)
        self.head_map(name, image)

    def snap_remove(self) -> None:
        name, model, image = self.pick()
        if not model.snaps:
            return
        snap = self.random.choice(list(model.snaps))
        self.note("snap_remove", name, snap)
        if snap in model.protected:
            try:
                image.remove_snap(snap)
            except rbd.ImageBusy:
                image.unprotect_snap(snap)
                model.protected.discard(snap)
                return
            raise Wrong(f"{name}@{snap} is protected and was removed")
        image.remove_snap(snap)
        del model.snaps[snap]
        if [row["name"] for row in image.list_snaps() if row["namespace"] == 0] != list(model.snaps):
            raise Wrong(f"snapshots of {name} after the removal of {snap}: {list(image.list_snaps())}")
        self.whole(name)

    def snap_rename(self) -> None:
        name, model, image = self.pick()
        if not model.snaps:
            return
        snap = self.random.choice(list(model.snaps))
        self.names += 1
        new = f"s{self.names}"
        self.note("snap_rename", name, snap, new)
        image.rename_snap(snap, new)
        model.snaps = {new if key == snap else key: value for key, value in model.snaps.items()}
        if snap in model.protected:
            model.protected.remove(snap)
            model.protected.add(new)

    def protect(self) -> None:
        name, model, image = self.pick()
        free = [snap for snap in model.snaps if snap not in model.protected]
        if free:
            snap = self.random.choice(free)
            self.note("protect", name, snap)
            image.protect_snap(snap)
            model.protected.add(snap)

    def rollback(self) -> None:
        name, model, image = self.pick()
        if not model.snaps:
            return
        snap = self.random.choice(list(model.snaps))
        self.note("rollback", name, snap)
        if model.head:
            image.write(bytes(model.head[:1]), 0)  # takes the lock: rollback does not
        try:
            image.rollback_to_snap(snap)
        except rbd.ReadOnlyImage:
            assert not model.head
            return
        model.head = bytearray(model.snaps[snap])
        self.whole(name)
        self.head_map(name, image)

    # --- images

    def create(self) -> None:
        if len(self.models) >= MAX_IMAGES:
            return
        self.names += 1
        name = f"i{self.names}"
        size = self.random.randrange(4096, MAX_SIZE)
        order, unit, count = self.random.choice(SHAPES)
        features = self.random.choice(FEATURES)
        self.note("create", name, size, order, unit, count, features)
        rbd.RBD().create(self.contexts[0], name, size, order, False, features, unit, count)
        self.models[name] = Model(bytearray(size))

    def clone(self) -> None:
        name, model, _ = self.pick()
        if not model.snaps or len(self.models) >= MAX_IMAGES:
            return
        snap = self.random.choice(list(model.snaps))
        self.names += 1
        child = f"i{self.names}"
        order, unit, count = self.random.choice(SHAPES)
        features = self.random.choice(FEATURES)
        self.note("clone", name, snap, child, order, unit, count, features)
        if unit is None:
            unit, count = 1 << order, 1
        rbd.RBD().clone(self.contexts[0], name, snap, self.contexts[0], child, features, order, unit, count)
        self.models[child] = Model(bytearray(model.snaps[snap]), parent=(name, snap))
        self.whole(child)

    def flatten(self) -> None:
        name, _, image = self.pick()
        tied = image.handle.header.head_has_parent
        self.note("flatten", name, tied, image.overlap())
        if tied:
            image.flatten()
            if image.overlap():
                raise Wrong(f"{name} has an overlap of {image.overlap()} after flatten")
        self.whole(name)
        self.head_map(name, image)

    def remove(self) -> None:
        name, model, image = self.pick()
        self.note("remove", name)
        left = list(image.list_snaps())
        self.close(name)
        try:
            rbd.RBD().remove(self.contexts[0], name)
        except rbd.ImageHasSnapshots:
            if not left:
                raise Wrong(f"{name} has no snapshots and cannot be removed") from None
            return
        if model.snaps:
            raise Wrong(f"{name} was removed with its snapshots")
        del self.models[name]
        if name in rbd.RBD().list(self.contexts[0]):
            raise Wrong(f"{name} is still listed")

    def reopen(self) -> None:
        name = self.random.choice(list(self.models))
        self.note("reopen", name)
        self.close(name)
        self.whole(name)

    def copy(self) -> None:
        name, model, image = self.pick()
        if len(self.models) >= MAX_IMAGES:
            return
        self.names += 1
        new = f"i{self.names}"
        deep = self.random.random() < 0.5
        self.note("copy", name, new, deep)
        if deep:
            image.deep_copy(self.contexts[0], new)
            self.models[new] = Model(bytearray(model.head), dict(model.snaps), protected=set(model.protected))
        else:
            image.copy(self.contexts[0], new)
            self.models[new] = Model(bytearray(model.head))
        self.whole(new)

    def features(self) -> None:
        name, _, image = self.pick()
        has = image.features()
        self.note("features", name, hex(has))
        if has & ft.OBJECT_MAP:
            image.update_features(ft.OBJECT_MAP, False)
        elif has & ft.EXCLUSIVE_LOCK:
            if self.random.random() < 0.3:
                image.update_features(ft.EXCLUSIVE_LOCK, False)
            else:
                image.update_features(ft.OBJECT_MAP, True)
                image.rebuild_object_map()
                if image.flags():
                    raise Wrong(f"{name}: flags {image.flags()} after a rebuild")
        else:
            image.update_features(ft.EXCLUSIVE_LOCK, True)
        self.head_map(name, image)

    # --- derived

    def check_maps(self) -> None:
        name, _, image = self.pick()
        handle = image.handle
        if handle.header.has(ft.OBJECT_MAP):
            self.note("check_maps", name)
            found = map_check.differences(handle)
            if found:
                raise Wrong(f"{name}: " + "; ".join(found[:5]))

    def diff(self) -> None:
        name, model, image = self.pick()
        points = [None, *model.snaps]
        start = self.random.choice(points)
        ends: list[str | None] = (
            [*points[points.index(start) + 1 :], None] if start is not None else [*model.snaps, None]
        )
        end = self.random.choice(ends)
        before = b"" if start is None else model.snaps[start]
        after = bytes(model.head) if end is None else model.snaps[end]
        whole = self.random.random() < 0.5
        self.note("diff", name, start, end, whole)
        if not after:
            return
        rows: list[tuple[int, int, bool]] = []
        if end is not None:
            image.set_snap(end)
        try:
            image.diff_iterate(0, len(after), start, lambda *row: rows.append(row), True, whole)
        finally:
            image.set_snap(None)
        marked = bytearray(len(after))
        position = 0
        for offset, length, data in rows:
            if offset < position and image.stripe_count() == 1:
                raise Wrong(f"diff of {name} goes back from {position} to {offset}")
            position = offset + length
            marked[offset:position] = b"\1" * length
            if not data and any(after[offset:position]):
                raise Wrong(f"diff of {name} calls {offset}~{length} a hole, and it holds data")
        old = before[: len(after)].ljust(len(after), b"\0")
        for at, (a, b) in enumerate(zip(old, after, strict=True)):
            if a != b and not marked[at]:
                raise Wrong(f"diff of {name} from {start} to {end} (whole: {whole}) misses byte {at}: {rows[:20]}")
