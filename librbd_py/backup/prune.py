"""Removing backups, never one that another needs."""

from __future__ import annotations

import errno

from .vault import Vault
from .wire import Manifest


def remove(vault: Vault, name: str, wanted: list[str]) -> list[Manifest]:
    """Those of a set with these ids; what was removed. ENOENT: no such backup. EBUSY: one that stays needs it."""
    every = vault.manifests(name)
    by_id = {each.id: each for each in every}
    missing = [each for each in wanted if each not in by_id]
    if missing:
        raise OSError(errno.ENOENT, f"there is no backup {missing[0]} in {name}")
    gone = [each for each in every if each.id in wanted]
    for each in every:
        if each.parent in wanted and each.id not in wanted:
            raise OSError(errno.EBUSY, f"backup {each.parent} is needed by {each.id} (of {each.snapshot})")
    vault.remove(sorted(gone, key=lambda each: each.number))
    return gone


def prune(vault: Vault, name: str, keep: int) -> list[Manifest]:
    """All but the `keep` newest backups of a set, by when they were made, and what those need."""
    every = vault.manifests(name)
    newest = sorted(every, key=lambda each: (each.created, each.number))[-keep:]
    needed = {needs.id for each in newest for needs in vault.chain(each, every)}
    gone = [each for each in every if each.id not in needed]
    vault.remove(sorted(gone, key=lambda each: each.number))
    return gone
