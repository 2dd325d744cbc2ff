"""Commands to a scratch cluster, as client.admin."""

from __future__ import annotations

import errno
import json
import os
from typing import Any

from librbd_py.store.api import Remove, WriteFull
from librbd_py.store.rados import ClusterOptions, RadosStore, connect

PATIENCE = (("client_mount_timeout", "20"), ("rados_mon_op_timeout", "20"), ("rados_osd_op_timeout", "20"))  # seconds


class Admin:
    """A connection of its own, for a few commands: `with Admin(conf) as admin`. ETIMEDOUT when nobody answers."""

    def __init__(self, conf: str) -> None:
        self._store: RadosStore = connect(ClusterOptions(conf, "client.admin", PATIENCE), share=False)

    def __enter__(self) -> Admin:
        return self

    def __exit__(self, *exc: object) -> None:
        self._store.close()

    def mon(self, prefix: str, **words: Any) -> Any:
        """A monitor's answer, from JSON; None for an empty one. OSError with its errno and words."""
        answer = self._store.mon_command({"prefix": prefix, "format": "json", **words})
        return json.loads(answer) if answer.strip() else None

    def osd(self, number: int, prefix: str, **words: Any) -> bytes:
        """An OSD's answer."""
        text = json.dumps({"prefix": prefix, **words})
        return self._checked(self._store.command("osd", str(number), text), f"osd.{number}: {prefix}")

    @staticmethod
    def _checked(answer: tuple[int, bytes, str], what: str) -> bytes:
        result, output, status = answer
        if result < 0:
            raise OSError(-result, f"{what}: {status.strip() or os.strerror(-result)}")
        return output

    def pg_states(self) -> list[str]:
        """`active+clean`, ... of each placement group, from the OSD that leads it; `unknown` when it does not yet."""
        found = []
        for pool in self.mon("osd dump")["pools"]:
            for number in range(pool["pg_num"]):
                name = f"{pool['pool']}.{number:x}"
                answer = self._store.command("pg", name, json.dumps({"prefix": "query", "pgid": name}))
                try:
                    found.append(json.loads(self._checked(answer, f"query of {name}"))["state"])
                except FileNotFoundError:
                    found.append("unknown")
        return found

    def write_once(self, pool: str) -> None:
        """Returns when the pool takes writes."""
        io = self._store.open(pool)
        io.write("devcluster", [WriteFull(b"up")])
        io.write("devcluster", [Remove()])

    def blocklist(self, address: str, seconds: int) -> None:
        self._store.blocklist_add(address, seconds)

    def unblocklist(self, address: str) -> None:
        try:
            self._store.blocklist_remove(address)
        except OSError as failure:
            if failure.errno != errno.ENOENT:
                raise
