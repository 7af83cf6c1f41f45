"""A run's directory and what is shown while it runs: config.yaml, metrics.jsonl, checkpoints/, rollouts/, and one progress bar a phase."""

from __future__ import annotations

import importlib.util
import json
import os
import sys

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .config import Config, to_dict

WATCHED = (
    ("reward", "reward", ".2f"), ("eval/accuracy", "held-out", ".3f"), ("entropy", "H", ".3f"), ("attribution/reliability", "rel", ".2f"),
    ("frac_reward_zero_std", "zero-std", ".2f"), ("warmup/loss", "loss", ".3f"),
)  # fmt: skip


class Run:
    def __init__(self, config: Config):
        self.config = config
        self.directory = config.directory
        self.checkpoints = self.directory / "checkpoints"
        self.metrics = self.directory / "metrics.jsonl"
        self.console = Console(file=sys.stdout)
        self.progress: Progress | None = None
        self.shown: dict[str, float] = {}
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
        self.shown.update({name: record[key] for key, name, _ in WATCHED if key in record})
        text = "  ".join(f"{name} {self.shown[name]:{form}}" for _, name, form in WATCHED if name in self.shown)
        if self.progress is not None:
            self.progress.update(self.task, completed=record["step"], numbers=text)
        if not self.console.is_terminal and ("eval/accuracy" in record or record["phase"] == "warmup"):
            self.say(f"{record['phase']} step {record['step']}: {text}")

    def start_phase(self, name: str, total: int, done: int) -> None:
        self.finish()
        self.shown.pop("loss", None)
        self.progress = Progress(
            TextColumn("{task.description:8}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task(name, total=total, completed=done, numbers="")
        self.progress.start()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def finish(self) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def last_evaluation(self) -> dict[str, float]:
        found = [r for r in self.records() if "eval/accuracy" in r]
        return {k: v for k, v in found[-1].items() if k.startswith("eval/") or k == "step"} if found else {}
