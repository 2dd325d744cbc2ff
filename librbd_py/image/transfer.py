"""Images carried from one store to another: embedded to Ceph, Ceph to embedded, or between two of a kind.

Data, snapshots, clones with their parents, metadata, times and object maps go along, and the image's id where it is
free; `transfer_header` tells what is rewritten. Both sides are read again and compared before the copy gets its name.

A copy in progress is no image yet: its header carries a mark, and it lies in the trash as the half of a migration,
which neither we nor Ceph restore. In this order: trash record, header, the parent's record of the child, data, maps,
comparison, the mark says whole, the name. The same copy begun again takes away what an interrupted one left, or names
what it had completed.
"""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from librbd_py.format import features as ft
from librbd_py.format import header as fh
from librbd_py.format import names
from librbd_py.format import trash as ftr
from librbd_py.format.values import dataclass
from librbd_py.store.api import Create, ListWatchers, ObjectContext, OmapCmp, OmapRmKeys, OmapSet, Remove, Store, Watch

from . import cls, object_map, pool
from .cls import call, text, u8, u64
from .directory import other_watchers, require_free
from .handle import ImageHandle, announce, name_by_id
from .header import MAX_PARENTS, header_oid, id_oid, image_id_of, map_oid
from .objects import exists, ignoring, remove
from .progress import Progress
from .transfer_data import Carrier, Objects, carry_map, each, existing, snap_context
from .transfer_header import COPYING, MARK, WHOLE, HeaderRows, add_child_of_trash, omap, place

KEEP = 86400.0  # seconds that a purge of the trash leaves a copy in progress alone


@dataclass(frozen=True)
class Copied:
    """One image that came over. `new_id`: the id it had was taken there."""

    pool: str
    namespace: str
    name: str
    new_id: bool


@dataclass(frozen=True)
class _Place:
    """An image at the destination that is being made."""

    ctx: ObjectContext
    id: str
    name: str
    mark: bytes = b""  # in its header, as long as it is this one's

    @property
    def oid(self) -> str:
        return header_oid(self.id)


