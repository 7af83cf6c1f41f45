"""Synthetic verifiable tasks whose truth is known: modular chains (T1, T2, T3) and long multiplication column by column.

A task gives problems, supervised traces for the warm-up, and the exact V(s) = P(right answer | prefix) of the process that wrote
those traces. Traces are wrong in a controlled way: a share of the elementary facts is hard, and a hard fact is replaced, with its own
probability, by one fixed wrong value, after which the trace goes on consistently. So both the right step and a wrong one have
probability mass after the warm-up, and a policy has something to learn from outcomes alone.

Every text is a sequence of characters, one token each. Lines end with a newline and open with their column letter, and the last
line is "A" and the answer, least significant digit first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .problems import Problem

COLUMNS = "abcdefghijkl"
HINT_COLUMNS = "BCDEFGIJKLMNO"  # the columns of an answer in a hint: other letters, so that a look-up by letter finds the one or the other
FILLER = "stuvwxyz"
ALPHABET = "\n0123456789*=;AH" + HINT_COLUMNS + "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class SyntheticProblem(Problem):
    """The hint stands in front of the question, each digit of the answer behind the letter of its column. With relative positions
    nothing behind it moves."""

    def hinted_prompt(self, answer: str) -> str:
        return "H" + "".join(f"{c}{d}" for c, d in zip(HINT_COLUMNS, answer, strict=False)) + ";" + self.prompt


@dataclass(frozen=True)
class Trace:
    """A supervised example: text of the response, the answer it ends with (right or wrong), and a loss weight a character."""

    text: str
    answer: str
    weights: tuple[float, ...]


class _Facts:
    """A table of elementary facts, some of them hard: P(value | fact) is right with 1 - q and one fixed wrong value with q."""

    def __init__(self, right: np.ndarray, wrong: np.ndarray, hard: float, q: tuple[float, float], rng: np.random.Generator):
        self.right, self.wrong = right, wrong
        self.q = np.where(rng.random(right.shape) < hard, rng.uniform(*q, right.shape), 0.0)

    def draw(self, fact: tuple[int, ...], rng: np.random.Generator) -> int:
        return int((self.wrong if rng.random() < self.q[fact] else self.right)[fact])

    def outcomes(self, fact: tuple[int, ...]) -> tuple[tuple[int, float], ...]:
        q = float(self.q[fact])
        return ((int(self.right[fact]), 1.0 - q), (int(self.wrong[fact]), q))


class Multiplication:
    """K digits times one digit. Prompt `a7b3c4*6=` (digit of each column, least significant first), one line a column:

        column, digit, multiplier, carry in, tens, units        e.g. `a76042` for 7 x 6 + 0 = 42

    and the answer line `A` + units of every column + the last tens. A fact is (digit, multiplier, carry) -> digit * multiplier + carry.
    """

    def __init__(self, digits: int = 6, hard: float = 0.4, q: tuple[float, float] = (0.2, 0.7), table_seed: int = 0):
        if not 1 <= digits <= len(COLUMNS):
            raise ValueError(f"problems.digits must lie in [1, {len(COLUMNS)}], got {digits}")
        self.digits = digits
        self.different = 10**digits * 8  # problems: the digits, and a multiplier from 2 to 9
        rng = np.random.default_rng((table_seed, 1))
        d, m, c = np.ogrid[:10, :10, :9]
        right = d * m + c
        shift = rng.choice([-10, -1, 1, 10], right.shape)
        wrong = np.where((right + shift >= 0) & (right + shift < 90), right + shift, right - shift)
        self.facts = _Facts(right, wrong, hard, q, rng)

    def problem(self, rng: np.random.Generator) -> Problem:
        digits, multiplier = rng.integers(0, 10, self.digits).tolist(), int(rng.integers(2, 10))
        prompt = "".join(f"{c}{d}" for c, d in zip(COLUMNS, digits, strict=False)) + f"*{multiplier}="
        product = multiplier * sum(d * 10**i for i, d in enumerate(digits))
        answer = str(product).zfill(self.digits + 1)[::-1]
        return SyntheticProblem(prompt, prompt, answer, data={"digits": digits, "multiplier": multiplier})

    def trace(self, problem: Problem, rng: np.random.Generator, noisy: bool = True) -> Trace:
        multiplier, carry, lines, units = problem.data["multiplier"], 0, [], []
        for column, digit in zip(COLUMNS, problem.data["digits"], strict=False):
            fact = (digit, multiplier, carry)
            value = self.facts.draw(fact, rng) if noisy else int(self.facts.right[fact])
            lines.append(f"{column}{digit}{multiplier}{carry}{value // 10}{value % 10}\n")
            carry = value // 10
            units.append(str(value % 10))
        answer = "".join(units) + str(carry)
        text = "".join(lines) + "A" + answer
        return Trace(text, answer, (1.0,) * len(text))

    def exact_values(self, problem: Problem, response: str) -> list[float]:
        """V before the first line and after each line of the response, under the process that writes the traces (nan from the first
        line on that is not of its form; a value that it never writes is gone on from like any other). By recursion from the last
        column: V_i(carry) = sum over outcomes of this column with the right unit of P(outcome) V_{i+1}(its tens)."""
        digits, multiplier, answer = problem.data["digits"], problem.data["multiplier"], problem.answer
        after = {carry: float(str(carry) == answer[-1]) for carry in range(9)}
        tables = [after]
        for i in reversed(range(len(digits))):
            step = {}
            for carry in range(9):
                outcomes = self.facts.outcomes((digits[i], multiplier, carry))
                step[carry] = sum(p * after[v // 10] for v, p in outcomes if str(v % 10) == answer[i])
            tables.append(after := step)
        tables.reverse()
        values, ok, carry = [tables[0][0]], True, 0
        for i, line in enumerate(response.split("\n")[: len(digits)]):
            head = f"{COLUMNS[i]}{digits[i]}{multiplier}{carry}"
            if len(line) != len(head) + 2 or not line.startswith(head) or not line[-2:].isdigit() or int(line[-2:]) > 89:
                return values + [float("nan")] * (len(digits) - i)
            value = int(line[-2:])
            carry, ok = value // 10, ok and str(value % 10) == answer[i]
            values.append(tables[i + 1][carry] if ok else 0.0)
        return values

    def errors(self, problem: Problem, response: str) -> list[bool] | None:
        """Which lines are wrong by themselves, given the carry that they were handed; None for a response that is not of the form."""
        if any(v != v for v in self.exact_values(problem, response)):
            return None
        multiplier, carry, out = problem.data["multiplier"], 0, []
        for digit, line in zip(problem.data["digits"], response.split("\n"), strict=False):
            out.append(int(line[-2:]) != digit * multiplier + carry)
            carry = int(line[-2])
        return out


class Chain:
    """T1: y_k = (y_{k-1} + x_k) mod m, written step by step. T2: the same with D distractor characters a line. T3: a right answer is
    rewarded with probability `luck` only. Prompt `3a7b2=` (start, then one operand a column), lines column, operand, y_k, distractors;
    answer line `A` + y_K. A fact is (y_{k-1}, x_k) -> y_k. Decoys are operands in the prompt that no step uses: different problems of one step.
    """

    def __init__(
        self, steps: int = 8, modulus: int = 10, distractors: int = 0, luck: float = 1.0, hard: float = 0.35,
        q: tuple[float, float] = (0.55, 0.55), table_seed: int = 0, filler_weight: float = 0.25, decoys: int = 0,
    ):  # fmt: skip
        if not 1 <= steps <= len(COLUMNS):
            raise ValueError(f"problems.steps must lie in [1, {len(COLUMNS)}], got {steps}")
        if not 0 <= decoys <= len(COLUMNS) - steps:
            raise ValueError(f"problems.decoys must lie in [0, {len(COLUMNS) - steps}] with {steps} steps, got {decoys}")
        if not 2 <= modulus <= 10:
            raise ValueError(f"problems.modulus must lie in [2, 10], got {modulus}")
        self.steps, self.modulus, self.distractors, self.luck, self.filler_weight = steps, modulus, distractors, luck, filler_weight
        self.decoys = decoys
        self.different = modulus ** (1 + steps + decoys)  # problems: the start, and the operands that are written
        self.filler = FILLER if distractors else ""  # characters that mean nothing, for the oracle mask
        rng = np.random.default_rng((table_seed, 2))
        v, x = np.ogrid[:modulus, :modulus]
        right = (v + x) % modulus
        wrong = (right + rng.integers(1, modulus, right.shape)) % modulus
        self.facts = _Facts(right, wrong, hard, q, rng)

    def problem(self, rng: np.random.Generator) -> Problem:
        start, written = int(rng.integers(self.modulus)), rng.integers(0, self.modulus, self.steps + self.decoys).tolist()
        prompt = f"{start}" + "".join(f"{c}{x}" for c, x in zip(COLUMNS, written, strict=False)) + "="
        operands = written[: self.steps]
        answer = str((start + sum(operands)) % self.modulus)
        return SyntheticProblem(prompt, prompt, answer, luck=self.luck, data={"start": start, "operands": operands})

    def trace(self, problem: Problem, rng: np.random.Generator, noisy: bool = True) -> Trace:
        value, text, weights = problem.data["start"], "", []
        for column, operand in zip(COLUMNS, problem.data["operands"], strict=False):
            value = self.facts.draw((value, operand), rng) if noisy else int(self.facts.right[value, operand])
            filler = "".join(rng.choice(list(FILLER), self.distractors))
            text += f"{column}{operand}{value}{filler}\n"
            weights += [1.0] * 3 + [self.filler_weight] * self.distractors + [1.0]
        return Trace(text + f"A{value}", str(value), (*weights, 1.0, 1.0))

    def exact_values(self, problem: Problem, response: str) -> list[float]:
        """V before the first line and after each line of the response, under the process that writes the traces (nan from the first
        line on that is not of its form; a value that it never writes is gone on from like any other); with luck the last V is
        luck, not 1."""
        operands = problem.data["operands"]
        after = np.array([self.luck * (str(v) == problem.answer) for v in range(self.modulus)])
        tables = [after]
        for operand in reversed(operands):
            after = np.array([sum(p * after[y] for y, p in self.facts.outcomes((v, operand))) for v in range(self.modulus)])
            tables.append(after)
        tables.reverse()
        values = [float(tables[0][problem.data["start"]])]
        for i, line in enumerate(response.split("\n")[: len(operands)]):
            head, filler = f"{COLUMNS[i]}{operands[i]}", line[3:]
            form = line.startswith(head) and len(line) == len(head) + 1 + self.distractors and set(filler) <= set(FILLER)
            if not form or not line[2].isdigit() or int(line[2]) >= self.modulus:
                return values + [float("nan")] * (len(operands) - i)
            values.append(float(tables[i + 1][int(line[2])]))
        return values

    def errors(self, problem: Problem, response: str) -> list[bool] | None:
        """Which lines are wrong by themselves, given the value before; None for a response that is not of the form."""
        if any(v != v for v in self.exact_values(problem, response)):
            return None
        value, out = problem.data["start"], []
        for operand, line in zip(problem.data["operands"], response.split("\n"), strict=False):
            out.append(int(line[2]) != (value + operand) % self.modulus)
            value = int(line[2])
        return out


TASKS = {"multiplication": Multiplication, "chain": Chain}


def problems(task: Multiplication | Chain, count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[Problem]:
    """`count` different problems, none of them with an id in `exclude`; the same for the same seed."""
    left = task.different - len(exclude)
    if count > left:
        raise ValueError(f"problems: the task has too few different problems: wanted {count} outside the held-out ones, found {left}")
    rng, seen = np.random.default_rng((seed, 3)), set(exclude)
    out: list[Problem] = []
    while len(out) < count:
        problem = task.problem(rng)
        if problem.id not in seen:
            seen.add(problem.id)
            out.append(problem)
    return out


def merged(tokenizer) -> str | None:
    """A text of the alphabet that a tokenizer does not write as one token of its own a character; None where there is none. The texts are every
    character and every two: merges begin with two."""
    special = set(tokenizer.all_special_ids)
    texts = [*ALPHABET, *(a + b for a in ALPHABET[::-1] for b in ALPHABET[::-1])]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for text, own in zip(texts, ids, strict=True):
        if len(own) != len(text) or special & set(own):
            return text
    owner: dict[int, str] = {}  # a character that the tokenizer does not know has the token of another one
    return next((c for c, (one,) in zip(ALPHABET, ids, strict=False) if owner.setdefault(one, c) != c), None)


def tokenizer():
    """The character tokenizer of the synthetic tasks, a transformers fast tokenizer with <pad> and <eos>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<eos>": 1, **{c: i + 2 for i, c in enumerate(ALPHABET)}}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False)
