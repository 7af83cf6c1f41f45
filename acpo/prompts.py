"""From a problem to the token ids in front of a rollout."""

from __future__ import annotations

from functools import lru_cache

from .config import ProblemsConfig
from .problems import Problem

REMEMBERED = 1024  # texts: a problem comes again and again, and a call of a tokenizer takes as long as a small forward


def prefix_of(tokenizer) -> list[int]:
    """The special tokens that a tokenizer puts in front of a text, a base model's <bos>; those behind it (<eos>) would end what begins here."""
    own, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return next((whole[:i] for i in range(len(whole)) if own and whole[i : i + len(own)] == own), [])


class Prompts:
    def __init__(self, config: ProblemsConfig, tokenizer):
        self.config, self.tokenizer = config, tokenizer
        self.prefix = [] if config.chat else prefix_of(tokenizer)  # a chat template writes its own
        self._ids = lru_cache(REMEMBERED)(lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))

    def encode(self, text: str) -> list[int]:
        """A text inside a rollout: without special tokens."""
        return list(self._ids(text))

    def prompt(self, text: str) -> list[int]:
        """Token ids in front of a rollout: the text behind the prefix, or as a user message of the tokenizer's chat template."""
        if not self.config.chat:
            ids = self.encode(text)
            return ids if ids[: len(self.prefix)] == self.prefix else self.prefix + ids  # problems.template may spell it
        system = [{"role": "system", "content": self.config.system}] if self.config.system else []
        message = self.tokenizer.apply_chat_template([*system, {"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        return self.encode(message)

    def hinted(self, problem: Problem) -> list[int]:
        """The prompt with the answer in it."""
        return self.prompt(problem.hinted_prompt(problem.answer))

    def spellings(self, answer: str) -> list[list[int]]:
        """How the answer may stand in a rollout: a tokenizer of text may merge a space in front of it."""
        return [self.encode(answer)] if self.config.task else [self.encode(answer), self.encode(" " + answer)]
