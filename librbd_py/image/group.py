"""Consistency groups: their directory, their members, and snapshots of all members at one moment.

Records and the order of steps are librbd's (Group.cc): what a crash leaves is a member or a snapshot that says of
itself that it is incomplete, and that adding or removing it again completes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from librbd_py.format import group as fg
from librbd_py.format import header as fh
from librbd_py.format import names
from librbd_py.format.encoding import Decoder, Encoder
from librbd_py.format.group import GroupImageSpec, GroupImageStatus, GroupSnapshot, GroupSpec, ImageSnapshotSpec
from librbd_py.format.values import dataclass, replace
from librbd_py.store.api import Create, ObjectContext

from . import cls, snapshots
from .cls import PAGE, Snapshot, text, u64
from .handle import ImageHandle, announce, name_by_id
from .header import Header, header_oid
from .objects import exists, ignoring, remove
from .progress import Progress
from .quiesce import SKIP_QUIESCE, guests_quiesced

_START = GroupImageSpec()


@dataclass(frozen=True)
class Member:
    name: str
    pool_id: int
    image_id: str
    state: int  # LINK_ATTACHED; LINK_INCOMPLETE: being added or removed


@dataclass(frozen=True)
class GroupSnap:
    """A snapshot of a group, from the point of view of one image."""

    pool_id: int
    group: str
    name: str


def header_name(group_id: str) -> str:
    return fg.GROUP_HEADER_PREFIX + group_id


# --- the directory ----------------------------------------------------------------------------------------------


def id_of(ctx: ObjectContext, name: str) -> str:
    """ENOENT: no such group."""
    return Decoder(ctx.exec(fg.GROUP_DIRECTORY, "rbd", "dir_get_id", text(name))).string()


def name_of(ctx: ObjectContext, group_id: str) -> str:
    """ENOENT."""
    return Decoder(ctx.exec(fg.GROUP_DIRECTORY, "rbd", "dir_get_name", text(group_id))).string()


def groups(ctx: ObjectContext) -> dict[str, str]:
    """name -> id, sorted by name."""

    def page(answer: Decoder) -> dict[str, str]:
        return answer.map(Decoder.string, Decoder.string, 8)

    return cls.pages(ctx, fg.GROUP_DIRECTORY, "group_dir_list", page)


def create(ctx: ObjectContext, name: str) -> str:
    """The id of the new group. EEXIST; EINVAL: no name. Cut short it leaves a group without members that can be used
    for nothing but removal."""
    group_id = names.make_id(ctx.store.client.gid)
    ctx.exec(fg.GROUP_DIRECTORY, "rbd", "group_dir_add", text(name) + text(group_id))
    try:
        ctx.write(header_name(group_id), [Create(exclusive=True)])
    except OSError:
        ctx.exec(fg.GROUP_DIRECTORY, "rbd", "group_dir_remove", text(name) + text(group_id))
        raise
    return group_id


def remove_group(ctx: ObjectContext, name: str) -> None:
    """With its snapshots; the members stay as images. A group that is not there is gone already: librbd says nothing
    either."""
    with ignoring(errno.ENOENT):
        group_id = id_of(ctx, name)
        oid = header_name(group_id)
        if exists(ctx, oid):
            for snap in records(ctx, group_id):
                _remove_snap(ctx, group_id, snap)
            for status in _links(ctx, group_id):
                _unlink(ctx, group_id, status.spec)
            remove(ctx, oid)
        ctx.exec(fg.GROUP_DIRECTORY, "rbd", "group_dir_remove", text(name) + text(group_id))


def rename(ctx: ObjectContext, source: str, dest: str) -> None:
    """ENOENT, EEXIST."""
    group_id = id_of(ctx, source)
    ctx.exec(fg.GROUP_DIRECTORY, "rbd", "group_dir_rename", text(source) + text(dest) + text(group_id))


# --- members ----------------------------------------------------------------------------------------------------


def _links(ctx: ObjectContext, group_id: str) -> list[GroupImageStatus]:
    found: list[GroupImageStatus] = []
    start = _START
    while True:
        out = Encoder()
        start.encode_to(out)
        data = ctx.exec(header_name(group_id), "rbd", "group_image_list", out.u64(PAGE).done())
        page = Decoder(data).list(GroupImageStatus.decode_from, 25)
        found += page
        if len(page) < PAGE:
            return found
        start = page[-1].spec


def members(ctx: ObjectContext, name: str) -> list[Member]:
    """By pool and image id, without those in the trash. A group of no such name has none, as in librbd."""
    found: list[GroupImageStatus] = []
    with ignoring(errno.ENOENT):
        found = _links(ctx, id_of(ctx, name))
    named = []
    for status in found:
        pool_id, image_id = status.spec.pool_id, status.spec.image_id
        with ignoring(errno.ENOENT):
            named.append(Member(cls.name_of(_pool(ctx, pool_id), image_id), pool_id, image_id, status.state))
    return named


def _pool(ctx: ObjectContext, pool_id: int) -> ObjectContext:
    """Another pool, in the group's namespace: members of other namespaces there are none."""
    return ctx if pool_id == ctx.pool_id else ctx.store.open(pool_id, ctx.namespace)


