"""`acpo completion`: completion of verbs, options and settings for a shell, as a script that starts no Python."""

from __future__ import annotations

from . import verb

SHELLS = ("bash", "zsh", "tcsh")
SETTINGS = {"bash": "_acpo_settings", "zsh": "_acpo_settings"}


def add(verbs) -> None:
    parser = verb(
        verbs, "completion", "print a completion script for a shell (needs the extra `completion`)",
        "acpo completion bash > ~/.local/share/bash-completion/completions/acpo\n  acpo completion zsh > ~/.zfunc/_acpo    # a folder of $fpath", run,
    )  # fmt: skip
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="bash, zsh or tcsh")


def run(options) -> int:
    try:
        import shtab
    except ImportError:
        raise ImportError("completion needs shtab: pip install -e '.[completion]'") from None
    from ..cli import parser
    from ..config import Config
    from ..layers import keys

    found = parser()
    verbs = next(action for action in found._actions if action.dest == "verb")
    for name, sub in verbs.choices.items():
        for action in sub._actions:
            if action.dest in ("config", "runs", "path", "out", "model", "dir"):
                action.complete = shtab.FILE
            elif action.dest == "words":
                action.complete = SETTINGS if name == "train" else shtab.FILE
    settings = " ".join(f"{key}=" for key in keys(Config))
    preamble = {
        "bash": f'_acpo_settings() {{ compopt -o nospace 2>/dev/null; compgen -W "{settings}" -- "$1"; }}',
        "zsh": f"_acpo_settings() {{ local -a all=({settings}); compadd -S '' -a all }}",
    }
    print(shtab.complete(found, shell=options.shell, root_prefix="acpo", preamble=preamble))
    return 0
