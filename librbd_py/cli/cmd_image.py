"""Commands that make, name and remove images: create, clone, copy, deep copy, rename, remove."""

from __future__ import annotations

import math
from typing import Any

from librbd_py.cli.arguments import CREATE, CREATE_FORMAT, DEST, IMAGE, SOURCE_IMAGE, SOURCE_SNAP
from librbd_py.cli.failure import Failure, code_of, reason
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, failing, failures
from librbd_py.cli.sizes import FEATURES
from librbd_py.cli.usage import FEATURE_NOTES

SINGLE_CLIENT = FEATURES["exclusive-lock"] | FEATURES["object-map"] | FEATURES["fast-diff"] | FEATURES["journaling"]
DEFAULT_FEATURES = 61


def size_option(session: Session) -> int:
    size = session.option("size")
    if size is None:
        raise Failure("rbd: must specify --size <M/G/T>", 22)
    return int(size)


def creation(session: Session, *, base: int | None = DEFAULT_FEATURES) -> dict[str, Any]:
    """The options of a new image's layout as arguments of RBD.create and RBD.clone. `base`: features from which
    --image-shared takes away when none were given; None: the source's. Failure (22)."""
    given = session.given
    chosen: dict[str, Any] = {}
    if "new-format" in given:
        session.say("rbd: --new-format is deprecated, use --image-format 2")
    if "order" in given:
        session.say("rbd: --order is deprecated, use --object-size")
        chosen["order"] = given["order"]
    elif "object-size" in given:
        # the nearest power of two; what no image can have is refused where images are made
        chosen["order"] = round(math.log2(given["object-size"])) if given["object-size"] else 0
    bits = 0
    for some in given.get("image-feature", ()):
        bits |= some
    if "image-feature" in given:
        chosen["features"] = bits
    if given.get("image-shared"):
        if "image-feature" in given:
            chosen["features"] = bits & ~SINGLE_CLIENT
        elif base is not None:
            chosen["features"] = base & ~SINGLE_CLIENT
    if given.get("image-format") == 1 and "new-format" not in given:
        session.say("rbd: image format 1 is deprecated")
        for name, what in (
            ("image-feature", "features"),
            ("stripe-unit", "non-default striping"),
            ("data-pool", "data pool"),
        ):
            if name in given:
                raise Failure(f"rbd: {what} not allowed with format 1; use --image-format 2", 22)
        chosen["old_format"] = True
    if "stripe-unit" in given or "stripe-count" in given:
        chosen["stripe_unit"] = given.get("stripe-unit", 0)
        chosen["stripe_count"] = given.get("stripe-count", 0)
    if "data-pool" in given:
        chosen["data_pool"] = given["data-pool"]
    return chosen


def check_layout(chosen: dict[str, Any]) -> int:
    """An errno that librbd gives for a layout before it looks at anything else; 0: none. Takes `old_format` out."""
    if chosen.pop("old_format", False):
        return 22
    order = chosen.get("order", 22)
    if not 12 <= order <= 25:
        return 33
    if "stripe_unit" in chosen and bool(chosen["stripe_unit"]) != bool(chosen["stripe_count"]):
        return 22
    return 0


def refuse_layout(chosen: dict[str, Any], what: str) -> None:
    """Failure in librbd's words for options that exclude each other."""
    code = check_layout(chosen)
    if code:
        raise Failure(f"rbd: {what}: {reason(code)}", code)


@verb(
    "create",
    "Create an empty image.",
    *IMAGE,
    *CREATE_FORMAT,
    "thick-provision",
    "size",
    "no-progress",
    spec=("image-spec",),
    notes=FEATURE_NOTES,
)
def create(session: Session) -> None:
    from librbd_py import rbd

    spec = session.spec(check="full")
    chosen, size = creation(session), size_option(session)
    ioctx = session.ioctx(spec)
    refuse_layout(chosen, "create error")
    with failing("create error"):
        rbd.RBD().create(ioctx, spec.image, size, old_format=False, **chosen)
    if session.option("thick-provision"):
        progress = session.progress("Thick provisioning")
        with session.image(spec) as image, progress:
            step = 4 << 20
            for offset in range(0, size, step):
                image.write(b"\0" * min(step, size - offset), offset)
                progress(min(offset + step, size), size)
            image.flush()


@verb(
    "clone",
    "Clone a snapshot into a CoW child image.",
    *SOURCE_SNAP,
    *DEST,
    *CREATE,
    spec=("source-snap-spec", "dest-image-spec"),
    notes=FEATURE_NOTES,
)
def clone(session: Session) -> None:
    from librbd_py import rbd

    source = session.spec(snap="must")
    dest = session.spec(dest=True, check="full")
    chosen = creation(session, base=None)
    source_ioctx, dest_ioctx = session.ioctx(source), session.ioctx(dest)
    if session.option("image-shared") and "features" not in chosen:
        with session.image(source, read_only=True) as image:
            chosen["features"] = image.features() & ~SINGLE_CLIENT
    refuse_layout(chosen, "clone error")
    with failing("clone error"):
        rbd.RBD().clone(source_ioctx, source.image, source.snap, dest_ioctx, dest.image, **chosen)


