"""`rbdpy lock why` and `lock take`: owners that answer, refuse, stand still, are dead, or are no program at all."""

from __future__ import annotations

import errno
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from librbd_py import rados, rbd
from librbd_py.cli.main import main
from librbd_py.image import ownership
from librbd_py.store.embedded.store import WATCH_VARIABLE
from tests.fault.store_workers import Worker, Workers, workers

USER = """
from librbd_py import rados, rbd
cluster = rados.Rados(conf={"rbdpy_store": f"embedded:{path}"}); cluster.connect()
image = rbd.Image(cluster.open_ioctx("rbd"), "a")
image.handle.describe = {"vm": "uuid:" + sys.argv[2]}
say(cluster.store.client.gid)
while (line := hear()):
    if line == "write": image.write(b"x" * 512, 0)
    elif line == "keep": image.lock_acquire(0)
    elif line == "ask":
        image.handle.request_lock()
    elif line == "offer": image.handle.offer("uuid:" + sys.argv[2])
    elif line == "stand by": image.handle.stand_by("uuid:" + sys.argv[2], park=True)
    elif line == "take over": image.handle.take_over()
    say("done")
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(WATCH_VARIABLE, "1")
    monkeypatch.setenv("RBDPY_STORE", f"embedded:{tmp_path / 'store'}")
    assert main(["create", "a", "--size", "4M"]) == 0
    return tmp_path / "store"


@pytest.fixture
def pack(path: Path) -> Iterator[Workers]:
    with workers(path) as made:
        yield made


def user(pack: Workers, name: str) -> tuple[Worker, str]:
    """A process with the image open, and its client's name."""
    made = pack.start(USER, name)
    return made, f"client.{made.hear()}"


def do(worker: Worker, what: str) -> None:
    worker.say(what)
    assert worker.hear() == "done"


Why = Callable[[], Any]


