"""Every format: what is encoded decodes to itself; garbage is refused with one type of error, in bounded memory."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from librbd_py.format import group, header, lock, notify, object_map, trash
from librbd_py.format.encoding import DecodeError, Decoder, EncodeError, Encoder, Time

u8 = st.integers(0, 255)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
s64 = st.integers(-(1 << 63), (1 << 63) - 1)
s32 = st.integers(-(1 << 31), (1 << 31) - 1)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
times = st.builds(Time, u32, u32)

namespaces = st.one_of(
    st.just(header.USER),
    st.builds(header.GroupNamespace, s64, text, text),
    st.builds(header.TrashNamespace, text, u32),
    st.builds(
        header.MirrorNamespace,
        u8,
        st.booleans(),
        st.lists(text, max_size=3, unique=True).map(lambda peers: tuple(sorted(peers))),
        text,
        u64,
        u64,
        st.dictionaries(u64, u64, max_size=3),
    ),
    st.builds(header.UnknownNamespace, st.integers(4, 1 << 31), st.binary(max_size=20)),
)
overlaps = st.none() | u64
parent_specs = st.builds(header.ParentImageSpec, s64, text, text, u64)
snaps = st.builds(header.Snap, u64, text, u64, u8, u64, namespaces, times, u32, overlaps)
entities = st.builds(lock.EntityName, u8, s64)
addresses = st.one_of(
    st.builds(lock.EntityAddress, u32, u32),
    st.builds(lock.EntityAddress, u32, u32, st.just(2), st.integers(0, 65535), st.binary(min_size=4, max_size=4)),
    st.builds(
        lock.EntityAddress, u32, u32, st.just(10), st.integers(0, 65535), st.binary(min_size=16, max_size=16), u32, u32
    ),
    st.builds(lock.EntityAddress, u32, u32, st.just(77), extra=st.binary(max_size=20)),
)
lock_states = st.builds(
    lock.LockState,
    st.dictionaries(
        st.builds(lock.LockerId, entities, text), st.builds(lock.LockerInfo, times, addresses, text), max_size=3
    ),
    u8,
    text,
)
migrations = st.builds(
    header.MigrationSpec, u8, s64, text, text, text, st.dictionaries(u64, u64, max_size=3), u64, st.booleans(),
    st.booleans(), u8, text, u8, text,
)  # fmt: skip
trash_specs = st.builds(trash.TrashImageSpec, u8, text, times, times, u8)
group_snapshots = st.builds(
    group.GroupSnapshot,
    text,
    text,
    u8,
    st.lists(st.builds(group.ImageSnapshotSpec, s64, text, u64), max_size=3).map(tuple),
)
clients = st.builds(notify.ClientId, u64, u64)
requests = st.builds(notify.AsyncRequestId, clients, u64)
messages = st.one_of(
    st.builds(notify.AcquiredLock, clients),
    st.builds(notify.ReleasedLock, clients),
    st.builds(notify.RequestLock, clients, st.booleans()),
    st.just(notify.HeaderUpdate()),
    st.builds(notify.AsyncProgress, requests, u64, u64),
    st.builds(notify.AsyncComplete, requests, s32),
    *[
        st.builds(kind, requests)
        for kind in (notify.Flatten, notify.RebuildObjectMap, notify.Migrate, notify.Quiesce, notify.Unquiesce)
    ],
    st.builds(notify.Resize, u64, requests, st.booleans()),
    st.builds(notify.SnapCreate, text, namespaces, requests, u64),
    *[
        st.builds(kind, text, namespaces, requests)
        for kind in (notify.SnapRemove, notify.SnapProtect, notify.SnapUnprotect)
    ],
    st.builds(notify.SnapRename, u64, text, namespaces, requests),
    st.builds(notify.Rename, text, requests),
    st.builds(notify.UpdateFeatures, u64, st.booleans(), requests),
    st.builds(notify.Sparsify, requests, u64),
    st.builds(notify.MetadataUpdate, text, st.none() | text, requests),
    st.builds(notify.Unknown, st.integers(21, 1 << 31), st.binary(max_size=20)),
)


def _with(encode: Callable[[Any, Encoder], None]) -> Callable[[Any], bytes]:
    def run(value: Any) -> bytes:
        out = Encoder()
        encode(value, out)
        return out.done()

    return run


def _from(decode: Callable[[Decoder], Any]) -> Callable[[bytes], Any]:
    return lambda data: decode(Decoder(data))


# name: (values, encode, decode)
FORMATS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "namespace": (namespaces, _with(lambda v, o: header.encode_namespace(o, v)), _from(header.decode_namespace)),
    "parent spec": (parent_specs, _with(lambda v, o: v.encode(o)), _from(header.ParentImageSpec.decode)),
    "parent": (st.builds(header.Parent, parent_specs, overlaps), header.Parent.encode, header.Parent.decode),
    "children": (
        st.frozensets(st.builds(header.ChildImageSpec, s64, text, text), max_size=4),
        header.encode_children,
        header.decode_children,
    ),
    "snapshot": (snaps, header.Snap.encode, header.Snap.decode),
    "snapshot info": (
        st.builds(header.SnapshotInfo, u64, namespaces, text, u64, times, u32),
        header.SnapshotInfo.encode,
        header.SnapshotInfo.decode,
    ),
    "snap context": (
        st.frozensets(u64, max_size=5).map(
            lambda ids: header.SnapContextReply(max(ids, default=0), tuple(sorted(ids, reverse=True)))
        ),
        header.SnapContextReply.encode,
        header.SnapContextReply.decode,
    ),
    "migration": (migrations, header.MigrationSpec.encode, header.MigrationSpec.decode),
    "trash": (trash_specs, trash.TrashImageSpec.encode, trash.TrashImageSpec.decode),
    "trash notify": (
        st.builds(trash.ImageAdded, text, trash_specs) | st.builds(trash.ImageRemoved, text),
        trash.encode_notify,
        trash.decode_notify,
    ),
    "group": (st.builds(group.GroupSpec, s64, text), group.GroupSpec.encode, group.GroupSpec.decode),
    "group image": (
        st.builds(group.GroupImageStatus, st.builds(group.GroupImageSpec, text, s64), u8),
        _with(lambda v, o: v.encode_to(o)),
        _from(group.GroupImageStatus.decode_from),
    ),
    "group snapshot": (group_snapshots, group.GroupSnapshot.encode, group.GroupSnapshot.decode),
    "lock": (lock_states, lock.LockState.encode, lock.LockState.decode),
    "lock request": (
        st.builds(lock.LockRequest, text, u8, text, text, text, times, u8),
        lock.LockRequest.encode,
        lock.LockRequest.decode,
    ),
    "unlock request": (st.builds(lock.UnlockRequest, text, text), lock.UnlockRequest.encode, lock.UnlockRequest.decode),
    "break request": (
        st.builds(lock.BreakRequest, text, entities, text),
        lock.BreakRequest.encode,
        lock.BreakRequest.decode,
    ),
    "info request": (st.builds(lock.InfoRequest, text), lock.InfoRequest.encode, lock.InfoRequest.decode),
    "assert request": (
        st.builds(lock.AssertRequest, text, u8, text, text),
        lock.AssertRequest.encode,
        lock.AssertRequest.decode,
    ),
    "cookie request": (
        st.builds(lock.SetCookieRequest, text, u8, text, text, text),
        lock.SetCookieRequest.encode,
        lock.SetCookieRequest.decode,
    ),
    "lock names": (st.lists(text, max_size=4), lock.encode_lock_names, lock.decode_lock_names),
    "notify": (messages, notify.encode, notify.decode),
    "response": (s32, notify.encode_response, notify.decode_response),
    "object map": (st.lists(st.integers(0, 3), max_size=40).map(bytes), object_map.encode, object_map.decode),
}


@pytest.mark.parametrize("name", list(FORMATS))
def test_what_is_encoded_decodes_to_itself(name: str) -> None:
    values, encode, decode = FORMATS[name]

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(values)
    def check(value: Any) -> None:
        raw = encode(value)
        assert decode(raw) == value
        assert encode(decode(raw)) == raw

    check()


@pytest.mark.parametrize("name", list(FORMATS))
def test_garbage_is_refused_with_one_type_of_error(name: str) -> None:
    values, encode, decode = FORMATS[name]

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        raw = bytearray(data.draw(st.binary(max_size=60)) if data.draw(st.booleans()) else encode(data.draw(values)))
        if raw:
            for _ in range(data.draw(st.integers(0, 3))):
                raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(u8)
            del raw[data.draw(st.integers(0, len(raw))) if data.draw(st.booleans()) else len(raw) :]
        try:
            decode(bytes(raw))
        except DecodeError as e:
            assert e.strerror

    check()


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_truncated_value_is_never_taken_for_a_whole_one(name: str) -> None:
    values, encode, decode = FORMATS[name]

    @settings(max_examples=15, deadline=None, database=None, derandomize=True)
    @given(values)
    def check(value: Any) -> None:
        raw = encode(value)
        for length in range(1, len(raw)):
            with pytest.raises(DecodeError):
                decode(raw[:length])

    check()


@pytest.mark.parametrize("name", list(FORMATS))
def test_huge_counts_allocate_nothing(name: str) -> None:
    """Lengths and counts of all ones in every place."""
    values, encode, decode = FORMATS[name]
    samples: list[bytes] = []

    @settings(max_examples=8, deadline=None, database=None, derandomize=True)
    @given(values)
    def collect(value: Any) -> None:
        samples.append(encode(value))

    collect()
    tracemalloc.start()
    try:
        for raw in samples:
            for at in range(max(0, len(raw) - 3)):
                try:
                    decode(raw[:at] + b"\xff\xff\xff\x7f" + raw[at + 4 :])
                except DecodeError:
                    pass
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_newer_writers_may_append_fields() -> None:
    raw = bytearray(header.Parent(header.ParentImageSpec(1, "", "id", 2), 3).encode())
    raw[0] = 9
    raw[2] += 4
    assert header.Parent.decode(bytes(raw) + b"more").head_overlap == 3
    raw[1] = 9
    with pytest.raises(DecodeError, match="version"):
        header.Parent.decode(bytes(raw) + b"more")


def test_text_that_is_not_utf8_survives() -> None:
    raw = Encoder().blob(b"\xff\xfea").done()
    name = Decoder(raw).string()
    assert Encoder().string(name).done() == raw


@pytest.mark.parametrize("call", ["u8", "u16", "u32", "u64"])
def test_a_value_that_does_not_fit_is_the_callers_mistake(call: str) -> None:
    for value in (-1, 1 << 64):
        with pytest.raises(EncodeError):
            getattr(Encoder(), call)(value)


def test_a_large_object_map_takes_milliseconds() -> None:
    states = bytes(range(4)) * 65536
    best = 1.0
    for _ in range(5):
        object_map.crc32c.cache_clear()
        start = time.perf_counter()
        assert object_map.decode(object_map.encode(states)) == states
        best = min(best, time.perf_counter() - start)
    assert best < 0.1  # about 0.006 s on an idle machine
