"""A pretrained model with its own tokenizer and chat template: what a run does with it is what transformers does, and what is exact is so on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from contract import assert_within_budget
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from acpo import config
from acpo.cli import main
from acpo.policy import build, eos_ids
from acpo.problems import HINT, Problem
from acpo.prompts import Prompts
from acpo.rollout.local import LocalEngine
from acpo_kernels import linear_hindsight_information, linear_logprob_entropy

ROOT = Path(__file__).resolve().parents[3]
QUESTIONS = (
    ("Tom has 5 apples and buys 7 more. How many apples does he have?", "12", "Tom has 5 apples.\n\nWith 7 more it is 5 + 7.\n\nThe answer is 12."),
    ("A box holds 6 eggs. How many eggs are in 4 boxes?", "24", "Each box holds 6 eggs.\n\n4 boxes hold 4 * 6.\n\nThe answer is 24."),
    ("Ann had 20 pens and lost 8. How many are left?", "12", "Ann had 20 pens.\n\nWithout 8 it is 20 - 8.\n\nThe answer is 12."),
)


def settings(folder: Path, *more: str) -> list[str]:
    return [
        f"problems.path={ROOT / 'tests/fixtures/problems.jsonl'}", f"policy.path={folder}", "policy.device=cpu", "problems.chat=true",
        "problems.held_out=1", "eval.max_problems=1", "eval.samples=0", "verify.kind=exact", "rollout.prompts=2", "rollout.group_size=3",
        "rollout.max_new_tokens=16", "trainer.micro_batch_tokens=1024", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def policy(folder):
    chosen = config.load(None, settings(folder))
    return *build(chosen), chosen


def test_greedy_decoding_is_that_of_transformers(folder, policy):
    """Prompts of unequal lengths in one batch, through the chat template, against `generate` on each alone."""
    own, tokenizer, chosen = policy
    prompts = Prompts(chosen.problems, tokenizer)
    engine = LocalEngine(own, eos_ids(own, tokenizer), 65536)
    ids = [prompts.prompt(question) for question, *_ in QUESTIONS]
    found = engine.generate(ids, max_new_tokens=24, temperature=0.0, generator=torch.Generator())
    theirs_tokenizer, theirs = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for (question, *_), prompt, sample in zip(QUESTIONS, ids, found, strict=True):
        message = theirs_tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert message["input_ids"][0].tolist() == prompt
        wanted = theirs.generate(**message, max_new_tokens=24, do_sample=False)[0, len(prompt) :]
        assert sample.ids.tolist() == wanted.tolist(), (tokenizer.decode(sample.ids), tokenizer.decode(wanted))


def test_operations_on_its_own_states(policy):
    """Log-prob, entropy and both streams on hidden states that a network made, some of whose features are a hundred times the others."""
    own, tokenizer, chosen = policy
    prompts = Prompts(chosen.problems, tokenizer)
    responses = [torch.tensor(prompts.encode(trace)) for *_, trace in QUESTIONS]
    with torch.no_grad():
        plain = own.hidden([prompts.prompt(q) for q, *_ in QUESTIONS], responses)
        hinted = own.hidden([prompts.hinted(Problem("", q, a, hint=HINT)) for q, a, _ in QUESTIONS], responses)
        weight, ids = own.head()["weight"], torch.cat(responses)
        for operation, states in ((linear_logprob_entropy, (plain,)), (linear_hindsight_information, (plain, hinted))):
            single, exact = (operation(*(x.to(d) for x in (*states, weight)), ids, impl="reference") for d in (torch.float32, torch.float64))
            for name, x, y, z in zip(single._fields, operation(*states, weight, ids), single, exact, strict=True):
                assert_within_budget(x, y, z, f"{operation.__name__}: {name}")


def test_the_answer_in_the_prompt_speaks_for_the_right_answer(folder, tmp_path, capsys):
    """Of the answer's own line, which is likelier to who is told the answer than to who is not, and on the whole less likely to who is told another
    (line by line it need not be: the hint has the line's other words too)."""
    sums = []
    for shift in (0, 31):
        path = tmp_path / f"traces-{shift}.jsonl"
        rows = [{"problem": q, "answer": str(int(a) + shift), "response": trace, "outcome": 1.0} for q, a, trace in QUESTIONS]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        assert main(["inspect", "--text", str(path), "--model", str(folder), "problems.chat=true", "policy.device=cpu", "--json"]) == 0
        view = json.loads(capsys.readouterr().out)
        sums.append([rollout["steps"][-1]["hindsight"] for group in view["groups"] for rollout in group["rollouts"]])
    assert min(sums[0]) > 0 and sum(sums[0]) > sum(sums[1]), sums


def test_a_run_that_goes_on_is_the_unbroken_one_to_the_bit(folder, tmp_path):
    """Two steps, and the second once more from the checkpoint behind the first."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more = "attribution.reliability=1", "optimizer.learning_rate=1e-6", "trainer.steps=2", "trainer.checkpoint_every=1", "eval.start=false"
    words = ["train", str(ROOT / "configs" / "gsm8k.yaml"), *settings(folder, *more)]
    assert main([*words, f"run_dir={whole}"]) == 0
    shutil.copytree(whole, broken)
    for later in (broken / "checkpoints" / "step-2", broken / "policy"):
        shutil.rmtree(later)
    assert main([*words, f"run_dir={broken}"]) == 0
    ends = [load_file(run / "policy" / "model.safetensors") for run in (whole, broken)]
    before = load_file(folder / "model.safetensors")
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in ends[0]) and any(not torch.equal(ends[0][n], before[n]) for n in before)
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if record["phase"].startswith("stage") and "step_time" in record]
    assert len(steps) == 2 and all(abs(r["sampling/kl"]) < 1e-4 and r["grad_norm"] > 0 for r in steps), steps
