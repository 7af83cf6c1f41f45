"""Where a script writes: types for argparse that make the folder before the work, so that hours of it are not lost at their end."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def folder(text: str) -> Path:
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"the folder {path} cannot be made: {error.strerror}") from None
    return _writable(path)


def file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, wanted a file")
    if path.exists():
        return _writable(path)
    folder(str(path.parent))
    return path


def _writable(path: Path) -> Path:
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written")
    return path
