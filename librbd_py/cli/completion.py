"""Shell completion: `source <(rbdpy completion)` in bash (zsh: after `bashcompinit`)."""

from __future__ import annotations

from librbd_py.cli.main import load_commands, parser_of, primary
from librbd_py.cli.registry import COMMANDS

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
    load_commands()
    follow: dict[str, set[str]] = {}
    for words in COMMANDS:
        for length in range(len(words)):
            follow.setdefault(" ".join(words[:length]), set()).add(words[length])
    cases = [f"""    "{words}") answer="{" ".join(sorted(answer))}" ;;""" for words, answer in sorted(follow.items())]
    for command in primary():
        options = [o for action in parser_of(command)._actions for o in action.option_strings if o.startswith("--")]
        for words in (command.words, *command.aliases):
            if " ".join(words) not in follow:
                line = f"""    "{" ".join(words)}") answer="{" ".join(sorted(options))} $(rbdpy ls 2>/dev/null)" ;;"""
                cases.append(line)
    return _TEMPLATE.replace("@CASES@", "\n".join(cases))
