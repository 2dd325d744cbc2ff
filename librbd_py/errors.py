"""The exception classes of Ceph's `rbd` and `rados` modules, and the one way from an errno to them.

Below the public faces every failure is a plain `OSError` with an errno. `rbd.py` and `rados.py` turn it into these
classes with `rbd_error` and `rados_error`; the sentence and the errno are kept and the cause is chained.

The two trees share names (`PermissionError`, `IOError`...), so each lives in a class used as a namespace: the class a
user catches as `rbd.ImageNotFound` is `errors.rbd.ImageNotFound` here. As in Ceph's modules, neither tree descends
from Python's own `OSError`.
"""

from __future__ import annotations

import builtins
import errno as _errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

MAX_ERRNO = 4095  # a compare-and-write answers MAX_ERRNO + offset of the first difference


class OutcomeUnknown(builtins.OSError):
    """A change was sent and the answer never came: it may have happened or not. Look before repeating it.

    Usable on every level: the classes of the same name in both trees descend from it too.
    """


class _Formatted(Exception):
    """Common to both trees: message and errno as Ceph's modules keep and print them."""

    errno: Any = None  # an int; None only for what was raised without one
    _prefix = ""  # the sentence around the caller's message

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(f"{self._prefix} ({message})" if self._prefix else message)
        self.message = message
        self.errno = errno

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else ""
        return text if self.errno is None else f"[errno {self.errno}] {text}"

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.message, self.errno))


class rbd:
    """Ceph's `rbd` exception tree."""

    class Error(Exception):
        pass

    class OSError(_Formatted, Error):
        """The base of everything with an errno; itself used for errnos without a class."""

    class PermissionError(OSError):
        _prefix = "RBD permission error"

    class ImageNotFound(OSError):
        _prefix = "RBD image not found"

    class ObjectNotFound(OSError):
        _prefix = "RBD object not found"

    class ImageExists(OSError):
        _prefix = "RBD image already exists"

    class ObjectExists(OSError):
        _prefix = "RBD object already exists"

    class IOError(OSError):
        _prefix = "RBD I/O error"

    class NoSpace(OSError):
        _prefix = "RBD insufficient space available"

    class IncompleteWriteError(OSError):
        _prefix = "RBD incomplete write"

    class InvalidArgument(OSError):
        _prefix = "RBD invalid argument"

    class LogicError(OSError):
        _prefix = "RBD logic error"

    class ReadOnlyImage(OSError):
        _prefix = "RBD read-only image"

    class ImageBusy(OSError):
        _prefix = "RBD image is busy"

    class ImageHasSnapshots(OSError):
        _prefix = "RBD image has snapshots"

    class FunctionNotSupported(OSError):
        _prefix = "RBD function not supported"

    class ArgumentOutOfRange(OSError):
        _prefix = "RBD arguments out of range"

    class ConnectionShutdown(OSError):
        _prefix = "RBD connection was shutdown"

    class Timeout(OSError):
        _prefix = "RBD operation timeout"

    class DiskQuotaExceeded(OSError):
        _prefix = "RBD disk quota exceeded"

    class OperationNotSupported(OSError):
        _prefix = "RBD operation not supported"

    class OperationCanceled(OSError):
        _prefix = "RBD operation canceled"

    class OutcomeUnknown(OSError, OutcomeUnknown):
        """Not in Ceph's module: see `errors.OutcomeUnknown`."""

        _prefix = "RBD outcome unknown"


class rados:
    """Ceph's `rados` exception tree."""

    class Error(_Formatted):
        """The base class of all rados exceptions."""

    class OSError(Error):
        """Errors that come from the store; itself used for errnos without a class."""

    class InvalidArgumentError(Error):
        _prefix = "RADOS invalid argument"

    class ExtendMismatch(Error):
        """A comparison failed at `offset`."""

        _prefix = "object content does not match"

        def __init__(self, message: str, errno: int, offset: int) -> None:
            super().__init__(message, errno)
            self.offset = offset

        def __reduce__(self) -> tuple[object, ...]:
            return (type(self), (self.message, self.errno, self.offset))

    class InterruptedOrTimeoutError(OSError):
        _prefix = "RADOS interrupted or timeout"

    class PermissionError(OSError):
        _prefix = "RADOS permission error"

    class PermissionDeniedError(OSError):
        _prefix = "RADOS permission denied"

    class ObjectNotFound(OSError):
        _prefix = "RADOS object not found"

    class NoData(OSError):
        _prefix = "RADOS no data"

    class ObjectExists(OSError):
        _prefix = "RADOS object exists"

    class ObjectBusy(OSError):
        _prefix = "RADOS object busy"

    class IOError(OSError):
        _prefix = "RADOS I/O error"

    class NoSpace(OSError):
        _prefix = "RADOS no space"

    class NotConnected(OSError):
        _prefix = "RADOS not connected"

    class RadosStateError(Error):
        _prefix = "RADOS rados state"

    class IoctxStateError(Error):
        _prefix = "RADOS Ioctx state error"

    class ObjectStateError(Error):
        _prefix = "RADOS object state error"

    class LogicError(Error):
        _prefix = "RADOS logic error"

    class TimedOut(OSError):
        _prefix = "RADOS timed out"

    class InProgress(Error):
        _prefix = "RADOS in progress error"

    class IsConnected(Error):
        _prefix = "RADOS is connected error"

    class ConnectionShutdown(OSError):
        _prefix = "RADOS connection was shutdown"

    class OutcomeUnknown(OSError, OutcomeUnknown):
        """Not in Ceph's module: see `errors.OutcomeUnknown`."""

        _prefix = "RADOS outcome unknown"


