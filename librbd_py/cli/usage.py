"""What `help` prints, in `rbd`'s layout: 80 columns, descriptions in a column of their own."""

from __future__ import annotations

from librbd_py.cli.arguments import GLOBALS, Option, option_of
from librbd_py.cli.registry import Command, Verb, everything

WIDTH = 80
_NAME_WIDTH = 20  # of an option, at least
_MOST_INDENT = 37  # descriptions begin no further right

_WHERE = "[<pool-name>/[<namespace>/]]"
POSITIONAL = {
    "image-spec": f"image specification\n(example: {_WHERE}<image-name>)",
    "snap-spec": f"snapshot specification\n(example: {_WHERE}<image-name>@<snap-name>)",
    "image-or-snap-spec": f"image or snapshot specification\n(example: {_WHERE}<image-name>[@<snap-name>])",
    "group-spec": f"group specification\n(example: {_WHERE}<group-name>)",
    "group-snap-spec": f"group specification\n(example: {_WHERE}<group-name>@<snap-name>)",
    "pool-spec": "pool specification\n(example: <pool-name>[/<namespace>]",
    "pool-name": "pool name",
}
FEATURE_NOTES = """Image Features:
  (*) supports enabling/disabling on existing images
  (-) supports disabling-only on existing images
  (+) enabled by default for new images if features not specified
"""
_GLOBAL_HELP = (
    ("-c [ --conf ] arg", "path to cluster configuration"),
    ("--cluster arg", "cluster name"),
    ("--id arg", "client id (without 'client.' prefix)"),
    ("-n [ --name ] arg", "client name"),
    ("-m [ --mon_host ] arg", "monitor host"),
    ("-K [ --keyfile ] arg", "path to secret key"),
    ("-k [ --keyring ] arg", "path to keyring"),
    ("--store arg", "embedded:/path or ceph:/path/to/ceph.conf"),
)


def positional(key: str) -> tuple[str, str, str]:
    """Name, description and the way usage shows it."""
    name, _, text = key.partition(":")
    many = text.endswith("...") or name.endswith("...")
    optional = name.startswith("[")
    name, text = name.strip("[.]"), text.removesuffix("...")
    for prefix, words in (("source-", "source "), ("dest-", "destination ")):
        if not text and name.startswith(prefix):
            text = words + POSITIONAL[name.removeprefix(prefix)]
    shown = f"<{name}>" + (f" [<{name}> ...]" if many else "")
    return name, text or POSITIONAL[name], f"[{shown}]" if optional else shown


class _Column:
    """Text from column `indent` on; the line already has `used` characters. Breaks behind `delimiter`."""

    def __init__(self, indent: int, used: int) -> None:
        self._indent, self._used = indent, used
        self._out: list[str] = []
        self._line = ""

    def _start(self) -> None:
        if self._used >= self._indent:
            self._used = 0
            self._out.append("\n")
        self._out.append(" " * (self._indent - self._used))
        self._used = 0

    def add(self, text: str, delimiter: str = " ") -> None:
        for character in text:
            if character == "\n":
                self._start()
                self._out.append(self._line + "\n")
                self._line = ""
                continue
            if self._indent + len(self._line) >= WIDTH:
                at = self._line.rfind(delimiter)
                if at < 0 and delimiter != " ":
                    at = self._line.rfind(" ")
                self._start()
                if at >= 0:
                    self._out.append(self._line[:at])
                    self._line = self._line[at + (delimiter == " ") :]
                else:
                    self._out.append(self._line)
                    self._line = ""
                self._out.append("\n")
            self._line += character

    def text(self) -> str:
        return "".join(self._out)


def _described(label: str, indent: int, text: str) -> str:
    column = _Column(indent, len(label))
    column.add(text + "\n")
    return label + column.text()


def _label(option: Option) -> tuple[str, str]:
    name = f"-{option.short} [ --{option.name} ]" if option.short else f"--{option.name}"
    return name, option.value_name if option.convert is not None else ""


def of_verb(verb: Verb, called: tuple[str, ...], program: str) -> str:
    head = f"usage: {program} {' '.join(called)}"
    options = [option_of(key) for key in verb.options]
    places = [positional(key) for key in verb.positional]
    text = head + _short(options, [shown for _, _, shown in places], len(head))
    text += f"\n{verb.help}\n\n"
    widest = max([_NAME_WIDTH, *(len(name) + len(value) + 1 for name, value in map(_label, options))])
    widest = max([widest, *(len(name) + 3 for name, _, _ in places)])
    indent = min(widest + 2, _MOST_INDENT) + 1
    if places:
        text += "Positional arguments\n"
        text += "".join(_described(f"  <{name}>", indent, about) for name, about, _ in places) + "\n"
    text += _details("Optional arguments", options, indent)
    text += _details("Serving instead of copying", [option_of(key) for key in verb.more], _MOST_INDENT)
    return text + (verb.notes + "\n" if verb.notes else "")


def _details(title: str, options: list[Option], indent: int) -> str:
    if not options:
        return ""
    text = title + "\n"
    for option in options:
        name, value = _label(option)
        if "deprecated" not in option.text:
            text += _described(f"  {name} {value}", indent, option.text)
    return text + "\n"


def _short(options: list[Option], places: list[str], used: int) -> str:
    words = []
    for option in options:
        word = f"--{option.name}" + (f" <{option.name}>" if option.convert is not None else "")
        words.append(word if option.required else f"[{word}]")
    widest = max([len(word) for word in (*words, *places)], default=0)
    indent = min(used, _MOST_INDENT) + 1
    if indent + widest + 2 > WIDTH:
        indent = WIDTH - widest - 2
    column = _Column(indent, used)
    for word in words:
        column.add(word + " ", "[")
    if words or not places:
        column.add("\n", "[")
    if places:
        column.add("".join(word + " " for word in places) + "\n")
    return column.text()


def of_command(command: Command, program: str) -> str:
    from librbd_py.cli.extra import parser_of

    return parser_of(command, program).format_help()


def overview(program: str) -> str:
    text = f"usage: {program} <command> ...\n\nCommand-line interface for managing Ceph RBD images.\n\n"
    text += "Positional arguments:\n  <command>\n"
    rows = []
    for made in everything():
        if isinstance(made, Verb) and not made.shown:
            continue
        name = " ".join(made.words)
        alias = made.alias if isinstance(made, Verb) else (made.aliases or ((),))[0]
        if alias:
            # long ones are shortened to what differs
            name += f" (... {alias[-1]})" if len(alias) > 2 else f" ({' '.join(alias)})"
        rows.append((name, made.help))
    indent = min(max(len(name) for name, _ in rows) + 4, _MOST_INDENT) + 1
    text += "".join(_described("    " + name, indent, about) for name, about in rows)
    text += "\nOptional arguments:\n"
    text += "".join(f"  {name:<35} {about}\n" for name, about in _GLOBAL_HELP)
    return text + f"\nSee '{program} help <command>' for help on a specific command.\n"


def global_options() -> list[str]:
    return sorted(name for name in GLOBALS if name.startswith("--"))