def _set_link(ctx: ObjectContext, group_id: str, spec: GroupImageSpec, state: int) -> None:
    out = Encoder()
    GroupImageStatus(spec, state).encode_to(out)
    ctx.exec(header_name(group_id), "rbd", "group_image_set", out.done())


def _forget_link(ctx: ObjectContext, group_id: str, spec: GroupImageSpec) -> None:
    out = Encoder()
    spec.encode_to(out)
    ctx.exec(header_name(group_id), "rbd", "group_image_remove", out.done())


def _member(ctx: ObjectContext, name: str, image_ctx: ObjectContext, image: str) -> tuple[str, GroupImageSpec]:
    """The group's id and the image's record. EINVAL: in different namespaces. ENOENT: no such group or image."""
    if ctx.namespace != image_ctx.namespace:
        raise OSError(errno.EINVAL, "a group and its images are in one namespace")
    group_id = id_of(ctx, name)
    return group_id, GroupImageSpec(cls.id_in_directory(image_ctx, image), image_ctx.pool_id)


def add_image(ctx: ObjectContext, name: str, image_ctx: ObjectContext, image: str) -> None:
    """ENOENT: no such group or image. EEXIST: the image is in another group. EINVAL: it is in another namespace."""
    group_id, spec = _member(ctx, name, image_ctx, image)
    _link(ctx, group_id, spec)


def _link(ctx: ObjectContext, group_id: str, spec: GroupImageSpec) -> None:
    image_ctx, oid = _pool(ctx, spec.pool_id), header_oid(spec.image_id)
    _set_link(ctx, group_id, spec, fg.LINK_INCOMPLETE)
    try:
        image_ctx.exec(oid, "rbd", "image_group_add", GroupSpec(ctx.pool_id, group_id).encode())
    except OSError:
        _forget_link(ctx, group_id, spec)
        raise
    announce(image_ctx, oid)
    _set_link(ctx, group_id, spec, fg.LINK_ATTACHED)


def remove_image(ctx: ObjectContext, name: str, image_ctx: ObjectContext, image: str) -> None:
    """Snapshots of the group that hold the image stay. ENOENT: no such group or image; EBADF: the image is in another
    group."""
    group_id, spec = _member(ctx, name, image_ctx, image)
    _unlink(ctx, group_id, spec)


def remove_image_by_id(ctx: ObjectContext, name: str, pool_id: int, image_id: str) -> None:
    """As `remove_image`, also for an image in the trash."""
    _unlink(ctx, id_of(ctx, name), GroupImageSpec(image_id, pool_id))


def _unlink(ctx: ObjectContext, group_id: str, spec: GroupImageSpec) -> None:
    image_ctx, oid = _pool(ctx, spec.pool_id), header_oid(spec.image_id)
    _set_link(ctx, group_id, spec, fg.LINK_INCOMPLETE)
    with ignoring(errno.ENOENT):
        image_ctx.exec(oid, "rbd", "image_group_remove", GroupSpec(ctx.pool_id, group_id).encode())
        announce(image_ctx, oid)
    _forget_link(ctx, group_id, spec)


def replace_image(ctx: ObjectContext, group_id: str, old: tuple[int, str], new: tuple[int, str]) -> None:
    """Another image, as (pool, id), takes the place of a member; for a moment both are. `ctx`: the group's pool. Called
    again it goes on where it was cut short."""
    _link(ctx, group_id, GroupImageSpec(new[1], new[0]))
    _unlink(ctx, group_id, GroupImageSpec(old[1], old[0]))


