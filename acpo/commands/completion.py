"""`acpo completion`: completion of verbs, options and settings for a shell, as a script that starts no Python."""

from __future__ import annotations

import argparse
import shlex

from . import verb

SHELLS = ("bash", "zsh", "fish", "tcsh")
FILES = ("config", "runs", "path", "out", "model", "dir", "file", "text", "html", "tokenizer")

# A setting waits for its value: no space behind the =.
BASH = """
_acpo() { _shtab_acpo "$@"; [[ ${COMPREPLY[0]} != *= ]] || compopt -o nospace; }
complete -o bashdefault -F _acpo acpo
"""


def add(verbs) -> None:
    parser = verb(
        verbs, "completion", "print a completion script for a shell (all but fish need the extra `completion`)",
        "acpo completion bash > ~/.local/share/bash-completion/completions/acpo\n"
        "  acpo completion zsh > ~/.zfunc/_acpo    # a folder of $fpath\n"
        "  acpo completion fish > ~/.config/fish/completions/acpo.fish",
    )  # fmt: skip
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh, fish or tcsh")


def run(options) -> int:
    from ..cli import parser
    from ..config import Config
    from ..display import output
    from ..layers import keys

    found, settings = parser(), [f"{key}=" for key in keys(Config)]
    script = _fish(found, settings) if options.shell == "fish" else _shtab(found, settings, options.shell)
    with output():
        print(script)
    return 0


def _verbs(parser: argparse.ArgumentParser):
    return next(action for action in parser._actions if action.dest == "verb")


def _shtab(parser: argparse.ArgumentParser, settings: list[str], shell: str) -> str:
    try:
        import shtab
    except ImportError:
        raise ImportError("completion needs shtab: pip install -e '.[completion]'") from None
    for name, sub in _verbs(parser).choices.items():
        for action in sub._actions:
            if action.dest in FILES:
                action.complete = shtab.FILE
            elif action.dest == "words":
                action.complete = {"bash": "_acpo_settings", "zsh": "_acpo_settings"} if name == "train" else shtab.FILE
    all_ = " ".join(settings)
    preamble = {
        "bash": f'_acpo_settings() {{ compgen -W "{all_}" -- "$1"; }}',
        "zsh": f"_acpo_settings() {{ local -a all=({all_}); compadd -S '' -a all }}",
    }
    script = shtab.complete(parser, shell=shell, root_prefix="acpo", preamble=preamble)
    return script + BASH if shell == "bash" else script


def _fish(parser: argparse.ArgumentParser, settings: list[str]) -> str:
    lines = ["complete -c acpo -f"]
    verbs = _verbs(parser)
    for said in verbs._choices_actions:
        lines.append(f"complete -c acpo -n __fish_use_subcommand -a {said.dest} -d {shlex.quote(said.help)}")
    for name, sub in verbs.choices.items():
        here = f"complete -c acpo -n '__fish_seen_subcommand_from {name}'"
        for action in sub._actions:
            if action.help == argparse.SUPPRESS:
                continue
            values = f" -a {shlex.quote(' '.join(map(str, action.choices)))}" if action.choices else ""
            files = " -F" if action.dest in FILES or (action.dest == "words" and name != "train") else ""
            if action.option_strings:
                takes = " -x" if action.nargs != 0 and not files else " -r" if files else ""
                spelled = "".join(f" -l {o[2:]}" if o.startswith("--") else f" -s {o[1:]}" for o in action.option_strings)
                lines.append(f"{here}{spelled}{takes}{values}{files} -d {shlex.quote(action.help % vars(action) if action.help else '')}")
            elif values or files:
                lines.append(f"{here}{values}{files}")
            elif action.dest == "words":
                lines.append(f"{here} -a {shlex.quote(' '.join(settings))}")
    return "\n".join(lines)
