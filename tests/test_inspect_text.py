"""Any traces through any model: the numbers are those of the kernels, whatever else stands in the file; and `acpo segment`."""

from __future__ import annotations

import json

import pytest
import torch

from acpo import config
from acpo.cli import main
from acpo.inspect.data import InspectError
from acpo.inspect.text import inspect_traces
from acpo.inspect.traces import Trace
from acpo.policy import build

TEXTS = ["First we add 2 and 2.\n\nThat makes 4, so far.\n\nThe answer is 4.", "We guess that it is five \U0001f600.\n\nThe answer is 5."]


@pytest.fixture(autouse=True)
def one_thread(deterministic):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A random model on bytes."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    policy, tokenizer = build(config.load(None, ["policy.from_config=tiny", "policy.tokenizer=bytes", "problems.path=x", "policy.device=cpu"]))
    policy.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def settings(model: str, *overrides: str) -> config.Config:
    return config.load(None, overrides, ("--text", {"policy.path": model, "problems.path": "x", "policy.device": "cpu"}))


def test_figures_are_those_of_two_plain_forwards(model):
    traces = [Trace("a", "2+2?", TEXTS[0], "4"), Trace("b", "2+2?", TEXTS[1], "4"), Trace("c", "3+3?", TEXTS[1])]
    chosen = settings(model, "attribution.mask_answer_copies=false", "problems.template=Q: {problem}\n")
    told = []
    view = inspect_traces(traces, chosen, "t", told.append)
    assert sum(told) == 3 and [len(g.rollouts) for g in view.groups] == [2, 1]
    policy, tokenizer = build(chosen)

    def forward(prompt: str, response: str):
        a, b = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, response))
        with torch.no_grad():
            logits = policy.model(torch.tensor([a + b])).logits[0, len(a) - 1 : -1].double()
        logp = logits.log_softmax(-1)
        return logp[range(len(b)), b], -(logp.exp() * logp).sum(-1)

    for rollout, trace in zip(view.rollouts, traces, strict=True):
        plain, entropy = forward(f"Q: {trace.problem}\n", trace.response)
        hinted, _ = forward(f"The answer is {trace.answer}.\nQ: {trace.problem}\n", trace.response)
        assert rollout.text == trace.response and rollout.tokens == len(plain) and rollout.steps[-1].answer
        at = 0
        for step in rollout.steps:
            part = slice(at, at + step.tokens)
            assert len(trace.response[step.start : step.end].encode()) == step.tokens  # a byte a token
            assert step.logp == pytest.approx(float(plain[part].mean()), abs=1e-4) and step.entropy == pytest.approx(
                float(entropy[part].mean()), abs=1e-4
            )
            if trace.answer:
                assert step.hindsight == pytest.approx(float((hinted - plain)[part].sum()), abs=1e-3)
            else:
                assert step.hindsight is step.credit is step.phi is None
            at += step.tokens
    right, wrong, _ = view.rollouts
    assert (right.outcome, wrong.outcome, right.given, wrong.given) == (1.0, 0.0, "4", "5")  # judged by the answer: the file gave no outcome
    assert right.advantage == pytest.approx(1.0, abs=1e-4) and all(s.own == pytest.approx(s.credit - right.advantage) for s in right.steps[:-1])
    # The value telescopes, from what the other's outcome says (0, held within [1/4, 3/4] in a group of two): phi sums to V - V_0.
    assert sum(s.phi for s in right.steps[:-1]) == pytest.approx(right.steps[-2].value - 0.25, abs=1e-6)
    assert view.notes[1] == "credit and hindsight need an answer: 1 of 3 traces have none"


def test_edges(model):
    traces = [Trace("a", "", ""), Trace("b", "", "x"), Trace("c", "q", "Two.", "2", outcome=1.0), Trace("d", "q", "", "2", outcome=0.0)]
    view = inspect_traces(traces, settings(model), "t")
    assert [[len(r.steps) for r in g.rollouts] for g in view.groups] == [[0, 1], [1, 0]]
    assert [g.problem for g in view.groups] == ["a", "c"] and view.rollouts[1].outcome is None
    assert [r.advantage for r in view.rollouts[2:]] == [pytest.approx(1.0, abs=1e-4), pytest.approx(-1.0, abs=1e-4)]
    only = inspect_traces([Trace("a", "q", "")], settings(model), "t")
    assert only.rollouts[0].steps == []


def test_a_model_without_padding_and_with_few_positions(shared_data, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(shared_data / "tokenizer_gpt2" / "tokenizer.json")).save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=50257, n_positions=64, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    long, short = Trace("a", "q", "word " * 100, "4"), Trace("b", "q", TEXTS[0], "4")
    view = inspect_traces([long, short], settings(str(tmp_path)), "t")
    assert [r.text for r in view.rollouts] == [TEXTS[0]] and "1 of 2 traces are longer than the model reads, and left out" in view.notes
    with pytest.raises(InspectError, match="reads at most 64 tokens"):
        inspect_traces([long], settings(str(tmp_path)), "t")


