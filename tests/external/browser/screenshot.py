"""A picture of a page: screenshot.py PAGE.html OUT.png [light|dark] [WIDTHxHEIGHT] [keys to press ...]."""

from __future__ import annotations

import sys
from pathlib import Path

from chromium import chromium


def main(page: str, out: str, scheme: str = "light", size: str = "1360x860", *keys: str) -> None:
    width, height = map(int, size.split("x"))
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        tab.goto(Path(page).resolve().as_uri())
        tab.wait_for_timeout(300)
        for key in keys:
            tab.keyboard.press(key)
        tab.wait_for_timeout(300)
        tab.screenshot(path=out)


if __name__ == "__main__":
    main(*sys.argv[1:])
