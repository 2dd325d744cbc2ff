"""Command lines, read as `rbd` reads them: long and short options anywhere, `--name=value`, `-pvalue`, joined switches.

The words for what is wrong, the order in which faults are found and the rule that a value is whatever follows its
option are those of rbd 16.2.15 (boost::program_options); tests/interop compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from librbd_py.cli import sizes
from librbd_py.cli.failure import Failure


class Option(NamedTuple):
    name: str
    short: str
    convert: Callable[[str], Any] | None  # None: a switch. ValueError: not a value of this option
    text: str
    value_name: str = "arg"
    required: bool = False  # shown so in usage; the command itself says what it misses
    quotes: bool = False  # an invalid value is quoted in the complaint
    many: bool = False  # may come again: values are collected


def _unsigned(end: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        digits = text[1:] if text[:1] in ("+", "-") else text
        if not (digits.isascii() and digits.isdigit()) or int(digits) >= end:
            raise ValueError(text)
        return -int(digits) % end if text[0] == "-" else int(digits)

    return convert


def _order(text: str) -> int:
    number = _unsigned(1 << 64)(text)
    if not 12 <= number <= 25:
        raise ValueError(text)
    return number


def _one_of(*allowed: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in allowed:
            raise ValueError(text)
        return text

    return convert


def _journal_object(text: str) -> int:
    number = sizes.byte_count(text)
    if not 1 << 12 <= number <= 1 << 26:
        raise ValueError(text)
    return number


def _format_number(text: str) -> int:
    if text not in ("1", "2"):
        raise ValueError(text)
    return int(text)


u64, u32 = _unsigned(1 << 64), _unsigned(1 << 32)
_PRETTY = "pretty formatting (json and xml)"
_FEATURES = "image features\n[layering(+), exclusive-lock(+*), object-map(+*), deep-flatten(+-), journaling(*)]"
_EXPIRES = "set the expiration time of an image so it can be purged when it is stale"
_THRESHOLD = "purges images until the current pool data usage is reduced to X%, value range: 0.0-1.0"
_SORT = (
    "sort-by IO metric (write-ops, read-ops, write-bytes, read-bytes, write-latency, read-latency) [default: write-ops]"
)
_SORT_KEYS = ("write-ops", "write_ops", "read-ops", "write-bytes", "read-bytes", "write-latency", "read-latency")
_SIZE = "IO size (in B/K/M/G/T) [default: 4K]"

_ALL = (
    Option("pool", "p", str, "pool name"),
    Option("namespace", "", str, "namespace name"),
    Option("image", "", str, "image name"),
    Option("snap", "", str, "snapshot name"),
    Option("image-id", "", str, "image id"),
    Option("snap-id", "", u64, "snapshot id", quotes=True),
    Option("dest-pool", "", str, "destination pool name"),
    Option("dest-namespace", "", str, "destination namespace name"),
    Option("dest", "", str, "destination image name"),
    Option("dest-snap", "", str, "destination snapshot name"),
    Option("group", "", str, "group name"),
    Option("dest-group", "", str, "destination group name"),
    Option("group-pool", "", str, "group pool name"),
    Option("group-namespace", "", str, "group namespace name"),
    Option("image-pool", "", str, "image pool name"),
    Option("image-namespace", "", str, "image namespace name"),
    Option("format", "", _one_of("plain", "json", "xml"), "output format (plain, json, or xml) [default: plain]"),
    Option("pretty-format", "", None, _PRETTY),
    Option("no-progress", "", None, "disable progress output"),
    Option("image-format", "", _format_number, "image format [default: 2]"),
    Option("new-format", "", None, "deprecated[:image-format 2]"),
    Option("order", "", _order, "deprecated[:object-size]"),
    Option("object-size", "", sizes.byte_count, "object size in B/K/M [4K <= object size <= 32M]"),
    Option("image-feature", "", sizes.feature_bits, _FEATURES, many=True),
    Option("image-shared", "", None, "shared image"),
    Option("stripe-unit", "", sizes.byte_count, "stripe unit in B/K/M"),
    Option("stripe-count", "", u64, "stripe count", quotes=True),
    Option("data-pool", "", str, "data pool"),
    Option("mirror-image-mode", "", _one_of("journal", "snapshot"), "mirror image mode [journal or snapshot]"),
    Option("journal-splay-width", "", u64, "number of active journal objects", quotes=True),
    Option("journal-object-size", "", _journal_object, "size of journal objects [4K <= size <= 64M]"),
    Option("journal-pool", "", str, "pool for journal objects"),
    Option("thick-provision", "", None, "fully allocate storage and zero image"),
    Option("size", "s", sizes.image_size, "image size (in M/G/T) [default: M]", required=True),
    Option("sparse-size", "", sizes.byte_count, "sparse size in B/K/M [default: 4K]"),
    Option("path", "", str, "import file (or '-' for stdin)"),
    Option("export-format", "", _format_number, "format of image file"),
    Option("flatten", "", None, "fill clone with parent data (make it independent)"),
    Option("long", "l", None, "long listing format"),
    Option("all", "a", None, "list images from all sources"),
    Option("recursive", "R", None, "list all schedules"),
    Option("descendants", "", None, "include all descendants"),
    Option("allow-shrink", "", None, "permit shrinking"),
    Option("skip-quiesce", "", None, "do not run quiesce hooks"),
    Option("ignore-quiesce-error", "", None, "ignore quiesce hook error"),
    Option("force", "", None, "proceed even if the image has children"),
    Option("limit", "", u64, "maximum allowed snapshot count", quotes=True),
    Option("from-snap", "", str, "snapshot starting point"),
    Option("whole-object", "", None, "compare whole object"),
    Option("exact", "", None, "compute exact disk usage (slow)"),
    Option("merge-snapshots", "", None, "merge snapshot sizes with its image"),
    Option("shared", "", str, "shared lock tag"),
    Option("expires-at", "", str, _EXPIRES, value_name="arg (=now)"),
    Option("expired-before", "", str, "purges images that expired before the given date", value_name="date"),
    Option("threshold", "", float, _THRESHOLD, quotes=True),
    Option("import-only", "", None, "only import data from source"),
    Option("source-spec-path", "", str, "source-spec file (or '-' for stdin)"),
    Option("source-spec", "", str, "source-spec"),
    Option("iterations", "", u64, "iterations of metric collection [> 0]", quotes=True),
    Option("sort-by", "", _one_of(*_SORT_KEYS), _SORT, value_name="arg (=write_ops)"),
    Option("io-size", "", sizes.byte_count, _SIZE),
    Option("io-threads", "", u32, "ios in flight [default: 16]", quotes=True),
    Option("io-total", "", sizes.byte_count, "total size for IO (in B/K/M/G/T) [default: 1G]"),
    Option("io-pattern", "", _one_of("rand", "seq", "full-seq"), "IO pattern (rand, seq, or full-seq) [default: seq]"),
    Option("rw-mix-read", "", u64, "read proportion in readwrite (<= 100) [default: 50]", quotes=True),
    Option(
        "io-type",
        "",
        _one_of("read", "write", "readwrite", "rw"),
        "IO type (read, write, or readwrite(rw))",
        required=True,
    ),
    # of rbdpy itself
    Option("nbd", "", str, "serve over NBD on a Unix socket or TCP address", value_name="SOCKET|HOST:PORT"),
    Option("vhost-user", "", str, "serve over vhost-user-blk on a Unix socket", value_name="SOCKET"),
    Option("read-only", "", None, "serve read-only (a snapshot always is)"),
    Option("resume", "", None, "go on where it was broken off; what was moved is kept"),
    Option("effects", "", None, "say which options this program honours"),
    Option("queues", "", u32, "vhost-user: queues offered [default: 1]", quotes=True),
    Option("name", "", str, "NBD: name of the export [default: the image's]"),
    Option("qmp", "", str, "also answer QMP there", value_name="SOCKET"),
    Option("pidfile", "", str, "written when the image is served", value_name="FILE"),
)
OPTIONS = {option.name: option for option in _ALL}

# what several commands take
IMAGE = ("pool", "namespace", "image")
SNAP = (*IMAGE, "snap")
POOL = ("pool", "namespace")
GROUP = ("pool", "namespace", "group")
GROUP_SNAP = (*GROUP, "snap")
SOURCE_IMAGE = ("pool:source pool name", "namespace:source namespace name", "image:source image name")
SOURCE_SNAP = (*SOURCE_IMAGE, "snap:source snapshot name")
DEST = ("dest-pool", "dest-namespace", "dest")
FORMAT = ("format", "pretty-format")
JOURNAL = ("journal-splay-width", "journal-object-size", "journal-pool")
_LAYOUT = ("order", "object-size", "image-feature", "image-shared", "stripe-unit", "stripe-count", "data-pool")
CREATE = (*_LAYOUT, "mirror-image-mode", *JOURNAL)
CREATE_FORMAT = ("image-format", "new-format", *CREATE)


def option_of(key: str) -> Option:
    """`key`: a name of OPTIONS, or `name:text` for another description."""
    name, _, text = key.partition(":")
    option = OPTIONS[name]
    return option._replace(text=text) if text else option


# options any command takes: who connects where
GLOBALS = {
    "--store": "store",
    "--conf": "conf",
    "-c": "conf",
    "--cluster": "cluster",
    "--id": "id",
    "-i": "id",
    "--name": "name",
    "-n": "name",
    "--user": "id",
    "--mon_host": "mon",
    "--mon-host": "mon",
    "-m": "mon",
    "--keyring": "keyring",
    "-k": "keyring",
    "--keyfile": "keyfile",
    "-K": "keyfile",
}
# beginnings of Ceph's own options, which every command of Ceph's takes
_CEPH = ("rbd_", "debug_", "log_", "ms_", "rados_", "client_", "mon_", "osd_", "objecter_", "auth_", "admin_socket")
# options of Ceph that are spelt without a value
_CEPH_SWITCHES = ("--no-mon-config", "--debug_ms=0")


def split_globals(argv: list[str]) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """The words of the command, who connects where, and overrides of Ceph's options. Failure: a value is missing."""
    rest: list[str] = []
    found: dict[str, str] = {}
    overrides: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        if word == "--":
            rest += [word, *words]
            break
        if not word.startswith("-") or word in _CEPH_SWITCHES:
            rest += [word] if not word.startswith("-") else []
            continue
        name, equals, value = word.partition("=")
        key = GLOBALS.get(name)
        plain = name[2:].replace("-", "_") if name.startswith("--") else ""
        if key is None and not plain.startswith(_CEPH):
            rest.append(word)
            continue
        if not equals:
            following = next(words, None)
            if following is None:
                raise Failure(f"rbd: the required argument for option '{name}' is missing")
            value = following
        if key is not None:
            found[key] = value
        else:
            overrides[plain] = value
    return rest, found, overrides


