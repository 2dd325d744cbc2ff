"""Two hosts for the tests of this folder, made once in a run."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from librbd_py.devcluster import Options, scratch
from tests.libvirt.hosts import Host, Machine
from tests.libvirt.ledger import Verdict
from tests.libvirt.world import World, store_folder
from vm_images.cache import cache_dir

verdicts: list[Verdict] = []  # of all guests' ledgers in this run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if verdicts:
        terminalreporter.write_line(f"guests' ledgers, read {len(verdicts)} times: {Verdict.total(verdicts)}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that failed says what the hosts' services and the guests said last."""
    report = yield
    world = getattr(item, "funcargs", {}).get("world") or getattr(item, "funcargs", {}).get("shared_world")
    if report.failed and isinstance(world, World):
        for host in world.hosts:
            for name in ("service.log", "libvirtd.log"):
                report.sections.append((f"{name} of {host.name}", host.log(name)))
        for domain in [*world.domains, *world.kept.values()]:
            report.sections.append((f"console of {domain.name}", domain.console[-1000:]))
    return report


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    # Short: paths of sockets lie below it.
    with tempfile.TemporaryDirectory(prefix="rbdpy-lv-", ignore_cleanup_errors=True) as folder:
        with Machine(Path(folder), cache_dir() / "libvirt-capabilities") as made:
            yield made


@pytest.fixture(scope="session")
def hosts(machine: Machine) -> tuple[Host, Host]:
    """Namespaces, network; no libvirtd yet."""
    return machine.host("alpha"), machine.host("beta")


@pytest.fixture(scope="session")
def shared_world(machine: Machine, hosts: tuple[Host, Host]) -> Iterator[World]:
    store = store_folder(machine)
    with scratch(Options(osds=2, address=machine.address)) as cluster:
        for host in hosts:
            host.set_up(store)
            host.start_service()
            host.start_libvirtd()
        yield World(machine, *hosts, store, cluster, verdicts=verdicts)
        for host in hosts:
            host.kill_libvirtd()


@pytest.fixture
def world(shared_world: World) -> Iterator[World]:
    """Both hosts in order, without domains; so they are again afterwards, or the test failed."""
    for host in shared_world.hosts:
        host.in_order()
    yield shared_world
    for host in shared_world.hosts:
        host.in_order()
    domains, shared_world.domains = shared_world.domains, []
    for domain in domains:
        shared_world.end(domain)
