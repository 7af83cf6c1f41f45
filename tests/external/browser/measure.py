"""How the page feels with 64 rollouts of 4,096 tokens: milliseconds, lower quartile and worst of COUNT loads (default 5), in headless Chromium.

load: from navigation to the first frame with text. frame: the time between two frames while the columns scroll down, and across all rollouts.
sort, shade: from the key to the next frame.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from chromium import chromium
from views import many, write

SCROLL = """async ([axis, pixels, frames]) => {
  const area = document.getElementById("columns"), times = [];
  area.scrollTo(0, 0);
  await new Promise(requestAnimationFrame);
  let last = performance.now();
  for (let i = 0; i < frames; i++) {
    area[axis] += pixels;
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    times.push(now - last);
    last = now;
  }
  return times;
}"""
KEY = """async (key) => {
  const begin = performance.now();
  document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  await new Promise(requestAnimationFrame);
  await new Promise((done) => { const c = new MessageChannel(); c.port1.onmessage = done; c.port2.postMessage(0); });
  return performance.now() - begin;
}"""


def quartile(times: list[float]) -> str:
    times = sorted(times)
    return f"{times[len(times) // 4]:7.1f} {times[len(times) // 2]:7.1f} {times[int(0.99 * (len(times) - 1))]:7.1f} {times[-1]:7.1f}"


def main(count: str = "5") -> None:
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        path = write(many(), Path(folder))
        print(f"{path.stat().st_size:,} bytes, 64 rollouts of 4,096 tokens, 64 steps each; {browser.version}; load average {os.getloadavg()[0]:.1f}")
        found: dict[str, list[float]] = {name: [] for name in ("load", "frame, down", "frame, across", "sort", "shade")}
        for _ in range(int(count)):
            tab = browser.new_page(viewport={"width": 1440, "height": 900})
            tab.goto(path.as_uri())
            tab.wait_for_selector("li .text")
            found["load"].append(tab.evaluate("performance.getEntriesByType('paint').at(-1).startTime"))
            found["frame, down"] += tab.evaluate(SCROLL, ["scrollTop", 60, 120])
            found["frame, across"] += tab.evaluate(SCROLL, ["scrollLeft", 120, 200])
            found["sort"] += [tab.evaluate(KEY, "s") for _ in range(4)]
            found["shade"] += [tab.evaluate(KEY, "c") for _ in range(4)]
            tab.close()
        print(f"{'milliseconds':15}{'quarter':>8}{'median':>8}{'99 %':>8}{'worst':>8}")
        for name, times in found.items():
            print(f"{name:15} {quartile(times)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