class Parsed(NamedTuple):
    given: dict[str, Any]  # by option name; switches: True
    words: list[str]  # positional arguments behind the command


def words_of(arguments: list[str]) -> list[str]:
    """What is neither an option nor the value of one, whatever command it may be."""
    found: list[str] = []
    at = 0
    while at < len(arguments):
        word = arguments[at]
        if word == "--":
            return found + arguments[at + 1 :]
        if word[:1] == "-" and len(word) > 1:
            name = word[2:] if word.startswith("--") else word[1:2]
            switch = name in SWITCHES
            if not switch and "=" not in word:
                at += 1  # its value, even behind `-pvalue`: so does rbd
        else:
            found.append(word)
        at += 1
    return found


SWITCHES = {name for option in _ALL if option.convert is None for name in (option.name, option.short) if name}


def parse(arguments: list[str], options: Iterable[Option], skip: int, most: int) -> Parsed:
    """`skip`: words of the command itself. `most`: how many positional arguments may follow, -1 for any number.
    Failure in `rbd`'s words: unknown and incomplete options first, then too many words, then bad values."""
    by_name = {"--" + option.name: option for option in options}
    by_name |= {"-" + option.short: option for option in by_name.values() if option.short}
    raw: list[tuple[Option, str, str]] = []
    words: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            words += rest
            break
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            option = by_name.get(name)
            if option is None:
                raise Failure(f"rbd: unrecognised option '{word}'")
            if equals and not value:
                raise Failure(f"rbd: the argument for option '{name}' should follow immediately after the equal sign")
            _collect(raw, option, name, value if equals else None, rest, by_name)
        elif word.startswith("-") and len(word) > 1:
            _short(raw, word, rest, by_name)
        else:
            words.append(word)
    if most >= 0 and len(words) - skip > most:
        raise Failure("rbd: too many arguments")
    return Parsed(_values(raw), words[skip:])


