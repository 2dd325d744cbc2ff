"""`rbdpy vm` with images of a cluster: the VM goes from QEMU to QEMU and from host to host, without libvirt."""

from __future__ import annotations

from dataclasses import replace

import pytest

from librbd_py import rbd
from tests.libvirt import ledger
from tests.vm.command import Host, host
from tests.vm.rig import MIB

__all__ = ["host"]
pytestmark = pytest.mark.vm
TICK = b"STAMP-TICK"


@pytest.mark.parametrize("transport", ["vhost-user", "nbd"])
def test_a_vm_moves_twice_and_loses_nothing(host: Host, ceph_conf: str, ceph_pool: str, transport: str) -> None:
    rig = replace(host.rig, url=f"ceph:{ceph_conf}")
    here, there = Host(rig, host.run), Host(rig, host.run.parent / "b")
    rig.create("disk", 64 * MIB, ceph_pool)
    writer = ledger.Writer(image=4711, owner=42)
    here.boot(f"{ceph_pool}/disk", "--name", "one", "--transport", transport, mode=writer.append)
    here.ticks("one", TICK)
    here("migrate", "one")
    here.ticks("one", TICK)
    before = here.console("one")
    here("migrate", "one", "--to", str(there.run))
    assert (here.states(), here.processes()) == ({}, [])
    there.ticks("one", TICK)
    there.ticks("one", TICK)
    with (there.run / "one" / "console.log").open("rb") as console:  # which goes with the VM
        said = (before + console.read()).decode(errors="replace")
        assert "STAMP-ERROR" not in said
        assert "I/O error" not in said
        there("stop", "one")  # the guest still writes when its kernel takes the disk away
        said += console.read().decode(errors="replace")
    assert (there.states(), there.processes()) == ({}, [])
    verdict = ledger.judge(writer, said, ledger.content(rig.url, "disk", writer, ceph_pool))
    assert verdict.acknowledged > 0
    assert (verdict.lost, verdict.wrong) == ([], [])
    with rig.cluster() as cluster, cluster.open_ioctx(ceph_pool) as ioctx:
        with rbd.Image(ioctx, "disk", read_only=True) as image:
            assert not image.list_lockers()
        rbd.RBD().remove(ioctx, "disk")  # nobody watches it
