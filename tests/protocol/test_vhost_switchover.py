"""vhost-user-blk: the moment a guest moves. The answer that lets it go is held until somebody says go on."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_vhost_migration import Log, begin
from vhost_frontend import (
    F_LOG_ALL,
    GET_VRING_BASE,
    OK,
    RESET_DEVICE,
    SET_VRING_BASE,
    T_OUT,
    Frontend,
    Memory,
    Queue,
    frontend,
)
from vhost_server import RINGS, SWITCHOVER, Server, wait_until

MEANWHILE = 0.1  # seconds in which nothing may happen


class Events:
    """What the server posted, kept until asked for."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.seen: list[tuple[int, int]] = []

    def wait(self, kind: int) -> int:
        """The value of the next event of that kind; those before it are dropped."""
        found: list[int] = []

        def look() -> bool:
            self.seen += self.server.events()
            for n, (what, value) in enumerate(self.seen):
                if what == kind:
                    found.append(value)
                    del self.seen[: n + 1]
                    return True
            return False

        wait_until(look, f"event {kind}")
        return found[0]

    def none(self, kind: int) -> bool:
        self.seen += self.server.events()
        return all(what != kind for what, _ in self.seen)


def ask_base(front: Frontend, index: int) -> None:
    """GET_VRING_BASE, whose answer is not waited for."""
    front.send(GET_VRING_BASE, struct.pack("<II", index, 0))


def base(front: Frontend) -> int:
    return int(struct.unpack("<II", front.receive().payload)[1])


def silent(front: Frontend, seconds: float = MEANWHILE) -> bool:
    """No answer comes within that time."""
    front.sock.settimeout(seconds)
    try:
        front.sock.recv(1, socket.MSG_PEEK)
        return False
    except TimeoutError:
        return True
    finally:
        front.sock.settimeout(10)


def restart(front: Frontend, index: int, at: int) -> None:
    """As QEMU does when a migration failed after the stop."""
    queue = front.queues[index]
    front.tell(SET_VRING_BASE, struct.pack("<II", index, at))
    front.set_addr(index, queue)
    front.tell(13, struct.pack("<Q", index), [queue.call])
    front.tell(12, struct.pack("<Q", index), [queue.kick])
    front.enable(index)


@contextmanager
def logging(server: Server, queues: int = 1) -> Iterator[tuple[Frontend, Events]]:
    log = Log()
    try:
        with frontend(server.path, queues=queues) as front:
            events = Events(server)
            events.wait(RINGS)
            begin(front, log)
            yield front, events
    finally:
        log.close()


def test_answer_waits_for_go_on(vhost: Server) -> None:
    with logging(vhost) as (front, events):
        assert front.write(0, b"a" * 512) == OK
        ask_base(front, 0)
        number = events.wait(SWITCHOVER)
        assert silent(front)
        assert vhost.do(f"goon {number + 1}") == str(errno.ESTALE)
        assert vhost.do(f"goon {number}") == "0"
        assert base(front) == 1
        assert vhost.do(f"goon {number}") == str(errno.ESTALE), "twice"


def test_only_the_last_ring_is_held(vhost: Server) -> None:
    with logging(vhost, queues=4) as (front, events):
        for index in (2, 0, 3):
            assert front.stop(index) == 0
        assert events.none(SWITCHOVER)
        ask_base(front, 1)
        number = events.wait(SWITCHOVER)
        assert silent(front)
        assert vhost.do(f"goon {number}") == "0"
        assert base(front) == 0
        assert front.stop(2) == 0, "a ring that does not run is not held"


def test_all_rings_asked_at_once(vhost: Server) -> None:
    with logging(vhost, queues=4) as (front, events):
        for index in range(4):
            ask_base(front, index)
        for _ in range(3):
            base(front)
        number = events.wait(SWITCHOVER)
        assert silent(front)
        assert vhost.do(f"goon {number}") == "0"
        base(front)


