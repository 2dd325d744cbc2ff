"""The `rados` face: what programs written for Ceph's module do, done here."""

from __future__ import annotations

import errno
import itertools
import json
import queue
import struct
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from librbd_py import rados, rbd

PATIENCE = 20.0
_names = itertools.count()


@pytest.fixture(params=["memory", "embedded"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory:rados{next(_names)}" if request.param == "memory" else f"embedded:{tmp_path / 'store'}"


@pytest.fixture
def cluster(url: str) -> Iterator[rados.Rados]:
    with rados.Rados(conf={"rbdpy_store": url}) as cluster:
        cluster.create_pool("data")
        yield cluster


@pytest.fixture
def ioctx(cluster: rados.Rados) -> Iterator[rados.Ioctx]:
    with cluster.open_ioctx("data") as ioctx:
        yield ioctx


# --- the connection ------------------------------------------------------------------------------------------------


def test_states_of_a_connection() -> None:
    cluster = rados.Rados(rados_id="me", conf={"rbdpy_store": "memory:states"})
    assert cluster.state == "configuring"
    with pytest.raises(rados.RadosStateError):
        cluster.list_pools()
    with pytest.raises(rados.RadosStateError):
        _ = cluster.store
    cluster.connect()
    assert cluster.list_pools() == []
    with pytest.raises(rados.RadosStateError):
        cluster.connect()
    cluster.shutdown()
    cluster.shutdown()
    with pytest.raises(rados.RadosStateError):
        cluster.get_fsid()


def test_name_and_id_exclude_each_other() -> None:
    with pytest.raises(rados.Error, match="both rados_id and name"):
        rados.Rados(rados_id="a", name="client.b")


def test_a_store_is_named_by_option_variable_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rados.Rados(conf={"rbdpy_store": "memory:named"}) as first:
        first.create_pool("here")
        file = tmp_path / "ceph.conf"
        file.write_text(
            "log_file = x ; why\n[global]\n\trbdpy store = memory:elsewhere\n[client.me]\nrbdpy-store=memory:named\n"
        )
        with rados.Rados(rados_id="me", conffile=str(file)) as second:
            assert second.list_pools() == ["here"]
            assert second.get_fsid() == first.get_fsid()
            assert second.get_instance_id() != first.get_instance_id()
            assert second.get_addrs() != first.get_addrs()
            assert second.conf_get("log file") == "x"
        with rados.Rados(rados_id="other", conffile=str(file)) as third:
            assert third.list_pools() == []
        monkeypatch.setenv("RBDPY_STORE", "memory:named")
        with rados.Rados() as fourth:
            assert fourth.list_pools() == ["here"]
        with rados.Rados(conffile="") as fifth:
            assert fifth.list_pools() == ["here"]


def test_configuration_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(rados.ObjectNotFound):
        rados.Rados(conffile=str(tmp_path / "none"))
    bad = tmp_path / "bad"
    bad.write_bytes(b"\xff\xfe[")
    with pytest.raises(rados.InvalidArgumentError):
        rados.Rados(conffile=str(bad))
    with pytest.raises(rados.InvalidArgumentError):
        rados.Rados(conf={"rbdpy_store": "nonsense:x"}).connect()
    monkeypatch.setenv("CEPH_CONF", str(tmp_path / "none"))
    with pytest.raises(rados.ObjectNotFound):
        rados.Rados(conf={"rbdpy_store": "ceph"}).connect()
    with pytest.raises(rados.InvalidArgumentError):
        rados.Rados(conf={"rbdpy_store": "ceph?name="}).connect()


def test_unknown_options_are_kept() -> None:
    cluster = rados.Rados(conf_defaults={"rbd_cache": "false"}, conf={"my own": "1"})
    assert (cluster.conf_get("rbd_cache"), cluster.conf_get("my_own"), cluster.conf_get("other")) == (
        "false",
        "1",
        None,
    )
    assert cluster.conf_parse_argv(["prog", "--my-own=2", "--rbd_cache", "true", "--strange", "x"]) == [
        "prog",
        "--strange",
        "x",
    ]
    assert (cluster.conf_get("my_own"), cluster.conf_get("rbd_cache")) == ("2", "true")
    with pytest.raises(TypeError):
        cluster.conf_set("x", 1)  # type: ignore[arg-type]


def test_pools(cluster: rados.Rados) -> None:
    assert cluster.pool_exists("data")
    assert not cluster.pool_exists("nope")
    pool_id = cluster.pool_lookup("data")
    assert pool_id is not None
    assert cluster.pool_lookup("nope") is None
    assert cluster.pool_reverse_lookup(pool_id) == "data"
    assert cluster.pool_reverse_lookup(999) is None
    with pytest.raises(rados.ObjectExists):
        cluster.create_pool("data")
    with pytest.raises(rados.ObjectNotFound):
        cluster.open_ioctx("nope")
    with pytest.raises(rados.ObjectNotFound):
        cluster.open_ioctx2(999)
    with cluster.open_ioctx2(pool_id) as ioctx:
        assert (ioctx.get_pool_id(), ioctx.get_pool_name(), ioctx.name) == (pool_id, "data", str(pool_id))
    cluster.create_pool("7", crush_rule=0, auid=1)
    with cluster.open_ioctx("7") as ioctx:
        assert ioctx.get_pool_name() == "7"
    cluster.delete_pool("7")
    with pytest.raises(rados.ObjectNotFound):
        cluster.delete_pool("7")


def test_commands_to_daemons_that_do_not_exist(cluster: rados.Rados) -> None:
    assert cluster.mon_command('{"prefix": "osd tree"}', b"")[0] == -errno.EOPNOTSUPP
    assert cluster.mon_command("[]", b"")[0] == -errno.EINVAL
    assert cluster.mon_command('{"prefix": "fsid"}', b"") == (0, f"{cluster.get_fsid()}\n".encode(), "")
    pools = "".join(f"{name}\n" for name in cluster.list_pools())
    assert cluster.mon_command('{"prefix": "osd pool ls"}', b"") == (0, pools.encode(), "")
    assert cluster.osd_command(0, "{}", b"")[0] == -errno.EOPNOTSUPP
    assert cluster.wait_for_latest_osdmap() == 0
    assert str(cluster.version()) == "3.0.0"
    with pytest.raises(rados.LogicError):
        cluster.monitor_log("loud", print)
    assert rados.MonitorLog(cluster, "info", print, None).level == "info"


def test_a_blocklisted_client_is_shut_out(cluster: rados.Rados, url: str) -> None:
    with rados.Rados(conf={"rbdpy_store": url}) as victim, victim.open_ioctx("data") as ioctx:
        ioctx.write_full("o", b"before")
        cluster.blocklist_add(victim.get_addrs())
        with pytest.raises(rados.ConnectionShutdown) as caught:
            ioctx.write_full("o", b"after")
        assert caught.value.errno == errno.ESHUTDOWN


# --- objects -------------------------------------------------------------------------------------------------------


def test_data_of_an_object(ioctx: rados.Ioctx) -> None:
    assert ioctx.write("o", b"hello") == 0
    assert ioctx.write("o", b"J") == 0
    assert ioctx.append("o", b" world") == 0
    assert ioctx.read("o") == b"Jello world"
    assert ioctx.read("o", 5, 6) == b"world"
    assert ioctx.read("o", 0) == b""
    assert ioctx.read("o", 10, 100) == b""
    assert ioctx.trunc("o", 4) == 0
    assert ioctx.stat("o")[0] == 4
    ioctx.writesame("o", b"ab", 6, 4)
    assert ioctx.read("o") == b"Jellababab"
    assert ioctx.write_full("o", b"new") == 0
    assert ioctx.read("o") == b"new"
    assert ioctx.remove_object("o") is True
    with pytest.raises(rados.ObjectNotFound) as caught:
        ioctx.read("o")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(rados.ObjectNotFound):
        ioctx.stat("o")


def test_names_are_strings_and_data_is_bytes(ioctx: rados.Ioctx) -> None:
    with pytest.raises(TypeError):
        ioctx.write("o", "text")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ioctx.write(7, b"")  # type: ignore[arg-type]
    ioctx.write(b"o", bytearray(b"x"))  # type: ignore[arg-type]
    assert ioctx.read("o") == b"x"


def test_comparison_says_where_it_differs(ioctx: rados.Ioctx) -> None:
    ioctx.write("o", b"abcd")
    assert ioctx.cmpext("o", b"bc", 1) == 0
    assert ioctx.cmpext("o", b"bX", 1) == -(rados.MAX_ERRNO + 1)
    with rados.WriteOpCtx() as op:
        op.cmpext(b"abXd")
        op.write_full(b"never")
        with pytest.raises(rados.ExtendMismatch) as caught:
            ioctx.operate_write_op(op, "o")
    assert caught.value.offset == 2
    assert ioctx.read("o") == b"abcd"


def test_xattrs(ioctx: rados.Ioctx) -> None:
    ioctx.write("o", b"")
    assert ioctx.set_xattr("o", "b", b"2") is True
    ioctx.set_xattr("o", "a", b"1\0")
    assert ioctx.get_xattr("o", "a") == b"1\0"
    assert list(ioctx.get_xattrs("o")) == [("a", b"1\0"), ("b", b"2")]
    assert ioctx.rm_xattr("o", "a") is True
    with pytest.raises(rados.NoData):
        ioctx.get_xattr("o", "a")


def test_omap(ioctx: rados.Ioctx) -> None:
    with rados.WriteOpCtx() as op:
        ioctx.set_omap(op, ("1", "2", "3", "p4"), (b"a", b"b", b"\xffc", b""))
        ioctx.operate_write_op(op, "o")
    with rados.ReadOpCtx() as read:
        everything, zero = ioctx.get_omap_vals(read, "", "", 10)
        after, _ = ioctx.get_omap_vals(read, "1", "", 1)
        prefixed, _ = ioctx.get_omap_vals(read, "", "p", -1)
        keys, _ = ioctx.get_omap_keys(read, "2", 10)
        some, _ = ioctx.get_omap_vals_by_keys(read, ("3", "nope", "1"))
        assert zero == 0
        ioctx.operate_read_op(read, "o")
        assert list(everything) == [("1", b"a"), ("2", b"b"), ("3", b"\xffc"), ("p4", b"")]
        assert next(after) == ("2", b"b")
        assert list(after) == []
        assert list(prefixed) == [("p4", b"")]
        assert list(keys) == [("3", None), ("p4", None)]
        assert list(some) == [("1", b"a"), ("3", b"\xffc")]
    with rados.WriteOpCtx() as op:
        ioctx.remove_omap_keys(op, ("1",))
        ioctx.remove_omap_range2(op, "3", "p4")
        ioctx.operate_write_op(op, "o")
    assert left(ioctx, "o") == ["2", "p4"]
    with rados.WriteOpCtx() as op:
        op.omap_cmp("2", "x")
        ioctx.clear_omap(op)
        with pytest.raises(rados.OSError) as caught:
            ioctx.operate_write_op(op, "o")
        assert caught.value.errno == errno.ECANCELED
    op = ioctx.create_write_op()
    op.omap_cmp("2", "a", rados.LIBRADOS_CMPXATTR_OP_GT)
    ioctx.clear_omap(op)
    ioctx.operate_write_op(op, "o")
    ioctx.release_write_op(op)
    assert left(ioctx, "o") == []
    with pytest.raises(rados.Error, match="same number"):
        ioctx.set_omap(rados.WriteOp().create(), ("1",), ())


def left(ioctx: rados.Ioctx, oid: str) -> list[str]:
    with rados.ReadOpCtx() as read:
        keys, _ = ioctx.get_omap_keys(read, "", 100)
        ioctx.operate_read_op(read, oid)
        return [key for key, _ in keys]


def test_what_waits_comes_after_what_was_begun_before(ioctx: rados.Ioctx) -> None:
    for turn in range(20):
        begun = [ioctx.aio_append(f"o{turn}", bytes([number])) for number in range(10)]
        assert ioctx.read(f"o{turn}") == bytes(range(10))
        assert all(completion.is_complete() for completion in begun[:-1])


def test_a_list_of_changes_is_all_or_nothing(ioctx: rados.Ioctx) -> None:
    with rados.WriteOpCtx() as op:
        op.new(rados.LIBRADOS_CREATE_EXCLUSIVE)
        op.write(b"0123456789")
        op.zero(2, 3)
        op.truncate(8)
        op.append(b"!")
        op.set_xattr("x", b"y")
        op.set_flags(rados.LIBRADOS_OP_FLAG_FADVISE_DONTNEED)
        ioctx.operate_write_op(op, "o")
        assert ioctx.read("o") == b"01\0\0\x00567!"
        ioctx.operate_write_op(op, "o")  # the list is empty now, as in librados
        assert ioctx.read("o") == b"01\0\0\x00567!"
    with rados.WriteOpCtx() as op:
        op.write_full(b"gone")
        op.new(rados.LIBRADOS_CREATE_EXCLUSIVE)
        with pytest.raises(rados.ObjectExists):
            ioctx.operate_write_op(op, "o")
    assert ioctx.read("o") == b"01\0\0\x00567!"
    with rados.WriteOpCtx() as op:
        op.writesame(b"ab", 4)
        op.remove()
        ioctx.operate_write_op(op, "o")
    with pytest.raises(rados.ObjectNotFound):
        ioctx.stat("o")
    with pytest.raises(rados.OSError) as caught:
        rados.WriteOp().set_flags(rados.LIBRADOS_OP_FLAG_FAILOK)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_class_methods(ioctx: rados.Ioctx) -> None:
    ioctx.write("rbd_directory", b"")
    length, output = ioctx.execute("rbd_directory", "rbd", "get_all_features", b"")
    assert (length, len(output)) == (8, 8)
    with rados.WriteOpCtx() as op:
        op.new(rados.LIBRADOS_CREATE_EXCLUSIVE)
        op.execute("rbd", "set_id", struct.pack("<I", 3) + b"abc")
        ioctx.operate_write_op(op, "rbd_id.x")
    assert ioctx.execute("rbd_id.x", "rbd", "get_id", b"")[1] == b"\x03\0\0\0abc"
    with pytest.raises(rados.OSError) as caught:
        ioctx.execute("rbd_id.x", "rbd", "get_id", b"", 3)
    assert caught.value.errno == errno.ERANGE


def test_namespaces_keep_objects_apart(cluster: rados.Rados, ioctx: rados.Ioctx) -> None:
    ioctx.write("o", b"default")
    ioctx.set_namespace("ns")
    assert ioctx.get_namespace() == "ns"
    with pytest.raises(rados.ObjectNotFound):
        ioctx.read("o")
    ioctx.write("o", b"inner")
    assert ioctx.context.namespace == "ns"
    with ioctx.dup() as again:
        assert again.read("o") == b"inner"
    found = next(ioctx.list_objects())
    ioctx.set_namespace("")
    assert ioctx.read("o") == b"default"
    assert (found.key, found.nspace, found.read()) == ("o", "ns", b"inner")
    assert ioctx.get_namespace() == ""
    ioctx.set_namespace(rados.LIBRADOS_ALL_NSPACES)
    with pytest.raises(rados.InvalidArgumentError):
        ioctx.write("o", b"")


def test_objects_behave_like_files(ioctx: rados.Ioctx) -> None:
    for name in ("a", "b", "c"):
        ioctx.write(name, name.encode() * 4)
    objects = {o.key: o for o in ioctx.list_objects()}
    assert sorted(objects) == ["a", "b", "c"]
    one = objects["a"]
    assert (one.read(2), one.read()) == (b"aa", b"aa")
    one.seek(1)
    one.write(b"XY")
    one.seek(0)
    assert one.read() == b"aXYa"
    assert one.stat()[0] == 4
    one.set_xattr("k", b"v")
    assert (one.get_xattr("k"), list(one.get_xattrs())) == (b"v", [("k", b"v")])
    one.rm_xattr("k")
    assert "key=a" in str(one)
    one.remove()
    with pytest.raises(rados.ObjectStateError):
        one.read()


def test_a_closed_context_refuses(ioctx: rados.Ioctx) -> None:
    ioctx.close()
    with pytest.raises(rados.IoctxStateError):
        ioctx.read("o")
    with pytest.raises(rados.IoctxStateError):
        ioctx.aio_write("o", b"")


def test_statistics(cluster: rados.Rados, ioctx: rados.Ioctx) -> None:
    ioctx.write("o", b"x" * 5000)
    stats = ioctx.get_stats()
    assert (stats["num_objects"], stats["num_bytes"], stats["num_kb"]) == (1, 5000, 5)
    assert cluster.get_cluster_stats()["num_objects"] == 1


def test_what_this_store_cannot_do_says_so(cluster: rados.Rados) -> None:
    for answer in (
        cluster.mgr_command('{"prefix": "x"}', b""),
        cluster.osd_command(1, '{"prefix": "bench"}', b""),
        cluster.pg_command("1.0", '{"prefix": "query"}', b""),
        cluster.mon_command('{"prefix": "osd tier add"}', b""),
    ):
        assert answer[0] == -errno.EOPNOTSUPP and answer[1] == b"" and answer[2]


def test_applications_of_a_pool(ioctx: rados.Ioctx) -> None:
    assert ioctx.application_list() == []
    ioctx.application_enable("rbd")
    ioctx.application_enable("rbd")
    with pytest.raises(rados.PermissionError):
        ioctx.application_enable("other")
    ioctx.application_enable("other", True)
    assert ioctx.application_list() == ["other", "rbd"]
    ioctx.application_metadata_set("rbd", "key", "value")
    ioctx.application_metadata_set("rbd", "gone", "value")
    ioctx.application_metadata_remove("rbd", "gone")
    assert ioctx.application_metadata_list("rbd") == [("key", "value")]
    assert ioctx.application_metadata_list("other") == []
    assert ioctx.application_metadata_get("rbd", "key") == "value"
    with pytest.raises(KeyError):
        ioctx.application_metadata_get("rbd", "no")
    for call in (ioctx.application_metadata_list, lambda app: ioctx.application_metadata_set(app, "k", "v")):
        with pytest.raises(rados.ObjectNotFound):
            call("no")


def test_snapshots_of_the_pool(ioctx: rados.Ioctx, cluster: rados.Rados) -> None:
    ioctx.write_full("o", b"first")
    with pytest.raises(rados.ObjectNotFound):
        ioctx.remove_snap("s")
    ioctx.create_snap("s")
    with pytest.raises(rados.ObjectExists):
        ioctx.create_snap("s")
    with cluster.open_ioctx("data") as other:  # which is not told
        other.set_namespace("space")
        other.write_full("n", b"later")
        other.set_namespace("")
        other.write_full("o", b"second")
    ioctx.aio_write("o", b"third!").wait_for_complete()
    snap = ioctx.lookup_snap("s")
    assert [found.name for found in ioctx.list_snaps()] == ["s"] and snap.get_timestamp().microsecond == 0
    ioctx.set_read(snap.snap_id)
    assert ioctx.read("o") == b"first"
    ioctx.set_read(rados.LIBRADOS_SNAP_HEAD)
    assert ioctx.read("o") == b"third!"
    ioctx.snap_rollback("o", "s")
    assert ioctx.read("o") == b"first"
    ioctx.remove_snap("s")
    assert list(ioctx.list_snaps()) == []
    assert [(row.nspace, row.key) for row in ioctx.list_objects()] == [("", "o")]
    ioctx.write_full("rbd_header.1", b"")
    with pytest.raises(rados.InvalidArgumentError):
        ioctx.create_snap("s")


def test_listing_every_namespace_and_place(ioctx: rados.Ioctx) -> None:
    def listed() -> list[tuple[str, str | None, str]]:
        return sorted((row.nspace, row.locator_key or "", row.key) for row in ioctx.list_objects())

    ioctx.write("a", b"1")
    ioctx.create_snap("s")
    ioctx.set_namespace("space")
    ioctx.write("a", b"2")
    ioctx.set_locator_key("place")
    assert ioctx.get_locator_key() == "place"
    with pytest.raises(rados.ObjectNotFound):
        ioctx.read("a")
    ioctx.write("a", b"3")
    assert listed() == [("space", "", "a"), ("space", "place", "a")]
    ioctx.set_locator_key("")
    assert ioctx.read("a") == b"2"
    for row in ioctx.list_objects():
        assert row.read() == (b"3" if row.locator_key else b"2")
    ioctx.set_namespace(rados.LIBRADOS_ALL_NSPACES)
    assert listed() == [("", "", "a"), ("space", "", "a"), ("space", "place", "a")]
    with pytest.raises(rados.InvalidArgumentError):
        ioctx.write("a", b"4")
    ioctx.set_namespace("")
    assert listed() == [("", "", "a")] and ioctx.read("a") == b"1"


def test_the_version_of_what_was_last_touched(ioctx: rados.Ioctx) -> None:
    assert ioctx.get_last_version() == 0
    ioctx.write("a", b"1")
    first = ioctx.get_last_version()
    ioctx.write("a", b"2")
    ioctx.write("b", b"2")
    assert ioctx.read("a") == b"2"
    second = ioctx.get_last_version()
    assert second > first > 0
    with rados.WriteOpCtx() as op:
        op.assert_version(second)
        op.write_full(b"3")
        ioctx.operate_write_op(op, "a")
    with rados.WriteOpCtx() as op, pytest.raises(rados.OSError):
        op.assert_version(second)
        op.write_full(b"4")
        ioctx.operate_write_op(op, "a")
    ioctx.remove_object("a")
    assert ioctx.get_last_version() == 0


def test_the_example_class(ioctx: rados.Ioctx) -> None:
    with rados.WriteOpCtx() as op:
        op.execute("hello", "record_hello", b"you")
        ioctx.operate_write_op(op, "o")
    assert ioctx.read("o") == b"Hello, you!"
    assert ioctx.execute("o", "hello", "say_hello", b"")[1] == b"Hello, world!"
    assert ioctx.execute("o", "hello", "replay", b"")[1] == b"Hello, you!"
    with rados.WriteOpCtx() as op, pytest.raises(rados.ObjectExists):
        op.execute("hello", "record_hello", b"you")
        ioctx.operate_write_op(op, "o")
    with pytest.raises(rados.InvalidArgumentError):
        ioctx.execute("o", "hello", "say_hello", b"x" * 101)


def test_what_a_monitor_would_be_asked(cluster: rados.Rados) -> None:
    def ask(prefix: str, **words: Any) -> Any:
        result, output, message = cluster.mon_command(json.dumps({"prefix": prefix, "format": "json", **words}), b"")
        assert result == 0, message
        return json.loads(output) if output else message

    assert ask("osd pool create", pool="new") == "pool 'new' created"
    assert "new" in ask("osd pool ls") and {"poolnum": cluster.pool_lookup("new"), "poolname": "new"} in ask(
        "osd lspools"
    )
    ask("osd pool mksnap", pool="new", snap="s")
    ask("osd pool application enable", pool="new", app="rbd")
    (pool,) = [row for row in ask("osd dump")["pools"] if row["pool_name"] == "new"]
    assert [row["name"] for row in pool["pool_snaps"]] == ["s"] and pool["application_metadata"] == {"rbd": {}}
    assert ask("fsid") == {"fsid": cluster.get_fsid()}
    assert ask("health")["status"] == "HEALTH_OK"
    assert ask("version")["release"] == "pacific"
    assert {row["name"] for row in ask("df")["pools"]} >= {"new"}
    assert cluster.mon_command(json.dumps({"prefix": "mon dump", "epoch": 1001}), b"")[0] == -errno.ENOENT
    name = ask("mon dump")["mons"][0]["name"]
    assert json.loads(cluster.ping_monitor(name))["health"]
    with pytest.raises(rados.ObjectNotFound):
        cluster.ping_monitor("no")
    assert cluster.mon_command('{"prefix": "osd pool rm", "pool": "new"}', b"")[0] == -errno.EPERM
    ask("osd pool rm", pool="new", pool2="new", yes_i_really_really_mean_it=True)
    assert not cluster.pool_exists("new")
    for wrong in ("", "[]", "{}", '{"prefix": "osd pool create"}'):
        assert cluster.mon_command(wrong, b"")[0] == -errno.EINVAL
    result, output, _ = cluster.osd_command(0, '{"prefix": "bench", "count": 8192, "size": 4096}', b"")
    assert result == 0 and json.loads(output)["bytes_written"] == 8192


def test_the_log_is_followed(cluster: rados.Rados) -> None:
    heard: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
    with pytest.raises(rados.LogicError):
        cluster.monitor_log("loud", lambda *args: None, None)
    with pytest.raises(rados.LogicError):
        cluster.monitor_log("debug", 7, None)  # type: ignore[arg-type]
    rados.MonitorLog(cluster, "debug", lambda *args: heard.put(args), "mine")
    arg, line, who, seconds, nanoseconds, number, level, message = heard.get(timeout=30)
    assert arg == "mine" and level == b"debug" and message in line and who and seconds and number == 1
    assert 0 <= nanoseconds < 1e9
    cluster.monitor_log2("debug", lambda *args: heard.put(args), None)
    assert len(heard.get(timeout=30)) in (8, 10)
    cluster.monitor_log2("debug", None, None)


def test_a_name_is_a_type_and_an_id() -> None:
    for name in ("invalid", "bad.invalid", "client."):
        with pytest.raises(rados.Error):
            rados.Rados(name=name)


# --- snapshots, locks, watches -----------------------------------------------------------------------------------


def test_self_managed_snapshots(ioctx: rados.Ioctx) -> None:
    ioctx.write_full("o", b"first")
    snap = ioctx.create_self_managed_snap()
    ioctx.set_self_managed_snap_write([snap])
    ioctx.write_full("o", b"second")
    ioctx.set_read(snap)
    assert ioctx.read("o") == b"first"
    with pytest.raises(rados.OSError) as caught:
        ioctx.write_full("o", b"third")
    assert caught.value.errno == errno.EROFS
    ioctx.set_read(rados.LIBRADOS_SNAP_HEAD)
    assert ioctx.read("o") == b"second"
    ioctx.rollback_self_managed_snap("o", snap)
    assert ioctx.read("o") == b"first"
    ioctx.set_self_managed_snap_write([])
    ioctx.remove_self_managed_snap(snap)


def test_locks(cluster: rados.Rados, url: str, ioctx: rados.Ioctx) -> None:
    ioctx.lock_exclusive("o", "lock", "c1", "why", 3600)
    with pytest.raises(rados.ObjectExists):
        ioctx.lock_exclusive("o", "lock", "c1")
    with rados.Rados(conf={"rbdpy_store": url}) as other:
        with other.open_ioctx("data") as theirs, pytest.raises(rados.ObjectBusy):
            theirs.lock_shared("o", "lock", "c2", "tag")
        ioctx.unlock("o", "lock", "c1")
        with pytest.raises(rados.ObjectNotFound):
            ioctx.unlock("o", "lock", "c1")
        with other.open_ioctx("data") as theirs:
            theirs.lock_shared("o", "lock", "c2", "tag")
            ioctx.lock_shared("o", "lock", "c1", "tag")


def test_watch_and_notify(cluster: rados.Rados, ioctx: rados.Ioctx) -> None:
    heard: list[tuple[int, bytes]] = []

    def callback(notify_id: int, notifier: int, watch_id: int, data: bytes) -> str:
        heard.append((notifier, data))
        return "pong"

    ioctx.write("o", b"")
    with ioctx.watch("o", callback) as watch:
        assert watch.get_id() > 0
        assert timedelta(0) <= watch.check() < timedelta(seconds=30)
        assert ioctx.notify("o", "ping") is True
        assert heard == [(cluster.get_instance_id(), b"ping")]
        done = threading.Event()
        answers: list[Any] = []

        def oncomplete(completion: rados.Completion, result: int, acks: Any, silent: Any) -> None:
            answers.append((result, acks, silent))
            done.set()

        ioctx.aio_notify("o", oncomplete, "again")
        assert done.wait(PATIENCE)
        assert answers == [(0, [(cluster.get_instance_id(), watch.get_id(), b"pong")], [])]
    assert watch.get_id() == 0
    ioctx.notify("o", "nobody")
    assert len(heard) == 2
    with pytest.raises(rados.ObjectNotFound):
        ioctx.watch("none", callback)


def test_a_watchers_failure_is_an_empty_ack(ioctx: rados.Ioctx, caplog: pytest.LogCaptureFixture) -> None:
    def callback(notify_id: int, notifier: int, watch_id: int, data: bytes) -> None:
        raise RuntimeError("broken")

    ioctx.write("o", b"")
    with ioctx.watch("o", callback):
        assert ioctx.notify("o") is True
    assert "broken" in caplog.text


def test_a_lost_watch_is_reported(cluster: rados.Rados, ioctx: rados.Ioctx) -> None:
    lost = threading.Event()
    seen: list[tuple[int, int]] = []

    def error(watch_id: int, code: int) -> None:
        seen.append((watch_id, code))
        lost.set()

    ioctx.write("o", b"")
    watch = ioctx.watch("o", lambda *args: None, error, timeout=5)
    ioctx.remove_object("o")
    assert lost.wait(PATIENCE)
    assert seen == [(watch.get_id(), -errno.ENOTCONN)]
    with pytest.raises(rados.NotConnected):
        watch.check()
    watch.close()
    watch.close()


def test_a_silent_watcher_times_a_notify_out(url: str, cluster: rados.Rados, ioctx: rados.Ioctx) -> None:
    ioctx.write("o", b"")
    wake = threading.Event()
    with rados.Rados(conf={"rbdpy_store": url}) as other:
        with other.open_ioctx("data") as theirs, theirs.watch("o", lambda *args: wake.wait(PATIENCE) and None):
            with pytest.raises(rados.TimedOut):
                ioctx.notify("o", "anybody?", timeout_ms=50)
            wake.set()


# --- asynchronous --------------------------------------------------------------------------------------------------


def test_operations_on_one_object_keep_their_order(ioctx: rados.Ioctx) -> None:
    for number in range(200):
        ioctx.aio_append("o", bytes([number]))
    ioctx.aio_flush()
    assert ioctx.read("o") == bytes(range(200))
    assert ioctx.complete_completions == []


def test_results_come_with_the_completion(ioctx: rados.Ioctx) -> None:
    got: list[Any] = []
    first = ioctx.aio_write_full(
        "o", b"content", lambda c: got.append(c.get_return_value()), lambda c: got.append("safe")
    )
    assert first.wait_for_complete_and_cb() == 0
    assert (first.is_complete(), first.is_safe(), got) == (True, True, [0, "safe"])
    ioctx.aio_read("o", 4, 1, lambda c, data: got.append((c.get_return_value(), data))).wait_for_safe_and_cb()
    ioctx.aio_read("none", 4, 0, lambda c, data: got.append((c.get_return_value(), data))).wait_for_complete_and_cb()
    ioctx.aio_stat("o", lambda c, size, mtime: got.append(size)).wait_for_complete_and_cb()
    ioctx.aio_stat("none", lambda c, size, mtime: got.append((c.get_return_value(), size))).wait_for_complete_and_cb()
    assert got[2:] == [(4, b"onte"), (-errno.ENOENT, None), 7, (-errno.ENOENT, None)]


def test_every_asynchronous_call(ioctx: rados.Ioctx) -> None:
    def value(completion: rados.Completion) -> int:
        completion.wait_for_complete_and_cb()
        return completion.get_return_value()

    assert value(ioctx.aio_write("o", b"abc", 1)) == 0
    assert value(ioctx.aio_writesame("o", b"xy", 4, 4)) == 0
    assert value(ioctx.aio_append("o", b"!")) == 0
    assert ioctx.read("o") == b"\0abcxyxy!"
    assert value(ioctx.aio_cmpext("o", b"abX", 1)) == -(rados.MAX_ERRNO + 2)
    assert value(ioctx.aio_setxattr("o", "k", b"v")) == 0
    assert value(ioctx.aio_rmxattr("o", "k")) == 0
    assert value(ioctx.aio_rmxattr("o", "k")) == 0  # missing is no error, as on an OSD
    assert value(ioctx.aio_rmxattr("none", "k")) == -errno.ENOENT
    out: list[Any] = []
    ioctx.write("rbd_directory", b"")
    done = ioctx.aio_execute(
        "rbd_directory", "rbd", "get_all_features", b"", oncomplete=lambda c, data: out.append(data)
    )
    assert value(done) == 8
    assert len(out[0]) == 8
    with rados.WriteOpCtx() as op:
        ioctx.set_omap(op, ("k",), (b"v",))
        written = ioctx.operate_aio_write_op(op, "o")
    assert value(written) == 0
    with rados.ReadOpCtx() as read:
        rows, _ = ioctx.get_omap_vals(read, "", "", 1)
        assert value(ioctx.operate_aio_read_op(read, "o")) == 0
        assert list(rows) == [("k", b"v")]
    assert value(ioctx.aio_remove("o")) == 0
    assert value(ioctx.aio_remove("o")) == -errno.ENOENT


def test_a_queued_operation_uses_the_context_of_its_moment(ioctx: rados.Ioctx) -> None:
    gate = threading.Event()
    ioctx.aio_write("gate", b"", 0, lambda c: gate.wait(PATIENCE) and None)
    ioctx.set_namespace("then")
    ioctx.aio_write("o", b"then")
    ioctx.set_namespace("now")
    gate.set()
    ioctx.aio_flush()
    with pytest.raises(rados.ObjectNotFound):
        ioctx.read("o")
    ioctx.set_namespace("then")
    assert ioctx.read("o") == b"then"


def test_a_failing_callback_hurts_nobody(ioctx: rados.Ioctx, caplog: pytest.LogCaptureFixture) -> None:
    ioctx.aio_write("o", b"", 0, lambda c: 1 // 0).wait_for_complete_and_cb()
    assert "ZeroDivisionError" in caplog.text
    assert ioctx.complete_completions == []


def test_a_new_image_is_what_the_options_say(cluster: rados.Rados, ioctx: rados.Ioctx) -> None:
    assert cluster.conf_get("rbd_default_order") == "22"
    cluster.conf_set("rbd_default_order", "20")
    rbd.RBD().create(ioctx, "small", 1 << 20)
    with rbd.Image(ioctx, "small") as image:
        assert image.stat()["order"] == 20
    cluster.conf_set("rbd_default_order", "0")
    with pytest.raises(rbd.ArgumentOutOfRange):
        rbd.RBD().create(ioctx, "none", 1 << 20)
    cluster.conf_set("rbd_default_order", "20")
    cluster.conf_set("rbd_default_stripe_count", "4")
    with pytest.raises(rbd.InvalidArgument):
        rbd.RBD().create(ioctx, "none", 1 << 20)
