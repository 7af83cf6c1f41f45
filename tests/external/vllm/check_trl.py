"""TRL's vllm_mode="colocate" on the CPU, under GRPOTrainer and ACPOTrainer: rollouts by vLLM in the training process, whose log-probs are those of
the weights behind every update. Run by run.sh."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve()
ROOT = HERE.parents[3]
RUNS = {  # vLLM's process group cannot be made twice in a process: each run is one of its own
    "theirs": ("GRPOTrainer", {}),
    "off": ("ACPOTrainer", {"off": True}),
    "on": ("ACPOTrainer", {"acpo_reliability": 0.8, "acpo_settings": {"credit.scope": "all"}, "acpo_two_stages": False}),
}


def run(kind: str, settings: dict, out: Path) -> None:
    import tiny
    from trl import GRPOTrainer
    from trl.generation import vllm_generation

    from acpo.integrations.trl import ACPOTrainer

    torch.set_num_threads(1)
    if settings.pop("off", False):
        settings = dict(tiny.OFF)
    # vLLM's attention on CPU wants heads of 64.
    model = tiny.model_path(hidden_size=128, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1)
    if kind == "GRPOTrainer":
        import acpo.rollout.worker  # noqa: F401  what ACPOTrainer does: without it vLLM for the CPU keeps the first weights in silence
    # TRL leaves the dtype to vLLM, which takes bfloat16 for a float32 model: its rounding would hide weights that are a step old.
    vllm_generation.LLM = functools.partial(vllm_generation.LLM, dtype="float32")
    own = tiny.trainer(
        {"GRPOTrainer": GRPOTrainer, "ACPOTrainer": ACPOTrainer}[kind], out.parent / out.stem, model=model, use_vllm=True, vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.1, vllm_max_model_length=128, max_steps=3, **settings,
    )  # fmt: skip
    start, seen, generate = tiny.weights(own), [], own._generate_and_score_completions

    def scored(inputs):
        found = generate(inputs)
        mask, sampled = found["completion_mask"].bool(), found["sampling_per_token_logps"]
        with torch.no_grad():  # one plain forward of the weights as they are now
            ids = torch.cat([found["prompt_ids"], found["completion_ids"]], 1)
            logits = own.model(ids, attention_mask=torch.cat([found["prompt_mask"], found["completion_mask"]], 1)).logits
            logits = logits[:, found["prompt_ids"].size(1) - 1 : -1].double()
            logp = logits.log_softmax(-1).gather(2, found["completion_ids"].unsqueeze(2)).squeeze(2)
        seen.append(float((logp - sampled)[mask].abs().max()))
        return found

    own._generate_and_score_completions = scored
    own.train()
    names = ("loss", "sampling/sampling_logp_difference/max", "acpo/segments", "acpo/shaping")
    torch.save({"start": start, "weights": tiny.weights(own), "worst": seen, **{name: tiny.logged(own, name) for name in names}}, out)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trl")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE.parents[1] / "trl"))), "TRL_EXPERIMENTAL_SILENCE": "1"}
    for name in RUNS:
        job = subprocess.run(
            [sys.executable, str(HERE), name, str(folder / f"{name}.pt")], env=environment, capture_output=True, text=True, timeout=3600
        )
        assert job.returncode == 0, job.stdout[-3000:] + job.stderr[-6000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=False) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_rollouts_come_from_the_weights_of_every_step(found, name):
    one = found[name]
    print(f"\n{name}: largest |log-prob of vLLM - transformers| before each of three steps {', '.join(f'{x:.1e}' for x in one['worst'])}", end="")
    assert len(one["worst"]) == len(one["loss"]) == 3 and max(one["worst"]) < 1e-4
    moved = max(float((value - one["start"][key]).abs().max()) for key, value in one["weights"].items())
    assert moved > 1e-3, "weights that stay would show nothing"


def test_reliability_0_is_grpo_to_the_bit_with_vllm_too(found):
    theirs, off, on = (found[name]["weights"] for name in ("theirs", "off", "on"))
    assert all(torch.equal(value, off[name]) for name, value in theirs.items()) and found["theirs"]["loss"] == found["off"]["loss"]
    assert any(not torch.equal(value, on[name]) for name, value in theirs.items())
    assert max(found["on"]["acpo/shaping"]) > 0 and found["on"]["acpo/segments"][0] > 1.5


if __name__ == "__main__":
    kind, settings = RUNS[sys.argv[1]]
    run(kind, dict(settings), Path(sys.argv[2]))
