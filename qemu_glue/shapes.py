"""The arguments of the daemon's QMP commands: names and types of qemu-storage-daemon's, where it has the command.

Source: QEMU 7.2's qapi/block-core.json and qapi/block-export.json. A union is chosen by its tag before its members
are checked (`driver`, `type`).
"""

from __future__ import annotations

from qemu_glue.arguments import Field

NODE_NAME = Field(str, required=True, max_length=31)

BLOCKDEV_RBD = {
    "driver": Field(str, required=True),
    "node-name": NODE_NAME,
    "pool": Field(str, required=True),
    "namespace": Field(str, default=""),
    "image": Field(str, required=True),
    "snapshot": Field(str),
    "conf": Field(str),  # a store URL or, for a cluster, its configuration file
    "user": Field(str),
    "read-only": Field(bool, default=False),
    "auto-read-only": Field(bool, default=False),
    "discard": Field(str, default="unmap", choices=("ignore", "unmap")),
    "cache": Field(dict, shape={"direct": Field(bool), "no-flush": Field(bool)}),
}

UNIX_ADDRESS = {"type": Field(str, required=True, choices=("unix",)), "path": Field(str, required=True, max_length=107)}

EXPORT_COMMON = {
    "type": Field(str, required=True),
    "id": Field(str, required=True, max_length=128),
    "node-name": Field(str, required=True),
    "writable": Field(bool, default=False),
    "writethrough": Field(bool, default=False),
    "iothread": Field(str),  # accepted: queues are spread over the reactors anyway
    "fixed-iothread": Field(bool, default=False),
    # beyond QEMU: which VM the disk is of, the same on both hosts of a migration ("uuid:..."), and whether it comes
    # here from another host, so that a stranger's lock meanwhile is refused
    "vm": Field(str, default="*", max_length=256),
    "incoming": Field(bool),
}
EXPORT_VHOST_USER_BLK = {
    **EXPORT_COMMON,
    "addr": Field(dict, required=True, shape=UNIX_ADDRESS),
    "logical-block-size": Field(int, default=512, low=512, high=65536),
    "num-queues": Field(int, default=1, low=1, high=64),
    # beyond QEMU: the socket's mode and group, the depth of a queue, the disk's serial number
    "queue-size": Field(int, default=256, low=2, high=1024),
    "serial": Field(str, default="", max_length=20),
    "socket-mode": Field(int, default=0o660, low=0, high=0o777),
    "socket-group": Field(str),
}
EXPORT_NBD = {
    **EXPORT_COMMON,
    "name": Field(str, max_length=4096),  # default: the node's name
    "description": Field(str, max_length=4096),
    "bitmaps": Field(list),
    "allocation-depth": Field(bool, default=False),
}
EXPORTS = {"vhost-user-blk": EXPORT_VHOST_USER_BLK, "nbd": EXPORT_NBD}

EXPORT_DEL = {
    "id": Field(str, required=True),
    "mode": Field(str, default="safe", choices=("safe", "hard")),
}
NODE_ONLY = {"node-name": Field(str, required=True)}
BLOCK_RESIZE = {"node-name": Field(str), "device": Field(str), "size": Field("size", required=True)}
QUERY_BLOCKSTATS = {"query-nodes": Field(bool, default=False)}
QUERY_NAMED_NODES = {"flat": Field(bool, default=False)}
THROTTLE = {
    "node-name": Field(str, required=True),
    "iops": Field("size", default=0),
    "bps": Field("size", default=0),
}
# QEMU's. Only totals can be limited here: what must be 0 is refused otherwise.
IO_THROTTLE = {
    "device": Field(str),
    "id": Field(str),
    **{name: Field("size", required=True) for name in ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")},
    **{f"{name}_max": Field("size", default=0) for name in ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")},
    "iops_size": Field("size", default=0),
}
NBD_SERVER_START = {
    "addr": Field(dict, required=True),
    "tls-creds": Field(str),
    "tls-authz": Field(str),
    "max-connections": Field(int, default=100, low=0, high=1 << 20),
}
SOCKET_ADDRESS = {
    "unix": {
        "type": Field(str, required=True),
        "data": Field(dict, required=True, shape={"path": Field(str, required=True)}),
    },
    "inet": {
        "type": Field(str, required=True),
        "data": Field(
            dict,
            required=True,
            shape={
                "host": Field(str, required=True),
                "port": Field(str, required=True, max_length=5),
                "to": Field(int),
                "ipv4": Field(bool),
                "ipv6": Field(bool),
                "keep-alive": Field(bool),
                "mptcp": Field(bool),
                "numeric": Field(bool),
            },
        ),
    },
}
NOTHING: dict[str, Field] = {}
