"""`rbdpy vm`: virtual machines on images, without libvirt."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from librbd_py.cli.output import Rows, Section, Table
from librbd_py.cli.registry import command, with_format
from librbd_py.cli.session import Failure, Session

if TYPE_CHECKING:
    from qemu_glue.vm import Machines
    from qemu_glue.vm.spec import Status

T = TypeVar("T")


def with_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="FOLDER", help="runtime folder of VMs [default: $RBDPY_RUN, /run/rbdpy/vm]")


def with_boot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="of the VM [default: the image's]")
    parser.add_argument("--memory", default="1G", help="of the guest [default: 1G; a bare number counts MiB]")
    parser.add_argument("--cpus", type=int, default=1, help="of the guest [default: 1]")
    parser.add_argument("--disk", metavar="IMAGE", action="append", default=[], help="one more disk; may repeat")
    parser.add_argument("--transport", choices=("vhost-user", "nbd"), default="vhost-user", help="how disks are served")
    parser.add_argument("--net", choices=("user", "none"), default="user", help="network of the guest [default: user]")
    parser.add_argument("--accel", choices=("auto", "kvm", "tcg"), default="auto", help="[default: auto]")
    parser.add_argument("--kernel", help="boot this kernel, not the disk's boot loader")
    parser.add_argument("--initrd", help="with --kernel")
    parser.add_argument("--append", default="", help="with --kernel: its command line")
    parser.add_argument("--ports", type=int, default=4, help="free root ports, for disks to come [default: 4]")
    stay = parser.add_mutually_exclusive_group()
    stay.add_argument("--console", action="store_true", help="join the serial console at once (Ctrl-] leaves)")
    stay.add_argument("--detach", action="store_true", help="return when the guest runs (the default)")


def with_stop(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="pull the plug, do not ask the guest")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for the guest [default: 60]")


def with_destination(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        default="",
        metavar="WHERE",
        help="a host's name (for ssh), another runtime folder of this machine, or unix:PATH or tcp:HOST:PORT where"
        " `rbdpy vm receive --listen` waits [default: another QEMU on this host, to upgrade it]",
    )


def with_listen(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen",
        metavar="unix:PATH|tcp:HOST:PORT",
        help="wait here for one VM [default: standard input and output, for ssh]."
        " TCP is not protected: for a network that is trusted",
    )


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machines(session: Session) -> Machines:
    from qemu_glue.vm import Machines  # only here: the other commands need no QEMU

    run = session.options.run
    return Machines(Path(run).absolute() if run else None)


def perform(work: Coroutine[Any, Any, T]) -> T:
    """Runs it; its failure ends the command."""
    from qemu_glue.qmp import MachineError

    try:
        return asyncio.run(work)
    except MachineError as error:
        raise Failure(f"rbd: {error}", error.errno or 5) from None


def name_of(session: Session) -> str:
    if not session.options.specs:
        raise Failure("rbd: the name of a VM was not specified", 22)
    return str(session.options.specs[0])


@command("vm boot", "Boot a virtual machine from an image.", with_boot, with_run, specs=("image-spec",))
def boot(session: Session) -> None:
    from uuid import uuid4

    from librbd_py.cli.session import parse_spec
    from librbd_py.cli.sizes import image_size
    from librbd_py.store import default_url
    from qemu_glue.qmp import MachineError
    from qemu_glue.vm import DiskImage, VMSpec
    from qemu_glue.vm.qemu import choose_accelerator

    options = session.options
    if not options.specs:
        raise Failure("rbd: image name was not specified", 22)
    disks = []
    for text in (options.specs[0], *options.disk):
        spec = parse_spec(text)
        disks.append(DiskImage(spec.image, spec.pool or "rbd", spec.namespace, spec.snap))
    for path in filter(None, (options.kernel, options.initrd)):
        if not os.access(path, os.R_OK):
            raise Failure(f"rbd: {path} cannot be read", 2)
    try:
        memory = image_size(options.memory) >> 20
    except ValueError as error:
        raise Failure(f"rbd: --memory: {error}", 22) from None
    try:
        accel, why = choose_accelerator(options.accel)
        made = VMSpec(
            name=options.name or disks[0].image,
            uuid=str(uuid4()),
            store=absolute(session.store or default_url()),
            disks=tuple(disks),
            transport=options.transport,
            memory=memory,
            cpus=options.cpus,
            net=options.net,
            accel=accel,
            kernel=os.path.abspath(options.kernel) if options.kernel else "",
            initrd=os.path.abspath(options.initrd) if options.initrd else "",
            append=options.append,
            ports=options.ports,
        )
    except MachineError as error:
        raise Failure(f"rbd: {error}", error.errno or 5) from None
    if options.accel == "auto":
        say(f"accelerator: {accel} ({why})")
    place = machines(session)
    session.close()
    perform(place.boot(made, say))
    if options.console:
        join(place, made.name)
    else:
        say(f"its console: rbdpy vm console {made.name}    its end: rbdpy vm stop {made.name}")


def absolute(store: str) -> str:
    """The store's URL, for programs that run in another folder."""
    kind, colon, path = store.partition(":")
    if not colon and "/" in store:
        return os.path.abspath(store)
    return f"embedded:{os.path.abspath(path)}" if kind == "embedded" else store