class Transfer:
    """Copies images between two stores. `progress(done, total)` counts objects of the image at hand, read twice; a
    negative answer cancels (ECANCELED by custom), and what was half made is taken away again."""

    def __init__(self, source: Store, dest: Store, progress: Progress | None = None) -> None:
        self.source = source
        self.dest = dest
        self.progress = progress
        self.copied: list[Copied] = []
        self._parents: dict[fh.ParentImageSpec, fh.ParentImageSpec] = {}
        self._busy: list[tuple[int, str, str]] = []  # images whose copies wait for their parents'

    # --- what to copy

    def everything(self) -> None:
        for row in self.source.pools():
            self.pool(row.name)

    def pool(self, name: str) -> None:
        """All images of a pool and its namespaces; those that are there already stay as they are. ENOENT."""
        ctx = self.source.open(name)
        for namespace in ["", *pool.namespaces(ctx)]:
            inside = self.source.open(name, namespace)
            for image in cls.list_images(inside):
                with ignoring(errno.EEXIST):
                    self.image(inside, image)

    def image(self, ctx: ObjectContext, name: str) -> None:
        """One image of the source, and before it the parents that the destination lacks. ENOENT; EEXIST: there is one
        of that name; EBUSY: somebody uses it, or copies it; ENOTSUP: it has what no other store can have; EIO: the
        copy differs."""
        self._image(ctx, image_id_of(ctx, name), name, None)

    # --- one image

    def _image(self, ctx: ObjectContext, image_id: str, name: str, trash: ftr.TrashImageSpec | None) -> _Place:
        key = (ctx.pool_id, ctx.namespace, image_id)
        if key in self._busy or len(self._busy) >= MAX_PARENTS:
            raise OSError(errno.ELOOP, f"image {name} is its own ancestor, or has more than {MAX_PARENTS}")
        self._busy.append(key)
        try:
            there = self._context(ctx.pool_id, ctx.namespace)
            finished = self._finish_earlier(there, name)
            if finished is not None:
                return finished
            if trash is None:
                require_free(there, name)
            with self._quiet(ctx, image_id, name):
                return self._copy(ctx, image_id, there, name, trash)
        finally:
            self._busy.pop()

    @contextmanager
    def _quiet(self, ctx: ObjectContext, image_id: str, name: str) -> Iterator[None]:
        """Nobody changes the source meanwhile: who wants its lock waits. EBUSY: it is in use."""
        with ImageHandle.open(ctx, image_id=image_id) as handle:
            if other_watchers(handle):
                raise OSError(errno.EBUSY, f"image {name} is open elsewhere")
            if handle.read_only:  # a part of a migration or mirroring, which is refused anyway
                yield
                return
            with handle.exclusive():
                handle.data.flush()
                yield
                if other_watchers(handle) and not handle.header.has(ft.EXCLUSIVE_LOCK):
                    raise OSError(errno.EBUSY, f"image {name} was opened elsewhere while it was copied")

    def _context(self, pool_id: int, namespace: str) -> ObjectContext:
        """The pool of that name and the namespace at the destination; made when missing."""
        name = self._pool_name(pool_id)
        try:
            number = self.dest.pool_id(name)
        except OSError as failure:
            if failure.errno != errno.ENOENT:
                raise
            number = self.dest.pool_create(name)
        ctx = self.dest.open(number)
        pool.init(ctx)
        if namespace and namespace not in pool.namespaces(ctx):
            with ignoring(errno.EEXIST):
                pool.namespace_create(ctx, namespace)
        return self.dest.open(number, namespace)

    def _pool_name(self, pool_id: int) -> str:
        for row in self.source.pools():
            if row.pool_id == pool_id:
                return row.name
        raise OSError(errno.ENOENT, f"the source has no pool {pool_id} any more")

    def _copy(
        self, ctx: ObjectContext, image_id: str, there: ObjectContext, name: str, trash: ftr.TrashImageSpec | None
    ) -> _Place:
        header = HeaderRows(omap(ctx, header_oid(image_id)))
        header.check(f"image {name}")
        parent = self._parent(header.parent.spec, name) if header.parent.exists else None
        data_here = header.data_pool_id
        data_there = -1 if data_here == -1 else self._context(data_here, ctx.namespace).pool_id
        made = _Place(there, self._free_id(there, image_id), name, COPYING + secrets.token_hex(8).encode())
        now = time.time()
        entry = ftr.TrashImageSpec(ftr.SOURCE_MIGRATION, name, cls.moment(now), cls.moment(now + KEEP))
        cls.trash_add(there, made.id, entry)
        watch: Watch | None = None
        try:
            prefix = place(made.id, there.pool_id, data_there)
            data_ctx = there if data_there == -1 else self.dest.open(data_there, there.namespace)
            snaps = self._make_header(made, header, prefix, data_there, data_ctx, parent)
            lost: list[OSError] = []
            watch = there.watch(made.oid, _answer_nothing, lambda cookie, failure: lost.append(failure))
            if parent is not None:
                self._attach(made, header, parent)
            data = ctx if data_here == -1 else self.source.open(data_here, ctx.namespace)
            here = Objects(data, header.prefix, header.order)
            carrier = Carrier(here, Objects(data_ctx, prefix, header.order), snaps)

            def step(done: int, total: int) -> object:
                if lost:  # somebody else may have begun it again
                    raise lost[0]
                return None if self.progress is None else self.progress(done, total)

            carrier.run(self._numbers(ctx, image_id, header), step)
            self._maps(ctx, image_id, made, header, snaps)
            self._compare_headers(ctx, image_id, made, header, snaps, parent)
            if trash is None:
                require_free(there, name)
            there.write(made.oid, [OmapCmp({MARK: (made.mark, "eq")}), OmapSet({MARK: WHOLE})])
        except BaseException:
            if watch is not None:
                watch.close()
            with suppress(OSError):  # a destination that is gone: the next copy takes it away
                if _mark(there, made.id) in (None, made.mark):  # else somebody took it for abandoned and began again
                    discard(self.dest, there, made.id)
            raise
        # From here on the next copy completes what fails.
        try:
            self._name(made, trash)
        finally:
            watch.close()
        self.copied.append(Copied(self._pool_name(ctx.pool_id), ctx.namespace, name, made.id != image_id))
        return made

    def _free_id(self, there: ObjectContext, image_id: str) -> str:
        """The id it has, unless another image has it there."""
        while exists(there, header_oid(image_id)) or _trash_entry(there, image_id) is not None:
            image_id = names.make_id(self.dest.client.gid)
        return image_id

    def _make_header(
        self,
        made: _Place,
        header: HeaderRows,
        prefix: str,
        data_pool: int,
        data_ctx: ObjectContext,
        parent: fh.ParentImageSpec | None,
    ) -> dict[int, int]:
        """The header with all its snapshots, marked. Returns their ids, here -> there. The class method comes first:
        from then on a store knows whose the data objects are."""
        snaps: dict[int, int] = {}
        try:
            for snap in header.snaps:
                snaps[snap.id] = data_ctx.snap_create()
            rows = {**header.rewritten(snaps, parent, prefix, data_pool), MARK: made.mark}
            method = [u64(header.size), u8(header.order), u64(header.features), text(prefix)]
            if data_pool != -1:
                method.append(u64(data_pool))
            # All rows in one step: who finds a header in the making finds out what to take away.
            made.ctx.write(made.oid, [Create(exclusive=True), call("create", *method), OmapSet(rows)])
        except BaseException:
            with suppress(OSError):
                for snap_id in snaps.values():
                    data_ctx.snap_remove(snap_id)
            raise
        return snaps

    def _numbers(self, ctx: ObjectContext, image_id: str, header: HeaderRows) -> list[int]:
        """Of the objects that may exist."""
        maps: list[bytearray] | None = None
        if header.maps_are_right:
            with ignoring(errno.ENOENT):
                ids = [fh.NOSNAP, *(snap.id for snap in header.snaps)]
                maps = [object_map.load(ctx, image_id, snap_id) for snap_id in ids]
        return existing(maps, header.objects)

    def _maps(self, ctx: ObjectContext, image_id: str, made: _Place, header: HeaderRows, snaps: dict[int, int]) -> None:
        """Last: a store that keeps HEAD's itself has changed it with every write."""
        if header.features & ft.OBJECT_MAP:
            for here, there in [*snaps.items(), (fh.NOSNAP, fh.NOSNAP)]:
                carry_map((ctx, image_id, here), (made.ctx, made.id, there))

    def _compare_headers(
        self,
        ctx: ObjectContext,
        image_id: str,
        made: _Place,
        header: HeaderRows,
        snaps: dict[int, int],
        parent: fh.ParentImageSpec | None,
    ) -> None:
        if dict(omap(ctx, header_oid(image_id))) != dict(header.rows):
            raise OSError(errno.EAGAIN, f"image {made.name} was changed while it was copied")
        found = HeaderRows(omap(made.ctx, made.oid))
        wanted = header.rewritten(snaps, parent, found.prefix, found.data_pool_id)
        if {**found.rows, MARK: b""} != {**wanted, MARK: b""}:
            raise OSError(errno.EIO, f"the header of image {made.name} reads differently at the destination")

    # --- parents

    def _parent(self, spec: fh.ParentImageSpec, child: str) -> fh.ParentImageSpec:
        """The same snapshot at the destination; its image is copied when it is not there. ESTALE: an image with that id
        is there, but without that snapshot."""
        known = self._parents.get(spec)
        if known is not None:
            return known
        ctx = self.source.open(spec.pool_id, spec.pool_namespace)
        name = name_by_id(ctx, spec.image_id)
        rows = HeaderRows(omap(ctx, header_oid(spec.image_id)))
        snap = next((snap for snap in rows.snaps if snap.id == spec.snap_id), None)
        if snap is None:
            raise OSError(errno.ENOENT, f"the parent of image {child} has no snapshot {spec.snap_id}")
        there = self._context(spec.pool_id, spec.pool_namespace)
        image_id = spec.image_id
        if not _is_whole(there, image_id):
            image_id = self._image(ctx, image_id, name, _trash_entry(ctx, image_id)).id
        for found in HeaderRows(omap(there, header_oid(image_id))).snaps:
            same = (found.name, found.namespace, found.image_size) == (snap.name, snap.namespace, snap.image_size)
            if same:
                result = fh.ParentImageSpec(there.pool_id, spec.pool_namespace, image_id, found.id)
                self._parents[spec] = result
                return result
        raise OSError(
            errno.ESTALE, f"image {name} is at the destination without the snapshot {snap.name} that {child} needs"
        )

    def _attach(self, made: _Place, header: HeaderRows, parent: fh.ParentImageSpec) -> None:
        """The parent's record of its child. A clone of format 1 is in its pool's list, one of format 2 in its parent's
        header."""
        if not header.op_features & ft.OP_CLONE_CHILD:
            made.ctx.exec(names.CHILDREN, "rbd", "add_child", cls.parent_key(parent) + text(made.id))
            return
        ctx = self.dest.open(parent.pool_id, parent.pool_namespace)
        oid = header_oid(parent.image_id)
        child = fh.ChildImageSpec(made.ctx.pool_id, made.id, made.ctx.namespace)
        try:
            ctx.exec(oid, "rbd", "child_attach", u64(parent.snap_id) + cls.encoded(child))
        except OSError as failure:
            if failure.errno != errno.ENOENT:
                raise
            add_child_of_trash(ctx, oid, parent.snap_id, child)
        announce(ctx, oid)

    # --- the end of a copy

    def _name(self, made: _Place, trash: ftr.TrashImageSpec | None) -> None:
        """EEXIST: somebody took the name this very moment."""
        ctx = made.ctx
        if trash is not None:  # it was in the trash at the source too
            ctx.write(names.TRASH, [OmapSet({ftr.key(made.id): trash.encode()})])
            ctx.write(made.oid, [OmapRmKeys([MARK])])
            return
        ctx.write(id_oid(made.name), [Create(exclusive=True), call("set_id", text(made.id))])
        self._list(made)

    def _list(self, made: _Place) -> None:
        with ignoring(errno.EEXIST):
            made.ctx.write(names.DIRECTORY, [call("dir_add_image", text(made.name), text(made.id))])
        with ignoring(errno.ENOENT):
            cls.trash_forget(made.ctx, made.id)
        made.ctx.write(made.oid, [OmapRmKeys([MARK])])

    def _finish_earlier(self, there: ObjectContext, name: str) -> _Place | None:
        """Takes away what an interrupted copy of the image left, or completes it (then it is returned). EBUSY: somebody
        else is at it."""
        for found, entry in cls.trash_list(there).items():
            if entry.source != ftr.SOURCE_MIGRATION or entry.name != name:
                continue
            mark = _mark(there, found)
            if mark is None and exists(there, header_oid(found)):
                continue  # of a migration by Ceph
            others = there.read(header_oid(found), [ListWatchers()])[0] if mark is not None else []
            if others:
                row = others[0]
                text = f"image {name} is being copied by the client at {row.address}, or was {row.timeout} s ago"
                raise OSError(errno.EBUSY, text)
            if mark == WHOLE and _named(there, name, found):
                made = _Place(there, found, name)
                self._list(made)
                return made
            discard(self.dest, there, found)
        return None


