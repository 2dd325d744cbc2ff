"""`rbdpy config ...`: overrides of options for everybody, for a pool, for an image."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Container, Iterable
from contextlib import suppress

from librbd_py.cli.arguments import FORMAT, IMAGE
from librbd_py.cli.failure import Failure, code_of, reason
from librbd_py.cli.output import Rows, Section, Table
from librbd_py.cli.registry import verb
from librbd_py.cli.session import Session, Spec, failing, failures

ENTITY = "config-entity:config entity (global, client, client.<id>)"
KEY = "key:config key"
VALUE = "value:config value"
_OWN = {"rbd_cache_writethrough_until_flush": "false"}  # as the command itself has it
PREFIX = "conf_"  # of the keys in the metadata of pools and images


def _entity(session: Session) -> str:
    entity = session.word()
    if entity not in ("global", "client") and not entity.startswith("client."):
        raise Failure(f"rbd: invalid config entity: {entity} (must be global, client or client.<id>)", 22)
    return entity


def _pool(session: Session) -> Spec:
    pool = session.word()
    if not pool:
        raise Failure("rbd: pool name was not specified", 22)
    return Spec(pool, "", "")


def _key(session: Session) -> str:
    from librbd_py.image.options import known

    key = session.word()
    if not key:
        raise Failure("rbd: config key was not specified", 22)
    if not key.startswith("rbd_"):
        raise Failure(f"rbd: not rbd option: {key}", 22)
    if not known(key):
        raise Failure(f"rbd: invalid config key: {key}", 22)
    return key


# --- global: the monitors keep it


def _mon(session: Session, what: str, **words: str) -> bytes:
    try:
        code, out, text = session.cluster.mon_command(json.dumps(words), b"")
    except failures() as error:
        raise Failure(f"rbd: {what}: {error}", code_of(error)) from None
    if code:
        raise Failure(f"rbd: {what}: {text}", abs(code))
    return bytes(out)


def _global(session: Session, entity: str) -> dict[str, tuple[str, str]]:
    """name -> (value, section) of what holds for `entity`: the nearest section wins."""
    rows = json.loads(_mon(session, "error reading config", prefix="config dump", format="json") or b"[]")
    rank = {"global": 0, "client": 1, entity: 2}
    sections = {"global"} if entity == "global" else {"global", "client", entity}
    found: dict[str, tuple[str, str]] = {}
    for row in rows:
        name, section = row["name"], row["section"]
        if not name.startswith("rbd_") or section not in sections:
            continue
        if name not in found or rank[section] >= rank[found[name][1]]:
            found[name] = (row["value"], section)
    return found


@verb("config global get", "Get a global-level configuration override.", spec=(ENTITY, KEY))
def global_get(session: Session) -> None:
    entity, key = _entity(session), _key(session)
    found = _global(session, entity).get(key)
    if found is None or found[1] != entity:
        raise Failure(f"rbd: {key} is not set", 2)
    print(found[0])


@verb("config global set", "Set a global-level configuration override.", spec=(ENTITY, KEY, VALUE))
def global_set(session: Session) -> None:
    entity, key = _entity(session), _key(session)
    _mon(session, f"error setting {key}", prefix="config set", who=entity, name=key, value=session.word())


@verb(
    "config global remove",
    "Remove a global-level configuration override.",
    spec=(ENTITY, KEY),
    alias="config global rm",
)
def global_remove(session: Session) -> None:
    entity, key = _entity(session), _key(session)
    _mon(session, f"error removing {key}", prefix="config rm", who=entity, name=key)


@verb(
    "config global list",
    "List global-level configuration overrides.",
    *FORMAT,
    spec=(ENTITY,),
    alias="config global ls",
)
def global_list(session: Session) -> None:
    entity = _entity(session)
    session.layout()
    found = sorted(_global(session, entity).items())
    rows = [{"name": name, "value": value, "section": section} for name, (value, section) in found]
    if rows or not session.plain:
        _show(session, rows, "section")


def _show(session: Session, rows: list[dict[str, str]], last: str) -> None:
    if not session.plain:
        session.show(Rows("config", [Section("option", row) for row in rows]))
        return
    columns = ["name", "value", last, *(["effect"] if rows and "effect" in rows[0] else [])]
    table = Table(*((name.capitalize(), "left") for name in columns))
    for row in rows:
        table.add(*(row[name] for name in columns))
    sys.stdout.write(table.text())


def _options(session: Session, names: Iterable[str], *layers: tuple[str, dict[str, str]]) -> list[dict[str, str]]:
    """Every option of `names` with what holds; later `layers` (source, overrides) win over earlier ones."""
    from librbd_py.image.options import OPTIONS, shown

    rows = []
    for name in sorted(names):
        value, source = _configured(session, name) or OPTIONS[name], "config"
        for layer, overrides in layers:
            if PREFIX + name in overrides:
                value, source = overrides[PREFIX + name], layer
        rows.append({"name": name, "value": shown(name, value), "source": source})
        if session.option("effects"):
            from librbd_py.image.settings import is_honoured

            rows[-1]["effect"] = "honoured" if is_honoured(name) else "without effect"
    return rows


def _configured(session: Session, name: str) -> str:
    """What the cluster's configuration says; empty: nothing."""
    if name in _OWN:
        return _OWN[name]
    try:
        return str(session.cluster.conf_get(name) or "")
    except failures():
        return ""