@verb(
    "copy",
    "Copy src image to dest.",
    *SOURCE_SNAP,
    *DEST,
    *CREATE,
    "sparse-size",
    "no-progress",
    spec=("source-image-or-snap-spec", "dest-image-spec"),
    alias="cp",
    notes=FEATURE_NOTES,
)
def copy(session: Session) -> None:
    _copy(session, "Image copy", "copy failed", "copy")


@verb(
    "deep copy",
    "Deep copy src image to dest.",
    *SOURCE_SNAP,
    *DEST,
    *CREATE,
    "flatten",
    "no-progress",
    spec=("source-image-or-snap-spec", "dest-image-spec"),
    alias="deep cp",
    notes=FEATURE_NOTES,
)
def deep_copy(session: Session) -> None:
    _copy(session, "Image deep copy", "deep copy failed", "deep_copy")


def _copy(session: Session, verb: str, failed: str, method: str) -> None:
    source = session.spec(snap="may")
    dest = session.spec(dest=True, check="full")
    chosen = creation(session, base=None)
    if session.option("flatten"):
        chosen["flatten"] = True
    with session.image(source, read_only=True, snap=True) as image:
        target = session.ioctx(dest)
        if session.option("image-shared") and "features" not in chosen:
            chosen["features"] = image.features() & ~SINGLE_CLIENT
        progress = session.progress(verb)
        with failing(failed), progress:
            code = check_layout(chosen)
            if code:
                raise OSError(code, "")
            if chosen.pop("flatten", False):
                from librbd_py.image.copy import deep_copy
                from librbd_py.image.directory import CreateOptions

                layout = CreateOptions(**chosen)
                deep_copy(image.handle, target.context, dest.image, layout, flatten=True, progress=progress)
            else:
                getattr(image, method)(target, dest.image, on_progress=progress, **chosen)


@verb("remove", "Delete an image.", *IMAGE, "no-progress", spec=("image-spec",), alias="rm")
def remove(session: Session) -> None:
    from librbd_py import rbd

    spec = session.spec()
    ioctx = session.ioctx(spec)
    progress = session.progress("Removing image")
    try:
        with progress:
            rbd.RBD().remove(ioctx, spec.image, on_progress=progress)
    except failures() as error:
        raise Failure(removal_text(session, ioctx, spec.image, error), code_of(error)) from None


def removal_text(session: Session, ioctx: Any, name: str, error: BaseException, image_id: str = "") -> str:
    """Why an image could not be removed, and what to do."""
    from librbd_py import rbd

    code = code_of(error)
    if code == 39:
        linked = _clones_only(ioctx, name) if name else False
        if linked:
            return (
                "rbd: image has snapshots with linked clones - these must be deleted or flattened before the image can "
                "be removed."
            )
        return "rbd: image has snapshots - these must be deleted with 'rbd snap purge' before the image can be removed."
    if code == 16:
        return (
            "rbd: error: image still has watchers\nThis means the image is still open or the client using it crashed. "
            "Try again after closing/unmapping it or waiting 30s for the crashed client to timeout."
        )
    if code == 31:
        text = "rbd: error: image belongs to a group"
        try:
            with rbd.Image(ioctx, name or None, image_id=image_id or None, read_only=True) as image:
                group = image.group()
            pool = session.cluster.pool_reverse_lookup(group["pool"])
            namespace = group.get("namespace", "")
            text += f" {pool}/" + (f"{namespace}/" if namespace else "") + group["name"]
        except failures():
            pass
        return text + "\nRemove the image from the group and try again."
    return f"rbd: delete error: {reason(error)}"


def _clones_only(ioctx: Any, name: str) -> bool:
    """Are all of its snapshots in the trash, because clones still need them?"""
    from librbd_py import rbd

    try:
        with rbd.Image(ioctx, name, read_only=True) as image:
            kinds = [snap["namespace"] for snap in image.list_snaps()]
    except failures():
        return False
    return bool(kinds) and all(kind == rbd.RBD_SNAP_NAMESPACE_TYPE_TRASH for kind in kinds)


@verb(
    "rename",
    "Rename image within pool.",
    *SOURCE_IMAGE,
    *DEST,
    spec=("source-image-spec", "dest-image-spec"),
    alias="mv",
)
def rename(session: Session) -> None:
    from librbd_py import rbd

    source = session.spec()
    dest = session.spec(dest=True, check="full")
    # a pool or namespace that was not said is the source's
    dest = dest._replace(pool=dest.pool or source.pool, namespace=dest.namespace or source.namespace)
    if dest.pool != source.pool:
        text = f"rbd: mv/rename across pools not supported\nsource pool: {source.pool} dest pool: {dest.pool}"
        raise Failure(text, 22)
    if dest.namespace != source.namespace:
        raise Failure(
            "rbd: mv/rename across namespaces not supported\n"
            f"source namespace: {source.namespace} dest namespace: {dest.namespace}",
            22,
        )
    with failing("rename error"):
        rbd.RBD().rename(session.ioctx(source), source.image, dest.image)
