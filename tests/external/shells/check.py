"""Completion in real, interactive shells: what `acpo tr` and a TAB become, and the like. The shells stand on pseudo-terminals; `acpo` is a function
that prints its arguments, so that what is judged is what the shell made of the line.

    check.py [SHELL ...]        those named, else every one of bash, zsh and fish that is installed
"""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CASES = (
    ("tr\t", ["train"]),
    ("doctor --js\t", ["doctor", "--json"]),
    ("report --out configs/gs\t", ["report", "--out", "configs/gsm8k.yaml"]),
    ("train configs/ari\t", ["train", "configs/arithmetic.yaml"]),
    ("train configs/arithmetic.yaml trainer.ste\t7", ["train", "configs/arithmetic.yaml", "trainer.steps=7"]),  # no space behind the =
    ("inspect --sort sur\t", ["inspect", "--sort", "surprise"]),
    ("completion zs\t", ["completion", "zsh"]),
)
START = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "source {script}; acpo() {{ printf 'GOT<%s>' \"$@\"; echo; }}; bind 'set bell-style none'"),
    "zsh": (
        ["zsh", "-f", "-i"],
        "fpath=({folder} $fpath); autoload -Uz compinit && compinit -u -d {folder}/dump; acpo() {{ printf 'GOT<%s>' \"$@\"; echo }}",
    ),
    "fish": (["fish", "--no-config", "-i"], "source {script}; function acpo; printf 'GOT<%s>' $argv; echo; end"),
}


class Terminal:
    def __init__(self, command: list[str]):
        self.process, self.end = pty.fork()
        if self.process == 0:
            os.chdir(ROOT)
            os.environ.update(TERM="dumb", HOME=tempfile.mkdtemp(), PS1="$ ")
            os.execvp(command[0], command)

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def read_until(self, pattern: str, seconds: float = 20.0) -> re.Match:
        seen, until = "", time.monotonic() + seconds
        while time.monotonic() < until:
            if select.select([self.end], [], [], 0.1)[0]:
                seen += os.read(self.end, 65536).decode(errors="replace")
                # fish asks the terminal what it is, and waits
                if "\x1b[c" in seen or "\x1b[0c" in seen:
                    self.type("\x1b[?1;2c")
                    seen = seen.replace("\x1b[c", "").replace("\x1b[0c", "")
                if found := re.search(pattern, seen):
                    return found
        raise AssertionError(f"{pattern!r} did not come; seen was {seen!r}")

    def close(self) -> None:
        os.kill(self.process, 9)
        os.waitpid(self.process, 0)


def check(shell: str) -> None:
    folder = Path(tempfile.mkdtemp())
    script = folder / "_acpo"
    made = subprocess.run([sys.executable, "-m", "acpo.cli", "completion", shell], cwd=ROOT, capture_output=True, text=True, check=True)
    script.write_text(made.stdout)
    command, begin = START[shell]
    for typed, wanted in CASES:
        terminal = Terminal(command)
        try:
            terminal.type(begin.format(script=script, folder=folder) + "; echo re''ady\n")
            terminal.read_until("ready")
            terminal.type("acpo " + typed.partition("\t")[0])
            time.sleep(0.2)
            terminal.type("\t")
            time.sleep(1.0)  # a shell completes in its own time; what comes behind a TAB too early stands in the middle of a word
            terminal.type(typed.partition("\t")[2] + "\n")
            line = terminal.read_until(r"GOT<[^\r\n]*>\s*[\r\n]")[0]
        finally:
            terminal.close()
        found = [word for word in re.findall("GOT<([^>]*)>", line) if word]
        assert found == wanted, f"{shell}: {typed!r} became {found}, wanted {wanted}"
    print(f"{shell}: {len(CASES)} lines completed")


if __name__ == "__main__":
    names = sys.argv[1:] or [name for name in START if shutil.which(name)]
    for name in names:
        check(name)
    if absent := [name for name in START if name not in names]:
        print(f"not tried: {', '.join(absent)}")
