"""What a verification reads, whatever keeps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from librbd_py.format.names import parse_data_object
from librbd_py.format.object_map import MAX_OBJECTS
from librbd_py.format.values import dataclass

from ..api import ObjectContext, OmapGetVals, OmapRmKeys, Op, Read, Store

ERROR = "error"  # data or metadata is wrong
WARNING = "warning"  # something that should not be, without harm so far
NOTE = "note"  # left by a crash; cleared up by itself or by --repair
RUN_REPAIR = "run the check with --repair"
PAGE = 512  # rows of an omap, a round trip
LARGEST = MAX_OBJECTS // 4 + (1 << 20)  # bytes of an object that are read: the largest object map, with its checksums

Space = tuple[int, str]  # pool, namespace


@dataclass(frozen=True)
class Finding:
    severity: str  # "error", "warning", "note"
    where: str
    what: str
    advice: str
    repaired: bool = False


class Report(Protocol):
    def found(
        self, severity: str, where: str, what: str, advice: str, mend: Callable[[], object] | None = None
    ) -> None: ...


class Records(Protocol):
    """Objects by pool, namespace and name; None where there is none."""

    def spaces(self) -> list[Space]:
        """Those that hold anything."""

    def objects(self, pool: int, namespace: str, prefix: str) -> list[str]:
        """Names in order."""

    def omap(self, pool: int, namespace: str, oid: str) -> dict[bytes, bytes] | None: ...

    def data(self, pool: int, namespace: str, oid: str) -> bytes | None: ...

    def drop(self, pool: int, namespace: str, oid: str, keys: Sequence[bytes]) -> None: ...


class StoreRecords:
    """Of a store that others may be using at the same time: an object that goes meanwhile is one that is not there."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._names: dict[Space, list[str]] = {}
        self.data_objects: dict[tuple[int, str, str], bytearray] = {}  # (pool, namespace, prefix) -> bits by number
        for pool in store.pools():
            self._list(pool.pool_id)

    def _list(self, pool: int) -> None:
        for name in self._store.open(pool).listing(everywhere=True):
            data = parse_data_object(name.name)
            if data is not None:
                self._mark(self.data_objects.setdefault((pool, name.namespace, data[0]), bytearray()), data[1])
            else:
                self._names.setdefault((pool, name.namespace), []).append(name.name)

    @staticmethod
    def _mark(bits: bytearray, number: int) -> None:
        """A number beyond those that object maps have says nothing and costs nothing."""
        if number < MAX_OBJECTS:
            if number // 8 >= len(bits):
                bits.extend(bytes(number // 8 + 1 - len(bits)))
            bits[number // 8] |= 1 << number % 8

    def numbers(self, pool: int, namespace: str, prefix: str) -> Iterator[int]:
        """Of the data objects that exist, ascending."""
        for place, byte in enumerate(self.data_objects.get((pool, namespace, prefix), b"")):
            yield from (place * 8 + bit for bit in range(8) if byte >> bit & 1)

    def _io(self, pool: int, namespace: str) -> ObjectContext:
        return self._store.open(pool, namespace)

    def spaces(self) -> list[Space]:
        return sorted({*self._names, *((pool, namespace) for pool, namespace, _ in self.data_objects)})

    def objects(self, pool: int, namespace: str, prefix: str) -> list[str]:
        return sorted(oid for oid in self._names.get((pool, namespace), ()) if oid.startswith(prefix))

    def omap(self, pool: int, namespace: str, oid: str) -> dict[bytes, bytes] | None:
        rows: dict[bytes, bytes] = {}
        try:
            while True:
                found, more = self._read(pool, namespace, oid, OmapGetVals(max(rows, default=b""), b"", PAGE))
                rows.update(found)
                if not more or not found:
                    return rows
        except FileNotFoundError:
            return None

    def data(self, pool: int, namespace: str, oid: str) -> bytes | None:
        try:
            return bytes(self._read(pool, namespace, oid, Read(0, LARGEST)))
        except FileNotFoundError:
            return None

    def _read(self, pool: int, namespace: str, oid: str, op: Op) -> Any:
        return self._io(pool, namespace).read(oid, [op])[0]

    def drop(self, pool: int, namespace: str, oid: str, keys: Sequence[bytes]) -> None:
        self._io(pool, namespace).write(oid, [OmapRmKeys(list(keys))])
