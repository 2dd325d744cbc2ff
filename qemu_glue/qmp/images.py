"""Images as a machine's disks name them, for what is done to them from beside the machine: resize and snapshots.

The guest's service owns the image's lock; a maintenance operation is asked of it, so the guest keeps its disk.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from librbd_py.image import group as groups
from librbd_py.image import resize as resizing
from librbd_py.image import snapshots
from librbd_py.image.handle import ImageHandle
from librbd_py.store import connect, default_url
from librbd_py.store.api import Store


@dataclass(frozen=True)
class ImageRef:
    """[pool/[namespace/]]image of a store (a URL; None: $RBDPY_STORE or the default)."""

    image: str
    pool: str = "rbd"
    namespace: str = ""
    store: str | None = None

    @classmethod
    def parse(cls, text: str, store: str | None = None) -> ImageRef:
        """POOL/NAMESPACE/IMAGE, POOL/IMAGE or IMAGE. ValueError."""
        parts = text.split("/")
        if not 1 <= len(parts) <= 3 or not all(parts) or "@" in text:
            raise ValueError(f"invalid image spec {text!r}")
        return cls(parts[-1], parts[0] if len(parts) > 1 else "rbd", parts[1] if len(parts) == 3 else "", store)

    def __str__(self) -> str:
        return "/".join(part for part in (self.pool, self.namespace, self.image) if part)

    def open(self) -> Opened:
        """Blocks. OSError."""
        return Opened(self)

    async def resize(self, size: int) -> None:
        """OSError: also EINVAL and what the lock's owner says."""
        await asyncio.to_thread(self._resize, size)

    def _resize(self, size: int) -> None:
        opened = self.open()
        try:
            resizing.resize(opened.handle, size, allow_shrink=True)
        finally:
            opened.close()


class Opened:
    """An open image; everything blocks."""

    def __init__(self, image: ImageRef) -> None:
        self.image = image
        self._store: Store = connect(image.store or default_url())
        try:
            self.handle = ImageHandle.open(self._store.open(image.pool, image.namespace), image.image)
        except BaseException:
            self._store.close()
            raise

    def has_snapshot(self, name: str) -> bool:
        return any(snap.name == name for snap in self.handle.header.snaps.values())

    def create(self, name: str) -> None:
        snapshots.create(self.handle, name)

    def remove(self, name: str) -> None:
        self.handle.refresh()
        snapshots.remove(self.handle, snapshots.find(self.handle.header, name).id)

    def close(self) -> None:
        try:
            self.handle.close()
        finally:
            self._store.close()


@dataclass(frozen=True)
class GroupRef:
    """A consistency group: its snapshot is one of all members, listed and removed as one."""

    group: str
    pool: str = "rbd"
    namespace: str = ""
    store: str | None = None

    def __str__(self) -> str:
        return "group " + "/".join(part for part in (self.pool, self.namespace, self.group) if part)

    def open(self) -> OpenedGroup:
        """Blocks. OSError."""
        return OpenedGroup(self)


class OpenedGroup:
    """As `Opened`, of a group."""

    def __init__(self, image: GroupRef) -> None:
        self.image = image
        self._store: Store = connect(image.store or default_url())
        try:
            self._ctx = self._store.open(image.pool, image.namespace)
            groups.id_of(self._ctx, image.group)
        except BaseException:
            self._store.close()
            raise

    def has_snapshot(self, name: str) -> bool:
        return any(record.name == name for record in groups.snaps(self._ctx, self.image.group))

    def create(self, name: str) -> None:
        groups.create_snap(self._ctx, self.image.group, name)

    def remove(self, name: str) -> None:
        groups.remove_snap(self._ctx, self.image.group, name)

    def close(self) -> None:
        self._store.close()
