"""What every command works with: options, the connection, pools, images, and the one way to end with an error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from librbd_py import rados, rbd
from librbd_py.cli.output import Progress, Rows, Section, structured

DEFAULT_POOL = "rbd"


class Failure(Exception):
    """Ends the command: `text` goes to standard error, `code` (a positive errno) is the exit status."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def code_of(error: BaseException) -> int:
    """Exit status for a failure: its errno, EIO when it has none."""
    return getattr(error, "errno", None) or 5


def reason(error: BaseException) -> str:
    """`(2) No such file or directory`, as Ceph writes an errno."""
    return f"({code_of(error)}) {os.strerror(code_of(error))}"


@dataclass(frozen=True)
class Spec:
    """[pool/[namespace/]]image[@snap] after options were merged in. Empty string = not given."""

    pool: str
    namespace: str
    image: str
    snap: str

    def text(self) -> str:
        where = self.pool + "/" + (self.namespace + "/" if self.namespace else "")
        return where + self.image + ("@" + self.snap if self.snap else "")


def parse_spec(text: str, snap_allowed: bool = True) -> Spec:
    """Failure (22) for a malformed one."""
    base, at, snap = text.partition("@")
    parts = base.split("/")
    if len(parts) > 3 or (at and (not snap or not snap_allowed or "@" in snap or "/" in snap)) or not parts[-1]:
        raise Failure(f"rbd: invalid spec '{text}'", 22)
    pool = parts[0] if len(parts) > 1 else ""
    namespace = parts[1] if len(parts) == 3 else ""
    return Spec(pool, namespace, parts[-1], snap)


class Session:
    """One run of the command. The connection is made at first use and closed at the end."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._cluster: rados.Rados | None = None

    @property
    def cluster(self) -> rados.Rados:
        if self._cluster is None:
            conf = {"rbdpy_store": self.options.store} if self.options.store else None
            self._cluster = rados.Rados(conf=conf)
            try:
                self._cluster.connect()
            except (OSError, rados.Error) as error:
                self._cluster = None
                raise Failure(f"rbd: couldn't connect to the store: {error}", code_of(error)) from None
        return self._cluster

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.shutdown()
            self._cluster = None

    # --- what the words mean

    def spec(self, position: int = 0, *, prefix: str = "", snap: str = "no", need_image: bool = True) -> Spec:
        """The image named by the `position`-th positional spec or by --<prefix>pool, --<prefix>image, --<prefix>snap.
        `snap`: "no", "may", "must"."""
        options = self.options
        given = options.specs[position] if position < len(options.specs) else None
        parsed = parse_spec(given) if given else Spec("", "", "", "")
        image_option = getattr(options, "dest" if prefix else "image", None) or ""
        namespace = getattr(options, f"{prefix}namespace", None) or ""
        result = Spec(
            parsed.pool or getattr(options, f"{prefix}pool", None) or DEFAULT_POOL,
            parsed.namespace or namespace,
            parsed.image or image_option,
            parsed.snap or (getattr(options, f"{prefix}snap", None) or ""),
        )
        if need_image and not result.image:
            which = "destination " if prefix else ""
            raise Failure(f"rbd: {which}image name was not specified", 22)
        if snap == "must" and not result.snap:
            raise Failure(f"rbd: {'destination ' if prefix else ''}snapshot name was not specified", 22)
        if snap == "no" and result.snap:
            raise Failure(f"rbd: snapname specified for a command that doesn't use it: '{result.snap}'", 22)
        return result

    def ioctx(self, spec: Spec) -> rados.Ioctx:
        try:
            ioctx = self.cluster.open_ioctx(spec.pool)
        except rados.ObjectNotFound as error:
            raise Failure(f"rbd: error opening pool '{spec.pool}': {reason(error)}", 2) from None
        if spec.namespace:
            if not self._namespace_exists(ioctx, spec.namespace):
                raise Failure(f"rbd: namespace '{spec.namespace}' does not exist.", 2)
            ioctx.set_namespace(spec.namespace)
        return ioctx

    def _namespace_exists(self, ioctx: rados.Ioctx, namespace: str) -> bool:
        with failing(f"error verifying namespace '{namespace}'"):
            try:
                return rbd.RBD().namespace_exists(ioctx, namespace)
            except rbd.PermissionError:
                return True  # a user confined to a namespace may not ask which there are

    @contextmanager
    def image(self, spec: Spec, *, read_only: bool = False, snap: bool = True) -> Iterator[Any]:
        """Opens an image (at its snapshot when `snap`); a failure to open ends the command as `rbd` says it."""
        ioctx = self.ioctx(spec)
        image_id = getattr(self.options, "image_id", None)
        at = spec.snap if snap and spec.snap else None
        try:
            if image_id and not spec.image:
                image = rbd.Image(ioctx, image_id=image_id, snapshot=at, read_only=read_only)
            else:
                image = rbd.Image(ioctx, spec.image, snapshot=at, read_only=read_only)
        except rbd.Error as error:
            what = f"image {spec.image or image_id}"
            raise Failure(f"rbd: error opening {what}: {reason(error)}", code_of(error)) from None
        try:
            yield image
        finally:
            image.close()

    # --- output

    def progress(self, verb: str) -> Progress:
        return Progress(verb, not getattr(self.options, "no_progress", False))

    @property
    def plain(self) -> bool:
        return str(self.options.format) == "plain"

    def show(self, value: Section | Rows) -> None:
        text = structured(value, self.options.format, self.options.pretty_format)
        sys.stdout.write(text)


@contextmanager
def failing(what: str) -> Iterator[None]:
    """Turns an error of the library into `rbd: <what>: (errno) text` with that exit status."""
    try:
        yield
    except (rbd.Error, rados.Error, OSError) as error:
        raise Failure(f"rbd: {what}: {reason(error)}", code_of(error)) from None
