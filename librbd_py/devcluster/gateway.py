"""An S3 gateway (radosgw) for a scratch cluster, with one user and one bucket."""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import subprocess
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from . import ports, programs

if TYPE_CHECKING:
    from .cluster import DevCluster

NAME = "rgw.a"
RECORD = "s3.json"
BUCKET = "images"
START_SECONDS = 60.0
ATTEMPTS = 3  # when somebody else takes the port


@dataclass(frozen=True)
class S3Access:
    """Where it answers, and who may ask."""

    endpoint: str
    access_key: str
    secret_key: str = field(repr=False)
    bucket: str = BUCKET

    @property
    def environment(self) -> dict[str, str]:
        """For programs that know S3."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
        }


def access(cluster: DevCluster) -> S3Access | None:
    """Of the gateway that was started last; None: never was one."""
    try:
        return S3Access(**json.loads((cluster.folder / RECORD).read_text()))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError):
        raise OSError(errno.EINVAL, f"{cluster.folder / RECORD} is damaged") from None


def start(cluster: DevCluster) -> S3Access:
    """Starts it on loopback, again where it was if there was one; returns when it answers. Nothing when it runs.
    EINVAL: a cluster without cephx, whose monitor hangs up on a radosgw. ENOPKG without Ceph's programs, EIO with what
    it said before it ended, ETIMEDOUT."""
    options = cluster.options()
    if options.auth != "cephx":
        raise OSError(errno.EINVAL, "an S3 gateway needs a cluster with authentication: auth cephx")
    found = programs.find(["radosgw", "radosgw-admin"])
    daemon = cluster.daemon(NAME)
    known = access(cluster)
    if known is not None and daemon.state == "running":
        return known
    for attempt in range(ATTEMPTS):
        if known is None:
            port = _free_port(options.address)
            made = S3Access(f"http://{options.address}:{port}", secrets.token_hex(10).upper(), secrets.token_hex(20))
        else:
            made, port = known, int(known.endpoint.rpartition(":")[2])
        try:
            _run(cluster, found["radosgw"], options.address, port)
            break
        except OSError:
            taken = "Address already in use" in daemon.tail() or "failed to bind" in daemon.tail()
            if known is not None or not taken or attempt == ATTEMPTS - 1:
                raise
    if known is None:
        _make_user(cluster, found["radosgw-admin"], made)
        path = cluster.folder / RECORD
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(asdict(made), file)
    return made


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _run(cluster: DevCluster, program: str, address: str, port: int) -> None:
    daemon = cluster.daemon(NAME)
    settings = {
        "rgw-frontends": f"beast endpoint={address}:{port}",
        "rgw-data": str(cluster.folder / "run"),
        "rgw-enable-apis": "s3",
        "rgw-thread-pool-size": "16",
        "rgw-enable-gc-threads": "false",  # it is thrown away before there is anything to clean up
        "rgw-enable-lc-threads": "false",
        "rgw-enable-quota-threads": "false",
        "rgw-enable-usage-log": "false",
    }
    argv = [program, "-f", "-n", "client.admin", "-c", cluster.conf]
    daemon.spawn([*argv, *(f"--{name}={value}" for name, value in settings.items())], programs.environment())
    end = time.monotonic() + START_SECONDS
    while not ports.listens(daemon, port):
        if daemon.state == "absent":
            raise OSError(errno.EIO, f"radosgw ended: {daemon.tail() or 'without a word'}")
        if time.monotonic() > end:
            daemon.kill()
            raise TimeoutError(errno.ETIMEDOUT, f"radosgw did not listen within {START_SECONDS:.0f} s")
        time.sleep(0.02)


def _make_user(cluster: DevCluster, program: str, made: S3Access) -> None:
    argv = [program, "-c", cluster.conf, "user", "create", "--uid=rbdpy", "--display-name=rbdpy"]
    done = subprocess.run(
        [*argv, f"--access-key={made.access_key}", f"--secret-key={made.secret_key}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=programs.environment(),
        timeout=START_SECONDS,
    )
    if done.returncode:
        raise OSError(errno.EIO, f"radosgw-admin: {done.stderr[-1000:].strip()}")
