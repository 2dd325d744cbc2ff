"""`rbd` of Ceph and `rbdpy` given the same command lines, each on a pool of its own: the same output, words on standard
error, exit status, and in the end the same images. The invocations are in cli_corpus.txt.

Left out of the comparison: ids, times, addresses, what librbd logs (lines with a time stamp), and which percentages a
progress bar passes through.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from librbd_py.cli.main import main
from librbd_py.devcluster import DevCluster
from librbd_py.devcluster.admin import Admin

CORPUS = Path(__file__).with_name("cli_corpus.txt")
DEADLINE = 60  # seconds for one invocation


@dataclass(frozen=True)
class Line:
    words: str
    shell: bool = False
    differs: bool = False


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def _topics() -> dict[str, list[Line]]:
    topics: dict[str, list[Line]] = {}
    for line in CORPUS.read_text().splitlines():
        if line.startswith("= "):
            topics[line[2:]] = rows = []
        elif line[:2] in ("  ", "~ ", "! "):
            rows.append(Line(line[2:], shell=line[0] == "!", differs=line[0] == "~"))
    return topics


TOPICS = _topics()
_ALIKE = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d[^\n]* -1 [^\n]*\n", ""),  # librbd's log, also in the middle of a line
    (r"\n+", "\n"),
    (r"(\r[A-Z][A-Za-z ]*: \d+% complete\.\.\.)+(?=\r)", ""),
    (r"\r([A-Z][A-Za-z ]*): \d+% complete\.\.\.failed", r"\r\1: failed"),
    (r"\.group\.[0-9a-f]+_[0-9a-f]+_[0-9a-f]+ *", ".group.ID "),
    (r"\d+( +|,\"name\":\")(?=\.group\.)", r"N\1"),  # members get their snapshots all at once
    (r"\b(NAME|ID) +", r"\1 "),
    (r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b", "UUID"),
    (r"\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4}", "TIME"),
    (r"client\.\d+ *", "client.N "),  # in tables they make columns wider
    (r"127\.0\.0\.1:0/\d+ *", "ADDRESS"),
    (r"\b(Locker|Address) +", r"\1 "),
    (r"((?:\bid: |\"id\":\"|rbd_data\.)|(?m:^))[0-9a-f]{5,9}\b(?=[\n\"} ])", r"\1ID "),  # an id is short by chance
    (r"\b[0-9a-f]{10,20}\b *", "ID "),
)


def _alike(text: str, pool: str) -> str:
    for pattern, new in _ALIKE:
        text = re.sub(pattern, new, text)
    return text.replace(pool, "POOL")


@pytest.fixture
def pools(ceph_cluster: DevCluster) -> Iterator[tuple[str, str]]:
    """Two fresh ones; names of the same length keep tables aligned alike."""
    names = (f"theirs{random.randrange(10**6):06}", f"ourown{random.randrange(10**6):06}")
    with Admin(ceph_cluster.conf) as admin:
        for name in names:
            admin.mon("osd pool create", pool=name)
            admin.mon("osd pool application enable", pool=name, app="rbd")
    yield names
    with Admin(ceph_cluster.conf) as admin:
        for name in names:
            admin.mon("osd pool delete", pool=name, pool2=name, yes_i_really_really_mean_it=True)


def _files(folder: Path) -> Path:
    """Where an invocation runs: the files that the corpus names."""
    (folder / "dir").mkdir(parents=True)
    (folder / "f").write_bytes(random.Random(5).randbytes(5_000_000) + bytes(4_000_000))
    (folder / "empty").touch()
    return folder


Run = Callable[[list[str]], Outcome]


def _theirs(conf: str, pool: str, folder: Path) -> Run:
    def run(words: list[str]) -> Outcome:
        done = subprocess.run(
            ["rbd", "--conf", conf, "--rbd-default-pool", pool, *words],
            capture_output=True,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            timeout=DEADLINE,
        )
        out, err = (_alike(data.decode(errors="backslashreplace"), pool) for data in (done.stdout, done.stderr))
        return Outcome(done.returncode, out, err)

    return run


def _ours(
    conf: str, pool: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["rbd"])
    nothing = os.open(os.devnull, os.O_RDONLY)

    def run(words: list[str]) -> Outcome:
        capfd.readouterr()
        os.dup2(nothing, 0)
        code = main(["--conf", conf, "--rbd-default-pool", pool, *words])
        out, err = capfd.readouterr()
        return Outcome(code, _alike(out, pool), _alike(err, pool))

    return run


def _same(one: Outcome, other: Outcome) -> bool:
    """Lines on standard error may change places: the real one writes some from other threads."""
    lines = [sorted(line.strip() for line in outcome.err.splitlines()) for outcome in (one, other)]
    return (one.code, one.out, lines[0]) == (other.code, other.out, lines[1])


def _left(run: Run, pool: str, namespaces: list[str], folder: Path) -> dict[str, object]:
    """What there is in the end, as the real command sees it: names, headers, snapshots, metadata, locks, content."""
    found: dict[str, object] = {}
    for where in [pool, *(f"{pool}/{name}" for name in namespaces)]:
        for what in (["ls", "-l"], ["trash", "ls", "-a"], ["group", "ls"]):
            found[f"{where} {' '.join(what)}"] = run([*what, where])
        for name in json.loads(run(["ls", where, "--format", "json"]).out):
            image = f"{where}/{name}"
            for what in (["info"], ["snap", "ls", "--all"], ["lock", "ls"]):
                found[f"{image} {' '.join(what)}"] = run([*what, image])
            copy = folder / "left"
            assert run(["export", "--no-progress", "--export-format", "2", image, str(copy)]).code == 0
            found[f"{image} content"] = re.sub(rb"[0-9a-f]{8}-[0-9a-f-]{27}|\.group\.\w+", b"NAME", copy.read_bytes())
            copy.unlink()
    return {key.replace(pool, "POOL"): value for key, value in found.items()}


def _forget_updates(conf: str) -> None:
    """Of the time when a pool's overrides last changed, which belongs to the whole cluster."""
    with Admin(conf) as admin:
        admin.mon("config rm", who="global", name="rbd_config_pool_override_update_timestamp")