def test_the_command(tmp_path, model, capsys):
    rows = [
        {"id": 1, "problem": "2+2?", "trace": TEXTS[0], "gold": "4", "is_correct": True},
        {"id": 2, "problem": "2+2?", "trace": TEXTS[1], "gold": "4", "is_correct": False},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = ["inspect", "--text", str(tmp_path / "t.jsonl"), "--model", model, "policy.device=cpu", "segmenter.max_segments=2"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["title"] == "t.jsonl" and [[len(r["steps"]) for r in g["rollouts"]] for g in found["groups"]] == [[2, 2]]
    assert main([*command, "--most", "1", "--no-color"]) == 0
    out, err = capsys.readouterr()
    assert "1 problem · 1 rollout: 1 right, 0 wrong" in out and "note: credit at reliability 1" in out and err == ""


def test_steps_of_real_traces_cover_their_text(shared_data, tmp_path, capsys):
    source = shared_data / "traces_r1_math" / "dev.jsonl"
    assert main(["segment", str(source), "--tokenizer", str(shared_data / "tokenizer_qwen2"), "--most", "3", "--json"]) == 0
    traces = [json.loads(line) for line in source.read_text().splitlines()[:3]]
    for line, trace in zip(capsys.readouterr().out.splitlines(), traces, strict=True):
        found = json.loads(line)
        assert found["id"] == trace["id"] and "".join(s["text"] for s in found["steps"]) == trace["trace"]
        assert (
            len(found["steps"]) > 5
            and {s["rule"] for s in found["steps"]} & {"paragraph", "sentence", "marker"}
            and found["steps"][-1]["rule"] == "end"
        )


def test_segment_prints_reasons(tmp_path, capsys):
    path = tmp_path / "s.txt"
    path.write_text(TEXTS[0] + "\n\x1b[31m")
    assert main(["segment", str(path), "--tokenizer", "bytes", "--width", "90"]) == 0
    out = capsys.readouterr().out
    assert "s.txt  68 tokens, 3 steps" in out and "¶ paragraph: a blank line" in out and "= answer: the answer begins" in out
    assert "\x1b" not in out and "⟨U+001B⟩[31m" in out and max(map(len, out.splitlines())) <= 90
    assert main(["segment", str(path), "--tokenizer", "bytes", "--json", "segmenter.max_segments=1"]) == 0
    (step,) = json.loads(capsys.readouterr().out)["steps"]
    assert step["rule"] == "end" and step["text"] == path.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["absent.jsonl", "--tokenizer", "bytes"], 1, "no such file: absent.jsonl"),
        (["absent.txt", "--tokenizer", "bytes"], 1, "no such file: absent.txt"),
        (["bad.jsonl", "--tokenizer", "bytes"], 1, "bad.jsonl, line 1: not valid JSON"),
        (["digits.jsonl", "--tokenizer", "bytes"], 1, "digits.jsonl, line 1: not valid JSON: Exceeds the limit (4300 digits)"),
        (["huge.jsonl", "--tokenizer", "bytes"], 1, "huge.jsonl, line 1: wanted an outcome in [0, 1], or true or false, got 1000"),
        (["good.jsonl", "--tokenizer", "absent"], 2, "policy.tokenizer: no such file or folder: absent"),
        (["good.jsonl", "--tokenizer", "bytes", "segmenter.entropy=true"], 2, "segmenter.entropy needs a policy or a run"),
        (["good.jsonl", "--tokenizer", "bytes", "segmenter.fixed=8"], 2, "segmenter.fixed needs a policy or a run"),
        (["good.jsonl", "--tokenizer", "bytes", "policy.path=x"], 2, "wanted settings of the segmenter as segmenter.NAME=VALUE, got 'policy.path=x'"),
        (["good.jsonl", "--tokenizer", "bytes", "segmenter.max_segments=0"], 2, "segmenter.max_segments must be greater than 0"),
        (["good.jsonl", "--tokenizer", "bytes", "--most", "-1"], 2, "--most must be at least 0, got -1"),
    ],
)
def test_segment_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "good.jsonl").write_text('{"solution": "x"}\n')
    (tmp_path / "digits.jsonl").write_text('{"solution": "x", "n": ' + "1" * 5000 + "}\n")
    (tmp_path / "huge.jsonl").write_text('{"solution": "x", "reward": 1' + "0" * 400 + "}\n")
    assert main(["segment", *arguments]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("acpo: ") and message in error
