"""Processes that fight for an image's exclusive lock and stamp what they write while they have it: ours, and Ceph's own
librbd, for this file is also run by /usr/bin/python3. Driven by JSON lines: [command, argument, ...] -> result.

A block says {image, lba, owner, epoch, sequence, crc}, over and over. An epoch is one time of ownership: who gets the
lock reads the epoch in block 0 and writes the next one there. So (epoch, sequence) of a block never goes back, unless
somebody wrote who did not own the lock.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

BLOCK = 4096
BLOCKS = 64
STEP = 68 << 10  # bytes from one block to the next, so that they lie in several objects
SIZE = 8 << 20
DEADLINE = 60.0  # seconds for an answer; reached only when something hangs
_STAMP = struct.Struct("<8sQQQQQI12x")  # magic, image, lba, owner, epoch, sequence, crc
_MAGIC = b"rbdpylck"
Mark = tuple[int, int, int]  # owner, epoch, sequence
NOTHING: Mark = (0, 0, 0)


def stamp(image: int, lba: int, mark: Mark) -> bytes:
    body = struct.pack("<8sQQQQQ", _MAGIC, image, lba, *mark)
    return (body + struct.pack("<I12x", zlib.crc32(body))) * (BLOCK // _STAMP.size)


def read_stamp(image: int, lba: int, data: bytes) -> Mark:
    """Who wrote the block. AssertionError: torn, or another block's."""
    if not any(data):
        return NOTHING
    _, _, _, owner, epoch, sequence, _ = _STAMP.unpack_from(data)
    mark = owner, epoch, sequence
    assert data == stamp(image, lba, mark), f"block {lba} is torn or not its own: it begins {data[:64].hex()}"
    return mark


