"""The path of real problems: configs/gsm8k.yaml with a byte-level tokenizer, end to end."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from loop import records
from tokenizers.processors import TemplateProcessing

from acpo import attributors, config, preflight, synthetic
from acpo.cli import main
from acpo.config import ProblemsConfig
from acpo.policy import byte_tokenizer, load_tokenizer
from acpo.problems import load
from acpo.prompts import Prompts
from acpo.rollout import Sample
from acpo.run import Run
from acpo.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
CONFIG, FIXTURE = ROOT / "configs" / "gsm8k.yaml", ROOT / "tests" / "fixtures" / "problems.jsonl"
SMALL = (
    "problems.held_out=0.2",
    "rollout.prompts=2",
    "rollout.group_size=3",
    "rollout.max_new_tokens=24",
    "trainer.threads=1",
    "policy.device=cpu",
    "trainer.steps=2",
)


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A byte-level BPE of 400 entries, trained on the fixture, with pad, eos and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        FIXTURE.read_text(encoding="utf-8").splitlines(),
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


def overrides(tmp_path: Path, tokenizer: Path, *more: str) -> list[str]:
    return [f"problems.path={FIXTURE}", f"policy.tokenizer={tokenizer}", "policy.from_config=tiny", f"run_dir={tmp_path / 'run'}", *SMALL, *more]


def trainer_of(tmp_path: Path, tokenizer: Path, *more: str) -> Trainer:
    chosen = config.load(CONFIG, overrides(tmp_path, tokenizer, *more))
    return Trainer(chosen, Run(chosen))


@pytest.mark.parametrize("method", ["acpo", "dapo"])
def test_two_steps_end_to_end(tmp_path, tokenizer, method):
    assert main(["train", str(CONFIG), *overrides(tmp_path, tokenizer, f"method={method}")]) == 0
    found = records(tmp_path / "run")
    assert [r["step"] for r in found] == [0, 1, 2]
    assert all(r["tokens/generated"] > 0 and r["completions/max_length"] <= 24 for r in found[1:])
    assert "eval/accuracy" in found[0] and "eval/accuracy" in found[2]
    if method == "acpo":
        assert found[2]["attribution/rows"] == 1.0 and found[2]["frac_reward_zero_std"] > 0, (
            "hindsight has the groups without variance, the tree the rest"
        )
        assert found[2]["tokens/forward_extra"] > found[2]["tokens/generated"]
    else:
        assert found[2]["tokens/generated"] > 2 * 3 * 6 * found[2]["completions/mean_length"], "four rounds a step, all of them counted"
    assert main(["eval", str(tmp_path / "run"), "--samples", "0"]) == 0


def test_prompts_hold_the_problem_and_hints_the_answer(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer)
    assert len(load(FIXTURE)) == 20
    assert len(trainer.train_problems) + len(trainer.held_out) == 20 and len(trainer.held_out) >= 2
    assert not {p.question for p in trainer.train_problems} & {p.question for p in trainer.held_out}
    problem = trainer.train_problems[0]
    text = trainer.tokenizer.decode(trainer.prompts.prompt(problem.prompt))
    question = problem.data["problem"]
    assert text == f"Question: {question}\nSolve it step by step and end with \\boxed{{answer}}.\nAnswer:"
    hinted = trainer.tokenizer.decode(trainer.prompts.hinted(problem))
    assert hinted == f"The answer to the following question is {problem.answer}.\n{text}"


def with_frame(folder: Path, out: Path, frame: str) -> Path:
    """The tokenizer with <bos>, which puts special tokens around a text as the frame says."""
    fast = load_tokenizer(str(folder))
    fast.add_special_tokens({"bos_token": "<bos>"})
    names = [(name, fast.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
    fast.backend_tokenizer.post_processor = TemplateProcessing(single=frame, special_tokens=names)
    fast.save_pretrained(out)
    return out


@pytest.mark.parametrize("frame", ["<bos> $A", "<bos> $A <eos>", "$A <eos>", "$A"])
def test_a_prompt_begins_with_what_the_tokenizer_puts_in_front_of_a_text(tmp_path, tokenizer, frame):
    own = with_frame(tokenizer, tmp_path / "framed", frame)
    trainer = trainer_of(tmp_path, own)
    problem, bos = trainer.train_problems[0], [trainer.tokenizer.bos_token_id] * frame.startswith("<bos>")
    plain = lambda text: trainer.tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    prompt, hinted = trainer.prompts.prompt(problem.prompt), trainer.prompts.hinted(problem)
    assert prompt == bos + plain(problem.prompt) and hinted == bos + plain(problem.hinted_prompt(problem.answer))
    assert trainer.prompts.prompt("<bos>x") == plain("<bos>x"), "never twice"
    assert trainer.prompts.encode("12") == plain("12") and trainer.prompts.spellings("12") == [plain("12"), plain(" 12")]
    (batch,) = (check for check in preflight.checks(trainer) if check.name == "batch")
    assert ("every prompt begins with <bos>" in batch.text) is bool(bos)
    asked = []
    trainer.engine.generate = lambda prompts, **_: asked.extend(prompts) or [Sample(torch.tensor([1]), torch.zeros(1), True)] * len(prompts)
    trainer.evaluate(trainer.held_out, 0, samples=1)
    assert asked and all(ids[: len(bos)] == bos and ids[-1] != trainer.tokenizer.eos_token_id for ids in asked)
    chat = trainer_of(tmp_path, own, "problems.chat=true")
    assert chat.prompts.prompt("x") == plain("<user>x<assistant>"), "a chat template writes its own"


def test_tokenizers_that_put_nothing_in_front_of_a_text(shared_data):
    for tokenizer in (byte_tokenizer(), synthetic.tokenizer(), load_tokenizer(str(shared_data / "tokenizer_qwen2"))):
        text = "abc=12*3"
        assert Prompts(ProblemsConfig(), tokenizer).prompt(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_chat_template_goes_around_both_prompts(tmp_path, tokenizer):
    trainer = trainer_of(tmp_path, tokenizer, "problems.chat=true")
    problem = trainer.train_problems[0]
    assert trainer.tokenizer.decode(trainer.prompts.prompt(problem.prompt)) == f"<user>{problem.prompt}<assistant>"
    assert trainer.tokenizer.decode(trainer.prompts.hinted(problem)) == f"<user>{problem.hinted_prompt(problem.answer)}<assistant>"


def test_a_right_answer_is_paid_and_its_copies_carry_no_information(tmp_path, tokenizer, monkeypatch):
    """The engine is made to write a solution: the text comes back through the bytes, the outcome is 1, and where the answer is spelled
    the hindsight stream is not listened to."""
    trainer = trainer_of(tmp_path, tokenizer, "attribution.reliability=1")
    written: list[str] = []

    def generate(prompts, **_):
        samples = []
        for k, prompt in enumerate(prompts):
            problem = next(p for p in trainer.train_problems if trainer.prompts.prompt(p.prompt) == prompt)
            answer = problem.answer if k // 3 == 0 else "no"
            written.append(f"First we think. Then we get {answer}.\n\nSo the answer is \\boxed{{{answer}}}.")
            ids = torch.tensor([*trainer.prompts.encode(written[-1]), trainer.tokenizer.eos_token_id])
            samples.append(Sample(ids, torch.full((len(ids),), -6.0), True))
        return samples

    monkeypatch.setattr(trainer.engine, "generate", generate)
    trainer.step_number += 1
    indices, batch, outcome = trainer._rollout()
    assert outcome.tolist() == [1.0] * 3 + [0.0] * 3
    assert trainer.tokenizer.batch_decode(batch.responses(), skip_special_tokens=True) == written
    trainer._score(batch, outcome, indices)
    trainer._segment(batch)
    counts = batch.segments.sequence_offsets.diff()
    assert (counts > 1).all() and batch.segments.token_offsets[-1] == sum(batch.lengths)
    seen = {}
    real = attributors.hindsight_evidence

    def listening(ratio, kl, segments, mask, *rest):
        seen["mask"] = mask
        return real(ratio, kl, segments, mask, *rest)

    monkeypatch.setattr(attributors, "hindsight_evidence", listening)
    trainer._attribute(batch, outcome, indices)
    ends = batch.segments.cu_seqlens.tolist()
    for b, (begin, end) in enumerate(itertools.pairwise(ends)):
        masked = batch.token["ids"][begin:end][~seen["mask"][begin:end]]
        text = trainer.tokenizer.decode(masked)
        answer = trainer.train_problems[indices[b // 3]].answer
        assert text.replace(" ", "") == (answer * 2 if b < 3 else ""), "the answer, twice, and nothing else"


def test_difficulty_cells_of_the_data(tmp_path, tokenizer):
    rows = [json.loads(line) for line in FIXTURE.read_text(encoding="utf-8").splitlines()]
    path = tmp_path / "levels.jsonl"
    path.write_text("".join(json.dumps({**row, "level": i % 2}) + "\n" for i, row in enumerate(rows)))
    trainer = trainer_of(tmp_path, tokenizer, f"problems.path={path}", "problems.cell=level")
    assert trainer.curriculum.cells == ["0", "1"]


def test_real_problems_with_the_real_vocabulary(tmp_path, shared_data):
    arguments = [f"problems.path={shared_data / 'gsm8k' / 'dev.jsonl'}", f"policy.tokenizer={shared_data / 'tokenizer_qwen2'}"]
    small = [*SMALL, "policy.from_config=tiny", f"run_dir={tmp_path / 'run'}", "eval.max_problems=4"]
    assert main(["train", str(CONFIG), *arguments, *small]) == 0
    found = records(tmp_path / "run")
    assert [r["step"] for r in found] == [0, 1, 2] and 11.5 < found[1]["entropy"] < 11.94
    assert found[-1]["memory_gb"] < 6


def test_the_recipes_commands_are_accepted():
    """Every `acpo train` of docs/recipes.md parses: its settings exist and fit together. What a command needs that is not here is left out."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    commands = re.findall(r"^acpo train (.*?)$", text.replace("\\\n", " "), flags=re.M)
    assert len(commands) >= 4
    for command in commands:
        words = [w for w in shlex.split(command, comments=True) if not w.startswith("--")]
        config.load(ROOT / words[0], words[1:])
