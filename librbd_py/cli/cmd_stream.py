"""Commands on files and pipes: import, export (a copy, or served over NBD or vhost-user-blk), diffs, merge-diff."""

from __future__ import annotations

import json
import os
import stat
import sys
from contextlib import ExitStack
from typing import Any, BinaryIO

from librbd_py.cli.arguments import CREATE_FORMAT, DEST, IMAGE, SOURCE_SNAP
from librbd_py.cli.cmd_image import check_layout, creation
from librbd_py.cli.failure import Failure, code_of, reason
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, failing, failures
from librbd_py.cli.usage import FEATURE_NOTES

_EXPORT_PATH = "path:export file (or '-' for stdout)"
_MERGED_PATH = "path:path to merged diff (or '-' for stdout)"
_TO = "path-name:export file (or '-' for stdout)"
_FROM = "path-name:import file (or '-' for stdin)"
_SERVE = ("nbd", "vhost-user", "read-only", "queues", "name", "qmp", "pidfile")
EDOM, EBADMSG = 33, 74
STDIN = 0


def _say(session: Session, error: BaseException) -> None:
    """What a stream had, in its own line; errors of images have the command's line alone."""
    from librbd_py.format.streams import BadStream

    text = getattr(error, "strerror", None)
    if isinstance(error, BadStream):
        session.say(f"rbd: {text}")
    elif text and text.endswith(", aborting"):
        session.say(text)


# --- export


@verb(
    "export",
    "Export image to file.",
    *SOURCE_SNAP,
    _EXPORT_PATH,
    "no-progress",
    "export-format",
    spec=("source-image-or-snap-spec", _TO),
    more=(*_SERVE, "resume"),
)
def export(session: Session) -> None:
    spec = session.spec(snap="may")
    if session.option("nbd") or session.option("vhost-user"):
        _serve(session, spec)
        return
    path, version = session.path(), session.option("export-format") or 1
    if version == 2 and spec.snap:
        raise Failure("rbd: export-format 2 does not support snapshots", 22)
    if session.option("resume"):
        _export_again(session, spec, path, version)
        return
    from librbd_py.image import raw, streams

    with session.image(spec, read_only=True, snap=True) as image, failing("export error"):
        with _target(path) as target:
            progress = session.progress("Exporting image")
            with progress, _removed_on_failure(path):
                if version == 2:
                    streams.export_image(image.handle, streams.writer(target.fileno()), progress)
                elif path == "-":
                    raw.export_pipe(image.handle, streams.writer(target.fileno()), progress)
                else:
                    raw.export_raw(image.handle, target.fileno(), progress)


def _export_again(session: Session, spec: Any, path: str, version: int) -> None:
    """Into a file that an export of the same snapshot may have begun. What is there stays when it breaks off again."""
    if version == 2 or path == "-" or not spec.snap:
        raise Failure("rbd: --resume needs a snapshot, export format 1 and a file", 22)
    from librbd_py.image import raw
    from librbd_py.image.resume import Export

    with session.image(spec, read_only=True, snap=True) as image, failing("export error"):
        mark = Export(image.handle, path)
        fd, begin = mark.open()
        try:
            with session.progress("Exporting image") as progress:
                raw.export_raw(image.handle, fd, progress, begin=begin, reached=mark.reached)
                mark.done()
        finally:
            os.close(fd)


@verb(
    "export-diff",
    "Export incremental diff to file.",
    *SOURCE_SNAP,
    _EXPORT_PATH,
    "from-snap",
    "whole-object",
    "no-progress",
    spec=("source-image-or-snap-spec", _TO),
)
def export_diff(session: Session) -> None:
    spec = session.spec(snap="may")
    path = session.path()
    from librbd_py.image import streams

    with session.image(spec, read_only=True, snap=True) as image, failing("export-diff error"):
        with _target(path) as target:
            progress = session.progress("Exporting image")
            with progress, _removed_on_failure(path):
                streams.export_diff(
                    image.handle,
                    session.option("from-snap"),
                    streams.writer(target.fileno()),
                    whole_object=bool(session.option("whole-object")),
                    progress=progress,
                )


class _target:
    """A new file, or standard output."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> BinaryIO:
        if self._path == "-":
            sys.stdout.flush()
            return sys.stdout.buffer
        self._file = open(self._path, "xb", buffering=0)
        return self._file

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


class _removed_on_failure:
    """Half a file must not look like a whole one."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._path != "-":
            os.unlink(self._path)


