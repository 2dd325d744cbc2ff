"""What an import is read from while the image is used already."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from typing import Any

from librbd_py.format import names
from librbd_py.format.header import (
    MIGRATION_DESTINATION,
    MIGRATION_PREPARED,
    MIGRATION_PREPARING,
    MigrationSpec,
)
from librbd_py.format.values import replace
from librbd_py.source import Source
from librbd_py.store.api import ObjectContext, Store

from .. import snapshots
from ..directory import DEFAULTS, CreateOptions, create, require_name
from ..handle import ImageHandle
from ..native_source import open_any
from ..quiesce import SKIP_QUIESCE
from ..resize import resize
from .finish import abort_pair
from .records import Pair, Side, set_record, set_state


class Imported:
    """A source and the store that its spec is looked up in."""

    def __init__(self, spec: str, store: Store) -> None:
        self.source: Source = open_any(parsed(spec), store)

    def close(self) -> None:
        self.source.close()


def parsed(spec: str) -> Mapping[str, Any]:
    """EINVAL: no JSON object."""
    try:
        found = json.loads(spec)
    except ValueError:
        raise OSError(errno.EINVAL, "the source spec is no JSON") from None
    if not isinstance(found, dict):
        raise OSError(errno.EINVAL, "the source spec is no JSON object")
    return found


def prepare_import(spec: str, ctx: ObjectContext, name: str, options: CreateOptions = DEFAULTS) -> None:
    """A new image that shows what the source holds, its snapshots included, and takes it over as it is needed, or when
    the migration is executed. The source is only read, now and later.

    EINVAL: the spec; EEXIST: there is an image of that name; and what opening the source and creating an image raise.
    Whatever fails leaves nothing.
    """
    require_name(name)
    rows = parsed(spec)
    source = open_any(rows, ctx.store)
    try:
        text = json.dumps(rows, sort_keys=True, separators=(",", ":"))
        first = source.snapshots[0].size if source.snapshots else source.size
        image_id = names.make_id(ctx.store.client.gid)
        create(ctx, name, first, options, image_id)
        dest = Side(ctx, name, image_id, None)
        record = MigrationSpec(
            MIGRATION_DESTINATION,
            -1,
            "",
            "",
            "",
            overlap=source.size,
            flatten=True,
            state=MIGRATION_PREPARING,
            source_spec=text,
        )
        try:
            _make(dest, source, record)
        except OSError:
            abort_pair(Pair(None, dest, record), None)
            raise
    finally:
        source.close()


def _make(dest: Side, source: Source, record: MigrationSpec) -> None:
    with ImageHandle.open(dest.ctx, image_id=dest.id) as made, made.exclusive():
        seqs = {}
        for number, snap in enumerate(source.snapshots):
            if made.header.size != snap.size:
                resize(made, snap.size)
            seqs[number + 1] = snapshots.create(made, snap.name, flags=SKIP_QUIESCE)
        if made.header.size != source.size:
            resize(made, source.size)
        made.alone = True
        set_record(dest, replace(record, snap_seqs=seqs))
        set_state(dest, MIGRATION_PREPARED)
        made.announce()
