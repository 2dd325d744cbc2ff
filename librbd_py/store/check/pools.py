"""Verification of the images of a store that is a client's, such as a Ceph cluster: nothing but what any client reads.

Others may use the store meanwhile. What they are just doing looks like something that was cut short: a finding counts
when it is there again.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from functools import partial

from librbd_py.format import names

from ..api import ListSnaps, Store
from .groups import Groups
from .images import Header, ImageChecker
from .leftovers import Leftovers
from .records import NOTE, RUN_REPAIR, WARNING, Finding, StoreRecords


class _Report:
    def __init__(self, repair: bool) -> None:
        self.findings: list[Finding] = []
        self._repair = repair

    def found(
        self, severity: str, where: str, what: str, advice: str, mend: Callable[[], object] | None = None
    ) -> None:
        if mend is None or not self._repair:
            self.findings.append(Finding(severity, where, what, RUN_REPAIR if mend else advice))
            return
        try:
            mend()
        except OSError as error:
            self.findings.append(Finding(severity, where, what, f"repairing it failed: {error.strerror}; {advice}"))
        else:
            self.findings.append(Finding(NOTE, where, what, "repaired", repaired=True))


class _Objects:
    """Data objects are objects as any others."""

    def __init__(self, store: Store, records: StoreRecords) -> None:
        self._store = store
        self._records = records

    def problem(self, header: Header) -> tuple[str, str, str] | None:
        return None

    def keeps_map(self, header: Header) -> bool:
        return False

    def map_states(self, header: Header) -> bytes | None:
        return None

    def numbers(self, header: Header) -> Iterable[int]:
        pool, prefix = header.data
        return self._records.numbers(pool, header.namespace, prefix)

    def exists(self, header: Header, number: int) -> bool:
        pool, prefix = header.data
        return _exists(self._store, (pool, header.namespace, prefix), number)


def _exists(store: Store, place: tuple[int, str, str], number: int) -> bool:
    """Names are listed that only snapshots still need."""
    pool, namespace, prefix = place
    try:
        store.open(pool, namespace).stat(names.data_object(prefix, number))
    except OSError as failure:
        if failure.errno != errno.ENOENT:
            raise
        return False
    return True


def check(store: Store, *, repair: bool = False, snapshots: bool = False) -> list[Finding]:
    """[] when all is well. `snapshots`: also whether data objects keep anything for snapshots that are no more, which
    takes a round trip for each of them. OSError: the store cannot be read."""
    report = _Report(repair)
    records = StoreRecords(store)
    images = ImageChecker(report, records, _Objects(store, records))
    images.run()
    Leftovers(report, records, images.headers).run()
    Groups(report, records, images.headers).run()
    _data(report, store, records, list(images.headers.values()), snapshots)
    return report.findings


def _data(report: _Report, store: Store, records: StoreRecords, headers: list[Header], snapshots: bool) -> None:
    owners = {(header.data[0], header.namespace, header.data[1]): header for header in headers}
    used = {(header.data[0], number) for header in headers for number in header.snaps}
    for place in sorted(records.data_objects):
        pool, namespace, prefix = place
        where = f"pool {pool}{'/' + namespace if namespace else ''}, {prefix}"
        header = owners.get(place)
        if header is None:
            count = sum(_exists(store, place, number) for number in records.numbers(*place))
            if count:
                report.found(WARNING, where, f"{count} data objects of no image", "remove them if nobody needs them")
        if snapshots and (header is None or not header.problems):
            for number in sorted(_kept(store, records, place) - (header.snaps.keys() if header else set())):
                what = f"keeps data for snapshot {number} of pool {pool}, which the image does not have"
                if (pool, number) in used:
                    report.found(WARNING, where, what, "another image has it")
                else:
                    mend = partial(store.open(pool).snap_remove, number)
                    report.found(NOTE, where, what, "the store is about to drop it, or was not told to", mend)


def _kept(store: Store, records: StoreRecords, place: tuple[int, str, str]) -> set[int]:
    """The snapshots that data objects hold something for."""
    pool, namespace, prefix = place
    io, kept = store.open(pool, namespace), set[int]()
    for number in records.numbers(pool, namespace, prefix):
        try:
            found = io.read(names.data_object(prefix, number), [ListSnaps()])[0]
        except OSError as failure:
            if failure.errno != errno.ENOENT:
                raise
            continue
        kept.update(snap for clone in found.clones for snap in clone.snaps)
    return kept
