"""Verification of groups, their members and snapshots, from both sides; namespaces."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from librbd_py.format import group as fg
from librbd_py.format import names
from librbd_py.format.encoding import DecodeError, Decoder
from librbd_py.format.header import GroupNamespace

from .images import Header
from .records import WARNING as _WARNING
from .records import Records, Report

T = TypeVar("T")
_NAME, _ID = b"name_", b"id_"
Place = tuple[int, str, str]  # pool, namespace, id


class Groups:
    def __init__(self, report: Report, records: Records, headers: dict[Place, Header]) -> None:
        self._report = report
        self._store = records
        self._headers = headers
        self._members: set[tuple[Place, int, str]] = set()  # group, pool and id of the image
        self._records: set[tuple[Place, str]] = set()  # group, id of the group's snapshot

    def run(self) -> None:
        spaces = self._store.spaces()
        for pool, namespace in spaces:
            known = self._directory(pool, namespace)
            for oid in self._store.objects(pool, namespace, fg.GROUP_HEADER_PREFIX):
                group_id = oid[len(fg.GROUP_HEADER_PREFIX) :]
                if group_id not in known:
                    self._found(oid, "is the header of a group that has no name", "remove it if nobody needs it")
                self._group((pool, namespace, group_id), oid)
        for header in self._headers.values():
            self._image(header)
        self._namespaces(spaces)

    def _found(self, where: str, what: str, advice: str) -> None:
        self._report.found(_WARNING, where, what, advice)

    def _rows(self, pool: int, namespace: str, oid: str) -> list[tuple[bytes, bytes]]:
        return list((self._store.omap(pool, namespace, oid) or {}).items())

    def _decoded(self, where: str, key: bytes, value: bytes, decode: Callable[[bytes], T]) -> T | None:
        try:
            return decode(value)
        except (DecodeError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, DecodeError) else error
            self._found(where, f"entry {key!r} is damaged: {reason}", "remove the entry")
            return None

    def _directory(self, pool: int, namespace: str) -> set[str]:
        """The ids that have names."""
        where = f"pool {pool}{'/' + namespace if namespace else ''}, {fg.GROUP_DIRECTORY}"
        by_name: dict[str, str] = {}
        by_id: dict[str, str] = {}
        for key, value in self._rows(pool, namespace, fg.GROUP_DIRECTORY):
            kind = _NAME if key.startswith(_NAME) else _ID if key.startswith(_ID) else b""
            text = self._decoded(where, key, value, lambda data: Decoder(data).string()) if kind else None
            if text is not None:
                (by_name if kind == _NAME else by_id)[key[len(kind) :].decode(errors="surrogateescape")] = text
        for name, group_id in by_name.items():
            if by_id.get(group_id) != name:
                self._found(where, f"group {name!r} has id {group_id!r}, which is not {name!r}", "rename the group")
            if self._store.omap(pool, namespace, fg.GROUP_HEADER_PREFIX + group_id) is None:
                self._found(where, f"group {name!r}: its header is missing", "remove the group")
        for group_id, name in by_id.items():
            if by_name.get(name) != group_id:
                self._found(where, f"group id {group_id!r} is called {name!r}, which is another", "rename the group")
        return {*by_name.values(), *by_id}

    def _group(self, place: Place, oid: str) -> None:
        pool, namespace, _ = place
        for key, value in self._rows(pool, namespace, oid):
            if key.startswith(fg.IMAGE_PREFIX):
                self._member(place, oid, key, value)
            elif key.startswith(fg.SNAPSHOT_PREFIX):
                record = self._decoded(oid, key, value, fg.GroupSnapshot.decode)
                if record is not None:
                    self._records.add((place, record.id))
                    self._snapshot(place, oid, record)

    def _member(self, place: Place, oid: str, key: bytes, value: bytes) -> None:
        number, _, image_id = key[len(fg.IMAGE_PREFIX) :].decode(errors="surrogateescape").partition("_")
        try:
            pool = int(number, 16)
        except ValueError:
            self._found(oid, f"entry {key!r} is damaged", "remove the entry")
            return
        self._members.add((place, pool, image_id))
        header = self._headers.get((pool, place[1], image_id))
        if header is None:
            self._found(oid, f"member {image_id!r} of pool {pool} does not exist", "remove it from the group")
        elif value[:1] != bytes([fg.LINK_ATTACHED]):
            what = f"member {image_id!r}: joining or leaving the group was cut short"
            self._found(oid, what, "remove it from the group")
        elif header.group != fg.GroupSpec(place[0], place[2]):
            self._found(oid, f"member {image_id!r} does not know of this group", "remove it from the group")

    def _snapshot(self, place: Place, oid: str, record: fg.GroupSnapshot) -> None:
        if record.state != fg.SNAPSHOT_COMPLETE:
            self._found(oid, f"snapshot {record.name!r} was cut short", "remove the group's snapshot")
            return
        for spec in record.snapshots:
            header = self._headers.get((spec.pool_id, place[1], spec.image_id))
            if header is None or spec.snap_id not in header.snaps:
                what = f"snapshot {record.name!r} has lost that of image {spec.image_id!r}"
                self._found(oid, what, "it cannot be rolled back to: remove the group's snapshot")

    def _image(self, header: Header) -> None:
        group = header.group
        if group is not None and group.exists:
            place = (group.pool_id, header.namespace, group.group_id)
            if (place, header.pool, header.image_id) not in self._members:
                what = f"says that it is in group {group.group_id!r}, which does not list it"
                self._found(header.oid, what, "add it to a group and remove it again")
        for snap in header.snaps.values():
            space = snap.namespace
            if isinstance(space, GroupNamespace):
                place = (space.group_pool, header.namespace, space.group_id)
                if (place, space.group_snapshot_id) not in self._records:
                    self._found(
                        header.oid, f"snapshot {snap.id} is of a group's that does not exist", "remove it by id"
                    )

    def _namespaces(self, spaces: list[tuple[int, str]]) -> None:
        """Images in a namespace that is not listed are found by nobody."""
        for pool in sorted({pool for pool, _ in spaces}):
            listed = {key for key, _ in self._rows(pool, "", names.NAMESPACES)}
            used = {space for number, space, _ in self._headers if number == pool and space}
            for namespace in sorted(used):
                if b"name_" + namespace.encode(errors="surrogateescape") not in listed:
                    self._found(
                        f"pool {pool}/{namespace}", "has images and is no namespace of the pool", "create the namespace"
                    )
