"""Runs the commands of README.md, and its Python, as they stand there.

    python tests/readme.py [--list]

Every fenced block is a test. A block that takes long, or needs what a bare machine lacks, has a comment in the line behind it:

    <!-- ci: a shorter form -->      run these commands instead (several lines are allowed)
    <!-- ci: no, because ... -->     run nothing: the reason is printed

Everything runs in the repository's root, in this environment, one block after the other; the first that fails ends it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```\n(?:<!-- ci: (.*?) -->\n)?", re.M | re.S)


class Block(NamedTuple):
    line: int
    language: str
    text: str
    instead: str | None

    @property
    def reason(self) -> str:
        """Why nothing is run; empty where something is."""
        return self.instead.partition("because")[2].strip() if self.instead and re.match(r"no, because \S", self.instead) else ""

    @property
    def command(self) -> str:
        if self.instead:
            return self.instead
        text = re.sub(r"(^|\s)#.*", "", self.text, flags=re.M) if self.language != "python" else self.text
        return text.strip()


def blocks(page: str) -> list[Block]:
    """The fenced blocks that are commands: shell (no language, sh, bash) and Python. A tree of files is none."""
    found = []
    for match in BLOCK.finditer(page):
        language, text, instead = match.groups()
        if language in ("", "sh", "bash", "python") and not re.match(r"\S+/ {2,}", text):
            found.append(Block(page[: match.start()].count("\n") + 1, language, text, instead))
    return found


def run(block: Block) -> int:
    if block.language == "python" and not block.instead:
        with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
            file.write(block.command)
            file.flush()
            return subprocess.run([sys.executable, file.name], cwd=ROOT).returncode
    return subprocess.run(["bash", "-euo", "pipefail", "-c", block.command], cwd=ROOT).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the commands of README.md.")
    parser.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    parser.add_argument("page", nargs="?", default=str(ROOT / "README.md"))
    options = parser.parse_args()
    for block in blocks(Path(options.page).read_text(encoding="utf-8")):
        where = f"{Path(options.page).name}, line {block.line}"
        if block.reason:
            print(f"{where}: not run: {block.reason}", flush=True)
            continue
        print(f"{where}: {block.command if block.language != 'python' or block.instead else 'Python'}", flush=True)
        if options.list:
            continue
        begin = time.monotonic()
        code = run(block)
        if code != 0:
            print(f"{where}: exit code {code}", flush=True)
            return 1
        print(f"{where}: {time.monotonic() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