@pytest.mark.parametrize("topic", TOPICS)
def test_both_commands_do_and_say_the_same(
    topic: str,
    ceph_cluster: DevCluster,
    pools: tuple[str, str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    conf = ceph_cluster.conf
    monkeypatch.delenv("RBDPY_STORE", raising=False)
    folders = [_files(tmp_path / name) for name in ("theirs", "ours")]
    theirs = _theirs(conf, pools[0], folders[0])
    ours = _ours(conf, pools[1], folders[1], capfd, monkeypatch)
    wrong = []
    outcomes: dict[int, Outcome] = {}
    for number, line in enumerate(TOPICS[topic]):
        if line.shell:
            subprocess.run(line.words, shell=True, cwd=folders[0], check=True)
        else:
            outcomes[number] = theirs(shlex.split(line.words.replace("POOL", pools[0])))
    _forget_updates(conf)
    for number, line in enumerate(TOPICS[topic]):
        if line.shell:
            subprocess.run(line.words, shell=True, cwd=folders[1], check=True)
            continue
        one, other = outcomes[number], ours(shlex.split(line.words.replace("POOL", pools[1])))
        if _same(one, other) == line.differs:
            wrong.append(f"rbd {line.words}\n  rbd:   {one}\n  rbdpy: {other}")
    _forget_updates(conf)
    made = [{path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} for folder in folders]
    assert [name for name in {**made[0], **made[1]} if made[0].get(name) != made[1].get(name)] == []
    assert not wrong, f"{len(wrong)} of {len(outcomes)} differ:\n" + "\n".join(wrong)
    namespaces = re.findall(r"(?m)^namespace create POOL/(\w+)$", "\n".join(line.words for line in TOPICS[topic]))
    named = [_left(_theirs(conf, pool, tmp_path), pool, sorted(set(namespaces)), tmp_path) for pool in pools]
    assert sorted(named[0]) == sorted(named[1])
    assert {key: (value, named[1][key]) for key, value in named[0].items() if value != named[1][key]} == {}