def drop_image(ctx: ObjectContext, group_id: str, pool_id: int, image_id: str) -> None:
    """Takes an image out that may be a member, or half of one."""
    _unlink(ctx, group_id, GroupImageSpec(image_id, pool_id))


def leave(handle: ImageHandle) -> None:
    """Takes an image out of its group, if it is in one."""
    pool_id, group_id = cls.group_of(handle.ctx, handle.oid)
    if pool_id != -1:
        _unlink(_pool(handle.ctx, pool_id), group_id, GroupImageSpec(handle.id, handle.ctx.pool_id))


def of_image(handle: ImageHandle) -> tuple[int, str]:
    """Pool and name of the image's group; (-1, "") when it is in none. ENOENT: the group is gone."""
    pool_id, group_id = cls.group_of(handle.ctx, handle.oid)
    return (-1, "") if pool_id == -1 else (pool_id, name_of(_pool(handle.ctx, pool_id), group_id))


# --- snapshots --------------------------------------------------------------------------------------------------


def records(ctx: ObjectContext, group_id: str) -> list[GroupSnapshot]:
    """In the order of their ids, as the class method lists them."""
    found: list[GroupSnapshot] = []
    start = GroupSnapshot("")
    while True:
        data = ctx.exec(header_name(group_id), "rbd", "group_snap_list", start.encode() + u64(PAGE))
        page = Decoder(data).list(GroupSnapshot.decode_from, 19)
        found += page
        if len(page) < PAGE:
            return found
        start = page[-1]


def snaps(ctx: ObjectContext, name: str) -> list[GroupSnapshot]:
    """A group of no such name has none, as in librbd."""
    with ignoring(errno.ENOENT):
        return records(ctx, id_of(ctx, name))
    return []


def find_snap(ctx: ObjectContext, group_id: str, snap: str) -> GroupSnapshot:
    """ENOENT."""
    for record in records(ctx, group_id):
        if record.name == snap:
            return record
    raise OSError(errno.ENOENT, f"no group snapshot named {snap!r}")


def of_snapshot(ctx: ObjectContext, namespace: fh.GroupNamespace) -> GroupSnap:
    """Which snapshot of which group a snapshot of an image belongs to. `ctx`: the image's. ENOENT: it is gone."""
    group_ctx = _pool(ctx, namespace.group_pool)
    name = name_of(group_ctx, namespace.group_id)
    asked = text(namespace.group_snapshot_id)
    data = group_ctx.exec(header_name(namespace.group_id), "rbd", "group_snap_get_by_id", asked)
    return GroupSnap(namespace.group_pool, name, GroupSnapshot.decode(data).name)


def _own(header: Header, namespace: fh.GroupNamespace) -> Snapshot | None:
    return next((snap for snap in header.snaps.values() if snap.namespace == namespace), None)


def _namespace(ctx: ObjectContext, group_id: str, record: GroupSnapshot) -> fh.GroupNamespace:
    return fh.GroupNamespace(ctx.pool_id, group_id, record.id)


@contextmanager
def _open(ctx: ObjectContext, specs: list[tuple[int, str]]) -> Iterator[list[ImageHandle]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(ImageHandle.open(_pool(ctx, pool_id), image_id=image_id)) for pool_id, image_id in specs
        ]


