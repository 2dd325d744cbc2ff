"""Bytes that a real Ceph 16.2.15 wrote or sent, decoded and encoded back."""

from __future__ import annotations

import pytest

from librbd_py.format import features, group, header, lock, notify, object_map, trash
from librbd_py.format.encoding import NEVER, DecodeError, Decoder, Encoder, Time
from librbd_py.format.header import NOSNAP


def hexa(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


# --- snapshots, parents, children


def test_a_protected_snapshot() -> None:
    raw = hexa(
        "0808 36000000 0400000000000000 02000000 7331 0000a00000000000 02 0000000000000000 0101 04000000 00000000"
        "3bc0026ba17def32 00000000 00"
    )
    snap = header.Snap.decode(raw)
    assert snap == header.Snap(
        4, "s1", 10 << 20, header.PROTECTION_PROTECTED, 0, header.USER, Time(0x6B02C03B, 0x32EF7DA1), 0, None
    )
    assert snap.encode() == raw


def test_a_snapshot_in_the_trash() -> None:
    raw = hexa(
        "080862000000050000000000000024000000"
        + b"a83b05be-feb9-45b8-b602-5dfafb3faf1e".hex()
        + "0000400100000000000000000000000000"
        "01010e0000000200000002000000733200000000"
        "a2c8026bbfb691080100000000"
    )
    snap = header.Snap.decode(raw)
    assert snap.namespace == header.TrashNamespace("s2", header.NAMESPACE_USER)
    assert (snap.name, snap.child_count, snap.image_size) == ("a83b05be-feb9-45b8-b602-5dfafb3faf1e", 1, 20 << 20)
    assert snap.encode() == raw


@pytest.mark.parametrize("overlap", [None, 5])
def test_a_snapshot_as_written_before_nautilus(overlap: int | None) -> None:
    """compat below 8: features, and a whole parent record, follow the size."""
    out = Encoder()
    with out.struct(6, 1):
        out.u64(7).string("old").u64(99).u64(0x3D)
        with out.struct(1, 1):
            out.s64(-1 if overlap is None else 3).string("" if overlap is None else "id").u64(4).u64(overlap or 0)
        out.u8(1).u64(2)
        header.encode_namespace(out, header.USER)
        out.time(Time(1, 2))
    snap = header.Snap.decode(out.done())
    assert snap == header.Snap(7, "old", 99, 1, 2, header.USER, Time(1, 2), 0, overlap)


def test_the_parent_record() -> None:
    raw = hexa("02022d0000000800000000000000000000000c0000003161646162336662306566660400000000000000010000400100000000")
    parent = header.Parent.decode(raw)
    assert parent == header.Parent(header.ParentImageSpec(8, "", "1adab3fb0eff", 4), 20 << 20)
    assert parent.encode() == raw and parent.exists


def test_no_parent() -> None:
    raw = hexa("010118000000 ffffffffffffffff 00000000 00000000 feffffffffffffff")
    spec = header.ParentImageSpec.decode(Decoder(raw))
    assert spec == header.ParentImageSpec(-1, "", "", NOSNAP) and not spec.exists
    out = Encoder()
    spec.encode(out)
    assert out.done() == raw


def test_children_of_a_snapshot() -> None:
    raw = hexa("0100000002011c00000008000000000000000c00000031623236396438343065356400000000")
    assert header.decode_children(raw) == {header.ChildImageSpec(8, "1b269d840e5d", "")}
    assert header.encode_children(header.decode_children(raw)) == raw


def test_the_namespaces_of_snapshots() -> None:
    user = hexa("0101 04000000 00000000")
    assert header.decode_namespace(Decoder(user)) == header.USER
    unknown = hexa("0101 06000000 09000000 abcd")
    assert header.decode_namespace(Decoder(unknown)) == header.UnknownNamespace(9, b"\xab\xcd")
    out = Encoder()
    header.encode_namespace(out, header.UnknownNamespace(9, b"\xab\xcd"))
    assert out.done() == unknown


def test_the_snap_context_is_newest_first() -> None:
    raw = hexa("0500000000000000 02000000 0500000000000000 0400000000000000")
    assert header.SnapContextReply.decode(raw) == header.SnapContextReply(5, (5, 4))
    assert header.SnapContextReply(5, (5, 4)).encode() == raw
    for bad in (
        "0500000000000000 02000000 0400000000000000 0500000000000000",
        "0300000000000000 01000000 04" + "00" * 7,
    ):
        with pytest.raises(DecodeError):
            header.SnapContextReply.decode(hexa(bad))


def test_migration_announces_its_source_spec() -> None:
    spec = header.MigrationSpec(1, 2, "", "n", "id", {5: 6}, 7, True, False, 2, "text", 1, "")
    assert spec.encode()[:2] == hexa("0301")
    sourced = header.MigrationSpec(2, -1, "", "n", "id", source_spec="{}")
    assert sourced.encode()[:2] == hexa("0303")
    assert header.MigrationSpec.decode(spec.encode()) == spec
    assert header.MigrationSpec.decode(sourced.encode()) == sourced


# --- trash, groups


def test_a_trash_record() -> None:
    raw = hexa("0201 18000000 00 02000000 7431 a2c8026bbfb69108 a2c8026bbfb69109 00")
    spec = trash.TrashImageSpec.decode(raw)
    assert (spec.source, spec.name, spec.state) == (trash.SOURCE_USER, "t1", trash.STATE_NORMAL)
    assert spec.encode() == raw


def test_the_trash_tells_of_images() -> None:
    spec = trash.TrashImageSpec(3, "n", NEVER, NEVER, 2)
    for message in (trash.ImageAdded("id", spec), trash.ImageRemoved("id")):
        assert trash.decode_notify(trash.encode_notify(message)) == message


def test_group_records() -> None:
    spec = group.GroupSpec(2, "g2")
    assert spec.encode() == hexa("01010e0000000200000000000000020000006732")
    assert group.GroupSpec.decode(spec.encode()) == spec and spec.exists
    assert group.GroupImageSpec("i1", 20).key == b"image_0000000000000014_i1"
    snapshot = group.GroupSnapshot("s1", "n1", 1, (group.ImageSnapshotSpec(1, "i0", 0),))
    raw = hexa(
        "01012d000000 02000000 7331 02000000 6e31 01 01000000 010116000000 01" + "00" * 7 + "02000000 6930" + "00" * 8
    )
    assert snapshot.encode() == raw
    assert group.GroupSnapshot.decode(raw) == snapshot


# --- locks


def test_a_lock_that_is_held() -> None:
    raw = hexa(
        "01016d0000000100000001012100000008ec1a000000000000140000006175746f20313430363436353535383732383030"
        "01012f00000000000000000000000101011c0000000100000033c9e66310000000020000007f0000010000000000000000"
        "000000000108000000696e7465726e616c"
    )
    state = lock.LockState.decode(raw)
    ((who, info),) = state.lockers.items()
    assert who == lock.LockerId(lock.EntityName(8, 6892), "auto 140646555872800")
    assert info.address.text == "127.0.0.1:0/1676069171" and not info.expiration
    assert (state.type, state.tag) == (lock.LOCK_EXCLUSIVE, "internal")
    assert state.encode() == raw


def test_a_lock_that_was_given_back_and_one_that_never_was() -> None:
    given_back = hexa("0101 11000000 00000000 01 08000000 696e7465726e616c")
    assert lock.LockState.decode(given_back) == lock.LockState({}, 1, "internal")
    assert lock.LockState({}, 1, "internal").encode() == given_back
    assert lock.LockState().encode() == hexa("0101 09000000 00000000 00 00000000")


def test_cookies_of_automatic_locks() -> None:
    assert lock.auto_cookie(139681798820480) == "auto 139681798820480"
    assert lock.parse_auto_cookie("auto 18446462598732840961") == 18446462598732840961
    for other in (
        "auto",
        "auto ",
        "auto x",
        "auto -1",
        "auto 1 ",
        "Auto 1",
        "auto 18446744073709551616",
        "auto \u0661",
    ):
        assert lock.parse_auto_cookie(other) is None


@pytest.mark.parametrize("text", ["127.0.0.1:0/1676069171", "[fe80::1]:6789/0", "10.0.0.1:65535/4294967295"])
def test_addresses(text: str) -> None:
    address = lock.EntityAddress.parse(text)
    assert address.text == text and address.type == lock.ADDRESS_LEGACY
    out = Encoder()
    address.encode(out)
    assert lock.EntityAddress.decode(Decoder(out.done())) == address


@pytest.mark.parametrize("text", ["", "1.2.3.4", "1.2.3.4:1", "1.2.3.4:99999/1", "1.2.3.4:1/4294967296", "[::1]/1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError):
        lock.EntityAddress.parse(text)


# --- object map


def test_the_golden_object_map() -> None:
    raw = hexa("0e000000 010108000000 0a00000000000000 708000 0c000000 c644f43a 01000000 befc40ad")
    states = bytes([1, 3, 0, 0, 2, 0, 0, 0, 0, 0])
    assert object_map.decode(raw) == states
    assert object_map.encode(states) == raw
    assert object_map.encode(states, crc=False) == raw[:21] + bytes(4)


@pytest.mark.parametrize(
    ("raw", "states"),
    [
        ("0e000000010108000000050000000000000000000c000000184596820100000000000000", "00000"),
        ("0e000000010108000000050000000000000050000c00000018459682010000008537d2c0", "11000"),
        ("0e0000000101080000000500000000000000fc000c00000018459682010000001a8c0497", "33300"),
        ("0e00000001010800000005000000000000007c000c0000001845968201000000e376c76c", "13300"),
    ],
)
def test_object_maps_of_a_dump(raw: str, states: str) -> None:
    assert object_map.decode(hexa(raw)) == bytes(int(state) for state in states)
    assert object_map.encode(bytes(int(state) for state in states)) == hexa(raw)


def test_a_damaged_object_map_is_noticed() -> None:
    raw = bytearray(object_map.encode(bytes([1]) * 40000))
    for at in (12, 18, 5000, len(raw) - 1):
        damaged = bytearray(raw)
        damaged[at] ^= 1
        with pytest.raises(DecodeError):
            object_map.decode(bytes(damaged))


def test_crc32c_against_a_bitwise_one() -> None:
    def slow(data: bytes) -> int:
        crc = 0
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        return crc

    for data in (b"", b"\0", b"a", b"ab", b"abc", b"abcd", bytes(range(256)), b"\0\0\0a", b"a" + bytes(100)):
        assert object_map.crc32c(data) == slow(data)


# --- notify


CLIENT = notify.ClientId(0x104B, 0x7FCC2C004960)
REQUEST = notify.AsyncRequestId(CLIENT, 1)
IDENTITY = "4b10000000000000 6049002ccc7f0000"


@pytest.mark.parametrize(
    ("message", "raw"),
    [
        (notify.AcquiredLock(CLIENT), "0701 14000000 00000000" + IDENTITY),
        (notify.ReleasedLock(CLIENT), "0701 14000000 01000000" + IDENTITY),
        (notify.RequestLock(CLIENT), "0701 15000000 02000000" + IDENTITY + "00"),
        (notify.HeaderUpdate(), "0701 04000000 03000000"),
        (notify.Quiesce(REQUEST), "0701 1c000000 12000000" + IDENTITY + "0100000000000000"),
        (
            notify.SnapCreate("a", header.USER, REQUEST, 0),
            "0701 33000000 08000000 01000000 61 0101 04000000 00000000"
            + IDENTITY
            + "0100000000000000 0000000000000000",
        ),
        (
            notify.MetadataUpdate("k", "v", REQUEST),
            "0701 27000000 14000000 01000000 6b 01 01000000 76" + IDENTITY + "0100000000000000",
        ),
        (
            notify.MetadataUpdate("k", None, REQUEST),
            "0701 22000000 14000000 01000000 6b 00" + IDENTITY + "0100000000000000",
        ),
        (notify.AsyncComplete(REQUEST, 0), "0701 20000000 05000000" + IDENTITY + "0100000000000000 00000000"),
        (notify.AsyncComplete(REQUEST, -95), "0701 20000000 05000000" + IDENTITY + "0100000000000000 a1ffffff"),
    ],
)
def test_notify_messages_seen_on_the_wire(message: notify.Message, raw: str) -> None:
    assert notify.decode(hexa(raw)) == message
    assert notify.encode(message) == hexa(raw)


def test_the_empty_notify_is_a_header_update() -> None:
    assert notify.decode(b"") == notify.HeaderUpdate()


def test_an_unknown_op_is_kept() -> None:
    raw = hexa("0901 06000000 63000000 abcd")
    assert notify.decode(raw) == notify.Unknown(99, b"\xab\xcd")


def test_old_messages_lack_the_request() -> None:
    out = Encoder()
    with out.struct(4, 1):
        out.u32(8).string("snap")
    assert notify.decode(out.done()) == notify.SnapCreate("snap", header.USER, None, 0)
    out = Encoder()
    with out.struct(3, 1):
        out.u32(7).u64(4096).u64(1).u64(2).u64(3)
    request = notify.AsyncRequestId(notify.ClientId(1, 2), 3)
    assert notify.decode(out.done()) == notify.Resize(4096, request, allow_shrink=True)


def test_messages_as_krbd_writes_them() -> None:
    """Version 2, which has no `force`."""
    client = notify.ClientId(0x100A, 0xFFFF888012345678)
    for op, message in ((0, notify.AcquiredLock), (1, notify.ReleasedLock), (2, notify.RequestLock)):
        raw = f"0201 14000000 {op:02x}000000 0a10000000000000 785634128088ffff"
        assert notify.decode(bytes.fromhex(raw)) == message(client)


def test_responses() -> None:
    assert notify.encode_response(0) == hexa("0101 04000000 00000000")
    assert notify.decode_response(hexa("0101 04000000 e2ffffff")) == -30
    assert notify.decode_response(b"") is None


def test_the_reply_of_a_notify() -> None:
    acks, silent = {(1, 2): b"x", (3, 4): b""}, [(5, 6)]
    assert notify.decode_reply(notify.encode_reply(acks, silent)) == (acks, silent)


# --- features


def test_features_as_ceph_counts_them() -> None:
    assert features.DEFAULT == 0x3D and features.ALL == 0xFFF
    assert features.incompatible(0x3D, read_only=False) == 0x3D
    assert features.incompatible(0x3D, read_only=True) == 0x1
    assert features.INCOMPATIBLE == 0x883 and features.RW_INCOMPATIBLE == 0xFFF
    assert features.names(0x83) == ["layering", "striping", "data-pool"]
    assert features.parse(["layering", "deep-flatten"]) == 0x21
    assert features.required(features.FAST_DIFF) == 0x1C
    assert features.missing(features.OBJECT_MAP) is not None and features.missing(0x3D) is None
    with pytest.raises(ValueError, match="nonsense"):
        features.parse(["nonsense"])
