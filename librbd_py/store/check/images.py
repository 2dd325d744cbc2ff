"""Verification of RBD's own rules: directories, headers, parents and children, object maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from librbd_py.format import features, names, object_map
from librbd_py.format.encoding import DecodeError, Decoder, encode_string
from librbd_py.format.group import GROUP_REF_KEY, GroupSpec
from librbd_py.format.header import (
    COPY_KEY,
    COPYING,
    MIGRATION_ABORTING,
    MIGRATION_DESTINATION,
    MIGRATION_EXECUTING,
    MIGRATION_KEY,
    MIGRATION_PREPARING,
    MigrationSpec,
    Parent,
    Snap,
    decode_children,
    snap_children_key,
    snap_key,
)

from .records import ERROR as _ERROR
from .records import NOTE as _NOTE
from .records import WARNING as _WARNING
from .records import Records, Report

T = TypeVar("T")
_REMOVE = "if nobody needs the image, remove it; otherwise add it to the directory again"


class Header:
    """What one rbd_header.<id> says. Damaged values are None and reported once."""

    def __init__(self, rows: dict[bytes, bytes], place: tuple[int, str, str]) -> None:
        self.pool, self.namespace, self.oid = place
        self.image_id = self.oid[len(names.HEADER_PREFIX) :]
        self._omap = rows
        self.problems: list[str] = []
        self.size = self._number(b"size", 8)
        self.order = self._number(b"order", 1)
        self.features = self._number(b"features", 8)
        self.flags = self._number(b"flags", 8) if b"flags" in self._omap else 0
        self.parent = self._decoded(b"parent", Parent.decode) if b"parent" in self._omap else None
        self.group = self._decoded(GROUP_REF_KEY, GroupSpec.decode) if GROUP_REF_KEY in self._omap else None
        self.snaps: dict[int, Snap] = {}
        for key in self._omap:
            if key.startswith(b"snapshot_"):
                snap = self._decoded(key, Snap.decode)
                if snap is not None and snap_key(snap.id) == key:
                    self.snaps[snap.id] = snap
                elif snap is not None:
                    self.problems.append(f"{key!r} holds snapshot {snap.id}")

    def _number(self, key: bytes, width: int) -> int | None:
        raw = self._omap.get(key)
        if raw is None or len(raw) != width:
            self.problems.append(f"{key.decode()} is {'missing' if raw is None else 'damaged'}")
            return None
        return int.from_bytes(raw, "little")

    def _decoded(self, key: bytes, decode: Callable[[bytes], T]) -> T | None:
        try:
            return decode(self._omap[key])
        except DecodeError as error:
            self.problems.append(f"{key.decode(errors='replace')}: {error.strerror}")
            return None

    def children(self, snap_id: int) -> list[tuple[int, str, str]]:
        raw = self._omap.get(snap_children_key(snap_id))
        if raw is None:
            return []
        children = self._decoded(snap_children_key(snap_id), decode_children)
        return [(child.pool_id, child.pool_namespace, child.image_id) for child in children or ()]

    @property
    def copying(self) -> bytes | None:
        """How far a copy from another store came that is not done."""
        return self._omap.get(COPY_KEY)

    @property
    def migration(self) -> MigrationSpec | None:
        return self._decoded(MIGRATION_KEY, MigrationSpec.decode) if MIGRATION_KEY in self._omap else None

    @property
    def data(self) -> tuple[int, str]:
        """The pool of its data objects and what their names begin with."""
        raw = self._omap.get(b"object_prefix", b"")
        try:
            prefix = Decoder(raw).string()
        except DecodeError:
            prefix = ""
        pool = self._omap.get(b"data_pool_id", b"")
        return int.from_bytes(pool, "little") if len(pool) == 8 else self.pool, prefix

    @property
    def objects(self) -> int | None:
        return None if self.size is None else self.objects_of(self.size)

    def objects_of(self, size: int) -> int | None:
        """How many data objects an image of `size` bytes has in this one's layout: a striped one starts all objects
        of a set at once."""
        if self.order is None or not 12 <= self.order <= 25:
            return None
        unit, count = 1 << self.order, 1
        if b"stripe_unit" in self._omap:
            unit, count = self._number(b"stripe_unit", 8) or unit, self._number(b"stripe_count", 8) or count
        sets, rest = divmod(size, count << self.order)
        return sets * count + min(count, -(-rest // unit))


class Data(Protocol):
    """What keeps the data objects of images."""

    def problem(self, header: Header) -> tuple[str, str, str] | None:
        """(severity, what, advice) when they cannot be where the header says."""

    def keeps_map(self, header: Header) -> bool:
        """Is HEAD's object map no object of its own?"""

    def map_states(self, header: Header) -> bytes | None:
        """That map; None: it is lost."""

    def numbers(self, header: Header) -> Iterable[int]:
        """Of the objects that exist, or may."""

    def exists(self, header: Header, number: int) -> bool: ...