RBD_CLASSES: dict[int, type[rbd.OSError]] = {
    _errno.EPERM: rbd.PermissionError,
    _errno.ENOENT: rbd.ImageNotFound,
    _errno.EIO: rbd.IOError,
    _errno.ENOSPC: rbd.NoSpace,
    _errno.EEXIST: rbd.ImageExists,
    _errno.EINVAL: rbd.InvalidArgument,
    _errno.EROFS: rbd.ReadOnlyImage,
    _errno.EBUSY: rbd.ImageBusy,
    _errno.ENOTEMPTY: rbd.ImageHasSnapshots,
    _errno.ENOSYS: rbd.FunctionNotSupported,
    _errno.EDOM: rbd.ArgumentOutOfRange,
    _errno.ESHUTDOWN: rbd.ConnectionShutdown,
    _errno.ETIMEDOUT: rbd.Timeout,
    _errno.EDQUOT: rbd.DiskQuotaExceeded,
    _errno.EOPNOTSUPP: rbd.OperationNotSupported,
    _errno.ECANCELED: rbd.OperationCanceled,
}

# For calls about groups, pools and namespaces "not found" is not an image.
RBD_OBJECT_CLASSES: dict[int, type[rbd.OSError]] = RBD_CLASSES | {
    _errno.ENOENT: rbd.ObjectNotFound,
    _errno.EEXIST: rbd.ObjectExists,
}

RADOS_CLASSES: dict[int, type[rados.Error]] = {
    _errno.EPERM: rados.PermissionError,
    _errno.ENOENT: rados.ObjectNotFound,
    _errno.EIO: rados.IOError,
    _errno.ENOSPC: rados.NoSpace,
    _errno.EEXIST: rados.ObjectExists,
    _errno.EBUSY: rados.ObjectBusy,
    _errno.ENODATA: rados.NoData,
    _errno.EINTR: rados.InterruptedOrTimeoutError,
    _errno.ETIMEDOUT: rados.TimedOut,
    _errno.EACCES: rados.PermissionDeniedError,
    _errno.EINPROGRESS: rados.InProgress,
    _errno.EISCONN: rados.IsConnected,
    _errno.EINVAL: rados.InvalidArgumentError,
    _errno.ENOTCONN: rados.NotConnected,
    _errno.ESHUTDOWN: rados.ConnectionShutdown,
}


def rbd_class(code: int) -> type[rbd.OSError]:
    """The class Ceph's `rbd` module raises for an errno (positive or negative)."""
    return RBD_CLASSES.get(abs(code), rbd.OSError)


def rbd_object_class(code: int) -> type[rbd.OSError]:
    """The same for calls about groups and namespaces."""
    return RBD_OBJECT_CLASSES.get(abs(code), rbd.OSError)


def rados_class(code: int) -> type[rados.Error]:
    """The class Ceph's `rados` module raises for an errno (positive or negative)."""
    if abs(code) > MAX_ERRNO:
        return rados.ExtendMismatch
    return RADOS_CLASSES.get(abs(code), rados.OSError)


def rbd_error(failure: builtins.OSError, what: str = "", *, objects: bool = False) -> rbd.OSError:
    """An `OSError` from below as the exception of the `rbd` face. `what` says what was being done."""
    code = failure.errno or _errno.EIO
    message = _message(failure, code, what)
    if isinstance(failure, OutcomeUnknown):
        return rbd.OutcomeUnknown(message, code)
    return (rbd_object_class(code) if objects else rbd_class(code))(message, code)


def rados_error(failure: builtins.OSError, what: str = "") -> rados.Error:
    """An `OSError` from below as the exception of the `rados` face."""
    code = failure.errno or _errno.EIO
    message = _message(failure, code, what)
    if isinstance(failure, OutcomeUnknown):
        return rados.OutcomeUnknown(message, code)
    if code > MAX_ERRNO:
        return rados.ExtendMismatch(message, code, code - MAX_ERRNO)
    return rados_class(code)(message, code)


@contextmanager
def rbd_errors(what: str = "", *, objects: bool = False) -> Iterator[None]:
    """Raises every `OSError` of the block as a class of the `rbd` tree, chained to its cause."""
    try:
        yield
    except builtins.OSError as failure:
        if isinstance(failure, rbd.Error):
            raise
        raise rbd_error(failure, what, objects=objects) from failure


@contextmanager
def rados_errors(what: str = "") -> Iterator[None]:
    """Raises every `OSError` of the block as a class of the `rados` tree, chained to its cause."""
    try:
        yield
    except builtins.OSError as failure:
        if isinstance(failure, rados.Error):
            raise
        raise rados_error(failure, what) from failure


def _message(failure: builtins.OSError, code: int, what: str) -> str:
    detail = failure.strerror or (os.strerror(code) if code <= MAX_ERRNO else "data differs")
    return f"{what}: {detail}" if what else detail
