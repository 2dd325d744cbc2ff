"""Commands to the daemons of a cluster. Only Ceph has daemons: other stores know two questions to a monitor."""

from __future__ import annotations

import errno
import json
from abc import abstractmethod
from collections.abc import Sequence

from librbd_py.rados.ops import raw, text
from librbd_py.store.api import Store
from librbd_py.store.rados import RadosStore

Answer = tuple[int, bytes, str]


class Commands:
    """(0 or -errno, output, message) of a command in JSON. `timeout` and a monitor's or manager's `target` are accepted
    and ignored: librados finds the one that answers."""

    @property
    @abstractmethod
    def store(self) -> Store: ...

    def _command(self, kind: str, where: str, cmd: str | Sequence[str], inbuf: bytes, missing: str) -> Answer:
        store = self.store
        if not isinstance(store, RadosStore):
            return -errno.EOPNOTSUPP, b"", f"this store has no {missing}"
        words = cmd if isinstance(cmd, (str, bytes)) else "".join(cmd)
        return store.command(kind, where, text(words, "cmd"), raw(inbuf or b"", "inbuf"))

    def mon_command(self, cmd: str, inbuf: bytes, timeout: int = 0, target: str | int | None = None) -> Answer:
        """Without monitors -EOPNOTSUPP for everything but `fsid` and `osd pool ls`."""
        store = self.store
        if isinstance(store, RadosStore):
            return self._command("mon", "", cmd, inbuf, "monitors")
        try:
            prefix = json.loads(text(cmd, "cmd")).get("prefix")
        except (ValueError, AttributeError):
            return -errno.EINVAL, b"", "the command is not a JSON object"
        if prefix == "fsid":
            return 0, f"{store.fsid}\n".encode(), ""
        if prefix == "osd pool ls":
            return 0, "".join(f"{pool.name}\n" for pool in store.pools()).encode(), ""
        return -errno.EOPNOTSUPP, b"", "this store has no monitors"

    def osd_command(self, osdid: int, cmd: str, inbuf: bytes, timeout: int = 0) -> Answer:
        return self._command("osd", str(int(osdid)), cmd, inbuf, "OSDs")

    def mgr_command(self, cmd: str, inbuf: bytes, timeout: int = 0, target: str | None = None) -> Answer:
        return self._command("mgr", "", cmd, inbuf, "managers")

    def pg_command(self, pgid: str, cmd: str, inbuf: bytes, timeout: int = 0) -> Answer:
        return self._command("pg", text(pgid, "pgid"), cmd, inbuf, "placement groups")
