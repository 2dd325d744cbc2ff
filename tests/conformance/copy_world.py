"""A source full of images to carry to another store, and what must be the same there."""

from __future__ import annotations

import random
from typing import Any

from librbd_py import rbd
from librbd_py.format import features as ft
from librbd_py.format import trash as ftr
from librbd_py.image import clones, cls, directory, map_check, pool, snapshots, trash
from librbd_py.image.content import read_view
from librbd_py.image.directory import CreateOptions
from librbd_py.image.handle import ImageHandle
from librbd_py.store.api import NOSNAP, ObjectContext, Store

ORDER = 16  # 64 KiB objects


def scribble(handle: ImageHandle, random_: random.Random, times: int) -> None:
    """Writes, discards and zeroes, so that objects come, change in part, lose their ends and go."""
    rbd_image = rbd.Image(handle.ctx, handle.name)
    try:
        for _ in range(times):
            size = rbd_image.size()
            offset = random_.randrange(size)
            length = min(random_.choice([1, 512, 5000, 40000, 150000]), size - offset)
            if random_.random() < 0.3:
                rbd_image.discard(offset, length)
            else:
                rbd_image.write(random_.randbytes(length), offset)
        rbd_image.flush()
    finally:
        rbd_image.close()


def _change(ctx: ObjectContext, name: str, random_: random.Random, times: int) -> None:
    with ImageHandle.open(ctx, name, read_only=True) as handle:
        scribble(handle, random_, times)


def _snap(ctx: ObjectContext, name: str, snap: str, *, protect: bool = False) -> None:
    with rbd.Image(ctx, name) as image:
        image.create_snap(snap)
        if protect:
            image.protect_snap(snap)


def fill(store: Store, first: str, second: str, seed: int = 1) -> None:
    """In two pools that exist: `plain` with snapshots and sizes; `striped`, its data in the second pool; `v1` and `v2`,
    clones; `grand`, a clone of a clone; `orphan`, whose parent is in the trash; `kin`, whose parent's snapshot is;
    `space/inside` in a namespace."""
    random_ = random.Random(seed)
    one, two = store.open(first), store.open(second)
    r = rbd.RBD()
    r.create(one, "plain", 9 << ORDER, order=ORDER)
    with rbd.Image(one, "plain") as image:
        image.metadata_set("conf_rbd_cache", "false")
        image.metadata_set("note", "x" * 3000)
    for number, size in enumerate((9, 9, 12, 5, 7)):
        with rbd.Image(one, "plain") as image:
            image.resize((size << ORDER) - number * 1000)
        _change(one, "plain", random_, 6)
        _snap(one, "plain", f"s{number}", protect=number == 2)
    with rbd.Image(one, "plain") as image:
        image.remove_snap("s1")
    _change(one, "plain", random_, 4)
    striped = CreateOptions(order=ORDER, stripe_unit=4096, stripe_count=3, data_pool=second)
    directory.create(one, "striped", 500_000, striped)
    for snap in ("a", "b"):
        _change(one, "striped", random_, 8)
        _snap(one, "striped", snap)
    shallow = CreateOptions(order=ORDER, features=ft.DEFAULT & ~ft.DEEP_FLATTEN)
    clones.clone(one, "plain", "s2", two, "v2", shallow)
    clones.clone(one, "plain", "s2", one, "v1", CreateOptions(order=ORDER), clone_format=1)
    for ctx, name in ((two, "v2"), (one, "v1")):
        _change(ctx, name, random_, 3)
        _snap(ctx, name, "c", protect=True)
        _change(ctx, name, random_, 2)
    clones.clone(two, "v2", "c", one, "grand", CreateOptions(order=ORDER))
    with rbd.Image(two, "v2") as image:
        image.flatten()  # its snapshot still shows the parent
    r.create(one, "gone", 3 << ORDER, order=ORDER)
    _change(one, "gone", random_, 4)
    _snap(one, "gone", "last")
    clones.clone(one, "gone", "last", two, "orphan", CreateOptions(order=ORDER))
    trash.move(one, "gone")
    r.create(one, "bare", 3 << ORDER, order=ORDER)
    _change(one, "bare", random_, 4)
    _snap(one, "bare", "lost")
    clones.clone(one, "bare", "lost", one, "kin", CreateOptions(order=ORDER))
    with ImageHandle.open(one, "bare") as handle:
        snapshots.remove(handle, snapshots.find(handle.header, "lost").id)
    pool.namespace_create(one, "space")
    inside = store.open(first, "space")
    r.create(inside, "inside", 2 << ORDER, order=ORDER)
    _change(inside, "inside", random_, 2)
    _snap(inside, "inside", "i")
    r.create(one, "empty", 0)


def described(store: Store, pools: tuple[str, ...], *, ids: bool = True) -> dict[str, Any]:
    """Every image of these pools: "pool/namespace/name" -> what is known of it, without what each store numbers itself
    (pools, snapshots)."""
    names = {row.pool_id: row.name for row in store.pools()}
    found: dict[str, Any] = {}
    for name in pools:
        for namespace in ["", *pool.namespaces(store.open(name))]:
            ctx = store.open(name, namespace)
            rows = [(image_id, image, "") for image, image_id in cls.list_images(ctx).items()]
            rows += [(image_id, spec.name, "trash") for image_id, spec in cls.trash_list(ctx).items()]
            for image_id, image, where in rows:
                key = f"{name}/{namespace}/{image}{where}"
                found[key] = _image(ctx, image_id, names)
                found[key]["id"] = image_id if ids else ""
                if where:
                    spec = cls.trash_get(ctx, image_id)
                    assert spec.source == ftr.SOURCE_USER
                    found[key]["trash"] = spec
    return found


def _image(ctx: ObjectContext, image_id: str, names: dict[int, str]) -> dict[str, Any]:
    with ImageHandle.open(ctx, image_id=image_id, read_only=True) as handle:
        header = handle.header
        order = [*header.snaps, NOSNAP]
        assert not header.has(ft.OBJECT_MAP) or map_check.differences(handle) == []
        parent: tuple[str, ...] = ()
        if header.parent.exists:
            spec = header.parent
            above = handle.store.open(spec.pool_id, spec.pool_namespace)
            with ImageHandle.open(above, image_id=spec.image_id, read_only=True) as other:
                snap = other.header.snaps[spec.snap_id]
            parent = (names[spec.pool_id], spec.pool_namespace, other.name, snap.name)
        maps = [bytes(states) for states in map_check.states_of(handle).values()]
        return {
            "header": (header.order, header.size, header.features, header.op_features, header.flags, header.layout),
            "data": names.get(header.data_pool_id, ""),
            "parent": (*parent, header.parent_overlap),
            "times": [cls.timestamp(ctx, handle.oid, which) for which in ("create", "access", "modify")],
            "metadata": cls.metadata(ctx, handle.oid),
            "snaps": [
                (s.name, s.size, s.namespace, s.protection, s.flags, s.timestamp, s.children, s.parent_overlap)
                for s in header.snaps.values()
            ],
            "children": [
                [(names[c.pool_id], c.pool_namespace, clones.describe(handle, c).name) for c in some]
                for some in (clones.children_of(handle, snap_id) for snap_id in header.snaps)
            ],
            "content": [read_view(view, 0, view.size) for view in (handle.view_at(snap_id) for snap_id in order)],
            "maps": maps,
        }
