"""Commands that change an image as it stands: resize, flatten, sparsify, object-map."""

from __future__ import annotations

from librbd_py.cli.arguments import IMAGE, SNAP
from librbd_py.cli.cmd_image import size_option
from librbd_py.cli.failure import Failure
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, failing


@verb(
    "resize",
    "Resize (expand or shrink) image.",
    *IMAGE,
    "size",
    "allow-shrink",
    "no-progress",
    spec=("image-spec",),
)
def resize(session: Session) -> None:
    spec, size = session.spec(), size_option(session)
    shrink = bool(session.option("allow-shrink"))
    with session.image(spec) as image:
        now = image.size()
        if size == now:
            raise Failure("rbd: new size is equal to original size ", 22)
        if size < now and not shrink:
            raise Failure("rbd: shrinking an image is only allowed with the --allow-shrink flag", 22)
        with failing("resize error"), session.progress("Resizing image") as progress:
            image.resize(size, allow_shrink=shrink, on_progress=progress)


@verb("flatten", "Fill clone with parent data (make it independent).", *IMAGE, "no-progress", spec=("image-spec",))
def flatten(session: Session) -> None:
    with session.image(session.spec()) as image, failing("flatten error"):
        with session.progress("Image flatten") as progress:
            image.flatten(on_progress=progress)


@verb(
    "sparsify",
    "Reclaim space for zeroed image extents.",
    *IMAGE,
    "no-progress",
    "sparse-size",
    spec=("image-spec",),
)
def sparsify(session: Session) -> None:
    spec, size = session.spec(), session.option("sparse-size")
    with session.image(spec) as image, failing("sparsify error"):
        with session.progress("Image sparsify"):
            image.sparsify(4096 if size is None else size)


@verb(
    "object-map rebuild",
    "Rebuild an invalid object map.",
    *SNAP,
    "no-progress",
    spec=("image-or-snap-spec",),
)
def object_map_rebuild(session: Session) -> None:
    spec = session.spec(snap="may")
    with session.image(spec, snap=True) as image, failing("rebuilding object map failed"):
        with session.progress("Object Map Rebuild") as progress:
            image.rebuild_object_map(progress)


@verb(
    "object-map check",
    "Verify the object map is correct.",
    *SNAP,
    "no-progress",
    spec=("image-or-snap-spec",),
)
def object_map_check(session: Session) -> None:
    """What it finds wrong makes the map invalid, as `info` then shows; `rebuild` mends it."""
    from librbd_py.image.map_check import check

    spec = session.spec(snap="may")
    with session.image(spec, read_only=False, snap=True) as image, failing("checking object map failed"):
        with session.progress("Object Map Check") as progress:
            check(image.handle, progress)
