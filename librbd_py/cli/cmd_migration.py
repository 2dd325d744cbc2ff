"""`rbdpy migration ...`: prepare, execute, commit, abort, and what `rbd` has no command for, status."""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING, Any

from librbd_py.cli.arguments import CREATE_FORMAT, DEST, FORMAT, IMAGE, SOURCE_SNAP
from librbd_py.cli.cmd_image import SINGLE_CLIENT, check_layout, creation
from librbd_py.cli.failure import Failure, code_of, reason
from librbd_py.cli.output import Section
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, Spec, failing, failures
from librbd_py.cli.usage import FEATURE_NOTES

if TYPE_CHECKING:
    from librbd_py import rados

STATES = ("error", "preparing", "prepared", "executing", "executed")
MOST_SPEC = 4095  # bytes of a source spec that rbd reads from a file


@verb(
    "migration prepare",
    "Prepare image migration.",
    "import-only",
    "source-spec-path",
    "source-spec",
    *SOURCE_SNAP,
    *DEST,
    *CREATE_FORMAT,
    "flatten",
    spec=("source-image-or-snap-spec", "dest-image-spec"),
    notes=FEATURE_NOTES,
)
def prepare(session: Session) -> None:
    """With a source spec the only image that is named is the destination, and it is named as the source is: so does
    rbd."""
    only = bool(session.option("import-only"))
    source = session.spec(snap="may" if only else "no")
    dest = session.spec(dest=True, need=False, check="full")
    spec = _source_spec(session)
    ioctx = session.ioctx(source)
    dest_ioctx = ioctx if spec else session.ioctx(dest)
    if only and not spec:
        spec, source = _of_snapshot(ioctx, source, dest)
        ioctx = dest_ioctx
    elif spec and not only:
        raise Failure("rbd: --import-only must be used in combination with source-spec/source-spec-path", 22)
    if source.snap:
        raise Failure("rbd: snapshot name specified for a command that doesn't use it", 22)
    chosen = creation(session, base=None)
    what = "preparing import migration failed" if spec else "preparing migration failed"
    code = check_layout(chosen)
    with failing(what):
        if code:
            raise OSError(code, "")
        _prepare(session, ioctx, source, dest_ioctx, dest, spec, chosen)


def _prepare(
    session: Session,
    ioctx: rados.Ioctx,
    source: Spec,
    dest_ioctx: rados.Ioctx,
    dest: Spec,
    spec: str,
    chosen: dict[str, Any],
) -> None:
    from librbd_py import rbd

    if spec:
        rbd.RBD().migration_prepare_import(spec, ioctx, source.image, **chosen)
        return
    if session.option("image-shared") and "features" not in chosen:
        with rbd.Image(ioctx, source.image, read_only=True) as image:
            chosen["features"] = image.features() & ~SINGLE_CLIENT
    flatten = bool(session.option("flatten"))
    rbd.RBD().migration_prepare(ioctx, source.image, dest_ioctx, dest.image or source.image, flatten=flatten, **chosen)


def _source_spec(session: Session) -> str:
    """Failure (22, or why the file cannot be read)."""
    path, spec = session.option("source-spec-path"), session.option("source-spec")
    if path is not None and spec is not None:
        raise Failure("rbd: cannot specify both source-spec and source-spec-path", 22)
    if path is None:
        return str(spec or "")
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MOST_SPEC)
        else:
            with open(path, "rb") as file:
                data = file.read(MOST_SPEC)
    except OSError as error:
        raise Failure(f"rbd: error opening {path}", code_of(error)) from None
    return data.decode(errors="surrogateescape")


def _of_snapshot(ioctx: rados.Ioctx, source: Spec, dest: Spec) -> tuple[str, Spec]:
    import json

    if not source.snap:
        raise Failure("rbd: snapshot name was not specified", 22)
    if not dest.image:
        raise Failure("rbd: destination image name must be provided", 22)
    rows = {
        "type": "native",
        "pool_id": ioctx.get_pool_id(),
        "pool_namespace": source.namespace,
        "image_name": source.image,
        "snap_name": source.snap,
    }
    return json.dumps(rows, separators=(",", ":")), dest