def _answer_nothing(notify_id: int, gid: int, cookie: int, payload: bytes) -> bytes:
    """Of the watch that says a copy is in progress."""
    return b""


def _trash_entry(ctx: ObjectContext, image_id: str) -> ftr.TrashImageSpec | None:
    with ignoring(errno.ENOENT):
        return cls.trash_get(ctx, image_id)
    return None


def _mark(ctx: ObjectContext, image_id: str) -> bytes | None:
    with ignoring(errno.ENOENT):
        return omap(ctx, header_oid(image_id)).get(MARK)
    return None


def _named(ctx: ObjectContext, name: str, image_id: str) -> bool:
    with ignoring(errno.ENOENT):
        return image_id_of(ctx, name) == image_id
    return False


def _is_whole(ctx: ObjectContext, image_id: str) -> bool:
    """Whether there is an image with that id, and no half of one."""
    mark = _mark(ctx, image_id)
    if mark is None:
        return exists(ctx, header_oid(image_id))
    entry = _trash_entry(ctx, image_id)
    return mark == WHOLE and (entry is None or entry.source != ftr.SOURCE_MIGRATION)


def discard(store: Store, ctx: ObjectContext, image_id: str) -> None:
    """Takes away a half-made copy: its data, ids of snapshots, maps, its parent's record, its header, its trash record.
    What is gone already is no error, so it can be begun again."""
    oid = header_oid(image_id)
    rows: HeaderRows | None = None
    with ignoring(errno.ENOENT):
        rows = HeaderRows(omap(ctx, oid))
    if rows is not None:
        if MARK in rows.rows:
            _discard_content(store, ctx, image_id, rows)
        remove(ctx, oid)
    with ignoring(errno.ENOENT):
        cls.trash_forget(ctx, image_id)


