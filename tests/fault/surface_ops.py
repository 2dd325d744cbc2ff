"""Random programs over the whole surface, a model of what they must do, and what shrinks a program that failed.

A program is a list of numbers, one for each step: the seed of all that the step chooses. So any sublist of a program is
a program, too, and the shortest one that still fails says more than a thousand steps do.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from librbd_py.format import features as ft

PLACES = ["rbd", "rbd/space", "data"]
GROUP_PLACES = ["rbd", "rbd/space"]
MAX_IMAGES, MAX_SNAPS, MAX_SIZE = 6, 3, 64 << 10
SETS = (ft.LAYERING, ft.LAYERING | ft.EXCLUSIVE_LOCK, ft.DEFAULT, ft.DEFAULT & ~ft.DEEP_FLATTEN)
SHAPES = ((12, 0, 0), (13, 0, 0), (14, 4096, 2), (13, 4096, 3))


class Client(Protocol):
    def call(self, verb: str, *args: Any) -> Any: ...


@dataclass
class Disk:
    head: bytes
    features: int
    snaps: dict[str, bytes] = field(default_factory=dict)
    protected: set[str] = field(default_factory=set)
    metadata: dict[str, str] = field(default_factory=dict)
    parent: tuple[Disk, str, int] | None = None  # (image, snapshot, format of the clone)
    group: str | None = None
    delayed: bool = False  # in the trash for longer than any program runs
    doubted: bool = False  # librbd made an object map and left those of older snapshots invalid
    grain: int = 0  # bytes of an object of an image that is not striped

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass
class Group:
    members: list[Disk] = field(default_factory=list)
    snaps: dict[str, dict[Disk, bytes]] = field(default_factory=dict)


class Wrong(AssertionError):
    pass


class Surface:
    """`clients` do the steps in turns; each must see what the model says after every step."""

    def __init__(self, clients: list[Client], *, librbd: bool = False) -> None:
        """`librbd`: one of them is."""
        self.clients, self.librbd = clients, librbd
        self.disks: dict[tuple[str, str], Disk] = {}
        self.trash: dict[tuple[str, str], Disk] = {}
        self.groups: dict[tuple[str, str], Group] = {}
        self.random = random.Random()
        self.names = 0
        self.log: list[str] = []
        self.counts: Counter[str] = Counter()
        self.verbs: dict[str, Callable[[], None]] = {
            name[3:]: getattr(self, name) for name in sorted(dir(self)) if name.startswith("do_")
        }

    def run(self, program: list[int], every: int = 1) -> None:
        """Raises Wrong. State is compared after each `every`th step and at the end."""
        busy = ["write", "write", "write", "create", "snap", "clone", "group_add", "group_snap", "group_snap"]
        busy += ["group_rollback", "group_snap_remove", "group_snap_rename"]
        for number, seed in enumerate(program):
            self.random.seed(seed)
            before, verb = len(self.log), ""
            try:
                for _ in range(4):  # many verbs need something that is not there
                    verb = self.random.choice([*self.verbs, *busy]) if self.disks else "create"
                    self.verbs[verb]()
                    if len(self.log) > before:
                        self.counts[verb] += 1
                        break
                if number % every == 0 or number == len(program) - 1:
                    self.compare()
            except Exception as failure:
                raise Wrong(f"step {number}, {verb}: {failure}\n" + "\n".join(self.log[-60:])) from failure

    def ask(self, verb: str, *args: Any, error: str | None = None, first: bool = False) -> Any:
        """By one of the clients, or by the first of them. `error`: what it must raise."""
        which = self.random.randrange(len(self.clients))
        which = 0 if first else which
        self.log.append(f"client {which}: {verb}{args}" + (f" -> {error}" if error else ""))
        kind, result = self.clients[which].call(verb, *args)
        if (result if kind == "error" else None) != error:
            raise Wrong(f"{verb}{args} by client {which} gave {result}, not {error or 'success'}")
        return result

    def alone(self, key: tuple[str, str]) -> None:
        """Nobody keeps the image open."""
        for client in self.clients:
            client.call("leave", *key)

    def name(self, kind: str) -> str:
        self.names += 1
        return f"{kind}{self.names}"

    def pick(self, wanted: Callable[[Disk], object] = lambda disk: True) -> tuple[tuple[str, str], Disk] | None:
        found = [row for row in self.disks.items() if wanted(row[1])]
        return self.random.choice(found) if found else None

    # --- what the model knows

    def kids(self, disk: Disk, snap: str | None = None, form: int | None = None) -> list[Disk]:
        everybody = [*self.disks.values(), *self.trash.values()]
        return [
            kid
            for kid in everybody
            if kid.parent is not None
            and kid.parent[0] is disk
            and snap in (None, kid.parent[1])
            and form in (None, kid.parent[2])
        ]

    def moved_parent(self, disk: Disk, to: str) -> tuple[Disk, str, int] | None:
        """A clone of format 1 in another namespace than its parent becomes one of format 2; librbd 16 has it lost
        there: its parent's snapshot can be unprotected."""
        if disk.parent is None:
            return None
        return (*disk.parent[:2], 2 if self.across(disk.parent[0], to) else disk.parent[2])

    def across(self, disk: Disk, to: str) -> bool:
        """Is it in another namespace?"""
        places = [key[0] for key, it in [*self.disks.items(), *self.trash.items()] if it is disk]
        return places[0].partition("/")[2] != to.partition("/")[2]

    def in_groups(self, disk: Disk) -> list[str]:
        return sorted(name for group in self.groups.values() for name, held in group.snaps.items() if disk in held)

    def bare(self, disk: Disk) -> bool:
        """Has it no snapshot of any kind?"""
        return not disk.snaps and not self.kids(disk) and not self.in_groups(disk)

    def compare(self) -> None:
        states = []
        for number, client in enumerate(self.clients):
            kind, state = client.call("state", PLACES)
            if kind == "error":
                raise Wrong(f"client {number} cannot read the state: {state}")
            states.append(state)
        if any(state != states[0] for state in states):
            raise Wrong(f"clients see different things:\n{differences(states[0], states[1])}")
        found = {place: self._seen(place, state) for place, state in states[0].items()}
        wanted = {place: self._wanted(place) for place in PLACES}
        if found != wanted:
            raise Wrong(f"found and not in the model, or the other way round:\n{differences(found, wanted)}")

    def _seen(self, place: str, state: dict[str, Any]) -> dict[str, Any]:
        images = {}
        for name, row in state["images"].items():
            doubted = (place, name) in self.disks and self.disks[place, name].doubted
            snaps = sorted([*key.split(" ")[:2], value[0], value[1]] for key, value in row["snaps"].items())
            images[name] = {
                "head": row["head"],
                "snaps": [snap for snap in snaps if snap[0] in ("0", "1")],
                "metadata": row["metadata"],
                "group": row["group"],
                "features": row["features"] & ~(ft.STRIPINGV2 | ft.DATA_POOL | ft.OPERATIONS),
                "flags": 0 if doubted else row["flags"],
            }
        return {"images": images, "trash": state["trash"], "groups": state["groups"]}

    def _wanted(self, place: str) -> dict[str, Any]:
        images = {}
        for (where, name), disk in self.disks.items():
            if where == place:
                of_groups = [
                    ["1", snap, digest(held[disk]), False]
                    for group in self.groups.values()
                    for snap, held in group.snaps.items()
                    if disk in held
                ]
                users = [["0", snap, digest(data), snap in disk.protected] for snap, data in disk.snaps.items()]
                images[name] = {
                    "head": digest(disk.head),
                    "snaps": sorted(users + of_groups),
                    "metadata": sorted([key, value] for key, value in disk.metadata.items()),
                    "group": disk.group or "",
                    "features": disk.features,
                    "flags": 0,
                }
        groups = {
            name: [sorted(key[1] for key, disk in self.disks.items() if disk in group.members), sorted(group.snaps)]
            for (where, name), group in self.groups.items()
            if where == place
        }
        return {
            "images": images,
            "trash": sorted(name for where, name in self.trash if where == place),
            "groups": groups,
        }

    # --- images

    def do_create(self) -> None:
        if len(self.disks) >= MAX_IMAGES:
            return
        place, name = self.random.choice(PLACES), self.name("i")
        size, features = self.random.randrange(1, MAX_SIZE), self.random.choice(SETS)
        order, unit, count = self.random.choice(SHAPES)
        data_pool = "data" if place == "rbd" and self.random.random() < 0.2 else None
        self.ask("create", place, name, size, order, features, unit, count, data_pool)
        self.disks[place, name] = Disk(bytes(size), features, grain=0 if unit else 1 << order)

    def do_write(self) -> None:
        chosen = self.pick(lambda disk: disk.head)
        if chosen is None:
            return
        key, disk = chosen
        offset = self.random.randrange(len(disk.head))
        length = min(self.random.randint(1, 12000), len(disk.head) - offset)
        byte = self.random.randint(1, 255)
        self.ask("write", *key, offset, length, byte)
        disk.head = disk.head[:offset] + bytes([byte]) * length + disk.head[offset + length :]

    def do_zero(self) -> None:
        chosen = self.pick(lambda disk: disk.head)
        if chosen is None:
            return
        key, disk = chosen
        offset = self.random.randrange(len(disk.head))
        length = min(self.random.randint(1, 30000), len(disk.head) - offset)
        self.ask("zero", *key, offset, length)
        disk.head = disk.head[:offset] + bytes(length) + disk.head[offset + length :]

    def do_discard(self) -> None:
        """Whole objects of what is no clone: all else may stay as it was."""
        chosen = self.pick(lambda disk: disk.grain and disk.grain <= len(disk.head) and disk.parent is None)
        if chosen is None:
            return
        key, disk = chosen
        first = self.random.randrange(len(disk.head) // disk.grain)
        count = self.random.randint(1, len(disk.head) // disk.grain - first)
        offset, length = first * disk.grain, count * disk.grain
        self.ask("image", *key, "discard", offset, length)
        disk.head = disk.head[:offset] + bytes(length) + disk.head[offset + length :]

    def do_lock(self) -> None:
        """A lock of a user's own, where librbd takes none for itself."""
        chosen = self.pick(lambda disk: not disk.features & ft.EXCLUSIVE_LOCK)
        if chosen is None:
            return
        key = chosen[0]
        owner = self.random.choice(self.clients)
        results = [client.call("image", *key, "lock_exclusive", "cookie") for client in [owner, *self.clients]]
        wanted = ["ImageExists" if client is owner else "ImageBusy" for client in self.clients]
        self.log.append(f"lock {key} by client {self.clients.index(owner)}, then by all: {results}")
        if results != [["ok", None], *(["error", name] for name in wanted)]:
            raise Wrong(f"a lock of {key}: {results}")
        kind, error = owner.call("image", *key, "unlock", "cookie")
        if kind == "error":
            raise Wrong(f"unlocking {key}: {error}")

    def do_resize(self) -> None:
        chosen = self.pick()
        assert chosen is not None
        key, disk = chosen
        size = self.random.randrange(1, MAX_SIZE)
        self.ask("image", *key, "resize", size)
        disk.head = disk.head[:size].ljust(size, b"\0")

    def do_sparsify(self) -> None:
        chosen = self.pick(lambda disk: disk.head)
        if chosen is not None:
            self.ask("image", *chosen[0], "sparsify", 4096)

    def do_rename(self) -> None:
        chosen = self.pick()
        assert chosen is not None
        key, _ = chosen
        new = self.name("i")
        self.alone(key)
        self.ask("rename", *key, new)
        self.disks = {(key[0], new) if old == key else old: row for old, row in self.disks.items()}

    def do_copy(self) -> None:
        chosen = self.pick()
        if chosen is None or len(self.disks) >= MAX_IMAGES:
            return
        key, disk = chosen
        deep, to, new = self.random.random() < 0.6, self.random.choice(PLACES), self.name("i")
        # librbd 16.2.15, alone: a copy of a striped clone with an object map lacks what the parent has; a clone whose
        # snapshot is in the trash cannot be copied deep.
        clone = disk.parent is not None
        lost = disk.parent is not None and disk.parent[1] not in disk.parent[0].snaps
        away = disk.parent is not None and self.across(disk.parent[0], to)  # librbd makes it of its default format
        self.ask("copy", *key, to, new, deep, first=lost or away if deep else clone)
        made = Disk(disk.head, disk.features, metadata=dict(disk.metadata), grain=disk.grain)
        if deep:
            made.snaps, made.protected = dict(disk.snaps), set(disk.protected)
            if disk.parent is not None and self.ask("has_parent", to, new):
                made.parent = self.moved_parent(disk, to)
                made.metadata = {**disk.parent[0].metadata, **disk.metadata}  # as of any clone
        self.disks[to, new] = made

    def do_remove(self) -> None:
        chosen = self.pick()
        assert chosen is not None
        key, disk = chosen
        self.alone(key)
        if disk.snaps or self.in_groups(disk):
            self.ask("remove", *key, error="ImageHasSnapshots")
            return
        if disk.group is not None:
            self.ask("remove", *key, error="OSError")  # EMLINK
            return
        if not self.bare(disk):
            self.ask("remove", *key, error="ImageHasSnapshots")
            return
        self.ask("remove", *key)
        del self.disks[key]

    def do_features(self) -> None:
        chosen = self.pick(lambda disk: disk.features & ft.EXCLUSIVE_LOCK)
        if chosen is None:
            return
        key, disk = chosen
        if disk.features & ft.OBJECT_MAP:
            self.ask("image", *key, "update_features", ft.OBJECT_MAP | ft.FAST_DIFF, False)
            disk.features &= ~(ft.OBJECT_MAP | ft.FAST_DIFF)
        else:
            self.ask("image", *key, "update_features", ft.OBJECT_MAP | ft.FAST_DIFF, True)
            disk.features |= ft.OBJECT_MAP | ft.FAST_DIFF
            disk.doubted = self.librbd and not self.bare(disk)  # a rebuild by librbd is one of HEAD's map
            if self.ask("rebuild", *key):
                raise Wrong(f"{key}: flags are left after a rebuild")

    def do_rebuild(self) -> None:
        chosen = self.pick(lambda disk: disk.features & ft.OBJECT_MAP)
        if chosen is not None and self.ask("rebuild", *chosen[0]):
            raise Wrong(f"{chosen[0]}: flags are left after a rebuild")

    def do_metadata(self) -> None:
        chosen = self.pick()
        assert chosen is not None
        key, disk = chosen
        name = self.random.choice(("a", "b", "conf_rbd_cache_size"))
        if name in disk.metadata and self.random.random() < 0.5:
            self.ask("image", *key, "metadata_remove", name)
            del disk.metadata[name]
        elif name.startswith("conf_"):
            value = str(self.random.randrange(1 << 20, 1 << 22))
            self.ask("image", *key, "config_set", name[5:], value)
            disk.metadata[name] = value
        else:
            value = self.name("value")
            self.ask("image", *key, "metadata_set", name, value)
            disk.metadata[name] = value

    def do_migrate(self) -> None:
        """Each step by somebody, and used on the way."""
        chosen = self.pick(lambda disk: disk.group is None and not self.kids(disk) and not self.in_groups(disk))
        if chosen is None:
            return
        key, disk = chosen
        to, new = self.random.choice(PLACES), self.name("i")
        self.alone(key)
        if disk.parent is not None and disk.parent[1] not in disk.parent[0].snaps:
            self.ask("migration_prepare", *key, to, new, error="InvalidArgument", first=True)  # librbd: or not found
            return
        # librbd 16 wants the parent's snapshot protected, unless no older clients may connect to the cluster
        self.ask("migration_prepare", *key, to, new, first=disk.parent is not None)
        there = (to, new)
        if disk.head and self.random.random() < 0.7:
            at = self.random.randrange(len(disk.head))
            length = min(self.random.randint(1, 5000), len(disk.head) - at)
            self.ask("write", *there, at, length, 77)
            disk.head = disk.head[:at] + b"M" * length + disk.head[at + length :]
            self.alone(there)
        if self.random.random() < 0.3:
            self.ask("pool", to, "migration_abort", new)
            return
        self.ask("pool", to, "migration_execute", new)
        self.ask("pool", to, "migration_commit", new)
        disk.parent = self.moved_parent(disk, to)
        del self.disks[key]
        self.disks[there] = disk

    # --- snapshots and clones

    def snapshot(self) -> tuple[tuple[str, str], Disk, str] | None:
        chosen = self.pick(lambda disk: disk.snaps)
        return None if chosen is None else (*chosen, self.random.choice(list(chosen[1].snaps)))

    def do_snap(self) -> None:
        chosen = self.pick(lambda disk: len(disk.snaps) < MAX_SNAPS)
        if chosen is not None:
            snap = self.name("s")
            self.ask("image", *chosen[0], "create_snap", snap)
            chosen[1].snaps[snap] = chosen[1].head

    def do_snap_again(self) -> None:
        chosen = self.snapshot()
        if chosen is not None:
            self.ask("image", *chosen[0], "create_snap", chosen[2], error="ImageExists")

    def do_snap_limit(self) -> None:
        chosen = self.pick(lambda disk: disk.snaps)
        if chosen is None:
            return
        found = self.ask("fill_limit", *chosen[0])
        if found != "DiskQuotaExceeded":
            raise Wrong(f"a snapshot beyond the limit: {found}")

    def do_snap_remove(self) -> None:
        chosen = self.snapshot()
        if chosen is None:
            return
        key, disk, snap = chosen
        if snap in disk.protected:
            self.ask("image", *key, "remove_snap", snap, error="ImageBusy")
            return
        self.ask("image", *key, "remove_snap", snap)
        del disk.snaps[snap]

    def do_snap_rename(self) -> None:
        chosen = self.snapshot()
        if chosen is None:
            return
        key, disk, snap = chosen
        new = self.name("s")
        self.ask("image", *key, "rename_snap", snap, new)
        disk.snaps = {new if old == snap else old: data for old, data in disk.snaps.items()}
        for kid in self.kids(disk, snap):
            assert kid.parent is not None
            kid.parent = (disk, new, kid.parent[2])
        if snap in disk.protected:
            disk.protected.remove(snap)
            disk.protected.add(new)

    def do_protect(self) -> None:
        chosen = self.snapshot()
        if chosen is None:
            return
        key, disk, snap = chosen
        if snap not in disk.protected:
            self.ask("image", *key, "protect_snap", snap)
            disk.protected.add(snap)
        elif self.kids(disk, snap, 1):
            self.ask("image", *key, "unprotect_snap", snap, error="ImageBusy")
        else:
            self.ask("image", *key, "unprotect_snap", snap)
            disk.protected.remove(snap)

    def do_rollback(self) -> None:
        chosen = self.snapshot()
        if chosen is not None:
            key, disk, snap = chosen
            self.ask("rollback", *key, snap, first=disk.doubted)  # librbd 16 takes a map that is marked invalid
            disk.head = disk.snaps[snap]

    def do_clone(self) -> None:
        chosen = self.snapshot()
        if chosen is None or len(self.disks) >= MAX_IMAGES or not chosen[1].snaps[chosen[2]]:
            return
        key, disk, snap = chosen
        form = 1 if snap in disk.protected and self.random.random() < 0.5 else 2
        to = key[0] if form == 1 else self.random.choice(PLACES)
        child, features, order = self.name("i"), self.random.choice(SETS), self.random.choice((14, 15))
        self.ask("clone", *key, snap, to, child, features, order, form)
        self.disks[to, child] = Disk(
            disk.snaps[snap],
            features,
            metadata=dict(disk.metadata),
            parent=(disk, snap, form),
            grain=disk.grain and 1 << order,
        )

    def do_flatten(self) -> None:
        chosen = self.pick(lambda disk: disk.parent and not disk.snaps and not self.in_groups(disk))
        if chosen is not None and not self.kids(chosen[1]):
            self.ask("image", *chosen[0], "flatten")
            chosen[1].parent = None

    # --- trash

    def do_trash(self) -> None:
        chosen = self.pick(lambda disk: disk.group is None)
        if chosen is None:
            return
        key, disk = chosen
        self.alone(key)
        disk.delayed = self.random.random() < 0.3
        self.ask("trash_move", *key, 100000 if disk.delayed else 0)
        self.trash[key] = self.disks.pop(key)

    def do_restore(self) -> None:
        if self.trash:
            key = self.random.choice(list(self.trash))
            new = self.random.choice((key[1], self.name("i")))
            self.ask("trash_restore", *key, new)
            self.disks[key[0], new] = self.trash.pop(key)

    def do_trash_remove(self) -> None:
        if not self.trash:
            return
        key = self.random.choice(list(self.trash))
        disk, force = self.trash[key], self.random.random() < 0.5
        if disk.delayed and not force:
            self.ask("trash_remove", *key, force, error="PermissionError")
        elif not self.bare(disk):
            self.ask("trash_remove", *key, force, error="ImageHasSnapshots")
        else:
            self.ask("trash_remove", *key, force)
            del self.trash[key]

    def do_purge(self) -> None:
        place = self.random.choice(PLACES)
        here = {key: disk for key, disk in self.trash.items() if key[0] == place}
        if here and all(self.bare(disk) for disk in here.values()):
            self.ask("trash_purge", place)
            for key, disk in here.items():
                if not disk.delayed:
                    del self.trash[key]

    # --- groups and namespaces

    def a_group(self) -> tuple[tuple[str, str], Group] | None:
        return self.random.choice(list(self.groups.items())) if self.groups else None

    def do_group_create(self) -> None:
        if len(self.groups) < 3:
            place, name = self.random.choice(GROUP_PLACES), self.name("g")
            self.ask("pool", place, "group_create", name)
            self.groups[place, name] = Group()

    def do_group_add(self) -> None:
        chosen = self.a_group()
        if chosen is None:
            self.do_group_create()
            return
        key, group = chosen
        free = [row for row in self.disks.items() if row[0][0] == key[0] and row[1].group is None]
        if free:
            image, disk = self.random.choice(free)
            self.ask("member", *key, "add_image", image[1])
            group.members.append(disk)
            disk.group = key[1]

    def do_group_leave(self) -> None:
        chosen = self.a_group()
        if chosen is not None and chosen[1].members and self.random.random() < 0.6:
            key, group = chosen
            disk = self.random.choice(group.members)
            image = next(name for (_, name), row in self.disks.items() if row is disk)
            self.ask("member", *key, "remove_image", image)
            group.members.remove(disk)
            disk.group = None

    def do_group_rename(self) -> None:
        chosen = self.a_group()
        if chosen is not None:
            key, group = chosen
            new = self.name("g")
            self.ask("pool", key[0], "group_rename", key[1], new)
            self.groups[key[0], new] = self.groups.pop(key)
            for disk in group.members:
                disk.group = new

    def do_group_snap(self) -> None:
        chosen = self.a_group()
        if chosen is not None and chosen[1].members and len(chosen[1].snaps) < MAX_SNAPS:
            key, group = chosen
            snap = self.name("gs")
            self.ask("group", *key, "create_snap", snap)
            group.snaps[snap] = {disk: disk.head for disk in group.members}

    def group_snapshot(self) -> tuple[tuple[str, str], Group, str] | None:
        found = [(key, group, snap) for key, group in self.groups.items() for snap in group.snaps]
        return self.random.choice(found) if found else None

    def do_group_rollback(self) -> None:
        chosen = self.group_snapshot()
        if chosen is not None and not any(disk in self.trash.values() for disk in chosen[1].snaps[chosen[2]]):
            key, group, snap = chosen
            self.ask("group", *key, "rollback_to_snap", snap, first=any(disk.doubted for disk in group.snaps[snap]))
            for disk, data in group.snaps[snap].items():
                disk.head = data

    def do_group_snap_rename(self) -> None:
        chosen = self.group_snapshot()
        if chosen is not None:
            key, group, snap = chosen
            new = self.name("gs")
            self.ask("group", *key, "rename_snap", snap, new)
            group.snaps[new] = group.snaps.pop(snap)

    def do_group_snap_remove(self) -> None:
        chosen = self.group_snapshot()
        if chosen is not None and not any(disk in self.trash.values() for disk in chosen[1].snaps[chosen[2]]):
            self.ask("group", *chosen[0], "remove_snap", chosen[2])
            del chosen[1].snaps[chosen[2]]

    def do_group_remove(self) -> None:
        chosen = self.a_group()
        if chosen is None or (chosen[1].members and self.random.random() < 0.8):
            return
        if any(disk in self.trash.values() for held in chosen[1].snaps.values() for disk in held):
            return
        key, group = chosen
        self.ask("pool", key[0], "group_remove", key[1])
        for disk in group.members:
            disk.group = None
        del self.groups[key]

    def do_namespace(self) -> None:
        """One that is empty comes and goes, one in use stays."""
        name = self.name("n")
        self.ask("pool", "rbd", "namespace_create", name)
        self.ask("pool", "rbd", "namespace_create", name, error="ImageExists")
        self.ask("pool", "rbd", "namespace_remove", name)
        if any(place == "rbd/space" for place, _ in self.disks):
            self.ask("pool", "rbd", "namespace_remove", "space", error="ImageBusy")


def digest(data: bytes) -> list[Any]:
    return [len(data), hashlib.sha256(data).hexdigest()]


def differences(found: Any, wanted: Any, where: str = "") -> str:
    """The leaves that differ, each with its path."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        rows = [differences(found.get(key), wanted.get(key), f"{where}/{key}") for key in sorted({*found, *wanted})]
        return "\n".join(row for row in rows if row)
    return "" if found == wanted else f"{where}: {found!r}\n    for {wanted!r}"


def shrink(program: list[int], fails: Callable[[list[int]], bool], tries: int = 60) -> list[int]:
    """A shorter program that fails, too."""
    size = len(program) // 2
    while size and tries:
        at = 0
        while at < len(program) and tries:
            shorter = program[:at] + program[at + size :]
            tries -= 1
            if shorter and fails(shorter):
                program = shorter
            else:
                at += size
        size //= 2
    return program