@contextmanager
def _owned(handles: list[ImageHandle]) -> Iterator[None]:
    """All of them stay ours: from the last lock that was taken no client writes to any of them. Always in the same
    order, so that two of these do not wait for each other."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle.exclusive())
        yield


def create_snap(ctx: ObjectContext, name: str, snap: str, flags: int = 0) -> None:
    """All members at one moment, as far as they have the exclusive-lock feature. `flags` as for
    `snapshots.create`.

    ENOENT: no such group, or a member is gone. EEXIST. EROFS: an owner keeps a member's lock. What failed leaves
    nothing; what was cut short is listed as incomplete and can be removed.
    """
    group_id = id_of(ctx, name)
    links = [status.spec for status in _links(ctx, group_id)]
    pending = tuple(ImageSnapshotSpec(spec.pool_id, spec.image_id, 0) for spec in links)
    snap_id = names.make_id(ctx.store.client.gid)
    record = GroupSnapshot(snap_id, snap, fg.SNAPSHOT_INCOMPLETE, pending)
    _set_record(ctx, group_id, record)
    try:
        with _open(ctx, [(spec.pool_id, spec.image_id) for spec in links]) as handles:
            _create_on(ctx, group_id, record, handles, flags)
    except OSError:
        with ignoring(errno.ENOENT):
            _forget_record(ctx, group_id, record)
        raise


def _create_on(
    ctx: ObjectContext, group_id: str, record: GroupSnapshot, handles: list[ImageHandle], flags: int
) -> None:
    namespace = _namespace(ctx, group_id, record)
    image_snap = fg.group_snap_name(ctx.pool_id, group_id, record.id)
    made: list[ImageSnapshotSpec] = []
    try:
        with _owned(handles), guests_quiesced(handles, flags):
            for handle in handles:
                made_id = snapshots.create(handle, image_snap, namespace, SKIP_QUIESCE)
                made.append(ImageSnapshotSpec(handle.ctx.pool_id, handle.id, made_id))
        _set_record(ctx, group_id, replace(record, state=fg.SNAPSHOT_COMPLETE, snapshots=tuple(made)))
    except OSError:
        for handle in handles:
            with ignoring(errno.ENOENT):
                _remove_from(handle, namespace)
        raise


def _remove_from(handle: ImageHandle, namespace: fh.GroupNamespace) -> None:
    found = _own(handle.refresh(), namespace)
    if found is not None:
        snapshots.remove(handle, found.id)


def _set_record(ctx: ObjectContext, group_id: str, record: GroupSnapshot) -> None:
    ctx.exec(header_name(group_id), "rbd", "group_snap_set", record.encode())


def _forget_record(ctx: ObjectContext, group_id: str, record: GroupSnapshot) -> None:
    ctx.exec(header_name(group_id), "rbd", "group_snap_remove", text(record.id))


def remove_snap(ctx: ObjectContext, name: str, snap: str) -> None:
    """ENOENT. Called again it goes on where it was cut short."""
    group_id = id_of(ctx, name)
    _remove_snap(ctx, group_id, find_snap(ctx, group_id, snap))


def _remove_snap(ctx: ObjectContext, group_id: str, record: GroupSnapshot) -> None:
    namespace = _namespace(ctx, group_id, record)
    for spec in record.snapshots:
        image_ctx = _pool(ctx, spec.pool_id)
        if exists(image_ctx, header_oid(spec.image_id)):
            with ImageHandle.open(image_ctx, image_id=spec.image_id) as handle:
                _remove_from(handle, namespace)
    _forget_record(ctx, group_id, record)


def rename_snap(ctx: ObjectContext, name: str, source: str, dest: str) -> None:
    """ENOENT, EEXIST."""
    if source == dest:
        raise OSError(errno.EEXIST, f"it is named {dest!r}")
    group_id = id_of(ctx, name)
    _set_record(ctx, group_id, replace(find_snap(ctx, group_id, source), name=dest))


def rollback(ctx: ObjectContext, name: str, snap: str, progress: Progress | None = None) -> None:
    """Every image the snapshot holds becomes what it was then. ENOENT, EROFS. A member that has no such snapshot (any
    more) is left alone; so is what joined the group later."""
    group_id = id_of(ctx, name)
    record = find_snap(ctx, group_id, snap)
    namespace = _namespace(ctx, group_id, record)
    with _open(ctx, [(spec.pool_id, spec.image_id) for spec in record.snapshots]) as handles, _owned(handles):
        for handle in handles:
            found = _own(handle.refresh(), namespace)
            if found is not None:
                snapshots.rollback(handle, found.id, progress)


def snap_info(ctx: ObjectContext, name: str, snap: str) -> dict[str, object]:
    """What newer releases of librbd tell of a group's snapshot. ENOENT."""
    group_id = id_of(ctx, name)
    record = find_snap(ctx, group_id, snap)
    images = [
        {
            "image_name": name_by_id(_pool(ctx, spec.pool_id), spec.image_id),
            "pool_id": spec.pool_id,
            "snap_id": spec.snap_id,
        }
        for spec in record.snapshots
    ]
    return {
        "id": record.id,
        "name": record.name,
        "state": record.state,
        "image_snap_name": fg.group_snap_name(ctx.pool_id, group_id, record.id),
        "image_snaps": images,
    }
