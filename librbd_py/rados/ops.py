"""Operation lists, iterators and completions of the `rados` face. Import them from `librbd_py.rados`."""

from __future__ import annotations

import builtins
import errno
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from librbd_py import errors
from librbd_py.control.pool import ControlPool
from librbd_py.errors import rados_errors
from librbd_py.format.logs import logger
from librbd_py.store import api

if TYPE_CHECKING:
    from librbd_py.rados.ioctx import Ioctx

LIBRADOS_OPERATION_NOFLAG = 0
LIBRADOS_OP_FLAG_EXCL = 1
LIBRADOS_OP_FLAG_FAILOK = 2
LIBRADOS_CMPXATTR_OP_EQ = 1
COMPARISONS = {1: "eq", 2: "ne", 3: "gt", 4: "ge", 5: "lt", 6: "le"}

AIO_THREADS = 8

log = logger("librbd_py.rados")


def text(value: object, name: str) -> str:
    """A name given as str or bytes, as Ceph's module takes them. TypeError for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    raise TypeError(f"{name} must be a string")


def raw(value: object, name: str) -> bytes:
    """A key given as str or bytes."""
    return text(value, name).encode() if not isinstance(value, bytes) else value


def data_of(value: object, name: str = "data") -> bytes:
    """Object data: bytes, or another buffer. TypeError for str."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    raise TypeError(f"{name} must be bytes, not {type(value).__name__}")


def unsupported(what: str) -> errors.rados.OSError:
    return errors.rados.OSError(f"{what}: not supported by this store", errno.EOPNOTSUPP)


