"""Commands on what belongs to an image: image-meta, feature, lock, object-map; and namespace, pool."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from librbd_py import rbd
from librbd_py.cli import sizes
from librbd_py.cli.cmd_image import pool_spec
from librbd_py.cli.output import Rows, Section, Table, size_text
from librbd_py.cli.registry import command, with_format, with_image, with_pool, with_progress, with_snap
from librbd_py.cli.session import Failure, Session, Spec, code_of, failing, reason

# --- image-meta


def word(session: Session, position: int, name: str) -> str:
    """A positional argument behind the image spec. With --image the spec itself is left out."""
    words = session.options.specs
    at = position - 1 if session.options.image else position
    if at >= len(words):
        raise Failure(f"rbd: {name} was not specified", 22)
    return str(words[at])


@command(
    "image-meta list",
    "Image metadata list keys with values.",
    with_image,
    with_format,
    specs=("image-spec",),
    aliases=("image-meta ls",),
)
def meta_list(session: Session) -> None:
    with session.image(session.spec(), read_only=True) as image, failing("listing metadata failed"):
        found = dict(sorted(image.metadata_list()))
    if not session.plain:
        session.show(Section("metadatas", found))
        return
    if not found:
        print("There are 0 metadata on this image.")
        return
    count = len(found)
    print(f"There {'is' if count == 1 else 'are'} {count} metadata on this image:\n")
    table = Table(("Key", "left"), ("Value", "left"))
    for key, value in found.items():
        table.add(key, value)
    sys.stdout.write(table.text())


@command(
    "image-meta get", "Image metadata get the value associated with the key.", with_image, specs=("image-spec", "key")
)
def meta_get(session: Session) -> None:
    spec, key = session.spec(), word(session, 1, "metadata key")
    with session.image(spec, read_only=True) as image:
        try:
            print(image.metadata_get(key))
        except KeyError:
            raise Failure(
                f"failed to get metadata {key} of image : (2) No such file or directory\n"
                "rbd: getting metadata failed: (2) No such file or directory",
                2,
            ) from None


@command("image-meta set", "Image metadata set key with value.", with_image, specs=("image-spec", "key", "value"))
def meta_set(session: Session) -> None:
    spec, key = session.spec(), word(session, 1, "metadata key")
    value = word(session, 2, "metadata value")
    with session.image(spec) as image, failing("setting metadata failed"):
        image.metadata_set(key, value)


@command(
    "image-meta remove",
    "Image metadata remove the key and value associated.",
    with_image,
    specs=("image-spec", "key"),
    aliases=("image-meta rm",),
)
def meta_remove(session: Session) -> None:
    spec, key = session.spec(), word(session, 1, "metadata key")
    with session.image(spec) as image:
        try:
            image.metadata_remove(key)
        except KeyError:
            raise Failure(
                f"rbd: no existing metadata key {key} of image : (2) No such file or directory\n"
                "rbd: removing metadata failed: (2) No such file or directory",
                2,
            ) from None


# --- feature


def _feature(session: Session, enabled: bool) -> None:
    spec = session.spec()
    words = session.options.specs[0 if session.options.image else 1 :]
    if not words:
        raise Failure("rbd: at least one feature name must be specified", 22)
    try:
        bits = sizes.features(list(words))
    except ValueError:
        raise Failure("rbd: the argument for option is invalid") from None
    with session.image(spec) as image, failing("failed to update image features"):
        image.update_features(bits, enabled)


@command(
    "feature enable", "Enable the specified image feature.", with_image, specs=("image-spec", "features"), many=True
)
def feature_enable(session: Session) -> None:
    _feature(session, True)


@command(
    "feature disable", "Disable the specified image feature.", with_image, specs=("image-spec", "features"), many=True
)
def feature_disable(session: Session) -> None:
    _feature(session, False)


# --- lock


def with_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shared", help="shared lock tag")


@command(
    "lock list", "Show locks held on an image.", with_image, with_format, specs=("image-spec",), aliases=("lock ls",)
)
def lock_list(session: Session) -> None:
    with session.image(session.spec(), read_only=True) as image, failing("listing locks failed"):
        held: Any = image.list_lockers() or {"lockers": []}
    lockers = held["lockers"]
    if not session.plain:
        rows = [
            Section("lock", {"id": cookie, "locker": locker, "address": address}) for locker, cookie, address in lockers
        ]
        session.show(Rows("locks", rows))
        return
    if not lockers:
        return
    one, kind = len(lockers) == 1, "exclusive" if held["exclusive"] else "shared"
    print(f"There {'is' if one else 'are'} {len(lockers)} {kind} lock{'' if one else 's'} on this image.")
    if not held["exclusive"]:
        print(f"Lock tag: {held['tag']}")
    table = Table(("Locker", "left"), ("ID", "left"), ("Address", "left"))
    for locker, cookie, address in lockers:
        table.add(locker, cookie, address)
    sys.stdout.write(table.text())


@command("lock add", "Take a lock on an image.", with_image, with_shared, specs=("image-spec", "lock-id"))
def lock_add(session: Session) -> None:
    spec, cookie = session.spec(), word(session, 1, "lock id")
    with session.image(spec) as image:
        try:
            if session.options.shared:
                image.lock_shared(cookie, session.options.shared)
            else:
                image.lock_exclusive(cookie)
        except rbd.ImageExists as error:
            raise Failure(
                "rbd: lock is already held by someone else with a different tag"
                if session.options.shared
                else "rbd: lock is already held by you",
                code_of(error),
            ) from None
        except rbd.ImageBusy as error:
            raise Failure("rbd: lock is already held by someone else", code_of(error)) from None
        except rbd.Error as error:
            raise Failure(f"rbd: taking lock failed: {reason(error)}", code_of(error)) from None


@command(
    "lock remove",
    "Release a lock on an image.",
    with_image,
    specs=("image-spec", "lock-id", "locker"),
    aliases=("lock rm",),
)
def lock_remove(session: Session) -> None:
    spec, cookie = session.spec(), word(session, 1, "lock id")
    locker = word(session, 2, "locker")
    with session.image(spec) as image, failing("releasing lock failed"):
        image.break_lock(locker, cookie)


# --- object-map


@command(
    "object-map rebuild",
    "Rebuild an invalid object map.",
    with_image,
    with_snap,
    with_progress,
    specs=("image-or-snap-spec",),
)
def object_map_rebuild(session: Session) -> None:
    spec = session.spec(snap="may")
    with session.image(spec) as image, failing("rebuilding object map failed"):
        with session.progress("Object Map Rebuild") as progress:
            image.rebuild_object_map(progress)


# --- namespace


@command("namespace create", "Create an RBD image namespace.", with_pool, specs=("pool-spec",))
def namespace_create(session: Session) -> None:
    spec = _namespace(session)
    with failing("failed to created namespace"):
        rbd.RBD().namespace_create(_pool(session, spec), spec.namespace)


@command(
    "namespace remove", "Remove an RBD image namespace.", with_pool, specs=("pool-spec",), aliases=("namespace rm",)
)
def namespace_remove(session: Session) -> None:
    spec = _namespace(session)
    try:
        rbd.RBD().namespace_remove(_pool(session, spec), spec.namespace)
    except rbd.ImageBusy as error:
        raise Failure("rbd: namespace contains images which must be deleted first.", code_of(error)) from None
    except rbd.Error as error:
        raise Failure(f"rbd: failed to remove namespace: {reason(error)}", code_of(error)) from None


@command(
    "namespace list",
    "List RBD image namespaces.",
    with_pool,
    with_format,
    specs=("pool-spec",),
    aliases=("namespace ls",),
)
def namespace_list(session: Session) -> None:
    spec = pool_spec(session)
    with failing("failed to list namespaces"):
        names = sorted(rbd.RBD().namespace_list(_pool(session, spec)))
    if not session.plain:
        session.show(Rows("namespaces", [Section("namespace", {"name": name}) for name in names]))
    elif names:
        table = Table(("NAME", "left"))
        for name in names:
            table.add(name)
        sys.stdout.write(table.text())


def _namespace(session: Session) -> Spec:
    spec = pool_spec(session)
    if not spec.namespace:
        raise Failure("rbd: namespace name was not specified", 22)
    return spec


def _pool(session: Session, spec: Spec) -> Any:
    return session.ioctx(Spec(spec.pool, "", "", ""))


# --- pool


def with_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="also when another application uses the pool")


@command("pool init", "Initialize pool for use by RBD.", with_pool, with_force, specs=("pool-name",))
def pool_init(session: Session) -> None:
    """On the embedded store the pool is created when it does not exist: nobody else could."""
    name = pool_spec(session).pool
    if session.cluster.pool_exists(name):
        return
    with failing("pool init failed"):
        session.cluster.create_pool(name)


@command("pool stats", "Display pool statistics.", with_pool, with_format, specs=("pool-spec",))
def pool_stats(session: Session) -> None:
    ioctx = session.ioctx(pool_spec(session))
    images = snapshots = provisioned = 0
    with failing("failed to query pool stats"):
        for name in rbd.RBD().list(ioctx):
            try:
                image = rbd.Image(ioctx, name, read_only=True)
            except rbd.ImageNotFound:
                continue
            with image:
                sizes_seen = [image.size(), *(snap["size"] for snap in image.list_snaps())]
                images, snapshots = images + 1, snapshots + len(sizes_seen) - 1
                provisioned += max(sizes_seen)
    if session.plain:
        print(f"Total Images: {images}\nTotal Snapshots: {snapshots}\nProvisioned Size: {size_text(provisioned)}")
        return
    empty = {"count": 0, "provisioned_bytes": 0, "snap_count": 0}
    counted = {"count": images, "provisioned_bytes": provisioned, "snap_count": snapshots}
    session.show(Section("stats", {"images": Section("images", counted), "trash": Section("trash", empty)}))
