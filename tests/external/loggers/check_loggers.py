"""A run of three steps, told to TensorBoard, wandb (offline) and trackio (local): what they hold is what metrics.jsonl holds."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
FOLDER = Path(tempfile.mkdtemp(prefix="loggers-"))
os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(FOLDER / "trackio"), "HF_HUB_OFFLINE": "1"}

from loop import records, write_config  # noqa: E402

from acpo.cli import main  # noqa: E402
from acpo.trainer import Trainer  # noqa: E402


def train(name: str, steps: int) -> Path:
    run = FOLDER / name / "run"
    shared = ["warmup.steps=0", "eval.samples=0", "problems.held_out=4", "trainer.checkpoint_every=1"]
    words = [f"run_dir={run}", *shared, f"trainer.log={name}", f"trainer.steps={steps}"]
    assert main(["train", str(write_config(FOLDER / name)), *words, "--quiet"]) == 0
    return run


def tensorboard(run: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return {e.step: e.value for e in found.Scalars("grad_norm")}


def continued() -> bool:
    """A run that is broken off in its fourth step and continued behind the second: TensorBoard drops the third that was shown, nothing of the
    warm-up, and every step is there once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, step = FOLDER / "continued" / "run", Trainer.step
    shared = ["eval.samples=0", "problems.held_out=4", "trainer.checkpoint_every=2", "trainer.steps=5", "warmup.steps=100", "trainer.log=tensorboard"]
    words = ["train", str(write_config(FOLDER / "continued")), f"run_dir={run}", *shared, "--quiet"]

    def breaks_off(self):
        if self.step_number == 4:
            raise KeyboardInterrupt
        return step(self)

    Trainer.step = breaks_off
    assert main(words) == 130
    Trainer.step = step
    assert main(words) == 0
    found = {}
    for folder, tag in ((run / "tensorboard", "grad_norm"), (run / "tensorboard" / "warmup", "warmup/loss")):
        events = EventAccumulator(str(folder))
        events.Reload()
        found[tag] = [e.step for e in events.Scalars(tag)]
    wanted = [r["step"] for r in records(run) if r["phase"] == "warmup"]
    right = found == {"grad_norm": [1, 2, 3, 4, 5], "warmup/loss": wanted} and len(wanted) > 1
    print(f"tensorboard, continued: {'right' if right else 'WRONG'}, steps {found['grad_norm']}, warm-up {found['warmup/loss']} of {wanted}")
    return right


def wandb(run: Path) -> dict[int, float]:
    """An offline run is a log in LevelDB's format (blocks of 32 KiB, records of type whole, first, middle, last) of protobuf records."""
    from wandb.proto import wandb_internal_pb2

    out = {}
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        data, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            parts += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(parts)
                parts = b""
                row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                if "grad_norm" in row:
                    out[int(row["step"])] = row["grad_norm"]
    return out


def trackio(run: Path) -> dict[int, float]:
    out = {}
    for path in (FOLDER / "trackio").rglob("*.db"):
        with sqlite3.connect(path) as base:
            for step, text in base.execute("select step, metrics from metrics"):
                row = json.loads(text)
                if "grad_norm" in row:
                    out[int(step)] = row["grad_norm"]
    return out


if __name__ == "__main__":
    bad = 0
    for name, read in (("tensorboard", tensorboard), ("wandb", wandb), ("trackio", trackio)):
        if importlib.util.find_spec(name) is None:
            print(f"{name}: not installed, NOT RUN")
            continue
        run = train(name, 3)
        wanted = {r["step"]: r["grad_norm"] for r in records(run) if "grad_norm" in r}
        found = read(run)
        right = found.keys() == wanted.keys() and all(abs(found[s] - v) <= 1e-6 * abs(v) for s, v in wanted.items())
        bad += not right
        print(f"{name}: {'right' if right else 'WRONG'}, steps {sorted(found)} of {sorted(wanted)}")
    bad += importlib.util.find_spec("tensorboard") is not None and not continued()
    sys.exit(int(bad > 0))  # wandb's own exit hook takes no truth value
