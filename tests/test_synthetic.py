"""The synthetic tasks: what they claim to know exactly is counted out by brute force and by sampling."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from loop import exact_match

from acpo.policy import byte_tokenizer, load_tokenizer
from acpo.synthetic import ALPHABET, Chain, Multiplication, merged, problems, tokenizer
from acpo.warmup import examples

TASKS = {
    "multiplication": Multiplication(digits=3, hard=0.7, q=(0.2, 0.7)),
    "chain": Chain(steps=3, modulus=5, hard=0.7, q=(0.2, 0.7)),
    "distractors": Chain(steps=3, modulus=4, distractors=3, hard=0.7, q=(0.2, 0.7)),
    "decoys": Chain(steps=2, modulus=5, hard=0.7, q=(0.2, 0.7), decoys=2),
    "luck": Chain(steps=3, modulus=5, luck=0.3, hard=0.7, q=(0.2, 0.7)),
}


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def continuations(task, problem, state: int, at: int):
    """(probability, the values of the columns that are left) of every way the noisy process can go on."""
    if at == (task.digits if isinstance(task, Multiplication) else task.steps):
        yield 1.0, []
        return
    if isinstance(task, Multiplication):
        fact = (problem.data["digits"][at], problem.data["multiplier"], state)
    else:
        fact = (state, problem.data["operands"][at])
    for value, p in task.facts.outcomes(fact):
        if p > 0:
            following = value // 10 if isinstance(task, Multiplication) else value
            for q, rest in continuations(task, problem, following, at + 1):
                yield p * q, [value, *rest]


def right(task, problem, values: list[int]) -> bool:
    """Whether the columns' values end in the right answer, from the task's definition."""
    if isinstance(task, Chain):
        return values[-1] == (problem.data["start"] + sum(problem.data["operands"])) % task.modulus
    number = sum(d * 10**i for i, d in enumerate(problem.data["digits"])) * problem.data["multiplier"]
    written = sum((v % 10) * 10**i for i, v in enumerate(values)) + (values[-1] // 10) * 10 ** len(values)
    return written == number


def columns(task, problem, text: str) -> list[int]:
    lines = text.split("\n")[:-1]
    return [int(line[-2:]) if isinstance(task, Multiplication) else int(line[2]) for line in lines]


def test_exact_values_against_every_continuation(task):
    rng = np.random.default_rng(0)
    luck = getattr(task, "luck", 1.0)
    seen = set()
    for problem in problems(task, 12, seed=5):
        for _ in range(4):
            trace = task.trace(problem, rng)
            values = columns(task, problem, trace.text)
            exact = task.exact_values(problem, trace.text)
            assert len(exact) == len(values) + 1
            state = 0 if isinstance(task, Multiplication) else problem.data["start"]
            for at in range(len(values) + 1):
                if at:
                    state = values[at - 1] // 10 if isinstance(task, Multiplication) else values[at - 1]
                brute = sum(p for p, rest in continuations(task, problem, state, at) if right(task, problem, values[:at] + rest))
                assert exact[at] == pytest.approx(luck * brute, abs=1e-12)
                seen.add(round(exact[at], 3))
            assert math.isclose(exact[-1], luck * exact_match(problem, trace.text, "line"))
    assert len(seen) > 10, "the prefixes must differ in value for this to say anything"


def test_exact_values_against_sampling(task):
    rng = np.random.default_rng(1)
    count, luck = 3000, getattr(task, "luck", 1.0)
    problem = next(p for p in problems(task, 50, seed=6) if 0.1 < task.exact_values(p, "")[0] / luck < 0.9)
    hits = np.mean([exact_match(problem, task.trace(problem, rng).text, "line") for _ in range(count)])
    exact = task.exact_values(problem, "")[0] / luck
    assert abs(hits - exact) < 4 * math.sqrt(exact * (1 - exact) / count)


def test_exact_values_average_to_the_one_before(task):
    """A martingale: the mean of V after a line over what the process writes there is V before it."""
    for problem in problems(task, 6, seed=7):
        before, after = task.exact_values(problem, "")[0], 0.0
        for p, values in continuations(task, problem, 0 if isinstance(task, Multiplication) else problem.data["start"], 0):
            if isinstance(task, Multiplication):
                carry = 0
                line = f"a{problem.data['digits'][0]}{problem.data['multiplier']}{carry}{values[0] // 10}{values[0] % 10}\n"
            else:
                line = f"a{problem.data['operands'][0]}{values[0]}{'s' * task.distractors}\n"
            after += p * task.exact_values(problem, line)[1]
        assert after == pytest.approx(before, abs=1e-12)


def test_exact_values_of_what_the_process_cannot_write(task):
    problem = problems(task, 1, seed=8)[0]
    trace = task.trace(problem, np.random.default_rng(0), noisy=False)
    lines = trace.text.split("\n")
    for broken in ("", "x", lines[1] + "0", "b" + lines[1][1:-1] + "="):
        values = task.exact_values(problem, "\n".join([lines[0], broken, *lines[2:]]))
        assert len(values) == len(lines) and not any(map(math.isnan, values[:2])) and all(map(math.isnan, values[2:]))


def test_a_trace_without_noise_is_right(task):
    rng = np.random.default_rng(0)
    for problem in problems(task, 40, seed=9):
        trace = task.trace(problem, rng, noisy=False)
        assert exact_match(problem, trace.text, "line") and trace.answer == problem.answer
        assert right(task, problem, columns(task, problem, trace.text))
        assert len(trace.weights) == len(trace.text)


def test_a_noisy_trace_says_what_it_answers(task):
    rng = np.random.default_rng(0)
    outcomes = set()
    for problem in problems(task, 60, seed=10):
        trace = task.trace(problem, rng)
        assert trace.text.split("\n")[-1] == "A" + trace.answer
        outcomes.add(exact_match(problem, trace.text, "line"))
        assert exact_match(problem, trace.text, "line") == (trace.answer == problem.answer)
    assert outcomes == {True, False}


def test_distractors_weigh_less():
    task = TASKS["distractors"]
    problem = problems(task, 1, seed=0)[0]
    trace = task.trace(problem, np.random.default_rng(0))
    assert {w for c, w in zip(trace.text, trace.weights, strict=True) if c in "stuvwxyz"} == {0.25}
    assert sum(w == 0.25 for w in trace.weights) == 9 and sum(w == 1.0 for w in trace.weights) == len(trace.text) - 9


def test_the_table_of_facts_is_the_seeds():
    one, two, other = (Multiplication(digits=2, table_seed=s) for s in (3, 3, 4))
    assert np.array_equal(one.facts.q, two.facts.q) and np.array_equal(one.facts.wrong, two.facts.wrong)
    assert not np.array_equal(one.facts.q, other.facts.q)
    for facts in (one.facts, Chain(steps=2).facts):
        assert (facts.wrong != facts.right).all() and (facts.wrong >= 0).all(), "a wrong value is wrong and can be written"
    assert 0.3 < (one.facts.q > 0).mean() < 0.5


def test_problems_are_different_and_kept_apart(task):
    held_out = problems(task, 20, seed=1)
    rest = problems(task, 20, seed=2, exclude=frozenset(p.id for p in held_out))
    ids = [p.id for p in held_out + rest]
    assert len(set(ids)) == 40
    assert [p.id for p in problems(task, 20, seed=1)] == ids[:20]
    assert [p.id for p in problems(task, 20, seed=11)] != ids[:20]


def test_too_few_problems():
    with pytest.raises(ValueError, match="too few different problems: wanted 100 outside the held-out ones, found 4"):
        problems(Chain(steps=1, modulus=2), 100, seed=0)
    with pytest.raises(ValueError, match="wanted 10000000000 outside the held-out ones, found 1"):  # said at once
        problems(Chain(steps=1, modulus=2), 10**10, seed=0, exclude=frozenset(p.id for p in problems(Chain(steps=1, modulus=2), 3, seed=1)))


@pytest.mark.parametrize(
    "task", [Chain(steps=1, modulus=3), Chain(steps=1, modulus=2, decoys=2), Multiplication(digits=1)], ids=["chain", "decoys", "multiplication"]
)
def test_how_many_problems_there_are(task):
    rng = np.random.default_rng(0)
    assert task.different == len({task.problem(rng).prompt for _ in range(2000)}) == len(problems(task, task.different, seed=0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Multiplication(digits=0), r"problems.digits must lie in \[1, 12\], got 0"),
        (lambda: Multiplication(digits=13), r"problems.digits must lie in \[1, 12\], got 13"),
        (lambda: Chain(steps=13), r"problems.steps must lie in \[1, 12\], got 13"),
        (lambda: Chain(modulus=1), r"problems.modulus must lie in \[2, 10\], got 1"),
        (lambda: Chain(modulus=11), r"problems.modulus must lie in \[2, 10\], got 11"),
    ],
)
def test_sizes_that_cannot_be_written(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tokenizer_reads_and_writes_every_text(task):
    tokens = tokenizer()
    assert len(tokens) == len(ALPHABET) + 2 and (tokens.pad_token_id, tokens.eos_token_id) == (0, 1)
    rng = np.random.default_rng(0)
    for problem in problems(task, 10, seed=3):
        for text in (problem.prompt, problem.hinted_prompt(problem.answer), task.trace(problem, rng).text):
            ids = tokens(text, add_special_tokens=False)["input_ids"]
            assert len(ids) == len(text) and 0 not in ids
            assert tokens.decode([*ids, 1, 0, 0], skip_special_tokens=True) == text


def test_tokenizers_with_a_token_a_character(shared_data):
    """Others crashed in the warm-up or where an answer begins."""
    assert merged(tokenizer()) is None and merged(byte_tokenizer()) is None
    assert merged(load_tokenizer(str(shared_data / "tokenizer_qwen2"))) == "zz"


def test_largest_tasks_fit_the_alphabet():
    tokens, rng = tokenizer(), np.random.default_rng(0)
    for task in (Multiplication(digits=12), Chain(steps=12, modulus=10, distractors=2)):
        problem = problems(task, 1, seed=0)[0]
        hinted = problem.hinted_prompt(problem.answer)
        assert hinted.endswith(problem.prompt) and all(d in hinted for d in problem.answer)
        assert hinted.count(";") == 1 and len(hinted) == len(problem.prompt) + 2 + 2 * len(problem.answer), "every digit of the answer is in the hint"
        assert 0 not in tokens(hinted + task.trace(problem, rng).text)["input_ids"]


def test_warmup_hints_are_the_traces_own_answers():
    task = TASKS["multiplication"]
    drawn = examples(task, problems(task, 30, seed=0), 400, 0.3, np.random.default_rng(0))
    hinted = [e for e in drawn if e.prompt.startswith("H")]
    assert 0.2 < len(hinted) / len(drawn) < 0.4
    wrong = 0
    for example in hinted:
        hint, prompt = example.prompt.split(";")
        written = example.response.split("\n")[-1][1:]
        assert hint[2::2] == written, "right or wrong, what the trace itself answers"
        digits, multiplier = int(prompt[1 : prompt.index("*") : 2][::-1]), int(prompt[-2])
        wrong += written != str(digits * multiplier).zfill(len(written))[::-1]
    assert 0 < wrong < len(hinted)


def test_facts_draw_what_outcomes_say():
    facts = TASKS["chain"].facts
    fact = next(f for f in itertools.product(range(5), range(5)) if facts.q[f] > 0)
    rng, count = np.random.default_rng(0), 4000
    drawn = np.array([facts.draw(fact, rng) for _ in range(count)])
    for value, p in facts.outcomes(fact):
        assert abs((drawn == value).mean() - p) < 4 * math.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("task", [Multiplication(digits=4), Chain(steps=5, distractors=2)], ids=["multiplication", "chain"])
def test_errors_are_the_lines_that_are_wrong_by_themselves(task):
    """A trace without noise has none; of a noisy one the errors are where the facts were drawn wrong, and an early one does not mark the later."""
    rng = np.random.default_rng(0)
    seen = 0
    for _ in range(50):
        problem = task.problem(rng)
        assert task.errors(problem, task.trace(problem, rng, noisy=False).text) == [False] * (4 if isinstance(task, Multiplication) else 5)
        found = task.errors(problem, task.trace(problem, rng).text)
        seen += sum(found) == 1 and not found[-1]
    assert seen > 5 and task.errors(problem, "nonsense") is None


def test_a_probed_example_answers_after_some_lines_and_learns_the_answer_alone():
    task, rng = Chain(steps=5), np.random.default_rng(0)
    problems_ = [task.problem(rng) for _ in range(20)]
    found = examples(task, problems_, 200, 0.3, rng, 0.2, ";A")
    probed = [e for e in found if ";A" in e.response]
    assert 20 < len(probed) < 60
    for example in probed:
        head, _, answer = example.response.partition(";A")
        assert example.weights == (0.0,) * (len(head) + 2) + (1.0,) * len(answer) and head.count("\n") <= 5 and not example.prompt.startswith("H")
    lines = {e.response.partition(";A")[0].count("\n") for e in probed}
    assert lines == set(range(6))
    plain = [examples(task, problems_, 30, 0.3, np.random.default_rng(1), 0.0, suffix) for suffix in ("", ";A")]
    assert plain[0] == plain[1]