def _serve(session: Session, spec: Any) -> None:
    given = session.given
    if session.at < len(session.words) or "path" in given:
        raise Failure("rbd: a path is not used with --nbd or --vhost-user", 22)
    read_only = bool(given.get("read-only") or spec.snap)
    node: dict[str, Any] = {"driver": "rbd", "node-name": "image", "pool": session.pool_name(spec), "image": spec.image}
    node |= {"namespace": spec.namespace, "read-only": read_only}
    if spec.snap:
        node["snapshot"] = spec.snap
    argv = ["--blockdev", json.dumps(node)]
    if session.store:
        argv += ["--store", session.store]
    if "nbd" in given:
        argv += ["--nbd-server", json.dumps({"addr": nbd_address(given["nbd"])})]
        served = {"type": "nbd", "id": "nbd", "node-name": "image", "name": given.get("name") or spec.image}
        argv += ["--export", json.dumps(served | {"writable": not read_only})]
    if "vhost-user" in given:
        vhost: dict[str, Any] = {"type": "vhost-user-blk", "id": "vhost-user", "node-name": "image"}
        vhost |= {"addr": {"type": "unix", "path": given["vhost-user"]}, "num-queues": given.get("queues", 1)}
        argv += ["--export", json.dumps(vhost | {"writable": not read_only})]
    for option in ("qmp", "pidfile"):
        if option in given:
            argv += [f"--{option}", given[option]]
    from qemu_glue import daemon  # only here: the other commands need no daemon

    session.close()
    status = daemon.main(argv)
    if status:
        raise Failure("", status)


def nbd_address(text: str) -> dict[str, Any]:
    """A path with a slash is a Unix socket; else HOST:PORT, :PORT or PORT (loopback)."""
    if "/" in text:
        return {"type": "unix", "data": {"path": text}}
    host, _, port = text.rpartition(":")
    return {"type": "inet", "data": {"host": host.strip("[]") or "127.0.0.1", "port": port}}


# --- import


@verb(
    "import",
    "Import image from file.",
    "path",
    *DEST,
    *CREATE_FORMAT,
    "sparse-size",
    "no-progress",
    "export-format",
    "pool:pool name (deprecated)",
    "image:image name (deprecated)",
    spec=(_FROM, "dest-image-spec"),
    notes=FEATURE_NOTES,
    more=("resume",),
)
def import_(session: Session) -> None:
    """Aligned zeros of --sparse-size are not written. Without an image name the file's name is taken."""
    path = session.path()
    for old, new in (("pool", "dest-pool"), ("image", "dest")):
        if old in session.given:
            session.say(f"rbd: --{old} is deprecated for import, use --{new}")
            session.given.setdefault(new, session.given[old])
    if not session.option("dest") and session.at >= len(session.words):
        session.given["dest"] = os.path.basename(path)
    spec = session.spec(dest=True, check="full")
    sparse = session.option("sparse-size")
    chosen = creation(session)
    ioctx = session.ioctx(spec)
    progress = session.progress("Importing image")
    with failing("import failed"):
        try:
            fd = STDIN if path == "-" else _open(session, path)
        except IsADirectoryError:
            progress.failed()
            raise
        try:
            with open(fd, "rb", buffering=1 << 20, closefd=path != "-") as file:
                _import(session, ioctx, spec.image, file, path, chosen, 4096 if sparse is None else sparse, progress)
        except BaseException:
            progress.failed()
            raise
    progress.done()