def test_requests_in_flight_end_before_the_switchover(vhost: Server) -> None:
    with logging(vhost) as (front, events):
        vhost.ok("block")
        head, _, status = front.build(T_OUT, 0, data=b"b" * 512)
        front.queues[0].offer(head)
        front.queues[0].kick_now()
        wait_until(lambda: vhost.stats().submitted == 1, "submitted")
        ask_base(front, 0)
        assert silent(front) and events.none(SWITCHOVER)
        vhost.ok("unblock")
        number = events.wait(SWITCHOVER)
        assert front.queues[0].take() and front.queues[0].memory.read(status, 1) == b"\0"
        assert vhost.do(f"goon {number}") == "0"
        assert base(front) == 1


def test_rings_of_firmware_are_no_switchover(vhost: Server) -> None:
    with frontend(vhost.path, queues=2) as front:
        events = Events(vhost)
        assert events.wait(RINGS) == 0
        assert front.stop(0) == 0 and front.stop(1) == 0
        for index in range(2):
            restart(front, index, 0)
        assert events.wait(RINGS) == 0
        assert events.none(SWITCHOVER)
        assert front.write(0, b"c" * 512) == OK


def test_log_without_the_feature_and_feature_without_log_are_no_switchover(vhost: Server) -> None:
    log = Log()
    with frontend(vhost.path) as front:
        log.give(front)
        assert front.stop(0) == 0
        assert Events(vhost).none(SWITCHOVER)
    with frontend(vhost.path) as front:
        front.set_features(1 << F_LOG_ALL)
        assert front.stop(0) == 0
        assert Events(vhost).none(SWITCHOVER)
    log.close()


def test_cancelled_migration_changes_nothing(vhost: Server) -> None:
    with logging(vhost) as (front, events):
        front.write(0, b"d" * 512)
        front.set_features()
        front.set_addr(0, front.queues[0])
        assert front.read(0, 512) == b"d" * 512
        assert events.none(RINGS)
        assert front.stop(0) == 2
        assert events.none(SWITCHOVER)


def test_reset_is_no_switchover(vhost: Server) -> None:
    with logging(vhost) as (front, events):
        assert front.tell(RESET_DEVICE) == 0
        assert events.none(SWITCHOVER)


def test_failed_migration_starts_the_rings_again(vhost: Server) -> None:
    with logging(vhost, queues=2) as (front, events):
        assert front.write(0, b"e" * 512) == OK
        for again in range(1, 4):
            assert front.stop(1) == 0
            ask_base(front, 0)
            number = events.wait(SWITCHOVER)
            assert number == again
            assert vhost.do(f"goon {number}") == "0"
            at = base(front)
            restart(front, 0, at)
            assert events.wait(RINGS) == number
            restart(front, 1, 0)
            assert events.none(RINGS), "only the first of a session's rings is told"
            assert front.read(0, 512) == b"e" * 512


def test_switchover_goes_on_by_itself_when_nobody_says_so(vhost: Server) -> None:
    vhost.ok("offer 200")
    with logging(vhost) as (front, events):
        begun = time.monotonic()
        ask_base(front, 0)
        number = events.wait(SWITCHOVER)
        assert base(front) == 0
        assert 0.19 < time.monotonic() - begun < 5
        assert vhost.do(f"goon {number}") == str(errno.ESTALE)
        restart(front, 0, 0)
        assert front.write(0, b"f" * 512) == OK, "nothing was fenced"


def test_front_end_that_dies_in_the_switchover(vhost: Server) -> None:
    before = vhost.fds()
    with logging(vhost) as (front, events):
        ask_base(front, 0)
        number = events.wait(SWITCHOVER)
        front.sock.close()
    assert vhost.do(f"goon {number}") in ("0", str(errno.ESTALE))
    vhost.quiet(before)
    # An answer meant for the one before does not let the next one go.
    with logging(vhost) as (front, events):
        ask_base(front, 0)
        following = events.wait(SWITCHOVER)
        assert following > number
        assert vhost.do(f"goon {number}") == str(errno.ESTALE)
        assert silent(front)
        assert vhost.do(f"goon {following}") == "0"
        base(front)


