"""Two processes on the CPU: a group lies across them, and the method comes to the same on both."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import torch
from tiny import OFF, equal, logged, trained, weights
from torch import multiprocessing
from trl import GRPOTrainer

from acpo.integrations.trl import ACPOTrainer

TWO = {"per_device_train_batch_size": 2, "max_steps": 2}  # groups of 4
ON = {**TWO, "acpo_settings": {"credit.scope": "all"}, "acpo_two_stages": False}


def rank_of_two(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    out = {}
    for name, kind, settings in (("theirs", GRPOTrainer, {**OFF, **TWO}), ("off", ACPOTrainer, {**OFF, **TWO}), ("on", ACPOTrainer, ON)):
        own, start = trained(kind, folder / name, **settings)
        out[name] = {"start": start, "weights": weights(own), "loss": logged(own, "loss")}
        if kind is ACPOTrainer:
            out[name] |= {"state": json.dumps(own._acpo.state()), "segments": logged(own, "acpo/segments"), "shaping": logged(own, "acpo/shaping")}
    torch.save(out, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_a_group_across_two_processes(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    multiprocessing.spawn(rank_of_two, (port, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for rank in (first, second):
        assert equal(rank["theirs"]["weights"], rank["off"]["weights"]), "reliability 0 is GRPO to the bit"
        assert not equal(rank["on"]["start"], rank["on"]["weights"])
    for name in ("theirs", "off", "on"):
        names = first[name]["weights"]
        assert all(torch.equal(value, second[name]["weights"][key]) for key, value in names.items()), name
    assert first["on"]["state"] == second["on"]["state"] != first["off"]["state"]
    assert first["off"]["loss"] == first["theirs"]["loss"] and first["on"]["segments"][0] > 1.5
