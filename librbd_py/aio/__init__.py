"""The `asyncio` face: `rados` and `rbd` with the same names as coroutines.

    async with AsyncRados(conf={"rbdpy_store": "embedded:/srv/store"}) as cluster:
        async with await cluster.open_ioctx("rbd") as ioctx:
            await AsyncRBD().create(ioctx, "disk", 1 << 30)
            async with AsyncImage(ioctx, "disk") as image:
                await asyncio.gather(*(image.write(block, at) for at in range(0, 1 << 20, 4096)))
                async for done, total in image.resize(2 << 30):
                    print(done, total)

Methods that return iterators give lists here; long ones give an `Operation`, to await or to iterate over.
"""

from __future__ import annotations

from typing import Any

from librbd_py import rbd as face

from .image import AsyncImage
from .rados import AsyncIoctx, AsyncRados, AsyncWatch, Notification
from .run import Face, Operation, coroutine, listing, operation

__all__ = [
    "AsyncGroup",
    "AsyncImage",
    "AsyncIoctx",
    "AsyncRBD",
    "AsyncRados",
    "AsyncWatch",
    "Notification",
    "Operation",
]


class AsyncRBD(Face):
    """`rbd.RBD` with coroutines; takes AsyncIoctx and Ioctx alike."""

    sync: face.RBD

    def __init__(self) -> None:
        super().__init__(face.RBD())

    async def open_image(self, ioctx: Any, *args: Any, **kwargs: Any) -> AsyncImage:
        """What `aio_open_image` is to callbacks."""
        return await AsyncImage(ioctx, *args, **kwargs).open()

    clone = coroutine(face.RBD.clone)
    config_get = coroutine(face.RBD.config_get)
    config_list = listing(face.RBD.config_list)
    config_remove = coroutine(face.RBD.config_remove)
    config_set = coroutine(face.RBD.config_set)
    create = coroutine(face.RBD.create)
    features_from_string = coroutine(face.RBD.features_from_string)
    features_to_string = coroutine(face.RBD.features_to_string)
    group_create = coroutine(face.RBD.group_create)
    group_list = listing(face.RBD.group_list)
    group_remove = coroutine(face.RBD.group_remove)
    group_rename = coroutine(face.RBD.group_rename)
    list = coroutine(face.RBD.list)
    list2 = listing(face.RBD.list2)
    mirror_mode_get = coroutine(face.RBD.mirror_mode_get)
    namespace_create = coroutine(face.RBD.namespace_create)
    namespace_exists = coroutine(face.RBD.namespace_exists)
    namespace_list = listing(face.RBD.namespace_list)
    namespace_remove = coroutine(face.RBD.namespace_remove)
    migration_abort = operation(face.RBD.migration_abort)
    migration_commit = operation(face.RBD.migration_commit)
    migration_execute = operation(face.RBD.migration_execute)
    migration_prepare = coroutine(face.RBD.migration_prepare)
    migration_prepare_import = coroutine(face.RBD.migration_prepare_import)
    migration_status = coroutine(face.RBD.migration_status)
    pool_init = coroutine(face.RBD.pool_init)
    pool_metadata_get = coroutine(face.RBD.pool_metadata_get)
    pool_metadata_list = listing(face.RBD.pool_metadata_list)
    pool_metadata_remove = coroutine(face.RBD.pool_metadata_remove)
    pool_metadata_set = coroutine(face.RBD.pool_metadata_set)
    pool_stats_get = coroutine(face.RBD.pool_stats_get)
    remove = operation(face.RBD.remove)
    rename = coroutine(face.RBD.rename)
    trash_get = coroutine(face.RBD.trash_get)
    trash_list = listing(face.RBD.trash_list)
    trash_move = coroutine(face.RBD.trash_move)
    trash_purge = coroutine(face.RBD.trash_purge)
    trash_remove = operation(face.RBD.trash_remove)
    trash_restore = coroutine(face.RBD.trash_restore)
    version = coroutine(face.RBD.version)


class AsyncGroup(Face):
    """`rbd.Group` with coroutines; takes AsyncIoctx and Ioctx alike."""

    sync: face.Group

    def __init__(self, ioctx: Any, name: str | bytes) -> None:
        super().__init__(face.Group(ioctx, name))

    async def __aenter__(self) -> AsyncGroup:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._outstanding.settle()

    add_image = coroutine(face.Group.add_image)
    create_snap = coroutine(face.Group.create_snap)
    get_snap_info = coroutine(face.Group.get_snap_info)
    id = coroutine(face.Group.id)
    list_images = listing(face.Group.list_images)
    list_snaps = listing(face.Group.list_snaps)
    remove_image = coroutine(face.Group.remove_image)
    remove_snap = coroutine(face.Group.remove_snap)
    rename_snap = coroutine(face.Group.rename_snap)
    rollback_to_snap = operation(face.Group.rollback_to_snap)
