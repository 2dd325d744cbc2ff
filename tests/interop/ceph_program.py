"""A life of some images in stages, for any module with the interface of Ceph's `rbd`: ours and Ceph's own run the same
code (this file is also read by /usr/bin/python3, see ceph_peer.py). `facts` is everything such a module says of a pool.
"""

from __future__ import annotations

import hashlib
from typing import Any

MIB = 1 << 20
LAYERING, STRIPING, LOCK, MAP, DIFF, DEEP, DATA_POOL = 1, 2, 4, 8, 16, 32, 128
USUAL = LAYERING | LOCK | MAP | DIFF | DEEP


class Program:
    """`modules`: (rados, rbd). Pools must exist; the program fills an empty one."""

    def __init__(self, modules: tuple[Any, Any], conf: str, pool: str, data_pool: str) -> None:
        self.rados, self.rbd = modules
        self.cluster = self.rados.Rados(conffile=conf)
        self.cluster.conf_set("rbd_default_clone_format", "2")
        self.cluster.connect()
        self.io = self.cluster.open_ioctx(pool)
        self.data_pool = data_pool
        self.r = self.rbd.RBD()

    def close(self) -> None:
        self.io.close()
        self.cluster.shutdown()

    def image(self, name: str, **named: Any) -> Any:
        return self.rbd.Image(self.io, name, **named)

    def failure(self, call: Any) -> Any:
        """The class and errno of what a call raises."""
        try:
            return call()
        except self.rbd.Error as failure:
            return [type(failure).__name__, failure.errno]

    def make(self, name: str, create: Any) -> None:
        """With an id of the usual length: encodings that hold it then have equal lengths whoever made it."""
        for _ in range(50):
            create()
            with self.image(name) as image:
                usual = len(image.id()) == len(f"{self.cluster.get_instance_id():x}") + 8
            if usual:
                return
            self.r.remove(self.io, name)
        raise AssertionError("no id of the usual length")

    # --- stages, in order

    def init(self) -> None:
        self.r.pool_init(self.io, True)
        with self.cluster.open_ioctx(self.data_pool) as data:
            self.r.pool_init(data, True)

    def create(self) -> None:
        self.make("plain", lambda: self.r.create(self.io, "plain", 10 * MIB, order=20, features=USUAL))
        self.make("simple", lambda: self.r.create(self.io, "simple", 3 * MIB, features=LAYERING))
        self.make(
            "striped",
            lambda: self.r.create(
                self.io, "striped", 9 * MIB, order=20, features=USUAL | STRIPING, stripe_unit=65536, stripe_count=4
            ),
        )
        self.make(
            "split",
            lambda: self.r.create(self.io, "split", 5 * MIB, order=21, features=USUAL, data_pool=self.data_pool),
        )
        self.r.namespace_create(self.io, "space")

    def write(self) -> None:
        for name in ("plain", "simple", "striped", "split"):
            with self.image(name) as image:
                for at in range(0, image.size(), 700_001):
                    image.write(_bytes(name, at, 70_000)[: image.size() - at], at)
                image.metadata_set("maker", name)
                image.metadata_set("gone", "x")
                image.metadata_remove("gone")

    def snapshot(self) -> None:
        for name in ("plain", "simple", "striped", "split"):
            with self.image(name) as image:
                image.create_snap("one")
                image.write(_bytes(name, 1, MIB), MIB // 2)
                image.create_snap("two")
                image.create_snap("three")
                image.discard(2 * MIB, MIB)
                image.rename_snap("three", "drei")
                image.remove_snap("two")

    def clone(self) -> None:
        with self.image("plain") as parent:
            parent.protect_snap("one")
        with self.image("striped") as parent:
            parent.protect_snap("one")
        self.cluster.conf_set("rbd_default_clone_format", "1")
        self.make("old child", lambda: self.r.clone(self.io, "plain", "one", self.io, "old child", features=USUAL))
        self.cluster.conf_set("rbd_default_clone_format", "2")
        for child in ("child", "flat", "short"):
            self.make(child, lambda to=child: self.r.clone(self.io, "plain", "one", self.io, to, USUAL, 20))
        self.make(
            "striped child",
            lambda: self.r.clone(self.io, "striped", "one", self.io, "striped child", features=USUAL, order=22),
        )

    def use_clones(self) -> None:
        for name in ("old child", "child", "flat", "short", "striped child"):
            with self.image(name) as image:
                image.write(_bytes(name, 0, 5000), MIB + 17)
                image.create_snap("mine")
                image.write(_bytes(name, 1, 5000), 4 * MIB - 3)
                if name != "striped child":
                    image.discard(5 * MIB, MIB)  # a whole object

    def resize(self) -> None:
        with self.image("plain") as image:
            image.resize(14 * MIB + 4096)
            image.write(b"end", 14 * MIB)
        with self.image("striped") as image:
            image.resize(4 * MIB)
        with self.image("short") as image:
            image.resize(3 * MIB)
            image.resize(8 * MIB)

    def flatten(self) -> None:
        with self.image("flat") as image:
            image.flatten()

    def change(self) -> None:
        with self.image("split") as image:
            image.rollback_to_snap("one")
            image.set_snap_limit(7)
        with self.image("simple") as image:
            image.remove_snap("one")
            image.remove_snap("drei")
            image.update_features(LOCK, True)
            image.update_features(MAP | DIFF, True)
            image.rebuild_object_map()
        with self.image("striped") as image:
            image.update_features(MAP | DIFF, False)
        self.r.rename(self.io, "short", "renamed")
        self.r.create(self.io, "removed", MIB)
        self.r.remove(self.io, "removed")

    STAGES = ("create", "write", "snapshot", "clone", "use_clones", "resize", "flatten", "change")

    # --- what can be seen

    def facts(self) -> dict[str, Any]:
        return {name: self._facts_of(name) for name in sorted(self.r.list(self.io))} | {
            "namespaces": sorted(self.r.namespace_list(self.io))
        }

    def _facts_of(self, name: str) -> dict[str, Any]:
        with self.image(name, read_only=True) as image:
            stat = image.stat()
            found: dict[str, Any] = {
                "stat": [stat["size"], stat["order"], stat["num_objs"], stat["obj_size"], image.block_name_prefix()],
                "id": image.id(),
                "features": image.features(),
                "op_features": image.op_features(),
                "flags": image.flags(),
                "striping": [image.stripe_unit(), image.stripe_count()],
                "data pool": image.data_pool_id(),
                "metadata": sorted(image.metadata_list()),
                "limit": image.get_snap_limit(),
                "overlap": image.overlap(),
                "parent": self._parent(image),
                "created": str(image.create_timestamp()),
                "snapshots": {},
            }
            views: list[str | None] = [None, *(snap["name"] for snap in image.list_snaps())]
            for snap in image.list_snaps():
                found["snapshots"][snap["name"]] = [snap["id"], snap["size"], image.is_protected_snap(snap["name"])]
            found["children"] = {}
            for view in views:
                image.set_snap(view)
                content = hashlib.sha256(image.read(0, image.size())).hexdigest()
                found[f"content {view}"] = [content, image.overlap(), image.flags()]
                if view is not None:
                    found["children"][view] = sorted(child["image"] for child in image.list_children2())
            return found

    def _parent(self, image: Any) -> Any:
        try:
            return list(image.parent_info())
        except self.rbd.ImageNotFound:
            return None


def _bytes(*seed: object) -> bytes:
    *words, length = seed
    block = hashlib.sha256(repr(words).encode()).digest()
    return (block * (int(str(length)) // len(block) + 1))[: int(str(length))]