def join(place: Machines, name: str) -> None:
    from qemu_glue.vm import console

    folder = place.folder(name)
    say("Ctrl-] leaves the console.")
    if perform(console.attach(folder)):
        say(f"\nleft; {name} runs on")
    else:
        say(f"\n{name} has ended")


@command("vm ls", "List the virtual machines of this host.", with_format, with_run, aliases=("vm list",))
def ls(session: Session) -> None:
    found = perform(machines(session).list())
    if not session.plain:
        session.show(Rows("vms", [described(status) for status in found]))
        return
    table = Table(("NAME", "left"), ("STATE", "left"), ("IMAGES", "left"), ("MEMORY", "right"), ("CPUS", "right"))
    rows = 0
    for status in found:
        spec = status.spec
        images = ",".join(str(disk) for disk in spec.disks) if spec else ""
        memory = f"{spec.memory} MiB" if spec else ""
        state = f"{status.state} ({status.detail})" if status.detail else status.state
        table.add(status.name, state, images, memory, spec.cpus if spec else "")
        rows += 1
    if rows:
        print(table.text(), end="")


def described(status: Status) -> Section:
    spec = status.spec
    values: dict[str, Any] = {"name": status.name, "state": status.state, "detail": status.detail, "pid": status.pid}
    values["seconds"] = round(status.seconds, 1)
    if spec:
        values |= {"uuid": spec.uuid, "store": spec.store, "transport": spec.transport, "accelerator": spec.accel}
        values |= {"memory_mib": spec.memory, "cpus": spec.cpus, "machine": spec.machine}
        values["disks"] = Rows("disks", [str(disk) for disk in spec.disks], "disk")
    values["sockets"] = Section("sockets", dict(status.sockets))
    return Section("vm", values)


@command("vm console", "Join the serial console of a virtual machine; Ctrl-] leaves it.", with_run, specs=("name",))
def console_of(session: Session) -> None:
    place, name = machines(session), name_of(session)
    try:
        join(place, name)
    except (FileNotFoundError, ConnectionRefusedError):
        raise Failure(f"rbd: {name} has no console: it is not running (`rbdpy vm ls`)", 2) from None


@command("vm stop", "Shut a virtual machine down and forget it; its images stay.", with_stop, with_run, specs=("name",))
def stop(session: Session) -> None:
    options = session.options
    perform(machines(session).stop(name_of(session), force=options.force, timeout=options.timeout, say=say))


@command("vm migrate", "Move a running virtual machine.", with_destination, with_run, specs=("name",))
def migrate(session: Session) -> None:
    from qemu_glue.vm.migrate import migrate as move

    done = perform(move(machines(session), name_of(session), session.options.to, say))
    figures = {"seconds": round(done.seconds, 3), "downtime": done.downtime, "bytes": done.transferred}
    say(f"moved in {done.seconds:.1f} s, {done.transferred >> 20} MiB; the guest stood still for {done.downtime:.3f} s")
    if not sys.stdout.isatty():
        print(json.dumps(figures))


@command("vm receive", "Take in a virtual machine that migrates to this host.", with_listen, with_run)
def receive(session: Session) -> None:
    from qemu_glue.vm import remote

    place, store = machines(session), session.store
    session.close()
    if session.options.listen:
        came = perform(remote.receive_at(place, session.options.listen, store, say))
    else:
        came = perform(remote.receive_stdio(place, store, lambda text: None))
    if came is None:
        raise Failure("rbd: no virtual machine came", 103)