def _discard_content(store: Store, ctx: ObjectContext, image_id: str, rows: HeaderRows) -> None:
    pool_id = rows.data_pool_id
    data = Objects(ctx if pool_id == -1 else store.open(pool_id, ctx.namespace), rows.prefix, rows.order)
    ids = [snap.id for snap in rows.snaps]
    snapc = snap_context(ids)

    def drop(number: int) -> None:
        with ignoring(errno.ENOENT):
            data.ctx.write(data.oid(number), [Remove()], snapc)

    each(drop, data.heads(rows.objects))
    for snap_id in ids:
        remove(ctx, map_oid(image_id, snap_id))
        data.ctx.snap_remove(snap_id)
    remove(ctx, map_oid(image_id))
    parent = rows.parent.spec
    if not parent.exists:
        return
    child = fh.ChildImageSpec(ctx.pool_id, image_id, ctx.namespace)
    with ignoring(errno.ENOENT):
        if rows.op_features & ft.OP_CLONE_CHILD:
            above = store.open(parent.pool_id, parent.pool_namespace)
            above.exec(header_oid(parent.image_id), "rbd", "child_detach", u64(parent.snap_id) + cls.encoded(child))
        else:
            ctx.exec(names.CHILDREN, "rbd", "remove_child", cls.parent_key(parent) + text(image_id))