def _open(session: Session, path: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        session.say(f"rbd: error opening {path}")
        raise
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        session.say("rbd: cannot import a directory")
        raise IsADirectoryError(21, "")
    return fd


def _import(
    session: Session,
    ioctx: Any,
    name: str,
    stream: BinaryIO,
    path: str,
    chosen: dict[str, Any],
    sparse: int,
    progress: Any,
) -> None:
    from librbd_py import rbd
    from librbd_py.format import streams as wire
    from librbd_py.image import raw, streams

    resume = bool(session.option("resume"))
    if resume and (path == "-" or session.option("export-format") == 2):
        raise Failure("rbd: --resume needs export format 1 and a file", 22)
    if resume and _go_on(session, ioctx, name, stream.fileno(), sparse, progress):
        return
    head = None
    size = 0
    source = wire.Reader(stream)
    if session.option("export-format") == 2:
        try:
            head = wire.read_image_head(source, session.say)
        except wire.BadStream as error:
            _say(session, error)
            session.say("rbd: import header failed.")
            raise
        _adopt(chosen, head)
    elif path != "-":
        size = _file_size(stream.fileno())
    try:
        code = check_layout(chosen)
        if code:
            raise OSError(code, "")
        rbd.RBD().create(ioctx, name, size, old_format=False, **chosen)
    except failures():
        session.say("rbd: image creation failed")
        raise
    try:
        with rbd.Image(ioctx, name) as image:
            if head is not None:
                streams.import_metadata(image.handle, head)
                _diffs(session, image, source, sparse, progress)
            elif path == "-":
                raw.import_pipe(image.handle, stream, sparse)
            elif resume:
                from librbd_py.image.resume import Import

                mark = Import(image.handle, stream.fileno(), sparse)
                mark.start()
                raw.import_raw(image.handle, stream.fileno(), size, sparse, progress, reached=mark.reached)
                mark.done()
            else:
                raw.import_raw(image.handle, stream.fileno(), size, sparse, progress)
    except BaseException:
        if resume:
            raise
        if head is not None:
            session.say("rbd: failed to import image")
        _remove(ioctx, name)  # half an image must not look like a whole one
        raise


def _go_on(session: Session, ioctx: Any, name: str, fd: int, sparse: int, progress: Any) -> bool:
    """Finishes an import that was broken off; False: there is no such image yet."""
    from librbd_py import rbd
    from librbd_py.image import raw
    from librbd_py.image.resume import Import

    try:
        image = rbd.Image(ioctx, name)
    except rbd.ImageNotFound:
        return False
    with image:
        mark = Import(image.handle, fd, sparse)
        try:
            begin = mark.go_on()
        except OSError as error:
            session.say(f"rbd: {error.strerror}")
            raise
        raw.import_raw(image.handle, fd, image.size(), sparse, progress, begin=begin, reached=mark.reached)
        mark.done()
    return True


def _diffs(session: Session, image: Any, source: Any, sparse: int, progress: Any) -> None:
    from librbd_py.image import streams

    try:
        streams.import_diffs(image.handle, source, sparse, progress, session.say)
    except failures() as error:
        _say(session, error)
        progress.failed()
        session.say(f"rbd: import-diff failed: {reason(error)}")
        raise


def _remove(ioctx: Any, name: str) -> None:
    from librbd_py import rbd

    with rbd.Image(ioctx, name) as image:
        for snap in list(image.list_snaps()):
            if image.is_protected_snap(snap["name"]):
                image.unprotect_snap(snap["name"])
            image.remove_snap(snap["name"])
    rbd.RBD().remove(ioctx, name)


def _adopt(chosen: dict[str, Any], head: Any) -> None:
    """What the stream says of the layout, where the command line says nothing."""
    from librbd_py.image.streams import importable

    if head.order:
        chosen.setdefault("order", head.order)
    if head.features:
        chosen.setdefault("features", importable(head.features))
    if head.stripe_unit and head.stripe_count:
        chosen.setdefault("stripe_unit", head.stripe_unit)
        chosen.setdefault("stripe_count", head.stripe_count)


def _file_size(fd: int) -> int:
    """Also of a block device, whose stat says 0."""
    size = os.lseek(fd, 0, os.SEEK_END)
    os.lseek(fd, 0, os.SEEK_SET)
    return size


@verb(
    "import-diff",
    "Import an incremental diff.",
    "path",
    *IMAGE,
    "sparse-size",
    "no-progress",
    spec=(_FROM, "image-spec"),
)
def import_diff(session: Session) -> None:
    from librbd_py.format import streams as wire
    from librbd_py.image import streams

    path, spec = session.path(), session.spec()
    sparse = session.option("sparse-size")
    progress = session.progress("Importing image diff")
    with session.image(spec) as image, failing("import-diff failed"):
        fd = STDIN if path == "-" else _open(session, path)
        total = os.fstat(fd).st_size
        begun = False
        with open(fd, "rb", buffering=1 << 20, closefd=path != "-") as file:
            source = wire.Reader(file)

            def went_on() -> None:
                nonlocal begun
                begun = True
                progress(min(source.position, total), total)

            try:
                grain = 4096 if sparse is None else sparse
                streams.import_diff(image.handle, source, sparse=grain, progress=went_on, say=session.say)
            except failures() as error:
                _say(session, error)
                if begun or "banner" not in str(error):
                    progress.failed()
                if code_of(error) == EDOM:
                    raise OSError(EBADMSG, "") from None
                raise
        progress.done()


# --- merge


@verb(
    "merge-diff",
    "Merge two diff exports together.",
    _MERGED_PATH,
    "no-progress",
    spec=(
        "diff1-path:path to first diff (or '-' for stdin)",
        "diff2-path:path to second diff",
        "path-name:path to merged diff (or '-' for stdout)",
    ),
)
def merge_diff(session: Session) -> None:
    first, second = session.word(), session.word()
    for number, path in (("first", first), ("second", second)):
        if not path:
            raise Failure(f"rbd: {number} diff was not specified", 22)
    path = session.path()
    progress = session.progress("Merging image diff")
    try:
        _merge(session, first, second, path, progress)
    except failures() as error:
        progress.failed()
        raise Failure("rbd: merge-diff error", code_of(error)) from None
    progress.done()


def _merge(session: Session, first: str, second: str, path: str, progress: Any) -> None:
    from librbd_py.format.merge_diff import merge
    from librbd_py.format.streams import DIFF_V1, BadBanner, BadStream, Reader
    from librbd_py.image.streams import writer

    one = STDIN if first == "-" else _open(session, first)
    two = _open(session, second)
    with ExitStack() as stack:
        left = stack.enter_context(open(one, "rb", buffering=1 << 20, closefd=first != "-"))
        right = stack.enter_context(open(two, "rb", buffering=1 << 20))
        try:
            out = stack.enter_context(_target(path))
        except OSError:
            session.say(f"rbd: error create {path}")
            raise
        stack.enter_context(_removed_on_failure(path))
        try:
            merge(Reader(left), Reader(right), writer(out.fileno()), progress)
        except BadStream as error:
            if isinstance(error.__cause__, BadBanner):
                found = error.__cause__.found.decode("utf-8", "surrogateescape").partition("\0")[0]
                session.say(f"invalid banner '{found}', expected '{DIFF_V1.decode()}'")
            following = "The first TO" in str(error.strerror)
            session.say(str(error.strerror) if following else f"rbd: {error.strerror}")
            raise