class OpCtx:
    """`with WriteOpCtx() as op:` creates the operation list and releases it at the end."""

    def create(self) -> Any:
        raise NotImplementedError

    def release(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self.create()

    def __exit__(self, type: object, msg: object, traceback: object) -> None:
        self.release()


class WriteOp:
    """A list of changes to one object, applied all or none by `Ioctx.operate_write_op`."""

    def __init__(self) -> None:
        self.ops: list[api.Op] = []

    def create(self) -> WriteOp:
        self.ops = []
        return self

    def release(self) -> None:
        self.ops = []

    def new(self, exclusive: int | None = None) -> None:
        """Creates the object; EEXIST when `exclusive` (LIBRADOS_CREATE_EXCLUSIVE) and there."""
        self.ops.append(api.Create(bool(exclusive)))

    def remove(self) -> None:
        self.ops.append(api.Remove())

    def set_flags(self, flags: int = LIBRADOS_OPERATION_NOFLAG) -> None:
        """Flags of the last operation. Advice about caching is ignored, FAILOK is not supported (EOPNOTSUPP)."""
        if flags & LIBRADOS_OP_FLAG_FAILOK:
            raise errors.rados.OSError("an operation that may fail inside a list is not supported", errno.EOPNOTSUPP)
        if flags & LIBRADOS_OP_FLAG_EXCL and self.ops and isinstance(self.ops[-1], api.Create):
            self.ops[-1] = api.Create(True)

    def set_xattr(self, xattr_name: str, xattr_value: bytes) -> None:
        self.ops.append(api.SetXattr(text(xattr_name, "xattr_name"), data_of(xattr_value, "xattr_value")))

    def rm_xattr(self, xattr_name: str) -> None:
        self.ops.append(api.RmXattr(text(xattr_name, "xattr_name")))

    def append(self, to_write: bytes) -> None:
        self.ops.append(api.Append(data_of(to_write, "to_write")))

    def write_full(self, to_write: bytes) -> None:
        self.ops.append(api.WriteFull(data_of(to_write, "to_write")))

    def write(self, to_write: bytes, offset: int = 0) -> None:
        self.ops.append(api.Write(offset, data_of(to_write, "to_write")))

    def assert_version(self, version: int) -> None:
        self.ops.append(api.AssertVersion(version))

    def zero(self, offset: int, length: int) -> None:
        self.ops.append(api.Zero(offset, length))

    def truncate(self, offset: int) -> None:
        self.ops.append(api.Truncate(offset))

    def execute(self, cls: str, method: str, data: bytes) -> None:
        self.ops.append(api.Exec(text(cls, "cls"), text(method, "method"), data))

    def writesame(self, to_write: bytes, write_len: int, offset: int = 0) -> None:
        self.ops.append(api.WriteSame(offset, write_len, data_of(to_write, "to_write")))

    def cmpext(self, cmp_buf: bytes, offset: int = 0) -> None:
        """The list fails with ExtendMismatch unless the object holds these bytes."""
        self.ops.append(api.CmpExt(offset, data_of(cmp_buf, "cmp_buf")))

    def omap_cmp(self, key: str, val: str, cmp_op: int = LIBRADOS_CMPXATTR_OP_EQ) -> None:
        """The list fails with ECANCELED unless the key's value compares so."""
        if cmp_op not in COMPARISONS:
            raise errors.rados.InvalidArgumentError(f"comparison {cmp_op}", errno.EINVAL)
        self.ops.append(api.OmapCmp({raw(key, "key"): (raw(val, "val"), COMPARISONS[cmp_op])}))


class WriteOpCtx(WriteOp, OpCtx):
    """A write operation list as a context manager."""


class ReadOp:
    """A list of reads of one object, run by `Ioctx.operate_read_op`."""

    def __init__(self) -> None:
        self.ops: list[api.Op] = []
        self._results: list[OmapIterator | None] = []

    def create(self) -> ReadOp:
        self.release()
        return self

    def release(self) -> None:
        self.ops = []
        self._results = []

    def cmpext(self, cmp_buf: bytes, offset: int = 0) -> None:
        self.add(api.CmpExt(offset, data_of(cmp_buf, "cmp_buf")))

    def set_flags(self, flags: int = LIBRADOS_OPERATION_NOFLAG) -> None:
        """Flags of the last operation, as for WriteOp."""
        if flags & LIBRADOS_OP_FLAG_FAILOK:
            raise errors.rados.OSError("an operation that may fail inside a list is not supported", errno.EOPNOTSUPP)

    def add(self, op: api.Op, result: OmapIterator | None = None) -> None:
        """Appends an operation; `result` is filled when the list has run."""
        self.ops.append(op)
        self._results.append(result)

    def deliver(self, outputs: Sequence[Any]) -> None:
        for op, target, output in zip(self.ops, self._results, outputs, strict=True):
            if target is None:
                continue
            if isinstance(op, api.OmapGetKeys):
                target.fill([(key, None) for key in output[0]])
            elif isinstance(op, api.OmapGetVals):
                target.fill(list(output[0].items()))
            else:
                target.fill(sorted(output.items()))


class ReadOpCtx(ReadOp, OpCtx):
    """A read operation list as a context manager."""


class OmapIterator:
    """(key, value) pairs of an omap read, in key order; there once the read operation has run."""

    def __init__(self, ioctx: Ioctx) -> None:
        self.ioctx = ioctx
        self._rows: Iterator[tuple[bytes, bytes | None]] = iter(())

    def fill(self, rows: list[tuple[bytes, bytes | None]]) -> None:
        self._rows = iter(rows)

    def __iter__(self) -> OmapIterator:
        return self

    def __next__(self) -> tuple[str, bytes | None]:
        key, value = next(self._rows)
        return key.decode(), value


class XattrIterator:
    """(name, value) pairs of an object's extended attributes."""

    def __init__(self, ioctx: Ioctx, oid: str) -> None:
        self.ioctx = ioctx
        self.oid = oid
        with rados_errors(f"Failed to get rados xattrs for object {oid!r}"):
            found: dict[str, bytes] = ioctx.context.read(text(oid, "oid"), [api.GetXattrs()], ioctx.read_snap)[0]
        self._rows = iter(sorted(found.items()))

    def __iter__(self) -> XattrIterator:
        return self

    def __next__(self) -> tuple[str, bytes]:
        return next(self._rows)


class Completion:
    """An asynchronous operation. Callbacks run on a thread of the module; they must not wait for other completions."""

    def __init__(
        self,
        ioctx: Ioctx,
        oncomplete: Callable[..., object] | None = None,
        onsafe: Callable[..., object] | None = None,
    ) -> None:
        self.ioctx = ioctx
        self.oncomplete = oncomplete
        self.onsafe = onsafe
        self._value = 0
        self._complete_event = threading.Event()
        self._called_event = threading.Event()

    def is_safe(self) -> bool:
        return self.is_complete()

    def is_complete(self) -> bool:
        return self._complete_event.is_set()

    def wait_for_safe(self) -> None:
        self.wait_for_complete()

    def wait_for_complete(self) -> None:
        """Waits for the operation, not for its callbacks."""
        self._complete_event.wait()

    def wait_for_safe_and_cb(self) -> int:
        return self.wait_for_complete_and_cb()

    def wait_for_complete_and_cb(self) -> int:
        """Waits for the operation and its callbacks."""
        self._called_event.wait()
        return 0

    def get_return_value(self) -> int:
        """0 or a length on success, -errno on failure; valid once complete."""
        return self._value

    def _complete(self) -> None:
        try:
            if self.oncomplete:
                self.oncomplete(self)
            if self.onsafe:
                self.onsafe(self)
        except Exception:
            log.exception("a completion callback failed")
        finally:
            self._cleanup()

    def _cleanup(self) -> None:
        with self.ioctx.lock:
            for pending in (self.ioctx.complete_completions, self.ioctx.safe_completions):
                if self in pending:
                    pending.remove(self)

    def finish(self, value: int) -> None:
        self._value = value
        self._complete_event.set()
        self._complete()
        self._called_event.set()


class AioQueue:
    """Runs jobs on a few threads of the process; jobs with the same key one after the other, in the order given."""

    def __init__(self, threads: int = AIO_THREADS) -> None:
        self._pool = ControlPool(threads)
        self._lock = threading.Lock()
        self._chains: dict[object, deque[Callable[[], None]]] = {}
        self._here = threading.local()  # .works: on a thread of the queue

    def submit(self, key: object, job: Callable[[], None]) -> None:
        with self._lock:
            chain = self._chains.get(key)
            if chain is not None:
                chain.append(job)
                return
            self._chains[key] = deque([job])
        self._pool.submit(lambda: self._run(key))

    def settle(self, key: object) -> None:
        """Waits for the jobs given so far under this key. At once from a job or its callback: it would wait for
        itself."""
        if key not in self._chains or getattr(self._here, "works", False):
            return
        done = threading.Event()
        self.submit(key, done.set)
        done.wait()

    def _run(self, key: object) -> None:
        self._here.works = True
        while True:
            with self._lock:
                chain = self._chains[key]
                if not chain:
                    del self._chains[key]
                    return
                job = chain.popleft()
            try:
                job()
            except Exception:
                log.exception("an asynchronous operation failed")


def result_of(call: Callable[[], int]) -> int:
    """The call's result, or -errno."""
    try:
        return call()
    except builtins.OSError as failure:
        return -(failure.errno or errno.EIO)
    except errors.rados.Error as failure:
        return -(failure.errno or errno.EIO)
