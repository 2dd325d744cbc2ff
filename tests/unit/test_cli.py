"""`rbdpy` prints what `rbd` 16.2.15 prints and ends as it ends. Expected texts were taken from the real command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import pytest

from librbd_py.cli.main import main
from librbd_py.cli.output import size_text
from librbd_py.cli.sizes import byte_count, image_size

MIB = 1 << 20


@dataclass
class Result:
    code: int
    out: str
    err: str


class Shell:
    """Runs commands in this process on one store."""

    def __init__(self, store: str, capsys: pytest.CaptureFixture[str]) -> None:
        self._store, self._capsys = store, capsys

    def __call__(self, *words: str, code: int = 0) -> Result:
        self._capsys.readouterr()
        status = main(["--store", self._store, *words])
        captured = self._capsys.readouterr()
        assert status == code, captured.err
        return Result(status, captured.out, captured.err)


@pytest.fixture
def sh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(f"embedded:{tmp_path / 'store'}", capsys)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (6 * MIB, "6 MiB"),
        ((2 << 30) + 16 * MIB, "2.0 GiB"),
        (1 << 40, "1 TiB"),
        (1536, "1.5 KiB"),
        (1100, "1.1 KiB"),
        (1023 * 1024 + 512, "1024 KiB"),
        (1 << 60, "1 EiB"),
    ],
)
def test_sizes_are_shown_as_ceph_shows_them(count: int, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize(
    ("text", "count"), [("10", 10 * MIB), ("10G", 10 << 30), ("4Ki", 4096), ("7B", 7), ("1KB", 1024), ("0", 0)]
)
def test_sizes_are_read_with_mebibytes_as_default(text: str, count: int) -> None:
    assert image_size(text) == count


@pytest.mark.parametrize("text", ["", "-1", "10X", "1.5G", "9E", "99999999999999999999", "0x10", "1 0", "1k", "4KiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        byte_count(text)


def test_info_of_a_new_image(sh: Shell) -> None:
    sh("create", "foo", "--size", "1G")
    lines = sh("info", "foo").out.splitlines()
    assert lines[:4] == [
        "rbd image 'foo':",
        "\tsize 1 GiB in 256 objects",
        "\torder 22 (4 MiB objects)",
        "\tsnapshot_count: 0",
    ]
    assert lines[6:10] == [
        "\tformat: 2",
        "\tfeatures: layering, exclusive-lock, object-map, fast-diff, deep-flatten",
        "\top_features: ",
        "\tflags: ",
    ]
    assert re.fullmatch(r"\tcreate_timestamp: \w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4}", lines[10])
    shown = json.loads(sh("info", "foo", "--format", "json").out)
    first = ["name", "id", "size", "objects", "order", "object_size", "snapshot_count", "block_name_prefix", "format"]
    assert list(shown)[:9] == first
    assert shown["block_name_prefix"] == "rbd_data." + shown["id"]


def test_listing(sh: Shell) -> None:
    sh("create", "bar", "--size", "0")
    sh("create", "foo", "--size", "1G")
    sh("snap", "create", "foo@s1")
    sh("snap", "protect", "foo@s1")
    sh("clone", "foo@s1", "child")
    assert sh("ls").out == "bar\nchild\nfoo\n"
    assert sh("ls", "--format", "json").out == '["bar","child","foo"]\n'
    assert sh("ls", "--format", "xml").out == "<images><name>bar</name><name>child</name><name>foo</name></images>\n"
    assert sh("ls", "-l").out.splitlines() == [
        "NAME    SIZE   PARENT      FMT  PROT  LOCK",
        "bar       0 B                2            ",
        "child   1 GiB  rbd/foo@s1    2            ",
        "foo     1 GiB                2            ",
        "foo@s1  1 GiB                2  yes       ",
    ]
    rows = json.loads(sh("ls", "-l", "--format", "json").out)
    parent = {"pool": "rbd", "pool_namespace": "", "image": "foo", "snapshot": "s1"}
    assert rows[1]["parent"] == parent
    assert rows[3]["protected"] == "true"
    tree = ET.fromstring(sh("ls", "-l", "--format", "xml", "--pretty-format").out)
    assert [row.findtext("image") for row in tree] == ["bar", "child", "foo", "foo"]


def test_snapshots(sh: Shell) -> None:
    sh("create", "foo", "--size", "1G")
    assert sh("snap", "create", "foo@s1").err.endswith("Creating snap: 100% complete...done.\n")
    again = sh("snap", "create", "foo@s1", code=17)
    assert again.err.endswith("failed.\nrbd: failed to create snapshot: (17) File exists\n")
    sh("snap", "protect", "foo@s1")
    assert sh("snap", "protect", "foo@s1", code=16).err == "rbd: snap is already protected\n"
    head, row = sh("snap", "ls", "foo").out.splitlines()
    assert head.rstrip() == "SNAPID  NAME  SIZE   PROTECTED  TIMESTAMP"
    assert re.fullmatch(r" +\d+  s1    1 GiB  yes        \w{3} .*\d{4}", row)
    assert sh("snap", "rm", "foo@s1", code=16).err.endswith("rbd: snapshot 's1' is protected from removal.\n")
    assert "these must be deleted with 'rbd snap purge'" in sh("rm", "foo", code=39).err
    purge = sh("snap", "purge", "foo")
    assert purge.out.startswith("rbd: error removing snapshot(s) 's1', which is protected")
    assert purge.err.endswith("failed.\n")
    sh("snap", "unprotect", "foo@s1")
    sh("snap", "rename", "foo@s1", "foo@s2")
    sh("snap", "rollback", "foo@s2", "--no-progress")
    sh("snap", "purge", "foo", "--no-progress")
    assert sh("snap", "ls", "foo", "--format", "json").out == "[]\n"
    sh("rm", "foo", "--no-progress")
    assert sh("ls").out == ""


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("info", "nope"), 2, "rbd: error opening image nope: (2) No such file or directory\n"),
        (("rm", "nope"), 2, "rbd: delete error: (2) No such file or directory\n"),
        (
            ("ls", "-p", "nopool"),
            2,
            "rbd: error opening pool 'nopool': (2) No such file or directory\n"
            "rbd: listing images failed: (2) No such file or directory\n",
        ),
        (("create", "x"), 22, "rbd: must specify --size <M/G/T>\n"),
        (("create", "x", "--size", "10X"), 1, "rbd: the argument for option '--size' is invalid\n"),
        (("create", "bad/x", "--size", "1"), 2, "rbd: error opening pool 'bad': (2) No such file or directory\n"),
        (("create", "rbd/ns1/x", "--size", "1"), 2, "rbd: namespace 'ns1' does not exist.\n"),
        (("create", "--size", "1G"), 22, "rbd: image name was not specified\n"),
        (("info", "--bogus", "foo"), 1, "rbd: unrecognised option '--bogus'\n"),
        (("info", "a", "b", "c"), 1, "rbd: too many arguments\n"),
        (("info", "x", "--format", "bogus"), 1, "rbd: the argument for option '--format' is invalid\n"),
        (("snap", "create", "foo"), 22, "rbd: snapshot name was not specified\n"),
        (("rm", "foo@s"), 22, "rbd: snapshot name specified for a command that doesn't use it\n"),
        (("export", "foo"), 22, "rbd: path was not specified\n"),
        (("create", "x", "--size", "1", "--size", "2"), 1, "option '--size' cannot be specified more than once\n"),
        (("create", "x", "--size="), 1, "'--size' should follow immediately after the equal sign\n"),
        (("create", "x", "--size", "1", "--stripe-count", "a"), 1, "argument ('a') for option '--stripe-count' is"),
        (("ls", "--long=3"), 1, "rbd: option '--long' does not take any arguments\n"),
        (("feature", "enable", "foo"), 22, "rbd: at least one feature name must be specified\n"),
        (("lock", "add", "foo"), 22, "rbd: lock id was not specified\n"),
        (("import",), 22, "rbd: path was not specified\n"),
        (("rename", "nope", "y"), 2, "rbd: rename error: (2) No such file or directory\n"),
        (("du", "nope"), 2, "specified image nope is not found.\nrbd: du failed: (2) No such file or directory\n"),
        (("bogus",), 1, "error: unknown option 'bogus'\n"),
        (("snap", "bogus"), 1, "error: unknown option 'snap bogus'\n"),
    ],
)
def test_errors_have_the_words_and_status_of_rbd(sh: Shell, words: tuple[str, ...], code: int, says: str) -> None:
    assert says in sh(*words, code=code).err


def test_resize(sh: Shell) -> None:
    sh("create", "a", "--size", "10M")
    sh("resize", "a", "--size", "20M", "--no-progress")
    assert "--allow-shrink" in sh("resize", "a", "--size", "5M", code=22).err
    assert sh("resize", "a", "--size", "20M", code=22).err == "rbd: new size is equal to original size \n"
    sh("resize", "a", "--size", "5M", "--allow-shrink", "--no-progress")
    assert json.loads(sh("info", "a", "--format", "json").out)["size"] == 5 * MIB


def test_clone_children_flatten(sh: Shell) -> None:
    sh("create", "p", "--size", "8M")
    sh("snap", "create", "p@s", "--no-progress")
    sh("clone", "p@s", "c")
    assert sh("children", "p").out == "rbd/c\n"
    assert sh("children", "p@s", "--format", "json").out == '[{"pool":"rbd","pool_namespace":"","image":"c"}]\n'
    assert "\tparent: rbd/p@s\n\toverlap: 8 MiB\n" in sh("info", "c").out
    sh("flatten", "c", "--no-progress")
    assert sh("children", "p").out == ""
    assert sh("flatten", "c", "--no-progress", code=22).err == "rbd: flatten error: (22) Invalid argument\n"


def test_import_export_round_trip_keeps_holes(sh: Shell, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.write(os.urandom(3 * MIB))
        file.seek(20 * MIB)
        file.write(b"tail")
        file.truncate(24 * MIB)
    sh("import", str(source), "img", "--no-progress")
    assert json.loads(sh("info", "img", "--format", "json").out)["size"] == 24 * MIB
    sh("export", "img", str(target), "--no-progress")
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 < 8 * MIB
    assert sh("export", "img", str(target), "--no-progress", code=17).err == "rbd: export error: (17) File exists\n"
    assert "image creation failed" in sh("import", str(source), "img", "--no-progress", code=17).err
    assert "rbd: error opening" in sh("import", str(tmp_path / "nofile"), "x", "--no-progress", code=2).err
    usage = sh("du", "img").out.splitlines()
    assert usage[0] == "NAME  PROVISIONED  USED "
    assert usage[1].split() == ["img", "24", "MiB", "8", "MiB"]


def test_import_from_a_pipe_and_export_to_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "librbd_py.cli.main", "--store", str(tmp_path / "store")]
    data = os.urandom(5 * MIB + 777)
    subprocess.run([*command, "import", "-", "piped", "--no-progress"], input=data, check=True, timeout=60)
    done = subprocess.run([*command, "export", "piped", "-"], capture_output=True, check=True, timeout=60)
    assert done.stdout == data


def test_diff(sh: Shell, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(6 * MIB))
    sh("import", str(source), "imp", "--no-progress")
    assert sh("diff", "imp", "--whole-object").out.splitlines() == [
        "Offset   Length   Type",
        "0        4194304  data",
        "4194304  2097152  data",
    ]
    sh("snap", "create", "imp@s", "--no-progress")
    assert sh("diff", "imp", "--from-snap", "s").out == ""
    assert sh("diff", "imp", "--from-snap", "nope", code=2).err == "rbd: diff error: (2) No such file or directory\n"


def test_metadata(sh: Shell) -> None:
    sh("create", "foo", "--size", "1")
    assert sh("image-meta", "ls", "foo").out == "There are 0 metadata on this image.\n"
    sh("image-meta", "set", "foo", "k", "v")
    sh("image-meta", "set", "foo", "k2", "v2")
    assert sh("image-meta", "ls", "foo").out == (
        "There are 2 metadata on this image:\n\nKey  Value\nk    v    \nk2   v2   \n"
    )
    assert sh("image-meta", "ls", "foo", "--format", "json").out == '{"k":"v","k2":"v2"}\n'
    assert sh("image-meta", "get", "foo", "k").out == "v\n"
    sh("image-meta", "rm", "foo", "k")
    assert "no existing metadata key k" in sh("image-meta", "rm", "foo", "k", code=2).err
    assert "failed to get metadata k of image" in sh("image-meta", "get", "foo", "k", code=2).err


def test_features(sh: Shell) -> None:
    sh("create", "foo", "--size", "8M")
    sh("feature", "disable", "foo", "fast-diff")
    assert "\tfeatures: layering, exclusive-lock, deep-flatten\n" in sh("info", "foo").out
    sh("feature", "enable", "foo", "fast-diff")
    assert "\tflags: object map invalid, fast diff invalid\n" in sh("info", "foo").out
    sh("object-map", "rebuild", "foo", "--no-progress")
    assert "\tflags: \n" in sh("info", "foo").out
    assert "failed to update image features" in sh("feature", "enable", "foo", "layering", code=22).err


def test_manual_locks(sh: Shell) -> None:
    sh("create", "foo", "--size", "1")
    assert sh("lock", "ls", "foo").out == ""
    sh("lock", "add", "foo", "id1")
    lines = sh("lock", "ls", "foo").out.splitlines()
    assert lines[0] == "There is 1 exclusive lock on this image."
    assert re.match(r"Locker +ID +Address", lines[1])
    locker = lines[2].split()[0]
    assert sh("lock", "add", "foo", "id2", code=16).err == "rbd: lock is already held by someone else\n"
    assert "releasing lock failed: (2)" in sh("lock", "rm", "foo", "id1", "client.1", code=2).err
    sh("lock", "rm", "foo", "id1", locker)
    sh("lock", "add", "foo", "a", "--shared", "tag1")
    sh("lock", "add", "foo", "b", "--shared", "tag1")
    assert sh("lock", "ls", "foo").out.splitlines()[:2] == ["There are 2 shared locks on this image.", "Lock tag: tag1"]


def test_namespaces(sh: Shell) -> None:
    sh("namespace", "create", "rbd/ns1")
    assert sh("namespace", "ls").out == "NAME\nns1 \n"
    sh("create", "rbd/ns1/x", "--size", "1M")
    assert sh("ls", "rbd/ns1").out == "x\n"
    assert sh("ls").out == ""
    assert "contains images" in sh("namespace", "rm", "rbd/ns1", code=16).err
    sh("rm", "rbd/ns1/x", "--no-progress")
    sh("namespace", "rm", "rbd/ns1")


def test_status_without_watchers(sh: Shell) -> None:
    sh("create", "foo", "--size", "1")
    assert sh("status", "foo").out == "Watchers: none\n"
    assert sh("status", "foo", "--format", "json").out == '{"watchers":[]}\n'


def test_bench_counts_its_requests(sh: Shell) -> None:
    sh("create", "foo", "--size", "16M")
    out = sh("bench", "--io-type", "write", "--io-total", "4M", "--io-size", "4K", "foo").out
    assert out.startswith("bench  type write io_size 4096 io_threads 16 bytes 4194304 pattern sequential\n")
    assert "ops: 1024" in out


def test_store_check_of_a_healthy_store(sh: Shell) -> None:
    sh("create", "foo", "--size", "16M")
    assert sh("store", "check").out == "no findings\n"


def test_help_and_completion_know_every_command(sh: Shell) -> None:
    overview = sh("help").out
    assert "snap limit set" in overview
    assert "store check" in overview
    usage = sh("help", "snap", "create").out
    assert usage.startswith("usage: rbdpy snap create [--pool <pool>]")
    assert "  --skip-quiesce          do not run quiesce hooks\n" in usage
    assert sh("help", "store", "check").out.startswith("usage: rbdpy store check")
    script = sh("completion").out
    assert "--allow-shrink" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_config_says_which_options_do_something(sh: Shell) -> None:
    sh("create", "vm", "--size", "1M")
    lines = sh("config", "image", "ls", "vm", "--effects").out.splitlines()[2:]
    rows = {line.split()[0]: line.strip() for line in lines}
    assert rows["rbd_qos_iops_limit"].endswith("honoured") and rows["rbd_cache_size"].endswith("without effect")
    assert "honoured" not in sh("config", "image", "ls", "vm").out