@pytest.mark.parametrize("how", ["stop hard", "stop soft"])
def test_export_that_stops_in_the_switchover(vhost: Server, how: str) -> None:
    with logging(vhost) as (front, events):
        ask_base(front, 0)
        number = events.wait(SWITCHOVER)
        if how == "stop hard":
            vhost.ok(how)
            assert front.gone()
        else:
            assert vhost.do(f"goon {number}") == "0"
            base(front)
            front.sock.close()
            vhost.ok(how)


def test_messages_after_the_held_one_wait(vhost: Server) -> None:
    with logging(vhost) as (front, events):
        ask_base(front, 0)
        front.send(SET_VRING_BASE, struct.pack("<II", 0, 0), flags=9)
        number = events.wait(SWITCHOVER)
        assert silent(front)
        assert vhost.do(f"goon {number}") == "0"
        assert base(front) == 0
        assert front.receive().request == SET_VRING_BASE


# ---- sockets that somebody else accepted ----


@contextmanager
def accepted(folder: Path, server: Server) -> Iterator[Callable[[], tuple[int, Frontend]]]:
    """Each call gives the server one end of a new connection: (errno, a front end on the other end)."""
    with socket.socket(socket.AF_UNIX) as listener:
        path = str(folder / "pair.sock")
        listener.bind(path)
        listener.listen(16)

        def make() -> tuple[int, Frontend]:
            code = int(server.do(f"serve {path}"))
            front = Frontend.__new__(Frontend)
            front.sock, _ = listener.accept()
            front.sock.settimeout(10)
            front.memory, front.queues, front.backend, front.inflight = None, [], None, None
            front.features = front.protocol = 0
            return code, front

        yield make


def test_accepted_sockets_are_served_one_after_another(vhost: Server, tmp_path: Path) -> None:
    before = vhost.fds()
    with accepted(tmp_path, vhost) as make:
        fronts = []
        for _ in range(9):
            code, front = make()
            assert code == 0
            fronts.append(front)
        code, tenth = make()
        assert code == errno.EAGAIN and tenth.gone()
        tenth.close()
        for n, front in enumerate(fronts):
            front.negotiate()
            if n + 1 < len(fronts):
                fronts[n + 1].send(1)
                assert silent(fronts[n + 1], 0.02)
                front.close()
                fronts[n + 1].receive()
        assert vhost.stats().accepted == 9
        fronts[-1].close()
    vhost.quiet(before)


def test_front_end_that_came_while_its_former_self_was_there_leaves_no_gap(vhost: Server, tmp_path: Path) -> None:
    """Whoever waits for "no client" must not see it when QEMU comes again."""
    with accepted(tmp_path, vhost) as make:
        (_, first), (_, second) = make(), make()
        first.negotiate()
        events = Events(vhost)
        first.close()
        second.negotiate()
        assert events.wait(4) == 1
        second.close()


def test_sockets_that_wait_are_closed_at_the_stop(vhost: Server, tmp_path: Path) -> None:
    with accepted(tmp_path, vhost) as make:
        (_, first), (_, second) = make(), make()
        first.negotiate()
        vhost.ok("stop hard")
        assert first.gone() and second.gone()
        first.close()
        second.close()


def test_queue_of_an_accepted_socket_works(vhost: Server, tmp_path: Path) -> None:
    with accepted(tmp_path, vhost) as make:
        _, front = make()
        front.negotiate()
        front.set_features()
        memory = Memory()
        front.set_memory(memory)
        front.start(0, Queue(memory))
        assert front.write(8, b"g" * 512) == OK
        assert front.read(8, 512) == b"g" * 512
        front.close()