def _short(raw: list[tuple[Option, str, str]], word: str, rest: list[str], by_name: dict[str, Option]) -> None:
    name, joined = word[:2], word[2:]
    while True:
        option = by_name.get(name)
        if option is None:
            raise Failure(f"rbd: unrecognised option '{'-' + word[1:] if name == word[:2] else name}'")
        if option.convert is None and joined:
            raw.append((option, "--" + option.name, ""))
            name, joined = "-" + joined[0], joined[1:]
            if name == "-=":
                raise Failure(f"rbd: unrecognised option '{word}'")
            continue
        _collect(raw, option, "--" + option.name, joined or None, rest, by_name)
        return


def _collect(
    raw: list[tuple[Option, str, str]],
    option: Option,
    name: str,
    value: str | None,
    rest: list[str],
    by_name: dict[str, Option],
) -> None:
    if option.convert is None:
        if value is not None:
            raise Failure(f"rbd: option '{name}' does not take any arguments")
        raw.append((option, name, ""))
        return
    if value is None:
        # only a short option that follows is taken for one
        if not rest or (rest[0] in by_name and not rest[0].startswith("--")):
            raise Failure(f"rbd: the required argument for option '{name}' is missing")
        value = rest.pop(0)
    raw.append((option, name, value))


def _values(raw: list[tuple[Option, str, str]]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for option, name, text in raw:
        if option.name in given and not option.many:
            raise Failure(f"rbd: option '{name}' cannot be specified more than once")
        if option.convert is None:
            given[option.name] = True
            continue
        try:
            value = option.convert(text)
        except ValueError:
            shown = f" ('{text}')" if option.quotes else ""
            raise Failure(f"rbd: the argument{shown} for option '{name}' is invalid") from None
        if option.many:
            given.setdefault(option.name, []).append(value)
        else:
            given[option.name] = value
    return given
