"""libvirt through its own program: there wherever libvirt is, and a hang of libvirtd is a timeout of ours."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile

from qemu_glue.libvirt.domain import SIZE_LIMIT

URI = "qemu:///system"
SECONDS = 30.0


def virsh(uri: str, *words: str, seconds: float = SECONDS) -> str:
    """What it prints. OSError: ENOENT, libvirt is not installed; ETIMEDOUT; EIO, what it complains of."""
    try:
        done = subprocess.run(
            ["virsh", "-q", "-c", uri, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            env={**os.environ, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        raise OSError(errno.ENOENT, "virsh is not installed") from None
    except subprocess.TimeoutExpired:
        raise OSError(errno.ETIMEDOUT, f"libvirt ({uri}) does not answer within {seconds:g} seconds") from None
    if done.returncode:
        raise OSError(errno.EIO, done.stderr.decode(errors="replace").strip().removeprefix("error: "))
    return done.stdout.decode(errors="replace")


def domain_xml(uri: str, domain: str) -> bytes:
    """The persistent XML of a domain given by name, number or uuid; secrets included, so that `define` keeps them."""
    return virsh(uri, "dumpxml", "--inactive", "--security-info", "--domain", domain).encode()[:SIZE_LIMIT]


def define(uri: str, text: str) -> None:
    """Takes effect when the domain starts next."""
    with tempfile.NamedTemporaryFile("w", prefix="rbdpy-", suffix=".xml") as file:
        file.write(text)
        file.flush()
        virsh(uri, "define", "--file", file.name)


def paused_by_an_error(uri: str, domain: str, seconds: float) -> bool:
    """Whether the domain stands still because a disk failed a request."""
    return virsh(uri, "domstate", "--reason", "--domain", domain, seconds=seconds).strip() == "paused (I/O error)"


def resume(uri: str, domain: str, seconds: float) -> None:
    virsh(uri, "resume", "--domain", domain, seconds=seconds)
