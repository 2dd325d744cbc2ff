"""Shell completion: `source <(rbdpy completion)` in bash (zsh: after `bashcompinit`)."""

from __future__ import annotations

from librbd_py.cli.arguments import option_of
from librbd_py.cli.registry import COMMANDS, Command, Verb, everything

_TEMPLATE = """# bash completion of rbdpy
_rbdpy() {
    local current=${COMP_WORDS[COMP_CWORD]} words="" i
    for ((i = 1; i < COMP_CWORD; i++)); do
        [[ ${COMP_WORDS[i]} == -* ]] || words+="${words:+ }${COMP_WORDS[i]}"
    done
    local answer=""
    case "$words" in
@CASES@
    *) answer=$(rbdpy ls 2>/dev/null) ;;
    esac
    COMPREPLY=($(compgen -W "$answer" -- "$current"))
}
complete -F _rbdpy rbdpy
"""


def script() -> str:
    """The words that may follow each beginning of a command; behind a whole command its options and the images."""
    everything()
    follow: dict[str, set[str]] = {}
    for words in COMMANDS:
        for length in range(len(words)):
            follow.setdefault(" ".join(words[:length]), set()).add(words[length])
    cases = [f"""    "{words}") answer="{" ".join(sorted(answer))}" ;;""" for words, answer in sorted(follow.items())]
    for words, made in sorted(COMMANDS.items()):
        if " ".join(words) not in follow:
            options = " ".join(sorted(_options(made)))
            cases.append(f"""    "{" ".join(words)}") answer="{options} $(rbdpy ls 2>/dev/null)" ;;""")
    return _TEMPLATE.replace("@CASES@", "\n".join(cases))


def _options(made: Verb | Command) -> list[str]:
    if isinstance(made, Verb):
        return ["--" + option_of(key).name for key in (*made.options, *made.more)]
    from librbd_py.cli.extra import parser_of

    return [o for action in parser_of(made, "rbdpy")._actions for o in action.option_strings if o.startswith("--")]