class ImageChecker:
    def __init__(self, report: Report, records: Records, data: Data) -> None:
        self._report = report
        self._records = records
        self._data = data
        self.headers: dict[tuple[int, str, str], Header] = {}  # (pool, namespace, image id)
        for pool, namespace in records.spaces():
            for oid in records.objects(pool, namespace, names.HEADER_PREFIX):
                rows = records.omap(pool, namespace, oid)
                if rows is not None:
                    header = Header(rows, (pool, namespace, oid))
                    self.headers[pool, namespace, header.image_id] = header

    def _found(self, severity: str, where: str, what: str, advice: str) -> None:
        self._report.found(severity, where, what, advice)

    def run(self) -> None:
        for pool, namespace in self._records.spaces():
            self._directory(pool, namespace)
        for header in self.headers.values():
            self._header(header)
            self._family(header)
            self._migration(header)
            if header.copying is not None:
                self._found(_NOTE, header.oid, "is a copy that was cut off", "copy the image again (rbdpy store copy)")
            if header.copying is None or not header.copying.startswith(COPYING):
                self._maps(header)

    def _migration(self, header: Header) -> None:
        """A migration may wait between its steps for as long as anybody likes, but not within one."""
        spec = header.migration
        if spec is None:
            return
        if spec.header_type != MIGRATION_DESTINATION:
            # The record of a destination says more, once there is one.
            there = self.headers.get((spec.pool_id, spec.pool_namespace, spec.image_id))
            if there is None or there.migration is None:
                what = "its migration was cut short: where it migrates to is no image that knows of it"
                self._found(_NOTE, header.oid, what, "abort it")
            return
        if spec.state in (MIGRATION_PREPARING, MIGRATION_ABORTING):
            step = "prepared" if spec.state == MIGRATION_PREPARING else "aborted"
            self._found(_NOTE, header.oid, f"its migration was being {step} when that was cut short", "abort it")
        elif spec.state == MIGRATION_EXECUTING:
            self._found(
                _NOTE, header.oid, "not all of it has come over from where it migrates from", "execute it again"
            )

    def _directory(self, pool: int, namespace: str) -> None:
        where = f"pool {pool}{'/' + namespace if namespace else ''}, rbd_directory"
        by_name: dict[str, str] = {}
        by_id: dict[str, str] = {}
        for key, value in (self._records.omap(pool, namespace, names.DIRECTORY) or {}).items():
            kind, _, rest = key.partition(b"_")
            if kind not in (b"name", b"id"):
                continue
            try:
                source = Decoder(value)
                text = source.string()
                source.finish("directory entry")
                (by_name if kind == b"name" else by_id)[rest.decode()] = text
            except (DecodeError, UnicodeDecodeError):
                self._found(_ERROR, where, f"entry {key!r} is damaged", "remove the entry and add the image again")
        for name, image_id in by_name.items():
            if by_id.get(image_id) != name:
                self._found(
                    _ERROR, where, f"image {name!r} has id {image_id!r}, which is not {name!r}", "rename the image"
                )
            if (pool, namespace, image_id) not in self.headers:
                self._found(_ERROR, where, f"image {name!r}: header of {image_id!r} is missing", "remove the image")
            if self._records.data(pool, namespace, names.id_object(name)) != encode_string(image_id):
                self._found(
                    _ERROR,
                    where,
                    f"image {name!r}: rbd_id.{name} does not hold its id {image_id!r}",
                    "remove the image",
                )
        for image_id, name in by_id.items():
            if by_name.get(name) != image_id:
                self._found(
                    _ERROR, where, f"id {image_id!r} is called {name!r}, which is another image", "rename the image"
                )
        rows = self._records.omap(pool, namespace, names.TRASH) or {}
        trash = {key[len(b"id_") :].decode(errors="replace") for key in rows}
        for space in self.headers:
            if space[:2] == (pool, namespace) and space[2] not in by_id and space[2] not in trash:
                self._found(_WARNING, where, f"image with id {space[2]!r} has a header and no name", _REMOVE)

    def _header(self, header: Header) -> None:
        for problem in header.problems:
            self._found(_ERROR, header.oid, problem, "copy what can be read from the image, then remove it")
        if misplaced := self._data.problem(header):
            severity, what, advice = misplaced
            self._found(severity, header.oid, what, advice)

    def _family(self, header: Header) -> None:
        for snap in header.snaps.values():
            children = header.children(snap.id)
            if len(children) != snap.child_count:
                self._found(
                    _ERROR,
                    header.oid,
                    f"snapshot {snap.id} counts {snap.child_count} clones and lists {len(children)}",
                    "flatten its clones",
                )
            for pool, namespace, image_id in children:
                child = self.headers.get((pool, namespace, image_id))
                if child is None or not self._is_parent(header, snap.id, child):
                    self._found(
                        _WARNING,
                        header.oid,
                        f"snapshot {snap.id} lists clone {image_id!r} in pool {pool}, which is none of its clones",
                        "it goes when the snapshot is removed",
                    )
        parent = header.parent
        if parent is None or not parent.exists:
            return
        spec = parent.spec
        above = self.headers.get((spec.pool_id, spec.pool_namespace, spec.image_id))
        if above is None or spec.snap_id not in above.snaps:
            self._found(
                _ERROR,
                header.oid,
                f"its parent (image {spec.image_id!r}, snapshot {spec.snap_id}, pool {spec.pool_id}) does not exist",
                "blocks that were never written in the clone are lost; restore the parent from a backup",
            )

    def _is_parent(self, header: Header, snap_id: int, child: Header) -> bool:
        spec = child.parent.spec if child.parent is not None else None
        return spec is not None and (spec.pool_id, spec.pool_namespace, spec.image_id, spec.snap_id) == (
            header.pool,
            header.namespace,
            header.image_id,
            snap_id,
        )

    def _maps(self, header: Header) -> None:
        if header.features is None or not header.features & features.OBJECT_MAP:
            return
        if header.flags is None or not header.flags & features.FLAG_OBJECT_MAP_INVALID:
            self._map(header, names.object_map(header.image_id), header.objects, head=True)
        for snap in header.snaps.values():
            if not snap.flags & features.FLAG_OBJECT_MAP_INVALID and header.order is not None:
                count = header.objects_of(snap.image_size)
                self._map(header, names.object_map(header.image_id, snap.id), count, head=False)

    def _map(self, header: Header, oid: str, count: int | None, *, head: bool) -> None:
        advice = "rebuild the object map"
        kept = head and self._data.keeps_map(header)
        raw = None if kept else self._records.data(header.pool, header.namespace, oid)
        if raw is None and not kept:
            self._found(_ERROR, oid, "is missing although the image has the object-map feature", advice)
            return
        try:
            states = self._data.map_states(header) if raw is None else bytes(object_map.decode(raw))
        except DecodeError as error:
            self._found(_ERROR, oid, f"is damaged: {error.strerror}", advice)
            return
        if states is None:
            self._found(_ERROR, oid, "the layout has lost it", advice)
        elif count is not None and len(states) != count:
            self._found(_ERROR, oid, f"has {len(states)} objects, the image has {count}", advice)
        if head and states is not None and not kept:
            self._compare(header, oid, states)

    def _compare(self, header: Header, oid: str, states: bytes) -> None:
        """A map that the data's keeper does not keep may say "absent" of objects that exist: readers would see
        zeros."""
        absent = [o for o in self._data.numbers(header) if o >= len(states) or states[o] == object_map.NONEXISTENT]
        wrong = [o for o in absent if self._data.exists(header, o)]
        if wrong:
            self._found(
                _ERROR, oid, f"says that {len(wrong)} objects are absent which exist, from {wrong[0]}", "rebuild it"
            )
