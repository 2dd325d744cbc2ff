"""`rbdpy source`: images from what Ceph's source specs name, in one go and with their snapshots."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from librbd_py import store as stores
from librbd_py.cli.output import Rows, Section, Table, size_text
from librbd_py.cli.registry import command, with_format, with_image, with_progress
from librbd_py.cli.session import Failure, Session, code_of, failures
from librbd_py.cli.sizes import byte_count
from librbd_py.image.directory import CreateOptions
from librbd_py.image.import_source import import_source
from librbd_py.image.native_source import open_any
from librbd_py.source import Source, load_spec
from librbd_py.source.spec import MAX_SPEC


def with_spec(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source-spec", help="source-spec, as JSON")
    parser.add_argument("--source-spec-path", help="file with the source-spec: others see a command line")


def with_creation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--object-size", type=byte_count, help="object size of the new image [4K <= size <= 32M]")
    parser.add_argument("--data-pool", help="data pool of the new image")


@contextmanager
def _failing(what: str) -> Iterator[None]:
    try:
        yield
    except failures() as error:
        words = getattr(error, "strerror", None) or str(error)
        if isinstance(error, OSError) and error.filename:
            words = f"{error.filename}: {words}"
        raise Failure(f"rbd: {what}: {words}", code_of(error)) from None


@contextmanager
def _source(session: Session) -> Iterator[Source]:
    options = session.options
    if bool(options.source_spec) == bool(options.source_spec_path):
        raise Failure("rbd: either --source-spec or --source-spec-path is needed", 22)
    with _failing("the source cannot be opened"), stores.connect(session.store) as store:
        text = options.source_spec
        if text is None:
            with Path(options.source_spec_path).open(encoding="utf-8", errors="replace") as file:
                text = file.read(MAX_SPEC + 1)
        source = open_any(load_spec(text), store, import_only=False)
        try:
            yield source
        finally:
            source.close()


@command("source info", "Show the size and the snapshots of what a source-spec names.", with_spec, with_format)
def info(session: Session) -> None:
    with _source(session) as source:
        size, snaps = source.size, list(source.snapshots)
    if not session.plain:
        rows = Rows("snapshots", [Section("snapshot", {"name": snap.name, "size": snap.size}) for snap in snaps])
        session.show(Section("source", {"size": size, "snapshots": rows}))
        return
    print(f"size {size_text(size)} ({size} bytes)")
    if snaps:
        table = Table(("SNAPSHOT", "left"), ("SIZE", "right"))
        for snap in snaps:
            table.add(snap.name, size_text(snap.size))
        print(table.text(), end="")


@command(
    "source import", "Make a new image of what a source-spec names, with its snapshots.",
    with_image, with_spec, with_creation, with_progress,
    specs=("image-spec",),
)  # fmt: skip
def import_(session: Session) -> None:
    given = session.options
    order = None
    if given.object_size is not None:
        order = given.object_size.bit_length() - 1
        if given.object_size != 1 << order:
            raise Failure("rbd: the object size must be a power of two", 22)
    spec = session.spec(check="full")
    ctx = session.context(spec)
    with _source(session) as source, session.progress("Importing image") as progress, _failing("import failed"):
        import_source(source, ctx, spec.image, CreateOptions(order=order, data_pool=given.data_pool), progress)