def _require(name: str, value: str, allowed: Container[str]) -> None:
    """EINVAL unless the option may be overridden there and takes the value."""
    from librbd_py.image.options import acceptable

    if name not in allowed or not acceptable(name, value):
        raise OSError(22, f"{value!r} is no value of {name} here")


# --- of a pool


def _tell_clients(session: Session) -> None:
    """Librbd's clients read the overrides of their pools again when this option changes."""
    from librbd_py.store.rados import RadosStore

    if isinstance(session.cluster.store, RadosStore):
        name = "rbd_config_pool_override_update_timestamp"
        with suppress(Failure):  # a user who may not change it has still changed the pool
            _mon(session, name, prefix="config set", who="global", name=name, value=str(int(time.time())))


@verb("config pool get", "Get a pool-level configuration override.", spec=("pool-name", KEY))
def pool_get(session: Session) -> None:
    from librbd_py import rbd

    spec, key = _pool(session), _key(session)
    ioctx = session.ioctx(spec)
    try:
        print(rbd.RBD().pool_metadata_get(ioctx, PREFIX + key))
    except KeyError:
        raise Failure(f"rbd: {key} is not set", 2) from None
    except failures() as error:
        raise Failure(f"rbd: failed to get {key}: {reason(error)}", code_of(error)) from None


@verb("config pool set", "Set a pool-level configuration override.", spec=("pool-name", KEY, VALUE))
def pool_set(session: Session) -> None:
    from librbd_py import rbd
    from librbd_py.image.options import OPTIONS

    spec, key = _pool(session), _key(session)
    value = session.word()
    ioctx = session.ioctx(spec)
    with failing(f"failed to set {key}"):
        _require(key, value, OPTIONS)
        rbd.RBD().config_set(ioctx, key, value)
    _tell_clients(session)


@verb(
    "config pool remove",
    "Remove a pool-level configuration override.",
    spec=("pool-name", KEY),
    alias="config pool rm",
)
def pool_remove(session: Session) -> None:
    from librbd_py import rbd

    spec, key = _pool(session), _key(session)
    ioctx = session.ioctx(spec)
    with failing(f"failed to remove {key}"):
        try:
            rbd.RBD().config_remove(ioctx, key)
        except KeyError:
            raise OSError(2, "") from None
    _tell_clients(session)


@verb(
    "config pool list",
    "List pool-level configuration overrides.",
    *FORMAT,
    spec=("pool-name",),
    alias="config pool ls",
    more=("effects",),
)
def pool_list(session: Session) -> None:
    from librbd_py import rbd
    from librbd_py.image.options import OPTIONS

    spec = _pool(session)
    session.layout()
    ioctx = session.ioctx(spec)
    with failing("failed to list config"):
        overrides = dict(rbd.RBD().pool_metadata_list(ioctx))
        rows = _options(session, OPTIONS, ("pool", overrides))
    _show(session, rows, "source")


# --- of an image


@verb("config image get", "Get an image-level configuration override.", *IMAGE, spec=("image-spec", KEY))
def image_get(session: Session) -> None:
    spec, key = session.spec(), _key(session)
    with session.image(spec, read_only=True) as image:
        try:
            print(image.metadata_get(PREFIX + key))
        except KeyError:
            raise Failure(f"rbd: {key} is not set", 2) from None
        except failures() as error:
            raise Failure(f"rbd: failed to get {key}: {reason(error)}", code_of(error)) from None


@verb("config image set", "Set an image-level configuration override.", *IMAGE, spec=("image-spec", KEY, VALUE))
def image_set(session: Session) -> None:
    from librbd_py.image.options import OF_IMAGES

    spec, key = session.spec(), _key(session)
    value = session.word()
    if not value:
        raise Failure("rbd: image config value was not specified", 22)
    with session.image(spec) as image, failing(f"failed to set {key}"):
        _require(key, value, OF_IMAGES)
        image.config_set(key, value)


@verb(
    "config image remove",
    "Remove an image-level configuration override.",
    *IMAGE,
    spec=("image-spec", KEY),
    alias="config image rm",
)
def image_remove(session: Session) -> None:
    spec, key = session.spec(), _key(session)
    with session.image(spec) as image, failing(f"failed to remove {key}"):
        try:
            image.config_remove(key)
        except KeyError:
            raise OSError(2, "") from None


@verb(
    "config image list",
    "List image-level configuration overrides.",
    *IMAGE,
    *FORMAT,
    spec=("image-spec",),
    alias="config image ls",
    more=("effects",),
)
def image_list(session: Session) -> None:
    from librbd_py import rbd
    from librbd_py.image.options import OF_IMAGES

    spec = session.spec()
    session.layout()
    with session.image(spec, read_only=True) as image, failing("failed to list config"):
        of_pool = dict(rbd.RBD().pool_metadata_list(session.ioctx(spec)))
        rows = _options(session, OF_IMAGES, ("pool", of_pool), ("image", dict(image.metadata_list())))
    if session.plain:
        print(f"There are {len(rows)} values:")
    _show(session, rows, "source")
