"""Finished rollouts of the step under way, on disk: a run that stops in the middle of one asks, when it is continued, only for the rest."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import torch
from torch import Tensor

from . import Sample


class Kept(MutableMapping[int, Sample]):
    """Rollouts by their place. key names what they are rollouts of (settings, seed, prompts, limits): a file of another key is begun anew.

    One JSON line a rollout, and one for each that was taken back; a last line that a kill cut off is left out.
    """

    def __init__(self, path: Path, key: str, device: torch.device):
        self.path, self.key, self.device = path, key, device
        self.lock = threading.Lock()
        self.samples = self._read()
        self._write()

    def _read(self) -> dict[int, Sample]:
        out: dict[int, Sample] = {}
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
            if json.loads(lines[0]) != {"key": self.key}:
                return {}
            for line in lines[1:]:
                record = json.loads(line)
                if "ids" not in record:
                    out.pop(record["place"], None)
                    continue
                ids, logp = _decoded(record["ids"], torch.int64), _decoded(record["logp"], torch.float32)
                out[record["place"]] = Sample(ids.to(self.device), logp.to(self.device), record["finished"])
        except (OSError, ValueError, IndexError, KeyError, TypeError):
            pass  # what was read until here is whole
        return out

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".writing")
        temporary.write_text("".join(line + "\n" for line in (json.dumps({"key": self.key}), *map(_line, self.samples.items()))), encoding="utf-8")
        temporary.replace(self.path)

    def __setitem__(self, place: int, sample: Sample) -> None:
        with self.lock:
            self.samples[place] = sample
            self._append(_line((place, sample)))

    def __delitem__(self, place: int) -> None:
        with self.lock:
            del self.samples[place]
            self._append(json.dumps({"place": place}))

    def _append(self, line: str) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def __getitem__(self, place: int) -> Sample:
        return self.samples[place]

    def __iter__(self) -> Iterator[int]:
        return iter(self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def remove(self) -> None:
        """The step is taken: they are in its batch."""
        self.path.unlink(missing_ok=True)


def _line(item: tuple[int, Sample]) -> str:
    place, (ids, logp, finished) = item
    return json.dumps({"place": place, "ids": _encoded(ids), "logp": _encoded(logp), "finished": finished})


def _encoded(values: Tensor) -> str:
    return base64.b64encode(values.cpu().contiguous().numpy().tobytes()).decode()


def _decoded(text: str, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=dtype)
