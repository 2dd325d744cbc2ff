"""Commands on pools and their namespaces."""

from __future__ import annotations

import sys

from librbd_py.cli.arguments import FORMAT, POOL
from librbd_py.cli.failure import Failure, code_of, reason
from librbd_py.cli.output import Rows, Section, Table, size_text
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, Spec, failing, failures

_FORCE = "force:force initialize pool for RBD use if registered by another application"


@verb("namespace create", "Create an RBD image namespace.", *POOL, spec=("pool-spec",))
def namespace_create(session: Session) -> None:
    from librbd_py import rbd

    spec = _namespace(session)
    ioctx = session.ioctx(spec, namespace=False)
    with failing("failed to created namespace"):
        rbd.RBD().namespace_create(ioctx, spec.namespace)


@verb("namespace remove", "Remove an RBD image namespace.", *POOL, spec=("pool-spec",), alias="namespace rm")
def namespace_remove(session: Session) -> None:
    from librbd_py import rbd

    spec = _namespace(session)
    ioctx = session.ioctx(spec, namespace=False)
    try:
        rbd.RBD().namespace_remove(ioctx, spec.namespace)
    except failures() as error:
        code = code_of(error)
        text = {
            16: "rbd: namespace contains images which must be deleted first.",
            2: "rbd: namespace does not exist.",
        }.get(code, f"rbd: failed to remove namespace: {reason(code)}")
        raise Failure(text, code) from None


def _namespace(session: Session) -> Spec:
    spec = session.pool_spec(check=True)
    if not spec.namespace:
        raise Failure("rbd: namespace name was not specified", 22)
    return spec


@verb(
    "namespace list",
    "List RBD image namespaces.",
    "pool",
    *FORMAT,
    spec=("pool-name",),
    alias="namespace ls",
)
def namespace_list(session: Session) -> None:
    from librbd_py import rbd

    spec = session.pool_spec(namespaces=False, check=True)
    session.layout()
    ioctx = session.ioctx(spec)
    with failing("failed to list namespaces"):
        names = sorted(rbd.RBD().namespace_list(ioctx))
    if not session.plain:
        session.show(Rows("namespaces", [Section("namespace", {"name": name}) for name in names]))
    elif names:
        table = Table(("NAME", "left"))
        for name in names:
            table.add(name)
        sys.stdout.write(table.text())


@verb("pool init", "Initialize pool for use by RBD.", "pool", _FORCE, spec=("pool-name",))
def pool_init(session: Session) -> None:
    """On the embedded store the pool is created when it does not exist: nobody else could."""
    from librbd_py import rbd
    from librbd_py.store.rados import RadosStore

    spec = session.pool_spec(namespaces=False, check=True)
    name = session.pool_name(spec)
    if not session.cluster.pool_exists(name) and not isinstance(session.cluster.store, RadosStore):
        with failing("pool init failed"):
            session.cluster.create_pool(name)
        return
    ioctx = session.ioctx(spec)
    with failing("error registered application"):
        try:
            rbd.RBD().pool_init(ioctx, bool(session.option("force")))
        except failures() as error:
            if code_of(error) == 1:
                raise Failure("rbd: pool already registered to a different application.", 1) from None
            raise


@verb(
    "pool stats",
    "Display pool statistics.",
    *POOL,
    *FORMAT,
    spec=("pool-spec",),
    notes="Note: legacy v1 images are not included in stats",
)
def pool_stats(session: Session) -> None:
    from librbd_py import rbd

    spec = session.pool_spec()
    session.layout()
    ioctx = session.ioctx(spec)
    with failing("failed to query pool stats"):
        found = rbd.RBD().pool_stats_get(ioctx)
    if session.plain:
        print(f"Total Images: {found['image_count']}", end="")
        print(f" ({found['trash_count']} in trash)" if found["trash_count"] else "")
        print(f"Total Snapshots: {found['image_snap_count']}", end="")
        print(f" ({found['trash_snap_count']} in trash)" if found["trash_count"] else "")
        print(f"Provisioned Size: {size_text(found['image_provisioned_bytes'])}", end="")
        print(f" ({size_text(found['trash_provisioned_bytes'])} in trash)" if found["trash_count"] else "")
        return
    parts = {}
    for name, prefix in (("images", "image"), ("trash", "trash")):
        numbers = {
            "count": found[f"{prefix}_count"],
            "provisioned_bytes": found[f"{prefix}_provisioned_bytes"],
            "snap_count": found[f"{prefix}_snap_count"],
        }
        parts[name] = Section(name, numbers)
    session.show(Section("stats", parts))
