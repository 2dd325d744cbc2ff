"""The backups in a place: which there are, what each needs, what belongs to none."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field

from .target import Target
from .wire import (
    INDEX_BYTES,
    INDEX_ROWS,
    LEAST_PART,
    MAX_MANIFEST,
    MAX_PART,
    Manifest,
    PartRef,
    damaged,
    decode_index,
    digest_of,
    folder_of,
    set_and_id,
)

__all__ = ["INDEX_ROWS", "LEAST_PART", "MAX_PART", "Report", "Vault"]


@dataclass
class Report:
    """What a check found."""

    backups: list[Manifest] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    orphans: dict[str, list[str]] = field(default_factory=dict)  # what they are part of -> keys
    orphan_bytes: int = 0


class Vault:
    """Any number of threads and processes; what is read was checked."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def sets(self) -> list[str]:
        """Their names."""
        found = {pair[0] for row in self.target.list("manifests/") if (pair := set_and_id(row.key))}
        return sorted(found)

    def manifests(self, name: str) -> list[Manifest]:
        """The complete backups of a set, in the order in which they were made. EBADMSG: one of them is damaged."""
        return [self.manifest(key) for key in self._keys(name)]

    def _keys(self, name: str) -> list[str]:
        rows = [(row.key, set_and_id(row.key)) for row in self.target.list(folder_of(name))]
        return [key for key, pair in rows if pair is not None and pair[0] == name]

    def manifest(self, key: str) -> Manifest:
        """ENOENT, EBADMSG."""
        return Manifest.decode(self.target.get(key, MAX_MANIFEST), key)

    def chain(self, last: Manifest, every: list[Manifest]) -> list[Manifest]:
        """From the full backup to `last`, of those in `every`. ENOENT: one that is needed is missing."""
        by_id = {each.id: each for each in every}
        found = [last]
        while found[-1].parent:
            parent = by_id.get(found[-1].parent)
            if parent is None:
                raise OSError(errno.ENOENT, f"backup {found[-1].id} needs {found[-1].parent}, which is not there")
            if parent.number != found[-1].number - 1 or parent.image_id != last.image_id:
                damaged(f"{found[-1].id} is no increment to {parent.id}")
            found.append(parent)
        return found[::-1]

    def parts(self, manifest: Manifest) -> Iterator[PartRef]:
        """What `manifest` consists of, in order; an index at a time. EBADMSG, ENOENT."""
        for number in range(len(manifest.indexes)):
            data = self.target.get(manifest.index_key(number), INDEX_BYTES)
            if digest_of(data) != manifest.indexes[number]:
                damaged(f"{manifest.index_key(number)} is not as it was written")
            first = number * INDEX_ROWS
            yield from decode_index(data, first, min(INDEX_ROWS, manifest.parts - first))

    def part(self, manifest: Manifest, ref: PartRef) -> bytes:
        """EBADMSG: not what was written. ENOENT."""
        key = ref.key(manifest.id)
        try:
            data = self.target.get(key, ref.size)
        except OSError as failure:
            if failure.errno != errno.EFBIG:
                raise
            damaged(f"{key} has more than its {ref.size} bytes")
        if len(data) != ref.size or digest_of(data) != ref.digest:
            damaged(f"{key} is not as it was written")
        return data

    # --- taking away

    def remove(self, manifests: list[Manifest]) -> None:
        """The manifest goes first: what is cut short leaves parts that belong to nothing, and `orphans` finds them."""
        for manifest in reversed(manifests):
            self.target.delete(manifest.key)
        for manifest in manifests:
            for row in list(self.target.list(f"data/{manifest.id}/")):
                self.target.delete(row.key)

    # --- checking

    def check(self, names: list[str] | None = None, *, read: bool = False) -> Report:
        """Of all sets, or these: is all there that they need, and (`read`) is it as it was written? What belongs to no
        backup is named when all sets are looked at. Only the keys of one backup are in memory at a time."""
        report = Report()
        known: set[str] = set()
        for name in self.sets() if names is None else names:
            every: list[Manifest] = []
            for key in self._keys(name):
                pair = set_and_id(key)
                known.add(pair[1] if pair else "")
                try:
                    every.append(self.manifest(key))
                except OSError as failure:
                    report.problems.append(f"{name}: {failure.strerror}")
            for manifest in every:
                report.problems += [f"{name}: {text}" for text in self._problems(manifest, every, read, report)]
            report.backups += every
        if names is None:
            self._orphans(known, report)
        return report

    def _problems(self, manifest: Manifest, every: list[Manifest], read: bool, report: Report) -> Iterator[str]:
        try:
            self.chain(manifest, every)
        except OSError as failure:
            yield str(failure.strerror)
        have = {row.key: row.size for row in self.target.list(f"data/{manifest.id}/")}
        for number in range(len(manifest.indexes)):
            have.pop(manifest.index_key(number), None)
        try:
            for ref in self.parts(manifest):
                size = have.pop(ref.key(manifest.id), None)
                if size is None:
                    yield f"{ref.key(manifest.id)} is missing"
                elif size != ref.size:
                    yield f"{ref.key(manifest.id)} has {size} bytes, not {ref.size}"
                elif read:
                    yield from self._read(manifest, ref)
        except OSError as failure:
            yield str(failure.strerror)
            return  # without its index nobody knows what belongs to it
        if have:
            report.orphans.setdefault(f"left over in backup {manifest.id}", []).extend(sorted(have))
            report.orphan_bytes += sum(have.values())

    def _read(self, manifest: Manifest, ref: PartRef) -> Iterator[str]:
        try:
            self.part(manifest, ref)
        except OSError as failure:
            yield str(failure.strerror)

    def _orphans(self, known: set[str], report: Report) -> None:
        for row in self.target.list(""):
            words = row.key.split("/")
            if set_and_id(row.key) is not None or (words[0] == "data" and len(words) == 3 and words[1] in known):
                continue
            what = "unfinished backup " + words[1] if words[0] == "data" and len(words) == 3 else "no part of a backup"
            report.orphans.setdefault(what, []).append(row.key)
            report.orphan_bytes += row.size