@verb("migration execute", "Execute image migration.", *IMAGE, "no-progress", spec=("image-spec",))
def execute(session: Session) -> None:
    from librbd_py import rbd

    spec = session.spec()
    ioctx = session.ioctx(spec)
    with failing("migration failed"), session.progress("Image migration") as progress:
        rbd.RBD().migration_execute(ioctx, spec.image, progress)


@verb("migration abort", "Cancel interrupted image migration.", *IMAGE, "no-progress", spec=("image-spec",))
def abort(session: Session) -> None:
    from librbd_py import rbd

    spec = session.spec()
    ioctx = session.ioctx(spec)
    with failing("aborting migration failed"), session.progress("Abort image migration") as progress:
        rbd.RBD().migration_abort(ioctx, spec.image, progress)


@verb("migration commit", "Commit image migration.", *IMAGE, "no-progress", "force", spec=("image-spec",))
def commit(session: Session) -> None:
    from librbd_py import rbd

    spec = session.spec()
    ioctx = session.ioctx(spec)
    with failing("getting migration status failed"):
        status = rbd.RBD().migration_status(ioctx, spec.image)
    _require_no_descendants(session, status)
    with failing("committing migration failed"), session.progress("Commit image migration") as progress:
        rbd.RBD().migration_commit(ioctx, spec.image, progress)


def _require_no_descendants(session: Session, status: dict[str, Any]) -> None:
    """Failure (16): the image has clones, which may be open read-only and would not notice, and no --force."""
    pool = session.cluster.pool_reverse_lookup(status["dest_pool_id"])
    where = Spec(pool or "", status["dest_pool_namespace"], "")
    with session.image(where, read_only=True, image_id=status["dest_image_id"]) as image:
        children = list(image.list_descendants())
    if not children:
        return
    session.say(f"rbd: the image has {'a descendant' if len(children) == 1 else 'descendants'}: ")
    for child in children:
        space = child["pool_namespace"] + "/" if child["pool_namespace"] else ""
        trash = f" (trash {child['id']})" if child["trash"] else ""
        session.say(f"  {child['pool']}/{space}{child['image']}{trash}")
    session.say("Warning: in-use, read-only descendant images will not detect the parent update.")
    if not session.option("force"):
        text = "Ensure no descendant images are opened read-only and run again with force flag."
        raise Failure(text, errno.EBUSY)
    session.say("Proceeding anyway due to force flag set.")


@verb("migration status", "Show status of an image migration.", *IMAGE, *FORMAT, spec=("image-spec",), shown=False)
def status(session: Session) -> None:
    """rbd shows some of it with `rbd status`."""
    from librbd_py import rbd

    spec = session.spec()
    session.layout()
    ioctx = session.ioctx(spec)
    try:
        found = rbd.RBD().migration_status(ioctx, spec.image)
    except failures() as error:
        raise Failure(f"rbd: getting migration status failed: {reason(error)}", code_of(error)) from None
    state = STATES[found["state"]] if 0 <= found["state"] < len(STATES) else "unknown"
    rows = {**found, "state": state}
    if not session.plain:
        session.show(Section("migration", rows))
        return
    described = f" ({rows['state_description']})" if rows["state_description"] else ""
    for side in ("source", "dest"):
        pool, space = rows[f"{side}_pool_id"], rows[f"{side}_pool_namespace"]
        name, image_id = rows[f"{side}_image_name"], rows[f"{side}_image_id"]
        if pool == -1:
            continue
        where = f"{session.cluster.pool_reverse_lookup(pool)}" + (f"/{space}" if space else "")
        print(f"{side}: {where}/{name} ({image_id})")
    print(f"state: {state}{described}")
