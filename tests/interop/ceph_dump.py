"""What lies in a pool, byte for byte, with ids, pool numbers and times made alike so that two pools can be compared."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable

from librbd_py.store import api

_LARGEST = 4096  # bytes: larger values hold no times
_AROUND = 600  # seconds: what lies this near to now is a time


class Dump:
    """`images`: id -> what to call it (of the same length); `pools`: number -> number to show."""

    def __init__(self, images: dict[str, str], pools: dict[int, int]) -> None:
        self._images = images
        self._pools = pools
        now = int(time.time())
        self._times = range(now - _AROUND, now + _AROUND)

    def text(self, value: str) -> str:
        for image_id, name in self._images.items():
            value = value.replace(image_id, name)
        for number, shown in self._pools.items():
            value = value.replace(f"rbd_data.{number}.", f"rbd_data.{shown}.")
        return value

    def _pool_numbers(self, value: bytes, most: int) -> bytes:
        """The first `most` of them made alike: what follows may be a snapshot with the same number."""
        at = 0
        while at + 8 <= len(value) and most:
            number = int.from_bytes(value[at : at + 8], "little")
            if number in self._pools:
                value = value[:at] + struct.pack("<q", self._pools[number]) + value[at + 8 :]
                most -= 1
                at += 7
            at += 1
        return value

    def raw(self, value: bytes, *, pools: int) -> bytes:
        """`pools`: how many pool numbers come before any other number that may look like one."""
        for image_id, name in self._images.items():
            value = value.replace(image_id.encode(), name.encode())
        for number, shown in self._pools.items():
            value = value.replace(f"rbd_data.{number}.".encode(), f"rbd_data.{shown}.".encode())
        value = self._pool_numbers(value, pools)
        if len(value) > _LARGEST:
            return value
        out = bytearray(value)
        at = 0
        while at + 8 <= len(out):
            seconds, nanoseconds = struct.unpack_from("<II", out, at)
            if seconds in self._times and nanoseconds < 1_000_000_000:
                out[at : at + 8] = bytes(8)
                at += 8
            else:
                at += 1
        return bytes(out)

    def of(self, io: api.ObjectContext, names: Iterable[str]) -> dict[str, object]:
        """ "object what" -> value, of every named object that exists."""
        found: dict[str, object] = {}
        for oid in names:
            try:
                data, xattrs = io.read(oid, [api.Read(), api.GetXattrs()])
            except FileNotFoundError:
                continue
            shown = self.text(oid)
            found[f"{shown} data"] = self.raw(data, pools=0)
            for name, value in sorted(xattrs.items()):
                found[f"{shown} xattr {name}"] = self.raw(value, pools=0)
            for key, value in self._rows(io, oid):
                if key == b"object_prefix":
                    # Holds the number of a pool in decimal, so its length says nothing.
                    assert int.from_bytes(value[:4], "little") == len(value) - 4
                    value = value[4:]
                # Few values hold a pool's number, and others could look like one.
                pools = int(key in (b"parent", b"data_pool_id")) or (len(value) if b"snap_children" in key else 0)
                found[f"{shown} omap {self.raw(key, pools=oid == 'rbd_children')!r}"] = self.raw(value, pools=pools)
        return found

    def _rows(self, io: api.ObjectContext, oid: str) -> Iterable[tuple[bytes, bytes]]:
        after, more = b"", True
        while more:
            rows, more = io.read(oid, [api.OmapGetVals(start_after=after)])[0]
            yield from rows.items()
            after = max(rows, default=after)
            more = more and bool(rows)
