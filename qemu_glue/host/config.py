"""What `rbdpy host setup` decided: /etc/rbdpy/host.json, read by the service and by the hook."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

CONFIG = "/etc/rbdpy/host.json"
SIZE_MAX = 1 << 20


@dataclass(frozen=True)
class Config:
    store: str = ""  # URL of the service's own store; empty: the library's default
    run: str = "/run/rbdpy"  # sockets
    state: str = "/var/lib/rbdpy-host"  # what has to survive the service
    pools: tuple[str, ...] = ("rbd",)  # of its store: their images have sockets all the time
    user: str = ""  # QEMU's; empty: as libvirt has it
    group: str = ""
    libvirt: str = "qemu:///system"  # asked to resume guests whose NBD disk was away; empty: nobody

    @property
    def qmp(self) -> str:
        return f"{self.run}/rbdpyd.sock"

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def arguments(self) -> list[str]:
        """For rbdpyd."""
        argv = ["--host", "--run", self.run, "--qmp", self.qmp, "--state", f"{self.state}/rbdpyd.journal"]
        argv += ["--pools", ",".join(self.pools)]
        for option in ("store", "user", "group", "libvirt"):
            value: str = getattr(self, option)
            if value:
                argv += [f"--{option}", value]
        return argv


def load(path: str = CONFIG) -> Config:
    """Defaults where there is no file. EINVAL: it is not what setup writes."""
    try:
        with open(path, "rb") as file:
            values = json.loads(file.read(SIZE_MAX))
        if not isinstance(values, dict):
            raise ValueError("not an object")
        known = {field.name: values[field.name] for field in fields(Config) if field.name in values}
        if "pools" in known:
            known["pools"] = tuple(str(pool) for pool in known["pools"])
        if not all(isinstance(value, str) for name, value in known.items() if name != "pools"):
            raise ValueError("a member is no text")
        return Config(**known)
    except FileNotFoundError:
        return Config()
    except (ValueError, TypeError) as error:
        raise OSError(errno.EINVAL, f"{Path(path)}: {error}") from None
