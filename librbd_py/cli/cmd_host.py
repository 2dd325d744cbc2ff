"""`rbdpy host`: the service that gives this machine's VMs their disks."""

from __future__ import annotations

import argparse
from typing import Any

from librbd_py.cli.output import Rows, Section, Table
from librbd_py.cli.registry import command, with_format
from librbd_py.cli.session import Failure, Session, code_of

ASK_SECONDS = 10.0
HEADINGS = ("NAME", "VM", "DISK", "IMAGE", "TRANSPORT", "STATE", "QEMU", "LOCK")


def with_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--prefix", default="", help="put it all below this folder, for packages")


def with_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pools", default="rbd", help="POOL,...: images with sockets to attach by [default: rbd]")
    parser.add_argument("--user", default="", help="QEMU's user [default: as libvirt has it]")
    parser.add_argument("--libvirt", metavar="URI", default="qemu:///system", help="libvirt of this host")
    parser.add_argument("--group", default="", help="QEMU's group [default: as libvirt has it]")


def _failed(verb: str, error: OSError) -> Failure:
    return Failure(f"rbd: host {verb}: {error.strerror or error}", code_of(error))


@command("host setup", "Install the libvirt hook, the service and its folders.", with_target, with_settings)
def setup(session: Session) -> None:
    from qemu_glue.host import setup as host
    from qemu_glue.host.config import Config

    options = session.options
    pools = tuple(pool for pool in options.pools.split(",") if pool)
    more = {"user": options.user, "group": options.group, "libvirt": options.libvirt}
    config = Config(store=options.store or "", pools=pools, **more)
    try:
        host.set_up(config, print, dry_run=options.dry_run, prefix=options.prefix)
    except OSError as error:
        raise _failed("setup", error) from None


@command("host remove", "Remove what host setup installed; images are not touched.", with_target)
def remove(session: Session) -> None:
    from qemu_glue.host import setup as host
    from qemu_glue.host.config import load

    options = session.options
    try:
        host.remove(load(), print, dry_run=options.dry_run, prefix=options.prefix)
    except OSError as error:
        raise _failed("remove", error) from None


@command("host serve", "Run the host service until it is told to stop.")
def serve(session: Session) -> None:
    from qemu_glue import daemon
    from qemu_glue.host.config import load

    session.close()
    try:
        argv = load().arguments()
    except OSError as error:
        raise _failed("serve", error) from None
    status = daemon.main([*argv, "-v"])
    if status:
        raise Failure("", status)


@command("host upgrade", "Start the service anew, as it is installed now; guests see a pause.")
def upgrade(session: Session) -> None:
    from qemu_glue.host import upgrade as host
    from qemu_glue.host.config import load

    try:
        host.upgrade(load(), print)
    except OSError as error:
        raise _failed("upgrade", error) from None


@command("host status", "Show the VMs of this host, their disks and who serves them.", with_format)
def status(session: Session) -> None:
    from qemu_glue.host.ask import ask
    from qemu_glue.host.config import load

    try:
        config = load()
        vms: list[dict[str, Any]] = ask(config.qmp, "rbd-vm-query", {}, ASK_SECONDS)
    except (FileNotFoundError, ConnectionRefusedError):
        raise Failure(f"rbd: host status: the host service does not run ({config.qmp})", 1) from None
    except OSError as error:
        raise _failed("status", error) from None
    if not session.plain:
        shown = [Section("vm", {**vm, "disks": Rows("disks", [Section("disk", d) for d in vm["disks"]])}) for vm in vms]
        session.show(Rows("vms", shown))
        return
    table = Table(*((heading, "left") for heading in HEADINGS))
    for vm in vms:
        for disk in vm["disks"]:
            lock = "here" if disk.get("lock-owner") else "refused" if disk.get("refused") else ""
            row = (disk["target"], disk["image"], disk["transport"], disk["state"], disk.get("pid", ""), lock)
            table.add(vm["name"] or vm["uuid"], vm["state"], *row)
    print(table.text() if any(vm["disks"] for vm in vms) else "no VMs\n", end="")


@command("host force", "Let a virtual machine go on that was refused the lock of its disks.", specs=("name",))
def force(session: Session) -> None:
    from qemu_glue.host.ask import ask
    from qemu_glue.host.config import load

    if not session.options.specs:
        raise Failure("rbd: the name or uuid of a VM was not specified", 22)
    name = str(session.options.specs[0])
    try:
        config = load()
        vms: list[dict[str, Any]] = ask(config.qmp, "rbd-vm-query", {}, ASK_SECONDS)
        found = [vm["uuid"] for vm in vms if name in (vm["name"], vm["uuid"])]
        if len(found) != 1:
            raise Failure(f"rbd: host force: {'more than one VM' if found else 'no VM'} here is called {name}", 2)
        ask(config.qmp, "rbd-vm-force", {"uuid": found[0]}, ASK_SECONDS)
    except OSError as error:
        raise _failed("force", error) from None