class Contestant:
    """In the process: an open image and what is done with it."""

    def __init__(self, modules: Any, conf: Any, pool: str, name: str, owner: int) -> None:
        self.rados, self.rbd = modules
        self.cluster = self.rados.Rados(**conf)
        self.cluster.connect()
        self.io = self.cluster.open_ioctx(pool)
        self.image = self.rbd.Image(self.io, name)
        self.number = zlib.crc32(self.image.id().encode())
        self.owner = owner
        self.epoch = 0
        self.random = random.Random(owner)
        self._load: list[threading.Thread] = []
        self._stop = False
        self._lock = threading.Lock()
        self._sequence = 0
        self.written = 0
        self.acked: dict[int, Mark] = {}  # by `writer`: what was acknowledged last of each block
        self.errors: list[tuple[float, int]] = []

    def close(self) -> None:
        self.image.close()
        self.io.close()
        self.cluster.shutdown()

    def address(self) -> str:
        return str(self.cluster.get_addrs())

    # --- blocks

    def look(self, lba: int) -> Mark:
        return read_stamp(self.number, lba, bytes(self.image.read(lba * STEP, BLOCK)))

    def put(self, lba: int) -> None:
        with self._lock:
            self._sequence += 1
            mark = self.owner, self.epoch, self._sequence
        self.image.write(stamp(self.number, lba, mark), lba * STEP)

    def look_at_all(self) -> list[Mark]:
        return [self.look(lba) for lba in range(BLOCKS)]

    # --- the lock

    def acquire(self, seconds: float = DEADLINE) -> float:
        """Takes the lock for good: others that ask are refused, and try again. When it was ours (time.monotonic())."""
        end = time.monotonic() + seconds
        while True:
            try:
                self.image.lock_acquire(self.rbd.RBD_LOCK_MODE_EXCLUSIVE)
                return time.monotonic()
            except Exception as failure:
                if getattr(failure, "errno", None) not in (11, 16, 30) or time.monotonic() >= end:
                    raise
            time.sleep(self.random.uniform(0.001, 0.01))

    def begin(self) -> int:
        """A new epoch, as the owner of the lock."""
        self.epoch = self.look(0)[1] + 1
        self._sequence = 0
        self.put(0)
        return self.epoch

    def own(self, lazily: bool = False) -> int:
        """By hand, or as a guest's write does."""
        if lazily:
            self.image.write(bytes(self.image.read(SIZE - 512, 512)), SIZE - 512)
        else:
            self.acquire()
        return self.begin()

    def release(self) -> None:
        self.image.flush()
        self.image.lock_release()

    def hold(self, seconds: float) -> None:
        """Ours alone: does something for which the lock must stay, so that who asks is promised it and waits."""

        def stay() -> None:
            with self.image.handle.exclusive():
                time.sleep(seconds)

        threading.Thread(target=stay, daemon=True).start()

    def state(self) -> str:
        """Ours alone."""
        return str(self.image.handle.control.state)

    def turns(self, count: int, blocks: int) -> list[tuple[float, float, int]]:
        """(from, to, epoch) of each time of ownership."""
        found = []
        for _ in range(count):
            begun = self.acquire()
            epoch = self.begin()
            for lba in self.random.sample(range(1, BLOCKS), blocks):
                before = self.look(lba)
                assert before[1] < epoch, f"block {lba} holds {before} in epoch {epoch}"
                self.put(lba)
            self.image.flush()
            assert self.look(0) == (self.owner, epoch, 1), "somebody else wrote meanwhile"
            ended = time.monotonic()
            self.image.lock_release()
            found.append((begun, ended, epoch))
        return found

    def die(self, blocks: int) -> None:
        """In the middle of a turn."""
        self.acquire()
        self.begin()
        for lba in self.random.sample(range(1, BLOCKS), blocks):
            self.put(lba)
        os.kill(os.getpid(), signal.SIGKILL)

    # --- load

    def load(self, depth: int) -> None:
        """Writes without a pause until `stop` or an error."""
        self._stop = False
        self._load = [threading.Thread(target=self._write, args=(number,), daemon=True) for number in range(depth)]
        for thread in self._load:
            thread.start()

    def _write(self, number: int) -> None:
        chosen = random.Random(number)
        while not self._stop:
            try:
                self.put(chosen.randrange(1, BLOCKS))
            except Exception as failure:
                with self._lock:
                    self.errors.append((time.monotonic(), getattr(failure, "errno", None) or 5))
                return
            with self._lock:
                self.written += 1

    def stop(self) -> None:
        self._stop = True
        for thread in self._load:
            thread.join(DEADLINE)

    # --- a VM that moves, ours alone

    def writer(self, depth: int) -> None:
        """As `load`, but each thread has blocks of its own, so what was acknowledged last of each is known."""
        self._stop = False
        self._load = [threading.Thread(target=self._tick, args=(n, depth), daemon=True) for n in range(depth)]
        for thread in self._load:
            thread.start()

    def _tick(self, number: int, depth: int) -> None:
        lba = 1 + number
        while not self._stop:
            with self._lock:
                self._sequence += 1
                mark = self.owner, self.epoch, self._sequence
            try:
                self.image.write(stamp(self.number, lba, mark), lba * STEP)
            except Exception as failure:
                with self._lock:
                    self.errors.append((time.monotonic(), getattr(failure, "errno", None) or 5))
                return
            with self._lock:
                self.acked[lba] = mark
                self.written += 1
            lba = lba + depth if lba + depth < BLOCKS else 1 + number

    def stand_by(self, key: str) -> None:
        self.image.handle.stand_by(key, park=True)

    def hand_over(self, key: str) -> dict[str, Any]:
        """What was acknowledged when every thread of `writer` waits, and how long the offer took."""
        begun = time.monotonic()
        offered = self.image.handle.offer(key)
        ended = time.monotonic()
        while offered and self.image.handle.facts()["parked"] < len(self._load):
            assert time.monotonic() < ended + DEADLINE, self.image.handle.facts()
            time.sleep(0.001)
        with self._lock:
            return {"offered": offered, "begun": begun, "ended": ended, "acked": list(self.acked.items())}

    def asked(self) -> int:
        """How many peers want the lock and wait."""
        return len(self.image.handle.control.diary.answer("", "").waiting)

    def take_back(self) -> None:
        self.image.handle.take_back()

    def come(self) -> dict[str, Any]:
        """Takes the lock that was offered; when it was asked for and there, and when the first write was done."""
        begun = time.monotonic()
        self.image.handle.take_over()
        owned = time.monotonic()
        self.image.write(b"x" * 512, SIZE - 512)
        return {"begun": begun, "owned": owned, "first": time.monotonic()}

    def report(self) -> dict[str, Any]:
        with self._lock:
            writing = sum(thread.is_alive() for thread in self._load)
            return {"written": self.written, "errors": self.errors, "writing": writing}

    def take_over(self) -> dict[str, Any]:
        """Waits for the lock, and stamps every block. When it had it, and when the first write was done."""
        self.acquire()
        owned = time.monotonic()
        before = self.look_at_all()
        self.begin()
        first = time.monotonic()
        for lba in range(1, BLOCKS):
            self.put(lba)
        self.image.flush()
        return {"owned": owned, "first": first, "epoch": self.epoch, "before": before}


