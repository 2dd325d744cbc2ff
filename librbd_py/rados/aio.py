"""The asynchronous half of `Ioctx`. Import it from `librbd_py.rados`."""

from __future__ import annotations

import copy
import errno
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from librbd_py.format.logs import logger
from librbd_py.rados.ops import (
    LIBRADOS_OPERATION_NOFLAG,
    AioQueue,
    Completion,
    ReadOp,
    WriteOp,
    data_of,
    raw,
    result_of,
    text,
)

if TYPE_CHECKING:
    from librbd_py.rados.ioctx import Ioctx

log = logger("librbd_py.rados")
_queue = AioQueue()


class Pending:
    """How many operations of a context are under way."""

    def __init__(self) -> None:
        self.idle = threading.Condition()
        self.count = 0

    def change(self, by: int) -> None:
        with self.idle:
            self.count += by
            self.idle.notify_all()

    def wait(self) -> None:
        with self.idle:
            self.idle.wait_for(lambda: self.count == 0)


class AioOperations:
    """Operations on one object run in the order they were given; those on different objects side by side.

    Namespace, snapshot context and read snapshot are those of the moment of the call.
    """

    lock: threading.Lock
    safe_completions: list[Completion]
    complete_completions: list[Completion]
    _pending: Pending

    def _now(self) -> Ioctx:
        """This context as it is now."""
        ioctx: Any = self
        ioctx.require_ioctx_open()
        frozen: Ioctx = copy.copy(ioctx)
        return frozen

    def _completion(
        self, oncomplete: Callable[..., object] | None = None, onsafe: Callable[..., object] | None = None
    ) -> Completion:
        ioctx: Any = self
        return Completion(ioctx, oncomplete, onsafe)

    def _submit(self, ioctx: Ioctx, oid: str, completion: Completion, call: Callable[[], int]) -> Completion:
        with self.lock:
            if completion.oncomplete:
                self.complete_completions.append(completion)
            if completion.onsafe:
                self.safe_completions.append(completion)
        self._pending.change(1)

        def job() -> None:
            try:
                value = result_of(call)
            except Exception:
                log.exception("an asynchronous operation failed")
                value = -errno.EIO
            self._pending.change(-1)
            completion.finish(value)

        _queue.submit((id(ioctx.rados), ioctx.get_pool_id(), ioctx.nspace, oid), job)
        return completion

    def _after_aio(self, oid: str) -> None:
        """An operation that waits comes after those on the same object that were begun before it, as in librados."""
        ioctx: Any = self
        _queue.settle((id(ioctx.rados), ioctx.get_pool_id(), ioctx.nspace, oid))

    def _with_output(
        self,
        ioctx: Ioctx,
        oid: str,
        oncomplete: Callable[..., object] | None,
        onsafe: Callable[..., object] | None,
        call: Callable[[], tuple[int, Sequence[Any]]],
        failed: Sequence[Any],
    ) -> Completion:
        """Callbacks get the completion and what `call` returned beside its result, or `failed`."""
        outputs: list[Sequence[Any]] = [failed]

        def wrapped(callback: Callable[..., object] | None) -> Callable[[Completion], object] | None:
            return None if callback is None else (lambda completion: callback(completion, *outputs[0]))

        def run() -> int:
            value, outputs[0] = call()
            return value

        return self._submit(ioctx, oid, self._completion(wrapped(oncomplete), wrapped(onsafe)), run)

    def aio_flush(self) -> None:
        """Waits until every asynchronous operation of this context has ended."""
        self._pending.wait()

    def aio_stat(self, object_name: str, oncomplete: Callable[[Completion, Any, Any], object]) -> Completion:
        """oncomplete(completion, size, mtime), or None twice."""
        name = text(object_name, "object_name")
        ioctx = self._now()
        return self._with_output(ioctx, name, oncomplete, None, lambda: (0, ioctx.stat(name)), (None, None))

    def aio_write(
        self,
        object_name: str,
        to_write: bytes,
        offset: int = 0,
        oncomplete: Callable[[Completion], object] | None = None,
        onsafe: Callable[[Completion], object] | None = None,
    ) -> Completion:
        name, what = text(object_name, "object_name"), data_of(to_write)
        ioctx = self._now()
        return self._submit(ioctx, name, self._completion(oncomplete, onsafe), lambda: ioctx.write(name, what, offset))

    def aio_write_full(
        self,
        object_name: str,
        to_write: bytes,
        oncomplete: Callable[[Completion], object] | None = None,
        onsafe: Callable[[Completion], object] | None = None,
    ) -> Completion:
        name, what = text(object_name, "object_name"), data_of(to_write)
        ioctx = self._now()
        return self._submit(ioctx, name, self._completion(oncomplete, onsafe), lambda: ioctx.write_full(name, what))

    def aio_writesame(
        self,
        object_name: str,
        to_write: bytes,
        write_len: int,
        offset: int = 0,
        oncomplete: Callable[[Completion], object] | None = None,
    ) -> Completion:
        name, what = text(object_name, "object_name"), data_of(to_write)
        ioctx = self._now()

        def call() -> int:
            ioctx.writesame(name, what, write_len, offset)
            return 0

        return self._submit(ioctx, name, self._completion(oncomplete), call)

    def aio_append(
        self,
        object_name: str,
        to_append: bytes,
        oncomplete: Callable[[Completion], object] | None = None,
        onsafe: Callable[[Completion], object] | None = None,
    ) -> Completion:
        name, what = text(object_name, "object_name"), data_of(to_append)
        ioctx = self._now()
        return self._submit(ioctx, name, self._completion(oncomplete, onsafe), lambda: ioctx.append(name, what))

    def aio_cmpext(
        self,
        object_name: str,
        cmp_buf: bytes,
        offset: int = 0,
        oncomplete: Callable[[Completion], object] | None = None,
    ) -> Completion:
        name, what = text(object_name, "object_name"), data_of(cmp_buf)
        ioctx = self._now()
        return self._submit(ioctx, name, self._completion(oncomplete), lambda: ioctx.cmpext(name, what, offset))

    def aio_read(
        self,
        object_name: str,
        length: int,
        offset: int,
        oncomplete: Callable[[Completion, bytes | None], object] | None = None,
    ) -> Completion:
        """oncomplete(completion, data), None on failure."""
        name = text(object_name, "object_name")
        ioctx = self._now()

        def call() -> tuple[int, Sequence[Any]]:
            found = ioctx.read(name, length, offset)
            return len(found), (found,)

        return self._with_output(ioctx, name, oncomplete, None, call, (None,))

    def aio_execute(
        self,
        object_name: str,
        cls: str,
        method: str,
        data: bytes,
        length: int = 8192,
        oncomplete: Callable[[Completion, bytes], object] | None = None,
        onsafe: Callable[[Completion, bytes], object] | None = None,
    ) -> Completion:
        """oncomplete(completion, output), None on failure."""
        name = text(object_name, "object_name")
        ioctx = self._now()

        def call() -> tuple[int, Sequence[Any]]:
            value, output = ioctx.execute(name, cls, method, data, length)
            return value, (output,)

        return self._with_output(ioctx, name, oncomplete, onsafe, call, (None,))

    def aio_setxattr(
        self,
        object_name: str,
        xattr_name: str,
        xattr_value: bytes,
        oncomplete: Callable[[Completion], object] | None = None,
    ) -> Completion:
        name, value = text(object_name, "object_name"), data_of(xattr_value)
        ioctx = self._now()
        return self._submit(
            ioctx, name, self._completion(oncomplete), lambda: _zero(ioctx.set_xattr(name, xattr_name, value))
        )

    def aio_rmxattr(
        self, object_name: str, xattr_name: str, oncomplete: Callable[[Completion], object] | None = None
    ) -> Completion:
        name = text(object_name, "object_name")
        ioctx = self._now()
        return self._submit(ioctx, name, self._completion(oncomplete), lambda: _zero(ioctx.rm_xattr(name, xattr_name)))

    def aio_remove(
        self,
        object_name: str,
        oncomplete: Callable[[Completion], object] | None = None,
        onsafe: Callable[[Completion], object] | None = None,
    ) -> Completion:
        name = text(object_name, "object_name")
        ioctx = self._now()
        return self._submit(ioctx, name, self._completion(oncomplete, onsafe), lambda: _zero(ioctx.remove_object(name)))

    def aio_notify(
        self,
        obj: str,
        oncomplete: Callable[[Completion, int, list[Any] | None, list[Any] | None], object],
        msg: str = "",
        timeout_ms: int = 5000,
    ) -> Completion:
        """oncomplete(completion, result, [(gid, cookie, ack)], [(gid, cookie) of the silent]), or None twice."""
        name, message = text(obj, "obj"), raw(msg, "msg")
        ioctx = self._now()
        outputs: list[tuple[list[Any] | None, list[Any] | None]] = [(None, None)]

        def call() -> int:
            reply = ioctx._notify(name, message, timeout_ms)
            acks = [(gid, cookie, ack if ack else "") for (gid, cookie), ack in reply.acks.items()]
            outputs[0] = (acks, list(reply.timed_out))
            return 0

        def done(completion: Completion) -> object:
            return oncomplete(completion, completion.get_return_value(), *outputs[0])

        return self._submit(ioctx, name, self._completion(done), call)

    def operate_aio_write_op(
        self,
        write_op: WriteOp,
        oid: str,
        oncomplete: Callable[[Completion], object] | None = None,
        onsafe: Callable[[Completion], object] | None = None,
        mtime: int = 0,
        flags: int = LIBRADOS_OPERATION_NOFLAG,
    ) -> Completion:
        ops, what = list(write_op.ops), f"Failed to operate aio write op for oid {oid}"
        ioctx = self._now()

        def call() -> int:
            ioctx._write(oid, ops, what)
            return 0

        return self._submit(ioctx, text(oid, "oid"), self._completion(oncomplete, onsafe), call)

    def operate_aio_read_op(
        self,
        read_op: ReadOp,
        oid: str,
        oncomplete: Callable[[Completion], object] | None = None,
        onsafe: Callable[[Completion], object] | None = None,
        flag: int = LIBRADOS_OPERATION_NOFLAG,
    ) -> Completion:
        ioctx = self._now()

        def call() -> int:
            ioctx.operate_read_op(read_op, oid, flag)
            return 0

        return self._submit(ioctx, text(oid, "oid"), self._completion(oncomplete, onsafe), call)


def _zero(done: bool) -> int:
    """What librados answers where Ceph's module says True."""
    return 0 if done else -errno.EIO
