"""`rbdpy store copy`: carries images from one store to another, say from a folder to a Ceph cluster, and back."""

from __future__ import annotations

from librbd_py import store
from librbd_py.cli.registry import command, with_progress
from librbd_py.cli.session import Failure, Session, code_of
from librbd_py.format.names import parse_image_spec
from librbd_py.image.transfer import Transfer


@command(
    "store copy",
    "Copy images with snapshots, clones and metadata to another store, and compare both sides.",
    with_progress,
    specs=("source-store", "dest-store", "pool[/[namespace/]image]"),
)
def copy(session: Session) -> None:
    """Without a pool: all pools. Images that a whole pool already has there stay as they are."""
    words = session.options.specs
    if len(words) < 2:
        raise Failure("rbd: store copy: a source store and a destination store are needed", 22)
    what = words[2] if len(words) > 2 else ""
    try:
        spec = parse_image_spec(what) if "/" in what else None
        if spec is not None and spec.snap:
            raise ValueError("an image is copied with all its snapshots: name none")
    except ValueError as error:
        raise Failure(f"rbd: store copy: {error}", 22) from None
    try:
        with store.connect(words[0]) as source, store.connect(words[1]) as dest:
            progress = session.progress("Copying")
            transfer = Transfer(source, dest, progress)
            with progress:
                if spec is not None:
                    transfer.image(source.open(spec.pool or "", spec.namespace or ""), spec.image)
                elif what:
                    transfer.pool(what)
                else:
                    transfer.everything()
    except OSError as error:
        raise Failure(f"rbd: store copy: {error.strerror or error}", code_of(error)) from None
    for row in transfer.copied:
        where = "/".join(part for part in (row.pool, row.namespace, row.name) if part)
        print(f"{where}: copied and compared{' (under a new id)' if row.new_id else ''}")
    if not transfer.copied:
        print("nothing to copy")
