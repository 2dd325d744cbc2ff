"""What operations on images that were cut short left behind."""

from __future__ import annotations

from librbd_py.format import names, trash
from librbd_py.format.encoding import DecodeError, Decoder
from librbd_py.format.header import TrashNamespace

from .images import Header
from .records import WARNING as _WARNING
from .records import Records, Report

_STATES = {trash.STATE_MOVING: "moved to the trash", trash.STATE_RESTORING: "restored"}
Headers = dict[tuple[int, str, str], Header]  # (pool, namespace, image id)


class Leftovers:
    def __init__(self, report: Report, records: Records, headers: Headers) -> None:
        self._report = report
        self._records = records
        self._headers = headers

    def run(self) -> None:
        for pool, namespace in self._records.spaces():
            self._trash(pool, namespace)
            self._ids(pool, namespace)
            self._maps(pool, namespace)
            self._old_children(pool, namespace)
        for header in self._headers.values():
            for snap in header.snaps.values():
                if isinstance(snap.namespace, TrashNamespace) and not header.children(snap.id):
                    what = (
                        f"snapshot {snap.id} ({snap.namespace.original_name!r}) is in the trash and no clone needs it"
                    )
                    self._found(header.oid, what, "remove it again, by its id")

    def _found(self, where: str, what: str, advice: str) -> None:
        self._report.found(_WARNING, where, what, advice)

    def _rows(self, pool: int, namespace: str, oid: str) -> dict[bytes, bytes]:
        return self._records.omap(pool, namespace, oid) or {}

    def _leads_to(self, pool: int, namespace: str, name: str) -> str | None:
        """The id that the name stands for."""
        try:
            return Decoder(self._records.data(pool, namespace, names.id_object(name)) or b"").string()
        except DecodeError:
            return None

    def _trash(self, pool: int, namespace: str) -> None:
        for key, value in self._rows(pool, namespace, names.TRASH).items():
            where = f"pool {pool}{'/' + namespace if namespace else ''}, rbd_trash"
            try:
                source = Decoder(value)
                spec = trash.TrashImageSpec.decode_from(source)
            except DecodeError as error:
                self._found(where, f"entry {key!r} is damaged: {error.strerror}", "remove the entry")
                continue
            image_id = key[len(trash.KEY_PREFIX) :].decode(errors="replace")
            if self._leads_to(pool, namespace, spec.name) == image_id:
                self._report.found(
                    _WARNING,
                    where,
                    f"image {image_id!r} is in the trash and can be opened as {spec.name!r}",
                    "remove the entry",
                    lambda key=key: self._records.drop(pool, namespace, names.TRASH, [key]),  # type: ignore[misc]
                )
            elif spec.source == trash.SOURCE_REMOVING:
                what = f"image {image_id!r} ({spec.name!r}): its creation or removal was cut short"
                self._found(where, what, "remove it from the trash by its id")
            elif spec.source == trash.SOURCE_MIGRATION and not self._migrates(pool, namespace, image_id):
                what = f"image {image_id!r} ({spec.name!r}): its migration was cut short at the beginning or the end"
                self._found(where, what, "abort the migration by this name, or commit it by its new one")
            elif spec.state in _STATES:
                what = f"image {image_id!r} ({spec.name!r}) was being {_STATES[spec.state]} when that was cut short"
                self._found(where, what, "do it again")

    def _migrates(self, pool: int, namespace: str, image_id: str) -> bool:
        header = self._headers.get((pool, namespace, image_id))
        return header is not None and (header.migration is not None or header.copying is not None)

    def _ids(self, pool: int, namespace: str) -> None:
        known = self._rows(pool, namespace, names.DIRECTORY)
        for oid in self._records.objects(pool, namespace, names.ID_PREFIX):
            name = oid[len(names.ID_PREFIX) :]
            if b"name_" + name.encode(errors="surrogateescape") not in known:
                self._found(oid, "names an image that has another name, or none", "finish renaming, or remove it")

    def _maps(self, pool: int, namespace: str) -> None:
        for oid in self._records.objects(pool, namespace, names.OBJECT_MAP_PREFIX):
            image_id, _, snap_id = oid[len(names.OBJECT_MAP_PREFIX) :].partition(".")
            header = self._headers.get((pool, namespace, image_id))
            if header is None or (snap_id and snap_id not in {f"{number:016x}" for number in header.snaps}):
                self._found(oid, "is the object map of nothing that exists", "remove it")

    def _old_children(self, pool: int, namespace: str) -> None:
        """Clones of format 1 are in a list in their own pool."""
        for key, value in self._rows(pool, namespace, names.CHILDREN).items():
            try:
                children = Decoder(value).list(Decoder.string, 4)
            except DecodeError as error:
                self._found(names.CHILDREN, f"entry {key!r} is damaged: {error.strerror}", "flatten the clones")
                continue
            for image_id in children:
                header = self._headers.get((pool, namespace, image_id))
                if header is None or header.parent is None or not header.parent.exists:
                    what = f"lists {image_id!r}, which is no clone"
                    self._found(names.CHILDREN, what, "it goes when the parent's snapshot is unprotected")
