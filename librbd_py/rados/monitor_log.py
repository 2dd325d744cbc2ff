"""The cluster log as it grows. librados would call from its own thread; here a thread of ours asks the monitors."""

from __future__ import annotations

import json
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from librbd_py import errors
from librbd_py.format.logs import logger
from librbd_py.store.api import Store
from librbd_py.store.rados import RadosStore

MONITOR_LEVELS = ["debug", "info", "warn", "warning", "err", "error", "sec"]
LEVELS = ("debug", "info", "sec", "warn", "error")  # ascending
_CODES = {"DBG": "debug", "INF": "info", "SEC": "sec", "WRN": "warn", "ERR": "error"}
INTERVAL_SECONDS = 1.0
ROWS = 200  # of one answer

log = logger("librbd_py.rados")


class Entry:
    """One line, in the parts that callbacks get."""

    def __init__(self, channel: str, name: str, who: str, stamp: float, seq: int, level: str, message: str) -> None:
        self.channel, self.name, self.who, self.stamp, self.seq = channel, name, who, stamp, seq
        self.level, self.message = level, message

    @property
    def line(self) -> str:
        return f"{self.stamp:.6f} {self.name} {self.who} {self.seq} : {self.channel} {self.level} {self.message}"

    def words(self) -> tuple[bytes | int, ...]:
        seconds, nanoseconds = int(self.stamp), int(self.stamp % 1 * 1e9)
        rest = self.seq, self.level.encode(), self.message.encode()
        return (self.line.encode(), self.who.encode(), seconds, nanoseconds, *rest)

    def words2(self) -> tuple[bytes | int, ...]:
        line, *rest = self.words()
        return (line, self.channel.encode(), self.name.encode(), *rest)


class MonitorLogs:
    """The part of `Rados` that is about the cluster log. One callback at a time; None ends it."""

    monitor_callback: object
    monitor_callback2: object
    _follower: Follower | None = None

    @property
    @abstractmethod
    def store(self) -> Store: ...

    def monitor_log(self, level: str, callback: Callable[..., Any] | None = None, arg: object | None = None) -> None:
        """`callback(arg, line, who, seconds, nanoseconds, sequence, level, message)` for each line of the cluster log,
        about once a second; text as bytes. LogicError: no such level, or not callable."""
        self._follow(level, callback, lambda call, entry: call(arg, *entry.words()))
        self.monitor_callback = None if callback is None else (callback, arg)
        self.monitor_callback2 = None

    def monitor_log2(self, level: str, callback: Callable[..., Any] | None = None, arg: object | None = None) -> None:
        """As monitor_log, with the channel and the name of who wrote the line behind the line."""
        self._follow(level, callback, lambda call, entry: call(arg, *entry.words2()))
        self.monitor_callback = None
        self.monitor_callback2 = None if callback is None else (callback, arg)

    def _follow(
        self, level: str, callback: Callable[..., Any] | None, tell: Callable[[Callable[..., Any], Entry], object]
    ) -> None:
        if level not in MONITOR_LEVELS:
            raise errors.rados.LogicError(f"invalid monitor level {level}")
        if callback is not None and not callable(callback):
            raise errors.rados.LogicError("callback must be a callable function or None")
        store = self.store
        self.stop_following()
        if callback is not None:
            self._follower = Follower(store, level, lambda entry: tell(callback, entry))

    def stop_following(self) -> None:
        follower, self._follower = self._follower, None
        if follower is not None:
            follower.stop()


class Follower:
    """Calls `deliver(entry)` for each new line at or above a level, until `stop`. In a store without monitors nobody
    writes a log: as on an idle cluster there is a line a second for debugging, so that who waits for one goes on."""

    def __init__(self, store: Store, level: str, deliver: Callable[[Entry], object]) -> None:
        self._store = store
        self._least = LEVELS.index({"warning": "warn", "err": "error", "security": "sec"}.get(level, level))
        self._deliver = deliver
        self._done = threading.Event()
        self._seen: set[tuple[str, str, int]] = set()
        self._thread = threading.Thread(target=self._run, name="rbdpy-log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        if not isinstance(self._store, RadosStore):
            self._tick(self._store)
            return
        first = True
        while not self._done.is_set():
            try:
                for entry in self._ask(self._store):
                    if not first:
                        self._hand(entry)
                first = False
            except OSError as failure:
                log.info("the cluster log cannot be read: %s", failure)
            self._done.wait(INTERVAL_SECONDS)

    def _tick(self, store: Store) -> None:
        who, number = f"client.{store.client.gid}", 0
        while not self._done.is_set():
            number += 1
            self._hand(Entry("cluster", who, store.client.address, time.time(), number, "debug", "the log is followed"))
            self._done.wait(INTERVAL_SECONDS)

    def _ask(self, store: RadosStore) -> list[Entry]:
        """What was not seen yet."""
        words = {"prefix": "log last", "num": ROWS, "level": "debug", "channel": "*", "format": "json"}
        rows: list[dict[str, Any]] = json.loads(store.mon_command(words) or b"[]")
        found, seen = [], set()
        for row in rows:
            key = str(row.get("name")), str(row.get("stamp")), int(row.get("seq", 0))
            seen.add(key)
            if key not in self._seen:
                found.append(_entry(row))
        self._seen = seen
        return found

    def _hand(self, entry: Entry) -> None:
        if LEVELS.index(entry.level) < self._least or self._done.is_set():
            return
        try:
            self._deliver(entry)
        except Exception:
            log.exception("the callback of a monitor log failed")


def _entry(row: dict[str, Any]) -> Entry:
    from datetime import datetime

    try:
        stamp = datetime.fromisoformat(str(row.get("stamp"))).timestamp()
    except ValueError:
        stamp = 0.0
    addresses = row.get("addrs", {}).get("addrvec") or [{}]
    level = _CODES.get(str(row.get("priority", "")).strip("[]"), "info")
    channel, name = str(row.get("channel", "")), str(row.get("name", ""))
    who, message = str(addresses[0].get("addr", "")), str(row.get("message", ""))
    return Entry(channel, name, who, stamp, int(row.get("seq", 0)), level, message)