@pytest.fixture
def why(path: Path, capsys: pytest.CaptureFixture[str]) -> Why:
    def run() -> Any:
        capsys.readouterr()
        assert main(["lock", "why", "a", "--format", "json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def outcome(shown: Any) -> str:
    return str(shown["take_over"]["outcome"])


def take(*options: str) -> int:
    return main(["lock", "take", "a", *options])


def test_nobody_has_it(why: Why, capsys: pytest.CaptureFixture[str]) -> None:
    shown = why()
    assert outcome(shown) == "free" and "owner" not in shown and shown["watchers"] == []
    assert take() == 0
    assert capsys.readouterr().out.splitlines() == [
        "the lock is free: who writes first takes it",
        "the lock is ours",
        "the lock is free",
    ]


def test_a_living_owner_says_what_it_is(pack: Workers, why: Why, capsys: pytest.CaptureFixture[str]) -> None:
    (one, first), (_, second) = user(pack, "one"), user(pack, "two")
    do(one, "write")
    shown = why()
    owner, (other,) = shown["owner"], shown["watchers"]
    assert (owner["client"], owner["pid"], owner["watch"]) == (first, one.pid, "there")
    assert owner["about"] == [{"key": "vm", "value": "uuid:one"}]
    assert owner["last_io"] == "write" and 0 <= owner["last_io_age"] <= owner["lock_age"] <= owner["watch_age"] < 60
    assert (owner["policy"], owner["in_flight"], owner["parked"], owner["blocklisted"]) == ("automatic", 0, 0, "false")
    assert (other["client"], other["state"]) == (second, "registered, unlocked")
    assert outcome(shown) == "asked"

    assert main(["lock", "why", "a"]) == 0
    text = capsys.readouterr().out
    for part in (f"owner:      {first}", "vm:         uuid:one", "last I/O:   write", f"also there: {second}"):
        assert part in text
    assert main(["lock", "why", "a", "--format", "xml"]) == 0
    tree = ElementTree.fromstring(capsys.readouterr().out)
    assert tree.findtext("owner/client") == first and tree.findtext("watchers/watcher/client") == second
    assert tree.findtext("owner/about/fact/value") == "uuid:one"

    assert take() == 0
    assert f"asking {first}" in capsys.readouterr().out
    assert outcome(why()) == "free"
    do(one, "write")  # it was asked, and may have it again
    assert why()["owner"]["client"] == first and not any(row["client"] == first for row in why()["watchers"])


def test_who_waits_is_named(pack: Workers, why: Why) -> None:
    (one, _), (two, second) = user(pack, "one"), user(pack, "two")
    do(one, "keep")
    do(two, "ask")
    end = time.monotonic() + 30
    while not (waiting := why()["owner"]["waiting"]):
        assert time.monotonic() < end
    assert [row["client"] for row in waiting] == [second] and 0 <= waiting[0]["asked"] < 30


def test_an_offer_and_who_stands_by_for_it(pack: Workers, why: Why, capsys: pytest.CaptureFixture[str]) -> None:
    (one, first), (two, second) = user(pack, "vm"), user(pack, "vm")
    do(one, "write")
    do(two, "stand by")
    shown = why()
    assert outcome(shown) == "asked" and shown["owner"]["client"] == first
    assert [(row["client"], row["stand_by"]) for row in shown["watchers"]] == [(second, "true")]
    do(one, "offer")
    shown = why()
    assert outcome(shown) == "offered" and shown["owner"]["offered_to"] == "uuid:vm"
    assert take("--timeout", "0.2") == errno.ETIMEDOUT  # a stranger gets nothing
    assert "offers the lock to uuid:vm" in capsys.readouterr().out
    assert main(["lock", "why", "a"]) == 0
    assert "stand-by" in capsys.readouterr().out
    do(two, "take over")
    shown = why()
    assert outcome(shown) == "asked" and shown["owner"]["client"] == second
    assert shown["owner"]["stand_by"] == "false"


def test_an_owner_that_refuses_is_fenced_only_with_force(
    pack: Workers, why: Why, capsys: pytest.CaptureFixture[str]
) -> None:
    one, first = user(pack, "one")
    do(one, "keep")
    assert outcome(why()) == "refused"
    assert take() == errno.EROFS
    said = capsys.readouterr()
    assert f"{first} at" in said.err and "refuses (--force fences it)" in said.err
    assert why()["owner"]["client"] == first and one.process.poll() is None
    assert take("--force") == 0
    assert f"by killing process {one.pid}" in capsys.readouterr().out
    assert one.process.wait(30) == -signal.SIGKILL
    assert outcome(why()) == "free"


def test_an_owner_that_stands_still(pack: Workers, why: Why, capsys: pytest.CaptureFixture[str]) -> None:
    """Not fenced at once without force, for it may be merely slow; when its watch has ended it is."""
    (one, first), (two, second) = user(pack, "one"), user(pack, "two")
    do(one, "write")
    one.stop()
    shown = why()
    assert outcome(shown) == "silent" and shown["owner"]["pid"] == one.pid and shown["owner"]["watch"] == "silent"
    assert take("--timeout", "0.2") == errno.ETIMEDOUT
    assert "--force fences it" in capsys.readouterr().err
    assert why()["owner"]["client"] == first and one.process.poll() is None

    assert take() == 0  # waits for the watch to end
    said = capsys.readouterr().out
    assert f"{first} is fenced" in said and said.endswith("the lock is free\n")
    assert one.process.wait(30) == -signal.SIGKILL
    do(two, "write")
    two.stop()
    assert take("--timeout", "0.2", "--force") == 0
    assert two.process.wait(30) == -signal.SIGKILL
    assert outcome(why()) == "free" and second not in str(why())


def test_a_dead_owner(pack: Workers, why: Why, capsys: pytest.CaptureFixture[str]) -> None:
    one, first = user(pack, "one")
    do(one, "write")
    one.kill()
    shown = why()
    assert outcome(shown) == "dead" and shown["owner"]["watch"] == "gone" and "pid" not in shown["owner"]
    assert main(["lock", "why", "a"]) == 0
    assert "watch:      gone" in capsys.readouterr().out
    assert take() == 0
    assert f"fencing {first}" in capsys.readouterr().out
    assert outcome(why()) == "free"


def test_a_lock_by_hand_is_left_alone(path: Path, why: Why, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lock", "add", "a", "mine"]) == 0
    shown = why()
    assert outcome(shown) == "by hand" and shown["owner"]["cookie"] == "mine"
    assert take("--force") == errno.EBUSY
    assert "lock rm" in capsys.readouterr().err


def test_an_image_without_the_feature(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["create", "b", "--size", "4M", "--image-feature", "layering"]) == 0
    assert main(["lock", "why", "b"]) == 0
    assert "no exclusive lock" in capsys.readouterr().out
    assert main(["lock", "take", "b"]) == errno.EINVAL
    assert main(["lock", "take", "a", "--timeout", "-1"]) == errno.EINVAL
    assert main(["lock", "why", "none"]) == errno.ENOENT


def test_a_watcher_that_lies_or_talks_nonsense(path: Path) -> None:
    """It cannot claim to be the owner, and what cannot be read is no answer."""
    with rados.Rados() as cluster, cluster.open_ioctx("rbd") as io, rbd.Image(io, "a") as image:
        image.write(b"x", 0)
        liar = cluster.store.open("rbd")
        answers = [
            b"\xff" * 9000,
            b"",
            ownership.Answer(program="liar", owner=True).encode(),
            b"\x01\x01\x04\0\0\0zzzz",
        ]
        watches = [
            liar.watch(image.handle.oid, lambda *call, answer=answer: answer)  # type: ignore[misc]
            for answer in answers
        ]
        found = ownership.look(image.handle)
        assert found.owner is not None and found.owner.watching is not None
        assert found.owner.watching.handle == image.handle.control.watch_handle
        said = {row.handle: row.answer for row in found.others}
        assert [said[watch.cookie] is None for watch in watches] == [True, True, False, True]
        assert all(row.answered for row in found.others)
        for watch in watches:
            watch.close()
