"""A run's directory: config.yaml, metrics.jsonl, checkpoints/, rollouts/; and whoever is told of what stands there."""

from __future__ import annotations

import importlib.util
import json
import os

import yaml

from . import trackers
from .config import Config, to_dict
from .display import Display


class Run:
    def __init__(self, config: Config, quiet: bool = False):
        self.config = config
        self.directory = config.directory
        self.checkpoints = self.directory / "checkpoints"
        self.metrics = self.directory / "metrics.jsonl"
        self.display = Display(quiet)
        self.tracker: trackers.Tracker | None = None
        self.keeps_rollouts = config.trainer.keep_rollouts and importlib.util.find_spec("pyarrow") is not None

    def begin(self) -> None:
        """Makes the directory this run's own. Nothing is written before: a run that is refused leaves no trace in another's directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "config.yaml").write_text(yaml.safe_dump(to_dict(self.config), sort_keys=False), encoding="utf-8")

    def records(self) -> list[dict]:
        """The lines of metrics.jsonl; a last line that a kill cut off is left out."""
        if not self.metrics.exists():
            return []
        out = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                out.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return out

    def has_step(self, step: int) -> bool:
        return any(r["phase"] != "warmup" and r["step"] == step for r in self.records())

    def cut_back(self, warmup_step: int, step: int) -> None:
        """Drops the records after the checkpoint that the run continues from, so that no step stands there twice."""
        kept = [r for r in self.records() if (r["step"] <= warmup_step if r["phase"] == "warmup" else r["step"] <= step)]
        temporary = self.metrics.with_suffix(".writing")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        os.replace(temporary, self.metrics)
        for path in (self.directory / "rollouts").glob("step-*.parquet"):
            if int(path.stem.partition("-")[2]) > step:
                path.unlink()

    def save_rollouts(self, step: int, columns: dict[str, list]) -> None:
        """One parquet file a step (the extra `report`), written beside and renamed."""
        import pyarrow
        from pyarrow import parquet

        folder = self.directory / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".step-{step}.writing"
        parquet.write_table(pyarrow.table(columns), temporary)
        os.replace(temporary, folder / f"step-{step}.parquet")

    def log(self, record: dict) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self.tracker is not None:
            self.tracker.log(record)
        self.display.show(record)

    def track(self, step: int) -> None:
        """From here on trainer.log is told too; the run continues behind `step`."""
        self.tracker = trackers.build(self.config, self.directory, step)

    def start_phase(self, name: str, total: int, done: int) -> None:
        self.display.start_phase(name, total, done)

    def say(self, text: str) -> None:
        self.display.say(text)

    def warn(self, text: str) -> None:
        self.display.warn(text)

    def finish(self) -> None:
        self.display.finish()

    def close(self) -> None:
        self.finish()
        if self.tracker is not None:
            self.tracker.close()
            self.tracker = None

    def last_evaluation(self) -> dict[str, float]:
        found = [r for r in self.records() if "eval/accuracy" in r]
        return {k: v for k, v in found[-1].items() if k.startswith("eval/") or k == "step"} if found else {}