class Player:
    """In the test: such a process. `ask` waits for the answer, `tell` and `answer` let several work at once."""

    def __init__(
        self, where: dict[str, Any], pool: str, image: str, owner: int, *, real: bool = False, host: str | None = None
    ) -> None:
        """`host`: folder of another host's proofs that clients have ended."""
        python = "/usr/bin/python3" if real else sys.executable
        root = str(Path(__file__).parents[2])
        environment = {**os.environ} if real else {**os.environ, "PYTHONPATH": root}
        if host is not None:
            environment["RBDPY_CLIENTS"] = host
        self.owner = owner
        self.real = real
        self.address = ""  # when it is ready
        self.process = subprocess.Popen(
            [python, __file__, json.dumps(where), pool, image, str(owner), "real" if real else "ours"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._held = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, command: str, *arguments: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]).encode() + b"\n")
        self.process.stdin.flush()

    def answer(self, seconds: float = DEADLINE) -> Any:
        assert self.process.stdout is not None
        end = time.monotonic() + seconds
        while b"\n" not in self._held:
            ready = select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))[0]
            assert ready, f"no answer of {self.owner} after {seconds} s"
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            assert data, f"{self.owner} ended with {self.process.wait()}"
            self._held += data
        line, _, self._held = self._held.partition(b"\n")
        answer = json.loads(line)
        assert "error" not in answer, f"{self.owner}{' (librbd)' if self.real else ''}: {answer['error']}"
        return answer["result"]

    def ask(self, command: str, *arguments: Any, seconds: float = DEADLINE) -> Any:
        self.tell(command, *arguments)
        return self.answer(seconds)

    def written(self, count: int) -> None:
        """Waits until its load has written so many blocks."""
        end = time.monotonic() + DEADLINE
        while (said := self.ask("report"))["written"] < count:
            assert time.monotonic() < end and not said["errors"], said
            time.sleep(0.01)

    def stand_still(self) -> None:
        """SIGSTOP, and waits until every thread does."""
        stand_still(self.pid)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(DEADLINE)

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        if self.process.poll() is None:
            self.kill()
        self.process.stdin.close()
        self.process.stdout.close()


def stand_still(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    end = time.monotonic() + DEADLINE
    while any(_state(task) not in "Tt" for task in Path(f"/proc/{pid}/task").iterdir()):
        assert time.monotonic() < end
        time.sleep(0.001)


def _state(task: Path) -> str:
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def main(where: str, pool: str, name: str, owner: str, kind: str) -> None:
    modules: Any
    if kind == "real":
        import rados  # type: ignore[import-not-found]
        import rbd  # type: ignore[import-not-found]

        modules = rados, rbd
    else:
        from librbd_py import rados as our_rados
        from librbd_py import rbd as our_rbd

        modules = our_rados, our_rbd
    made = Contestant(modules, json.loads(where), pool, name, int(owner))
    print(json.dumps({"result": made.address()}), flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        try:
            answer = {"result": getattr(made, command)(*arguments)}
        except Exception as failure:
            answer = {"error": [type(failure).__name__, getattr(failure, "errno", None), str(failure)]}
        print(json.dumps(answer), flush=True)
    made.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
